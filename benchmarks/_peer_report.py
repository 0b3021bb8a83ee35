"""The figures of `bench peers`: medians over rounds, ratios within a round, Markdown."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

LOSS_STEPS = 20
# As compiled by part, and as one graph.
_OURS, _BARE = ("scalellm", "scalellm-model"), ("scalellm-bare", "scalellm-bare-model")


def summarize(args: argparse.Namespace, gemm: dict[str, list[float]]) -> dict[str, Any]:
    """Returns one row for each contestant, the ratios to ours, and the peaks of the rounds."""
    tokens = args.batch * args.model.seq_len
    rows = [_row(one, tokens, gemm) for one in args.contestants]
    by_name = {row["name"]: row for row in rows}
    done = [row for row in rows if row["status"] == "ok"]
    ours = [row for row in done if row["peer"] in _OURS]
    best = max(ours, key=lambda row: row["tokens_per_s"]["median"], default=None)
    for row in done:
        mine = by_name.get(f"{_OURS[0]}-{row['variant']}")
        row["best_over_it"] = _ratio(best, row)
        row["same_variant_over_it"] = _ratio(mine, row)
    return {
        "tokens_per_step": tokens,
        "gemm_flops_per_s": gemm,
        "contestants": rows,
        "best": best and best["name"],
        "whole_over_bare": {
            row["name"].removeprefix("scalellm-"): _whole_over_bare(row, by_name[bare])
            for row in ours
            if (bare := row["name"].replace("scalellm", "scalellm-bare", 1)) in by_name
            and by_name[bare]["status"] == "ok"
        },
        "loss_differences": _loss_differences(done),
    }


def _row(one: Any, tokens: int, gemm: dict[str, list[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": one.name,
        "peer": one.name.removesuffix(f"-{one.variant}"),
        "variant": one.variant,
        "as_it_ships": one.peer.ships == one.variant,
        "status": one.status,
        "reason": one.reason,
    }
    turns = [turn for turn in one.turns if turn is not None]
    if one.status != "ok":
        return row
    rates = [len(turn["step_s"]) * tokens / sum(turn["step_s"]) for turn in turns]
    flops = one.ready["flops_per_token"]
    shares = [r * flops / peak for r, peak in zip(rates, gemm[one.precision], strict=True)]
    losses = [loss for turn in (one.warm, *turns) for loss in turn["losses"]]
    return row | {
        **{key: one.ready[key] for key in ("parameters", "flops_per_token", "versions")},
        "start_s": one.start_s,
        "first_step_s": one.warm["step_s"][0],
        "step_s": [turn["step_s"] for turn in turns],
        "tokens_per_s": {**_spread(rates), "runs": rates},
        "of_gemm": _spread(shares),
        "peak_rss_bytes": turns[-1]["peak_rss_bytes"],
        "losses": losses[:LOSS_STEPS],
    }


def _spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles; of fewer than two values, that value."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if values[1:] else values * 3
    return dict(zip(("low", "median", "high"), quartiles, strict=True))


def _ratio(ours: dict[str, Any] | None, other: dict[str, Any]) -> dict[str, Any] | None:
    if ours is None or ours["status"] != "ok":
        return None
    raw = _raw_ratio(ours, other)
    scale = ours["flops_per_token"] / other["flops_per_token"]
    return {"raw": raw, "per_flop": {key: value * scale for key, value in raw.items()}}


def _raw_ratio(a: dict[str, Any], b: dict[str, Any]) -> dict[str, float]:
    """Of the same rounds, so that a slow spell hits both sides."""
    pairs = zip(a["tokens_per_s"]["runs"], b["tokens_per_s"]["runs"], strict=True)
    return _spread([mine / other for mine, other in pairs])


def _whole_over_bare(whole: dict[str, Any], bare: dict[str, Any]) -> dict[str, Any]:
    """By the sum of all steps too: a median of turns does not see one save in fifty steps."""
    total = [sum(sum(turn) for turn in row["step_s"]) for row in (bare, whole)]
    return {"by_round": _raw_ratio(whole, bare), "by_total_time": total[0] / total[1]}


def _loss_differences(done: list[dict[str, Any]]) -> dict[str, Any]:
    """Largest distance, over the first steps, to the first of ours; by name."""
    reference = next((row for row in done if row["peer"] in _OURS + _BARE), None)
    if reference is None:
        return {}
    wanted = reference["losses"]
    apart = {
        row["name"]: max(abs(a - b) for a, b in zip(row["losses"], wanted, strict=False))
        for row in done
    }
    return {"reference": reference["name"], "largest": apart}


def table(report: dict[str, Any]) -> str:
    """Returns the comparison of trainers as Markdown."""
    machine, config = report["environment"], report["config"]
    peaks = [
        f"{precision} {statistics.median(values) / 1e9:,.0f}"
        for precision, values in report["gemm_flops_per_s"].items()
    ]
    lines = [
        f"shape {config['shape']} (layers x width x T x vocabulary), {config['batch']} samples a "
        f"step, {config['threads']} threads, {config['rounds']} rounds of {config['steps']} steps "
        f"after {config['warmup']}, in turn; {machine['processor']}, {machine['cores']} cores, "
        f"torch {machine['versions']['torch']}; matrix products, GFLOP/s: {', '.join(peaks)}",
        "",
        "| contestant | as it ships | parameters | MFLOP/token | tokens/s | quartiles | of peak | "
        f"{report['best'] or 'scalellm'} / it | per FLOP | same variant | per FLOP | MiB | "
        "first step s |",
        "|---" * 13 + "|",
    ]
    for row in report["contestants"]:
        if row["status"] != "ok":
            lines.append(f"| {row['name']} | {row['status']}: {row['reason']}" + " |" * 12)
            continue
        rate = row["tokens_per_s"]
        ratios = [
            f"{ratio[kind]['median']:.2f}" if ratio else "-"
            for ratio in (row["best_over_it"], row["same_variant_over_it"])
            for kind in ("raw", "per_flop")
        ]
        lines.append(
            f"| {row['name']} | {'yes' if row['as_it_ships'] else ''} | {row['parameters']:,} | "
            f"{row['flops_per_token'] / 1e6:.1f} | {rate['median']:,.0f} | {rate['low']:,.0f} to "
            f"{rate['high']:,.0f} | {row['of_gemm']['median']:.0%} | {' | '.join(ratios)} | "
            f"{row['peak_rss_bytes'] / 2**20:,.0f} | {row['first_step_s']:.1f} |"
        )
    return "\n".join([*lines, "", *_whole_lines(report), *_loss_lines(report)])


def _whole_lines(report: dict[str, Any]) -> list[str]:
    lines = []
    for variant, ratio in report["whole_over_bare"].items():
        low, middle, high = ratio["by_round"].values()
        lines.append(
            f"whole trainer / bare loop, {variant}: {middle:.3f} ({low:.3f} to {high:.3f}) by "
            f"round, {ratio['by_total_time']:.3f} by the time of all steps"
        )
    return [*lines, ""] if lines else []


def _loss_lines(report: dict[str, Any]) -> list[str]:
    """The first steps' losses; all but the plain loop start from the same weights."""
    done = [row for row in report["contestants"] if row["status"] == "ok"]
    count = min((len(row["losses"]) for row in done), default=0)
    steps = [step for step in (1, 5, 10, 15, 20) if step <= count]
    differences = report["loss_differences"]
    if not steps or not differences:
        return []
    reference = differences["reference"]
    lines = [
        "Losses in nats per token. All but the plain loops (another model, the same distribution "
        "of initial weights) start from the same weights.",
        "",
        f"| contestant | {' | '.join(f'step {step}' for step in steps)} | apart from {reference} |",
        "|---" * (len(steps) + 2) + "|",
    ]
    for row in done:
        losses = " | ".join(f"{row['losses'][step - 1]:.4f}" for step in steps)
        apart = differences["largest"][row["name"]]
        lines.append(f"| {row['name']} | {losses} | {apart:.1e} |")
    return [*lines, ""]


