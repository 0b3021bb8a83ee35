"""Duplicates across runs: two runs find what one over both would, and repeat themselves."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scalellm.data.dedup import Deduplicator, DedupOptions, Duplicates, fingerprints
from scalellm.errors import DataError


def corpus(seed: int, count: int = 300) -> list[str]:
    """Documents of which some recur in corpora of other seeds, exact and nearly."""
    rng, shared = random.Random(seed), random.Random(0)
    texts = [" ".join(f"w{rng.randrange(9999)}" for _ in range(120)) for _ in range(count)]
    common = [[f"w{shared.randrange(9999)}" for _ in range(120)] for _ in range(count // 3)]
    for number, text in enumerate(common):
        place = rng.randrange(count)
        kept = text if number % 2 else [*text[:50], f"x{seed}", *text[50:]]
        texts[place] = " ".join(kept)
    return texts


def run(tmp_path: Path, texts: list[str], key: str, *, keep: bool = True) -> Duplicates:
    options = DedupOptions(index=tmp_path / "index")
    deduplicator = Deduplicator(tmp_path / f"work-{key}", options, run_key=key)
    deduplicator.add(fingerprints(texts, options))
    found = deduplicator.find()
    if keep:
        deduplicator.keep()
    return found


def test_runs_one_after_another_find_what_one_run_finds(tmp_path: Path) -> None:
    corpora = [corpus(seed) for seed in (1, 2, 3)]
    options = DedupOptions()
    whole = Deduplicator(tmp_path / "whole", options)
    whole.add(fingerprints([text for texts in corpora for text in texts], options))
    wanted = whole.find()
    start = 0
    for number, texts in enumerate(corpora):
        found = run(tmp_path, texts, f"run {number}")
        part = slice(start, start + len(texts))
        assert (found.removed_N == wanted.removed_N[part]).all()
        # Earlier documents count -1, -2, ... from the first one of the first run.
        first = wanted.duplicate_of_N[part]
        assert (found.duplicate_of_N == np.where(first < start, -1 - first, first - start)).all()
        assert found.removed_N.sum() == found.exact + found.near
        assert (found.duplicate_of_N < 0).any() == (number > 0)
        start += len(texts)


def test_the_same_run_again_sees_what_it_saw_before(tmp_path: Path) -> None:
    first, second = corpus(1), corpus(2)
    found = [run(tmp_path, first, "a"), run(tmp_path, second, "b")]
    assert found[1].exact > 0
    assert found[1].near > 0
    again = [run(tmp_path, first, "a"), run(tmp_path, second, "b")]
    for before, after in zip(found, again, strict=True):
        assert (before.duplicate_of_N == after.duplicate_of_N).all()
    assert len(list((tmp_path / "index").iterdir())) == 2
    # Under another name the same texts are new texts, and all there already.
    assert run(tmp_path, second, "c", keep=False).removed_N.all()


def test_without_keep_the_index_stays_as_it_was(tmp_path: Path) -> None:
    run(tmp_path, corpus(1), "a", keep=False)
    assert not (tmp_path / "index").exists()
    with pytest.raises(ValueError, match="run_key"):
        Deduplicator(tmp_path / "work", DedupOptions(index=tmp_path / "index"))


def test_runs_at_the_same_time_do_not_see_each_other(tmp_path: Path) -> None:
    options = DedupOptions(index=tmp_path / "index")
    texts = corpus(1)
    both = [Deduplicator(tmp_path / key, options, run_key=key) for key in "ab"]
    for one in both:
        one.add(fingerprints(texts, options))
        one.keep()
        assert (one.find().duplicate_of_N >= 0).all()
    assert len(list((tmp_path / "index").iterdir())) == 2
    later = Deduplicator(tmp_path / "c", options, run_key="c")
    later.add(fingerprints(texts, options))
    assert later.find().removed_N.all()


@pytest.mark.parametrize("name", ["digests.bin", "signatures.bin", "short.bin", "run.json"])
@pytest.mark.parametrize("damage", ["torn", "flipped", "missing"])
def test_a_damaged_run_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    run(tmp_path, corpus(1, 30), "a")
    (folder,) = (tmp_path / "index").iterdir()
    data = bytearray((folder / name).read_bytes())
    (folder / name).unlink()
    if damage == "torn":
        (folder / name).write_bytes(data[:-2])
    elif damage == "flipped":
        data[len(data) // 2] ^= 0x80
        (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=r"run-000001-\w+ is damaged .*; remove"):
        run(tmp_path, corpus(2, 30), "b")


@pytest.mark.parametrize("changed", [{"ngram": 4}, {"num_hashes": 64}])
def test_a_run_of_other_options_is_refused(tmp_path: Path, changed: dict[str, int]) -> None:
    run(tmp_path, corpus(1, 30), "a")
    (name,) = changed
    with pytest.raises(DataError, match=f"other options \\({name}="):
        Deduplicator(tmp_path / "b", DedupOptions(index=tmp_path / "index", **changed), run_key="b")
    # The exact search needs no signatures, so it can use any run.
    options = DedupOptions(index=tmp_path / "index", near=False, **changed)
    exact = Deduplicator(tmp_path / "b", options, run_key="b")
    exact.add(fingerprints(corpus(1, 30), options))
    assert exact.find().exact == 30
    exact.keep()
    with pytest.raises(DataError, match=r"near=False there, True now"):
        run(tmp_path, corpus(1, 30), "c")


def test_an_index_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index").write_text("x")
    with pytest.raises(DataError, match="is no folder"):
        run(tmp_path, corpus(1, 30), "a")


def test_an_empty_run_can_be_kept(tmp_path: Path) -> None:
    run(tmp_path, [], "empty")
    assert not run(tmp_path, corpus(1, 30), "a").removed_N.all()


_KEEPER = """
import os, signal, sys
from pathlib import Path
from scalellm.data import staging
from scalellm.data.dedup import DedupOptions, Deduplicator, fingerprints
root, texts = Path(sys.argv[1]), ["some words here " * 20, "other words there " * 20]
real, left = os.open, int(sys.argv[2])
def counted(*args, **kwargs):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
options = DedupOptions(index=root / "index")
deduplicator = Deduplicator(root / "work", options, run_key="killed")
deduplicator.add(fingerprints(texts, options))
staging.os.open = counted
deduplicator.keep()
"""


def test_a_run_killed_while_it_is_kept_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    seen = set()
    for opens in range(12):
        root = tmp_path / str(opens)
        command = [sys.executable, "-c", _KEEPER, str(root), str(opens)]
        ended = subprocess.run(command, check=False, timeout=60, env=os.environ)
        options = DedupOptions(index=root / "index")
        after = Deduplicator(root / "after", options, run_key="after")
        after.add(fingerprints(["some words here " * 20], options))
        removed = bool(after.find().removed_N[0])
        seen.add((ended.returncode, removed))
        if ended.returncode == 0:
            assert removed
            break
    # Killed before the rename: not there. Killed after it, or not at all: there.
    assert (-signal.SIGKILL, False) in seen
    assert (0, True) in seen
