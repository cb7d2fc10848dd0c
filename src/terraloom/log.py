"""Logging and progress: configured once by the command line, never at import."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

__all__ = ["configure", "get_logger", "progress"]

T = TypeVar("T")


def configure(verbose: bool = False) -> None:
    """Send log records to stderr with time and level; call once, from the command line."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
        force=True,
    )
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
