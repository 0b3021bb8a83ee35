"""One script under every launcher: who the ranks are, what is refused, and the same loss."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.slurm import fake_slurm

from scalellm import dist
from scalellm.cli import main
from scalellm.config import parse_config
from scalellm.dist import World, detect, threads_per_rank
from scalellm.errors import ConfigError
from scalellm.train import run_training
from scalellm.train.launchers import check_launcher

REPOSITORY = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
TRAIN = "launch/train.py"
TIMEOUT_S = 120
PREFIXES = ("ACCELERATE_", "SLURM_", "OMPI_", "PMI_", "MPI_", "TORCHELASTIC_", "CROSS_", "MASTER_")
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SCALELLM_LAUNCHER")

Values = dict[str, Any]

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "6",
    "LOCAL_WORLD_SIZE": "2",
}
DEEPSPEED = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "6",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "3",
    "LOCAL_SIZE": "2",
}
SLURM = {
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
}
ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
INTEL_MPI = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(PREFIXES) or name in NAMES:
            monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("python", 0, 0, 1, 1)),
        (TORCHRUN, ("torchrun", 5, 1, 6, 2)),
        (DEEPSPEED, ("deepspeed", 3, 1, 6, 2)),
        ({**TORCHRUN, **ACCELERATE}, ("accelerate", 5, 1, 6, 2)),
        ({**DEEPSPEED, **ACCELERATE}, ("accelerate", 3, 1, 6, 2)),
        (ACCELERATE, ("accelerate", 0, 0, 1, 1)),
        (SLURM, ("srun", 6, 0, 7, 1)),
        ({**SLURM, "SLURM_PROCID": "1", "SLURM_NODEID": "0"}, ("srun", 1, 0, 7, 2)),
        ({**SLURM, **TORCHRUN}, ("torchrun", 5, 1, 6, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, ("sbatch", 0, 0, 1, 1)),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, ("python", 0, 0, 1, 1)),
        (OPEN_MPI, ("mpirun", 3, 1, 4, 2)),
        (INTEL_MPI, ("mpiexec", 2, 0, 4, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ("another launcher", 1, 1, 2, 2)),
        ({**TORCHRUN, "SCALELLM_LAUNCHER": "--nproc 6"}, ("--nproc 6", 5, 1, 6, 2)),
    ],
)
def test_who_started_this_rank(
    environment: dict[str, str], expected: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(monkeypatch, environment)
    world = detect()
    found = (world.rank, world.local_rank, world.world_size, world.local_world_size)
    assert (world.launcher, *found) == expected


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK is not set: start the ranks with torchrun"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is outside WORLD_SIZE=2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one' in the environment is not a whole"),
        ({**SLURM, "SLURM_PROCID": "7"}, "SLURM_PROCID=7 is outside SLURM_STEP_NUM_TASKS=7"),
    ],
)
def test_environments_that_contradict_themselves(
    environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(monkeypatch, environment)
    with pytest.raises(ConfigError, match=words):
        detect()


@pytest.mark.parametrize("environment", [SLURM, OPEN_MPI, INTEL_MPI])
def test_ranks_that_cannot_meet(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an address each would train alone, or wait for ever."""
    set_all(monkeypatch, environment)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR .* submit launch/slurm.sh"):
        dist.ranks("cpu", 1).__enter__()


