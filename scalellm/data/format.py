"""The dataset format "scalellm-tokens", versions 1 and 2: names, records, manifest, validation.

A dataset is a directory (`docs/data-format.md` reads one with numpy and zstandard alone):

    manifest.json            written last, sorted keys, signed with its own sha256
    tokenizer.model|.json    the tokenizer that made the ids
    train/00000.tokens.zst   independent zstd frames of `frame_tokens` ids, then a seek table
    train/00000.docs.zst     per token frame one zstd frame of uint32 document ends
    train/00000.index        INDEX_HEADER, then one INDEX_RECORD per frame

Nothing read from a dataset is trusted: a manifest that is too large, has duplicate keys, numbers
out of range or paths that leave the directory ends in one `DataError`.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from scalellm.data.store import MANIFEST as MANIFEST
from scalellm.data.store import RESTORE as RESTORE
from scalellm.data.store import LocalStore, Store
from scalellm.errors import DataError

FORMAT = "scalellm-tokens"
VERSION = 1
# Of a manifest with a packed split; the files below it are the same.
PACKED_VERSION = 2
FRAME_TOKENS = 65_536
MAX_FRAME_TOKENS = 1 << 24
MAX_SHARD_FRAMES = 1 << 20
MAX_VOCAB_SIZE = 1 << 31
MAX_TOKENS = 1 << 62
MAX_MANIFEST_BYTES = 64 << 20
NO_CARRY = 0xFFFF_FFFF
DOCUMENT_END_DTYPE = np.dtype("<u4")

INDEX_MAGIC = b"SLTOKIDX"
INDEX_HEADER = np.dtype(
    [("magic", "S8"), ("version", "<u4"), ("record_bytes", "<u4"), ("num_frames", "<u8")]
)
INDEX_RECORD = np.dtype(
    [
        ("offset", "<u8"),
        ("size_bytes", "<u4"),
        ("tokens", "<u4"),
        ("crc32", "<u4"),
        ("carry", "<u4"),
        ("docs_offset", "<u8"),
        ("docs_size_bytes", "<u4"),
        ("docs_crc32", "<u4"),
    ]
)

_SAFE_PATH = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*){0,3}")
SPLIT_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")


def _relative_path(value: str) -> str:
    if len(value) > 200 or not _SAFE_PATH.fullmatch(value):
        raise ValueError(f"{value[:80]!r} is not a plain path inside the dataset directory")
    return value


def _split_name(value: str) -> str:
    if not SPLIT_NAME.fullmatch(value):
        raise ValueError(f"{value[:80]!r} is not a split name (lower case, at most 32 characters)")
    return value


RelativePath = Annotated[str, AfterValidator(_relative_path)]
SplitName = Annotated[str, AfterValidator(_split_name)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
Positive = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Shard(_Strict):
    """Three files and what they hold; every number is checked against the files when opened."""

    file: RelativePath
    size_bytes: Positive
    sha256: Sha256
    index: RelativePath
    index_sha256: Sha256
    documents: RelativePath
    documents_size_bytes: Count
    documents_sha256: Sha256
    num_tokens: Positive
    num_frames: int = Field(ge=1, le=MAX_SHARD_FRAMES)
    num_documents: Count


class Split(_Strict):
    """One flat token stream, cut into shards of whole frames; only the last frame may be short.

    In a packed split every `packed_seq_len` tokens are a row of whole documents (or pieces) and,
    after the last document end in it, padding.
    """

    num_tokens: Positive
    num_documents: Count
    num_bytes_text: Count
    num_words_text: Count
    shards: list[Shard] = Field(min_length=1)
    packed_seq_len: int | None = Field(default=None, ge=2, le=MAX_FRAME_TOKENS)

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if self.packed_seq_len is None:  # as version 1 had it
            del fields["packed_seq_len"]
        return fields


class TokenizerFile(_Strict):
    """The tokenizer that made the ids, copied into the dataset."""

    file: RelativePath
    sha256: Sha256
    kind: str = Field(max_length=64)


class Manifest(_Strict):
    """`manifest.json`: everything a reader needs before it opens a shard."""

    format: Literal["scalellm-tokens"]
    version: Literal[1, 2]
    dtype: Literal["uint16", "uint32"]
    vocab_size: int = Field(ge=1, le=MAX_VOCAB_SIZE)
    eos_id: Count
    frame_tokens: int = Field(ge=1, le=MAX_FRAME_TOKENS)
    tokenizer: TokenizerFile | None
    splits: dict[SplitName, Split] = Field(min_length=1)
    extra: dict[str, Any]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if self.dtype != dtype_for(self.vocab_size).name:
            raise ValueError(f"dtype {self.dtype} does not fit vocab_size {self.vocab_size}")
        if self.eos_id >= self.vocab_size:
            raise ValueError(f"eos_id {self.eos_id} is not below vocab_size {self.vocab_size}")
        if self.version == PACKED_VERSION and not any(
            split.packed_seq_len for split in self.splits.values()
        ):
            raise ValueError(f"version {self.version} says a split is packed, no split is packed")
        files: set[str] = set()
        for name, split in self.splits.items():
            self._check_shards(name, split)
            self._check_packing(name, split)
            for shard in split.shards:
                paths = {shard.file, shard.index, shard.documents}
                if len(paths) < 3 or paths & files:
                    raise ValueError(f"a file of split {name!r} is listed twice")
                files |= paths
        return self

    def _check_shards(self, name: str, split: Split) -> None:
        for number, shard in enumerate(split.shards):
            if shard.num_frames != -(-shard.num_tokens // self.frame_tokens):
                raise ValueError(f"{shard.file} has num_frames that do not fit its num_tokens")
            last = number == len(split.shards) - 1
            if not last and shard.num_tokens % self.frame_tokens:
                raise ValueError(f"{shard.file} ends in a short frame but is not the last shard")
        if sum(shard.num_tokens for shard in split.shards) != split.num_tokens:
            raise ValueError(f"num_tokens of split {name!r} is not the sum of its shards")
        if sum(shard.num_documents for shard in split.shards) != split.num_documents:
            raise ValueError(f"num_documents of split {name!r} is not the sum of its shards")

    def _check_packing(self, name: str, split: Split) -> None:
        if split.packed_seq_len is None:
            return
        if self.version < PACKED_VERSION:
            raise ValueError(f"split {name!r} is packed, which version {self.version} knows not")
        if split.num_tokens % split.packed_seq_len:
            raise ValueError(f"split {name!r} has a short row of {split.packed_seq_len} tokens")


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """Returns the little-endian dtype of the ids: uint16 up to 65,536 ids, else uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def dump_manifest(manifest: Manifest) -> bytes:
    """Returns the bytes of `manifest.json`: sorted keys and `manifest_sha256` over all the rest."""
    fields = manifest.model_dump()
    fields["manifest_sha256"] = hashlib.sha256(_canonical(fields)).hexdigest()
    text = json.dumps(fields, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=True)
    return text.encode() + b"\n"


