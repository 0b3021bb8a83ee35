"""Writes one split of a dataset: documents or rows into frames, frames into shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from scalellm.data.format import NO_CARRY, Shard, Split
from scalellm.data.shard_writer import ShardWriter


class SplitWriter:
    """Cuts one split's documents into frames and frames into shards."""

    def __init__(
        self,
        folder: Path,
        dtype: np.dtype[Any],
        frame_tokens: int,
        shard_frames: int,
        level: int,
        packed_seq_len: int | None,
    ) -> None:
        self._folder, self.packed_seq_len = folder, packed_seq_len
        self._frame_tokens, self._shard_frames, self._level = frame_tokens, shard_frames, level
        # One more than a frame: the extra token is the frame's carry.
        self._buffer = np.empty(frame_tokens + 1, dtype)
        self._filled = 0
        self._ends: list[int] = []
        self._shards: list[Shard] = []
        self._shard: ShardWriter | None = None
        self._num_tokens = self._num_documents = self._text_bytes = self._text_words = 0

    def add(self, tokens: np.ndarray, ends: list[int], text_bytes: int, text_words: int) -> None:
        taken, placed = 0, 0
        while taken < len(tokens):
            part = tokens[taken : taken + len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            while placed < len(ends) and ends[placed] <= taken + len(part):
                self._ends.append(self._filled + ends[placed] - taken)
                placed += 1
            self._filled += len(part)
            taken += len(part)
            if self._filled == len(self._buffer):
                self._flush(self._frame_tokens, int(self._buffer[-1]))
        self._num_tokens += len(tokens)
        self._num_documents += len(ends)
        self._text_bytes += text_bytes
        self._text_words += text_words

    def _flush(self, count: int, carry: int) -> None:
        if self._shard is None:
            self._shard = ShardWriter(self._folder / f"{len(self._shards):05d}", self._level)
        ends = [end for end in self._ends if end <= count]
        self._shard.add(self._buffer[:count], ends, carry)
        self._ends = [end - count for end in self._ends[len(ends) :]]
        self._buffer[0] = self._buffer[-1]
        self._filled -= count
        if self._shard.num_frames == self._shard_frames:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self._shards.append(self._shard.finish())
            self._shard = None

    def finish(self) -> Split:
        if self._filled:
            self._flush(self._filled, NO_CARRY)
        self._finish_shard()
        return Split(
            num_tokens=self._num_tokens,
            num_documents=self._num_documents,
            num_bytes_text=self._text_bytes,
            num_words_text=self._text_words,
            shards=self._shards,
            packed_seq_len=self.packed_seq_len,
        )

    def close(self) -> None:
        if self._shard is not None:
            self._shard.close()
