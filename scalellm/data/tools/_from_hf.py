"""Hugging Face datasets of ids: folders of `save_to_disk`, Arrow files, Parquet files.

Read with pyarrow alone, in batches: `save_to_disk` writes plain Arrow streams.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scalellm.data.tools._foreign import (
    Foreign,
    ForeignSplit,
    Parts,
    ReadForeign,
    group_by_split,
    pick_column,
    size_of,
    split_of_name,
)
from scalellm.errors import DataError, UserError

_STATE, _DICT = "state.json", "dataset_dict.json"
_SUFFIXES = (".parquet", ".arrow")
_BATCH_ROWS = 256
_MAX_JSON_BYTES = 64 << 20
_AGAIN = "save it again, or copy it again"


def is_hf(path: Path) -> bool:
    """Whether this is an Arrow or Parquet file, or a folder of them."""
    if path.is_file():
        return path.suffix in _SUFFIXES
    return any((path / name).is_file() for name in (_STATE, _DICT)) or bool(_loose_files(path))


def open_hf(path: Path, read: ReadForeign) -> Foreign:
    """Opens an Arrow or Parquet file, or a folder of them or of `save_to_disk`.

    Raises:
        DataError: no such files, damaged ones, or no column of ids.
        UserError: pyarrow is missing.
    """
    groups = _groups(path)
    if not any(groups.values()):
        raise DataError(f"{path} holds no {' or '.join(_SUFFIXES)} file; check the path")
    splits = []
    for name, files in groups.items():
        for file in files:
            size_of(file)
        splits.append(ForeignSplit(name, None, _Documents(files, read.column)))
    files_of_all = tuple(file for files in groups.values() for file in files)
    return Foreign("hf", path, files_of_all, tuple(splits))


def _groups(path: Path) -> dict[str | None, list[Path]]:
    if path.is_file():
        return {None: [path]}
    if (path / _DICT).is_file():
        names = _json(path / _DICT).get("splits")
        if not isinstance(names, list):
            raise DataError(f"{path / _DICT} lists no splits; {_AGAIN}")
        return {_split_name(name): _saved_files(_inside(path, name)) for name in names}
    if (path / _STATE).is_file():
        return {None: _saved_files(path)}
    return group_by_split(_loose_files(path))


def _split_name(name: Any) -> str:
    return split_of_name(str(name)) or str(name).lower()


def _loose_files(path: Path) -> list[Path]:
    return sorted(file for file in path.glob("*") if file.suffix in _SUFFIXES)


def _saved_files(folder: Path) -> list[Path]:
    entries = _json(folder / _STATE).get("_data_files")
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise DataError(f"{folder / _STATE} lists no data files; {_AGAIN}")
    return [_inside(folder, one.get("filename")) for one in entries]


def _inside(folder: Path, name: Any) -> Path:
    if not isinstance(name, str) or not name or name in (".", "..") or {"/", "\0"} & set(name):
        raise DataError(f"{folder} names a file {str(name)[:80]!r} outside itself; {_AGAIN}")
    return folder / name


def _json(path: Path) -> dict[str, Any]:
    if size_of(path) > _MAX_JSON_BYTES:
        raise DataError(f"{path} has more than {_MAX_JSON_BYTES} bytes; {_AGAIN}")
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); {_AGAIN}") from None
    if not isinstance(fields, dict):
        raise DataError(f"{path} holds no JSON object; {_AGAIN}")
    return fields


@dataclass(frozen=True)
class _Documents:
    files: list[Path]
    column: str | None

    def __call__(self, eos_id: int | None) -> Iterator[Parts]:
        for file in self.files:
            row = 0
            for column in _columns(file, self.column):
                for ids in _rows(column, file, row):
                    yield (ids,)
                row += len(column)


def _columns(path: Path, wanted: str | None) -> Iterator[Any]:
    """The column of ids, batch by batch."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            f"{path} needs the package pyarrow; install it with: pip install 'scalellm[hf]'"
        ) from None
    try:
        with ExitStack() as stack:
            if path.suffix == ".parquet":
                table = stack.enter_context(pq.ParquetFile(path))
                name = pick_column(table.schema_arrow.names, wanted, path)
                batches = table.iter_batches(batch_size=_BATCH_ROWS, columns=[name])
            else:
                reader = stack.enter_context(_arrow(stack.enter_context(pa.memory_map(str(path)))))
                name = pick_column(reader.schema.names, wanted, path)
                batches = (
                    reader
                    if isinstance(reader, pa.RecordBatchStreamReader)
                    else map(reader.get_batch, range(reader.num_record_batches))
                )
            for batch in batches:
                column = batch.column(batch.schema.get_field_index(name))
                # Offsets that lie would be read as addresses.
                column.validate(full=True)
                yield column
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is damaged or of another format: {reason}; {_AGAIN}") from None


def _arrow(source: Any) -> Any:
    import pyarrow as pa

    try:
        return pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_file(source)


def _rows(column: Any, path: Path, first_row: int) -> Iterator[np.ndarray]:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    lists = pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list
    if not any(is_kind(kind) for is_kind in lists) or not pa.types.is_integer(kind.value_type):
        raise DataError(
            f"{path} holds {kind} where token ids are expected, a list of integers; name another "
            "column with --column"
        )
    if column.null_count:
        row = first_row + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{path}: row {row} is null; remove such rows first")
    values = column.flatten()
    if values.null_count:
        raise DataError(f"{path}: a row from row {first_row} on has an id that is null; mend it")
    ids = values.to_numpy(zero_copy_only=False)
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        yield ids[start:end]
