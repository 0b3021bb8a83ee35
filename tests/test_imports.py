"""Imports point one way, and heavy packages are imported only where they are needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "scalellm"

# Lower rooms know nothing of higher ones. A new room must be given its place here.
LAYERS = [
    {"__init__", "errors", "durable"},
    {"launched", "cores", "process", "products", "ray_local"},
    {"config", "dist", "ray_session"},
    {"model", "data", "metrics"},
    {"batches", "report"},
    {"strategies"},
    {"checkpoint", "evaluate", "generate"},
    {"train"},
    {"inference", "reference", "parity", "export", "plan"},
    {"clusters"},
    {"commands"},
    {"data_command", "prepare_command", "plan_command", "train_command"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

# Packages that only their own file may import, and only inside a function.
LAZY = {"matplotlib", "wandb", "tensorboard", "pyarrow", "datasets", "tokenizers"}
LAZY |= {"deepspeed", "accelerate", "ray", "transformers"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yields (module, is_top_level) for every import of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top_level = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top_level
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, id(node) in top_level
            if node.module == "scalellm":
                for alias in node.names:
                    yield f"scalellm.{alias.name}", id(node) in top_level


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_a_place() -> None:
    assert {room_of(path) for path in FILES} == set(LEVEL)


def test_imports_point_down_only() -> None:
    wrong = []
    for path in FILES:
        for module, _ in imports(path):
            parts = module.split(".")
            if parts[0] != "scalellm" or len(parts) == 1 or parts[1] not in LEVEL:
                continue
            if parts[1] != room_of(path) and LEVEL[parts[1]] >= LEVEL[room_of(path)]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert not wrong


def test_heavy_packages_are_imported_inside_functions() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for path in FILES
        for module, is_top_level in imports(path)
        if is_top_level and module.split(".")[0] in LAZY
    ]
    assert not wrong


def test_the_model_knows_nothing_of_distribution() -> None:
    for path in (PACKAGE / "model").glob("*.py"):
        assert not [module for module, _ in imports(path) if module.startswith("torch.distrib")]


def test_only_dist_reads_the_ranks() -> None:
    readers = {
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        for text in [path.read_text(encoding="utf-8")]
        if re.search(r'"(LOCAL_)?RANK"|"WORLD_SIZE"', text)
    }
    setters = {"clusters/local.py", "clusters/_ray_worker.py"}
    assert readers == {"dist.py", *setters}


def test_data_needs_no_torch() -> None:
    """`scalellm prepare` starts workers and answers in a blink: it must not import torch."""
    code = "import sys, scalellm.data, scalellm.data.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
