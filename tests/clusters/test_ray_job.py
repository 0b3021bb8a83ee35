"""`ray job submit`: our exit code and our sentence, not a page of Ray's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.hosts import Hosts, why_not
from helpers.ray_hosts import BIN, ENVIRONMENT, REPOSITORY, RayHosts

pytest.importorskip("ray")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

DASHBOARD = {"RAY_ADDRESS": "http://127.0.0.1:8265"}
_STATUS = """
import json, sys
from ray.job_submission import JobSubmissionClient
job = JobSubmissionClient("http://127.0.0.1:8265").get_job_info(sys.argv[1])
print(json.dumps([job.status, job.driver_exit_code]))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(1) as made:
        yield RayHosts(made, tmp_path_factory.mktemp("ray"), dashboard=True)


def submit(cluster: RayHosts, name: str, *words: str) -> tuple[int, str, list[Any]]:
    """Returns the exit code and the output of `ray job submit`, and what the cluster says of it."""
    ray = [str(BIN / "ray"), "job", "submit", "--submission-id", name, "--working-dir", "."]
    train = ["python", "launch/train.py", "--config", "configs/ray-ddp.yaml", *words]
    options = {"env": {**ENVIRONMENT, **DASHBOARD}, "cwd": REPOSITORY}
    done = cluster.head.run([*ray, "--", *train], timeout=300, **options)
    status = cluster.head.run([str(BIN / "python"), "-c", _STATUS, name], timeout=120, **options)
    return done.returncode, done.stdout, json.loads(status.stdout.splitlines()[-1])


def test_a_typo(cluster: RayHosts) -> None:
    code, output, status = submit(cluster, "typo", "train.stepz=3")
    assert code != 0 and status == ["FAILED", 2], output
    sentence = "configs/ray-ddp.yaml: unknown key train.stepz; did you mean 'steps'?"
    assert f"scalellm: {sentence}" in output
    assert "Traceback" not in output


def test_a_job_that_trains(cluster: RayHosts, tiny_dataset: Path, tmp_path: Path) -> None:
    """Relative paths lie in the storage that nodes share, not in the copy of the sources."""
    words = [
        *(f"cluster.storage_path={tmp_path}", "run.dir=run", f"data.path={tiny_dataset}"),
        *("cluster.workers=1", "model.preset=null", "model.vocab_size=null", "train.steps=3"),
        *("train.warmup_steps=1", "metrics.tensorboard=false"),
    ]
    code, output, status = submit(cluster, "good", *words)
    assert code == 0 and status == ["SUCCEEDED", 0], output
    assert "ddp: 1 ranks on cpu by ray" in output or "ddp: 1 rank on cpu by ray" in output
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
