"""Encoding on a Ray cluster with Ray Data: `scalellm prepare --engine ray`.

The driver reads and splits the text, as the local engine does, and writes the shards: what decides
about the dataset is the same code in the same order, and sources need not be on the nodes. The
nodes encode, which is the expensive part. A Ray Dataset wants to know its blocks when it starts,
so a corpus of unknown length goes in windows: each is a Dataset of one block a batch, mapped in
order, while a thread reads the next window into the object store. No more than two windows are
ever there. One Dataset fed by a generator task would have no gaps between windows, but a killed
worker would have to read the corpus from its start again.

Ray runs a batch again if its worker or node dies. It gives the same ids, and each batch carries its
number, so nothing is lost or repeated unseen.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from scalellm.data import encode_job
from scalellm.data.encode_job import Encode, Encoded, SplitTexts
from scalellm.errors import UserError
from scalellm.ray_session import ray_session

if TYPE_CHECKING:
    import pyarrow as pa

# Starting and ending a Dataset took 1.3 s on two busy cores; a batch there took 0.6 s.
_BATCHES_PER_CPU = 32
# At most 0.5 GiB of text in a window, on however many nodes.
_MAX_BATCHES = 1024
# Ray Data would go on for ever with a batch that kills its worker by the memory it takes.
_MAX_RETRIES = 5


@contextmanager
def ray_engine(address: str | None, num_workers: int) -> Iterator[Encode]:
    """Joins or starts a cluster and gives `encode(batches, tokenizer file)` on it, in order.

    Args:
        address: see `ray_session`.
        num_workers: batches encoded at a time; 0 is one per CPU of the cluster.

    Raises:
        UserError: there is no such cluster, a node lacks a package, a worker died again and again.
    """
    with ray_session(address, num_cpus=num_workers or None):
        import ray
        import ray.data  # its logger is set up by the import

        cpus = int(ray.cluster_resources().get("CPU", 1))
        with _quiet(logging.getLogger("ray.data")):
            yield lambda batches, file: _encode(batches, file, num_workers or max(1, cpus))


def _encode(
    batches: Iterable[SplitTexts], tokenizer: Path, width: int
) -> Generator[Encoded, None, None]:
    import ray

    data = tokenizer.read_bytes()
    job = _Job(hashlib.sha256(data).hexdigest(), tokenizer.suffix, ray.put(data))
    size = min(_BATCHES_PER_CPU * width, _MAX_BATCHES)
    source, stop, count = enumerate(batches), Event(), 0
    with ThreadPoolExecutor(1, "read-ahead") as reader:
        try:
            window = _put(islice(source, size), stop)
            while window:
                following = reader.submit(_put, islice(source, size), stop)
                for number, encoded in _map_window(window, job, width):
                    if number != count:
                        raise RuntimeError(f"Ray gave batch {number} where {count} was due")
                    count += 1
                    yield encoded
                window = following.result()
        finally:
            stop.set()


def _put(numbered: Iterable[tuple[int, SplitTexts]], stop: Event) -> list[Any]:
    """Puts each batch into the object store; returns the references."""
    import pyarrow as pa
    import ray

    references = []
    for number, batch in numbered:
        if stop.is_set():
            break
        row = {"number": [number], "batch": pa.array([pickle.dumps(batch)], pa.large_binary())}
        references.append(ray.put(pa.table(row)))
    return references


def _map_window(references: list[Any], job: _Job, width: int) -> Iterator[tuple[int, Encoded]]:
    import ray

    dataset = ray.data.from_arrow_refs(references)
    context = dataset.context
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with warnings.catch_warnings():
        # Until Ray 2.64 this is the only way to limit retries, and it is deprecated.
        warnings.simplefilter("ignore")
        dataset = dataset.map_batches(
            job,
            batch_size=None,
            batch_format="pyarrow",
            ray_remote_args_fn=lambda: {"max_retries": _MAX_RETRIES},
            compute=ray.data.TaskPoolStrategy(min(width, len(references))),
        )
    try:
        for row in dataset.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, UserError):
                raise result
            yield row["number"], result
    except ray.exceptions.RayError as error:
        explained = _explained(error)
        if explained is error:
            raise
        raise explained from None


class _Job:
    """What a worker does with a block; the tokenizer's bytes travel once to each node."""

    def __init__(self, key: str, suffix: str, data: Any) -> None:
        self._key, self._suffix, self._data = key, suffix, data

    def __call__(self, block: pa.Table) -> pa.Table:
        import pyarrow as pa

        result: Encoded | UserError
        try:
            _load(self._key, self._suffix, self._data)
            result = encode_job.encode(pickle.loads(block["batch"][0].as_py()))
        except UserError as error:  # as a result: Ray Data would pass on its text at most
            result = error
        packed = pa.array([pickle.dumps(result)], pa.large_binary())
        return pa.table({"number": block["number"], "result": packed})


# The tokenizer that this worker has loaded. A worker serves one window after the other.
_loaded: str | None = None


def _load(key: str, suffix: str, reference: Any) -> None:
    global _loaded
    if _loaded == key:
        return
    import ray

    # One core a worker: the package tokenizers would start a thread per core in each.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(prefix="scalellm-") as folder:
        file = Path(folder) / f"tokenizer{suffix}"
        file.write_bytes(ray.get(reference))
        encode_job.load(file)
    _loaded = key


def _explained(error: Exception) -> Exception:
    """A user's mistake as one sentence; a bug of ours as it is, with the worker's traceback."""
    import ray

    missing = re.search(r"No module named '[^']+'", str(error))
    if missing:
        return UserError(
            f"a node of the Ray cluster lacks a package ({missing[0]}); install scalellm with the "
            "same extras on every node"
        )
    if isinstance(error, ray.exceptions.WorkerCrashedError | ray.exceptions.OutOfMemoryError):
        return UserError(
            f"workers on the Ray cluster died {_MAX_RETRIES + 1} times with the same text, most "
            "often because memory ran out; use fewer workers (--workers 1) or larger nodes"
        )
    return error


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
