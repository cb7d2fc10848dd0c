"""Fixtures of several test files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.states import ENV


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks on one thread: sums in one order give the same bytes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def committer() -> Iterator[None]:
    """Commits need a name, and the settings of the machine must not count."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in ENV.items():
            patch.setenv(key, value)
        yield
