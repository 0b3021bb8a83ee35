"""The order of samples: a pure function of (seed, epoch, position) in constant memory.

A split's tokens are one flat stream. Sample k holds tokens [kT, (k+1)T], that is T targets; only
the last sample may be short. A block is S = max(1, frame_tokens // T) neighbouring samples, so that
it is one frame whenever T divides the frame. An epoch permutes the blocks and deals L of them at a
time to L lanes: position j of a group reads lane j % L, and each block's samples are permuted too.
Neighbouring rows of a batch thus come from L distant places, at one decoded frame per S samples.

Nothing here knows of ranks, batches or restarts. Legend: N samples, S samples per block, L lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import isqrt

import numpy as np

from scalellm.data.format import FRAME_TOKENS
from scalellm.errors import DataError

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E37_79B9_7F4A_7C15
_MIX_1, _MIX_2 = np.uint64(0xBF58_476D_1CE4_E5B9), np.uint64(0x94D0_49BB_1331_11EB)
_ROUNDS = 6

Key = tuple[int | np.ndarray, ...]


def permute(index: np.ndarray, size: int, key: Key) -> np.ndarray:
    """Maps [0, size) one to one onto itself, pseudo-randomly, without a table.

    A Feistel network over (index // b, index % b) with modular addition, the generalised form of
    Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002), with cycle walking for the
    few values at or above `size`. Good for shuffling, not for secrets.

    Args:
        index: (n,) integers in [0, size).
        size: at most 2**62.
        key: integers, or arrays of shape (n,) where the permutation differs by element.

    Returns:
        (n,) int64.
    """
    return _walk(index, size, key, _forward)


def unpermute(index: np.ndarray, size: int, key: Key) -> np.ndarray:
    """The inverse of `permute`: same arguments, `unpermute(permute(i)) == i`."""
    return _walk(index, size, key, _backward)


_Network = Callable[[np.ndarray, int, int, np.ndarray], np.ndarray]


def _walk(index: np.ndarray, size: int, key: Key, network: _Network) -> np.ndarray:
    left_size = max(isqrt(max(size - 1, 0)) + 1, 1)
    right_size = max(-(-size // left_size), 1)
    keys = _fold(key)
    values = network(index.astype(np.uint64), left_size, right_size, keys)
    while (outside := np.flatnonzero(values >= size)).size:
        few_keys = keys if len(keys) == 1 else keys[outside]
        values[outside] = network(values[outside], left_size, right_size, few_keys)
    return values.astype(np.int64)


def _forward(values: np.ndarray, left_size: int, right_size: int, keys: np.ndarray) -> np.ndarray:
    left, right = np.divmod(values, np.uint64(right_size))
    for number in range(0, _ROUNDS, 2):
        left += _round(right, number, left_size, keys)
        left = _wrap(left, left_size)
        right += _round(left, number + 1, right_size, keys)
        right = _wrap(right, right_size)
    return left * np.uint64(right_size) + right


def _backward(values: np.ndarray, left_size: int, right_size: int, keys: np.ndarray) -> np.ndarray:
    left, right = np.divmod(values, np.uint64(right_size))
    for number in reversed(range(0, _ROUNDS, 2)):
        right += np.uint64(right_size) - _round(left, number + 1, right_size, keys)
        right = _wrap(right, right_size)
        left += np.uint64(left_size) - _round(right, number, left_size, keys)
        left = _wrap(left, left_size)
    return left * np.uint64(right_size) + right


def _wrap(values: np.ndarray, size: int) -> np.ndarray:
    """Returns values % size for values < 2 size: below `size` the subtraction underflows."""
    wrapped: np.ndarray = np.minimum(values, values - np.uint64(size))
    return wrapped


def _round(half: np.ndarray, number: int, size: int, keys: np.ndarray) -> np.ndarray:
    """Returns pseudo-random uint64 in [0, size), size < 2**32, by the high bits of a product."""
    mixed = half + (keys + np.uint64(number * _GOLDEN & _WORD))
    mixed ^= mixed >> np.uint64(32)
    mixed *= _MIX_1
    mixed ^= mixed >> np.uint64(29)
    mixed *= _MIX_2
    mixed >>= np.uint64(32)
    mixed *= np.uint64(size)
    mixed >>= np.uint64(32)
    return mixed


def _fold(key: Key) -> np.ndarray:
    """Hashes the key's words into (1,) or (n,) uint64 with splitmix64 (Steele et al., 2014)."""
    folded = np.full(1, _GOLDEN, np.uint64)
    for word in key:
        array = word.astype(np.uint64) if isinstance(word, np.ndarray) else word & _WORD
        mixed = folded + np.asarray(array, np.uint64) + np.uint64(_GOLDEN)
        mixed ^= mixed >> np.uint64(30)
        mixed *= _MIX_1
        mixed ^= mixed >> np.uint64(27)
        mixed *= _MIX_2
        mixed ^= mixed >> np.uint64(31)
        folded = mixed
    return folded


