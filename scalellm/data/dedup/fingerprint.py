"""What is remembered of a document: a digest of its text and a MinHash signature of its n-grams.

The signature is the classic one: under each of K hash functions, the smallest hash of all shingles.
Two documents agree in one of them with a probability that is their Jaccard similarity, for short
and long documents alike (one-permutation hashing would not be faster here and is noisier for short
ones). The functions are `a * x + b` modulo 2^32 of shingle hashes that are random already.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from blake3 import blake3

from scalellm.data.dedup.options import DedupOptions
from scalellm.data.dedup.shingles import shingle_hashes

DIGEST_BYTES = 16
# A change of what a fingerprint is raises this: old indexes are then refused.
FINGERPRINT_VERSION = 1
# Below this, one changed word turns over all shingles, and lines such as titles match by chance.
_MIN_SHINGLES = 8
# So many shingles at a time stay in a core's cache.
_BLOCK_SHINGLES = 1 << 15


@dataclass(frozen=True)
class Fingerprints:
    """Of N documents in order: plain arrays, for queues between processes.

    Attributes:
        exact_N16: uint8, blake3 of the normalised text, 16 bytes.
        signatures_NK: uint32 MinHash; K is 0 without the near search.
        is_short_N: bool, less than 8 shingles: takes part in the exact search only.
    """

    exact_N16: np.ndarray
    signatures_NK: np.ndarray
    is_short_N: np.ndarray

    def __len__(self) -> int:
        return len(self.exact_N16)


def fingerprints(texts: Sequence[str], options: DedupOptions) -> Fingerprints:
    """Fingerprints texts; the same text gives the same fingerprint in every batch and process.

    The digest is of the text in Unicode's NFC form, with every run of whitespace one space and none
    at the ends; letter case and punctuation count. Shingles ignore those as well.
    """
    normal = [text if text.isascii() else unicodedata.normalize("NFC", text) for text in texts]
    digests = b"".join(map(_digest, normal))
    exact_N16 = np.frombuffer(digests, np.uint8).reshape(len(texts), DIGEST_BYTES)
    if not options.near:
        nothing = np.zeros((len(texts), 0), np.uint32)
        return Fingerprints(exact_N16, nothing, np.ones(len(texts), bool))
    hashes_S, counts_N = shingle_hashes(normal, options.ngram)
    is_short_N = counts_N < _MIN_SHINGLES
    hashes_S = hashes_S[np.repeat(~is_short_N, counts_N)]
    signatures_NK = np.zeros((len(texts), options.num_hashes), np.uint32)
    signatures_NK[~is_short_N] = _signatures(hashes_S, counts_N[~is_short_N], options.num_hashes)
    return Fingerprints(exact_N16, signatures_NK, is_short_N)


def _digest(text: str) -> bytes:
    normal = " ".join(text.split()).encode("utf-8", "surrogatepass")
    return blake3(normal).digest(length=DIGEST_BYTES)


def _signatures(hashes_S: np.ndarray, counts_N: np.ndarray, num_hashes: int) -> np.ndarray:
    """The smallest hash under each function; every count is at least 1."""
    factors, offsets = _functions(num_hashes)
    values_S = (hashes_S >> np.uint64(32)).astype(np.uint32)
    ends_N = np.cumsum(counts_N)
    signatures_KN = np.empty((num_hashes, len(counts_N)), np.uint32)
    first = start = 0
    while first < len(counts_N):
        last = max(int(np.searchsorted(ends_N, start + _BLOCK_SHINGLES, "right")), first + 1)
        stop = int(ends_N[last - 1])
        block, starts = values_S[start:stop], ends_N[first:last] - counts_N[first:last] - start
        hashed = np.empty_like(block)
        for k in range(num_hashes):
            np.multiply(block, factors[k], out=hashed)
            hashed += offsets[k]
            np.minimum.reduceat(hashed, starts, out=signatures_KN[k, first:last])
        first, start = last, stop
    return signatures_KN.T


@lru_cache(maxsize=4)
def _functions(num_hashes: int) -> tuple[np.ndarray, np.ndarray]:
    """Odd factors and offsets, from a hash: the same with any version of numpy."""
    digests = [
        hashlib.blake2b(b"minhash %d" % k, digest_size=8).digest() for k in range(num_hashes)
    ]
    pairs = np.frombuffer(b"".join(digests), "<u4").reshape(num_hashes, 2)
    return pairs[:, 0] | np.uint32(1), pairs[:, 1].copy()
