"""What cleaning took away, stage by stage, with examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from scalellm.data.clean.cleaner import Cleaned
from scalellm.data.clean.options import STAGES
from scalellm.data.clean.page import percent

MAX_EXAMPLES = 3


@dataclass
class StageReport:
    """One stage: documents it removed by kind of reason, documents it changed, and what it took.

    Attributes:
        removed: documents by kind of reason.
        changed: documents, also those that a later stage removed.
        characters: taken away net; all that were left where the document was removed.
        changes: counts of what was changed, by its kind.
        examples: the first three, each {"origin", "reason", "text"}.
    """

    removed: dict[str, int] = field(default_factory=dict)
    changed: int = 0
    characters: int = 0
    changes: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, str]] = field(default_factory=list)

    def merge(self, other: StageReport) -> None:
        _add(self.removed, other.removed)
        _add(self.changes, other.changes)
        self.changed += other.changed
        self.characters += other.characters
        self.examples = [*self.examples, *other.examples][:MAX_EXAMPLES]

    def to_dict(self) -> dict[str, Any]:
        return {
            "removed": dict(sorted(self.removed.items())),
            "changed": self.changed,
            "characters": self.characters,
            "changes": dict(sorted(self.changes.items())),
            "examples": [dict(example) for example in self.examples],
        }


def _add(counts: dict[str, int], more: dict[str, int]) -> None:
    for name, number in more.items():
        counts[name] = counts.get(name, 0) + number


class CleanReport:
    """Counts over many documents. Parts merged in document order give the report of the whole."""

    def __init__(self) -> None:
        self.documents = 0
        self.kept = 0
        self.characters = 0
        self.characters_kept = 0
        self.stages: dict[str, StageReport] = {}

    def add(self, origin: str, before: str, cleaned: Cleaned) -> None:
        """Counts one document.

        Args:
            origin: where the text is from, shown beside an example.
            before: the text that was cleaned.
            cleaned: what became of it.
        """
        self.documents += 1
        self.characters += len(before)
        if cleaned.text is not None:
            self.kept += 1
            self.characters_kept += len(cleaned.text)
        for key, number in cleaned.changes.items():
            stage, _, what = key.partition(".")
            _add(self._stage(stage).changes, {what: number})
        for name, characters in cleaned.characters.items():
            stage_report = self._stage(name)
            stage_report.characters += characters
            is_removed = name == cleaned.removed_by
            if is_removed:
                _add(stage_report.removed, {cleaned.kind: 1})
            else:
                stage_report.changed += 1
            if len(stage_report.examples) < MAX_EXAMPLES:
                reason = cleaned.reason if is_removed else ""
                example = {"origin": origin, "reason": reason, "text": cleaned.examples[name]}
                stage_report.examples.append(example)

    def merge(self, other: CleanReport) -> None:
        """Adds the report of the documents that follow those of this one."""
        self.documents += other.documents
        self.kept += other.kept
        self.characters += other.characters
        self.characters_kept += other.characters_kept
        for name, report in other.stages.items():
            self._stage(name).merge(report)

    def _stage(self, name: str) -> StageReport:
        return self.stages.setdefault(name, StageReport())

    def _in_order(self) -> list[tuple[str, StageReport]]:
        return [(name, self.stages[name]) for name in STAGES if name in self.stages]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the same documents give the same keys in the same order."""
        return {
            "documents": self.documents,
            "kept": self.kept,
            "characters": self.characters,
            "characters_kept": self.characters_kept,
            "stages": {name: report.to_dict() for name, report in self._in_order()},
        }

    def lines(self) -> list[str]:
        """A table for the terminal, and one example of each stage."""
        if not self.documents:
            return ["cleaning: no documents"]
        kept = percent(self.kept / self.documents)
        characters = percent(self.characters_kept / max(1, self.characters))
        lines = [
            f"cleaning kept {self.kept:,} of {self.documents:,} documents ({kept}) and "
            f"{self.characters_kept:,} of {self.characters:,} characters ({characters})"
        ]
        if not self.stages:
            return lines
        lines.append(f"  {'stage':<11}{'removed':>9}{'changed':>9}{'characters':>13}  what")
        for name, report in self._in_order():
            removed = sum(report.removed.values())
            counts = sorted(report.removed.items(), key=lambda item: (-item[1], item[0]))
            counts += sorted(report.changes.items(), key=lambda item: (-item[1], item[0]))
            what = ", ".join(f"{kind.replace('_', ' ')} {number:,}" for kind, number in counts)
            lines.append(
                f"  {name:<11}{removed:>9,}{report.changed:>9,}{report.characters:>13,}  {what}"
            )
        for name, report in self._in_order():
            example = report.examples[0]
            reason = f" ({example['reason']})" if example["reason"] else ""
            lines.append(f"  {name}: {example['origin']}{reason}: {example['text']}")
        return lines
