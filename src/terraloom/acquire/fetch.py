"""Ranges of remote files: the right bytes, or an error that says what went wrong.

Every answer is held against what was asked: status, range, length, and the file's own size and
ETag. What fails is asked for again, with growing waits or as long as the server says; only whole
and consistent answers are kept. GDAL's own reader of addresses is not used, because it keeps broken
answers for the life of the process and takes a range that was not asked for without a word.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.cookies import SimpleCookie
from netrc import NetrcParseError, netrc
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import HTTPError

from terraloom.acquire.hosts import may_lead_to
from terraloom.acquire.hrefs import is_s3, is_url
from terraloom.acquire.retry import BACKOFF_S, RETRIES, WAIT_S
from terraloom.acquire.s3 import learn_region, s3_request
from terraloom.acquire.signing import signed_href
from terraloom.errors import SceneError
from terraloom.log import hide_secrets

__all__ = [
    "Address", "Answer", "Identity", "digest_of", "fetch_range", "fetch_ranges", "is_remote",
    "limit_requests", "read_many",
]  # fmt: skip

T = TypeVar("T")

#: Longest wait for a connection, seconds.
_CONNECT_S = 20.0
#: An answer that comes slower than this, averaged over the time-out, is given up (bytes a second).
_SLOWEST = 1024
#: Servers without range reads send the whole file, which is taken up to this size.
_WHOLE_BYTES = 64 << 20
_PIECE = 1 << 16
_DIGEST_PIECE = 8 << 20
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_MOVED = frozenset({301, 302, 303, 307, 308})
_REDIRECTS = 10
_PLAIN_HEADERS = ("Range", "Accept-Encoding")
_LOGIN = "set the credentials that the archive asks for (docs/how-to/read-from-archives.md)"
_LATER = "check the network and the archive, then run again: what is finished is kept"


@dataclass(frozen=True)
class Address:
    """A remote file.

    Attributes:
        href: Address as in the lock.
        sign: Name of the signing hook, or None.
    """

    href: str
    sign: str | None = None

    def request(self) -> tuple[str, dict[str, str]]:
        """URL and headers of a request, signed now."""
        href = signed_href(self.href, self.sign)
        if href.startswith("/vsis3/"):
            return s3_request("s3://" + href.removeprefix("/vsis3/"))
        return href, {}


@dataclass(frozen=True)
class Identity:
    """What tells one version of a file from another.

    Attributes:
        size: Bytes; None when unknown.
        tag: ETag without its quotes, else the time of change; None when the server says neither.
    """

    size: int | None = None
    tag: str | None = None


@dataclass(frozen=True)
class Answer:
    """Bytes of a range, and of which file."""

    data: bytes
    size: int
    tag: str | None


class _AskAgain(Exception):
    """An answer that may be better next time; ``wait_s`` when the server said how long."""

    def __init__(self, found: str, wait_s: float | None = None) -> None:
        super().__init__(found)
        self.wait_s = wait_s


class _Client:
    """Connections that are kept, and a bound on the requests in flight."""

    def __init__(self, requests: int, timeout_s: float) -> None:
        self.requests, self.timeout_s = requests, timeout_s
        bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
        settings: dict[str, Any] = {
            "num_pools": 32, "maxsize": requests, "ca_certs": bundle,
            "timeout": urllib3.Timeout(connect=min(_CONNECT_S, timeout_s), read=timeout_s),
        }  # fmt: skip
        self.direct = urllib3.PoolManager(**settings)
        self.proxies = {
            scheme: urllib3.ProxyManager(url if "://" in url else f"http://{url}", **settings)
            for scheme, url in getproxies().items()
            if scheme in ("http", "https")
        }
        self.logins = _logins()
        self.cookies: dict[str, dict[str, str]] = {}
        self.slots = threading.BoundedSemaphore(requests)
        self.workers = ThreadPoolExecutor(requests, thread_name_prefix="fetch")

    def get(self, url: str, headers: dict[str, str]) -> Any:
        """An answer whose body is not read yet, after redirects and their logins."""
        asked = url
        for _ in range(_REDIRECTS):
            parts = urlsplit(url)
            host, own = parts.netloc, dict(headers)
            if parts.hostname in self.logins and "Authorization" not in own:
                user, _, secret = self.logins[parts.hostname]
                own |= urllib3.make_headers(basic_auth=f"{user}:{secret}")
            if self.cookies.get(host):
                own["Cookie"] = "; ".join(f"{k}={v}" for k, v in self.cookies[host].items())
            proxy = self.proxies.get(parts.scheme.lower())
            http = proxy if proxy and not proxy_bypass(parts.hostname or "") else self.direct
            answer = http.request(
                "GET", url, headers=own, preload_content=False, retries=False, redirect=False
            )
            for text in answer.headers.getlist("Set-Cookie"):
                kept = {k: m.value for k, m in SimpleCookie(text).items()}
                self.cookies.setdefault(host, {}).update(kept)
            if answer.status not in _MOVED or not answer.headers.get("Location"):
                return answer
            answer.drain_conn()
            url = urljoin(url, answer.headers["Location"])
            if urlsplit(url).netloc != host:  # secrets are for whom they were made
                headers = {k: v for k, v in headers.items() if k in _PLAIN_HEADERS}
                may_lead_to(url, asked)
            if not is_url(url) or (parts.scheme == "https" and urlsplit(url).scheme != "https"):
                raise SceneError(
                    f"the server redirects to {hide_secrets(url)!r}", allowed="https addresses"
                )
        raise SceneError(f"more than {_REDIRECTS} redirects", fix=_LOGIN)

    def close(self) -> None:
        self.workers.shutdown(wait=False, cancel_futures=True)
        for http in (self.direct, *self.proxies.values()):
            http.clear()


def _logins() -> dict[str, tuple[str, str, str]]:
    """User, account and password by host, from the ``.netrc`` file of the person."""
    try:
        found = netrc(os.environ.get("NETRC")).hosts
    except (OSError, NetrcParseError):
        return {}
    return {host: (u, a or "", p or "") for host, (u, a, p) in found.items() if host != "default"}


_guard = threading.Lock()
_client: _Client | None = None


def limit_requests(requests: int, timeout_s: float) -> None:
    """Set how many requests may be in flight, and the longest wait for an answer.

    Holds for the process, for all reading of remote files; call it before reading starts.

    Args:
        requests: Number of requests in flight, ``scenes.requests``.
        timeout_s: Longest silence of a server in seconds, ``scenes.timeout_s``.
    """
    global _client
    with _guard:
        old, _client = _client, _Client(requests, timeout_s)
    if old is not None:
        old.close()


def _current() -> _Client:
    global _client
    with _guard:
        if _client is None:
            _client = _Client(16, 60.0)
        return _client


def _begin_anew() -> None:
    """Threads and connections do not outlive a fork."""
    global _client, _guard
    _client, _guard = None, threading.Lock()


os.register_at_fork(after_in_child=_begin_anew)


def is_remote(href: str) -> bool:
    """Whether an address is read over the network."""
    return is_url(href) or is_s3(href)


def fetch_range(address: Address, first: int, stop: int, known: Identity) -> Answer:
    """Bytes ``first`` to ``stop`` (excluded) of a remote file; fewer where the file ends before.

    Args:
        address: The file.
        first: Place of the first byte.
        stop: Place after the last byte.
        known: Size and tag that the file must have, as far as they are known.

    Raises:
        SceneError: The file is not there or may not be read, it is another one than known, or no
            right answer came in all attempts. It names no item; the caller does.
    """
    client, found = _current(), ""
    for attempt in range(RETRIES + 1):
        try:
            return _ask(client, address, first, stop, known)
        except _AskAgain as err:
            found = str(err)
            if attempt < RETRIES:
                wait_s = BACKOFF_S * 2**attempt if err.wait_s is None else err.wait_s
                time.sleep(min(wait_s, WAIT_S))
    raise SceneError(f"{found}, {RETRIES + 1} attempts were made", fix=_LATER)


def fetch_ranges(
    address: Address, spans: Sequence[tuple[int, int]], known: Identity
) -> list[bytes]:
    """Several ranges of one file, at once; order kept.

    Raises:
        SceneError: As of :func:`fetch_range`.
    """
    if len(spans) == 1:
        return [fetch_range(address, *spans[0], known).data]
    workers = _current().workers
    futures = [workers.submit(fetch_range, address, a, b, known) for a, b in spans]
    try:
        return [f.result().data for f in futures]
    finally:
        for future in futures:
            future.cancel()


def digest_of(address: Address, algorithm: str, known: Identity) -> str:
    """Hexadecimal digest of a whole remote file, read piece by piece.

    Raises:
        SceneError: As of :func:`fetch_range`.
    """
    h, at, end = hashlib.new(algorithm), 0, 1
    while at < end:
        answer = fetch_range(address, at, at + _DIGEST_PIECE, known)
        known = Identity(answer.size, answer.tag or known.tag)
        h.update(answer.data)
        at, end = at + len(answer.data), answer.size
    return h.hexdigest()


def read_many(calls: Iterable[Callable[[], T]], workers: int) -> list[T]:
    """Run reads side by side.

    Args:
        calls: Functions without arguments.
        workers: At most so many at once.

    Returns:
        Their results, in the order of the calls.

    Raises:
        Exception: What the first call in that order raised, of those that failed; calls that have
            not begun by then are not made.
    """
    todo = list(calls)
    if workers <= 1 or len(todo) <= 1:
        return [call() for call in todo]
    with ThreadPoolExecutor(min(workers, len(todo))) as pool:
        futures = [pool.submit(call) for call in todo]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            for future in futures:
                future.cancel()
    failed = (f.exception() for f in futures if not f.cancelled())
    for err in failed:
        if err is not None:
            raise err
    return [f.result() for f in futures]


def _ask(client: _Client, address: Address, first: int, stop: int, known: Identity) -> Answer:
    url, headers = address.request()
    headers = {**headers, "Range": f"bytes={first}-{stop - 1}", "Accept-Encoding": "identity"}
    with client.slots:
        began = time.monotonic()
        try:
            response = client.get(url, headers)
        except HTTPError as err:
            raise _AskAgain(_said(err)) from err
        whole = False
        try:
            answer = _read(client, address, response, first, stop, known, began)
            whole = True
            return answer
        except HTTPError as err:
            raise _AskAgain(_said(err)) from err
        finally:
            # A connection with half an answer in it must not be used again.
            if whole:
                response.release_conn()
            else:
                response.close()


def _read(
    client: _Client, address: Address, response: Any, first: int, stop: int, known: Identity,
    began: float,
) -> Answer:  # fmt: skip
    """The answer to a request for a range, when it is one and is whole."""
    status, headers = response.status, response.headers
    if status not in (200, 206):
        _refuse(address, status, headers)
    if headers.get("Content-Encoding", "identity").lower() != "identity":
        raise _AskAgain(f"the server sent the file as {headers['Content-Encoding']}")
    tag = (headers.get("ETag") or "").removeprefix("W/").strip('"') or headers.get("Last-Modified")
    if status == 206:
        start, end, size = _content_range(headers.get("Content-Range", ""))
    else:
        start, end, size = 0, int(headers.get("Content-Length") or -1), -1
        size = end
        if not 0 <= size <= _WHOLE_BYTES:
            raise SceneError(
                "the server does not send parts of files",
                allowed=f"range reads (RFC 9110), or files of at most {_WHOLE_BYTES >> 20} MB",
                fix="download the files and import them, or use another archive",
            )
    _same_file(size, tag, known)
    if start > first or (status == 206 and (start != first or end != min(stop, size))):
        raise _AskAgain(f"bytes {start} to {end} came instead of {first} to {min(stop, size)}")
    body = _body(client, response, end - start, began)
    if len(body) != end - start:
        raise _AskAgain(f"the answer broke off after {len(body)} of {end - start} bytes")
    return Answer(body[first - start : stop - start], size, tag)


def _body(client: _Client, response: Any, length: int, began: float) -> bytes:
    parts, have = [], 0
    while have <= length:
        part = response.read1(_PIECE)
        if not part:
            break
        parts.append(part)
        have += len(part)
        took = time.monotonic() - began
        if took > client.timeout_s and have < _SLOWEST * took:
            raise _AskAgain(f"only {have} bytes came in {took:.0f} s")
    return b"".join(parts)


def _content_range(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", text.strip())
    if not match:
        raise _AskAgain(f"the server does not say which part it sent ({text!r})")
    return int(match[1]), int(match[2]) + 1, int(match[3])


def _same_file(size: int, tag: str | None, known: Identity) -> None:
    if known.size is not None and size != known.size:
        raise _AskAgain(f"the file has {size} bytes, not {known.size}")
    if known.tag is not None and tag is not None and tag != known.tag:
        raise _AskAgain(f"the file is another one now (ETag {tag}, not {known.tag})")


def _refuse(address: Address, status: int, headers: Any) -> None:
    """Say what a status means that is no success."""
    if learn_region(address.href, headers.get("x-amz-bucket-region")):
        raise _AskAgain("the bucket is in another region", wait_s=0)
    if status in _AGAIN:
        raise _AskAgain(f"the server answered {status}", _retry_after(headers.get("Retry-After")))
    if status == 416:
        if headers.get("Content-Range", "").strip() == "bytes */0":
            raise SceneError("the file has zero bytes", fix="report it to the archive's owner")
        raise _AskAgain("the file ends before the range asked for")
    if status in (404, 410):
        raise SceneError(
            f"the server does not have the file ({status})",
            fix="make a new item lock, or report it to the archive's owner",
        )
    if status in (401, 403):
        raise SceneError(
            f"the server does not let it be read ({status})",
            allowed="files that are public, or signed by the source's hook or by credentials",
            fix=_LOGIN,
        )
    raise SceneError(f"the server answered {status}", fix=_LATER)


def _retry_after(text: str | None) -> float | None:
    """Seconds that a Retry-After header asks for; it holds seconds or a date."""
    if not text:
        return None
    if re.fullmatch(r"\s*\d+\s*", text):
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None


def _said(err: HTTPError) -> str:
    """What a library reports, on one line, without addresses and their secrets."""
    cause: Any = getattr(err, "reason", None) or err
    inner = [a for a in cause.args if isinstance(a, Exception)]
    kind = type(inner[-1] if inner else cause).__name__
    text = " ".join(str(inner[-1] if inner else cause).split())
    text = re.sub(r"^.*?(?:Connection|Pool)\w*\([^)]*\):? *", "", text) or text
    return hide_secrets(f"the connection failed ({kind}: {text[:160]})")
