"""Best-fit packing: whole documents into rows of one length, with next to no padding.

After Ding et al. 2024, "Fewer Truncations Improve Language Modeling": a document longer than a row
is cut into rows, what is left of it and all others are laid into the fullest row that still has
room, the longest first. It is done in windows of some million tokens, so memory is bounded; rows
that are not full go on into the next window. Lengths that do not go together would leave gaps:
where padding would exceed `MAX_WASTE`, documents are cut to fill them, as few as it takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from scalellm.data.writer import DatasetWriter

MAX_WASTE = 0.01
_WINDOW_TOKENS = 1 << 23


@dataclass
class Row:
    """Pieces of documents that share a row, in the order in which they came."""

    room: int
    pieces: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def put(self, number: int, tokens: np.ndarray) -> None:
        self.pieces.append((number, tokens))
        self.room -= len(tokens)

    def first(self) -> int:
        return min(number for number, _ in self.pieces)


class Packer:
    """Takes documents, gives rows of `seq_len` tokens: `tokens_T` and where the pieces end.

    Memory: `window_tokens` tokens, and 100 bytes a document of a window.

    Args:
        seq_len: T, tokens of a row.
        eos_id: fills what is left of a row.
        window_tokens: documents of so many tokens are packed together.

    Attributes:
        documents: documents taken.
        cut_documents: those of them that fit no row whole, or were cut to fill gaps.
        pieces: parts they came to.
        rows: rows given.
        padding_tokens: tokens of the rows that belong to no document.
    """

    def __init__(self, seq_len: int, eos_id: int, window_tokens: int = _WINDOW_TOKENS) -> None:
        self.seq_len, self._eos_id = seq_len, eos_id
        self._window_tokens = max(window_tokens, 2 * seq_len)
        self._waiting: list[tuple[int, np.ndarray]] = []
        self._waiting_tokens = 0
        self._open: list[Row] = []
        self.documents = self.cut_documents = self.pieces = self.rows = self.padding_tokens = 0

    def add(self, tokens: np.ndarray) -> Iterator[tuple[np.ndarray, list[int]]]:
        """Takes a document (n,), and yields the rows that are ready: (T,) and its pieces' ends."""
        number = self.documents
        self.documents += 1
        self.cut_documents += len(tokens) > self.seq_len
        for start in range(0, len(tokens), self.seq_len):
            # A copy: the document may be a view of a batch a hundred times its size.
            self._waiting.append((number, tokens[start : start + self.seq_len].copy()))
        self._waiting_tokens += len(tokens)
        if self._waiting_tokens >= self._window_tokens:
            yield from self._pack(is_last=False)

    def finish(self) -> Iterator[tuple[np.ndarray, list[int]]]:
        """Yields the rows of what is still waiting."""
        yield from self._pack(is_last=True)

    def report(self) -> dict[str, float | int]:
        """What was packed, for the manifest."""
        return {
            "seq_len": self.seq_len,
            "rows": self.rows,
            "documents": self.documents,
            "pieces": self.pieces,
            "cut_documents": self.cut_documents,
            "padding_tokens": self.padding_tokens,
            "padding_share": self.padding_tokens / max(1, self.rows * self.seq_len),
        }

    def _pack(self, *, is_last: bool) -> Iterator[tuple[np.ndarray, list[int]]]:
        rows = self._best_fit()
        self._waiting, self._waiting_tokens = [], 0
        limit = int(MAX_WASTE * self.seq_len)
        closed = [row for row in rows if row.room <= limit]
        self._open = [row for row in rows if row.room > limit]
        held_tokens = sum(self.seq_len - row.room for row in self._open)
        if is_last or held_tokens > self._window_tokens // 2:
            gaping = self._fill_gaps(closed, self._open)
            # The emptiest may still be filled by what comes.
            self._open = [] if is_last else gaping[-1:]
            closed += gaping if is_last else gaping[:-1]
        # In about the order of the documents; the order of lengths would be one of difficulty.
        for row in sorted(closed, key=Row.first):
            yield self._close(row)

    def _best_fit(self) -> list[Row]:
        """Lays every waiting piece into the fullest row with room for it, the longest first."""
        rows = self._open
        by_room: dict[int, list[Row]] = {}
        # Bit r is set if there is a row with room r: the fullest fit is a shift and a lowest bit.
        rooms = 0
        for row in rows:
            by_room.setdefault(row.room, []).append(row)
            rooms |= 1 << row.room
        for number, tokens in sorted(self._waiting, key=lambda piece: -len(piece[1])):
            size = len(tokens)
            fitting = rooms >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                row = by_room[room].pop()
                if not by_room[room]:
                    rooms ^= 1 << room
            else:
                row = Row(self.seq_len)
                rows.append(row)
            row.put(number, tokens)
            if row.room:
                by_room.setdefault(row.room, []).append(row)
                rooms |= 1 << row.room
        return rows

    def _fill_gaps(self, closed: list[Row], gaping: list[Row]) -> list[Row]:
        """Takes the emptiest rows apart to fill the widest gaps, until padding is in its limit.

        Rows that became full are added to `closed`; returns the others, the emptiest last.
        """
        gaping = sorted(gaping, key=lambda row: (row.room, row.first()))
        padding_tokens = self.padding_tokens + sum(row.room for row in (*closed, *gaping))
        while len(gaping) > 1 and padding_tokens > MAX_WASTE * self.seq_len * (
            self.rows + len(closed) + len(gaping)
        ):
            emptiest = gaping.pop()
            padding_tokens -= self.seq_len
            for number, tokens in emptiest.pieces:
                while len(tokens):
                    gaping = gaping or [Row(self.seq_len)]
                    row = gaping[-1]
                    self.cut_documents += len(tokens) > row.room
                    row.put(number, tokens[: row.room])
                    tokens = tokens[len(row.pieces[-1][1]) :]
                    if not row.room:
                        closed.append(gaping.pop())
        return gaping

    def _close(self, row: Row) -> tuple[np.ndarray, list[int]]:
        pieces = [tokens for _, tokens in sorted(row.pieces, key=lambda piece: piece[0])]
        padding = np.full(row.room, self._eos_id, pieces[0].dtype)
        self.rows += 1
        self.pieces += len(pieces)
        self.padding_tokens += row.room
        return np.concatenate([*pieces, padding]), np.cumsum([len(p) for p in pieces]).tolist()


class PackedSplit:
    """Writes the documents of one split as packed rows.

    Args:
        writer: of the dataset.
        split: its name.
        seq_len: tokens of a row.
    """

    def __init__(self, writer: DatasetWriter, split: str, seq_len: int) -> None:
        self._writer, self._split = writer, split
        self._packer = Packer(seq_len, writer.eos_id)
        # Of documents of which no row was written yet.
        self._text_bytes = self._text_words = 0

    def add(self, tokens: np.ndarray, text_bytes: int, text_words: int) -> None:
        """Takes a document (n,), its EOS at the end, and the size of its text."""
        self._text_bytes += text_bytes
        self._text_words += text_words
        self._write(self._packer.add(tokens))

    def finish(self) -> None:
        """Writes the rows that are not full yet."""
        self._write(self._packer.finish())

    def report(self) -> dict[str, float | int]:
        """What was packed."""
        return self._packer.report()

    def _write(self, rows: Iterator[tuple[np.ndarray, list[int]]]) -> None:
        for tokens_T, ends in rows:
            size = {"text_bytes": self._text_bytes, "text_words": self._text_words}
            self._writer.add_row(self._split, tokens_T, ends, **size)
            self._text_bytes = self._text_words = 0
