"""The files for Kubernetes and for `ray up`: as far as they can be checked without either."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalellm.config import Config, load_config

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCH = REPOSITORY / "launch"
IMAGE_ROOT = "/app/"  # where the image of docs/clusters.md has the repository


@pytest.fixture(scope="module")
def on_kubernetes() -> dict[str, dict[str, Any]]:
    """The objects in launch/kuberay.yaml, by kind."""
    text = (LAUNCH / "kuberay.yaml").read_text(encoding="utf-8")
    return {found["kind"]: found for found in yaml.safe_load_all(text)}


@pytest.fixture(scope="module")
def by_ssh() -> dict[str, Any]:
    text = (LAUNCH / "ray-cluster.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def pinned_ray() -> str:
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    [version] = re.findall(r"^ray==(.+)$", constraints, re.MULTILINE)
    return str(version)


def config_of(command: str) -> Config:
    """Reads the config as `python .../launch/train.py --config FILE key=value ...` would.

    Raises:
        UserError: a key or value that the config does not have.
    """
    words = shlex.split(command)
    script = next(index for index, word in enumerate(words) if word.endswith("launch/train.py"))
    files = [words[script], words[words.index("--config") + 1]]
    paths = [REPOSITORY / file.removeprefix(IMAGE_ROOT) for file in files]
    assert paths[0].is_file()
    overrides = [word for word in words[script + 1 :] if "=" in word]
    return load_config(paths[1], overrides)


def groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The head and the groups of workers of a RayJob, in this order."""
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def container_of(group: dict[str, Any]) -> dict[str, Any]:
    [container] = group["template"]["spec"]["containers"]
    return dict(container)


def test_kuberay_has_a_job_and_its_storage(on_kubernetes: dict[str, dict[str, Any]]) -> None:
    job, claim = on_kubernetes["RayJob"], on_kubernetes["PersistentVolumeClaim"]
    assert (job["apiVersion"], claim["apiVersion"]) == ("ray.io/v1", "v1")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    storage_path = str(config_of(job["spec"]["entrypoint"]).cluster.storage_path)
    for group in groups(job):
        [volume] = group["template"]["spec"]["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        [mount] = container_of(group)["volumeMounts"]
        assert (mount["name"], mount["mountPath"]) == (volume["name"], storage_path)


def test_kuberay_has_room_for_the_ranks(on_kubernetes: dict[str, dict[str, Any]]) -> None:
    job = on_kubernetes["RayJob"]
    cluster = config_of(job["spec"]["entrypoint"]).cluster
    _, workers = groups(job)
    cpus = float(container_of(workers)["resources"]["requests"]["cpu"])
    per_pod = cpus // cluster.cpus_per_worker
    assert cluster.name == "ray"
    assert workers["minReplicas"] * per_pod >= cluster.ranks.min
    assert workers["replicas"] * per_pod >= cluster.ranks.max


def test_kuberay_runs_the_pinned_ray_behind_a_token(
    on_kubernetes: dict[str, dict[str, Any]],
) -> None:
    job = on_kubernetes["RayJob"]
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == pinned_ray()
    assert cluster["authOptions"] == {"mode": "token"}
    page = (REPOSITORY / "docs" / "clusters.md").read_text(encoding="utf-8")
    assert f"FROM rayproject/ray:{pinned_ray()}-" in page
    # KubeRay refuses the one without the other.
    assert job["spec"]["shutdownAfterJobFinishes"] and job["spec"]["ttlSecondsAfterFinished"] > 0


def test_ray_up_accepts_the_cluster(by_ssh: dict[str, Any]) -> None:
    pytest.importorskip("ray")
    from ray.autoscaler._private.util import prepare_config, validate_config

    # What `ray up` does first; it ends in SystemExit or an exception of the schema.
    prepared = prepare_config(by_ssh)
    validate_config(prepared)
    [node_type] = prepared["available_node_types"].values()
    assert node_type["max_workers"] == len(by_ssh["provider"]["worker_ips"])
    misspelt = {**prepared, "start_ray_commands": []}
    with pytest.raises(Exception, match="start_ray_commands"):
        validate_config(misspelt)


def test_ray_up_asks_for_a_token_and_names_a_config(by_ssh: dict[str, Any]) -> None:
    starts = [*by_ssh["head_start_ray_commands"], *by_ssh["worker_start_ray_commands"]]
    starts = [command for command in starts if "ray start" in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert any(path.endswith("/.ray/auth_token") for path in by_ssh["file_mounts"])
    text = (LAUNCH / "ray-cluster.yaml").read_text(encoding="utf-8")
    [command] = re.findall(r"^#.*ray exec \S+ '(.+)'$", text, re.MULTILINE)
    cluster = config_of(command).cluster
    assert cluster.name == "ray" and cluster.storage_path is not None
    # One CPU each at the least: the head trains as well.
    assert cluster.ranks.max <= 1 + len(by_ssh["provider"]["worker_ips"])