@dataclass(frozen=True)
class SampleOrder:
    """Where each position of an epoch reads from.

    Args:
        num_tokens: ids in the split, at least 2.
        seq_len: T, targets per sample.
        seed: any integer.
        lanes: L, blocks read in turn; 0 for the identity order.
        frame_tokens: of the dataset, decides the block.

    Raises:
        DataError: fewer than 2 tokens.
    """

    num_tokens: int
    seq_len: int
    seed: int
    lanes: int = 64
    frame_tokens: int = FRAME_TOKENS

    def __post_init__(self) -> None:
        if self.seq_len < 1 or self.lanes < 0 or self.frame_tokens < 1:
            raise ValueError(f"seq_len and frame_tokens are 1 or more, lanes 0 or more: {self}")
        if self.num_tokens < 2:
            raise DataError(
                f"the split has {self.num_tokens} tokens, a sample needs 2 at least; give more text"
            )

    @cached_property
    def num_samples(self) -> int:
        """N: every token but the first is a target once per epoch."""
        return -(-(self.num_tokens - 1) // self.seq_len)

    @cached_property
    def tail_targets(self) -> int:
        """Targets of the last sample, 1 to seq_len."""
        return self.num_tokens - 1 - (self.num_samples - 1) * self.seq_len

    @cached_property
    def block_samples(self) -> int:
        """S: samples per block; only the last block may have fewer."""
        return max(1, self.frame_tokens // self.seq_len)

    @cached_property
    def num_blocks(self) -> int:
        return -(-self.num_samples // self.block_samples)

    @cached_property
    def group_lanes(self) -> int:
        """Lanes of every group but the last, which may have fewer."""
        return min(max(self.lanes, 1), self.num_blocks)

    @cached_property
    def num_groups(self) -> int:
        return -(-self.num_blocks // self.group_lanes)

    def samples(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        """Returns the sample ids (n,) int64 at positions (n,) in [0, N) of an epoch, one to one."""
        group, lane, slot = self.deal(positions, epoch)
        block = self._permute_blocks(group * self.group_lanes + lane, epoch)
        return block * self.block_samples + self.permute_inside(slot, block, epoch)

    def deal(self, positions: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns for positions (n,) of an epoch: group, lane and slot, (n,) int64 each."""
        S, L = self.block_samples, self.group_lanes
        short_group, short_lane, short_samples = self._short(epoch)
        # As if the short block were full, later groups start S - short_samples positions later.
        short_end = self.group_start(short_group + 1, epoch)
        shifted = positions.astype(np.int64) + (S - short_samples) * (positions >= short_end)
        group = np.minimum(shifted // (L * S), self.num_groups - 1)
        offset = shifted - group * (L * S)
        slot = offset // L
        if self._last_lanes < L:
            last = np.flatnonzero(group == self.num_groups - 1)
            slot[last] = offset[last] // self._last_lanes
        lanes = np.where(group == self.num_groups - 1, self._last_lanes, L)
        lane = offset - slot * lanes
        # Below its own length the short block takes its turn; then the others go on without it.
        late = np.flatnonzero((group == short_group) & (slot >= short_samples))
        if late.size:
            rest = int(lanes[late[0]]) - 1
            extra, lane[late] = np.divmod(offset[late] - short_samples * (rest + 1), rest)
            slot[late] = short_samples + extra
            lane[late] += lane[late] >= short_lane
        return group, lane, slot

    def group_blocks(self, group: int, epoch: int) -> np.ndarray:
        """Returns the block that each lane of a group reads: (lanes,) int64."""
        first = group * self.group_lanes
        place = np.arange(first, min(first + self.group_lanes, self.num_blocks))
        return self._permute_blocks(place, epoch)

    def permute_inside(self, slot: np.ndarray, block: np.ndarray, epoch: int) -> np.ndarray:
        """Returns which sample of its block (n,) each slot (n,) reads: (n,) int64."""
        if not self.lanes:
            return slot
        short_samples = self._short(epoch)[2]
        last = np.flatnonzero(block == self.num_blocks - 1)
        inner = permute(slot, self.block_samples, (self.seed, epoch, block))
        if last.size:
            key = (self.seed, epoch, self.num_blocks - 1)
            inner[last] = permute(slot[last], short_samples, key)
        return inner

    def group_of(self, position: int, epoch: int) -> int:
        """Returns the group that holds a position of an epoch."""
        full = self.group_lanes * self.block_samples
        group = min(position // full, self.num_groups - 1)
        while group + 1 < self.num_groups and position >= self.group_start(group + 1, epoch):
            group += 1
        return group

    def group_start(self, group: int, epoch: int) -> int:
        """Returns the first position of a group; N for the group after the last."""
        if group >= self.num_groups:
            return self.num_samples
        short_group, _, short_samples = self._short(epoch)
        full = group * self.group_lanes * self.block_samples
        return full - (self.block_samples - short_samples if group > short_group else 0)

    def tail_position(self, epoch: int) -> int:
        """Returns the position of the last sample of the split, the only one that may be short."""
        short_group, short_lane, short_samples = self._short(epoch)
        inner = np.array([short_samples - 1])
        if self.lanes:
            key = (self.seed, epoch, self.num_blocks - 1)
            inner = unpermute(inner, short_samples, key)
        lanes = self._last_lanes if short_group == self.num_groups - 1 else self.group_lanes
        return self.group_start(short_group, epoch) + int(inner[0]) * lanes + short_lane

    @cached_property
    def _last_lanes(self) -> int:
        return self.num_blocks - (self.num_groups - 1) * self.group_lanes

    @lru_cache(maxsize=64)  # noqa: B019 (frozen and small; the cache is bounded)
    def _short(self, epoch: int) -> tuple[int, int, int]:
        """Returns group, lane and samples of the last block of the split in an epoch."""
        place = np.array([self.num_blocks - 1])
        if self.lanes:
            place = unpermute(place, self.num_blocks, (self.seed, epoch))
        group, lane = divmod(int(place[0]), self.group_lanes)
        return group, lane, self.num_samples - (self.num_blocks - 1) * self.block_samples

    def _permute_blocks(self, place: np.ndarray, epoch: int) -> np.ndarray:
        return permute(place, self.num_blocks, (self.seed, epoch)) if self.lanes else place
