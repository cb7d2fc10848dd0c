"""Digests of code: what changes them and what does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from terraloom import state

A = '''"""A."""
from terraloom.low import number

LEVELS = {"a", "b", "c"}


def double() -> int:
    """Twice."""
    from terraloom.sub import late

    return 2 * number() + late.ONE
'''
LOW = "def number() -> int:\n    return 1\n"
FILES = {"a.py": A, "low.py": LOW, "sub/__init__.py": "", "sub/late.py": "ONE = 1\n", "b.py": ""}


def digest(folder: Path, monkeypatch: pytest.MonkeyPatch, **changed: str) -> str:
    """Digest of module `a` where the text of some files is another."""
    texts = FILES | {n.replace("__", "/") + ".py": t for n, t in changed.items()}
    place = folder / str(len(list(folder.iterdir())))
    for name, text in texts.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    monkeypatch.setattr(state, "_ROOT", place)
    for cached in (state.code_digest, state._file_of, state._compiled):
        cached.cache_clear()
    found = state.code_digest("a")
    for cached in (state.code_digest, state._file_of, state._compiled):
        cached.cache_clear()
    return found


def test_code_counts_comments_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    was = digest(tmp_path, monkeypatch)
    assert was == digest(tmp_path, monkeypatch)
    for same in (
        {"a": "# One.\n\n" + A.replace("    return", "\n    # Two.\n    return")},
        {"b": "THIS = 'is not imported'"},
    ):
        assert digest(tmp_path, monkeypatch, **same) == was, same
    for other in (
        {"a": A.replace("Twice", "Double")}, {"a": A.replace("2 *", "3 *")},
        {"a": A.replace("2 *", "2.0 *")}, {"a": A.replace('"c"', '"d"')},
        {"a": A.replace("number() +", "number() -")}, {"a": A.replace("-> int", "-> float")},
        {"low": LOW.replace("1", "2")}, {"sub__late": "ONE = 1.5\n"},
    ):  # fmt: skip
        assert digest(tmp_path, monkeypatch, **other) != was, other


def test_imports_inside_functions_and_of_modules_are_followed() -> None:
    name = "terraloom.predict.engine"
    file = state._file_of(name)
    assert file is not None
    _, imports = state._compiled(name, file)
    written = [w for line in file.read_text().splitlines() for w in line.split()[1:2]
               if line.lstrip().startswith("from terraloom")]  # fmt: skip
    assert len(written) > 5 and set(written) <= set(imports)


def test_the_digest_is_the_same_in_every_process() -> None:
    text = "from terraloom.state import code_digest; print(code_digest('train.run'))"
    told = {
        subprocess.run(
            [sys.executable, "-B", "-c", text], check=True, capture_output=True, text=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert told == {state.code_digest("train.run") + "\n"}
