"""What the cleaning stages do and where their limits lie; presets by word.

The defaults of the thresholds are those of the papers: C4 (Raffel et al. 2020) for `lines`, Gopher
(Rae et al. 2021, appendix A) for `length`, `repetition` and `symbols`. Every stage is off until
`enabled` or a preset turns it on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError, field_validator, model_validator

from scalellm.config.explain import explain
from scalellm.config.section import Section, setting
from scalellm.config.yaml_text import merge_overrides, read_yaml
from scalellm.errors import ConfigError, did_you_mean

Preset = Literal["none", "light", "web", "code"]


def _share(default: float, description: str) -> Any:
    """A setting that is a share: 0.2 is 20%."""
    return setting(default, description, unit="share", ge=0, le=1)


class EncodingOptions(Section):
    enabled: bool = setting(False, "mend the characters")
    mend_mojibake: bool = setting(True, "turn 'FrÃ¼h' back into 'Früh' (needs ftfy)")
    normalize: Literal["nfc", "none"] = setting("nfc", "one spelling for each accented letter")
    max_replacement_share: float = _share(0.01, "remove a text with more U+FFFD characters")


class HtmlOptions(Section):
    enabled: bool = setting(False, "turn HTML into text")
    detect: Literal["auto", "always"] = setting(
        "auto", "auto: only what begins (and, for a fragment, ends) as HTML; always: every text"
    )
    drop_navigation: bool = setting(True, "drop nav, header, footer, aside, form and their text")


class LinesOptions(Section):
    enabled: bool = setting(False, "drop lines, and texts whose lines are wrong")
    min_words: int = setting(3, "drop shorter lines; 0: none", unit="words", ge=0)
    end_punctuation: bool = setting(True, "drop lines that end without punctuation")
    drop_lorem_ipsum: bool = setting(True, "drop lines of placeholder text")
    drop_javascript: bool = setting(True, "drop 'please enable JavaScript'")
    drop_cookies: bool = setting(True, "drop notices on cookies, privacy and terms of use")
    min_lines: int = setting(1, "remove a text with fewer lines left", unit="lines", ge=0)
    min_sentences: int = setting(3, "remove a text with fewer left", unit="sentences", ge=0)
    max_line_characters: int | None = setting(
        None, "remove a text with a longer line; null: no limit", unit="characters", ge=1
    )
    max_mean_line_characters: float | None = setting(
        None, "remove a text of longer lines; null: no limit", unit="characters", gt=0
    )


class LengthOptions(Section):
    enabled: bool = setting(False, "remove texts that are too short or too long")
    min_characters: int = setting(0, "remove shorter texts", unit="characters", ge=0)
    max_characters: int | None = setting(
        None, "remove longer texts; null: no limit", unit="characters", ge=1
    )
    min_words: int = setting(50, "remove shorter texts", unit="words", ge=0)
    max_words: int | None = setting(
        100_000, "remove longer texts; null: no limit", unit="words", ge=1
    )
    min_mean_word_characters: float = setting(
        3.0, "remove texts of shorter words", unit="characters", ge=0
    )
    max_mean_word_characters: float | None = setting(
        10.0, "remove texts of longer words; null: no limit", unit="characters", gt=0
    )


class RepetitionOptions(Section):
    """Gopher's table A1; shares of lines, of paragraphs, or of characters that are no space."""

    enabled: bool = setting(False, "remove texts that repeat themselves")
    max_duplicate_line_share: float = _share(0.30, "lines that stood before, of the lines")
    max_duplicate_paragraph_share: float = _share(0.30, "the same of paragraphs")
    max_duplicate_line_character_share: float = _share(0.20, "characters in such lines")
    max_duplicate_paragraph_character_share: float = _share(0.20, "in such paragraphs")
    max_top_2_gram_share: float = _share(0.20, "characters in the most frequent 2-gram")
    max_top_3_gram_share: float = _share(0.18, "the same of 3-grams")
    max_top_4_gram_share: float = _share(0.16, "the same of 4-grams")
    max_duplicate_5_gram_share: float = _share(0.15, "characters in 5-grams that stood before")
    max_duplicate_6_gram_share: float = _share(0.14, "the same of 6-grams")
    max_duplicate_7_gram_share: float = _share(0.13, "the same of 7-grams")
    max_duplicate_8_gram_share: float = _share(0.12, "the same of 8-grams")
    max_duplicate_9_gram_share: float = _share(0.11, "the same of 9-grams")
    max_duplicate_10_gram_share: float = _share(0.10, "the same of 10-grams")


class SymbolsOptions(Section):
    enabled: bool = setting(False, "remove texts that are not prose")
    max_hash_share: float = setting(0.1, "'#' for each word", unit="per word", ge=0)
    max_ellipsis_share: float = setting(0.1, "'...' for each word", unit="per word", ge=0)
    max_bullet_line_share: float = _share(0.9, "lines that begin with a bullet")
    max_ellipsis_line_share: float = _share(0.3, "lines that end with an ellipsis")
    min_alphabetic_word_share: float = _share(0.8, "words with a letter, of all words")
    min_stop_words: int = setting(
        2, "different stop words of any known language; 0: none", unit="words", ge=0
    )


