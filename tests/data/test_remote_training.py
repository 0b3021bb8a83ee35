"""`data.path` is a folder or a URL: the same losses, the same resume, and no secret is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import web

from scalellm.config import load_config, parse_config
from scalellm.config.location import parse_location
from scalellm.errors import ConfigError
from scalellm.train.build import run_training


def train(folder: Path, values: dict[str, Any]) -> list[float]:
    """Trains with two ranks; returns the losses of all steps."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    done = subprocess.run(
        [sys.executable, "-m", "scalellm", "train", str(config), "--nproc", "2"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return losses(Path(values["run"]["dir"]))


def losses(run_dir: Path) -> list[float]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] in ("train", "eval")]


def test_two_ranks_train_alike_from_a_url(
    tiny_values: dict[str, Any], tiny_dataset: Path, tmp_path: Path
) -> None:
    tiny_values["strategy"] = {"name": "ddp"}
    tiny_values["checkpoint"] = {"every_steps": 3, "keep": 5}
    local = train(tmp_path, tiny_values)
    with web.serve(tiny_dataset.parent) as server:
        url = f"{server.url}/data"
        tiny_values["data"] |= {"path": url, "cache_dir": str(tmp_path / "cache")}
        tiny_values["run"]["dir"] = str(tmp_path / "remote")
        assert train(tmp_path, tiny_values) == local
        assert server.methods == {"GET"}
        assert load_config(tmp_path / "remote/config.yaml").data.path == url
        # The local run goes on from the URL, here in one process: its cursor fits.
        tiny_values["run"]["dir"] = str(tmp_path / "resumed")
        tiny_values["strategy"] = {"name": "single"}
        run_training(parse_config(tiny_values), str(tmp_path / "run/checkpoints/step-00000003"))
        assert losses(tmp_path / "resumed") == pytest.approx(local[3:], rel=1e-5)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://me:hunter2@host/data", "https://host/… holds a user or a password"),
        ("https://hunter2@host/data", "holds a user or a password"),
        ("https://host/data?token=hunter2", "holds a query"),
        ("https://host/data#hunter2", "holds a query"),
        ("s3://key:hunter2@bucket/data", "AWS_PROFILE"),
        ("https:/host/data", "begins with https://, this one with https:/"),
        ("ftp://host/data", "'ftp' is no kind of URL"),
        ("htps://host/data", "did you mean 'http"),
        ("https://", "lacks a host"),
        ("https://ho st/data", "blanks"),
        ("https://host/da\nta", "blanks"),
        ("https://host:99999/data", "host or port"),
        ("hf://user/name", "hf://datasets/USER/NAME"),
        ("https://host/" + "a" * 3000, "more than 2000"),
    ],
)
def test_a_url_that_cannot_be_used_is_named_without_its_secret(url: str, words: str) -> None:
    for values in ({"path": url}, {"mix": {"web": {"path": url}}}):
        with pytest.raises(ConfigError, match=r"data\..*path: ") as error:
            parse_config({"data": values})
        text = str(error.value)
        assert words in text
        assert "hunter2" not in text
        assert "\n" not in text


@pytest.mark.parametrize(
    "url",
    [
        "https://host/data",
        "http://127.0.0.1:8000",
        "s3://bucket/a/b",
        "gs://bucket/a",
        "hf://datasets/user/name@v1/sub",
    ],
)
def test_a_url_stays_as_it_is(url: str) -> None:
    config = parse_config({"data": {"path": url + "/"}})
    assert config.data.path == url
    assert config.data.with_paths(lambda path: Path("/elsewhere") / path).path == url
    written = yaml.safe_dump(config.model_dump(mode="json"))
    assert parse_config(yaml.safe_load(written)) == config


@pytest.mark.parametrize("folder", ["data/mine", "/data/mine", "C:/data", "a:b", "s3"])
def test_a_folder_stays_a_folder(folder: str) -> None:
    assert (
        parse_location(folder) == Path(folder) == parse_config({"data": {"path": folder}}).data.path
    )


@pytest.mark.parametrize("value", [5, None, "", ["a"]])
def test_what_is_neither_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.path: .* is neither a folder nor a URL"):
        parse_config({"data": {"path": value}})
