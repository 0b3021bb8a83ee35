"""What a process says to its libraries: seen from outside, in a process of its own."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from scalellm import process
from scalellm.process import ENVIRONMENT, keep_freed_memory, map_large_blocks, set_environment

_FREED = """
import resource
import torch
from scalellm.process import keep_freed_memory, map_large_blocks
{said}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(64 << 20, dtype=torch.uint8).fill_(0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(12)][-1])  # the heap has found its shape
"""


class _Knot:
    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("freezing", [False, True])
def test_cycles_wait_until_they_are_asked_for(freezing: bool) -> None:
    assert gc.isenabled()
    with process.collecting_when_told(freezing=freezing):
        knot = weakref.ref(_Knot())
        kept: list[list[int]] = [[] for _ in range(10 * gc.get_threshold()[0])]
        assert knot() is not None
        gc.collect()
        assert knot() is None
        assert (gc.get_freeze_count() > 0) == freezing
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    del kept


def test_cycles_come_as_ever_after_a_failure() -> None:
    with pytest.raises(KeyError), process.collecting_when_told(freezing=True):
        raise KeyError
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    set_environment()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == "ERROR"


_ANEW = """
import os, sys
import scalellm.process as process
process._has_gpu = lambda: False
print("began", os.getpid(), sys.argv[1:], flush=True)
{before}
process.begin_anew()
process.begin_anew()
with open("/proc/self/environ") as file:
    print("tcache_count=0" in file.read(), repr(os.environ.get("GLIBC_TUNABLES", "")))
