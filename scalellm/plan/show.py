"""The comparison as tables, as a config to paste, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import yaml

from scalellm.model import count_parameters
from scalellm.plan._ranks import batches_of
from scalellm.plan.candidates import Candidate
from scalellm.plan.choose import MARGIN, Plan
from scalellm.plan.devices import Efficiency
from scalellm.plan.dry_run import DryRun
from scalellm.plan.traffic import collectives, traffic
from scalellm.plan.types import Collective, Memory

_GB = 1e9
_KINDS = ("parameters", "gradients", "optimizer", "activations", "buffers", "temporary")


def show(plan: Plan, num_tokens: float | None = None, price_per_hour: float | None = None) -> str:
    """Returns both tables, what they lead to, and what to paste."""
    parts = [_headline(plan), _memory_table(plan), _speed_table(plan)]
    parts += [_refusals(plan), _verdict(plan, num_tokens, price_per_hour)]
    if plan.best and plan.best.changes:
        parts.append("put this into the config:\n\n" + paste(plan.best))
    return "\n\n".join(part for part in parts if part)


def paste(candidate: Candidate) -> str:
    """The sections that a candidate changes, as YAML."""
    return yaml.safe_dump(dict(candidate.changes), sort_keys=False)


def _headline(plan: Plan) -> str:
    device, config = plan.device, plan.given.config
    size = f"{count_parameters(config.model):,} parameters, " if config else ""
    whose = "assumed" if device.efficiency == Efficiency() else "fitted"
    return (
        f"{size}{plan.world_size:,} x {device.name}: {plan.limit_bytes / _GB:.1f} GB of "
        f"{device.memory_bytes / _GB:.1f} GB each for tensors ({device.usable_share:.0%} usable, "
        f"{MARGIN:.0%} margin). Speeds are rooflines with {whose} efficiencies, not measurements."
    )


def _rows(plan: Plan) -> list[Candidate]:
    return [row for row in [plan.given, *plan.rows] if not row.refused]


def _memory_table(plan: Plan) -> str:
    head = ["GB a rank", "micro-batch", "checkpointing", "fits", "peak", *_KINDS, "host"]
    lines = []
    for row in _rows(plan):
        assert row.config is not None and row.memory is not None
        fits = "yes" if row.fits else f"{row.over_bytes / _GB:.1f} over"
        lines.append([row.label, *_choice(row), fits, *_sizes(row.memory)])
    return _table(head, lines)


def _choice(row: Candidate) -> list[str]:
    assert row.config is not None
    batches = batches_of(row.config, row.world_size)
    size = f"{batches.micro_batch_size} x {batches.grad_accumulation}"
    return [size, row.config.train.activation_checkpointing]


def _sizes(memory: Memory) -> list[str]:
    kinds = [getattr(memory, f"{kind}_bytes") for kind in _KINDS]
    return [f"{size / _GB:.2f}" for size in (memory.peak_bytes, *kinds, memory.host_bytes)]


def _speed_table(plan: Plan) -> str:
    head = ["ms a step", "tokens/s", "MFU", "step", "products", "memory", "launches"]
    head += ["communication", "of it hidden", "optimizer"]
    has_bubble = any(row.time is not None and row.time.bubble_s for row in _rows(plan))
    head += ["bubble"] if has_bubble else []
    lines = []
    for row in _rows(plan):
        time = row.time
        if time is None:
            continue
        hidden_s = max(0.0, time.communication_s - time.exposed_communication_s)
        parts = [time.total_s, time.compute_s, time.memory_s, time.launch_s]
        parts += [time.communication_s, hidden_s, time.optimizer_s]
        parts += [time.bubble_s] if has_bubble else []
        speed = [f"{time.tokens_per_s:,.0f}", f"{time.mfu:.1%}"]
        lines.append([row.label, *speed, *(f"{part * 1e3:.1f}" for part in parts)])
    return _table(head, lines) if lines else ""


def _refusals(plan: Plan) -> str:
    return "\n".join(
        f"{row.label}: not possible: {row.refused}"
        for row in [plan.given, *plan.rows]
        if row.refused
    )


def _verdict(plan: Plan, num_tokens: float | None, price_per_hour: float | None) -> str:
    lines = []
    if plan.best is not None:
        lines.append(
            f"recommended: {_sentence(plan.best)}{_bill(plan, num_tokens, price_per_hour)}"
        )
    else:
        tried = [row for row in _rows(plan) if row.memory is not None]
        nearest = min(tried, key=lambda row: row.over_bytes, default=None)
        lack = f": at least {nearest.over_bytes / _GB:.1f} GB a rank are missing" if nearest else ""
        helps = any(way.fits for way in plan.ways_out)
        nor = (
            "" if helps else "; no single change that was tried, more devices among them, is enough"
        )
        lines.append(f"nothing fits{lack}{nor}")
    if plan.ways_out:
        lines.append("ways out:")
    lines += [f"  {_way_out(way)}" for way in plan.ways_out]
    return "\n".join(lines)


def _sentence(best: Candidate) -> str:
    assert best.memory is not None and best.time is not None
    return (
        f"{best.label}, micro-batches {' with checkpointing '.join(_choice(best))}: "
        f"{best.memory.peak_bytes / _GB:.1f} GB a rank, {best.time.tokens_per_s:,.0f} tokens/s, "
        f"{best.time.total_s:.3f} s a step"
    )


def _bill(plan: Plan, num_tokens: float | None, price_per_hour: float | None) -> str:
    assert plan.best is not None and plan.best.time is not None
    if num_tokens is None:
        return ""
    bill = f"; {num_tokens:,.0f} tokens take {plan.best.time.days(num_tokens):,.1f} days"
    if price_per_hour is not None:
        cost = plan.best.time.cost(num_tokens, plan.world_size, price_per_hour)
        bill += f" and cost {cost:,.0f} at {price_per_hour:g} an hour and device"
    return bill


def _way_out(way: Candidate) -> str:
    assert way.memory is not None
    fits = "fits" if way.fits else f"still {way.over_bytes / _GB:.1f} GB over"
    return f"{way.label}: {way.memory.peak_bytes / _GB:.1f} GB a rank, {fits}"


def show_dry_run(dry: DryRun, candidate: Candidate) -> str:
    """The recommended way's estimate and formulas beside a dry run of it."""
    assert candidate.memory is not None and candidate.config is not None
    head = ["GB a rank", "peak", *_KINDS, "host"]
    lines = [["estimate", *_sizes(candidate.memory)], ["dry run", *_sizes(dry.memory)]]
    formula = collectives(traffic(candidate.config, candidate.world_size))
    sent = _table(
        ["collectives a step", "dry run", "by formula", "bytes of whole tensors", "by formula"],
        [
            [f"{kind}", *(f"{number:,}" for number in numbers)]
            for kind, *numbers in _side_by_side(dry.collectives, formula)
        ],
    )
    sent = sent if dry.collectives or formula else "nothing is sent"
    return f"{_table(head, lines)}\n\n{sent}\n(dry run: {dry.seconds:.1f} s)"


