"""One ranged request to a server through fsspec: the bytes, or a `FetchError` that says what to do.

http, https and hf share one coroutine, which fsspec's own reading cannot replace: that reads the
whole body of a server that ignores ranges before it looks at anything else.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

from scalellm.data._fetch_error import FetchError, error_of, status_error
from scalellm.errors import DataError

_READ_BYTES = 1 << 20
# Beyond the timeout of the request itself, which names the cause.
_GRACE_S = 5.0
_NO_RANGES = "the server ignores ranges and sends the whole file"
_OTHER_SERVER = "use a server that answers 206 to ranges, or copy the dataset to a folder"
_PACKAGES = {
    "http": ("fsspec", "aiohttp"),
    "https": ("fsspec", "aiohttp"),
    "s3": ("fsspec", "s3fs"),
    "gs": ("fsspec", "gcsfs"),
    "hf": ("fsspec", "aiohttp", "huggingface_hub"),
}


class Transport(Protocol):
    """Requests of one process; safe to share between its threads."""

    def fetch(self, name: str, offset: int, size_bytes: int) -> bytes:
        """Returns these bytes of a file, or as many as came. Raises FetchError."""
        ...

    def fetch_whole(self, name: str, limit_bytes: int) -> bytes:
        """Returns a whole file. Raises FetchError, also if it is larger than the limit."""
        ...

    def size(self, name: str) -> int:
        """Returns the bytes of a file. Raises FetchError."""
        ...


def check_packages(url: str) -> None:
    """Raises DataError if a package that this kind of URL needs is not installed."""
    scheme = url.partition("://")[0]
    missing = [name for name in _PACKAGES[scheme] if importlib.util.find_spec(name) is None]
    if missing:
        raise DataError(
            f"{scheme}:// needs the package {' and '.join(missing)}, which is not installed; "
            'pip install "scalellm[remote]"'
        )


def make_transport(url: str, timeout_s: float, count: Callable[[int], None]) -> Transport:
    """Returns the transport of a URL.

    Args:
        url: of the dataset.
        timeout_s: of a request, connecting and reading included.
        count: called with the bytes of every part that arrives.
    """
    scheme = url.partition("://")[0]
    if scheme in ("http", "https"):
        return _HttpTransport(scheme, quote(url, safe=":/%[]!$&'()*+,;=~"), {}, timeout_s, count)
    if scheme == "hf":
        base, headers = _resolve_hub(url)
        return _HttpTransport(scheme, base, headers, timeout_s, count)
    return _BucketTransport(scheme, url, timeout_s, count)


def _resolve_hub(url: str) -> tuple[str, dict[str, str]]:
    """Returns where the hub serves the files of hf://datasets/USER/NAME[@REVISION][/FOLDER]."""
    from huggingface_hub import constants, get_token

    _, user, name, *folder = url.removeprefix("hf://").split("/")
    name, _, revision = name.partition("@")
    parts = ["datasets", user, name, "resolve", quote(revision or "main", safe=""), *folder]
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return f"{constants.ENDPOINT.rstrip('/')}/{'/'.join(parts)}", headers


def _proxy_of(url: str) -> str | None:
    parts = urlsplit(url)
    if parts.hostname is None or proxy_bypass(parts.hostname):
        return None
    return getproxies().get(parts.scheme)


class _HttpTransport:
    def __init__(
        self,
        scheme: str,
        base: str,
        headers: dict[str, str],
        timeout_s: float,
        count: Callable[[int], None],
    ) -> None:
        import fsspec

        self._scheme, self._base, self._headers = scheme, base, headers
        self._timeout_s, self._count = timeout_s, count
        # Proxies and ~/.netrc are taken from the environment; bytes are wanted as they are stored.
        # aiohttp refuses a token beside ~/.netrc, so with one the proxy is looked up here.
        self._proxy = _proxy_of(base) if headers else None
        client = {"trust_env": not headers, "auto_decompress": False}
        self._fs = fsspec.filesystem("http", client_kwargs=client, skip_instance_cache=True)

    def fetch(self, name: str, offset: int, size_bytes: int) -> bytes:
        found: bytes = self._run(self._get, name, (offset, size_bytes), size_bytes)
        return found

    def fetch_whole(self, name: str, limit_bytes: int) -> bytes:
        found: bytes = self._run(self._get, name, None, limit_bytes)
        return found

    def size(self, name: str) -> int:
        found: int = self._run(self._head, name)
        return found

    def _run(self, coroutine: Callable[..., Any], *arguments: Any) -> Any:
        return _run(self._scheme, self._fs.loop, coroutine, *arguments, timeout_s=self._timeout_s)

    async def _request(self, method: str, name: str, headers: dict[str, str]) -> Any:
        import aiohttp

        session = await self._fs.set_session()
        return session.request(
            method,
            self._fs.encode_url(f"{self._base}/{name}"),
            headers={"Accept-Encoding": "identity", **self._headers, **headers},
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            proxy=self._proxy,
        )

    async def _head(self, name: str) -> int:
        async with await self._request("HEAD", name, {}) as answer:
            self._check_status(answer.status, answer.headers, {200})
            if answer.content_length is None:
                raise FetchError("the server does not tell its size", "use another server")
            return int(answer.content_length)

    async def _get(self, name: str, part: tuple[int, int] | None, limit_bytes: int) -> bytes:
        headers = {} if part is None else {"Range": f"bytes={part[0]}-{sum(part) - 1}"}
        async with await self._request("GET", name, headers) as answer:
            self._check_status(answer.status, answer.headers, {200} if part is None else {200, 206})
            length = answer.content_length
            if answer.status == 206 and part is not None:
                _check_content_range(answer.headers.get("Content-Range", ""), *part)
            elif part is not None and (part[0] or length is None or length > limit_bytes):
                raise FetchError(_NO_RANGES, _OTHER_SERVER)
            if part is None and length is not None and length > limit_bytes:
                raise _too_large(length, limit_bytes)
            data = await self._read_body(answer, limit_bytes + (part is None))
        if part is None and len(data) > limit_bytes:
            raise _too_large(len(data), limit_bytes)
        return data

    async def _read_body(self, answer: Any, limit_bytes: int) -> bytes:
        data = bytearray()
        while len(data) < limit_bytes:
            part = await answer.content.read(min(_READ_BYTES, limit_bytes - len(data)))
            if not part:
                break
            data += part
            self._count(len(part))
        return bytes(data)

    def _check_status(self, status: int, headers: Any, good: set[int]) -> None:
        if status not in good:
            raise status_error(self._scheme, status, headers.get("Retry-After"))


