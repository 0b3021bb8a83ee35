"""What a rank holds inside DeepSpeed's ZeRO optimizers, by parameter: the bridge to our checkpoint.

ZeRO flattens parameters and cuts the result: at stages 1 and 2 a whole group at once, at stage 3
each parameter by itself. Either way a rank holds of each parameter one range of its elements, which
lies somewhere in one of its flat fp32 tensors. A `Slot` says where.

The attributes read here are private to DeepSpeed 0.19.8. Its own accessors (`safe_get_full_*`)
gather whole tensors, and its universal checkpoint mixes up parameter groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as tdist
from torch import Tensor, nn

from scalellm.strategies._state import MOMENTS, Piece, StateSource, flat_pieces, read_flat
from scalellm.strategies._transforms import canonical_fqn


@dataclass(frozen=True)
class Slot:
    """Elements `start` to `stop` of a parameter are at `at` in this rank's flat tensor `index`."""

    name: str
    shape: tuple[int, ...]
    index: int
    at: int
    start: int
    stop: int

    def of(self, flat: Tensor) -> Tensor:
        return flat.view(-1)[self.at : self.at + self.stop - self.start]


class ZeroState:
    """Reads and writes master weights, moments and gradients of one rank's ZeRO optimizer."""

    def __init__(self, zero: Any, stage: int, names: dict[int, str]) -> None:
        """`names` maps `id(parameter)` to its FQN."""
        self.zero = zero
        self.stage = stage
        self.names = names
        self.slots = list(self._cut_each() if stage == 3 else self._cut_groups())
        if stage == 3:
            self._share_masters()

    def _share_masters(self) -> None:
        """Lets fp32 weights be their own masters, as DeepSpeed intends.

        It compares a device with its name, finds them different and keeps a second fp32 copy.
        """
        zero = self.zero
        if zero.offload_optimizer:
            return
        for index, working in enumerate(zero.fp16_partitioned_groups_flat):
            master = zero.fp32_partitioned_groups_flat[index]
            if working.dtype == master.dtype and working.device == master.device:
                working.requires_grad = True
                working.ds_id = master.ds_id
                zero.fp32_partitioned_groups_flat[index] = working

    def _cut_groups(self) -> Iterator[Slot]:
        zero = self.zero
        for index, group in enumerate(zero.round_robin_bit16_groups):
            size = zero.partition_size[index]
            low = size * tdist.get_rank(zero.real_dp_process_group[index])
            for parameter, offset in zip(group, zero.round_robin_bit16_offsets[index], strict=True):
                start = max(offset, low)
                stop = min(offset + parameter.numel(), low + size)
                if start < stop:
                    name, shape = self.names[id(parameter)], tuple(parameter.shape)
                    yield Slot(name, shape, index, start - low, start - offset, stop - offset)

    def _cut_each(self) -> Iterator[Slot]:
        zero = self.zero
        for parameter in (p for group in zero.fp16_groups for p in group):
            index, at, size = zero.grad_position[zero.get_param_id(parameter)]
            start = size * zero._get_param_partition_rank(parameter)
            stop = min(start + size, parameter.ds_numel)
            if start < stop:
                name, shape = self.names[id(parameter)], tuple(parameter.ds_shape)
                yield Slot(name, shape, index, at, start, stop)

    # -- masters and moments ----------------------------------------------------------------

    @property
    def flats(self) -> list[Tensor]:
        """This rank's flat fp32 tensors; empty where they are swapped out to disk."""
        if self.stage == 3:
            return self.zero.fp32_partitioned_groups_flat
        return self.zero.single_partition_of_fp32_groups

    def pieces(self) -> Iterator[Piece]:
        for index in range(len(self.flats)):
            with self._in_memory(index, changed=False) as (flat, state):
                for slot in (slot for slot in self.slots if slot.index == index):
                    yield from self._slot_pieces(slot, flat, state)

    def _slot_pieces(self, slot: Slot, flat: Tensor, state: dict[str, Any]) -> Iterator[Piece]:
        # A swapped tensor's memory is used again for the next one: hand out a copy.
        own = (lambda part: part.clone()) if self._is_swapped(slot.index) else (lambda part: part)
        where = (slot.shape, slot.start, slot.stop)
        yield from flat_pieces(f"model.{slot.name}", own(slot.of(flat.detach())), *where)
        if "step" not in state:
            return
        for key in MOMENTS:
            part = own(slot.of(state[key].detach()))
            yield from flat_pieces(f"optim.{slot.name}.{key}", part, *where)
        if slot.start == 0:
            # A number with DeepSpeedCPUAdam, a tensor with torch's AdamW.
            step = torch.tensor(float(state["step"]))
            yield Piece(f"optim.{slot.name}.step", step, (), ())

    @torch.no_grad()
    def load(self, source: StateSource, *, counts_in_ints: bool, steps_on_device: bool) -> int:
        """Fills this rank's slots, hands the new weights to the working parameters.

        Returns the number of steps the optimizer has taken.
        """
        steps = 0
        for index in range(len(self.flats)):
            slots = [slot for slot in self.slots if slot.index == index]
            with self._in_memory(index, changed=True) as (flat, state):
                state.clear()
                for slot in slots:
                    where = (slot.shape, slot.start, slot.stop)
                    read_flat(source, f"model.{slot.name}", slot.of(flat), *where)
                    if f"optim.{slot.name}.step" not in source.names():
                        continue
                    for key in MOMENTS:
                        moment = state.setdefault(key, torch.zeros_like(flat))
                        read_flat(source, f"optim.{slot.name}.{key}", slot.of(moment), *where)
                    step = source.read(f"optim.{slot.name}.step", (), ())
                    on_device = step.to(flat.device) if steps_on_device else step
                    state["step"] = int(step) if counts_in_ints else on_device
                    steps = max(steps, int(step))
                if self.stage == 3:
                    self.zero._reassign_or_swap_out_partitioned_parameters(index)
        self.refresh()
        return steps

    @torch.no_grad()
    def fill(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Sets the masters to whole values by parameter; not for tensors swapped to disk."""
        slots = {slot.name: slot for slot in self.slots}
        for name, value in values:
            slot = slots.get(canonical_fqn(name))
            if slot is not None and not self._is_swapped(slot.index):
                part = value.flatten()[slot.start : slot.stop]
                slot.of(self.flats[slot.index]).copy_(part)

    def refresh(self) -> None:
        """Hands changed fp32 masters to the parameters the model computes with."""
        zero = self.zero
        if self.stage < 3:
            zero.update_lp_params()
            return
        if zero.persistent_parameters:
            zero._partition_all_parameters()
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    @contextmanager
    def _in_memory(self, index: int, *, changed: bool) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """A flat tensor and its optimizer state, read from disk if they are swapped out."""
        zero, swapped = self.zero, self._is_swapped(index)
        if swapped:
            zero._optimizer_states_and_gradient_swap_in(index)
        flat = self.flats[index]
        state = zero.optimizer.state[flat]
        yield flat, state
        if not swapped:
            if not state:
                zero.optimizer.state.pop(flat)  # as before the first step
        elif changed:
            zero._optimizer_states_and_gradient_swap_out(index)
        else:
            zero._release_swap_buffers(index)

    def _is_swapped(self, index: int) -> bool:
        return self.stage == 3 and self.zero._swappable_optimizer_subgroup(index)

    # -- gradients --------------------------------------------------------------------------

    def gradients(self) -> list[Tensor]:
        """This rank's share of the reduced gradients after the last backward, padding included."""
        zero = self.zero
        if self.stage == 3:
            return [zero.grad_partitions_flat_buffer]
        if zero.cpu_offload:
            return [flat.grad for flat in self.flats if flat.grad is not None]
        return [part for parts in zero.averaged_gradients.values() for part in parts]

    def gradient_of(self, slot: Slot) -> Tensor:
        zero = self.zero
        if self.stage == 3:
            before = sum(int(n) for n in zero.fp16_partitioned_groups_flat_numel[: slot.index])
            return slot.of(zero.grad_partitions_flat_buffer[before:])
        if zero.cpu_offload:
            return slot.of(cast(Tensor, self.flats[slot.index].grad))
        parts = zero.averaged_gradients[slot.index]
        return slot.of(torch.cat([part.flatten() for part in parts]))

    def clear_gradients(self) -> None:
        """Zeroes what DeepSpeed would use again for a parameter left out of the next loss."""
        zero = self.zero
        if self.stage == 3:
            zero.grad_partitions_flat_buffer.zero_()
        for flat in self.flats:
            if flat.grad is not None:
                flat.grad.zero_()

    def memory(self, module: nn.Module) -> dict[str, int]:
        """Bytes of this rank's parameters (masters apart), gradients and optimizer, masters too."""
        zero = self.zero
        working: dict[int, int] = {}
        for parameter in module.parameters():
            held = [parameter.data]
            if self.stage == 3:
                held.append(cast(Any, parameter).ds_tensor.data)
            for tensor in held:
                storage = tensor.untyped_storage()
                working[storage.data_ptr()] = storage.nbytes()
        gradients = (
            zero.grad_partitions_flat_buffer.nbytes
            if self.stage == 3
            else sum(flat.nbytes for flat in self.flats)
        )
        if self.stage == 1:
            gradients = sum(p.numel() * p.element_size() for p in module.parameters())
        optimizer = 0
        for flat in self.flats:
            if flat.untyped_storage().data_ptr() not in working:
                optimizer += flat.nbytes
            values = zero.optimizer.state.get(flat, {}).values()
            optimizer += sum(value.nbytes for value in values if isinstance(value, Tensor))
        return {
            "parameters_bytes": sum(working.values()),
            "gradients_bytes": gradients,
            "optimizer_bytes": optimizer,
        }
