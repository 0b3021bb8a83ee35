"""A real HTTP/1.1 server of a folder on loopback, with ranges, and faults on demand.

`faults` maps a part of a file's name to a function that is asked for every request to it: it takes
(number of the request, handler) and returns whether it has answered in its own, faulty way.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Fault = Callable[[int, "Handler"], bool]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.faults = root, dict[str, Fault]()
        self.requests: Counter[str] = Counter()
        self.sent_bytes, self.delay_s = 0, 0.0
        self.headers_seen: list[dict[str, str]] = []
        self.methods: set[str] = set()
        self.lock = threading.Lock()
        self.connections: list[socket.socket] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def server_close(self) -> None:
        super().server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is expected here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        with self.server.lock:
            number = self.server.requests[name]
            self.server.requests[name] += 1
            self.server.headers_seen.append(dict(self.headers.items()))
            self.server.methods.add(self.command)
        time.sleep(self.server.delay_s)
        for part, fault in self.server.faults.items():
            if part in name and fault(number, self):
                return
        self.answer()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def content(self) -> bytes | None:
        file = self.server.root / self.path.lstrip("/")
        return file.read_bytes() if file.is_file() else None

    def part(self) -> slice | None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        return slice(int(found[1]), int(found[2]) + 1) if found else None

    def answer(self, change: Callable[[bytes], bytes] = bytes) -> None:
        """Answers as it should, after `change` to the bytes asked for."""
        whole, part = self.content(), self.part()
        if whole is None:
            self.plain(404)
        elif part is None:
            self.reply(200, change(whole))
        elif part.start >= len(whole):
            self.plain(416)
        else:
            data = whole[part]
            stop = part.start + len(data) - 1
            self.reply(
                206, change(data), {"Content-Range": f"bytes {part.start}-{stop}/{len(whole)}"}
            )

    def wanted(self) -> bytes:
        """The bytes asked for, of a file that is there."""
        return (self.content() or b"")[self.part() or slice(None)]

    def answer_part(self, data: bytes, declared: int | None = None) -> None:
        """Answers with these bytes, of which the headers may tell another number, and hangs up."""
        part, stop = self.part(), len(data) if declared is None else declared
        if part is None:
            self.reply(200, data, declared=declared)
        else:
            stop = min(part.start + stop, part.stop) if declared else part.start + stop
            place = {"Content-Range": f"bytes {part.start}-{stop - 1}/*"}
            self.reply(206, data, place, declared=declared)
        self.close_connection = True

    def plain(self, status: int, **headers: str) -> bool:
        self.reply(status, b"no", {name.replace("_", "-"): text for name, text in headers.items()})
        return True

    def reply(
        self,
        status: int,
        data: bytes,
        headers: dict[str, str] | None = None,
        *,
        declared: int | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if declared is None else declared))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            # Before: who has read the last byte may look at once.
            with self.server.lock:
                self.server.sent_bytes += len(data)
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve(root: Path) -> Iterator[Server]:
    server = Server(root)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def refuse(status: int, times: int = 10**9, **headers: str) -> Fault:
    """The first `times` requests are answered with this status."""
    return lambda number, handler: number < times and handler.plain(status, **headers)


def cut(times: int = 10**9) -> Fault:
    """The connection ends in the middle of the body."""

    def fault(number: int, handler: Handler) -> bool:
        if number < times:
            data = handler.wanted()
            handler.answer_part(data[: len(data) // 2], len(data))
        return number < times

    return fault


def flip(bit: int, times: int = 10**9) -> Fault:
    """One bit of the answer is another."""

    def change(data: bytes) -> bytes:
        damaged = bytearray(data)
        at = bit % (len(data) * 8)
        damaged[at // 8] ^= 1 << at % 8
        return bytes(damaged)

    def fault(number: int, handler: Handler) -> bool:
        if number < times:
            handler.answer(change)
        return number < times

    return fault


def stall(stop: threading.Event, times: int = 10**9, headers_first: bool = False) -> Fault:
    """Nothing comes, or nothing but the headers, until the event is set."""

    def fault(number: int, handler: Handler) -> bool:
        if number < times:
            if headers_first:
                handler.answer_part(b"", len(handler.wanted()))
                handler.wfile.flush()
            stop.wait(60)
            handler.close_connection = True
        return number < times

    return fault


def without_ranges(number: int, handler: Handler) -> bool:
    """As servers do that know nothing of ranges: always the whole file."""
    handler.reply(200, handler.content() or b"")
    return True


def wrong_length(difference: int, times: int = 10**9) -> Fault:
    """The header Content-Length is wrong by so many bytes."""

    def fault(number: int, handler: Handler) -> bool:
        if number < times:
            data = handler.wanted()
            handler.answer_part(data, len(data) + difference)
        return number < times

    return fault


def short(bytes_less: int, times: int = 10**9) -> Fault:
    """An answer that is whole, of a shorter range."""

    def fault(number: int, handler: Handler) -> bool:
        if number < times and handler.part():
            handler.answer_part(handler.wanted()[:-bytes_less])
            return True
        return False

    return fault


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder; those that go while we look count as nothing."""
    total = 0
    for path in list(folder.rglob("*")):
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total
