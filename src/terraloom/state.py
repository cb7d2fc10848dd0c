"""What a rule depends on besides its files: the code it calls, by content and not by clock."""

from __future__ import annotations

import ast
import hashlib
from functools import lru_cache
from pathlib import Path

__all__ = ["code_digest", "files_digest"]

_ROOT = Path(__file__).parent
_PACKAGE = "terraloom"


@lru_cache(maxsize=256)
def code_digest(*modules: str) -> str:
    """Digest of the source of modules and of all package modules that they import.

    Nothing is imported: the import statements are read from the source, so this is quick and
    the same on every machine. Comments and layout do not count, docstrings do.

    Args:
        *modules: Dotted names below ``terraloom``, such as ``"preprocess.masks"``.
    """
    todo = [f"{_PACKAGE}.{m}" for m in modules]
    seen: dict[str, str] = {}
    while todo:
        name = todo.pop()
        file = _file_of(name)
        if name in seen or file is None:
            continue
        tree, digest = _parsed(file)
        seen[name] = digest
        todo.extend(_imports(tree))
    text = "".join(f"{n}:{d};" for n, d in sorted(seen.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@lru_cache(maxsize=32)
def files_digest(folder: str) -> str:
    """Digest of the data files (not Python) in a folder of the package, such as templates."""
    h = hashlib.sha256()
    for file in sorted((_ROOT / folder).iterdir()):
        if file.is_file() and file.suffix != ".py":
            h.update(file.name.encode() + b"\0" + file.read_bytes())
    return h.hexdigest()[:16]


@lru_cache(maxsize=256)
def _parsed(file: Path) -> tuple[ast.Module, str]:
    tree = ast.parse(file.read_bytes())
    return tree, hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _file_of(name: str) -> Path | None:
    parts = name.split(".")[1:]
    base = _ROOT.joinpath(*parts)
    for file in (base.with_suffix(".py"), base / "__init__.py"):
        if parts and file.is_file():
            return file
    return None


def _imports(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(_PACKAGE):
            found.append(str(node.module))
            found.extend(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.extend(a.name for a in node.names if a.name.startswith(_PACKAGE))
    return found
