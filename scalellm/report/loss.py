"""The loss curve that every run leaves, drawn from its `metrics.jsonl` alone."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

from scalellm.metrics import JSONL_NAME, Row, read_rows

_BLUE, _ORANGE, _GREY = "#2b6cb0", "#dd6b20", "#718096"


def draw_loss(run_dir: Path) -> Path | None:
    """Writes `loss.png` into the run folder; None if there is nothing to draw yet."""
    rows = list(read_rows(run_dir / JSONL_NAME))
    steps = [row for row in rows if row["kind"] == "train" and row["loss"] is not None]
    if not steps:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss_axes, rate_axes) = plt.subplots(
        2, 1, figsize=(9, 6), sharex=True, height_ratios=[4, 1], layout="constrained"
    )
    evals = [row for row in rows if row["kind"] == "eval" and row["loss"] is not None]
    _plot_loss(loss_axes, steps, evals)
    _plot_learning_rate(rate_axes, steps)
    figure.suptitle(_title(run_dir, steps), fontsize=11)
    path = run_dir / "loss.png"
    temporary = run_dir / ".loss.writing.png"
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.replace(path)
    return path


def _plot_loss(axes: Any, steps: list[Row], evals: list[Row]) -> None:
    x = [row["step"] for row in steps]
    loss = [row["loss"] for row in steps]
    axes.plot(x, loss, color=_BLUE, alpha=0.25, linewidth=1)
    axes.plot(x, smooth(loss), color=_BLUE, linewidth=1.8, label="training loss (smoothed)")
    if evals:
        last = evals[-1]
        axes.plot(
            [row["step"] for row in evals],
            [row["loss"] for row in evals],
            "o-",
            color=_ORANGE,
            markersize=4,
            label=f"validation loss, at last {last['loss']:.3f}",
        )
    _plot_sources(axes, evals)
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_sources(axes: Any, evals: list[Row]) -> None:
    """Each dataset of a mixture, thin and dashed."""
    names = dict.fromkeys(name for row in evals for name in row.get("loss_by_source", {}))
    for name in names:
        points = [(r["step"], r["loss_by_source"][name]) for r in evals if "loss_by_source" in r]
        axes.plot(
            *zip(*points, strict=True), "--", linewidth=1, label=f"{name} {points[-1][1]:.3f}"
        )


def _plot_learning_rate(axes: Any, steps: list[Row]) -> None:
    axes.plot([row["step"] for row in steps], [row["learning_rate"] for row in steps], color=_GREY)
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def smooth(values: list[float]) -> list[float]:
    """Mean over a centred window of a fortieth of the run, narrower at the ends."""
    half = max(1, len(values) // 80)
    sums = [0.0, *accumulate(values)]
    smoothed = []
    for index, value in enumerate(values):
        reach = min(half, index, len(values) - 1 - index)
        total = sums[index + reach + 1] - sums[index - reach]
        smoothed.append(total / (2 * reach + 1) if reach else value)
    return smoothed


def _title(run_dir: Path, steps: list[Row]) -> str:
    rates = sorted(row["tokens_per_s"] for row in steps)
    tokens = steps[-1]["tokens"]
    return (
        f"{run_dir.resolve().name}: {steps[-1]['step']:,} steps, {tokens / 1e6:.1f} M tokens, "
        f"median {rates[len(rates) // 2]:,.0f} tokens/s"
    )
