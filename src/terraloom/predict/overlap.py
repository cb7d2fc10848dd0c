"""Work on windows: several at once on processors, one after the other beside a GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

__all__ = ["overlapped", "side_by_side"]

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


def side_by_side(
    items: Iterable[Item],
    work: Callable[[Item], None],
    workers: int,
    begin: Callable[[], None] = lambda: None,
) -> None:
    """Work on items in several threads, each of which does all the work on an item.

    Items begin in their order. At most ``workers`` are in work, whose number bounds the memory.

    Args:
        items: The items.
        work: What to do with each.
        workers: Threads (count).
        begin: Called once in each thread before its first item.

    Raises:
        Exception: The first error; items that wait are not begun, those in work are finished.
    """
    todo = iter(items)
    with ThreadPoolExecutor(workers, initializer=begin) as pool:
        running = {pool.submit(work, item) for item in islice(todo, workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            running |= {pool.submit(work, item) for item in islice(todo, len(done))}
