"""How fast tokens come off the disk: this loader, raw zstd, and np.memmap behind a DataLoader.

    python benchmarks/data.py [--tokens 20M] [--seq-len 1024] [--batch 8] [--repeats 5] [--json F]

The contestants run in turn, once per repeat, on the same ids, all in the page cache, and all end
with int64 ids, as an embedding takes them. The loader runs with every check on. The ids are words
of the standard library's sources, each line once, which zstd compresses about as well as BPE ids of
prose.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import statistics
import sys
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from scalellm.data import DatasetWriter, TokenDataset, TokenStream

_VOCAB_SIZE, _EOS_ID, _DOCUMENT_LINES = 32_768, 0, 60
_WORD = re.compile(r" ?[^\W_]+| ?[^\w\s]+|_|\s+")
_RAW, _MEMMAP_WORKERS = "raw zstd decode + widening", "np.memmap + DataLoader, 2 workers"
_OURS = {threads: f"scalellm, {threads} decode threads" for threads in (0, 1, 2)}


@dataclass(frozen=True)
class Run:
    """One measured pass over the data."""

    tokens: int
    wall_s: float
    cpu_s: float
    first_ms: float

    @property
    def wall_rate(self) -> float:
        return self.tokens / self.wall_s / 1e6

    @property
    def cpu_rate(self) -> float:
        return self.tokens / self.cpu_s / 1e6


def main(argv: list[str] | None = None) -> int:
    """Builds the data in a temporary directory, measures, prints a table; returns the exit code."""
    args = _parse(argv)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        dataset, memmap = build(Path(folder), args.tokens)
        contestants = make_contestants(dataset, memmap, args.seq_len, args.batch)
        for run in contestants.values():
            run()
        runs: dict[str, list[Run]] = {name: [] for name in contestants}
        for _ in range(args.repeats):
            for name, run in contestants.items():
                runs[name].append(run())
        report = {
            "config": {key: str(value) for key, value in vars(args).items()},
            "machine": machine(),
            "zstd_ratio": _zstd_ratio(dataset),
            "runs": {name: [asdict(run) for run in passes] for name, passes in runs.items()},
            "ratios": ratios(runs),
        }
    print_report(report, runs)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=_count, default=20_000_000, help="such as 20M")
    parser.add_argument("--seq-len", type=_count, default=1024, help="tokens per sample")
    parser.add_argument("--batch", type=_count, default=8, help="samples per batch")
    parser.add_argument("--repeats", type=_count, default=5, help="measured passes of each")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--dir", type=Path, help="where to put the data while measuring")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    scale = {"k": 10**3, "M": 10**6, "G": 10**9}.get(text[-1:], 1)
    value = int(float(text[: None if scale == 1 else -1]) * scale)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def build(folder: Path, num_tokens: int) -> tuple[TokenDataset, np.ndarray]:
    """Writes the same ids as a dataset and as a raw uint16 file; returns both, opened."""
    written = 0
    with (
        DatasetWriter(
            folder / "dataset",
            vocab_size=_VOCAB_SIZE,
            eos_id=_EOS_ID,
            tokenizer_file=None,
            tokenizer_kind="words",
        ) as writer,
        (folder / "tokens.bin").open("wb") as raw,
    ):
        for document in _documents():
            tokens = document[: max(num_tokens - written, 2)]
            tokens[-1] = _EOS_ID
            writer.add("train", tokens)
            raw.write(tokens.tobytes())
            written += len(tokens)
            if written >= num_tokens:
                break
        writer.finish()
    memmap = np.memmap(folder / "tokens.bin", np.uint16, "r")
    return TokenDataset.open(folder / "dataset"), memmap


def _documents() -> Iterator[np.ndarray]:
    """Yields documents of word ids for ever; frames are independent, so rounds do not help zstd."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in sorted(root.rglob("*.py")) if "site-packages" not in p.parts]
    paths = [p for p in paths if "test" not in str(p.relative_to(root))]
    rounds: list[np.ndarray] = []
    seen: set[str] = set()
    pending: list[str] = []
    for path in paths:
        for line in path.read_text("utf-8", "ignore").splitlines(keepends=True):
            if line not in seen:
                seen.add(line)
                pending.append(line)
            if len(pending) == _DOCUMENT_LINES:
                rounds.append(_word_ids(pending))
                pending = []
                yield rounds[-1].copy()
    while True:
        for document in rounds:
            yield document.copy()


def _word_ids(lines: list[str]) -> np.ndarray:
    words = [word for line in lines for word in _WORD.findall(line)]
    ids = [1 + zlib.crc32(word.encode()) % (_VOCAB_SIZE - 1) for word in words]
    return np.array([*ids, _EOS_ID], np.uint16)


