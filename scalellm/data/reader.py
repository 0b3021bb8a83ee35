"""Random access to the tokens and document ends of one split of a dataset."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from scalellm.config.location import RemoteOptions
from scalellm.data.format import Manifest, fingerprint, load_manifest
from scalellm.data.shard_reader import ShardReader
from scalellm.data.store import RESTORE, Store, open_store
from scalellm.errors import DataError, did_you_mean

# At one index (40 KiB) and two file descriptors each.
_MAX_OPEN_SHARDS = 256


@dataclass
class _Slot:
    """A shard that is open, or that the holder of the lock is opening."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    shard: ShardReader | None = None


class TokenDataset:
    """One split of a dataset: a flat stream of `num_tokens` ids, read from any place.

    Shards open when first needed. Every frame is verified when read: index bounds, crc32 of the
    compressed bytes, declared size before decoding, zstd's content checksum, the largest id, and
    the carry token wherever two frames meet. Safe to share between threads; nothing is written.

    Attributes:
        path: the dataset directory or URL.
        split: the split's name.
        num_tokens: ids in the split, every document's EOS included.
        num_documents: documents in the split.
        num_bytes_text: UTF-8 bytes of the text.
        num_words_text: words of the text.
        vocab_size: every id is below it.
        eos_id: the id that ends every document.
        dtype: of the stored ids, little-endian uint16 or uint32.
        frame_tokens: ids per frame, the unit of reading.
        packed_seq_len: tokens of a row of whole documents and padding; None: not packed.
        fingerprint: 64 hex digits of all that decides the ids; 32 bytes cannot collide by chance.
            A copy elsewhere has the same.
        fetch_threads: threads that should read ahead, since each waits for a network; 0: none need.
    """

    def __init__(self, store: Store, split: str, manifest: Manifest) -> None:
        if split not in manifest.splits:
            names, near = ", ".join(sorted(manifest.splits)), did_you_mean(split, manifest.splits)
            raise DataError(f"{store.location} has no split {split!r}, it has: {names}{near}")
        entry = manifest.splits[split]
        self._store, self.fetch_threads = store, store.fetch_threads
        self.path, self.split, self.manifest = store.location, split, manifest
        self.num_tokens, self.num_documents = entry.num_tokens, entry.num_documents
        self.num_bytes_text, self.num_words_text = entry.num_bytes_text, entry.num_words_text
        self.vocab_size, self.eos_id = manifest.vocab_size, manifest.eos_id
        self.dtype: np.dtype[Any] = np.dtype(manifest.dtype).newbyteorder("<")
        self.frame_tokens, self.packed_seq_len = manifest.frame_tokens, entry.packed_seq_len
        self.fingerprint = fingerprint(manifest, split)
        self._shards = entry.shards
        self._first_frames = [0, *accumulate(shard.num_frames for shard in entry.shards)]
        self._open: OrderedDict[int, _Slot] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls, path: Path | str, split: str = "train", remote: RemoteOptions | None = None
    ) -> TokenDataset:
        """Opens a split after validating the manifest; shards are verified when first read.

        Args:
            path: a folder, or a URL that begins with http, https, s3, gs or hf.
            split: to be read.
            remote: how a URL is read.

        Raises:
            DataError: no dataset there, a damaged manifest, or no such split.
        """
        store = open_store(path, remote)
        return cls(store, split, load_manifest(store))

    def open_split(self, split: str) -> TokenDataset:
        """Opens another split of the same dataset; the manifest is not read again."""
        return TokenDataset(self._store, split, self.manifest)

    @property
    def bytes_read(self) -> int:
        """Bytes read so far from files or the network, all splits of this store together."""
        return self._store.bytes_read

    @property
    def tokenizer_path(self) -> Path | None:
        """The dataset's own copy of its tokenizer, hash verified, or None if it has none.

        Of a dataset behind a URL it is a temporary file that lasts as long as the dataset.
        """
        entry = self.manifest.tokenizer
        return None if entry is None else self._store.local_copy(entry.file, entry.sha256)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the verified ids [start, stop): (stop - start,) of `dtype`.

        Raises:
            DataError: a frame is damaged.
        """
        self._check_range(start, stop)
        out = np.empty(stop - start, self.dtype)
        self.read_into(start, out)
        return out

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` (n,) with the verified ids [start, start + n).

        A last id that begins a new frame comes from the index' carry, without decoding that frame.
        """
        frame, skip = divmod(start, self.frame_tokens)
        done, carry = 0, None
        while done < len(out):
            if carry is not None and done == len(out) - 1:
                out[done] = carry
                return
            shard, number = self._locate(frame)
            rest = out[done:]
            whole = skip == 0 and len(rest) >= self.frame_tokens and out.flags.c_contiguous
            ids, next_carry = shard.frame(number, rest if whole else None)
            if carry is not None and carry != int(ids[0]):
                raise shard.carry_error(number)
            part = ids[skip : skip + len(rest)]
            if not whole:
                rest[: len(part)] = part
            done, frame, skip, carry = done + len(part), frame + 1, 0, next_carry

    def document_ends(self, start: int, stop: int) -> np.ndarray:
        """Returns the document ends e with start < e <= stop: (ends,) int64, rising.

        An end is the position after a document's EOS in the split's token stream.
        """
        self._check_range(start, stop)
        if start == stop:
            return np.empty(0, np.int64)
        frames = range(start // self.frame_tokens, (stop - 1) // self.frame_tokens + 1)
        parts = []
        for frame in frames:
            shard, number = self._locate(frame)
            ends = shard.document_ends(number).astype(np.int64) + frame * self.frame_tokens
            parts.append(ends)
        ends = np.concatenate(parts)
        return ends[(ends > start) & (ends <= stop)]

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Reads and verifies everything: file hashes, every frame, carry, document ends, counts.

        Args:
            progress: called with the number of tokens after each frame.

        Raises:
            DataError: the first damage found.
        """
        num_documents, end, carry = 0, 0, None
        for frame in range(self._first_frames[-1]):
            shard, number = self._locate(frame)
            if number == 0:
                shard.verify_files()
            ids, next_carry = shard.frame(number)
            if carry is not None and carry != int(ids[0]):
                raise shard.carry_error(number)
            ends = shard.document_ends(number)
            num_documents += len(ends)
            end = frame * self.frame_tokens + int(ends[-1]) if len(ends) else end
            carry = next_carry
            if progress is not None:
                progress(len(ids))
        padded = self.num_tokens - end < (self.packed_seq_len or 1)
        if num_documents != self.num_documents or not padded:
            raise DataError(
                f"{self.path}: split {self.split!r} has {num_documents} document ends, the last at "
                f"token {end}; the manifest says {self.num_documents} and {self.num_tokens}; "
                f"{RESTORE}"
            )

    def _locate(self, frame: int) -> tuple[ShardReader, int]:
        place = bisect_right(self._first_frames, frame) - 1
        with self._lock:
            slot = self._open.setdefault(place, _Slot())
            self._open.move_to_end(place)
            # Dropped, not closed: a thread may still be reading from it.
            if len(self._open) > _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        # Outside the lock: an index that comes slowly must not hold up the other shards.
        if slot.shard is None:
            with slot.lock:
                if slot.shard is None:
                    is_last = place == len(self._shards) - 1
                    entry = self._shards[place]
                    slot.shard = ShardReader(self._store, self.manifest, entry, is_last)
        return slot.shard, frame - self._first_frames[place]

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"[{start}, {stop}) is outside the split's {self.num_tokens} tokens")
