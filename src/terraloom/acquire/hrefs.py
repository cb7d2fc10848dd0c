"""Addresses from outside: what of them may be read, and how they become names of files."""

from __future__ import annotations

import os.path
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from terraloom.acquire.hosts import may_lead_to
from terraloom.errors import SceneError

__all__ = [
    "SCHEME", "UNSAFE", "absolute_path", "guard_link", "is_s3", "is_url", "safe_href", "safe_id",
]  # fmt: skip

#: How an address begins that is no path.
SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")

#: Characters that names of files do not have.
UNSAFE = re.compile(r"[^A-Za-z0-9._-]")

_ID_BYTES = 180
_S3 = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[^?#\\\s]+")


def is_url(href: str) -> bool:
    """Whether an address is http(s)."""
    return href.lower().startswith(("http://", "https://"))


def is_s3(href: str) -> bool:
    """Whether an address is ``s3://bucket/key``."""
    return _S3.fullmatch(href) is not None and ".." not in href.split("/")


def safe_id(item_id: str) -> str:
    """Item id as part of a file name.

    Characters other than letters, digits, ``.``, ``_`` and ``-`` become ``_``.

    Raises:
        SceneError: The id holds path separators, could leave its folder, hide itself, or is empty
            or too long.
    """
    if (
        not item_id or ".." in item_id or re.search(r"[/\\]", item_id)
        or item_id.startswith((".", "-"))
    ):  # fmt: skip
        raise SceneError(
            f"item id {item_id!r} is not allowed",
            where="catalogue",
            allowed="ids without `..`, `/` and `\\` that do not start with `.` or `-`",
            fix="report it to the catalogue's owner; no such item is read",
        )
    if len(item_id.encode()) > _ID_BYTES:
        raise SceneError(
            f"item id of {len(item_id.encode())} bytes: {item_id[:40]!r}...",
            where="catalogue",
            allowed=f"at most {_ID_BYTES} bytes",
        )
    return UNSAFE.sub("_", item_id)


def safe_href(href: str, catalogue: str, *, allow_local: bool = False) -> str:
    """Address of an asset that may be read, or an error.

    Args:
        href: Absolute address from an item.
        catalogue: Address of the catalogue the item came from.
        allow_local: Any file of this machine may be named (``scenes.allow_local_files``).

    Returns:
        The URL, the ``s3://`` address, or the path relative to the working directory.

    Raises:
        SceneError: Neither http(s) nor s3 nor local; a local file or a host of a private network
            named by a remote catalogue; a file outside the folder of a local catalogue; or a
            virtual raster (which can name others).
    """
    allowed = "http(s) and s3 addresses" + (
        "" if is_url(catalogue) else f", or files below {_root(catalogue)}"
    )
    path = urlsplit(href).path if is_url(href) else href
    if path.lower().endswith((".vrt", ".xml")) or any(ord(c) < 32 for c in href):
        raise SceneError(f"asset address {href!r} is not a raster file", allowed=allowed)
    if is_url(href) or is_s3(href):
        may_lead_to(href, catalogue)
        return href
    if href.lower().startswith("file://"):
        href = unquote(urlsplit(href).path)
    outside = is_url(catalogue) and not (allow_local and Path(href).is_absolute())
    if outside or SCHEME.match(href) or href.startswith("/vsi"):
        raise SceneError(
            f"asset address {href!r} is refused",
            where=catalogue,
            allowed=allowed,
            fix="use a catalogue that serves its files over https, or download them behind a "
            "catalogue of your own; scenes.allow_local_files lets a catalogue that you trust name "
            "files of this machine",
        )
    # Compared as text: links inside the folder (DVC makes them) may point to a cache elsewhere.
    root = _root(catalogue)
    full = Path(absolute_path(href))
    if not allow_local and not full.is_relative_to(root):
        raise SceneError(
            f"asset {href!r} leaves the catalogue",
            where=catalogue,
            allowed=allowed,
            fix="put catalog.json above the files, or set scenes.allow_local_files",
        )
    return _relative(full)


def _root(catalogue: str) -> Path:
    return Path(absolute_path(catalogue)).parent


def absolute_path(path: str | Path) -> str:
    """A path from the root, without ``..``; links are not followed."""
    return os.path.normpath(Path.cwd() / path)


def _relative(path: Path) -> str:
    return Path(os.path.relpath(path, Path.cwd())).as_posix()


def guard_link(href: str, catalogue: str) -> None:
    """Refuse a link that leads to a file outside the catalogue."""
    if is_url(href):
        return may_lead_to(href, catalogue)
    inside = not is_url(catalogue) and not SCHEME.match(href)
    if not (inside and Path(absolute_path(href)).is_relative_to(_root(catalogue))):
        raise SceneError(
            f"link {href!r} leaves the catalogue",
            where=catalogue,
            fix="report it to the catalogue's owner",
        )