def make_contestants(
    dataset: TokenDataset, memmap: np.ndarray, seq_len: int, batch: int
) -> dict[str, Callable[[], Run]]:
    """Returns name -> function that makes one measured pass over about one epoch."""
    num_batches = max(dataset.num_tokens // (seq_len * batch) - 1, 1)
    frames = _compressed_frames(dataset)

    def ours(threads: int) -> Callable[[], Run]:
        return lambda: _loop(lambda: _stream(dataset, seq_len, batch, threads), num_batches)

    def torch_loader(workers: int) -> Callable[[], Run]:
        return lambda: _loop(lambda: _loader(memmap, seq_len, batch, workers), num_batches)

    return {
        _RAW: lambda: _decode_all(frames, dataset),
        **{name: ours(threads) for threads, name in _OURS.items()},
        "np.memmap + DataLoader, 0 workers": torch_loader(0),
        _MEMMAP_WORKERS: torch_loader(2),
    }


def _stream(dataset: TokenDataset, seq_len: int, batch: int, threads: int) -> Iterator[int]:
    with TokenStream(
        dataset, seq_len=seq_len, global_batch_size=batch, decode_threads=threads
    ) as stream:
        for rows, _ in stream:
            yield rows.tokens_BS.astype(np.int64)[:, 1:].size


def _loader(memmap: np.ndarray, seq_len: int, batch: int, workers: int) -> Iterator[int]:
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Samples(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return (len(memmap) - 1) // seq_len

        def __getitem__(self, index: int) -> torch.Tensor:
            start = index * seq_len
            return torch.from_numpy(np.array(memmap[start : start + seq_len + 1]))

    loader = DataLoader(Samples(), batch_size=batch, shuffle=True, num_workers=workers)
    while True:
        for tokens in loader:
            yield tokens.long()[:, 1:].numel()


def _loop(start: Callable[[], Iterator[int]], num_batches: int) -> Run:
    """Consumes batches; rates leave out the first batch, which is timed by itself.

    CPU time is of all threads, and of worker processes with their start, known when they end.
    """
    began = time.perf_counter()
    batches = start()
    next(batches)
    warm, cpu = time.perf_counter(), _cpu_s()
    tokens = sum(next(batches) for _ in range(num_batches))
    wall_s = time.perf_counter() - warm
    batches.close()  # type: ignore[attr-defined]
    return Run(tokens, wall_s, _cpu_s() - cpu, (warm - began) * 1e3)


def _decode_all(frames: list[bytes], dataset: TokenDataset) -> Run:
    decompressor = zstandard.ZstdDecompressor()
    began, cpu = time.perf_counter(), _cpu_s()
    for frame in frames:
        np.frombuffer(decompressor.decompress(frame), np.uint16).astype(np.int64)
    return Run(dataset.num_tokens, time.perf_counter() - began, _cpu_s() - cpu, 0.0)


def _compressed_frames(dataset: TokenDataset) -> list[bytes]:
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
    starts = range(0, dataset.num_tokens, dataset.frame_tokens)
    return [
        compressor.compress(
            dataset.read(at, min(at + dataset.frame_tokens, dataset.num_tokens)).tobytes()
        )
        for at in starts
    ]


def _cpu_s() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _zstd_ratio(dataset: TokenDataset) -> float:
    shards = dataset.manifest.splits["train"].shards
    return dataset.num_tokens * dataset.dtype.itemsize / sum(shard.size_bytes for shard in shards)


def ratios(runs: dict[str, list[Run]]) -> dict[str, list[float]]:
    """Returns ratios of passes of the same repeat, so that a slow spell hits both sides."""
    raw, workers = runs[_RAW], runs[_MEMMAP_WORKERS]
    table: dict[str, list[float]] = {}
    for name in _OURS.values():
        pairs = list(zip(runs[name], raw, workers, strict=True))
        table[f"{name} / raw zstd, per CPU-second"] = [a.cpu_rate / b.cpu_rate for a, b, _ in pairs]
        table[f"{name} / raw zstd, wall"] = [a.wall_rate / b.wall_rate for a, b, _ in pairs]
        table[f"{name} / memmap 2 workers, wall"] = [a.wall_rate / c.wall_rate for a, _, c in pairs]
    return table


def machine() -> dict[str, Any]:
    """Returns the hardware and the versions the numbers hold for."""
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_1min": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "zstandard": zstandard.__version__,
        "zstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
    }


def print_report(report: dict[str, Any], runs: dict[str, list[Run]]) -> None:
    """Prints medians with their spread (min-max) over the repeats."""
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print(", ".join(f"{key} {value}" for key, value in report["config"].items()), end=", ")
    print(
        f"uint16, zstd ratio {report['zstd_ratio']:.2f}; page cache warm for all; medians (range)"
    )
    print(f"{'':36}{'Mtok/s wall':>22}{'Mtok/CPU-s':>22}{'first batch ms':>20}")
    for name, passes in runs.items():
        wall = _spread([run.wall_rate for run in passes])
        cpu = _spread([run.cpu_rate for run in passes])
        first = _spread([run.first_ms for run in passes]) if name != _RAW else "-"
        print(f"{name:36}{wall:>22}{cpu:>22}{first:>20}")
    raw = statistics.median(run.wall_rate for run in runs[_RAW])
    print(f"{_RAW}: {raw * 2 / 1e3:.2f} GB/s of decoded bytes; ratios within a repeat:")
    for name, values in report["ratios"].items():
        print(f"  {name:52}{_spread(values, 2):>22}")


def _spread(values: list[float], digits: int = 1) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
