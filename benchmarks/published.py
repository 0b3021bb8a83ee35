"""The planner against figures that others have published, from their configs.

    scalellm bench published [--only 8b-8,13b-offload] [--fit] [--json FILE] [--markdown FILE]

`published.yaml` has the figures and where each stands. Throughput is predicted with efficiencies
fitted to other rows on the same kind of device, never to rows of the same family; memory is
predicted from the config alone. Nothing is trained. The bounds asked for are 10% for memory and
20% for throughput: a row outside of them says MISS.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalellm.config import Config, parse_config, read_yaml
from scalellm.errors import UserError, did_you_mean
from scalellm.plan._record import record_events
from scalellm.plan.allocator import reserved_bytes
from scalellm.plan.calibrate import Measured, fit
from scalellm.plan.devices import Device, Efficiency, find_device
from scalellm.plan.memory import estimate
from scalellm.plan.speed import step_time

DATA = Path(__file__).with_name("published.yaml")
GIB = 1 << 30
MEMORY_BOUND, SPEED_BOUND = 0.10, 0.20


@dataclass(frozen=True)
class Row:
    """One published run; `kind` is whose efficiencies it shares, `values` the row as it stands."""

    id: str
    kind: str
    device: Device
    config: Config
    values: dict[str, Any]

    @property
    def world_size(self) -> int:
        return int(self.values["devices"])

    @property
    def measured(self) -> Measured | None:
        """The step time, where a throughput was published."""
        speed = self.values.get("tokens_per_s")
        if speed is None:
            return None
        tokens = self.config.train.global_batch_size * self.config.model.seq_len
        step_s = tokens / (speed * self.world_size)
        update_s = self.values.get("optimizer_s")
        return Measured(self.id, self.config, self.world_size, step_s, self.device, update_s)


def main(argv: list[str] | None = None) -> int:
    """Prints predicted beside published; returns 0, whatever the ratios are."""
    args = _parse(argv)
    rows = read_rows()
    if args.fit:
        print(fitted(rows))
        return 0
    chosen = _chosen(rows, args.only)
    found = [_compare(row, rows) for row in chosen]
    report = {"rows": found, **summary(found)}
    text = markdown(report)
    print(text)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.markdown is not None:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scalellm bench published", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--only", help="rows, by comma; default: all")
    parser.add_argument(
        "--fit", action="store_true", help="only fit each kind of device to all of its rows"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def _chosen(rows: Sequence[Row], only: str | None) -> list[Row]:
    by_id = {row.id: row for row in rows}
    words = only.split(",") if only else list(by_id)
    for word in words:
        if word not in by_id:
            raise UserError(f"--only: there is no row {word!r}{did_you_mean(word, by_id)}")
    return [by_id[word] for word in words]


def read_rows(path: Path = DATA) -> list[Row]:
    """Returns the published rows; a name that is not in the file is an error of the file."""
    data = read_yaml(path)
    rows = []
    for values in data["rows"]:
        fields = dict(data["devices"].get(values["device"]) or {"like": values["device"]})
        like = fields.pop("like")
        known = {**find_device(like).model_dump(), **fields, "name": values["device"]}
        device = Device.model_validate(known)
        # What is another machine, power and memory, reaches other shares.
        kind = values["device"] if "memory_bytes_per_s" in fields else like
        rows.append(Row(values["id"], kind, device, _config(values, data), values))
        assert values["source"] in data["sources"], values["source"]
    return rows


def _config(values: dict[str, Any], data: dict[str, Any]) -> Config:
    micro, times = values["rows"], values.get("accumulation", 1)
    replicas = values["devices"] // values.get("shared_by", 1)
    return parse_config(
        {
            "model": {**data["models"][values["model"]], "seq_len": values["seq_len"]},
            "strategy": data["strategies"][values["strategy"]],
            "train": {
                "global_batch_size": micro * times * replicas,
                "micro_batch_size": micro,
                "precision": values.get("precision", "bf16"),
                "activation_checkpointing": values["checkpointing"],
                "compile": values.get("compile", False),
            },
        },
        source=values["id"],
    )


# -- predictions --------------------------------------------------------------------------------


def _compare(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    print(f"{row.id} ...", file=sys.stderr, flush=True)
    return {**row.values, **predict_memory(row), **predict_speed(row, rows)}


def predict_memory(row: Row) -> dict[str, Any]:
    """Returns the predicted bytes as they were measured, and whether that fits."""
    found: dict[str, Any] = {}
    peak_bytes = estimate(row.config, row.world_size).peak_bytes
    found["predicted_bytes"] = peak_bytes
    if row.values.get("memory") == "reserved":
        _, events = record_events(row.config, row.world_size, "cuda")
        whole_bytes = reserved_bytes(events, expandable=row.values.get("expandable", False))
        train = row.config.train.model_copy(update={"compile": False})
        eager = estimate(row.config.model_copy(update={"train": train}), row.world_size)
        found["predicted_bytes"] = whole_bytes - (eager.peak_bytes - peak_bytes)
    if "memory_gib" in row.values:
        found["memory_ratio"] = found["predicted_bytes"] / (row.values["memory_gib"] * GIB)
    if "verdict" in row.values:
        found["predicted_verdict"] = "fits" if peak_bytes <= row.device.usable_bytes else "oom"
    return found


def predict_speed(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """Returns tokens/s of a device, from efficiencies of other families on such devices."""
    if row.measured is None:
        return {}
    family = row.values["family"]
    others = [
        other.measured
        for other in rows
        if other.kind == row.kind and other.values["family"] != family and other.measured
    ]
    efficiency = fit(others, Efficiency()) if others else Efficiency()
    time = step_time(row.config, row.world_size, row.device, efficiency)
    speed = time.tokens_per_s / row.world_size
    return {
        "predicted_tokens_per_s": speed,
        "speed_ratio": speed / row.values["tokens_per_s"],
        "calibrated_on": len(others),
        "efficiency": efficiency.model_dump(),
    }


def fitted(rows: Sequence[Row]) -> str:
    """Returns the efficiencies of each kind of device, as `devices.yaml` has them."""
    lines = []
    for kind in dict.fromkeys(row.kind for row in rows):
        runs = [row.measured for row in rows if row.kind == kind and row.measured]
        found = fit(runs, Efficiency()).model_dump()
        moved = {
            name: value for name, value in found.items() if value != getattr(Efficiency(), name)
        }
        shares = ", ".join(f"{name}: {value:.2f}" for name, value in moved.items())
        lines.append(f"{kind}: efficiency: {{{shares}}}  # {len(runs)} rows")
    return "\n".join(lines)


# -- what is said of them -----------------------------------------------------------------------


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Errors of both kinds: median, worst, and how many rows are within the bounds."""
    rows = list(rows)
    found: dict[str, Any] = {}
    for word, bound in (("memory", MEMORY_BOUND), ("speed", SPEED_BOUND)):
        errors = [abs(row[f"{word}_ratio"] - 1) for row in rows if f"{word}_ratio" in row]
        if errors:
            found[word] = {
                "rows": len(errors),
                "within": sum(error <= bound for error in errors),
                "median_error": statistics.median(errors),
                "worst_error": max(errors),
            }
    verdicts = [row["verdict"] == row["predicted_verdict"] for row in rows if "verdict" in row]
    found["verdicts"] = {"rows": len(verdicts), "right": sum(verdicts)}
    return found


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "| row | source | GiB predicted | published | ratio | tokens/s of a device predicted "
        "| published | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        cells = [row["id"], row["source"], f"{row['predicted_bytes'] / GIB:.1f}"]
        cells += [*_memory_cells(row), *_speed_cells(row)]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for word in ("memory", "speed"):
        if word in report:
            found = report[word]
            bound = MEMORY_BOUND if word == "memory" else SPEED_BOUND
            lines.append(
                f"{word}: {found['within']} of {found['rows']} rows within {bound:.0%}, median "
                f"error {found['median_error']:.1%}, worst {found['worst_error']:.1%}."
            )
    found = report["verdicts"]
    lines.append(f"fits or does not: {found['right']} of {found['rows']} as published.")
    return "\n".join(lines)


def _memory_cells(row: dict[str, Any]) -> list[str]:
    if "memory_gib" in row:
        published = f"{row['memory_gib']:.1f} {row['memory']}"
        return [published, _ratio(row["memory_ratio"], MEMORY_BOUND)]
    if "verdict" in row:
        is_right = row["verdict"] == row["predicted_verdict"]
        said = f"predicted: {row['predicted_verdict']}"
        return [row["verdict"], said if is_right else f"**MISS** {said}"]
    return ["", ""]


def _speed_cells(row: dict[str, Any]) -> list[str]:
    if "speed_ratio" not in row:
        return ["", "", ""]
    numbers = [f"{row[key]:,.0f}" for key in ("predicted_tokens_per_s", "tokens_per_s")]
    return [*numbers, _ratio(row["speed_ratio"], SPEED_BOUND)]


def _ratio(ratio: float, bound: float) -> str:
    return f"{ratio:.3f}" if abs(ratio - 1) <= bound else f"**MISS** {ratio:.3f}"


if __name__ == "__main__":
    sys.exit(main())
