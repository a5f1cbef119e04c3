"""`bench --compare BEFORE AFTER`: two runs side by side, of `bench --json` or of google-benchmark. Measures nothing."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

from fastnorm.cli import scores
from fastnorm.cli.scores import counted, duration
from fastnorm.cli.screen import Screen, UsageError

Times = dict[str, tuple[float, float]]


def load(file: Path) -> Times:
    """(fastest, median) seconds by name, from a file of either kind."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if "benchmarks" in content:
            return _google(content["benchmarks"])
        _, results = scores.read(file)
    except OSError as error:
        raise UsageError(f"--compare {file}: {os.strerror(error.errno or 0)}") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"--compare {file}: written neither by bench --json nor by google-benchmark") from None
    return {f"{r.case} {r.dtype} {counted(r.threads, 'thread')}: {r.contender}": (r.seconds, r.median) for r in results}


def _google(entries: list[dict[str, Any]]) -> Times:
    units = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
    times: dict[str, list[float]] = {}
    for entry in entries:
        if entry.get("run_type", "iteration") == "iteration" and not entry.get("error_occurred"):
            times.setdefault(entry["run_name"], []).append(entry["real_time"] * units[entry["time_unit"]])
    return {name: (min(values), statistics.median(values)) for name, values in times.items()}


def show(before: Times, after: Times, screen: Screen) -> None:
    shared = [name for name in before if name in after]
    if not shared:
        raise UsageError("--compare: the two files have no case in common")
    rows = [
        [name, duration(before[name][0]), duration(after[name][0]), f"{after[name][0] / before[name][0]:.3f}",
         f"{after[name][1] / before[name][1]:.3f}"]
        for name in shared
    ]  # fmt: skip
    screen.table("After over before (below 1: faster)", ["case", "before", "after", "fastest", "median"], rows)
    left_out = len(before) + len(after) - 2 * len(shared)
    if left_out:
        screen.line(f"{left_out} entries are in only one of the files")
