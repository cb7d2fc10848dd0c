"""A real HTTP server on the loopback interface that serves a folder, and fails as it is told.

Range reads, ETag, If-Range and If-Match work as in RFC 9110, over connections that are kept. What
goes wrong is a list of :class:`Fault`: each applies to some requests of some paths.
"""

from __future__ import annotations

import hashlib
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

__all__ = ["Fault", "FaultyServer", "serve_folder"]

Kind = Literal[
    "status", "reset", "truncate", "stall", "html", "noise", "whole", "wrong_range", "slow",
    "delay", "gzip", "redirect",
]  # fmt: skip
_PIECE = 1 << 14


@dataclass
class Fault:
    """Something that goes wrong.

    Attributes:
        kind: ``status``: answer ``code``. ``reset``: connection reset in mid-body. ``truncate``:
            closed in mid-body, which Content-Length denies. ``stall``: silence in mid-body until
            the server ends. ``html``: a page with status 200. ``noise``: other bytes of the right
            length. ``whole``: the whole file with status 200, as from servers without ranges.
            ``wrong_range``: another range than asked for, and it says so. ``slow``: ``rate`` bytes
            a second. ``delay``: ``seconds`` before the answer. ``gzip``: the body is compressed
            although nobody asked for it. ``redirect``: to the same path with ``?moved``.
        path: Regular expression that the path holds.
        times: So many requests; None for all.
        after: So many matching requests are answered well before.
        code: Status of ``status``.
        retry_after: Header of ``status``, seconds or an HTTP date.
        keep: Bytes of the body that are sent before the end; None for half of it.
        rate: Bytes a second of ``slow``.
        seconds: Seconds of ``delay``.
        methods: Requests it applies to.
    """

    kind: Kind
    path: str = ""
    times: int | None = 1
    after: int = 0
    code: int = 503
    retry_after: str | None = None
    keep: int | None = None
    rate: float = 1000.0
    seconds: float = 0.5
    methods: tuple[str, ...] = ("GET",)
    seen: int = 0

    def takes(self, method: str, path: str) -> bool:
        """Whether this request is one of those that fail; counts it."""
        if method not in self.methods or not re.search(self.path, path):
            return False
        self.seen += 1
        over = self.seen - self.after
        return over > 0 and (self.times is None or over <= self.times)


@dataclass
class FaultyServer:
    """A running server.

    Attributes:
        url: Its root.
        latency_s: Wait before every answer.
        faults: What goes wrong; the first that applies wins.
        requests: Method, path, status and start time of each request.
        bytes_sent: Bytes of the bodies sent, by path.
        most_at_once: The most requests that were in flight together.
    """

    folder: Path
    url: str = ""
    latency_s: float = 0.0
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, int, float]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    bytes_sent: Counter[str] = field(default_factory=Counter)
    most_at_once: int = 0
    in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)

    def count(self, path: str = "", status: int | None = None) -> int:
        """Requests of paths that match, with a status."""
        return sum(bool(re.search(path, p)) and status in (None, s) for _, p, s, _ in self.requests)

    def reset(self, *faults: Fault) -> None:
        """Forget what was counted; from now on these faults."""
        with self.lock:
            self.faults = list(faults)
            self.requests.clear()
            self.headers.clear()
            self.bytes_sent.clear()
            self.most_at_once = 0


