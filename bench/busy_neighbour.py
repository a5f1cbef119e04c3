"""Single calls beside processes that never rest: median, 99th percentile, worst, and the share of calls over 1 ms.

Shows what the operating system's scheduler does to a call, and what a second thread adds to it: nothing to a small
call, which stays on its thread, and little to a larger one, which does not wait for a thread that has not begun. Every
process that shares a core loses it for some milliseconds now and then, whatever it does: the row "no call" is a loop
of some microseconds that only computes. Draws no conclusion and asserts nothing.

    python bench/busy_neighbour.py [--seconds 2] [--neighbours N]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

import fastnorm as fn

ROW = "{:<34}{:>8}  {:>10}{:>10}{:>10}{:>12}"


def parts() -> dict[str, Callable[[], Any]]:
    rng = np.random.default_rng(0)
    calls: dict[str, Callable[[], Any]] = {}
    total = 0

    def no_call() -> None:
        nonlocal total
        for i in range(400):
            total += i

    calls["no call"] = no_call
    for shape in ((8, 64), (64, 768), (512, 768), (2048, 1024)):
        x, dy, out = (rng.standard_normal(shape, dtype=np.float32) for _ in range(3))
        weight = np.ones(shape[1], np.float32)
        _, cache = fn.layer_norm_forward(x, weight, weight)
        size = "x".join(map(str, shape))
        calls[f"layer_norm {size}"] = lambda x=x, w=weight, out=out: fn.layer_norm(x, w, w, out=out)
        calls[f"layer_norm_backward {size}"] = lambda dy=dy, c=cache, out=out: fn.layer_norm_backward(dy, c, out=out)
    return calls


def durations(call: Callable[[], Any], seconds: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Microseconds of every call in a run of some seconds."""
    for _ in range(5):
        call()
    found, clock = [], time.perf_counter
    end = clock() + seconds
    now = clock()
    while now < end:
        begin = clock()
        call()
        now = clock()
        found.append(now - begin)
    return np.array(found) * 1e6


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.3)
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def main() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each row")
    parser.add_argument("--neighbours", type=int, default=cores, help="processes that never rest (one per core)")
    options = parser.parse_args()
    for count in (0, options.neighbours):
        with neighbours(count):
            print(f"\n{count} busy neighbours on {cores} cores")
            print(ROW.format("", "threads", "median us", "p99 us", "worst us", "over 1 ms"))
            for name, call in parts().items():
                for threads in (1, cores) if name != "no call" else (1,):
                    with fn.num_threads(threads):
                        times = durations(call, options.seconds)
                    numbers = (np.median(times), np.percentile(times, 99), times.max())
                    over = f"{100 * np.mean(times > 1000):.3f} %"
                    print(ROW.format(name, threads, *(f"{value:.1f}" for value in numbers), over), flush=True)


if __name__ == "__main__":
    main()
