"""Other trainers and loaders beside ours: same shape, same batch, same ids, in turn.

    scalellm bench peers [--parts train,data] [--shape 6x384x256x8192] [--batch 8] [--rounds 10]
                         [--steps 10] [--precisions fp32,bf16] [--only NAME,...] [--json FILE]

Each contestant is a process of its own environment (made under --environments when first needed,
versions from the extra `peers`). All are started and warmed, compiling included; then they take
turns of a few steps, in the order A B C, C B A, and whoever has no turn is stopped. All train on
the same ids in the same order with the same AdamW and as many threads; those with a Llama's shape
start from the same weights. A step is timed from the beginning of one to the beginning of the next.
The peak of matrix products is measured in the same rounds.

A contestant is called PEER-PRECISION or PEER-PRECISION-compile. All run as they ship and at their
best; --only takes any other combination too. One that cannot be installed or fails is a row with
its reason. Each holds 0.5 to 1.5 GB while it waits.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _gemm import measure
from _peer_data import measure_loaders
from _peer_environments import REPOSITORY, InstallError, python_of
from _peer_process import PeerError, PeerProcess
from _peer_report import loaders_table, summarize, table

from scalellm.commands import Parser
from scalellm.config import ModelConfig, TrainConfig
from scalellm.cores import available_cores
from scalellm.data.pool import sigterm_as_interrupt
from scalellm.dist import World
from scalellm.errors import UserError, did_you_mean
from scalellm.model import cpu_multiplies_bf16
from scalellm.process import ENVIRONMENT, NO_THREAD_CACHE
from scalellm.train.folder import describe_environment

WORKERS = Path(__file__).resolve().parent / "peer_workers"
PRECISIONS = ("fp32", "bf16")
NO_BF16 = "slow on this CPU: no native bf16"
_GEMM_S = 1.0
_BUILT = ("model", "contestants")


@dataclass(frozen=True)
class Peer:
    """One trainer. To add one: a row in PEERS and a worker file.

    Attributes:
        environment: of `_peer_environments`; None: the Python that runs this.
        worker: file in peer_workers/, without `.py`.
        ships: the variant that it runs if told nothing.
        variants: what is run without --only; `best` is compiled, in the last of --precisions.
        settings: environment variables; a peer has none of those that our own command sets.
    """

    environment: str | None
    worker: str
    ships: str = "fp32"
    variants: tuple[str, ...] = ("fp32", "bf16", "best")
    options: dict[str, Any] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)


_OURS = ENVIRONMENT | {"GLIBC_TUNABLES": NO_THREAD_CACHE}
_ONE_GRAPH: dict[str, Any] = {
    "ships": "",
    "variants": ("best",),
    "options": {"compile_scope": "model"},
    "settings": _OURS,
}
PEERS = {
    "plain": Peer("plain", "plain_loop"),
    "plain-fused": Peer("plain", "plain_loop", "", ("best",), {"fused": True}),
    # What is left if another loop learns of huge pages, which gain ours nothing.
    "plain-huge": Peer(
        "plain",
        "plain_loop",
        "",
        ("best",),
        {"fused": True},
        settings={"THP_MEM_ALLOC_ENABLE": "1"},
    ),
    "hf-trainer": Peer("hf", "hf_trainer"),
    "accelerate": Peer("hf", "accelerate_loop"),
    "litgpt": Peer("litgpt", "litgpt_fabric", "bf16-compile"),
    "litgpt-true": Peer("litgpt", "litgpt_fabric", "", ("bf16-compile",), {"true": True}),
    "scalellm-bare": Peer(None, "scalellm_bare", "", settings=_OURS),
    "scalellm": Peer(None, "scalellm_trainer", settings=_OURS),
    "scalellm-bare-model": Peer(None, "scalellm_bare", **_ONE_GRAPH),
    "scalellm-model": Peer(None, "scalellm_trainer", **_ONE_GRAPH),
}


@dataclass
class Contestant:
    """A peer in one variant, and what became of it."""

    name: str
    peer: Peer
    precision: str
    compiled: bool
    process: PeerProcess | None = None
    status: str = "ok"
    reason: str | None = None
    ready: dict[str, Any] = field(default_factory=dict)
    start_s: float = 0.0
    warm: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, Any] | None] = field(default_factory=list)

    @property
    def variant(self) -> str:
        return self.precision + ("-compile" if self.compiled else "")

    def fail(self, reason: object, status: str = "failed") -> None:
        print(f"{self.name}: {reason}", file=sys.stderr, flush=True)
        self.status, self.reason = status, str(reason)
        self.end()

    def end(self) -> None:
        if self.process is not None:
            self.process.end()
        self.process = None


def main(argv: list[str] | None = None) -> int:
    """Measures, prints Markdown; returns 0 also if some could not run: they are rows then."""
    args = _parse(argv)
    report: dict[str, Any] = {
        "config": {key: str(value) for key, value in vars(args).items() if key not in _BUILT},
        "environment": describe_environment(World()),
    }
    # SIGTERM too leaves neither data nor checkpoints.
    temporary = tempfile.TemporaryDirectory(prefix="scalellm-peers-", dir=args.dir)
    with sigterm_as_interrupt(), temporary as folder:
        if "train" in args.parts:
            report |= _compare_trainers(args, Path(folder))
            print(table(report))
        if "data" in args.parts:
            report["loaders"] = measure_loaders(args, Path(folder), WORKERS)
            print(loaders_table(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("bench peers", (__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default="train,data", help="train, data or both")
    parser.add_argument("--shape", default="6x384x256x8192", help="layers x width x T x vocabulary")
    parser.add_argument("--batch", type=int, default=8, help="samples a step")
    parser.add_argument("--rounds", type=int, default=10, help="measured turns of each")
    parser.add_argument("--steps", type=int, default=10, help="steps of a turn")
    parser.add_argument("--warmup", type=int, default=20, help="steps before the first round")
    parser.add_argument("--threads", type=int, default=available_cores(), help="of each")
    parser.add_argument("--precisions", default="fp32,bf16", help="of fp32, bf16")
    parser.add_argument(
        "--skip-slow-bf16", action="store_true", help="no bf16 on a CPU without bf16 products"
    )
    parser.add_argument("--only", metavar="NAME,...", help="contestants, such as plain-fp32")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="constant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=50, help="steps, of scalellm")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="of the loaders' pass")
    parser.add_argument("--limit-s", type=float, default=1800.0, help="longest turn")
    parser.add_argument("--environments", type=Path, default=REPOSITORY / ".peers", metavar="DIR")
    parser.add_argument("--dir", type=Path, help="where to put data and checkpoints meanwhile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    args = parser.parse_args(argv)
    args.parts = _words("--parts", args.parts, ("train", "data"))
    args.precisions = _words("--precisions", args.precisions, PRECISIONS)
    args.model = _model(args.shape)
    args.contestants = contestants(args)
    for name in ("batch", "rounds", "steps", "warmup", "threads", "tokens", "checkpoint_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}={getattr(args, name)} must be 1 or more")
    if args.limit_s <= 0:
        raise UserError(f"--limit-s={args.limit_s:g} s must be above 0 s")
    if args.dir is not None and not args.dir.is_dir():
        raise UserError(f"--dir={args.dir} is no folder; create it, or leave --dir out")
    return args


def _words(option: str, text: str, known: Sequence[str]) -> list[str]:
    words = text.split(",")
    for word in words:
        if word not in known:
            near = did_you_mean(word, known)
            raise UserError(f"{option}: {word!r} is none of {', '.join(known)}{near}")
    return words


def _model(shape: str) -> ModelConfig:
    try:
        layers, width, seq_len, vocab_size = map(int, shape.split("x"))
    except ValueError:
        raise UserError(
            f"--shape={shape} is not layers x width x T x vocabulary, such as 6x384x256x8192"
        ) from None
    if min(layers, seq_len) < 1 or width < 64 or width % 64 or vocab_size < 300:
        raise UserError(
            f"--shape={shape}: the width must be a multiple of 64 (heads of 64 features), the "
            "vocabulary 300 tokens or more"
        )
    return ModelConfig(
        num_layers=layers,
        hidden_size=width,
        num_heads=width // 64,
        vocab_size=vocab_size,
        seq_len=seq_len,
    )


def contestants(args: argparse.Namespace) -> list[Contestant]:
    """Returns those asked for, in the order of PEERS; those to be skipped are marked.

    Raises:
        UserError: a name in --only that is no peer in a variant.
    """
    variants = [f"{p}{c}" for p in PRECISIONS for c in ("", "-compile")]
    known = {f"{name}-{variant}": (name, variant) for name in PEERS for variant in variants}
    best = f"{args.precisions[-1]}-compile"
    wanted = [
        f"{name}-{best if variant == 'best' else variant}"
        for name, peer in PEERS.items()
        for variant in peer.variants
        if variant == "best" or variant.partition("-")[0] in args.precisions
    ]
    if args.only is not None:
        wanted = _words("--only", args.only, tuple(known))
    found = []
    for full_name in dict.fromkeys(wanted):
        name, variant = known[full_name]
        precision, _, compiled = variant.partition("-")
        one = Contestant(full_name, PEERS[name], precision, bool(compiled))
        if precision == "bf16" and args.skip_slow_bf16 and not cpu_multiplies_bf16():
            one.status, one.reason = "skipped", NO_BF16
        found.append(one)
    return found


def _compare_trainers(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from _peer_files import write_files

    write_files(args, folder)
    precisions = list(dict.fromkeys(one.precision for one in args.contestants))
    gemm: dict[str, list[float]] = {precision: [] for precision in precisions}
    try:
        for one in args.contestants:
            if one.status == "ok":
                _start(one, args, folder)
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds} ...", file=sys.stderr, flush=True)
            for precision, flops_per_s in gemm.items():
                flops_per_s.append(measure(precision, args.threads, 1, _GEMM_S, "cpu"))
            for one in args.contestants if number % 2 == 0 else reversed(args.contestants):
                one.turns.append(_take_turn(one, args.steps))
    finally:
        for one in args.contestants:
            one.end()
    return summarize(args, gemm)


def _start(one: Contestant, args: argparse.Namespace, folder: Path) -> None:
    """Makes the environment, starts the worker, lets it take its first steps."""
    peer, train = one.peer, TrainConfig(learning_rate=args.learning_rate)
    task = {
        **{name: getattr(args.model, name) for name in ("num_layers", "hidden_size", "num_heads")},
        **{name: getattr(args.model, name) for name in ("mlp_size", "seq_len", "vocab_size")},
        **{name: getattr(train, name) for name in ("learning_rate", "beta1", "beta2", "eps")},
        **{name: getattr(train, name) for name in ("weight_decay", "grad_clip")},
        **{name: getattr(args, name) for name in ("batch", "seed", "threads")},
        "precision": one.precision,
        "compile": one.compiled,
        "options": {"checkpoint_every": args.checkpoint_every, **peer.options},
        "folder": str(folder),
        "data": str(folder / "data"),
    }
    file = folder / f"{one.name}.json"
    file.write_text(json.dumps(task))
    try:
        python = Path(sys.executable)
        if peer.environment is not None:
            python = python_of(args.environments, peer.environment)
        print(f"{one.name}: starting, {args.warmup} steps ...", file=sys.stderr, flush=True)
        command = [str(python), str(WORKERS / f"{peer.worker}.py"), str(file)]
        log = file.with_suffix(".log")
        one.process = PeerProcess(
            command, log, threads=args.threads, limit_s=args.limit_s, settings=peer.settings
        )
        one.ready, one.start_s = one.process.ready, one.process.start_s
        one.warm = one.process.turn(args.warmup)
    except (InstallError, PeerError) as error:
        one.fail(error)


def _take_turn(one: Contestant, steps: int) -> dict[str, Any] | None:
    if one.process is None:
        return None
    try:
        return one.process.turn(steps)
    except PeerError as error:
        one.fail(error)
        return None


if __name__ == "__main__":
    sys.exit(main())