def loaders_table(report: dict[str, Any]) -> str:
    """Returns the comparison of loaders as Markdown."""
    loaders = report["loaders"]
    lines = [
        f"loaders: {loaders['tokens']:,} uint16 ids, samples of {loaders['seq_len']:,}, batches of "
        f"{loaders['batch']}, {loaders['rounds']} passes each in turn, page cache warm",
        "",
        "| loader | Mtok/s | quartiles | Mtok/CPU-s | first batch ms | "
        f"{loaders['ours']} / it, wall | per CPU-s |",
        "|---" * 7 + "|",
    ]
    for row in loaders["rows"]:
        if row["status"] != "ok":
            lines.append(f"| {row['name']} | {row['status']}: {row['reason']}" + " |" * 6)
            continue
        wall = row["wall_rate"]
        lines.append(
            f"| {row['name']} | {wall['median']:.1f} | {wall['low']:.1f} to {wall['high']:.1f} | "
            f"{row['cpu_rate']['median']:.1f} | {row['first_ms']['median']:.0f} | "
            f"{row['ours_over_it_wall']['median']:.2f} | {row['ours_over_it_cpu']['median']:.2f} |"
        )
    return "\n".join(lines)


def loader_rows(
    runs: dict[str, list[Any]], failed: dict[str, str], ours: str
) -> list[dict[str, Any]]:
    """Returns one row for each loader; `runs` are passes with `wall_rate` and `cpu_rate`."""
    rows: list[dict[str, Any]] = []
    for name, passes in runs.items():
        if name in failed:
            rows.append({"name": name, "status": "failed", "reason": failed[name]})
            continue
        pairs = list(zip(runs[ours], passes, strict=True))
        rows.append(
            {
                "name": name,
                "status": "ok",
                "reason": None,
                "wall_rate": _spread([run.wall_rate for run in passes]),
                "cpu_rate": _spread([run.cpu_rate for run in passes]),
                "first_ms": _spread([run.first_ms for run in passes]),
                "ours_over_it_wall": _spread([a.wall_rate / b.wall_rate for a, b in pairs]),
                "ours_over_it_cpu": _spread([a.cpu_rate / b.cpu_rate for a, b in pairs]),
            }
        )
    return rows