def fingerprint(manifest: Manifest, split: str) -> str:
    """Returns 64 hex digits of what decides the ids of a split: its shards, dtype and tokenizer.

    `extra` and the other splits stay out, so preparing the same text twice gives one fingerprint.
    """
    fields = manifest.model_dump(exclude={"extra", "splits"})
    fields["split"] = [split, manifest.splits[split].model_dump()]
    return hashlib.sha256(_canonical(fields)).hexdigest()


def load_manifest(source: Path | Store) -> Manifest:
    """Reads and validates the manifest of a dataset directory or store.

    Raises:
        DataError: no manifest, not this format or version, damaged, or with values that lie.
    """
    store = LocalStore(source) if isinstance(source, Path) else source
    path = store.describe(MANIFEST)
    raw = store.read(MANIFEST, MAX_MANIFEST_BYTES, _damage)
    try:
        fields = _parse(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); {RESTORE}") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise DataError(
            f"{path} is not of a {FORMAT} dataset; give a directory that `scalellm prepare` wrote"
        )
    version = fields.get("version")
    if version not in (VERSION, PACKED_VERSION) or isinstance(version, bool | float):
        raise DataError(
            f"{path} has format version {str(version)[:20]}, this scalellm reads versions "
            f"{VERSION} and {PACKED_VERSION}; prepare the dataset again"
        )
    signature = fields.pop("manifest_sha256", None)
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part)[:80] for part in first["loc"]) or "manifest"
        raise DataError(f"{path}: {where}: {first['msg']}; {RESTORE}") from None
    # Last, so that a lying value is named before the broken signature that comes with it.
    if signature != hashlib.sha256(_canonical(fields)).hexdigest():
        raise DataError(
            f"{path} does not match its own manifest_sha256: it was edited or damaged; {RESTORE}"
        )
    return manifest


def _parse(raw: bytes) -> Any:
    return json.loads(
        raw,
        object_pairs_hook=_no_duplicates,
        parse_constant=_no_constants,
        parse_float=_finite_float,
    )


def _damage(raw: bytes) -> str | None:
    """Says whether the bytes of a manifest may have been damaged on their way."""
    try:
        fields = _parse(raw)
    except (ValueError, RecursionError) as error:
        return f"is not valid JSON ({error})"
    if not isinstance(fields, dict):
        return "is not a JSON object"
    signature = fields.pop("manifest_sha256", None)
    if signature is not None and signature != hashlib.sha256(_canonical(fields)).hexdigest():
        return "does not match its own manifest_sha256: it was edited or damaged"
    return None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key is there twice")
    return fields


def _no_constants(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _finite_float(text: str) -> float:
    if abs(value := float(text)) == float("inf"):
        raise ValueError(f"{text[:20]} is beyond every float")
    return value
