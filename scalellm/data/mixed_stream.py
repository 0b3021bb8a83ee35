"""The stream of batches of a mixture: the same global order for every world size and restart.

Legend: B rows of this rank, T seq_len, S seq_len + 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from scalellm.data.batch import Batch, Cursor, check_cursor
from scalellm.data.mixture import PERIOD, Mixture
from scalellm.data.rows import Deal, Rows
from scalellm.data.stream import Feed, make_batch, rows_per_rank
from scalellm.errors import ConfigError


class MixedStream:
    """Endless batches of one rank, each with the cursor to go on after it; see `TokenStream`.

    Row r of the run is a row of the dataset that the stage's pattern names; each dataset is read in
    its own order, pass after pass, every sample once a pass. Where a stage begins, each goes on
    where it stood. The cursor is a `TokenStream`'s: rows of all ranks so far, and no more.

    Memory is that of a `TokenStream` for each dataset of the stage.

    Args:
        mixture: the datasets and stages; a stage begins at a multiple of `global_batch_size` rows.
        global_batch_size: rows of all ranks per batch.
        rank: this rank.
        world_size: a divisor of global_batch_size.
        seed: of the orders.
        lanes: blocks of each dataset read in turn.
        document_mask: also give positions and document numbers.
        decode_threads: threads per dataset that decode ahead.
        cursor: go on after this batch.

    Raises:
        ConfigError: world_size does not divide global_batch_size, or a stage begins inside a batch.
        DataError: the cursor belongs to another mixture or order; while iterating: damaged data.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        lanes: int = 64,
        document_mask: bool = False,
        decode_threads: int = 1,
        cursor: Cursor | None = None,
    ) -> None:
        rows = rows_per_rank(global_batch_size, rank, world_size)
        self._rank_rows = (rank * rows, (rank + 1) * rows)
        self._mixture, self._global_rows = mixture, global_batch_size
        self._seed, self._lanes = seed, lanes
        self._document_mask, self._decode_threads = document_mask, decode_threads
        self._consumed = 0
        self._feeds: list[Feed | None] = []
        if cursor is not None:
            check_cursor(cursor, self.cursor)
            self._consumed = cursor.samples_consumed
        for stage in mixture.stages:
            if stage.start_row > self._consumed and (
                (stage.start_row - self._consumed) % global_batch_size
            ):
                raise ConfigError(
                    f"a stage begins at row {stage.start_row}, inside a batch of "
                    f"{global_batch_size}; resume with the global_batch_size of the run"
                )
        self._open_stage()

    @property
    def cursor(self) -> Cursor:
        """The state after the last batch handed out; its epoch is of the most read dataset."""
        epochs = [feed.position // feed.order.num_samples for feed in self._feeds if feed]
        return Cursor(
            self._consumed,
            max(epochs, default=0),
            self._seed,
            self._mixture.fingerprint,
            self._mixture.stages[0].seq_len,
            self._lanes,
        )

    def __iter__(self) -> Iterator[tuple[Batch, Cursor]]:
        return self

    def __next__(self) -> tuple[Batch, Cursor]:
        if self._mixture.stage_at(self._consumed) != self._stage_number:
            self.close()
            self._open_stage()
        first = self._consumed - self._stage.start_row
        source_G = self._sources(first, first + self._global_rows)
        source_B = source_G[slice(*self._rank_rows)]
        rows = self._gather(source_B)
        counts = np.bincount(source_G, minlength=len(self._feeds)).tolist()
        targets = [
            feed.advance(count) for feed, count in zip(self._feeds, counts, strict=True) if feed
        ]
        known = [count for count in targets if count is not None]
        global_target_tokens = sum(known) if len(known) == len(targets) else None
        self._consumed += self._global_rows
        return make_batch(rows, global_target_tokens, source_B), self.cursor

    def __enter__(self) -> MixedStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the decode threads; safe to call twice."""
        for feed in self._feeds:
            if feed is not None:
                feed.close()

    def _sources(self, start: int, stop: int) -> np.ndarray:
        """Returns the dataset's number of rows [start, stop) of the stage."""
        source_n: np.ndarray = self._stage.pattern.source_of[np.arange(start, stop) % PERIOD]
        return source_n

    def _gather(self, source_B: np.ndarray) -> Rows:
        """Takes each dataset's rows and lays them out as the pattern says."""
        parts = []
        for number, count in enumerate(np.bincount(source_B)):
            feed = self._feeds[number]
            if count and feed is not None:
                parts.append(feed.take(int(count)))
        place_B = np.empty(len(source_B), np.int64)
        place_B[np.argsort(source_B, kind="stable")] = np.arange(len(source_B))
        starts = [rows.starts_nT for rows in parts if rows.starts_nT is not None]
        return Rows(
            np.concatenate([rows.tokens_nS for rows in parts])[place_B],
            np.concatenate([rows.num_targets_n for rows in parts])[place_B],
            np.concatenate(starts)[place_B] if starts else None,
        )

    def _open_stage(self) -> None:
        self._stage_number = self._mixture.stage_at(self._consumed)
        self._stage = stage = self._mixture.stages[self._stage_number]
        orders = self._mixture.orders(stage, self._seed, self._lanes)
        starts = self._mixture.starts(self._stage_number, self._seed, self._lanes)
        first_row = self._consumed - stage.start_row
        self._feeds = []
        for number, dataset in enumerate(self._mixture.datasets.values()):
            if not stage.units[number]:
                self._feeds.append(None)
                continue
            deal = Deal(
                starts[number],
                self._global_rows,
                self._rank_rows,
                slots=stage.pattern.slots[number],
                period=PERIOD,
                first_row=first_row,
            )
            feed = Feed(
                dataset,
                orders[number],
                deal=deal,
                start=starts[number] + stage.pattern.count(number, first_row),
                document_mask=self._document_mask,
                decode_threads=self._decode_threads,
            )
            self._feeds.append(feed)
