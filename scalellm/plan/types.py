"""What the planner's parts hand to each other: the memory and the traffic of one rank.

All byte counts are of one rank and of the worst moment or the whole of one optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CollectiveKind = Literal[
    "all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send", "receive"
]


@dataclass(frozen=True)
class Memory:
    """What one rank holds in tensors at the peak of an optimizer step, in bytes.

    ``temporary_bytes`` is what the peak has beyond the other parts, so that the parts
    always add up to the peak: all are counted at the same moment.
    """

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    buffers_bytes: int  # communication: gathered units, buckets
    temporary_bytes: int
    host_bytes: int = 0  # offloaded to the host's memory (the same memory on a CPU run)

    @property
    def peak_bytes(self) -> int:
        """The worst moment on the device: every part but the host's."""
        return (
            self.parameters_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.buffers_bytes
            + self.temporary_bytes
        )


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in one optimizer step of one rank."""

    kind: CollectiveKind
    count: int
    payload_bytes: int  # of the full tensors, summed over the step
