"""Documents out of one file: plain text, JSON lines (also .gz and .zst), Parquet.

Everything is streamed: memory is bounded by one document and one block, never by the file.
"""

from __future__ import annotations

import json
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scalellm.data.encoding import AUTO, binary_error, detect_encoding
from scalellm.data.lines import read_lines
from scalellm.errors import DataError, UserError, did_you_mean

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
JSON_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSED = (".gz", ".zst")
SUFFIXES = (
    *TEXT_SUFFIXES,
    *(kind + packed for kind in JSON_SUFFIXES for packed in ("", *COMPRESSED)),
    ".parquet",
)

# A text file up to this size is one document; a longer one is a collection and is cut into pieces.
MAX_TEXT_FILE_BYTES = 1 << 20
PIECE_CHARS = 1 << 16
_BLOCK_BYTES = 1 << 20
_BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it came from, such as `notes.txt` or `data.jsonl:12`."""

    text: str
    origin: str


@dataclass(frozen=True)
class ReadOptions:
    """How files are read.

    Attributes:
        encoding: of text and JSON files; "auto" detects it.
        text_field: the JSON key or the Parquet column that holds the text.
    """

    encoding: str = AUTO
    text_field: str = "text"


@dataclass
class Tally:
    """What reading saw besides documents.

    Attributes:
        dropped: documents or files left out, by reason.
        encodings: text files read, by encoding.
    """

    dropped: Counter[str] = field(default_factory=Counter)
    encodings: Counter[str] = field(default_factory=Counter)


def read_file(path: Path, options: ReadOptions, tally: Tally) -> Iterator[Document]:
    """Yields the documents of one file of a known suffix, in order.

    Raises:
        UserError: a binary file, or an encoding that cannot be told or is not the one given.
        DataError: a line that is no JSON object, a missing or non-text field, a damaged file.
    """
    name = path.name.lower()
    try:
        if name.endswith(TEXT_SUFFIXES):
            yield from _read_text(path, options, tally)
        elif name.endswith(".parquet"):
            yield from _read_parquet(path, options, tally)
        else:
            yield from _read_json_lines(path, options, tally)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def is_readable(path: Path) -> bool:
    """Whether the file's suffix is one of `SUFFIXES`."""
    return path.name.lower().endswith(SUFFIXES)


def cut_pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Cuts a long text into pieces of about `PIECE_CHARS` characters, losing none.

    A cut falls after the last blank line of a piece, or its last line end, or where it must.
    """
    pending = ""
    for block in blocks:
        pending += block
        start = 0
        while len(pending) - start > PIECE_CHARS:
            end = _cut_at(pending, start, start + PIECE_CHARS)
            yield pending[start:end]
            start = end
        pending = pending[start:]
    if pending:
        yield pending


def _cut_at(text: str, start: int, limit: int) -> int:
    # Not in the first half: a heading and a blank line are no piece.
    middle = start + (limit - start) // 2
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, middle, limit)
        if found >= 0:
            return found + len(mark)
    return limit


def _read_text(path: Path, options: ReadOptions, tally: Tally) -> Iterator[Document]:
    encoding = _encoding_of(path, options)
    tally.encodings[encoding.removesuffix("-sig")] += 1
    blocks = _decoded(path, encoding)
    if path.stat().st_size <= MAX_TEXT_FILE_BYTES:
        yield Document("".join(blocks), str(path))
        return
    for number, piece in enumerate(cut_pieces(blocks), start=1):
        yield Document(piece, f"{path} (piece {number})")


def _encoding_of(path: Path, options: ReadOptions) -> str:
    if options.encoding != AUTO:
        return options.encoding
    if path.suffix.lower() == ".py":
        with path.open("rb") as file:
            try:
                declared, lines = tokenize.detect_encoding(file.readline)
            except SyntaxError:
                declared, lines = "utf-8", []
        # PEP 263: a declaration in the first two lines rules; without one it must be detected.
        if declared not in ("utf-8", "utf-8-sig") and lines:
            return declared
    return detect_encoding(path)


def _decoded(path: Path, encoding: str) -> Iterator[str]:
    """Text of a file in blocks, line ends as `\\n`."""
    try:
        with path.open(encoding=encoding, errors="strict") as file:
            while block := file.read(_BLOCK_BYTES):
                if "\0" in block:
                    raise binary_error(path, "NUL characters")
                yield block
    except UnicodeError as error:
        name = encoding.removesuffix("-sig")
        raise UserError(
            f"{path} is not {name}: {_reason(error)}; give its encoding with --encoding, convert "
            "it to UTF-8, or remove it"
        ) from None


def _reason(error: UnicodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{error.object[error.start]:02x}: {error.reason}"
    return str(error)


def _read_json_lines(path: Path, options: ReadOptions, tally: Tally) -> Iterator[Document]:
    # JSON is UTF-8 by its standard (RFC 8259), so nothing is detected here.
    encoding = "utf-8-sig" if options.encoding == AUTO else options.encoding
    tally.encodings[encoding.removesuffix("-sig")] += 1
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line.decode(encoding))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where} is not {encoding.removesuffix('-sig')} (byte {error.start} of the line); "
                "give the file's encoding with --encoding"
            ) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not a line of JSON: {error}; mend or remove it") from None
        if not isinstance(record, dict):
            raise DataError(
                f'{where} holds {type(record).__name__}, not an object; write {{"text": "…"}} lines'
            )
        text = text_of(record, options.text_field, where)
        if text is None:
            tally.dropped["no text"] += 1
        else:
            yield Document(text, where)


def text_of(record: dict[str, Any], text_field: str, where: str) -> str | None:
    """The text of a record, or None where it is null.

    Raises:
        DataError: the field is missing or holds something else than text.
    """
    if text_field not in record:
        raise missing_field(where, text_field, list(record))
    text = record[text_field]
    if text is not None and not isinstance(text, str):
        raise DataError(
            f"{where}: field {text_field!r} holds {type(text).__name__}, not text; name the right "
            f"one of {_listed(list(record))} with --text-field"
        )
    return text


def missing_field(where: str, text_field: str, fields: list[str]) -> DataError:
    """The error for a record or table without the text field; it lists the fields there are."""
    return DataError(
        f"{where} has no field {text_field!r}; its fields are {_listed(fields)}: name the one that "
        f"holds the text with --text-field{did_you_mean(text_field, fields)}"
    )


def _listed(fields: list[str], limit: int = 20) -> str:
    return ", ".join(fields[:limit]) + (", …" if len(fields) > limit else "") or "none"


def _read_parquet(path: Path, options: ReadOptions, tally: Tally) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            f"{path} needs the package pyarrow; install it with: pip install 'scalellm[hf]'"
        ) from None
    try:
        with pq.ParquetFile(path) as file:
            fields = file.schema_arrow.names
            if options.text_field not in fields:
                raise missing_field(str(path), options.text_field, fields)
            rows = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[options.text_field]):
                for text in batch.column(0).to_pylist():
                    rows += 1
                    where = f"{path}:{rows}"
                    if text_of({options.text_field: text}, options.text_field, where) is None:
                        tally.dropped["no text"] += 1
                    else:
                        yield Document(text, where)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged or no Parquet file: {error}; make it again") from None
