"""`prepare --engine ray`: the same bytes on any number of nodes, also when a worker is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scalellm import ray_session as session_module
from scalellm.data.prepare import PrepareOptions, prepare
from scalellm.errors import UserError
from scalellm.ray_session import ray_session

pytest.importorskip("ray")

LIBRARY = Path(os.__file__).parent
MARK = "SCALELLM_TEST_TOKEN"
# Small batches and windows, so that little text has many of both.
PREPARE = """
import sys
from pathlib import Path
from scalellm.data import encode_job, ray_engine
from scalellm.data.prepare import PrepareOptions, prepare
from scalellm.errors import UserError
source, out, tokenizer, address, workers, batch_chars, per_cpu = sys.argv[1:]
encode_job.BATCH_CHARS, ray_engine._BATCHES_PER_CPU = int(batch_chars), int(per_cpu)
try:
    prepare(PrepareOptions((source,), Path(out), tokenizer=tokenizer, num_workers=int(workers),
                           engine="ray", ray_address=address or None), progress=False)
except UserError as error:
    sys.exit(f"sentence: {error}")
"""
# Two nodes on this machine, until standard input ends.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
limits = dict(num_cpus=1, object_store_memory=80 << 20, include_dashboard=False)
cluster = Cluster(initialize_head=True, head_node_args=dict(node_ip_address="127.0.0.2", **limits))
cluster.add_node(node_ip_address="127.0.0.3", **limits)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""

# One session, in which the fourth batch fails in every way.
FAIL = """
import os, sys
from pathlib import Path
from scalellm.data import ray_engine
Job = ray_engine._Job
class Failing(Job):
    def __call__(self, block):
        if block["number"][0].as_py() == 3:
            if how == "dies":
                os._exit(1)
            if how == "lacks":
                import no_such_package
            if how == "bug":
                raise ZeroDivisionError
            self._key, self._suffix = "other", ".txt"
        return Job.__call__(self, block)
ray_engine._Job = Failing
with ray_engine.ray_engine("local", 2) as encode:
    for how in ("dies", "lacks", "bug", "mistake"):
        try:
            list(encode([[("train", "text")]] * 10, Path(sys.argv[1])))
        except Exception as error:
            print(how, type(error).__name__, " ".join(str(error).split()))
"""


class Marked:
    """Processes that carry a mark in their environment, as do all that they start."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.environment = os.environ | {
            MARK: self.mark,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def start(self, script: str, *arguments: object, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            env=self.environment | more,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def commands(self) -> dict[int, str]:
        """The command lines of those that live."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes():
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(folder.name)] = command.decode(errors="replace")
            except OSError:
                continue
        return found

    def encoders(self) -> dict[int, str]:
        """Ray's workers that encode: the command line of the node each belongs to."""
        commands = self.commands()
        return {
            pid: commands.get(_parent(pid), "")
            for pid, command in commands.items()
            if command.startswith("ray::Map")
        }

    def end(self) -> None:
        for pid in self.commands():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def marked() -> Iterator[Marked]:
    processes = Marked()
    yield processes
    processes.end()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2.5 MB of real Python text, each part other than the one before."""
    path = tmp_path_factory.mktemp("text") / "code.txt"
    names = ("abc", "argparse", "ast", "heapq", "inspect")
    code = "".join((LIBRARY / f"{name}.py").read_text(encoding="utf-8") for name in names)
    path.write_text("".join(code.replace("self", f"self{number}") for number in range(10)))
    return path


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The dataset of that text by the local engine, and so its tokenizer."""
    small = tmp_path_factory.mktemp("small") / "small.txt"
    small.write_text(text.read_text(encoding="utf-8")[:200_000])
    model = small.parent / "model"
    prepare(PrepareOptions((str(small),), model, vocab_size=512, num_workers=1), progress=False)
    out = small.parent / "local"
    tokenizer = str(model / "tokenizer.model")
    prepare(PrepareOptions((str(text),), out, tokenizer=tokenizer), progress=False)
    return out


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, dict[str, str], Marked]]:
    """(address, environment, processes) of a cluster of two nodes of one CPU, with a token."""
    processes = Marked()
    folder = tempfile.mkdtemp(prefix="slm-", dir="/tmp")  # short: sockets lie in it
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    process = processes.start(CLUSTER, **token, RAY_TMPDIR=folder)
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    try:
        assert address, process.stderr and process.stderr.read()
        yield address, token, processes
    finally:
        try:
            process.communicate(timeout=30)
        finally:
            processes.end()
            shutil.rmtree(folder, ignore_errors=True)


