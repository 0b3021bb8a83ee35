"""The combinations that `parallel` refuses, each with the sentence of the code that refuses it.

    scalellm bench refusals [--markdown FILE]

Nothing is started or allocated: every config here is refused before that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalellm.config import parse_config
from scalellm.dist import World
from scalellm.errors import ConfigError
from scalellm.train.build import check_config

MODEL = {"num_layers": 4, "hidden_size": 96, "num_heads": 6, "num_kv_heads": 2, "vocab_size": 8192}
BASE = {"model": {**MODEL, "seq_len": 128}, "train": {"global_batch_size": 16}}

# Ranks, and what is written in the config.
CASES: list[tuple[int, dict[str, Any]]] = [
    (4, {"strategy.mesh.tp": 3}),
    (4, {"strategy.mesh.dp": 4, "strategy.mesh.tp": 2}),
    (4, {"strategy.mesh.tp": 4}),
    (2, {"strategy.mesh.tp": 2, "model.seq_len": 127}),
    (2, {"strategy.mesh.tp": 2, "model.loss_chunk_tokens": 1024}),
    (4, {"strategy.mesh.cp": 4, "model.seq_len": 132}),
    (4, {"strategy.mesh.cp": 4, "strategy.context": "ulysses"}),
    (4, {"strategy.mesh.cp": 2, "strategy.mesh.tp": 2, "strategy.context": "ulysses"}),
    (8, {"strategy.mesh.pp": 8, "train.micro_batch_size": 1}),
    (4, {"strategy.mesh.pp": 4, "strategy.schedule": "interleaved", "train.micro_batch_size": 1}),
    (4, {"strategy.mesh.pp": 4, "strategy.schedule": "zero_bubble", "train.micro_batch_size": 1}),
    (2, {"strategy.mesh.pp": 2}),
    (2, {"strategy.mesh.pp": 2, "strategy.schedule": "interleaved", "train.global_batch_size": 3,
         "train.micro_batch_size": 1}),
    (2, {"strategy.mesh.pp": 2, "strategy.stages_per_rank": 2, "train.micro_batch_size": 1}),
    (2, {"strategy.mesh.pp": 2, "train.compile": True, "train.compile_scope": "model",
         "train.micro_batch_size": 1}),
    (2, {"strategy.mesh.tp": 2, "strategy.schedule": "zero_bubble"}),
    (2, {"strategy.mesh.tp": 2, "strategy.context": "ulysses"}),
    (2, {"strategy.mesh.tp": 2, "strategy.param_dtype": "bf16"}),
    (2, {"strategy.mesh.fsdp": 2, "strategy.param_dtype": "bf16", "train.precision": "fp16"}),
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns 1 if something in it is not refused."""
    parser = argparse.ArgumentParser(
        prog="scalellm bench refusals", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    rows = [(size, changes, refusal(size, changes)) for size, changes in CASES]
    text = to_markdown(rows)
    print(text)
    if args.markdown is not None:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    return 0 if all(sentence for _, _, sentence in rows) else 1


def refusal(world_size: int, changes: Mapping[str, Any]) -> str:
    """Why such a run does not begin; empty if it does."""
    values: dict[str, Any] = {name: dict(section) for name, section in BASE.items()}
    values["strategy"] = {"name": "parallel", "mesh": {}}
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = values
        for word in sections:
            section = section[word]
        section[name] = value
    try:
        check_config(parse_config(values), World(world_size=world_size, launcher="a launcher"))
    except ConfigError as error:
        return str(error)
    return ""


def to_markdown(rows: list[tuple[int, dict[str, Any], str]]) -> str:
    lines = ["| ranks | config | why not, and what works |", "|---|---|---|"]
    for size, changes, sentence in rows:
        words = ", ".join(f"`{key}={_plain(value)}`" for key, value in changes.items())
        lines.append(f"| {size} | {words} | {sentence or 'not refused'} |")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit(main())
