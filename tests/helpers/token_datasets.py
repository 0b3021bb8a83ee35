"""Small datasets of made-up ids, and how to forge one whose signatures are right."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from scalellm.data import Batch, Cursor, DatasetWriter, TokenDataset, TokenStream
from scalellm.data.format import INDEX_HEADER, INDEX_RECORD
from scalellm.data.order import SampleOrder

EOS_ID = 0


def write_documents(
    out: Path,
    documents: list[np.ndarray],
    *,
    vocab_size: int = 1000,
    frame_tokens: int = 64,
    shard_frames: int = 3,
    **options: Any,
) -> Path:
    """Writes documents (EOS included) as the train split."""
    with DatasetWriter(
        out,
        vocab_size=vocab_size,
        eos_id=EOS_ID,
        tokenizer_file=None,
        tokenizer_kind="none",
        frame_tokens=frame_tokens,
        shard_tokens=shard_frames * frame_tokens,
        **options,
    ) as writer:
        for document in documents:
            writer.add("train", document, text_bytes=3, text_words=2)
        return writer.finish()


def random_documents(num_tokens: int, vocab_size: int = 1000, seed: int = 0) -> list[np.ndarray]:
    """Returns documents of 1 to 60 ids, the last one EOS, `num_tokens` in all."""
    generator = np.random.default_rng(seed)
    documents = []
    while num_tokens:
        size = min(num_tokens, int(generator.integers(1, 61)))
        document = generator.integers(1, vocab_size, size)
        document[-1] = EOS_ID
        documents.append(document)
        num_tokens -= size
    return documents


def write_counting(out: Path, num_tokens: int, **options: Any) -> Path:
    """Writes one document 1, 2, 3, ..., EOS: every id tells its place in the split."""
    document = np.arange(1, num_tokens + 1, dtype=np.int64)
    document[-1] = EOS_ID
    return write_documents(out, [document], vocab_size=num_tokens + 1, **options)


def forge_manifest(path: Path, change: Callable[[dict[str, Any]], Any], sign: bool = True) -> None:
    """Changes the parsed manifest in place and signs it again, as a liar would."""
    file = path / "manifest.json"
    fields = json.loads(file.read_text())
    del fields["manifest_sha256"]
    change(fields)
    if sign:
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        fields["manifest_sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    file.write_text(json.dumps(fields))


def forge_index(path: Path, change: Callable[[np.ndarray], Any], shard: int = 0) -> None:
    """Changes the records of one index in place and signs index and manifest again."""

    def sign(fields: dict[str, Any]) -> None:
        entry = fields["splits"]["train"]["shards"][shard]
        file = path / entry["index"]
        data = bytearray(file.read_bytes())
        change(np.frombuffer(data, INDEX_RECORD, offset=INDEX_HEADER.itemsize))
        file.write_bytes(data)
        entry["index_sha256"] = hashlib.sha256(data).hexdigest()

    forge_manifest(path, sign)


def take(dataset: TokenDataset, count: int, **options: Any) -> list[tuple[Batch, Cursor]]:
    with TokenStream(dataset, **{"seq_len": 16, "global_batch_size": 4, **options}) as stream:
        return list(itertools.islice(stream, count))


def expected_rows(
    dataset: TokenDataset, order: SampleOrder, positions: range
) -> tuple[np.ndarray, np.ndarray]:
    """The definition: sample k is tokens [kT, (k + 1)T], a short one is padded with EOS."""
    T = order.seq_len
    epochs, within = np.divmod(np.array(positions), order.num_samples)
    samples = np.empty(len(positions), np.int64)
    for epoch in set(epochs.tolist()):
        samples[epochs == epoch] = order.samples(within[epochs == epoch], epoch)
    padded = np.full(order.num_samples * T + 1, dataset.eos_id, dataset.dtype)
    padded[: dataset.num_tokens] = all_tokens(dataset)
    rows = padded[samples[:, None] * T + np.arange(T + 1)]
    return rows, np.minimum(T, dataset.num_tokens - 1 - samples * T)


@functools.lru_cache(maxsize=4)
def all_tokens(dataset: TokenDataset) -> np.ndarray:
    return dataset.read(0, dataset.num_tokens)