def test_a_cluster_of_our_own_gives_the_same_bytes_and_is_gone_after(
    text: Path, local: Path, tmp_path: Path, marked: Marked
) -> None:
    out, temporary = tmp_path / "out", tempfile.mkdtemp(prefix="t", dir="/tmp")
    arguments = (text, out, local / "tokenizer.model", "local", 2, 100_000, 4)
    process = marked.start(PREPARE, *arguments, TMPDIR=temporary, RAY_TMPDIR=temporary)
    _, errors = process.communicate(timeout=200)
    assert (process.returncode, errors) == (0, "")
    assert files(out) == files(local)
    wait_until(lambda: not marked.commands(), 10)
    assert os.listdir(temporary) == []
    os.rmdir(temporary)
    # Which engine made it does not matter: the dataset is found made.
    options = PrepareOptions((str(text),), out, tokenizer=str(local / "tokenizer.model"))
    assert prepare(options, progress=False).reused


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "batch_chars", "per_cpu"), [(1, 100_000, 7), (0, 524_288, 1)])
def test_the_same_bytes_on_two_nodes(
    cluster: tuple[str, dict[str, str], Marked],
    text: Path,
    local: Path,
    tmp_path: Path,
    marked: Marked,
    workers: int,
    batch_chars: int,
    per_cpu: int,
) -> None:
    address, token, _ = cluster
    arguments = (text, tmp_path / "out", local / "tokenizer.model", "", workers)
    token = token | {"RAY_ADDRESS": address}
    process = marked.start(PREPARE, *arguments, batch_chars, per_cpu, **token)
    _, errors = process.communicate(timeout=200)
    assert (process.returncode, errors) == (0, "")
    assert files(tmp_path / "out") == files(local)


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(
    cluster: tuple[str, dict[str, str], Marked],
    text: Path,
    local: Path,
    tmp_path: Path,
    marked: Marked,
) -> None:
    address, token, nodes = cluster
    # Unigram is slow enough to be met at work; the same model encodes in both.
    arguments = (text, tmp_path / "out", local / "tokenizer.model", address, 0, 5_000, 64)
    process = marked.start(PREPARE, *arguments, **token)
    seen: set[str] = set()
    killed: set[int] = set()

    def two_killed() -> bool:
        assert process.poll() is None, "too fast to be killed"
        for pid, node in nodes.encoders().items():
            address = node.partition("--node_ip_address=")[2].partition(" ")[0]
            if address and address not in seen:
                os.kill(pid, signal.SIGKILL)
                seen.add(address)
                killed.add(pid)
        return len(killed) == 2

    wait_until(two_killed, 120)
    assert seen == {"127.0.0.2", "127.0.0.3"}
    _, errors = process.communicate(timeout=200)
    assert (process.returncode, errors) == (0, "")
    assert files(tmp_path / "out") == files(local)


@pytest.mark.slow
def test_a_cluster_that_cannot_be_joined_is_one_sentence(
    cluster: tuple[str, dict[str, str], Marked], text: Path, local: Path, tmp_path: Path
) -> None:
    address, token, _ = cluster
    arguments = (text, tmp_path / "out", local / "tokenizer.model", address, 1, 100_000, 4)
    for wrong in (token | {"RAY_AUTH_TOKEN": "wrong"}, {}):
        process = Marked().start(PREPARE, *arguments, **wrong)
        _, errors = process.communicate(timeout=60)
        assert errors.startswith(f"sentence: the Ray cluster at {address} asks for its token; set")
        assert len(errors.splitlines()) == 1
        assert process.returncode == 1


@pytest.mark.slow
def test_what_fails_on_a_worker_is_told(local: Path, marked: Marked) -> None:
    output, errors = marked.start(FAIL, local / "tokenizer.model").communicate(timeout=200)
    assert errors == ""
    told = dict(line.split(" ", 1) for line in output.splitlines())
    assert told["dies"].startswith(
        "UserError workers on the Ray cluster died 6 times with the same"
    )
    assert told["lacks"].startswith(
        "UserError a node of the Ray cluster lacks a package (No module"
    )
    assert told["bug"].startswith("RayTaskError") and "ZeroDivisionError" in told["bug"]
    assert (
        told["mistake"].startswith("UserError ") and "tokenizer.txt is neither" in told["mistake"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_no_dataset_and_no_process(
    text: Path, local: Path, tmp_path: Path, marked: Marked, number: signal.Signals
) -> None:
    temporary = tempfile.mkdtemp(prefix="t", dir="/tmp")
    arguments = (text, tmp_path / "out", local / "tokenizer.model", "local", 2, 5_000, 64)
    process = marked.start(PREPARE, *arguments, TMPDIR=temporary, RAY_TMPDIR=temporary)
    wait_until(marked.encoders)
    os.killpg(process.pid, number)  # as the terminal does
    process.communicate(timeout=30)
    assert process.returncode != 0
    # Helpers of a node manager that was killed look for it for up to a minute.
    wait_until(lambda: not marked.commands(), 100 if number == signal.SIGKILL else 1)
    left = [path.name for path in tmp_path.iterdir()]
    if number != signal.SIGKILL:  # nobody is left to remove a folder
        assert left == []
        assert os.listdir(temporary) == []
    else:
        assert "out" not in left
    shutil.rmtree(temporary)


def test_mistakes_are_named_before_any_work(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(**more: Any) -> PrepareOptions:
        return PrepareOptions((str(text),), tmp_path / "out", tokenizer="char", **more)

    with pytest.raises(UserError, match=r"engine='rya' is not one of local, ray; did you mean"):
        options(engine="rya")
    with pytest.raises(UserError, match=r"ray_address='auto' has no use with engine='local'"):
        options(ray_address="auto")
    for address in ("head", "head:", "head:99999", "ray://head:10001"):
        with pytest.raises(
            UserError, match=f"{address!r} is no address of a Ray cluster; give HOS"
        ):
            prepare(options(engine="ray", ray_address=address), progress=False)
    sentence = "no Ray cluster answers at 127.0.0.1:1 within 5 s; give the HOST:PORT"
    with pytest.raises(UserError, match=sentence):
        prepare(options(engine="ray", ray_address="127.0.0.1:1"), progress=False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match=sentence):
        prepare(options(engine="ray"), progress=False)
    monkeypatch.setattr(session_module, "find_spec", lambda _: None)
    with (
        pytest.raises(UserError, match=r"Ray is not installed; .*'scalellm\[ray\]'"),
        ray_session(None),
    ):
        pass
    assert not (tmp_path / "out").exists()