class LanguageOptions(Section):
    enabled: bool = setting(False, "remove texts in other languages (needs py3langid)")
    languages: tuple[str, ...] = setting((), "wanted ISO 639 codes as [en, de]; []: any")
    min_share: float = _share(0.5, "of the characters in the wanted languages")
    min_confidence: float = _share(0.3, "a piece of a text has no vote below")
    chunk_characters: int = setting(
        1000, "a piece that has a vote", unit="characters", ge=50, le=1_000_000
    )
    max_chunks: int = setting(
        10, "pieces asked of a long text, evenly spread", unit="pieces", ge=1, le=1_000_000
    )

    @field_validator("languages", mode="before")
    @classmethod
    def _norwegian(cls, given: Any) -> Any:
        """YAML reads the language code `no` as false."""
        if isinstance(given, list | tuple):
            return ["no" if code is False else code for code in given]
        return [given] if isinstance(given, str) else given


class PiiOptions(Section):
    enabled: bool = setting(False, "put placeholders for what identifies a person")
    email: bool = setting(True, "e-mail addresses: <EMAIL>")
    phone: bool = setting(True, "international, North American and announced ('Tel.'): <PHONE>")
    ip: bool = setting(True, "IPv4 and IPv6, but no private or documentation ones: <IP>")
    card: bool = setting(True, "payment cards with the right check digit: <CARD>")
    iban: bool = setting(True, "bank accounts with the right check digits: <IBAN>")
    national_id: bool = setting(
        True, "identity numbers of persons with the right check digit (needs python-stdnum): <ID>"
    )


_LIGHT_LENGTH = {
    "enabled": True,
    "min_characters": 100,
    "min_words": 10,
    "max_words": None,
    "min_mean_word_characters": 2.0,
    "max_mean_word_characters": 20.0,
}
_STAGES_OF_WEB = (
    *("encoding", "html", "lines", "length", "repetition", "symbols", "language", "pii"),
)
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "none": {},
    "light": {"encoding": {"enabled": True}, "length": _LIGHT_LENGTH},
    "web": {stage: {"enabled": True} for stage in _STAGES_OF_WEB},
    "code": {
        # A source file may hold mojibake and decomposed letters on purpose.
        "encoding": {"enabled": True, "mend_mojibake": False, "normalize": "none"},
        # StarCoder's limits (Li et al. 2023); a dropped line would break the program.
        "lines": {
            "enabled": True,
            "min_words": 0,
            "end_punctuation": False,
            "drop_lorem_ipsum": False,
            "drop_javascript": False,
            "drop_cookies": False,
            "min_sentences": 0,
            "max_line_characters": 1000,
            "max_mean_line_characters": 100.0,
        },
        "length": {
            "enabled": True,
            "min_characters": 50,
            "min_words": 5,
            "max_words": None,
            "min_mean_word_characters": 0.0,
            "max_mean_word_characters": None,
        },
        "pii": {"enabled": True},
    },
}


class CleanOptions(Section):
    """All stages in the order in which they run; `CleanOptions()` leaves every text as it is."""

    preset: Preset = setting("none", "what holds unless a key says otherwise")
    encoding: EncodingOptions = EncodingOptions()
    html: HtmlOptions = HtmlOptions()
    lines: LinesOptions = LinesOptions()
    length: LengthOptions = LengthOptions()
    repetition: RepetitionOptions = RepetitionOptions()
    symbols: SymbolsOptions = SymbolsOptions()
    language: LanguageOptions = LanguageOptions()
    pii: PiiOptions = PiiOptions()

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        name = given.get("preset") if isinstance(given, dict) else None
        if not isinstance(name, str) or name not in PRESETS:
            return given
        merged = dict(given)
        for stage, values in PRESETS[name].items():
            own = given.get(stage, {})
            if isinstance(own, Section):
                continue
            merged[stage] = {**values, **own} if isinstance(own, dict) else own
        return merged


STAGES = tuple(name for name in CleanOptions.model_fields if name != "preset")


def load_clean_options(preset_or_yaml_file: str, overrides: Sequence[str] = ()) -> CleanOptions:
    """Options of a preset (`web`) or of a YAML file (which may name a `preset` to start from).

    Args:
        preset_or_yaml_file: a word of `PRESETS`, or the path of a file.
        overrides: texts as `repetition.enabled=false`; values are YAML, the last one wins.

    Raises:
        ConfigError: neither a preset nor a file, an unknown key, a value out of its range.
    """
    values: Mapping[str, Any]
    if preset_or_yaml_file in get_args(Preset):
        values, source = {"preset": preset_or_yaml_file}, f"cleaning {preset_or_yaml_file!r}"
    else:
        path = Path(preset_or_yaml_file)
        if path.suffix.lower() not in (".yaml", ".yml") and not path.is_file():
            words = get_args(Preset)
            raise ConfigError(
                f"cleaning {preset_or_yaml_file!r} is neither {', '.join(words)} nor a YAML file"
                f"{did_you_mean(preset_or_yaml_file, words)}"
            )
        values, source = read_yaml(path), str(path)
    try:
        return CleanOptions.model_validate(merge_overrides(dict(values), overrides))
    except ValidationError as error:
        raise ConfigError(explain(error, CleanOptions, source)) from None
