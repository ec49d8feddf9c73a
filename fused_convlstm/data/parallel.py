"""Work in several processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.connection import wait as wait_for_connections
from typing import TypeVar

import cv2

Job = TypeVar("Job")
Result = TypeVar("Result")


def resolve_workers(workers: int | None) -> int:
    """None: one per core."""
    if workers is None:
        return os.cpu_count() or 1
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more, got {workers}")
    return workers


def run_jobs(function: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[Result]:
    """Results as they come, in any order; with 0 workers in this process. Jobs are drawn lazily.

    An exception of a job ends the iteration; jobs not yet started are dropped.
    """
    if workers == 0:
        yield from map(function, jobs)
        return
    # Fresh processes: forking one that already runs PyTorch's and OpenCV's threads can deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        running: set[Future[Result]] = set()
        try:
            for job in jobs:
                running.add(pool.submit(function, job))
                if len(running) >= 4 * workers:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """One thread per worker, and an end with the parent, even one that was killed."""
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        wait_for_connections([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
