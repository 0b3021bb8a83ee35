"""One virtual environment for each group of peers, with the versions pyproject.toml pins.

The extra `peers` in pyproject.toml is the only place with versions; torch and numpy come from
constraints.txt, the same for all. The peers do not install together (litgpt wants an older
huggingface_hub than transformers), so nobody installs that extra as a whole.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from scalellm.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
_CONSTRAINTS = REPOSITORY / "constraints.txt"
_READY = "installed.txt"

# Environment -> the packages its workers import beside torch and numpy. hf-trainer and accelerate
# need exactly the same ones, so they share theirs.
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "hf": ("transformers", "accelerate"),
    "litgpt": ("litgpt", "lightning"),
    "litdata": ("litdata", "zstd"),
}


class InstallError(Exception):
    """A peer that pip could not install; the message is pip's own last line."""


def pins(name: str) -> list[str]:
    """Returns requirements such as `litgpt==0.5.13` of an environment, torch and numpy first.

    Raises:
        UserError: a version is missing from the extra `peers` or from constraints.txt.
    """
    known = {_package(line): line for line in _CONSTRAINTS.read_text().split() if "==" in line}
    known |= {_package(line): line for line in _extra("peers")}
    wanted = ("torch", "numpy", *ENVIRONMENTS[name])
    missing = [package for package in wanted if package not in known]
    if missing:
        raise UserError(
            f"{missing[0]} has no version: add it to the extra `peers` in pyproject.toml"
        )
    return [known[package] for package in wanted]


def _extra(name: str) -> list[str]:
    """Reads one extra; a list of strings is written alike in TOML and Python (tomllib is 3.11+)."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf"^{name} = (\[[^\]]*\])", text, re.MULTILINE)
    if found is None:
        raise UserError(f"pyproject.toml has no extra named {name}")
    requirements: list[str] = ast.literal_eval(found.group(1))
    return requirements


def _package(requirement: str) -> str:
    return requirement.partition("==")[0]


def python_of(folder: Path, name: str) -> Path:
    """Returns the interpreter of environment `name` below `folder`, which it makes if need be.

    An environment whose pins have changed is made anew. Extra words for pip are taken from
    PIP_FLAGS, as the Makefile does.

    Raises:
        InstallError: pip failed.
        UserError: no versions.
    """
    home, wanted = folder / name, "\n".join(pins(name)) + "\n"
    python, ready = home / "bin" / "python", home / _READY
    if ready.is_file() and ready.read_text() == wanted:
        return python
    print(f"installing {', '.join(pins(name))} into {home} ...", file=sys.stderr, flush=True)
    _call(sys.executable, "-m", "venv", "--clear", str(home))
    flags = shlex.split(os.environ.get("PIP_FLAGS", ""))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *flags]
    # torch first, as in the Makefile: another package may pull in the largest build of it. The
    # rest of constraints.txt is ours, and not what a peer may need.
    for requirements in (pins(name)[:2], pins(name)):
        _call(*pip, *requirements)
    ready.write_text(wanted)
    return python


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        errors = [line for line in lines if line.startswith("ERROR")]
        raise InstallError(f"pip failed: {(errors or lines)[-1]}")
