"""What helps where a config needs too much memory, with the peak that each change would have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from scalellm.plan._ranks import batches_of
from scalellm.plan.candidates import Candidate, Values, merged, offloading
from scalellm.plan.devices import Device

Attempt = Callable[[str, int, Values], Candidate]

_MAX_RANKS = 1 << 12
_WAYS_OUT = 3
_ANOTHER_MODEL = ("seq_len", "num_layers")  # what helps, but is the last that one wants


def ways_out(
    rows: Sequence[Candidate], world_size: int, attempt: Attempt, device: Device
) -> list[Candidate]:
    """Single changes to the least too large row: first those that fit, then the smallest.

    Args:
        attempt: from a label, ranks and changes to what is known of them.
    """
    possible = [row for row in rows if row.memory is not None]
    if not possible:
        return []
    nearest = min(possible, key=lambda row: row.over_bytes)
    tried = [attempt(label, world_size, changes) for label, changes in _steps(nearest, device)]
    found = [_smaller_micro_batch(nearest, attempt), *tried, more_ranks(nearest, attempt, device)]
    helping = [one for one in found if one and one.memory and one.over_bytes < nearest.over_bytes]
    helping.sort(key=lambda one: (not one.fits, _is_another_model(one), one.over_bytes))
    return helping[:_WAYS_OUT]


def _smaller_micro_batch(nearest: Candidate, attempt: Attempt) -> Candidate | None:
    """The largest that fits, by halving, else that of one sample; None if there is none smaller."""
    assert nearest.config is not None
    found, size = None, batches_of(nearest.config, nearest.world_size).micro_batch_size // 2
    while size >= 1:
        changes = merged(nearest.changes, {"train": {"micro_batch_size": size}})
        found = attempt(f"train.micro_batch_size={size}", nearest.world_size, changes)
        if found.fits:
            break
        size //= 2
    return found


def _steps(nearest: Candidate, device: Device) -> Iterator[tuple[str, Values]]:
    assert nearest.config is not None
    before, train, model = nearest.changes, nearest.config.train, nearest.config.model
    if train.activation_checkpointing != "full":
        full = {"train": {"activation_checkpointing": "full"}}
        yield "train.activation_checkpointing=full", merged(before, full)
    if not model.loss_chunk_tokens:
        chunked = {"model": {"loss_chunk_tokens": 1024}}
        yield "model.loss_chunk_tokens=1024", merged(before, chunked)
    known = nearest.config.strategy
    for label, options in offloading().items():
        if not device.is_cpu and options != {"name": known.name, **known.options}:
            yield f"offload to the host ({label})", {**before, "strategy": options}
    if nearest.world_size > 1 and known.name in ("ddp", "accelerate"):
        yield "strategy.name=fsdp", {**before, "strategy": {"name": "fsdp"}}
    for name in _ANOTHER_MODEL:
        value = getattr(model, name)
        if value > 1:
            half = {"model": {name: value // 2}}
            yield f"model.{name}={value // 2}", merged(before, half)


def more_ranks(nearest: Candidate, attempt: Attempt, device: Device) -> Candidate | None:
    """The fewest ranks, by doubling, on which it fits; None if they do not help."""
    if device.is_cpu:
        return None  # the ranks share one memory: what each has less there are more of
    ranks, changes = nearest.world_size * 2, nearest.changes
    if nearest.config is not None and nearest.config.strategy.name == "single":
        changes = {**changes, "strategy": {"name": "fsdp"}}
    while ranks <= _MAX_RANKS:
        found = attempt(f"{ranks:,} devices", ranks, changes)
        if found.refused or found.fits:
            return found if found.fits else None
        ranks *= 2
    return None


def _is_another_model(candidate: Candidate) -> bool:
    return any(name in candidate.changes.get("model", {}) for name in _ANOTHER_MODEL)
