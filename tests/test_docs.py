"""Every command in a ```bash block of the documents runs, in order, as it stands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    path
    for path in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    if "```bash" in path.read_text(encoding="utf-8")
]
# CI itself runs these, in a fresh clone; from inside a test they would run the tests again.
RUN_BY_CI = {"make train", "make test", "make test-all", "make lint", "make bench"}


def commands(path: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = [line.partition(" #")[0].strip() for line in lines if not line.startswith("#")]
    return [line for line in found if line and line not in RUN_BY_CI]


@pytest.fixture
def sandbox(tmp_path: Path) -> Path:
    for name in ("configs", "launch", "benchmarks", "docs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    return tmp_path


def run(command: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    environment.pop("OMP_NUM_THREADS", None)  # the tests' own
    process = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert process.returncode == 0, f"{command}\n{process.stdout}"
    return process.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)  # a page starts a dozen processes, one after the other
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_commands_run(path: Path, sandbox: Path) -> None:
    for command in commands(path):
        run(command, sandbox)
    if path.stem == "first-hour":
        _check_same_loss(sandbox)


def _check_same_loss(sandbox: Path) -> None:
    """python, torchrun with 2 ranks and --nproc 2: the same losses in fp32."""
    curves = []
    for name in ("one", "two", "three"):
        lines = (sandbox / "runs" / name / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        curves.append([row["loss"] for row in rows if row["kind"] == "train"][:60])
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target
