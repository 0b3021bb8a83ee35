"""Processes of `prepare`: ordered, bounded, ended by signals and with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scalellm.data.pool import call_in_process, ordered_map, sigterm_as_interrupt
from scalellm.data.prepare import PrepareOptions, prepare
from scalellm.data.reader import TokenDataset
from scalellm.errors import DataError, UserError

LIBRARY = Path(os.__file__).parent


@pytest.fixture(scope="module")
def code() -> str:
    """Real Python text, about 250 kB."""
    names = ("abc", "argparse", "ast", "heapq", "inspect")
    return "".join((LIBRARY / f"{name}.py").read_text(encoding="utf-8") for name in names)


SCRIPT = """
import sys
from pathlib import Path
from scalellm.data.prepare import PrepareOptions, prepare
if __name__ == "__main__":
    options = PrepareOptions((sys.argv[1],), Path(sys.argv[2]), tokenizer=sys.argv[3],
                             vocab_size=512, num_workers=2)
    prepare(options, progress=False)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory, code: str) -> Path:
    """60 MB of text: seconds of work."""
    path = tmp_path_factory.mktemp("big") / "big.txt"
    with path.open("w", encoding="utf-8") as file:
        for number in range(60_000_000 // len(code)):
            file.write(code.replace("self", f"self{number}"))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, code: str) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.txt"
    path.write_text(code, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, small: Path) -> Path:
    out = tmp_path_factory.mktemp("model") / "dataset"
    prepare(PrepareOptions((str(small),), out, vocab_size=512, num_workers=1), progress=False)
    return out / "tokenizer.model"


def nothing_left(folder: Path) -> bool:
    return not [path for path in folder.iterdir() if path.name.startswith("out")]


def start(source: Path, out: Path, tokenizer: str) -> subprocess.Popen[bytes]:
    script = out.parent / "script.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), str(source), str(out), tokenizer],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def members(session: int) -> list[int]:
    """Processes of a session that are not yet gone."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def writing(out: Path) -> bool:
    return any(out.parent.glob(f"{out.name}.tmp-*/train/*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_while_encoding_leaves_no_dataset_and_no_process(
    big: Path, model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = start(big, tmp_path / "out", str(model))
    wait_until(lambda: writing(tmp_path / "out") and len(members(process.pid)) >= 3)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    wait_until(lambda: not members(process.pid))
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError):
        TokenDataset.open(tmp_path / "out")
    if number != signal.SIGKILL:
        assert nothing_left(tmp_path)


def test_after_a_kill_the_same_command_works(
    big: Path, small: Path, model: Path, tmp_path: Path
) -> None:
    process = start(big, tmp_path / "out", str(model))
    wait_until(lambda: writing(tmp_path / "out"))
    process.kill()
    process.communicate(timeout=60)
    assert not nothing_left(tmp_path)
    options = PrepareOptions((str(small),), tmp_path / "out", tokenizer=str(model))
    prepare(options, progress=False)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


def test_a_signal_while_training_the_tokenizer_is_obeyed_at_once(big: Path, tmp_path: Path) -> None:
    process = start(big, tmp_path / "out", "unigram")
    # The process of its own for the training, beside the main one and its resource tracker.
    wait_until(lambda: len(members(process.pid)) >= 2)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode != 0
    wait_until(lambda: not members(process.pid), 10)
    assert nothing_left(tmp_path)


def _double(number: int) -> int:
    return 2 * number


def _nothing() -> None:
    pass


def _die(number: int) -> int:
    if number == 3:
        os._exit(1)
    return number


def _fail(number: int) -> int:
    if number == 3:
        raise UserError(f"number {number} is wrong")
    return number


def test_the_map_is_ordered_and_bounded() -> None:
    taken = 0

    def numbers() -> Iterator[int]:
        nonlocal taken
        for number in range(40):
            taken = number
            yield number

    for count, result in enumerate(ordered_map(_double, numbers(), 2, _nothing)):
        assert result == 2 * count
        assert taken - count <= 5


def test_a_dead_worker_is_an_error_not_a_hang() -> None:
    with pytest.raises(UserError, match=r"a worker process died, .*--workers 1"):
        list(ordered_map(_die, range(10), 2, _nothing))
    with pytest.raises(UserError, match="the process that trains the tokenizer died"):
        call_in_process(_die, 3)


def test_errors_of_workers_arrive() -> None:
    with pytest.raises(UserError, match="number 3 is wrong"):
        list(ordered_map(_fail, range(10), 2, _nothing))
    with pytest.raises(UserError, match="number 3 is wrong"):
        call_in_process(_fail, 3)
    assert call_in_process(_double, 4) == 8


def test_sigterm_interrupts_and_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == before
    # In another thread signals cannot be caught, and preparing works without.
    failures: list[BaseException] = []

    def enter() -> None:
        try:
            with sigterm_as_interrupt():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not failures