def _side_by_side(
    seen: Sequence[Collective], formula: Sequence[Collective]
) -> Iterator[tuple[str, int, int, int, int]]:
    """Yields (kind, count seen, by formula, bytes seen, by formula)."""
    nothing = (0, 0)
    totals = [
        {one.kind: (one.count, one.payload_bytes) for one in ones} for ones in (seen, formula)
    ]
    for kind in sorted({*totals[0], *totals[1]}):
        first, second = (total.get(kind, nothing) for total in totals)
        yield kind, first[0], second[0], first[1], second[1]


def to_json(plan: Plan, num_tokens: float | None, price_per_hour: float | None) -> str:
    """Everything that the tables show, in bytes and seconds."""
    best = plan.best
    report: dict[str, Any] = {
        "device": plan.device.model_dump(),
        "world_size": plan.world_size,
        "limit_bytes": plan.limit_bytes,
        "given": _plain(plan.given),
        "variants": [_plain(row) for row in plan.rows],
        "best": _plain(best) if best else None,
        "ways_out": [_plain(way) for way in plan.ways_out],
    }
    if best and best.time and num_tokens is not None:
        report["days"] = best.time.days(num_tokens)
        if price_per_hour is not None:
            report["cost"] = best.time.cost(num_tokens, plan.world_size, price_per_hour)
    return json.dumps(report, indent=1)


def _plain(row: Candidate) -> dict[str, Any]:
    plain: dict[str, Any] = {"label": row.label, "world_size": row.world_size, "fits": row.fits}
    plain |= {"changes": dict(row.changes), "refused": row.refused}
    if row.memory is not None:
        plain["memory"] = {**asdict(row.memory), "peak_bytes": row.memory.peak_bytes}
        plain["over_bytes"] = row.over_bytes
    if row.time is not None:
        derived = {key: getattr(row.time, key) for key in ("total_s", "tokens_per_s", "mfu")}
        plain["time"] = {**asdict(row.time), **derived}
    return plain


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [list(head), *map(list, lines)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
    return "\n".join(
        "  ".join(
            word.ljust(width) if k == 0 else word.rjust(width)
            for k, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
