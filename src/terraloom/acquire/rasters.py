"""Rasters on disk and behind addresses, opened the same way.

GDAL reads remote rasters through :mod:`terraloom.acquire.fetch`. A pixel leaves the ``with`` block
of :func:`open_raster` only when every byte behind it came right.
"""

from __future__ import annotations

import posixpath
import re
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import rasterio
from rasterio.abc import MultiByteRangeResourceContainer
from rasterio.errors import RasterioError

from terraloom.acquire.fetch import Address, Identity, fetch_range, fetch_ranges, is_remote
from terraloom.errors import SceneError
from terraloom.io import GDAL_ENV, allowed_format, open_file

__all__ = ["open_raster", "plain_tag", "remote_identity"]

#: Bytes of the first request: the directory of most rasters, and often their smallest overview.
_HEAD = 1 << 15
#: Reads up to this size, of directories mostly, are made in larger pieces, of which the last few
#: are kept.
_SMALL = 1 << 12
_PIECE = 1 << 15
_PIECES = 64
#: Ranges with less than this between them are one request ...
_GAP = 1 << 12
#: ... up to this size; larger ones are divided, so that they come side by side.
_SPAN = 1 << 21
#: Wait before a file is asked for again that came as something else, seconds.
_WORDS_S = 1.0
#: Beginnings of files that are kept, by address.
_HEADS = 512

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")

_heads: OrderedDict[str, tuple[Identity, bytes]] = OrderedDict()
_guard = threading.Lock()


@contextmanager
def open_raster(
    href: str, *, sign: str | None = None, size: int | None = None, etag: str | None = None
) -> Iterator[Any]:
    """Open a raster for reading, as a ``rasterio`` dataset.

    Args:
        href: Path, http(s) or ``s3://`` address.
        sign: Name of the signing hook, or None.
        size: Bytes that the file must have, or None.
        etag: ETag that the file must have, or None.

    Raises:
        SceneError: The raster cannot be opened; or, when the block is left, what was read in it
            did not come right. It names no item; the caller does.
    """
    if not is_remote(href):
        with rasterio.Env(**GDAL_ENV), open_file(href) as src:
            yield src
        return
    remote = _Remote(Address(href, sign), Identity(size, plain_tag(etag)))
    # GDAL knows files by their names: one of its own for each opening.
    name = f"{uuid.uuid4().hex}/{posixpath.basename(urlsplit(href).path) or 'raster'}"
    try:
        with rasterio.Env(**GDAL_ENV):
            try:
                src = rasterio.open(name, opener=_Files(name, remote))
            except RasterioError as err:
                raise SceneError(f"the raster cannot be opened ({err})") from err
            with src:
                allowed_format(src)
                yield src
    except (RasterioError, SceneError) as err:
        _forget(href)
        remote.check(err)
        if isinstance(err, SceneError):
            # Names that GDAL made up would make every report another one.
            err.found = re.sub(r"\S*" + re.escape(name), posixpath.basename(name), err.found)
        raise
    remote.check()


def remote_identity(href: str, *, sign: str | None = None) -> Identity:
    """Size and tag that a remote raster has now.

    Raises:
        SceneError: It cannot be read, is empty, or is no raster.
    """
    _forget(href)
    return _Remote(Address(href, sign), Identity()).known


def plain_tag(etag: str | None) -> str | None:
    """An ETag without its quotes and its mark of weakness."""
    return etag.removeprefix("W/").strip('"') if etag else None


def _forget(href: str) -> None:
    with _guard:
        _heads.pop(href, None)


def _fits(found: Identity, wanted: Identity) -> bool:
    return wanted.size in (None, found.size) and wanted.tag in (None, found.tag)


