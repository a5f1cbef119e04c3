"""Scalers beside scikit-learn's: `python bench/scalers.py` prints times and ratios for `fit` and `transform`.

Promises interleaved rounds, the fastest of each, and numbers for the shapes below alone. Refuses to run without
scikit-learn.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# The installed package is measured: the source tree has no compiled module.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

import fastnorm as fn  # noqa: E402
from fastnorm import preprocessing as ours  # noqa: E402


def fastest(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest call of each, taken in turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def tables() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((100_000, 64), dtype=np.float32)
    gaps = wide.copy()
    gaps[rng.random(wide.shape) < 0.01] = np.nan
    return {
        "100000 x 64 float32": wide,
        "100000 x 64 float64": wide.astype(np.float64),
        "100000 x 64 float32, 1 % NaN": gaps,
        "1000 x 20 float32": wide[:1000, :20].copy(),
    }


def main() -> None:
    from sklearn import preprocessing as theirs

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds

    def on(threads: int, call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with fn.num_threads(threads):
                return call()

        return run

    print(f"{'':46}  {'scikit-learn':>12}  {'1 thread':>20}  {'2 threads':>20}")
    for name, x in tables().items():
        for kind in ("StandardScaler", "MinMaxScaler"):
            ready = {module: getattr(module, kind)().fit(x) for module in (ours, theirs)}
            for method in ("fit", "transform"):

                def call(module: Any, kind: str = kind, method: str = method, x: Any = x, ready: Any = ready) -> Any:
                    return lambda: getattr(getattr(module, kind)() if method == "fit" else ready[module], method)(x)

                found = fastest({"sk": call(theirs), "one": on(1, call(ours)), "two": on(2, call(ours))}, rounds)
                cells = [f"{1e3 * found[k]:8.3f} ms, {found['sk'] / found[k]:6.1f}x" for k in ("one", "two")]
                print(f"{f'{kind}.{method}, {name}':46}  {1e3 * found['sk']:9.3f} ms  {cells[0]:>20}  {cells[1]:>20}")


if __name__ == "__main__":
    main()
