"""Writes a dataset: documents into frames, frames into shards, a manifest last, then one rename."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from scalellm.data.format import (
    FORMAT,
    FRAME_TOKENS,
    MANIFEST,
    MAX_FRAME_TOKENS,
    MAX_MANIFEST_BYTES,
    MAX_SHARD_FRAMES,
    MAX_VOCAB_SIZE,
    PACKED_VERSION,
    SPLIT_NAME,
    VERSION,
    Manifest,
    TokenizerFile,
    dtype_for,
    dump_manifest,
)
from scalellm.data.split_writer import SplitWriter
from scalellm.data.staging import StagedDirectory, disk_errors, write_synced
from scalellm.errors import DataError


class DatasetWriter:
    """Writes a dataset to `out.tmp-...` beside `out` and renames it on `finish()`.

    As a context manager it removes the temporary directory on any exception, and also when the
    block ends without `finish()`. A full disk removes it too. What killed writers of the same `out`
    left behind is removed first.

    Args:
        out: the dataset directory to make.
        vocab_size: number of ids; up to 65,536 they are stored as uint16, above as uint32.
        eos_id: the id every document ends with.
        tokenizer_file: a `.model` or `.json` file copied into the dataset, or None.
        tokenizer_kind: its kind, a word such as "bpe".
        shard_tokens: tokens per shard, a multiple of `frame_tokens`.
        level: zstd level 1 to 19; it costs time here, never when reading.
        frame_tokens: tokens per independent zstd frame, the unit of random access.
        overwrite: replace `out` if it is a dataset; any other non-empty directory is never touched.

    Raises:
        DataError: `out` is taken, the tokenizer file is missing, or the disk is full.
    """

    def __init__(
        self,
        out: Path,
        *,
        vocab_size: int,
        eos_id: int,
        tokenizer_file: Path | None,
        tokenizer_kind: str,
        shard_tokens: int = 1024 * FRAME_TOKENS,
        level: int = 3,
        frame_tokens: int = FRAME_TOKENS,
        overwrite: bool = False,
    ) -> None:
        # Through a symlink the dataset is staged on the disk the link points to.
        self.out = Path(os.path.realpath(out))
        if not 0 <= eos_id < vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(f"0 <= eos_id={eos_id} < vocab_size={vocab_size} <= {MAX_VOCAB_SIZE}")
        if not 1 <= frame_tokens <= MAX_FRAME_TOKENS:
            raise ValueError(f"1 <= frame_tokens={frame_tokens} <= {MAX_FRAME_TOKENS}")
        shard_frames, rest = divmod(shard_tokens, frame_tokens)
        if rest or not 1 <= shard_frames <= MAX_SHARD_FRAMES:
            raise ValueError(f"{shard_tokens=} is not 1 to {MAX_SHARD_FRAMES} x {frame_tokens=}")
        self._overwrite = overwrite
        self._vocab_size, self.eos_id = vocab_size, eos_id
        self._frame_tokens, self._shard_frames, self._level = frame_tokens, shard_frames, level
        self._splits: dict[str, SplitWriter] = {}
        self._refuse_taken(self.out)
        self._staged = StagedDirectory(self.out)
        try:
            self._tokenizer = self._copy_tokenizer(tokenizer_file, tokenizer_kind)
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.abort()

    def add(
        self, split: str, tokens: np.ndarray, *, text_bytes: int = 0, text_words: int = 0
    ) -> None:
        """Appends one document, its EOS already at the end, to a split.

        Args:
            split: "train", "validation" or another lower-case word.
            tokens: (n,) integers in [0, vocab_size), the last one `eos_id`.
            text_bytes: UTF-8 bytes of the document's text, for bits per byte.
            text_words: words of the document's text, for perplexity per word.

        Raises:
            DataError: an id is outside the vocabulary, or the disk is full; all is removed.
        """
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not len(tokens):
            raise ValueError(f"a document is (n,) integers, got {tokens.shape} {tokens.dtype}")
        if int(tokens[-1]) != self.eos_id:
            raise ValueError(f"a document ends with eos_id={self.eos_id}, got {int(tokens[-1])}")
        self._add(split, tokens, [len(tokens)], text_bytes, text_words)

    def add_row(
        self,
        split: str,
        tokens_T: np.ndarray,
        ends: list[int],
        *,
        text_bytes: int = 0,
        text_words: int = 0,
    ) -> None:
        """Appends a packed row: documents, or pieces of them, and padding after the last.

        Args:
            split: its rows must all be of one length.
            tokens_T: (T,) integers in [0, vocab_size).
            ends: where each piece ends, rising, in 1..T.
            text_bytes: UTF-8 bytes of documents that are counted with this row.
            text_words: their words.

        Raises:
            DataError: as `add`.
        """
        self._add(split, tokens_T, ends, text_bytes, text_words, packed_seq_len=len(tokens_T))

    def _add(
        self,
        split: str,
        tokens: np.ndarray,
        ends: list[int],
        text_bytes: int,
        text_words: int,
        packed_seq_len: int | None = None,
    ) -> None:
        try:
            self._check_vocabulary(tokens)
            if split not in self._splits:
                self._splits[split] = self._new_split(split, packed_seq_len)
            if self._splits[split].packed_seq_len != packed_seq_len:
                raise ValueError(f"{split!r} mixes documents and rows, or rows of two lengths")
            self._splits[split].add(tokens, ends, text_bytes, text_words)
        except DataError:
            self.abort()
            raise

    def finish(self, extra: dict[str, Any] | None = None) -> Path:
        """Writes the manifest, fsyncs, renames into place and returns the dataset directory.

        Args:
            extra: anything JSON can hold: sources, options, dropped counts.

        Raises:
            DataError: the train split is empty, `out` was taken meanwhile, or the disk is full; all
                is removed.
        """
        try:
            if "train" not in self._splits:
                raise DataError(
                    "the train split is empty: no document was left to write; give more text or "
                    "relax the filters"
                )
            data = dump_manifest(self._manifest(extra or {}))
            if len(data) > MAX_MANIFEST_BYTES:
                raise DataError(
                    f"{MANIFEST} would have {len(data)} bytes, the limit is {MAX_MANIFEST_BYTES}; "
                    "use larger shards or a smaller extra"
                )
            write_synced(self._staged.path / MANIFEST, data)
            self._staged.commit(self._refuse_taken)
        except DataError:
            self.abort()
            raise
        return self.out

    def abort(self) -> None:
        """Removes the temporary directory unless `finish()` has renamed it; safe to call twice."""
        for split in self._splits.values():
            split.close()
        self._staged.abort()

    def _manifest(self, extra: dict[str, Any]) -> Manifest:
        splits = {name: split.finish() for name, split in sorted(self._splits.items())}
        is_packed = any(split.packed_seq_len for split in splits.values())
        fields = {
            "format": FORMAT,
            "version": PACKED_VERSION if is_packed else VERSION,
            "dtype": dtype_for(self._vocab_size).name,
            "vocab_size": self._vocab_size,
            "eos_id": self.eos_id,
            "frame_tokens": self._frame_tokens,
            "tokenizer": self._tokenizer,
            "splits": splits,
            # Through JSON once, so that the signature is over what a reader will parse.
            "extra": json.loads(json.dumps(extra, allow_nan=False)),
        }
        return Manifest.model_validate(fields)

    def _check_vocabulary(self, tokens: np.ndarray) -> None:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._vocab_size:
            raise DataError(
                f"token id {low if low < 0 else high} is outside the vocabulary of "
                f"{self._vocab_size} ids; give the vocab_size of the tokenizer that made it"
            )

    def _copy_tokenizer(self, source: Path | None, kind: str) -> TokenizerFile | None:
        if source is None:
            return None
        if source.suffix not in (".model", ".json") or not source.is_file():
            raise DataError(f"tokenizer {source} is no .model or .json file; give one that exists")
        name = f"tokenizer{source.suffix}"
        sha256 = write_synced(self._staged.path / name, source.read_bytes())
        return TokenizerFile(file=name, sha256=sha256, kind=kind)

    def _new_split(self, name: str, packed_seq_len: int | None) -> SplitWriter:
        if not SPLIT_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a split name (lower case, at most 32 characters)")
        folder = self._staged.path / name
        with disk_errors(folder):
            folder.mkdir()
        dtype = dtype_for(self._vocab_size)
        return SplitWriter(
            folder, dtype, self._frame_tokens, self._shard_frames, self._level, packed_seq_len
        )

    def _refuse_taken(self, out: Path) -> None:
        if not out.exists():
            return
        if not out.is_dir():
            raise DataError(f"{out} is a file; give a directory that does not exist yet")
        if not any(out.iterdir()):
            return
        if not _is_dataset(out):
            raise DataError(f"{out} is not empty and holds no dataset; give another directory")
        if not self._overwrite:
            raise DataError(
                f"{out} already holds a dataset; allow overwriting it or give another directory"
            )


def _is_dataset(path: Path) -> bool:
    # A damaged manifest still marks a dataset of ours: replacing it is how one mends it.
    try:
        with (path / MANIFEST).open("rb") as file:
            size_bytes = min(os.fstat(file.fileno()).st_size, MAX_MANIFEST_BYTES)
            return FORMAT.encode() in file.read(size_bytes)
    except OSError:
        return False