class _Remote:
    """Bytes of one remote file: its beginning, pieces read lately, and what went wrong."""

    def __init__(self, address: Address, wanted: Identity) -> None:
        self.address = address
        self.known, self.head = self._begin(wanted)
        self.size = int(self.known.size or 0)
        self.pieces: OrderedDict[int, bytes] = OrderedDict()
        self.error: SceneError | None = None
        self.unfinished = 0

    def _begin(self, wanted: Identity) -> tuple[Identity, bytes]:
        """Size, tag and first bytes; kept in memory for files that can be told from later ones."""
        href = self.address.href
        with _guard:
            kept = _heads.get(href)
            if kept is not None:
                _heads.move_to_end(href)
        if kept is not None and _fits(kept[0], wanted):
            return kept
        answer = fetch_range(self.address, 0, _HEAD, wanted)
        if not answer.data.startswith(_MAGIC):
            # A busy archive may answer in words, with the status of success.
            time.sleep(_WORDS_S)
            answer = fetch_range(self.address, 0, _HEAD, wanted)
        if not answer.data.startswith(_MAGIC):
            raise SceneError(
                f"what came is no raster; it begins with {answer.data[:16]!r}",
                allowed="GeoTIFF or JPEG 2000",
                fix="the archive may ask for a login; try the address in a browser",
            )
        known = Identity(answer.size, answer.tag)
        if answer.tag is not None:
            with _guard:
                _heads[href] = (known, answer.data)
                while len(_heads) > _HEADS:
                    _heads.popitem(last=False)
        return known, answer.data

    def check(self, cause: Exception | None = None) -> None:
        """Raise what went wrong while GDAL was reading: its own reports do not always reach us."""
        if self.error is None and self.unfinished:
            self.error = SceneError("reading was interrupted", fix="run again")
        if self.error is not None:
            _forget(self.address.href)
            raise self.error from cause

    def read(self, first: int, stop: int) -> bytes:
        """One range, shorter at the file's end; empty after a failure."""
        first, stop = min(first, self.size), min(stop, self.size)
        return self.read_blocks([(first, stop)])[0]

    def read_blocks(self, spans: list[tuple[int, int]]) -> list[bytes]:
        """Several ranges inside the file; empty ones after a failure, which :meth:`check` tells.

        Nothing may be raised here: GDAL, which calls this, cannot pass it on.
        """
        self.unfinished += 1
        try:
            if any(stop > self.size for _, stop in spans):
                raise SceneError(
                    f"the file ends at {self.size} bytes, before its last block of pixels",
                    fix="it is truncated; report it to the archive's owner",
                )
            found = self._get(spans) if self.error is None else []
        except SceneError as err:
            self.error, found = err, []
        self.unfinished -= 1
        return found or [b""] * len(spans)

    def _get(self, spans: list[tuple[int, int]]) -> list[bytes]:
        out = [b""] * len(spans)
        large = []
        for n, (first, stop) in enumerate(spans):
            if stop <= len(self.head):
                out[n] = self.head[first:stop]
            elif len(spans) == 1 and stop - first <= _SMALL:
                out[n] = self._small(first, stop)
            else:
                large.append(n)
        if large:
            merged = _merge([spans[n] for n in large])
            cut = [p for a, b in merged for p in _cut(a, b)]
            parts = dict(zip(cut, fetch_ranges(self.address, cut, self.known), strict=True))
            for n in large:
                out[n] = _join(parts, *spans[n])
        return out

    def _small(self, first: int, stop: int) -> bytes:
        at = first - first % _PIECE
        wanted = range(at, stop, _PIECE)
        if any(start not in self.pieces for start in wanted):
            end = min(wanted[-1] + _PIECE, self.size)
            got = fetch_range(self.address, at, end, self.known).data
            self.pieces |= {start: got[start - at : start - at + _PIECE] for start in wanted}
        for start in wanted:
            self.pieces.move_to_end(start)
        data = b"".join(self.pieces[start] for start in wanted)[first - at : stop - at]
        while len(self.pieces) > _PIECES:
            self.pieces.popitem(last=False)
        return data


def _merge(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Fewer, longer spans that hold all of these."""
    merged: list[tuple[int, int]] = []
    for first, stop in sorted(spans):
        if merged and first - merged[-1][1] < _GAP:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((first, stop))
    return merged


def _cut(first: int, stop: int) -> list[tuple[int, int]]:
    return [(a, min(a + _SPAN, stop)) for a in range(first, stop, _SPAN)]


def _join(parts: dict[tuple[int, int], bytes], first: int, stop: int) -> bytes:
    """A span from the parts that hold it."""
    inside = sorted(p for p in parts if p[0] < stop and p[1] > first)
    if not inside:
        return b""
    data = b"".join(parts[p] for p in inside)
    return data[first - inside[0][0] : stop - inside[0][0]]


class _Handle:
    """A place in a remote file; GDAL opens a file more than once."""

    def __init__(self, remote: _Remote) -> None:
        self.remote, self.at = remote, 0

    def __enter__(self) -> _Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def close(self) -> None:
        """Nothing is held open."""

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.remote.size)[whence]
        return self.at

    def read(self, size: int = -1) -> bytes:
        stop = self.remote.size if size < 0 else self.at + size
        data = self.remote.read(self.at, stop)
        self.at += len(data)
        return data

    def get_byte_ranges(self, offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
        spans = [(int(a), int(a) + int(n)) for a, n in zip(offsets, sizes, strict=True)]
        # GDAL copies as many bytes as it asked for, so a missing range must have its length too.
        read = self.remote.read_blocks(spans)
        return [d.ljust(b - a, b"\0") for d, (a, b) in zip(read, spans, strict=True)]


class _Files(MultiByteRangeResourceContainer):  # type: ignore[misc]
    """A folder with this one file in it: nothing beside the raster is ever looked for."""

    def __init__(self, name: str, remote: _Remote) -> None:
        self.name, self.remote = name, remote

    def open(self, path: str, mode: str = "rb", **_: Any) -> _Handle:
        if not self.isfile(path) or "w" in mode:
            raise FileNotFoundError(path)
        return _Handle(self.remote)

    def isfile(self, path: str) -> bool:
        return path.lstrip("/") == self.name

    def isdir(self, path: str) -> bool:
        return False

    def ls(self, path: str) -> list[str]:
        return []

    def mtime(self, path: str) -> int:
        return 0

    def size(self, path: str) -> int:
        return self.remote.size

    def rm(self, path: str) -> None:
        raise FileNotFoundError(path)
