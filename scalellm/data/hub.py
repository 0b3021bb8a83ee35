"""Documents of a Hugging Face dataset, streamed; a preset for three well-known corpora."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalellm.data.documents import Document, Tally, cut_pieces, missing_field, text_of
from scalellm.errors import DataError, UserError

HF_PREFIX = "hf:"


@dataclass(frozen=True)
class Preset:
    """Where a well-known corpus lives.

    Attributes:
        repository: its id on the hub.
        config: the dataset's configuration, or None.
        rows_are_lines: a row is a line of one long text, not a document.
    """

    repository: str
    config: str | None = None
    rows_are_lines: bool = False


_WIKITEXT = "Salesforce/wikitext"
PRESETS = {
    "wikitext-2": Preset(_WIKITEXT, "wikitext-2-raw-v1", rows_are_lines=True),
    "wikitext-103": Preset(_WIKITEXT, "wikitext-103-raw-v1", rows_are_lines=True),
    "wikitext/wikitext-2-raw-v1": Preset(_WIKITEXT, "wikitext-2-raw-v1", rows_are_lines=True),
    "tinystories": Preset("roneneldan/TinyStories"),
    "openwebtext": Preset("Skylion007/openwebtext"),
}


@dataclass(frozen=True)
class HubSource:
    """One split of a dataset on the hub or in a local folder.

    Attributes:
        name: as the user wrote it.
        dataset: a hub id or a folder.
        config: the dataset's configuration, or None.
        split: "train" unless asked for another.
        text_field: the column that holds the text.
        rows_are_lines: see `Preset`.
    """

    name: str
    dataset: str
    config: str | None
    split: str
    text_field: str
    rows_are_lines: bool = False

    @classmethod
    def parse(cls, name: str, text_field: str) -> HubSource:
        """Reads `hf:NAME[:CONFIG][@SPLIT]`; NAME is a preset, a hub id, or a folder.

        Raises:
            UserError: the name is empty, or a path that does not exist.
        """
        rest, _, split = name.removeprefix(HF_PREFIX).partition("@")
        dataset, _, config = rest.partition(":")
        if not dataset:
            raise UserError(f"{name!r} names no dataset; write hf:NAME, such as hf:wikitext-2")
        split, preset = split or "train", PRESETS.get(dataset.lower())
        if preset and not Path(dataset).exists():
            config = config or preset.config or ""
            lines = preset.rows_are_lines
            return cls(name, preset.repository, config or None, split, text_field, lines)
        if dataset[0] in "/.~":
            folder = Path(dataset).expanduser()
            if not folder.is_dir():
                raise UserError(f"{name!r}: there is no folder {folder}")
            dataset = str(folder)
        return cls(name, dataset, config or None, split, text_field)

    def documents(self, tally: Tally) -> Iterator[Document]:
        rows = self._texts(tally)
        if self.rows_are_lines:
            lines = (text if text.endswith("\n") else text + "\n" for _, text in rows)
            for number, piece in enumerate(cut_pieces(lines), start=1):
                yield Document(piece, f"{self.name} (piece {number})")
            return
        for number, text in rows:
            yield Document(text, f"{self.name}:{number}")

    def fingerprint(self) -> str:
        """Of a folder its files' sizes and times; of a hub dataset its name, not its revision."""
        parts = [self.dataset, str(self.config), self.split]
        folder = Path(self.dataset)
        if folder.is_dir():
            for path in sorted(folder.rglob("*")):
                stat = path.stat()
                parts.append(f"{path} {stat.st_size} {stat.st_mtime_ns}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _texts(self, tally: Tally) -> Iterator[tuple[int, str]]:
        rows = self._rows()
        fields = list(getattr(rows, "column_names", None) or ())
        if fields and self.text_field not in fields:
            raise missing_field(self.name, self.text_field, fields)
        number = 0
        iterator = iter(rows)
        while True:
            try:
                row = next(iterator, None)
            except Exception as error:
                # Anything may come out of a download; the user needs its name and the fix.
                raise self._unreachable(error) from error
            if row is None:
                return
            number += 1
            text = text_of(row, self.text_field, f"{self.name}:{number}")
            if text is None:
                tally.dropped["no text"] += 1
            else:
                yield number, text

    def _rows(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"{self.name} needs the package datasets; install it with: pip install "
                "'scalellm[hf]'"
            ) from None
        folder = Path(self.dataset)
        try:
            if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
                loaded = datasets.load_from_disk(self.dataset)
                return loaded if isinstance(loaded, datasets.Dataset) else loaded[self.split]
            return datasets.load_dataset(
                self.dataset, self.config, split=self.split, streaming=True
            )
        except Exception as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if Path(self.dataset).is_dir():
            return DataError(f"cannot read {self.name} (split {self.split!r}): {reason}")
        return UserError(
            f"cannot load {self.name} ({self.dataset}, split {self.split!r}): {reason}; check the "
            "name and the network, or download the dataset and give hf:FOLDER"
        )
