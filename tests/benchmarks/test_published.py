"""`scalellm bench published`: the data, who is calibrated on whom, what is said of a miss."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from scalellm.model import count_parameters
from scalellm.plan._ranks import batches_of
from scalellm.plan.devices import Efficiency

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    sys.modules.pop("published", None)
    import published

    yield published
    sys.modules.pop("published", None)


def test_every_row_can_be_and_names_a_source(bench: Any) -> None:
    rows = bench.read_rows()
    assert len({row.id for row in rows}) == len(rows) > 30
    data = bench.read_yaml(bench.DATA)
    for row in rows:
        assert row.values["source"] in data["sources"]
        batches_of(row.config, row.world_size)
        row.device.matrix_rate(row.config.train.precision)
        assert {"tokens_per_s", "memory_gib", "verdict"} & set(row.values)


def test_models_have_as_many_parameters_as_their_authors_say(bench: Any) -> None:
    # Learned positions grow with the tokens of a row: the authors counted the shortest.
    longest_first = sorted(bench.read_rows(), key=lambda row: -row.values["seq_len"])
    by_model = {row.values["model"]: row.config.model for row in longest_first}
    published = {  # llm-foundry's own column; Llama's papers
        "mpt-1b": 1_315_950_592,
        "mpt-3b": 2_651_837_440,
        "mpt-7b": 6_658_859_008,
        "mpt-13b": 12_853_954_560,
        "mpt-30b": 29_975_214_080,
        "mpt-70b": 64_862_437_376,
        "llama3-8b": 8_030_261_248,
        "llama2-7b": 6_738_415_616,
        "llama2-13b": 13_015_864_320,
        "llama2-70b": 68_976_648_192,
        "llama3-70b": 70_553_706_496,
    }
    for name, parameters in published.items():
        assert count_parameters(by_model[name]) == pytest.approx(parameters, rel=1e-3), name


def test_no_row_is_calibrated_on_its_own_family(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = bench.read_rows()
    families = {row.id: row.values["family"] for row in rows}
    kinds = {row.id: row.kind for row in rows}
    seen: list[list[str]] = []

    def fake_fit(runs: Any, prior: Efficiency) -> Efficiency:
        seen.append([run.label for run in runs])
        return prior

    monkeypatch.setattr(bench, "fit", fake_fit)
    for name in ("8b-8", "8b-8-compile", "70b-64-a100", "13b-offload"):
        row = next(row for row in rows if row.id == name)
        bench.predict_speed(row, rows)
        assert seen[-1]
        for other in seen[-1]:
            assert families[other] != families[name] and kinds[other] == kinds[name]
    assert seen[0] == ["8b-128", "8b-128-compile", "70b-256-2d-compile"]


@pytest.mark.slow
def test_torchtitan_s_8b_on_eight_h100(bench: Any) -> None:
    """Memory from the config alone within 10%, throughput from other rows within 20%."""
    rows = bench.read_rows()
    for row in rows[:2]:
        memory, speed = bench.predict_memory(row), bench.predict_speed(row, rows)
        assert memory["memory_ratio"] == pytest.approx(1, abs=bench.MEMORY_BOUND)
        assert speed["speed_ratio"] == pytest.approx(1, abs=bench.SPEED_BOUND)


def test_a_miss_is_said(bench: Any) -> None:
    good = {"id": "a", "source": "s", "predicted_bytes": 95 << 30, "memory_gib": 100.0}
    good |= {"memory": "reserved", "memory_ratio": 0.95}
    bad = {"id": "b", "source": "s", "predicted_bytes": 1 << 30, "verdict": "oom"}
    bad |= {"predicted_verdict": "fits", "predicted_tokens_per_s": 130.0, "tokens_per_s": 100}
    bad |= {"speed_ratio": 1.3}
    text = bench.markdown({"rows": [good, bad], **bench.summary([good, bad])})
    assert "| a | s | 95.0 | 100.0 reserved | 0.950 |" in text
    assert "**MISS** predicted: fits" in text and "**MISS** 1.300" in text
    assert "speed: 0 of 1 rows within 20%" in text
    assert "fits or does not: 0 of 1 as published" in text


def test_an_unknown_row_is_told_the_nearest(bench: Any) -> None:
    with pytest.raises(bench.UserError, match="did you mean '8b-128'"):
        bench.main(["--only", "8b-12"])
