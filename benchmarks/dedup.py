"""How well and how fast near duplicates are found: ours, datasketch and datatrove.

    python benchmarks/dedup.py [--mb 1000] [--peer-mb 8] [--repeats 5] [--datatrove PYTHON]

Ours runs over the whole corpus, which has duplicates planted at known exact Jaccard similarities.
Then all contestants take the same parts of it in turn, each on one core in a process of its own.
A removal is right if the document was planted as an exact copy or at 0.7 and above.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _dedup_corpus import DECOYS, EXACT, LEVELS, Documents, build

from scalellm.errors import UserError

_WORKER = Path(__file__).with_name("_dedup_worker.py")
_OURS = "scalellm"
_LEAST_TRUE = 0.69
_MB = 1_000_000

Figures = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Builds the corpus in a temporary directory, measures, prints; returns the exit code."""
    args = _parse(argv)
    pythons = {_OURS: sys.executable, "datasketch": sys.executable, "datatrove": args.datatrove}
    if not _has_datasketch():
        print("datasketch is not installed here, so it is left out", file=sys.stderr)
        del pythons["datasketch"]
    if not args.datatrove:
        del pythons["datatrove"]
    elif not _imports_datatrove(args.datatrove):
        raise UserError(
            f"--datatrove={args.datatrove} is no Python that imports datatrove; give the python of "
            'a virtual environment with `pip install "datatrove[processing]"`'
        )
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        documents = build(Path(folder), args.mb * _MB, args.seed)
        whole = measure(_OURS, sys.executable, Path(folder), documents, 0, len(documents))
        parts = cut(documents, args.peer_mb * _MB, args.repeats)
        runs: dict[str, list[Figures]] = {name: [] for name in pythons}
        for number, (start, stop) in enumerate(parts):
            # Who begins changes, so that a slow spell hits no one more often.
            order = list(pythons) if number % 2 else list(pythons)[::-1]
            for name in order:
                figures = measure(name, pythons[name], Path(folder), documents, start, stop)
                runs[name].append(figures)
    report = {
        "config": {key: str(value) for key, value in vars(args).items()},
        "machine": machine(),
        "whole": whole,
        "runs": runs,
    }
    print_report(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mb", type=_positive, default=1000, help="size of the corpus in MB")
    parser.add_argument("--peer-mb", type=_positive, default=8, help="size of one part in MB")
    parser.add_argument("--repeats", type=_positive, default=5, help="parts that all take")
    parser.add_argument("--datatrove", help="the Python of an environment with datatrove")
    parser.add_argument("--seed", type=int, default=0, help="of the corpus")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--dir", type=Path, help="where to put the corpus while measuring")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def _has_datasketch() -> bool:
    try:
        importlib.metadata.version("datasketch")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _imports_datatrove(python: str) -> bool:
    command = [python, "-c", "import datatrove.pipeline.dedup"]
    try:
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
    except OSError:
        return False


def cut(documents: Documents, part_bytes: int, count: int) -> list[tuple[int, int]]:
    """Ranges of about `part_bytes` bytes, spread evenly over the corpus."""
    size_bytes = documents.size_bytes(0, len(documents))
    share = min(part_bytes / size_bytes, 1 / count)
    length = max(int(share * len(documents)), 1)
    starts = np.linspace(0, len(documents) - length, count).astype(int).tolist()
    return [(start, start + length) for start in starts]


def measure(
    name: str, python: str, folder: Path, documents: Documents, start: int, stop: int
) -> Figures:
    """Runs one contestant over a range and judges what it removed."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        ended = subprocess.run(
            [python, str(_WORKER), name, str(folder), str(start), str(stop), scratch],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        )
    figures = json.loads(ended.stdout.splitlines()[-1])
    removed_N = np.zeros(stop - start, bool)
    removed_N[figures.pop("removed")] = True
    size_mb = documents.size_bytes(start, stop) / _MB
    figures["documents"], figures["mb"] = stop - start, size_mb
    cpu_s = figures["signature_cpu_s"] + figures["search_cpu_s"]
    figures["documents_per_cpu_s"] = (stop - start) / cpu_s
    figures["mb_per_cpu_s"] = size_mb / cpu_s
    return figures | judge(removed_N, documents, start)


def judge(removed_N: np.ndarray, documents: Documents, start: int) -> Figures:
    """Recall by level, precision of all removals, of the documents from `start` on.

    A plant whose original is in front of the part has nothing there that it is a duplicate of.
    """
    part = slice(start, start + len(removed_N))
    is_here_N = documents.original_N[part] >= start
    jaccard_N = np.where(is_here_N, documents.jaccard_N[part], 0)
    level_N = np.where(is_here_N, documents.level_N[part], 0)
    right = int(np.count_nonzero(removed_N & (jaccard_N >= _LEAST_TRUE)))
    removed = int(np.count_nonzero(removed_N))

    def share(level: float) -> float | None:
        of_level = removed_N[level_N == level]
        return float(of_level.mean()) if len(of_level) else None

    return {
        "removed": removed,
        "precision": right / removed if removed else 1.0,
        "recall": {f"{level:g}": share(level) for level in (*LEVELS, EXACT)},
        "removed_decoys": {f"{level:g}": share(level) for level in DECOYS},
        "removed_background": int(np.count_nonzero(removed_N & (level_N == 0))),
        "planted": int(np.count_nonzero(level_N >= min(LEVELS))),
    }


def machine() -> dict[str, Any]:
    """Returns the hardware and the versions the numbers hold for."""
    return {
        "cores": os.cpu_count(),
        "load_1min": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def print_report(report: Figures) -> None:
    """Prints the whole corpus, then the contestants: medians with their spread (min-max)."""
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    whole = report["whole"]
    per_s = {step: whole["documents"] / whole[f"{step}_cpu_s"] for step in ("signature", "search")}
    print(
        f"{_OURS}, whole corpus: {whole['mb']:.0f} MB, {whole['documents']:,} documents, one core\n"
        f"  signature {whole['signature_cpu_s']:.1f} s ({per_s['signature']:,.0f} documents/s, "
        f"{whole['mb'] / whole['signature_cpu_s']:.1f} MB/s), "
        f"search {whole['search_cpu_s']:.1f} s ({per_s['search']:,.0f} documents/s), "
        f"wall {whole['wall_s']:.1f} s\n"
        f"  memory: search {whole['accounted_bytes'] / _MB:.0f} MB accounted, process "
        f"{whole['rss_bytes'] / _MB:.0f} MB above its start; {whole['candidates']:,} candidates\n"
        f"  removed {whole['removed']:,} of {whole['planted']:,} planted, precision "
        f"{whole['precision']:.4f}; background removed: {whole['removed_background']}"
    )
    _print_levels(_OURS, [whole])
    documents = statistics.median(run["documents"] for run in report["runs"][_OURS])
    print(f"all, {len(report['runs'][_OURS])} parts of {documents:,.0f} documents, one core each:")
    for name, runs in report["runs"].items():
        print(
            f"  {name:12} documents/CPU-s {_spread(runs, 'documents_per_cpu_s')}, "
            f"MB/CPU-s {_spread(runs, 'mb_per_cpu_s', 2)}, "
            f"MB of memory {statistics.median(run['rss_bytes'] for run in runs) / _MB:.0f}, "
            f"precision {_spread(runs, 'precision', 3)}"
        )
        _print_levels(name, runs)


def _print_levels(name: str, runs: list[Figures]) -> None:
    for what, title in (("recall", "recall at"), ("removed_decoys", "decoys removed at")):
        cells = []
        for level in runs[0][what]:
            found = [run[what][level] for run in runs if run[what][level] is not None]
            cells.append(f"{level}: {statistics.mean(found):.3f}" if found else f"{level}: -")
        print(f"  {name:12} {title} Jaccard {', '.join(cells)}")


def _spread(runs: list[Figures], name: str, digits: int = 0) -> str:
    values = [run[name] for run in runs]
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
