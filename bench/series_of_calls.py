"""The first calls of a series after a pause, in microseconds: what it takes until all threads are at work.

Helpers sleep in a pause. The first call begins alone; it wakes them if it is long, or if series were the custom the
last time. "moved": before each pause the caller is put on the next CPU in turn, as the system may do where others work
too. Medians over many series. Draws no conclusion and asserts nothing.

    python bench/series_of_calls.py [--series 300] [--calls 8] [--pause 0.001]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import fastnorm as fn


def parts() -> dict[str, Callable[[], Any]]:
    rng = np.random.default_rng(0)
    found: dict[str, Callable[[], Any]] = {}
    for shape in ((64, 256), (1568, 64), (8192, 30), (512, 768), (2048, 1024)):
        x, dy, out = (rng.standard_normal(shape, dtype=np.float32) for _ in range(3))
        _, cache = fn.batch_norm_forward(x)
        size = "x".join(map(str, shape))
        found[f"batch_norm_forward {size}"] = lambda x=x, out=out: fn.batch_norm_forward(x, out=out)
        found[f"batch_norm_backward {size}"] = lambda dy=dy, c=cache, out=out: fn.batch_norm_backward(dy, c, out=out)
    return found


def series(
    call: Callable[[], Any], options: argparse.Namespace, moves: list[set[int]]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Times of shape (series, calls)."""
    times = np.empty((options.series, options.calls))
    for i in range(options.series):
        if moves:
            everywhere = os.sched_getaffinity(0)
            os.sched_setaffinity(0, moves[i % len(moves)])
            os.sched_setaffinity(0, everywhere)
        time.sleep(options.pause)
        marks = [time.perf_counter()]
        for _ in range(options.calls):
            call()
            marks.append(time.perf_counter())
        times[i] = np.diff(marks)
    return times * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--series", type=int, default=300)
    parser.add_argument("--calls", type=int, default=8, help="in each series")
    parser.add_argument("--pause", type=float, default=1e-3, help="seconds between two series")
    options = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    cores = len(cpus) or os.cpu_count() or 1
    rows: list[tuple[str, int, list[set[int]]]] = [("1 thread", 1, []), (f"{cores} threads", cores, [])]
    if len(cpus) > 1:
        rows.append((f"{cores} threads, moved", cores, [{cpu} for cpu in cpus]))
    for name, call in parts().items():
        print(name)
        for title, threads, moves in rows:
            with fn.num_threads(threads):
                call()
                medians = np.median(series(call, options, moves), axis=0)
            print(f"  {title:<20}" + "".join(f"{value:>8.1f}" for value in medians), flush=True)


if __name__ == "__main__":
    main()
