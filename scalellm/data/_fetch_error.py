"""Why a request failed, in words without secrets, and whether trying again may help."""

from __future__ import annotations

import email.utils
import errno
import re
import time

_TRANSIENT = frozenset({408, 425, 429})
_CREDENTIALS = {
    "http": "give credentials in ~/.netrc",
    "https": "give credentials in ~/.netrc",
    "s3": "give credentials by AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "give credentials by GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "give a token by HF_TOKEN or `hf auth login`",
}

_RESTORE = "correct the URL or restore the file"


class FetchError(Exception):
    """A request that failed.

    Attributes:
        cause: in words, without secrets.
        fix: what to do about it where trying again does not help; None: try again.
        retry_after_s: how long the server asks to wait.
        is_missing: there is no such file.
    """

    def __init__(
        self,
        cause: str,
        fix: str | None = None,
        *,
        retry_after_s: float = 0.0,
        is_missing: bool = False,
    ) -> None:
        super().__init__(cause)
        self.cause, self.fix = cause, fix
        self.retry_after_s, self.is_missing = retry_after_s, is_missing


def error_of(scheme: str, error: BaseException, timeout_s: float) -> FetchError:
    """Says in words what a library raised, and whether trying again may help."""
    for cause in _causes(error):
        answer = getattr(cause, "response", None)
        if isinstance(answer, dict) and "ResponseMetadata" in answer:  # botocore's ClientError
            meta = answer["ResponseMetadata"]
            after = meta.get("HTTPHeaders", {}).get("retry-after")
            return status_error(scheme, int(meta.get("HTTPStatusCode", 0)), after)
        if type(cause).__name__ == "HttpError":  # gcsfs
            return status_error(scheme, int(getattr(cause, "code", 0) or 0), None)
    if isinstance(error, FileNotFoundError):
        return status_error(scheme, 404, None)
    if scheme == "gs" and str(error).startswith("Forbidden"):
        return status_error(scheme, 403, None)
    name = type(error).__name__
    if isinstance(error, PermissionError) or "Credentials" in name:
        return FetchError(_words(error), _CREDENTIALS[scheme])
    if "Certificate" in name:
        return FetchError(_words(error), "make the server's certificate known by SSL_CERT_FILE")
    if isinstance(error, TimeoutError):
        return FetchError(f"no answer within {timeout_s:g} s")
    if "InvalidURL" in name or getattr(error, "errno", None) == errno.EINVAL:
        return FetchError(_words(error), "correct the URL")
    return FetchError(_words(error))


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__
    return found


def _words(error: BaseException) -> str:
    """A library's message in one line, without what may be a secret in a URL."""
    text = " ".join(str(error).split())
    text = re.sub(r"\?[^\s'\")]*", "?…", re.sub(r"//[^/\s@]*@", "//…@", text))
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


def status_error(scheme: str, status: int, retry_after: str | None) -> FetchError:
    cause = f"HTTP {status}"
    if status in _TRANSIENT or status >= 500:
        return FetchError(cause, retry_after_s=_retry_after_s(retry_after))
    if status in (401, 403, 407):
        return FetchError(f"{cause}, access is refused", _CREDENTIALS[scheme])
    if status in (404, 410):
        return FetchError(f"{cause}, there is no such file", _RESTORE, is_missing=True)
    if status == 416:
        return FetchError(f"{cause}, the file ends before", _RESTORE)
    return FetchError(cause, "correct the URL")


def _retry_after_s(text: str | None) -> float:
    """Reads the header Retry-After, seconds or a date; 0 for what is neither."""
    if not text:
        return 0.0
    try:
        wait_s = float(text)
    except ValueError:
        try:
            wait_s = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, wait_s) if wait_s == wait_s else 0.0
