"""What happens to documents between reading and tokenizing, as the user says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from scalellm.config.explain import explain
from scalellm.config.yaml_text import merge_overrides
from scalellm.data.clean import CleanOptions, load_clean_options
from scalellm.data.dedup import DedupOptions
from scalellm.errors import ConfigError, UserError


@dataclass(frozen=True)
class RefineOptions:
    """What is done to the documents.

    Attributes:
        clean: the stages of cleaning; None: none.
        dedup: what duplicates are; None: they stay.
        min_chars: shorter documents are left out, after cleaning too.
    """

    clean: CleanOptions | None
    dedup: DedupOptions | None
    min_chars: int

    @property
    def is_on(self) -> bool:
        return self.clean is not None or self.dedup is not None

    def to_dict(self) -> dict[str, Any]:
        """What decides the result, as JSON; without what only decides how it is computed."""
        fields: dict[str, Any] = {}
        if self.clean is not None:
            fields["clean"] = self.clean.model_dump(mode="json")
        if self.dedup is not None:
            fields["dedup"] = self.dedup.model_dump(mode="json", exclude={"memory_bytes"})
        return fields


def refine_options(
    clean: str | None, dedup: str, settings: Sequence[str]
) -> tuple[CleanOptions | None, DedupOptions | None]:
    """Reads the words of the command line.

    Args:
        clean: a preset, a YAML file or None.
        dedup: "none", "exact" or "near".
        settings: `clean.STAGE.KEY=VALUE` and `dedup.KEY=VALUE`.

    Raises:
        ConfigError: an unknown key or an impossible value, or a setting of what is off.
    """
    words: dict[str, list[str]] = {"clean": [], "dedup": []}
    for setting in settings:
        part, _, rest = setting.partition(".")
        if part not in words or "=" not in rest:
            raise ConfigError(
                f"--set {setting!r} is neither clean.STAGE.KEY=VALUE nor dedup.KEY=VALUE, such as "
                "clean.pii.enabled=false or dedup.threshold=0.8"
            )
        words[part].append(rest)
    if words["clean"] and clean is None:
        raise ConfigError(f"--set clean.{words['clean'][0]} has no use without --clean")
    if words["dedup"] and dedup == "none":
        raise ConfigError(f"--set dedup.{words['dedup'][0]} has no use without --dedup")
    stages = None if clean in (None, "none") else load_clean_options(str(clean), words["clean"])
    if dedup == "none":
        return stages, None
    values = merge_overrides({"exact": True, "near": dedup == "near"}, words["dedup"])
    try:
        return stages, DedupOptions.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, DedupOptions, "--set", "dedup.")) from None


def check_deduplicable(options: RefineOptions) -> None:
    """Refuses what would be silently nothing."""
    dedup = options.dedup
    if dedup is not None and not (dedup.exact or dedup.near):
        raise UserError(
            "dedup.exact and dedup.near are both off, so nothing would be removed; leave --dedup "
            "out or turn one on"
        )
