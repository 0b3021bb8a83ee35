"""`cluster.*`: what cannot be, how many ranks train, and where relative paths lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scalellm.clusters.ray import usable_ranks, with_absolute_paths
from scalellm.config import parse_config
from scalellm.errors import ConfigError

Values = dict[str, Any]
HOW_MANY = "ray needs to know how many ranks: either cluster.workers=2 (or {min: 1, max: 4})"


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        ({"name": "slurm"}, "cluster.name='slurm' is none of local or ray"),
        ({"workers": 2}, "workers needs cluster.name=ray beside it"),
        ({"name": "ray"}, HOW_MANY),
        ({"name": "ray", "workers": 2, "nodes": 2}, "workers and nodes both say how many ranks"),
        ({"name": "ray", "workers": 2, "workers_per_node": 3}, "needs cluster.nodes beside it"),
        (
            {"name": "ray", "workers": 2, "resources_per_worker": {"memory": -1}},
            "resources_per_worker.memory=-1 must be 0 or more",
        ),
    ],
)
def test_a_cluster_that_is_not_described(cluster: Values, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"cluster": cluster}, source="my.yaml")
    assert str(caught.value).startswith("my.yaml: cluster") and words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("workers", 0, ".min=0 ranks is out of range: it must be at least 1"),
        ("workers", {"min": 3, "max": 2}, ": min=3 ranks is above max=2; lower it"),
        ("workers", {"min": 2}, "is no number of ranks; say 2, or {min: 1, max: 4}"),
        ("workers", {}, ": {} is no number of ranks"),
        ("workers", "two", ": 'two' is no number of ranks"),
        ("workers", 2.5, ": 2.5 is no number of ranks"),
        ("workers", [1, 2], ": [1, 2] is no number of ranks"),
        ("workers", True, "workers takes no true or false"),
        ("workers", {"min": True, "max": 2}, "min takes no true or false"),
        ("workers", {"max": "x"}, ".max='x' is not a whole number"),
        ("workers", {"mn": 2}, ".mn; did you mean 'min'?"),
        ("workers", {"max": 2**16 + 1}, "65537 ranks is out of range: it must be at most 65536"),
        ("nodes", 0, "=0 nodes is out of range: it must be at least 1"),
        ("workers_per_node", 0, "=0 ranks is out of range"),
        ("cpus_per_worker", 0, "=0 CPUs is out of range: it must be more than 0"),
        ("cpus_per_worker", float("inf"), "=inf CPUs"),
        ("gpus_per_worker", -1, "=-1 GPUs is out of range: it must be at least 0"),
        ("resources_per_worker", {"memory": "x"}, ".memory='x' is not a number"),
        ("resources_per_worker", 3, "is a section of keys"),
        ("placement", "pakc", "='pakc' is none of pack or spread; did you mean 'pack'?"),
        ("max_failures", -2, "=-2 failures is out of range: it must be at least -1"),
        ("wait_for_nodes_s", 0, "=0 s is out of range: it must be more than 0"),
        ("resize_every_s", 0, "=0 s is out of range: it must be at least 0.1"),
        ("max_failure", 1, "unknown key cluster.max_failure; did you mean 'max_failures'?"),
    ],
)
def test_a_wrong_value_is_one_sentence(key: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"cluster": {"name": "ray", "workers": 1, key: value}})
    assert f"cluster.{key}" in str(caught.value) or "takes no true" in words
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cluster", "bounds"),
    [
        ({"workers": 3}, (3, 3)),
        ({"workers": {"max": 3}}, (1, 3)),
        ({"workers": {"min": 2, "max": 4}}, (2, 4)),
        ({"nodes": 3}, (3, 3)),
        ({"nodes": 3, "workers_per_node": 2}, (6, 6)),
    ],
)
def test_how_many_ranks_there_are(cluster: Values, bounds: tuple[int, int]) -> None:
    found = parse_config({"cluster": {"name": "ray", **cluster}}).cluster
    assert (found.ranks.min, found.ranks.max) == bounds
    assert found.is_elastic == (bounds[0] < bounds[1])


def test_one_word_takes_a_config_for_ray_back_to_local() -> None:
    assert parse_config({"cluster": {"name": "local", "workers": 9}}).cluster.name == "local"


def config_of(cluster: Values, strategy: str = "ddp", batch: int = 8) -> Any:
    return parse_config(
        {
            "model": {"preset": "char-tiny"},
            "strategy": {"name": strategy},
            "train": {"global_batch_size": batch},
            "cluster": {"name": "ray", **cluster},
        }
    )


@pytest.mark.parametrize(
    ("low", "high", "batch", "usable"),
    [
        (1, 1, 8, [1]),
        (4, 4, 8, [4]),
        (1, 9, 8, [1, 2, 2, 4, 4, 4, 4, 8, 8]),
        (2, 7, 6, [2, 3, 3, 3, 6, 6]),
        (1, 3, 7, [1, 1, 1]),
    ],
)
def test_the_most_ranks_that_divide_the_batch(
    low: int, high: int, batch: int, usable: list[int]
) -> None:
    found = usable_ranks(config_of({"workers": {"min": low, "max": high}}, batch=batch))
    assert found == dict(zip(range(low, high + 1), usable, strict=True))


@pytest.mark.parametrize("workers", [3, {"min": 3, "max": 4}])
def test_the_fewest_ranks_must_be_able_to_train(workers: object) -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch_size=8"):
        usable_ranks(config_of({"workers": workers}))


def test_a_strategy_of_one_process_leaves_the_others_idle() -> None:
    assert usable_ranks(config_of({"workers": {"max": 3}}, "single")) == {1: 1, 2: 1, 3: 1}
    with pytest.raises(ConfigError):
        usable_ranks(config_of({"workers": 2}, "single"))


@pytest.mark.parametrize(
    ("storage", "root"), [(None, "{cwd}"), ("/shared", "/shared"), ("here", "{cwd}/here")]
)
def test_relative_paths_lie_in_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str | None, root: str
) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"cluster": {"name": "ray", "workers": 1, "storage_path": storage}}
    config = parse_config(values | {"run": {"dir": "runs/a"}, "data": {"path": "data"}})
    found = with_absolute_paths(config)
    whole = Path(root.format(cwd=tmp_path))
    assert (found.run.dir, found.data.path) == (whole / "runs/a", whole / "data")
    config = parse_config(values | {"run": {"dir": "/r/a"}, "data": {"path": "/d"}})
    found = with_absolute_paths(config)
    assert (found.run.dir, found.data.path) == (Path("/r/a"), Path("/d"))