class _BucketTransport:
    def __init__(
        self, scheme: str, url: str, timeout_s: float, count: Callable[[int], None]
    ) -> None:
        import fsspec

        self._scheme, self._base = scheme, url
        self._timeout_s, self._count = timeout_s, count
        options: dict[str, Any] = {"skip_instance_cache": True}
        if scheme == "s3":
            # One try each: retries, their waits and their count are the caller's.
            options["config_kwargs"] = {
                "connect_timeout": timeout_s,
                "read_timeout": timeout_s,
                "retries": {"total_max_attempts": 1},
            }
        self._fs: Any = fsspec.filesystem(scheme, **options)
        if scheme == "s3":
            self._fs.retries = 1

    def fetch(self, name: str, offset: int, size_bytes: int) -> bytes:
        get = self._get_s3 if self._scheme == "s3" else self._get
        data: bytes = self._run(get, name, offset, size_bytes)
        self._count(len(data))
        return data

    def fetch_whole(self, name: str, limit_bytes: int) -> bytes:
        size_bytes = self.size(name)
        if size_bytes > limit_bytes:
            raise _too_large(size_bytes, limit_bytes)
        return self.fetch(name, 0, size_bytes)

    def size(self, name: str) -> int:
        info: dict[str, Any] = self._run(self._fs._info, f"{self._base}/{name}")
        return int(info["size"])

    def _run(self, coroutine: Callable[..., Any], *arguments: Any) -> Any:
        return _run(self._scheme, self._fs.loop, coroutine, *arguments, timeout_s=self._timeout_s)

    async def _get(self, name: str, offset: int, size_bytes: int) -> bytes:
        found: bytes = await self._fs._cat_file(
            f"{self._base}/{name}", start=offset, end=offset + size_bytes
        )
        return found

    async def _get_s3(self, name: str, offset: int, size_bytes: int) -> bytes:
        """As s3fs reads a range, but never more of the body than was asked for."""
        bucket, key, _ = self._fs.split_path(f"{self._base}/{name}")
        answer = await self._fs._call_s3(
            "get_object", Bucket=bucket, Key=key, Range=f"bytes={offset}-{offset + size_bytes - 1}"
        )
        body = answer["Body"]
        try:
            if answer["ResponseMetadata"]["HTTPStatusCode"] == 206:
                _check_content_range(answer.get("ContentRange", ""), offset, size_bytes)
            elif offset or answer["ContentLength"] > size_bytes:
                raise FetchError(
                    "the server ignores ranges and sends the whole file", "use another"
                )
            data: bytes = await body.read(size_bytes)
            return data
        finally:
            body.close()


def _run(
    scheme: str, loop: Any, coroutine: Callable[..., Any], *arguments: Any, timeout_s: float
) -> Any:
    """Runs a coroutine in fsspec's thread; whatever it raises becomes a FetchError."""
    from fsspec.asyn import sync

    try:
        return sync(loop, coroutine, *arguments, timeout=timeout_s + _GRACE_S)
    except FetchError:
        raise
    except Exception as error:
        raise error_of(scheme, error, timeout_s) from None


def _check_content_range(header: str, offset: int, size_bytes: int) -> None:
    found = re.fullmatch(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", header.strip())
    if found is None or int(found[1]) != offset or int(found[2]) >= offset + size_bytes:
        raise FetchError(f"the server answered with another range ({header[:60]!r})")
    if int(found[2]) != offset + size_bytes - 1:
        raise FetchError(f"the server's answer ends at byte {int(found[2]) + 1}")


def _too_large(size_bytes: int, limit_bytes: int) -> FetchError:
    return FetchError(
        f"it has {size_bytes} bytes or more, the limit is {limit_bytes} bytes", "restore the file"
    )
