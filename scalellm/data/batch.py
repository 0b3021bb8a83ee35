"""What a stream hands out: a batch, and the cursor to go on after it.

Legend: B rows of one rank, T seq_len, S seq_len + 1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from scalellm.errors import DataError

_MAX_SAMPLES = 1 << 61


@dataclass(frozen=True)
class Cursor:
    """Where a stream stands: a few integers, the same on every rank, at most 256 bytes as JSON.

    Attributes:
        samples_consumed: samples of all ranks in the batches handed out, through all epochs.
        epoch: samples_consumed // samples per epoch; for people, never read back.
        seed: of the order.
        fingerprint: of the dataset's split.
        seq_len: targets per sample.
        lanes: of the order; 0 without shuffling.
    """

    samples_consumed: int
    epoch: int
    seed: int
    fingerprint: str
    seq_len: int
    lanes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cursor:
        """Raises DataError unless all fields are there with their types and none is negative."""
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or sorted(values) != sorted(names):
            raise DataError(f"the cursor must have the fields {', '.join(names)}; got {values!r}")
        for name in names:
            value, wanted = values[name], str if name == "fingerprint" else int
            negative = name != "seed" and wanted is int and type(value) is int and value < 0
            if type(value) is not wanted or negative:
                raise DataError(f"the cursor's {name} must be a {wanted.__name__}, got {value!r}")
        return cls(**values)


@dataclass(frozen=True)
class Batch:
    """One rank's rows of a global batch.

    Attributes:
        tokens_BS: (rows, seq_len + 1) stored dtype; inputs are [:, :-1], targets [:, 1:].
        num_targets_B: (rows,) int32, leading targets that are real; the rest is padding, EOS.
        global_target_tokens: sum of num_targets_B over all ranks; None where a rank cannot know
            it, since the rows of a packed dataset have as many targets as their documents give.
        positions_BT: (rows, seq_len) int32, position inside the document's part of this row: it
            starts at 0 in every row and at every document; None without document_mask.
        documents_BT: (rows, seq_len) int32, document number inside the row, from 0; or None.
        sources_B: (rows,) which dataset of a mixture each row is of; None without a mixture.
    """

    tokens_BS: np.ndarray
    num_targets_B: np.ndarray
    global_target_tokens: int | None
    positions_BT: np.ndarray | None = None
    documents_BT: np.ndarray | None = None
    sources_B: np.ndarray | None = None


def check_cursor(cursor: Cursor, here: Cursor) -> None:
    """Raises DataError unless `cursor` is of the same order of samples as `here`."""
    if not 0 <= cursor.samples_consumed <= _MAX_SAMPLES:
        raise DataError(
            f"the cursor's samples_consumed={cursor.samples_consumed} is not 0 to {_MAX_SAMPLES}; "
            "resume from another checkpoint"
        )
    if cursor.fingerprint != here.fingerprint:
        raise DataError(
            f"the cursor belongs to another dataset (fingerprint {cursor.fingerprint[:12]}, this "
            f"one has {here.fingerprint[:12]}); resume with the dataset it was trained on, or "
            "start a new run from its weights"
        )
    for name in ("seed", "seq_len", "lanes"):
        old, new = getattr(cursor, name), getattr(here, name)
        if old != new:
            raise DataError(
                f"the cursor was made with {name}={old}, this run has {name}={new}: another order "
                f"of samples; set {name}={old}, or start a new run from its weights"
            )
