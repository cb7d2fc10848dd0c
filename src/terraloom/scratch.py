"""Temporary names that tell whose they are, and the removal of what killed processes left.

A temporary file or folder stands beside what it will become, so that a rename finishes it. A
process that is killed cannot remove its own. So the name holds the process and its machine:
``.tmp-store-4711@node3-x8ab2c1d``. :func:`sweep` removes those whose process is gone.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["MARK", "alive", "host_name", "prefix", "scratch_folder", "staging", "sweep"]

#: Every temporary name begins so.
MARK = ".tmp-"
#: A temporary of another machine, whose processes cannot be asked, counts as left behind when
#: nothing was written to it for so long, seconds.
_ABANDONED_S = 2 * 24 * 3600

#: Times that a folder is removed at most, and looks in a row that must find it absent.
_TRIES, _QUIET = 40, 4

#: Folders of every system. TMPDIR with one of them says nothing: Snakemake sets it for each job.
_COMMON = ("/tmp", "/var/tmp", "/usr/tmp")

_NAME = re.compile(rf"{re.escape(MARK)}(?:[a-z]+-)?(\d+)@([A-Za-z0-9_.]*)-")


def host_name() -> str:
    """Name of this machine, as temporary names hold it."""
    return re.sub(r"[^A-Za-z0-9_.]", "_", socket.gethostname())[:40]


def prefix(kind: str = "") -> str:
    """Begin of a temporary name of this process.

    Args:
        kind: What it is for, small letters.
    """
    return f"{MARK}{kind}{'-' if kind else ''}{os.getpid()}@{host_name()}-"


def staging(parent: Path) -> Path:
    """Folder for temporaries that are read again and not renamed.

    They are the parts of a store before it is zipped, a raster before it is a COG, rows of chips.
    The folder is ``TMPDIR`` where it names a folder of its own, as on the nodes of a cluster, else
    ``parent``: a workstation's ``/tmp`` may be small, or be memory.

    Args:
        parent: Folder of the final file.
    """
    chosen = os.environ.get("TMPDIR", "").rstrip("/")
    return Path(chosen) if chosen and chosen not in _COMMON else parent


@contextmanager
def scratch_folder(parent: Path, kind: str) -> Iterator[Path]:
    """A folder inside ``parent`` that vanishes at the end, also after an error.

    Args:
        parent: Made if it is not there.
        kind: What it is for, small letters.
    """
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix(kind)))
    try:
        yield folder
    except BaseException:
        _remove_for_good(folder)
        raise
    shutil.rmtree(folder)


def _remove_for_good(folder: Path) -> None:
    """Remove a folder that threads still fill: zarr's go on after one of them has failed.

    What comes after the last look is swept when the run ends.
    """
    absent = 0
    for _ in range(_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        absent = 0 if folder.exists() else absent + 1
        if absent > _QUIET:
            return
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


def sweep(folders: Iterable[Path]) -> list[Path]:
    """Remove the temporaries of processes that are gone, below some folders.

    Those of living processes of this machine stay. Those of other machines stay until nothing was
    written to them for two days.

    Returns:
        What was removed.
    """
    removed = []
    for folder in folders:
        for path in _marked(folder):
            if _left_behind(path):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
                removed.append(path)
    return sorted(removed)


def _marked(folder: Path) -> Iterator[Path]:
    """Temporaries below a folder; none inside another one."""
    for root, folders, files in os.walk(folder):
        yield from (Path(root, name) for name in (*folders, *files) if name.startswith(MARK))
        folders[:] = [name for name in folders if not name.startswith(MARK)]


def _left_behind(path: Path) -> bool:
    told = _NAME.match(path.name)
    if told and told[2] == host_name():
        return not alive(int(told[1]))
    try:
        return time.time() - path.lstat().st_mtime > _ABANDONED_S
    except FileNotFoundError:
        return False  # its process was faster
