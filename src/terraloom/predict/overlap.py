"""Reading ahead and writing behind, while the networks compute."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

__all__ = ["overlapped"]

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Result = TypeVar("Result")


def overlapped(
    items: Iterable[Item],
    load: Callable[[Item], Loaded],
    compute: Callable[[Loaded], Result],
    store: Callable[[Item, Result], None],
    *,
    ahead: int = 1,
) -> None:
    """Run three steps for each item: load and store in a thread each, compute in this one.

    Items keep their order in every step. At most ``ahead`` loaded items wait, and one result is
    stored while the next is computed: memory does not grow with the number of items.

    Raises:
        Exception: The first error of any step; the steps after it are not run.
    """
    todo = iter(items)
    with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as writing:
        waiting: deque[tuple[Item, Future[Loaded]]] = deque(
            (item, reading.submit(load, item)) for item in islice(todo, ahead)
        )
        last: Future[None] | None = None
        try:
            while waiting:
                item, future = waiting.popleft()
                loaded = future.result()
                waiting.extend((i, reading.submit(load, i)) for i in islice(todo, 1))
                result = compute(loaded)
                if last is not None:
                    last.result()
                last = writing.submit(store, item, result)
            if last is not None:
                last.result()
        finally:
            reading.shutdown(cancel_futures=True)
