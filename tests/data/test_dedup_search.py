"""The search for duplicates: what it finds, what it leaves alone, and in how much memory."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from scalellm.data.dedup import Deduplicator, DedupOptions, Duplicates, Fingerprints, fingerprints
from scalellm.errors import ConfigError, DataError

SMALL = 2**24


def search(
    folder: Path, found: Fingerprints, options: DedupOptions | None = None, batch: int = 1000
) -> Duplicates:
    deduplicator = Deduplicator(folder, options or DedupOptions())
    for start in range(0, len(found), batch):
        stop = start + batch
        deduplicator.add(
            Fingerprints(
                found.exact_N16[start:stop],
                found.signatures_NK[start:stop],
                found.is_short_N[start:stop],
            )
        )
    return deduplicator.find()


def find(folder: Path, texts: list[str], **options: float | bool) -> Duplicates:
    chosen = DedupOptions(**options)
    return search(folder, fingerprints(texts, chosen), chosen)


def page(rng: random.Random, count: int = 200) -> list[str]:
    return [f"w{rng.randrange(20_000)}" for _ in range(count)]


def replaced(rng: random.Random, text: list[str], start: int, count: int) -> list[str]:
    """With `count` neighbouring words changed: count + 4 of the len - 4 5-grams are lost."""
    return [*text[:start], *page(rng, count), *text[start + count :]]


def made_up(signatures_NK: np.ndarray) -> Fingerprints:
    num_documents = len(signatures_NK)
    digests = np.random.default_rng(0).integers(0, 256, (num_documents, 16), np.uint8)
    return Fingerprints(digests, signatures_NK, np.zeros(num_documents, bool))


@pytest.fixture(scope="module")
def planted() -> tuple[list[str], dict[int, int]]:
    """4000 documents and the numbers of those to remove with the document that stays.

    Of every 20, one is exact again, one at Jaccard 0.8 (174 / 218 shingles), one at 0.5 stays.
    """
    rng = random.Random(1)
    texts = [" ".join(page(rng)) for _ in range(4000)]
    remove = {}
    for first in range(0, 4000, 20):
        text = texts[first].split()
        texts[first + 3] = "  " + texts[first].replace(" ", "\n")
        texts[first + 7] = " ".join(replaced(rng, text, rng.randrange(10, 150), 18))
        texts[first + 11] = " ".join(replaced(rng, text, rng.randrange(10, 100), 61))
        remove |= {first + 3: first, first + 7: first}
    return texts, remove


def test_planted_duplicates_are_found_and_nothing_else(
    tmp_path: Path, planted: tuple[list[str], dict[int, int]]
) -> None:
    texts, remove = planted
    found = find(tmp_path, texts)
    right = [n for n in np.flatnonzero(found.removed_N) if remove.get(n) == found.duplicate_of_N[n]]
    assert found.exact == 200
    assert found.near == found.removed_N.sum() - 200
    assert len(right) >= 0.98 * found.removed_N.sum()
    assert len(right) >= 200 + 0.95 * 200
    stays = np.flatnonzero(~found.removed_N)
    assert (found.duplicate_of_N[stays] == stays).all()


def test_each_search_can_be_switched_off(
    tmp_path: Path, planted: tuple[list[str], dict[int, int]]
) -> None:
    texts, _ = planted
    only_exact = find(tmp_path, texts, near=False)
    assert (only_exact.exact, only_exact.near, only_exact.candidates) == (200, 0, 0)
    only_near = find(tmp_path, texts, exact=False)
    assert only_near.exact == 0
    assert (only_near.duplicate_of_N == find(tmp_path, texts).duplicate_of_N).all()
    nothing = find(tmp_path, texts, exact=False, near=False)
    assert not nothing.removed_N.any()


def test_the_batches_and_the_memory_do_not_matter(
    tmp_path: Path, planted: tuple[list[str], dict[int, int]]
) -> None:
    texts, _ = planted
    found = fingerprints(texts, DedupOptions())
    wanted = search(tmp_path, found)
    for batch, memory_bytes in ((1, 2**30), (777, SMALL), (4000, SMALL)):
        options = DedupOptions(memory_bytes=memory_bytes)
        again = search(tmp_path, found, options, batch)
        assert (again.duplicate_of_N == wanted.duplicate_of_N).all()
        assert again.candidates == wanted.candidates
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "digests.bin",
        "short.bin",
        "signatures.bin",
    ]


def test_a_chain_keeps_its_first_document(tmp_path: Path) -> None:
    rng = random.Random(2)
    chain = [page(rng, 300)]
    for step in range(1, 8):
        chain.append(replaced(rng, chain[-1], step * 30, 12))
    texts = [" ".join(page(rng)), *(" ".join(text) for text in chain), " ".join(page(rng))]
    found = find(tmp_path, texts)
    # The ends share less than half of their shingles; neighbours share 0.9.
    assert found.duplicate_of_N.tolist() == [0, *[1] * 8, 9]
    ends = find(tmp_path, [texts[1], texts[8]])
    assert not ends.removed_N.any()
    reverse = find(tmp_path, texts[::-1])
    assert reverse.duplicate_of_N.tolist() == [0, *[1] * 8, 9]


def test_short_documents_are_removed_when_they_are_equal_only(tmp_path: Path) -> None:
    texts = [
        "a b c d e f g h",
        "a b c d e f g h",
        "a b c d e f g h i",
        "",
        " ",
        "我们",
        "我们",
        "!",
    ]
    found = find(tmp_path, texts)
    assert found.duplicate_of_N.tolist() == [0, 0, 2, 3, 3, 5, 5, 7]


def test_chinese_and_long_documents(tmp_path: Path) -> None:
    rng = random.Random(3)
    chinese = "".join(chr(0x4E00 + rng.randrange(3000)) for _ in range(400))
    long = " ".join(page(rng, 1_700_000))
    assert len(long) > 10_000_000
    texts = [chinese, long, chinese[:200] + "错" + chinese[200:], long + " more", "short"]
    found = find(tmp_path, texts)
    assert found.duplicate_of_N.tolist() == [0, 1, 0, 1, 4]


def test_nothing_and_one(tmp_path: Path) -> None:
    assert find(tmp_path, []).removed_N.tolist() == []
    assert find(tmp_path, ["alone"]).removed_N.tolist() == [False]


def test_a_huge_bucket_costs_no_square(tmp_path: Path) -> None:
    """60,000 variants of a page, each unlike the page in a place of its own: one bucket a band."""
    rng = np.random.default_rng(4)
    num_documents, num_hashes = 60_000, 32
    signatures = np.tile(rng.integers(0, 2**32, num_hashes, np.uint32), (num_documents, 1))
    signatures[np.arange(num_documents), rng.integers(0, 32, num_documents)] += 1
    options = DedupOptions(num_hashes=num_hashes, memory_bytes=SMALL)
    found = search(tmp_path, made_up(signatures), options, 10_000)
    assert found.near == num_documents - 1
    assert set(found.duplicate_of_N.tolist()) == {0}
    assert found.candidates <= 2 * num_documents * options.num_bands
    assert found.peak_bytes <= SMALL


def test_a_huge_bucket_of_many_kinds_is_compared_with_its_first_ones(tmp_path: Path) -> None:
    """One shared band, 100 kinds: the first 16 kinds are known by it, for the others it says no."""
    rng = np.random.default_rng(5)
    kinds = rng.integers(0, 2**32, (100, 128), np.uint32)
    signatures = np.repeat(kinds, 30, axis=0)
    signatures[:, :6] = 7
    options = DedupOptions()
    found = search(tmp_path, made_up(signatures), options)
    # Equal signatures meet in the other bands, where each kind has a bucket for itself.
    assert (found.duplicate_of_N == np.repeat(np.arange(100) * 30, 30)).all()
    assert found.candidates <= 16 * 3000 + 3000 * options.num_bands


@pytest.mark.parametrize("kind", ["random", "near"])
def test_the_memory_cap_holds(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(6)
    num_documents, num_hashes = 100_000, 32
    signatures = rng.integers(0, 2**32, (num_documents, num_hashes), np.uint32)
    if kind == "near":
        signatures[1::2] = signatures[::2]
        signatures[1::2, :3] += 1
    made = made_up(signatures)
    peaks, answers = [], []
    for memory_bytes in (SMALL, 2**30):
        options = DedupOptions(num_hashes=num_hashes, memory_bytes=memory_bytes)
        deduplicator = Deduplicator(tmp_path, options)
        deduplicator.add(made)
        tracemalloc.start()
        answers.append(deduplicator.find())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert peaks[-1] <= answers[-1].peak_bytes <= memory_bytes
    assert (answers[0].duplicate_of_N == answers[1].duplicate_of_N).all()
    assert answers[0].near == (num_documents // 2 if kind == "near" else 0)
    # The cap binds: with room, the same search takes more.
    assert peaks[1] > 2 * peaks[0]


def test_too_little_memory_is_said(tmp_path: Path) -> None:
    options = DedupOptions(near=False, memory_bytes=SMALL)
    deduplicator = Deduplicator(tmp_path, options)
    num_documents = 500_000
    digests = np.zeros((num_documents, 16), np.uint8)
    nothing = np.zeros((num_documents, 0), np.uint32)
    deduplicator.add(Fingerprints(digests, nothing, np.ones(num_documents, bool)))
    with pytest.raises(ConfigError, match=r"memory_bytes=16777216 bytes .* 20194304 bytes"):
        deduplicator.find()


@pytest.mark.parametrize("name", ["digests.bin", "signatures.bin", "short.bin"])
def test_a_torn_file_is_refused(tmp_path: Path, name: str) -> None:
    deduplicator = Deduplicator(tmp_path, DedupOptions())
    deduplicator.add(fingerprints(["some words " * 20, "other words " * 20], DedupOptions()))
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{name} has .* bytes, not"):
        deduplicator.find()


def test_what_a_killed_process_left_is_not_believed(tmp_path: Path) -> None:
    killed = Deduplicator(tmp_path, DedupOptions())
    killed.add(fingerprints(["some words " * 20] * 3, DedupOptions()))
    (tmp_path / "bucket-0.bin").write_bytes(b"\0" * 33)
    (tmp_path / "bucket-17.bin.low").write_bytes(b"\0" * 16)
    found = find(tmp_path, ["some words " * 20, "new words " * 20])
    assert found.duplicate_of_N.tolist() == [0, 1]
    assert not list(tmp_path.glob("bucket-*"))


def test_fingerprints_of_other_options_are_refused(tmp_path: Path) -> None:
    deduplicator = Deduplicator(tmp_path, DedupOptions(num_hashes=64))
    with pytest.raises(ValueError, match="other options"):
        deduplicator.add(fingerprints(["x"], DedupOptions()))


def test_random_signatures_give_the_components_of_all_pairs(tmp_path: Path) -> None:
    """Against brute force: with a low threshold, bands miss next to nothing."""
    rng = np.random.default_rng(7)
    signatures = rng.integers(0, 2**32, (40, 64), np.uint32)
    signatures = signatures[rng.integers(0, 40, 600)]
    noise = rng.random(signatures.shape) < rng.random((600, 1)) * 0.25
    signatures[noise] = rng.integers(0, 2**32, noise.sum(), np.uint32)
    options = DedupOptions(num_hashes=64, threshold=0.7)
    first = np.arange(600)
    alike = (signatures[:, None] == signatures[None]).sum(2) >= 45
    for _ in range(600):
        lowest = np.where(alike, first[None], 600).min(1)
        if (lowest == first).all():
            break
        first = lowest
    found = search(tmp_path, made_up(signatures), options)
    assert (found.duplicate_of_N == first).mean() > 0.99
    # What was joined is joined by matching pairs only.
    assert (first[found.duplicate_of_N] == first).all()
