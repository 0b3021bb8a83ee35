"""What MKL, torch's library of matrix products on a CPU, packs matrices into and keeps.

Seen at malloc (torch 2.13, one thread and two): one buffer from the first product of a process on,
three more from the first of a backward on, larger for more features, and hardly for more tokens.
Where they come to lie decides which tensors fit beside them later, so a plan has them in the heap.
"""

from __future__ import annotations

from scalellm.plan.allocator import MIB
from scalellm.plan.live import Packed

# Of each buffer: its bytes, and how many more for a feature of the model. With 448 and 1,024
# features they were 4.6 and 5.9, 5.3 and 8.5, 11.2 and 16.4 MiB.
_FORWARD = ((6.5 * MIB, 0),)
_BACKWARD = ((3.64 * MIB, 2341), (2.84 * MIB, 5757), (7.22 * MIB, 9409))


def packed(hidden_size: int) -> Packed:
    """Returns the buffers of a process, in bytes, by where they are made."""
    return {
        "forward": [int(base + more * hidden_size) for base, more in _FORWARD],
        "backward": [int(base + more * hidden_size) for base, more in _BACKWARD],
    }


def packed_bytes(hidden_size: int) -> int:
    """Returns what all of them take."""
    return sum(sum(sizes) for sizes in packed(hidden_size).values())
