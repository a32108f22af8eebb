"""Work on many items at once, in threads that never keep a process from ending."""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def spread(work: Callable[[T], R], items: Sequence[T], threads: int) -> list[R]:
    """`work` on each item. Those of `concurrent.futures` would be joined when the process ends, queue and all.

    Args:
        work: Called in any thread, for the first items first.
        items: In any number.
        threads: How many are worked on at a time.

    Returns:
        The results, in the order of the items.

    Raises:
        BaseException: The first that `work` raises. Nothing is begun after it; what was begun is left to itself.
    """
    results: list[Any] = [None] * len(items)
    left, lock, ended = iter(range(len(items))), threading.Lock(), threading.Event()
    outcomes: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            while not ended.is_set():
                with lock:
                    i = next(left, None)
                if i is None:
                    break
                results[i] = work(items[i])
        except BaseException as error:
            outcomes.put(error)
        else:
            outcomes.put(None)

    workers = [threading.Thread(target=run, daemon=True) for _ in range(min(threads, len(items)))]
    try:
        for worker in workers:
            worker.start()
        for _ in workers:
            error = outcomes.get()
            if error is not None:
                raise error
    finally:
        ended.set()
    return results
