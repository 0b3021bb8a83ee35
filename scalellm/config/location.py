"""Where a dataset lies: a folder, or a URL without secrets; and how a URL is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BeforeValidator

from scalellm.errors import did_you_mean

SCHEMES = ("http", "https", "s3", "gs", "hf")
MAX_URL_CHARACTERS = 2000
_BY_ENVIRONMENT = (
    "give credentials by the environment or a credentials file (AWS_PROFILE, "
    "GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, ~/.netrc), never in the URL"
)


@dataclass(frozen=True)
class RemoteOptions:
    """How datasets behind a URL are read; nothing of it matters to a local folder.

    Attributes:
        cache_dir: compressed frames are kept here, for all ranks of a host; None: in memory, few.
        cache_bytes: most that `cache_dir` may hold.
        retries: tries of a request, the first one included.
        timeout_s: a request that takes longer is given up and tried again.
    """

    cache_dir: Path | None = None
    cache_bytes: int = 10 << 30
    retries: int = 5
    timeout_s: float = 30.0


def parse_location(value: Any) -> Path | str:
    """Returns a folder as a Path, a URL as a str without a slash at the end.

    Raises:
        ValueError: neither of them, a scheme that cannot be read, or a URL with secrets in it; the
            sentence never repeats them.
    """
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is neither a folder nor a URL")
    if eaten := re.match(rf"({'|'.join(SCHEMES)}):/(?!/)", value, re.IGNORECASE):
        scheme = eaten[1].lower()
        raise ValueError(f"a URL begins with {scheme}://, this one with {scheme}:/; add the slash")
    if "://" not in value:
        return Path(value)
    return _checked_url(value)


def _checked_url(url: str) -> str:
    scheme = url.partition("://")[0].lower()
    if scheme not in SCHEMES:
        raise ValueError(
            f"{scheme[:40]!r} is no kind of URL that can be read{did_you_mean(scheme, SCHEMES)}; "
            f"give a folder, or a URL that begins with {', '.join(SCHEMES)}"
        )
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError(f"the {scheme} URL has a host or port that cannot be read") from None
    shown = f"{scheme}://{host or ''}/…"
    if "@" in parts.netloc:
        raise ValueError(f"the URL {shown} holds a user or a password; {_BY_ENVIRONMENT}")
    if "?" in url or "#" in url:
        raise ValueError(f"the URL {shown} holds a query; {_BY_ENVIRONMENT}")
    if not host or len(url) > MAX_URL_CHARACTERS or re.search(r"[\s\\\x00-\x1f\x7f]", url):
        raise ValueError(
            f"the URL {shown} lacks a host, has blanks in it, or more than "
            f"{MAX_URL_CHARACTERS} characters"
        )
    rest = url.partition("://")[2].rstrip("/")
    if scheme == "hf" and not re.fullmatch(r"datasets/[^/@]+/[^/@]+(@[^/]+)?(/.*)?", rest):
        raise ValueError(f"{scheme}://{rest[:80]} is not of the form hf://datasets/USER/NAME")
    return f"{scheme}://{rest}"


Location = Annotated[Path | str, BeforeValidator(parse_location)]