ASKED = {**TORCHRUN, **ACCELERATE}
WITH_DEEPSPEED = {**ASKED, "ACCELERATE_USE_DEEPSPEED": "true"}
STAGE_3 = {**WITH_DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
WITH_FSDP = {**ASKED, "ACCELERATE_USE_FSDP": "true"}


@pytest.mark.parametrize(
    ("environment", "strategy", "words"),
    [
        ({**ACCELERATE, "MASTER_ADDR": "127.0.0.1"}, {"name": "single"}, "--multi_gpu"),
        (WITH_DEEPSPEED, {"name": "ddp"}, "use strategy.name=accelerate strategy.backend=deepsp"),
        (WITH_DEEPSPEED, {"name": "accelerate"}, "strategy.name=accelerate strategy.backend=ddp;"),
        (WITH_FSDP, {"name": "accelerate"}, "use strategy.name=fsdp, or start it without"),
        ({**ASKED, "ACCELERATE_USE_MEGATRON_LM": "true"}, {"name": "fsdp"}, "no Megatron-LM here"),
        (STAGE_3, {"name": "deepspeed", "stage": 2}, "--zero_stage 3, but strategy.stage=2; use"),
        (
            {**ASKED, "ACCELERATE_MIXED_PRECISION": "bf16"},
            {"name": "ddp"},
            "--mixed_precision bf16, but train.precision=fp32; set both alike",
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, {"name": "ddp"}, "submit launch/slurm.sh"),
    ],
)
def test_what_launcher_and_config_disagree_on(
    environment: dict[str, str],
    strategy: Values,
    words: str,
    tiny_values: Values,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_all(monkeypatch, environment)
    config = parse_config({**tiny_values, "strategy": strategy})
    with pytest.raises(ConfigError) as error:
        check_launcher(config, detect())
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("environment", "strategy"),
    [
        ({}, {"name": "ddp"}),
        (ACCELERATE, {"name": "single"}),
        ({**ACCELERATE, "ACCELERATE_MIXED_PRECISION": "fp32"}, {"name": "single"}),
        ({**ASKED, "MASTER_ADDR": "127.0.0.1"}, {"name": "accelerate"}),
        (DEEPSPEED, {"name": "ddp"}),
        (SLURM, {"name": "fsdp"}),
        (WITH_FSDP, {"name": "fsdp"}),
        (STAGE_3, {"name": "deepspeed", "stage": 3}),
        (STAGE_3, {"name": "accelerate", "backend": "deepspeed", "stage": 3}),
    ],
)
def test_what_they_agree_on(
    environment: dict[str, str],
    strategy: Values,
    tiny_values: Values,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_all(monkeypatch, environment)
    check_launcher(parse_config({**tiny_values, "strategy": strategy}), detect())


def test_threads_are_divided_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that binds a rank to cores of its own has divided them already."""
    parent = os.getppid()

    def cores(own: int, of_parent: int) -> None:
        monkeypatch.setattr(
            os, "sched_getaffinity", lambda pid: set(range(of_parent if pid == parent else own))
        )

    world = World(rank=1, local_rank=1, world_size=4, local_world_size=2, launcher="torchrun")
    cores(8, 8)
    assert threads_per_rank(world) == 4
    assert threads_per_rank(replace(world, launcher="deepspeed")) == 4
    cores(4, 8)
    assert threads_per_rank(replace(world, launcher="deepspeed")) == 4
    assert threads_per_rank(replace(world, launcher="srun")) == 2
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    assert threads_per_rank(replace(world, launcher="srun")) == 4
    assert threads_per_rank(replace(world, local_world_size=64)) == 1


@pytest.mark.parametrize(("launcher", "sleeps"), [("torchrun", 1), ("--nproc 2", 0)])
def test_rank_0_can_speak_before_the_launcher_ends_it(
    launcher: str,
    sleeps: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """torchrun and deepspeed end all ranks when one has left: the one that says nothing waits."""
    slept: list[float] = []
    monkeypatch.setattr("scalellm.cli.time.sleep", slept.append)
    set_all(monkeypatch, {"RANK": "1", "WORLD_SIZE": "2", "SCALELLM_LAUNCHER": launcher})
    assert main(["train", "nowhere.yaml"]) == 2
    assert len(slept) == sleeps and capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "nowhere.yaml"]) == 2
    assert len(slept) == sleeps and "no config file at nowhere.yaml" in capsys.readouterr().err


def test_nproc_under_another_launcher(
    tiny_values: Values,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path, tiny_values)
    set_all(monkeypatch, {**TORCHRUN, "RANK": "0"})
    assert main(["train", config, "--nproc", "2"]) == 2
    assert "torchrun has started 6 already; leave --nproc out" in capsys.readouterr().err


# -- for real ---------------------------------------------------------------------------------


def write_config(folder: Path, values: Values) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(command: Sequence[str], extra: dict[str, str] | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, **(extra or {})}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    """Waits for all and returns what they printed; nothing is left running."""
    try:
        return [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def losses(values: Values) -> list[float]:
    text = (Path(values["run"]["dir"]) / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 7))
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def reference(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process, which every launcher and strategy must repeat."""
    from conftest import TINY

    values = {section: dict(content) for section, content in TINY.items()}
    values["data"]["path"] = str(tiny_dataset)
    values["run"] = {"dir": str(tmp_path_factory.mktemp("reference") / "run"), "threads": 1}
    run_training(parse_config(values))
    return losses(values)


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


ZERO_2 = ["strategy.name=deepspeed", "strategy.stage=2"]
SAME_LOSS = [
    pytest.param(
        ["torchrun", "--standalone", "--nproc-per-node=2"],
        ["strategy.name=fsdp"],
        "2 ranks on cpu by torchrun",
        id="torchrun",
    ),
    pytest.param(
        ["deepspeed", "--num_accelerators=2", "--master_port=PORT"],
        ZERO_2,
        "2 ranks on cpu by deepspeed",
        id="deepspeed",
        marks=needs("deepspeed"),
    ),
    pytest.param(
        ["accelerate", "launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"],
        ["strategy.name=accelerate"],
        "2 ranks on cpu by accelerate",
        id="accelerate",
        marks=needs("accelerate"),
    ),
]


def test_same_loss_under_python(
    reference: list[float],
    tiny_values: Values,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", write_config(tmp_path, tiny_values), "strategy.name=ddp"]) == 0
    assert "ddp: 1 rank on cpu by python" in capsys.readouterr().out
    assert losses(tiny_values) == pytest.approx(reference, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "strategy", "words"), SAME_LOSS)
def test_same_loss(
    launcher: list[str],
    strategy: list[str],
    words: str,
    reference: list[float],
    tiny_values: Values,
    tmp_path: Path,
) -> None:
    command = [word.replace("PORT", free_port()) for word in launcher]
    config = write_config(tmp_path, tiny_values)
    process = start([*command, TRAIN, "--config", config, *strategy])
    [output] = finish(process)
    assert process.returncode == 0 and words in output, output
    assert losses(tiny_values) == pytest.approx(reference, rel=1e-5)


@pytest.mark.slow
@needs("deepspeed")
def test_same_loss_over_a_hostfile(
    reference: list[float], tiny_values: Values, tmp_path: Path
) -> None:
    """Two hosts of one rank, both of them this one: --no_ssh never resolves their names."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("# comment\nnode-1 slots=1\nnode-2 slots=1\n")
    config, port = write_config(tmp_path, tiny_values), free_port()
    hosts = [
        start(
            [
                *("deepspeed", f"--hostfile={hostfile}", "--no_ssh", f"--node_rank={node}"),
                *("--master_addr=127.0.0.1", f"--master_port={port}"),
                *(TRAIN, "--config", config, *ZERO_2),
            ]
        )
        for node in range(2)
    ]
    outputs = finish(*hosts)
    assert [host.returncode for host in hosts] == [0, 0], outputs
    assert "2 ranks on cpu by deepspeed" in outputs[0] and "by deepspeed" not in outputs[1]
    assert losses(tiny_values) == pytest.approx(reference, rel=1e-5)


def test_the_example_hostfile_is_one() -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    assert runner.fetch_hostfile(str(REPOSITORY / "launch/hostfile.example")) == {
        "node-1": 8,
        "node-2": 8,
    }


@pytest.mark.slow
@needs("accelerate")
def test_accelerate_that_starts_one_process_for_two(tiny_values: Values, tmp_path: Path) -> None:
    """With --cpu, or a yaml for several CPU processes, it starts a single one and says nothing."""
    config = write_config(tmp_path, tiny_values)
    command = ["accelerate", "launch", "--cpu", "--num_processes=2", TRAIN, "--config", config]
    process = start(command)
    [output] = finish(process)
    assert process.returncode and "type `accelerate launch --multi_gpu" in output, output
    assert not Path(tiny_values["run"]["dir"]).exists()


# -- slurm ------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "slurm").mkdir()
    return {
        **fake_slurm(tmp_path / "slurm", REPOSITORY, [1, 1]),
        "PYTHON": sys.executable,
        "MASTER_PORT": free_port(),
    }


RANK = """#!/bin/bash
trap 'exit 3' TERM
echo "$SLURM_PROCID $MASTER_ADDR $*" > "$FAKE_SLURM/rank-$SLURM_PROCID"
[[ -n $LEAVES_WITH ]] && exit "$LEAVES_WITH"
while true; do sleep 0.05; done
"""


def start_script(slurm: dict[str, str], leaves_with: str) -> subprocess.Popen[str]:
    """Starts slurm.sh with ranks that only leave, with that code or with 3 once signalled."""
    rank = Path(slurm["FAKE_SLURM"]) / "rank"
    rank.write_text(RANK)
    rank.chmod(0o755)
    slurm |= {"PYTHON": str(rank), "LEAVES_WITH": leaves_with, "CONFIG": "c.yaml"}
    return start(["bash", "launch/slurm.sh", "train.steps=9"], slurm)


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_slurm_script_queues_nothing_again_unasked(slurm: dict[str, str], code: int) -> None:
    """A mistake would come again, a finished run has no more to do."""
    process = start_script(slurm, str(code))
    [output] = finish(process)
    assert process.returncode == code, output
    folder = Path(slurm["FAKE_SLURM"])
    assert not (folder / "requeued").exists()
    words = f"127.0.0.1 {TRAIN} --config c.yaml --resume auto train.steps=9\n"
    assert [(folder / f"rank-{rank}").read_text() for rank in range(2)] == [
        f"0 {words}",
        f"1 {words}",
    ]


@pytest.mark.parametrize(
    ("number", "requeued"), [(signal.SIGUSR1, ["requeue 4242\n"]), (signal.SIGTERM, [])]
)
def test_slurm_script_waits_for_ranks_that_save(
    slurm: dict[str, str], number: signal.Signals, requeued: list[str]
) -> None:
    """Near the end of its time it queues itself again; what was cancelled stays so."""
    process = start_script(slurm, "")
    folder = Path(slurm["FAKE_SLURM"])
    deadline_s = time.monotonic() + TIMEOUT_S
    while not (folder / "tasks").exists() or len(list(folder.glob("rank-*"))) < 2:
        assert time.monotonic() < deadline_s and process.poll() is None, finish(process)
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(number)
    if number == signal.SIGTERM:  # as slurm does: the ranks hear it from slurm itself
        time.sleep(0.3)
        assert process.poll() is None
        for pid in (folder / "tasks").read_text().split():
            os.kill(int(pid), signal.SIGTERM)
    [output] = finish(process)
    assert process.returncode == 3, output
    assert [path.read_text() for path in folder.glob("requeued")] == requeued


@pytest.mark.slow
def test_slurm_script_saves_and_goes_on(
    slurm: dict[str, str], reference: list[float], tiny_values: Values, tmp_path: Path
) -> None:
    steps = 1000
    tiny_values["train"]["steps"] = steps
    slurm["CONFIG"] = write_config(tmp_path, tiny_values)
    command = ["bash", "launch/slurm.sh", "strategy.name=ddp"]
    process = start(command, slurm)
    metrics = Path(tiny_values["run"]["dir"]) / "metrics.jsonl"
    deadline_s = time.monotonic() + TIMEOUT_S
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert time.monotonic() < deadline_s and process.poll() is None, finish(process)
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    [output] = finish(process)
    assert process.returncode == 3 and "stopped by SIGTERM" in output, output
    assert (tmp_path / "slurm/requeued").read_text() == "requeue 4242\n"

    process = start(command, slurm)
    [output] = finish(process)
    assert process.returncode == 0 and "resumed from" in output, output
    assert "ddp: 2 ranks on cpu by srun" in output
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    trained = [row["step"] for row in rows if row["kind"] == "train"]
    assert trained == list(range(1, steps + 1))
    # The schedules of 6 and of 1,000 steps warm up alike, so the first losses are the same.
    assert [row["loss"] for row in rows[:3]] == pytest.approx(reference[:3], rel=1e-5)
    assert (tmp_path / "slurm/requeued").read_text() == "requeue 4242\n"


@pytest.mark.slow
def test_torchrun_on_two_hosts_under_slurm(
    slurm: dict[str, str], reference: list[float], tiny_values: Values, tmp_path: Path
) -> None:
    """One torchrun a host, started by srun: its ranks count, not slurm's tasks."""
    slurm["CONFIG"] = write_config(tmp_path, tiny_values)
    torchrun = (
        "torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id $SLURM_JOB_ID "
        "--rdzv-endpoint 127.0.0.1:$MASTER_PORT --rdzv-conf is_host=$((SLURM_NODEID == 0)) "
        f"--local-addr 127.0.0.1 {TRAIN} --config $CONFIG strategy.name=ddp"
    )
    process = start(["srun", "bash", "-c", torchrun], slurm)
    [output] = finish(process)
    assert process.returncode == 0 and "2 ranks on cpu by torchrun" in output, output
    assert losses(tiny_values) == pytest.approx(reference, rel=1e-5)
