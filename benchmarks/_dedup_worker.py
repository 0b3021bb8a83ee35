"""One contestant over a range of documents, in a process of its own; prints its figures as JSON.

    python _dedup_worker.py scalellm|datasketch|datatrove FOLDER START STOP SCRATCH

All use word 5-grams. Signature: from texts to what the search takes. CPU seconds of this process,
which has one thread; reading the texts is left out. Memory: the most resident bytes, above those at
the start with all imported.
"""

from __future__ import annotations

import json
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _dedup_corpus import NGRAM, Documents, words_of

Figures = dict[str, Any]


class Clock:
    """Sums CPU and wall seconds of what runs under it."""

    def __init__(self) -> None:
        self.cpu_s = self.wall_s = 0.0

    def __enter__(self) -> Clock:
        self._cpu_s, self._wall_s = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu_s += time.process_time() - self._cpu_s
        self.wall_s += time.perf_counter() - self._wall_s


def scalellm(batches: Iterator[list[str]], scratch: Path) -> Callable[[], Figures]:
    from scalellm.data.dedup import Deduplicator, DedupOptions, fingerprints

    options = DedupOptions(ngram=NGRAM)
    # The tables of characters are made once a process.
    fingerprints(["warm up"], options)

    def run() -> Figures:
        signature, search = Clock(), Clock()
        deduplicator = Deduplicator(scratch, options)
        for texts in batches:
            with signature:
                deduplicator.add(fingerprints(texts, options))
        with search:
            found = deduplicator.find()
        return {
            **_figures(signature, search, found.removed_N.nonzero()[0].tolist()),
            "accounted_bytes": found.peak_bytes,
            "candidates": found.candidates,
        }

    return run


def datasketch(batches: Iterator[list[str]], scratch: Path) -> Callable[[], Figures]:
    """MinHashLSH with our bands and threshold; later documents are compared with kept ones."""
    from datasketch import MinHash, MinHashLSH

    from scalellm.data.dedup import DedupOptions

    options = DedupOptions(ngram=NGRAM)

    def run() -> Figures:
        signature, search = Clock(), Clock()
        shape = (options.num_bands, options.band_hashes)
        index = MinHashLSH(num_perm=options.num_hashes, params=shape)
        kept: dict[int, Any] = {}
        removed: list[int] = []
        number = 0
        for texts in batches:
            for text in texts:
                with signature:
                    sketch = MinHash(options.num_hashes, hashfunc=zlib.crc32)
                    words = words_of(text)
                    starts = range(len(words) - NGRAM + 1)
                    sketch.update_batch({" ".join(words[i : i + NGRAM]).encode() for i in starts})
                with search:
                    near = (sketch.jaccard(kept[other]) for other in index.query(sketch))
                    if any(jaccard >= options.threshold for jaccard in near):
                        removed.append(number)
                    else:
                        index.insert(number, sketch)
                        kept[number] = sketch
                number += 1
        return _figures(signature, search, removed)

    return run


def datatrove(batches: Iterator[list[str]], scratch: Path) -> Callable[[], Figures]:
    """Its three MinHash steps at their defaults (14 bands of 8).

    Its English words are spaCy's; here they come from a regular expression, which is faster.
    """
    import numpy as np
    from datatrove.data import Document
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster
    from datatrove.pipeline.dedup import minhash as steps
    from loguru import logger

    logger.remove()
    config = steps.MinhashConfig(n_grams=NGRAM)
    signatures, pairs, removed = (str(scratch / name) for name in ("sigs", "pairs", "removed"))

    class Words:
        def word_tokenize(self, text: str) -> list[str]:
            return re.findall(r"\w+", text)

    steps.load_word_tokenizer = lambda language: Words()

    def documents() -> Iterator[Document]:
        for texts in batches:
            yield from (Document(text=text, id="") for text in texts)

    def run() -> Figures:
        signature, search = Clock(), Clock()
        first = steps.MinhashDedupSignature(signatures, config)
        with signature:
            first.run(documents())
        with search:
            for bucket in range(config.num_buckets):
                second = MinhashDedupBuckets(signatures, pairs, config=config)
                second.run(None, bucket, config.num_buckets)
            MinhashDedupCluster(pairs, removed, config).run()
        file = Path(removed) / "000000.remove"
        numbers = np.fromfile(file, "<u4").tolist() if file.exists() else []
        return _figures(signature, search, numbers)

    return run


def _figures(signature: Clock, search: Clock, removed: list[int]) -> Figures:
    return {
        "signature_cpu_s": signature.cpu_s,
        "search_cpu_s": search.cpu_s,
        "wall_s": signature.wall_s + search.wall_s,
        "removed": removed,
    }


def main() -> None:
    name, folder, start, stop, scratch = sys.argv[1:]
    batches = Documents(Path(folder)).batches(int(start), int(stop))
    contestants = {"scalellm": scalellm, "datasketch": datasketch, "datatrove": datatrove}
    # Where the checkout is not installed; behind everything else.
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    run = contestants[name](batches, Path(scratch))
    # Forgets the peak so far: a new process even begins with that of its parent.
    Path("/proc/self/clear_refs").write_text("5")
    before_bytes = _peak_rss_bytes()
    figures = run()
    print(json.dumps(figures | {"rss_bytes": _peak_rss_bytes() - before_bytes}))


def _peak_rss_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


if __name__ == "__main__":
    main()
