"""One run of one cell: a process tree of its own, what it measured, or why it could not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from _processes import end_tree, start
from _sweep_cells import Cell

from scalellm.errors import UserError
from scalellm.metrics import JSONL_NAME, read_rows
from scalellm.train import dump_config

OK, FAILED, OUT_OF_MEMORY = "ok", "failed", "out of memory"
SKIPPED, PENDING = "skipped", "pending"
# What is kept of each measured step.
STEP_KEYS = (
    "tokens_per_s",
    "step_time_s",
    "data_wait_s",
    "forward_s",
    "backward_s",
    "optimizer_s",
)
_END_KEYS = (
    "startup_s",
    "first_step_s",
    "goodput_tokens_per_s",
    "baseline_rss_bytes",
    "peak_rss_bytes",
    "peak_device_bytes",
)
# Profiling skips the steps in which memory is allocated and code compiled.
PROFILE_STEPS = 9
_OUR_WORD = "scalellm: "
_HINT = "; go on with --resume auto"  # true of the run, not of the sweep
_EXCEPTION = re.compile(r"[\w.]*(Error|Exception|Exit|Interrupt)\b")
_NO_MEMORY = re.compile(r"out of memory|ended by SIGKILL|need at least .* are available")
_LONGEST_REASON = 400


def run_cell(
    cell: Cell, folder: Path, data: Path, steps: int, warmup: int, timeout_s: float
) -> dict[str, Any]:
    """Trains a cell in `folder` and returns {"status", "reason"}, and "figures" if it went well."""
    status, reason = _train(cell, folder, data, steps, timeout_s)
    if status != OK:
        return {"status": status, "reason": reason}
    try:
        figures = read_figures(folder / JSONL_NAME, warmup)
    except UserError as error:
        return {"status": FAILED, "reason": str(error)}
    return {"status": OK, "reason": None, "figures": figures}


def profile_cell(cell: Cell, folder: Path, data: Path, timeout_s: float) -> dict[str, Any]:
    """Returns the same as `run_cell` of a short run, with "communication" in place of figures."""
    status, reason = _train(cell, folder, data, PROFILE_STEPS, timeout_s, "--profile")
    if status != OK:
        return {"status": status, "reason": reason}
    found = json.loads((folder / "profile" / "summary.json").read_text(encoding="utf-8"))
    communication = {
        key: found["communication"][key] for key in ("bytes_per_step", "time_s_per_step")
    }
    return {"status": OK, "reason": None, "communication": communication}


def read_figures(path: Path, warmup: int) -> dict[str, Any]:
    """Reads what a finished run measured: lists of its steps after the first `warmup` ones.

    Raises:
        UserError: the file is damaged, or the run did not come to its end.
    """
    rows = list(read_rows(path))
    train = [row for row in rows if row["kind"] == "train"]
    measured = [row for row in train if row["step"] > warmup]
    if not measured or rows[-1]["kind"] != "end":
        raise UserError(f"the run left no whole {path.name}: {len(train)} steps and no last row")
    steps: dict[str, Any] = {key: [row[key] for row in measured] for key in STEP_KEYS}
    end = {key: rows[-1][key] for key in _END_KEYS}
    return {**steps, **end, "losses": [row["loss"] for row in train]}


def _train(
    cell: Cell, folder: Path, data: Path, steps: int, timeout_s: float, *words: str
) -> tuple[str, str | None]:
    shutil.rmtree(folder, ignore_errors=True)  # of a sweep that was killed meanwhile
    folder.mkdir(parents=True)
    config = folder.with_suffix(".yaml")
    config.write_text(dump_config(cell.config(steps, data)), encoding="utf-8")
    log = folder.with_suffix(".log")
    command = [sys.executable, "-m", "scalellm", "train", str(config)]
    command += ["--nproc", str(cell.world_size), *words, f"run.dir={folder}"]
    with log.open("w") as out:
        process = start(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return FAILED, f"not done after {timeout_s:g} s (--timeout-s)"
    finally:
        end_tree(process)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return (OK, None) if code == 0 else explain_failure(code, log.read_text(errors="replace"))


def explain_failure(code: int, log: str) -> tuple[str, str]:
    """Returns a status and one line that says why, from the exit code and what was printed.

    A process that the kernel kills for memory cannot say so: SIGKILL, which is not the sweep's own,
    is taken for that.
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    own = [
        line[len(_OUR_WORD) :].partition(_HINT)[0] for line in lines if line.startswith(_OUR_WORD)
    ]
    raised = [line for line in lines if _EXCEPTION.match(line)]
    of_memory = [line for line in own if _NO_MEMORY.search(line)]
    killed = code in (-9, 137)
    candidates = of_memory or own or raised or lines or ["it said nothing"]
    reason = (
        "ended by SIGKILL, as the kernel does when memory runs out" if killed else candidates[-1]
    )
    status = OUT_OF_MEMORY if killed or of_memory else FAILED
    return status, f"{reason[:_LONGEST_REASON]} (exit code {code})"
