"""What the first batch costs when the dataset is behind a network: bytes, and how long it takes.

    scalellm bench remote [--data DIR] [--delay-ms 0 20] [--repeats 15] [--json F]

A dataset is served over HTTP from loopback, each answer late by `--delay-ms`. A cold start (open,
read the first batch) and a resume from the middle of the second epoch take turns; nothing is cached
between them. The state that is needed to resume is counted too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from _range_server import serve
from data import machine

from scalellm.data import Cursor, TokenDataset, TokenStream
from scalellm.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Measures and prints; returns the exit code."""
    args = _parse(argv)
    dataset = TokenDataset.open(args.data)
    folder = Path(args.data).resolve()
    report: dict[str, Any] = {
        "config": {key: str(value) for key, value in vars(args).items()},
        "machine": machine(),
        "dataset": {
            "tokens": dataset.num_tokens,
            "vocab_size": dataset.vocab_size,
            "stored_bytes": sum(
                shard.size_bytes for shard in dataset.manifest.splits[dataset.split].shards
            ),
        },
        "delays": {},
    }
    for delay_ms in args.delay_ms:
        with serve(folder, delay_ms / 1000) as url:
            report["delays"][f"{delay_ms:g}"] = _measure(url, args)
    _print(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scalellm bench remote", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data", type=Path, default=Path("data/stdlib"), help="dataset folder")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens per sample")
    parser.add_argument("--batch", type=int, default=8, help="samples per batch")
    parser.add_argument("--lanes", type=int, default=64, help="blocks read in turn")
    parser.add_argument(
        "--delay-ms", type=float, nargs="+", default=[0.0, 20.0], help="added to every answer"
    )
    parser.add_argument("--repeats", type=int, default=15, help="starts and resumes of each")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args(argv)
    if args.repeats < 1 or min(args.delay_ms) < 0:
        raise UserError(
            f"--repeats={args.repeats} must be 1 or more and --delay-ms={min(args.delay_ms)} ms 0 "
            "or more"
        )
    return args


def _measure(url: str, args: argparse.Namespace) -> dict[str, Any]:
    _, cursor, _ = _first_batch(url, args, None)  # imports, and the cursor's form
    num_samples = -(-(TokenDataset.open(url).num_tokens - 1) // args.seq_len)
    middle = replace(cursor, samples_consumed=num_samples + num_samples // 2, epoch=1)
    times: dict[str, list[float]] = {"start": [], "resume": []}
    read: dict[str, list[int]] = {"start": [], "resume": []}
    for _ in range(args.repeats):
        for name, where in (("start", None), ("resume", middle)):
            began = time.perf_counter()
            read_bytes, _, _ = _first_batch(url, args, where)
            times[name].append((time.perf_counter() - began) * 1000)
            read[name].append(read_bytes)
    return {
        "milliseconds": times,
        "read_bytes": read,
        "state_bytes": len(json.dumps(middle.to_dict())),
        "resume_minus_start_ms": statistics.median(times["resume"])
        - statistics.median(times["start"]),
    }


def _first_batch(
    url: str, args: argparse.Namespace, cursor: Cursor | None
) -> tuple[int, Cursor, int]:
    dataset = TokenDataset.open(url)
    options = {"seq_len": args.seq_len, "global_batch_size": args.batch, "lanes": args.lanes}
    with TokenStream(dataset, cursor=cursor, **options) as stream:
        batch, after = next(stream)
        return dataset.bytes_read, after, batch.tokens_BS.size


def _print(report: dict[str, Any]) -> None:
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    dataset = report["dataset"]
    print(
        f"{dataset['tokens']:,} tokens, vocabulary {dataset['vocab_size']:,}, "
        f"{dataset['stored_bytes'] / 1e6:.1f} MB stored"
    )
    for delay_ms, found in report["delays"].items():
        print(f"answers {delay_ms} ms late, state {found['state_bytes']} bytes:")
        for name in ("start", "resume"):
            times, read = sorted(found["milliseconds"][name]), found["read_bytes"][name]
            print(
                f"  {name:<7} first batch after {statistics.median(times):6.1f} ms "
                f"({times[0]:.1f} to {times[-1]:.1f}), "
                f"{min(read) / 1e6:.2f} to {max(read) / 1e6:.2f} MB read"
            )
        print(f"  resume takes {found['resume_minus_start_ms']:+.1f} ms more than a start")


if __name__ == "__main__":
    raise SystemExit(main())
