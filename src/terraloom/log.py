"""Logging and progress: configured once by the command line, never at import."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

__all__ = ["configure", "get_logger", "hide_secrets", "progress"]

_SIGNATURE = re.compile(
    r"(?i)([?&](?:sig|(?:x-(?:amz|goog)-)?(?:signature|credential|security-token)|awsaccesskeyid|"
    r"(?:access_?|auth_?)?token|password|(?:(?:api|subscription)[_-]?)?key)=)[^&\s'\")]+"
)
_PASSWORD = re.compile(r"(?i)(\b[a-z][a-z0-9+.-]*://[^\s/@:'\"]*:)[^\s/'\"]+(?=@)")

T = TypeVar("T")


def hide_secrets(text: str) -> str:
    """A text whose addresses have lost passwords, signatures, tokens and keys."""
    return _PASSWORD.sub(r"\1***", _SIGNATURE.sub(r"\1***", text))


class _Discreet(logging.Formatter):
    """Lines without secrets, those of other libraries and of tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return hide_secrets(super().format(record))


def configure(verbose: bool = False) -> None:
    """Send log records to stderr with time and level; call once, from the command line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _Discreet("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    )
    level = logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for noisy in ("rasterio", "matplotlib", "fontTools", "botocore", "urllib3", "pyogrio", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def get_logger(name: str) -> logging.Logger:
    """Logger of a module, under the ``terraloom`` root."""
    return logging.getLogger(name)


def progress(items: Iterable[T], *, total: int | None = None, what: str = "tiles") -> Iterator[T]:
    """Iterate and log ``what`` done of all with the time left, at most about every 5 seconds.

    A log line, not a moving bar: the same text is readable in a job log of a cluster.
    """
    log = get_logger("terraloom.progress")
    if total is None and isinstance(items, Sized):
        total = len(items)
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= 5 or done == total:
            last = now
            if total:
                left = (now - start) / done * (total - done)
                log.info("%s: %d of %d done, about %.0f s left", what, done, total, left)
            else:
                log.info("%s: %d done", what, done)
