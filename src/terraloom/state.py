"""What a rule depends on besides its files: the code it calls, by content and not by clock."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dis import opmap
from functools import lru_cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import cast

__all__ = ["code_digest", "files_digest"]

_ROOT = Path(__file__).parent
_PACKAGE = "terraloom"


@lru_cache(maxsize=256)
def code_digest(*modules: str) -> str:
    """Digest of the code of modules and of all package modules that they import.

    Nothing is imported: instructions, constants and names are taken from the compiled source,
    which Python keeps beside it. So this is quick, and the same for one release of Python (such
    as 3.11). Comments and blank lines do not count, docstrings do.

    Args:
        *modules: Dotted names below ``terraloom``, such as ``"preprocess.masks"``.
    """
    todo = [f"{_PACKAGE}.{m}" for m in modules]
    seen: dict[str, str] = {}
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        file = _file_of(name)
        if file is not None:
            seen[name], imports = _compiled(name, file)
            todo.extend(imports)
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


@lru_cache(maxsize=1024)
def _file_of(name: str) -> Path | None:
    parts = name.split(".")[1:]
    base = _ROOT.joinpath(*parts)
    for file in (base.with_suffix(".py"), base / "__init__.py"):
        if parts and file.is_file():
            return file
    return None


@lru_cache(maxsize=1024)
def _compiled(name: str, file: Path) -> tuple[str, tuple[str, ...]]:
    """Digest of a module's own code, and the package modules it imports anywhere in it."""
    code = cast(CodeType, SourceFileLoader(name, str(file)).get_code(name))
    h, imports = hashlib.sha256(), set[str]()
    for part in _parts(code):
        for content in (
            part.co_name, part.co_flags, part.co_argcount, part.co_posonlyargcount,
            part.co_kwonlyargcount, part.co_code, part.co_exceptiontable, part.co_names,
            part.co_varnames, part.co_cellvars, part.co_freevars,
        ):  # fmt: skip
            h.update(repr(content).encode() + b"\0")
        h.update("\0".join(map(_written, part.co_consts)).encode() + b"\0")
        imports.update(_imports(part))
    return h.hexdigest(), tuple(sorted(imports))


def _parts(code: CodeType) -> Iterator[CodeType]:
    """A module's code and that of its functions and classes, in the order of the source."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts(constant)


def _written(constant: object) -> str:
    """A constant as text: the same in every process, unlike the order of a set."""
    if isinstance(constant, CodeType):
        return "code"
    if isinstance(constant, tuple | frozenset):
        words = [_written(v) for v in constant]
        kind = "tuple" if isinstance(constant, tuple) else "set"
        return f"{kind}({','.join(words if kind == 'tuple' else sorted(words))})"
    return f"{type(constant).__name__} {constant!r}"


def _imports(code: CodeType) -> Iterator[str]:
    """Names that ``import terraloom...`` and ``from terraloom... import ...`` may load."""
    if not any(name.startswith(_PACKAGE) for name in code.co_names):
        return
    high = constant = 0
    for operation, low in zip(code.co_code[::2], code.co_code[1::2], strict=True):
        argument = high << 8 | low
        high = argument if operation == opmap["EXTENDED_ARG"] else 0
        if operation == opmap["LOAD_CONST"]:
            constant = argument
        elif operation == opmap["IMPORT_NAME"]:
            module = code.co_names[argument]
            if module.startswith(_PACKAGE):
                yield module
                # The constant loaded last holds the names after `import`, or None.
                yield from (f"{module}.{name}" for name in code.co_consts[constant] or ())