"""
_PLAIN = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "SCALELLM_BEGUN_ANEW")}
_LOOP_S = 60

with_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's")


@with_glibc
@pytest.mark.parametrize(
    ("set_before", "times", "is_without", "left"),
    [
        (None, 2, True, ""),
        ("glibc.malloc.perturb=1", 2, True, "glibc.malloc.perturb=1"),
        ("glibc.malloc.tcache_count=3", 1, False, "glibc.malloc.tcache_count=3"),
        ("glibc.malloc.tcache_count=0", 1, True, "glibc.malloc.tcache_count=0"),
    ],
)
def test_a_process_begins_anew_once_without_a_cache_of_its_threads(
    tmp_path: Path, set_before: str | None, times: int, is_without: bool, left: str
) -> None:
    (tmp_path / "script.py").write_text(_ANEW.format(before=""))
    environment = _PLAIN if set_before is None else _PLAIN | {"GLIBC_TUNABLES": set_before}
    words = [sys.executable, "-u", "script.py", "a word"]
    *began, last = lines_of(words, tmp_path, environment)
    assert len(began) == times
    assert len(set(began)) == 1  # the same process, the same words
    assert "['a word']" in began[0]
    assert last == f"{is_without} {left!r}"


@with_glibc
@pytest.mark.parametrize(
    ("words", "before", "times"),
    [
        (["script.py"], "", 2),
        (["-m", "script", "train"], "", 2),
        (["-c", "TEXT"], "", 1),
        (["-"], "", 1),
        (["/dev/stdin"], "", 1),
        (["-m", "cProfile", "script.py"], "", 1),
        (["-m", "pdb", "-c", "continue", "-c", "quit", "script.py"], "sys.settrace(None)", 1),
        (["outer.py", "script.py"], "", 1),
        (["script.py"], "sys.argv = ['scalellm', 'train']", 1),
        (["script.py"], "os.chdir('/')", 1),
        (["script.py"], "sys.executable = ''", 1),
        (["script.py"], "sys.settrace(lambda *_: None)", 1),
        # As where the system takes the setting from a program that may do more than its user.
        (["script.py"], "process.NO_THREAD_CACHE = 'glibc.malloc.perturb=0'", 2),
    ],
)
def test_it_begins_only_what_its_own_words_would_start_again(
    tmp_path: Path, words: list[str], before: str, times: int
) -> None:
    text = _ANEW.format(before=before)
    (tmp_path / "script.py").write_text(text)
    (tmp_path / "outer.py").write_text(
        "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    )
    words = [text if word == "TEXT" else word for word in words]
    lines = lines_of([sys.executable, *words], tmp_path, _PLAIN, typed=text)
    began = [line for line in lines if line.startswith("began")]
    ended = [line for line in lines if line.startswith(("True", "False"))]
    assert (len(began), len(ended)) == (times, 1)


@with_glibc
def test_a_forked_child_goes_on(tmp_path: Path) -> None:
    forked = "import multiprocessing\n" + _ANEW.format(before="").replace(
        "process.begin_anew()\nprocess.begin_anew()",
        "child = multiprocessing.get_context('fork').Process(target=process.begin_anew)\n"
        "child.start(); child.join(); print(child.exitcode)",
    )
    (tmp_path / "script.py").write_text(forked)
    lines = lines_of([sys.executable, "script.py"], tmp_path, _PLAIN)
    assert [line.split()[0] for line in lines] == ["began", "0", "False"]


@with_glibc
def test_beside_a_gpu_it_goes_on_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[list[str]] = []
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(process.os, "execve", lambda path, words, env: begun.append(words))
    monkeypatch.setattr(process, "_is_as_started", lambda: True)
    monkeypatch.setattr(process.os, "listdir", lambda path: ["null", "zero"])
    process.begin_anew()
    assert begun == [[sys.executable, *sys.orig_argv[1:]]]
    for devices in (["null", "nvidia0", "nvidiactl"], ["kfd"]):
        monkeypatch.setattr(process.os, "listdir", lambda path, names=devices: names)
        process.begin_anew()
    assert len(begun) == 1


def lines_of(
    words: list[str], folder: Path, environment: dict[str, str], typed: str = ""
) -> list[str]:
    done = subprocess.run(
        words,
        cwd=folder,
        env=environment | {"PYTHONPATH": str(Path(process.__file__).parent.parent)},
        input=typed,
        capture_output=True,
        text=True,
        check=True,
        timeout=_LOOP_S,
    )
    return done.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_used_again_unless_the_user_says_otherwise() -> None:
    assert _faults("keep_freed_memory()") < 100
    # 32 MiB: above it glibc maps, and gives back at once.
    limits = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(32 << 20)}
    assert _faults("keep_freed_memory()", **limits) > 10_000


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_large_blocks_come_anew_where_they_are_mapped_unless_the_user_says_otherwise() -> None:
    told = "keep_freed_memory(); map_large_blocks()"
    assert _faults(told) > 10_000
    assert _faults(told, MALLOC_MMAP_THRESHOLD_=str(128 << 20)) < 100


def _faults(said: str, **environment: str) -> int:
    """Of one block of 64 MiB, which are 16,384 pages of 4 KiB."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "THP_"))}
    done = subprocess.run(
        [sys.executable, "-c", _FREED.format(said=said)],
        env=plain | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_only_a_process_that_keeps_what_it_frees_maps_large_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Alone, the setting would leave the rest to limits that the library no longer raises."""
    monkeypatch.setattr(process, "_keeps", False)
    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: pytest.fail("asked for"))
    map_large_blocks()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's")
def test_the_stock_is_laid_in_once_and_only_where_freed_memory_is_kept() -> None:
    """What lies in it is free; `mallinfo` tells how much of the heap is."""
    code = """
import ctypes
from scalellm import process
libc = ctypes.CDLL(None)
libc.mallinfo.restype = type("Counts", (ctypes.Structure,), {"_fields_": [
    (str(n), ctypes.c_int) for n in range(10)]})
def free_blocks():
    process.stock_small_blocks()
    return getattr(libc.mallinfo(), "1")
print(free_blocks())
process.keep_freed_memory()
print(free_blocks(), free_blocks(), sum(process._STOCK.values()))
"""
    run = [sys.executable, "-c", code]
    none, *several = map(int, subprocess.check_output(run, text=True).split())
    once, again, stocked = several
    assert once - none > 0.9 * stocked
    assert abs(again - once) < 0.1 * stocked


_TRIM, _MAP = -1, -3  # mallopt(3)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize(
    ("limit", "environment", "kept"),
    [
        (1 << 40, {}, {_MAP: 1 << 30, _TRIM: 1 << 30}),
        (32 << 20, {}, {_MAP: 32 << 20, _TRIM: 1 << 30}),  # an older glibc
        (0, {}, {}),  # alone, the second one would have every block of 128 KiB mapped anew
        (1 << 40, {"MALLOC_TRIM_THRESHOLD_": "9"}, {_MAP: 1 << 30}),
        (1 << 40, {"MALLOC_MMAP_THRESHOLD_": "9"}, {_TRIM: 1 << 30}),
        (1 << 40, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=9"}, {_TRIM: 1 << 30}),
    ],
)
def test_what_this_c_library_takes(
    monkeypatch: pytest.MonkeyPatch, limit: int, environment: dict[str, str], kept: dict[int, int]
) -> None:
    found: dict[int, int] = {}

    class Library:
        def mallopt(self, parameter: int, value: int) -> int:
            if parameter == _MAP and value > limit:
                return 0
            found[parameter] = value
            return 1

    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: Library())
    monkeypatch.setattr(process, "_keeps", False)  # puts back what it was, too
    keep_freed_memory()
    assert found == kept


_LEAVING = """
import atexit, concurrent.futures, sys, threading, time
from scalellm.process import leave
if sys.argv[2] == "rank":
    import torch.distributed
class Torn:
    def __del__(self):
        print("torn down")
torn = Torn()
atexit.register(print, "at exit")
pool = concurrent.futures.ThreadPoolExecutor()
pool.submit(print, "a pool's work").result()  # its thread waits for more, as Inductor's do
threading.Thread(target=lambda: (time.sleep(0.2), print("a thread's work"))).start()
leave(int(sys.argv[1]))
"""


@pytest.mark.parametrize("kind", ["rank", "other"])
def test_a_rank_leaves_without_python_taking_itself_down(kind: str) -> None:
    """What a program asked for at its end is done all the same."""
    done = subprocess.run(
        [sys.executable, "-c", _LEAVING, "3", kind],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    wanted = ["a pool's work", "a thread's work", "at exit"] + ["torn down"] * (kind == "other")
    assert (done.returncode, done.stdout.splitlines()) == (3, wanted)


def test_a_reader_that_left_a_rank_is_no_error() -> None:
    code = "import time; import torch.distributed; from scalellm.process import leave; print(1); "
    reader, writer = os.pipe()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}time.sleep(0.5); leave(0)"], env=environment, stdout=writer
    )
    os.close(writer)
    os.close(reader)
    assert process.wait() == 0