def _etag(path: Path) -> str:
    stat = path.stat()
    return f'"{hashlib.sha256(f"{stat.st_mtime_ns}-{stat.st_size}".encode()).hexdigest()[:16]}"'


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    state: FaultyServer  # set on a subclass per server
    began = 0.0

    def log_message(self, format: str, *args: Any) -> None:
        """Tests read the counts instead."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        state, self.began = self.state, time.monotonic()
        path = unquote(urlsplit(self.path).path)
        with state.lock:
            state.in_flight += 1
            state.most_at_once = max(state.most_at_once, state.in_flight)
            fault = next((f for f in state.faults if f.takes(self.command, self.path)), None)
            state.headers.append(dict(self.headers))
        try:
            if state.latency_s:
                state.ended.wait(state.latency_s)
            self._serve(path, fault)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        finally:
            with state.lock:
                state.in_flight -= 1

    def _serve(self, path: str, fault: Fault | None) -> None:
        kind = fault.kind if fault else ""
        if fault and kind == "delay":
            self.state.ended.wait(fault.seconds)
        if fault and kind == "status":
            more = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            return self._send(fault.code, b"<h1>not now</h1>", "text/html", more)
        if kind == "html":
            return self._send(200, b"<html><body>Please log in</body></html>" * 20, "text/html", {})
        if kind == "redirect":
            return self._send(302, b"", "text/plain", {"Location": path + "?moved"})
        file = (self.state.folder / path.lstrip("/")).resolve()
        if not (file.is_relative_to(self.state.folder.resolve()) and file.is_file()):
            return self._send(404, b"<h1>not here</h1>", "text/html", {})
        return self._file(file, fault)

    def _file(self, file: Path, fault: Fault | None) -> None:
        size, etag, kind = file.stat().st_size, _etag(file), fault.kind if fault else ""
        more = {"ETag": etag, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("If-Match")
        if wanted and wanted not in (etag, "*"):
            return self._send(412, b"", "text/plain", more)
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if self.headers.get("If-Range") not in (None, etag):
            span = None
        if kind == "whole" or not span or not (span[1] or span[2]):
            return self._send(200, file.read_bytes(), "image/tiff", more, fault)
        if span[1]:
            first, last = int(span[1]), min(int(span[2] or size - 1), size - 1)
        else:
            first, last = max(size - int(span[2]), 0), size - 1
        if first >= size or last < first:
            more["Content-Range"] = f"bytes */{size}"
            return self._send(416, b"", "text/plain", more)
        if kind == "wrong_range":
            first = max(first - 1, 0) if first else 1
            last = min(last, size - 1)
        with file.open("rb") as f:
            f.seek(first)
            body = f.read(last - first + 1)
        more["Content-Range"] = f"bytes {first}-{last}/{size}"
        return self._send(206, body, "image/tiff", more, fault)

    def _send(
        self, status: int, body: bytes, kind: str, more: dict[str, str],
        fault: Fault | None = None,
    ) -> None:  # fmt: skip
        if fault and fault.kind == "noise":
            body = bytes(b ^ 0x5A for b in body)
        if fault and fault.kind == "gzip":
            import gzip

            body, more = gzip.compress(body), more | {"Content-Encoding": "gzip"}
        with self.state.lock:
            self.state.requests.append((self.command, self.path, status, self.began))
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(body)), **more}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self._body(body, fault)

    def _body(self, body: bytes, fault: Fault | None) -> None:
        kind = fault.kind if fault else ""
        end = len(body)
        if fault and kind in ("reset", "truncate", "stall"):
            end = min(end // 2 if fault.keep is None else fault.keep, end)
        step = max(int(fault.rate / 20), 1) if fault and kind == "slow" else _PIECE
        for start in range(0, end, step):
            piece = body[start : min(start + step, end)]
            self.wfile.write(piece)
            with self.state.lock:
                self.state.bytes_sent[urlsplit(self.path).path] += len(piece)
            if kind == "slow" and self.state.ended.wait(0.05):
                raise ConnectionError
        if kind == "stall":
            self.state.ended.wait()
        if kind == "reset":
            # Time for the peer to take the bytes: a reset throws away what it has not read yet.
            self.state.ended.wait(0.02)
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
        if kind in ("reset", "truncate", "stall"):
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gives up is no news."""


@contextmanager
def serve_folder(folder: Path, *faults: Fault, latency_s: float = 0.0) -> Iterator[FaultyServer]:
    """Serve a folder on a free port of the loopback interface."""
    state = FaultyServer(folder, latency_s=latency_s, faults=list(faults))
    handler = type("Handler", (_Handler,), {"state": state})
    server = _Server(("127.0.0.1", 0), handler)
    # Many threads end with the process; those that wait are woken by `ended`.
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        state.ended.set()
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
