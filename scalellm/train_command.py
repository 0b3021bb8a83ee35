"""`scalellm train`: what its options mean, who starts the ranks, what is said in the end."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from scalellm.commands import Parser, generate_text
from scalellm.errors import (
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_STOPPED_BY_SIGNAL,
    UserError,
    is_out_of_memory,
)
from scalellm.process import keep_freed_memory

if TYPE_CHECKING:
    from scalellm.config import Config
    from scalellm.dist import World

_LINGER_S = 30.0
_HINTS = (
    "lower train.micro_batch_size (accumulation makes up for it), model.seq_len or the model's "
    "size, or set train.activation_checkpointing=full"
)


def _parse_train(argv: Sequence[str]) -> argparse.Namespace:
    wants_help = any(word in ("-h", "--help") for word in argv)
    parser = Parser(
        "train",
        "Train a decoder as a config says.",
        importlib.import_module("scalellm.reference").help_text() if wants_help else None,
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | key.sub=value")
    parser.add_argument("--config", help="the config file, if not the first word")
    parser.add_argument("--nproc", type=int, help="start so many ranks on this machine")
    parser.add_argument("--resume", metavar="auto|DIR", help="go on from a checkpoint")
    parser.add_argument(
        "--print-deepspeed-config",
        action="store_true",
        help="print the JSON that DeepSpeed would be given, and train nothing",
    )
    parser.add_argument(
        "--profile", action="store_true", help="record a few steps: profile.enabled=true"
    )
    # The deepspeed launcher appends this; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(argv)
    if options.resume == "":
        raise UserError("--resume takes auto or the path of a checkpoint or run folder")
    words: list[str] = options.words
    if options.config is None:
        if not words or "=" in words[0]:
            raise UserError("train needs a config: scalellm train configs/char-tiny.yaml")
        options.config = words.pop(0)
    if options.profile:
        words.append("profile.enabled=true")
    return options


def train(argv: Sequence[str]) -> int:
    """Runs `scalellm train`."""
    options = _parse_train(argv)
    words: list[str] = options.words

    from scalellm.config import load_config
    from scalellm.dist import detect

    config = load_config(options.config, words)
    started = detect()
    if options.print_deepspeed_config:
        from scalellm.reference import backend_json

        world = replace(started, world_size=options.nproc or started.world_size)
        print(backend_json(config, world), end="")
        return EXIT_DONE
    if options.nproc is not None and config.cluster.name == "ray":
        raise UserError(
            f"--nproc {options.nproc} starts ranks on this machine, but cluster.name=ray lets Ray "
            "start them: set cluster.workers instead, or cluster.name=local"
        )
    if options.nproc is not None and started.launcher in ("python", "sbatch"):
        resume = ["--resume", options.resume] if options.resume else []
        words = ["train", "--config", options.config, *resume, *words]
        return _start_ranks(config, words, options.nproc)
    if options.nproc not in (None, started.world_size):
        raise UserError(
            f"--nproc {options.nproc} would start ranks, but {started.launcher} has started "
            f"{started.world_size} already; leave --nproc out"
        )
    if config.cluster.name == "ray" and started.launcher != "ray":
        return _start_on_ray(config, options.resume, started, argv)
    from scalellm.plan.forecast import BackgroundForecast

    keep_freed_memory()
    failure = ""
    with closing(BackgroundForecast(config, started)) as forecast:
        from scalellm.train import run_training

        try:
            outcome = run_training(config, options.resume, forecast)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            failure = str(error).partition("\n")[0] or "Python's own memory"
    if failure:  # not in the handler: what it holds of the run must be free before
        return _explain_out_of_memory(config, started, failure)
    if outcome.is_main:
        _close(outcome.run_dir, outcome.reason, outcome.step)
        if config.eval.sample_prompt is not None and not outcome.stopped_by_signal:
            _show_sample(outcome.run_dir, config.eval.sample_prompt, config.eval.sample_tokens)
    return EXIT_STOPPED_BY_SIGNAL if outcome.stopped_by_signal else EXIT_DONE


def _explain_out_of_memory(config: Config, world: World, failure: str) -> int:
    """Rank 0 says where memory went and what helps; the others that they had too little, too.

    They stay until it has spoken: launchers end all ranks soon after one has left.
    """
    where = f" on rank {world.rank}" if world.world_size > 1 else ""
    print(f"scalellm: out of memory{where} ({failure}); {_HINTS}", file=sys.stderr, flush=True)
    if not world.is_main:
        time.sleep(_LINGER_S)
        return EXIT_FAILURE
    from scalellm.plan.advice import explain

    found = explain(config, world)
    if found:
        print(found, file=sys.stderr, flush=True)
    return EXIT_FAILURE


def _start_ranks(config: Config, words: list[str], nproc: int) -> int:
    from scalellm.clusters.local import MAX_RANKS, launch
    from scalellm.dist import World
    from scalellm.train import check_config

    if not 1 <= nproc <= MAX_RANKS:
        raise UserError(f"--nproc={nproc} ranks is not between 1 and {MAX_RANKS}")
    # Before processes start that would all say the same.
    check_config(config, World(world_size=nproc, launcher=f"--nproc {nproc}"))
    return launch(words, nproc)


def _start_on_ray(config: Config, resume: str | None, started: World, argv: Sequence[str]) -> int:
    if started.launcher != "python":
        raise UserError(
            f"cluster.name=ray starts the ranks itself, but {started.launcher} has started "
            f"{started.world_size} already: start it with python, or set cluster.name=local"
        )
    from scalellm.clusters._ray_guard import guard, is_driver

    if not is_driver():
        return guard(argv, config.cluster)
    from scalellm.clusters.ray import train_on_ray

    return train_on_ray(config, resume)


def _close(run_dir: Path, reason: str, step: int) -> None:
    from scalellm.report import draw_loss

    picture = draw_loss(run_dir)
    if reason not in ("done", "early stop"):
        print(f"stopped by {reason} at step {step}, saved; go on with --resume auto")
        return
    print(f"{reason} at step {step}: {run_dir}" + (f", loss curve {picture}" if picture else ""))


def _show_sample(run_dir: Path, prompt: str, num_tokens: int) -> None:
    from scalellm.generate import Sampling

    if not any(run_dir.glob("tokenizer.*")):
        print("note: no sample, since the dataset has no tokenizer to write it with")
        return
    text = generate_text(run_dir, prompt, Sampling(max_new_tokens=num_tokens, seed=0))
    (run_dir / "sample.txt").write_text(text + "\n", encoding="utf-8")
