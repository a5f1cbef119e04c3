"""`python -m fastnorm bench`: the kernels beside NumPy and whichever peer is installed, in one interleaved run.

For each case all contenders take turns, round after round, so that a machine that slows down slows them all; reported
are the fastest and the median round. A copy of the same number of bytes takes part: its rate is what the memory (or the
cache that the case fits in) gave at that moment. Refuses to compare what does not do the same work: a peer without the
operation leaves a gap.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import fastnorm
from fastnorm.cli import peers
from fastnorm.cli.calls import Arrays, bind, make_arrays
from fastnorm.cli.cases import Case, select_cases
from fastnorm.cli.info import facts
from fastnorm.cli.screen import Screen, UsageError, figure, require_plots, require_writable

# A sample lasts at least this long: the clock and the loop around the call are then below 1 %.
_SAMPLE_SECONDS = 200e-6
_MIN_ROUNDS, _MAX_ROUNDS = 5, 200
_COPY, _OWN, _OWN_OUT = "copy", "fastnorm", "fastnorm out="

Call = Callable[[], Any]


@dataclass(frozen=True)
class Result:
    """One contender on one case; seconds are per call."""

    case: str
    dtype: str
    contender: str
    seconds: float
    median: float
    rounds: int
    bytes: int

    @property
    def rate(self) -> float:
        """GB/s, counting the arrays that the operation has to move once."""
        return self.bytes / self.seconds / 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", default="*", metavar="PATTERNS", help="e.g. 'layer_norm*,dropout-8x64'")
    parser.add_argument("--dtypes", default="float32", help="float32, float64 or both with a comma (default: float32)")
    parser.add_argument("--threads", type=int, default=None, help="for every contender (default: what fastnorm uses)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for the rounds of one case (default: 1)")
    parser.add_argument("--peers", default=None, help=f"default: every installed one of {','.join(peers.NAMES)}")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--json", metavar="FILE", help="write every number to FILE")
    parser.add_argument("--plot", metavar="FILE", help="draw GB/s against the measured memory rate (.png, .svg, .pdf)")
    parser.add_argument(
        "--compare", nargs=2, metavar=("BEFORE", "AFTER"),
        help="compare two files written by --json, or by bench_kernels --benchmark_out=FILE, and measure nothing",
    )  # fmt: skip


def run(options: argparse.Namespace, screen: Screen) -> int:
    if options.compare:
        before, after = (_load(Path(file)) for file in options.compare)
        _compare(before, after, screen)
        return 0
    cases = select_cases(options.cases, options.dtypes)
    if options.list:
        for case in cases:
            screen.line(f"{case.name} {case.dtype}: {case.bytes_moved / 1e6:.2f} MB moved ({' '.join(case.moves)})")
        return 0
    require_plots(options.plot)
    require_writable("--json", options.json)
    names = _peer_names(options.peers)
    threads = fastnorm.get_num_threads() if options.threads is None else options.threads
    if threads < 1:
        raise UsageError(f"--threads must be 1 or more, not {threads}")
    with fastnorm.num_threads(threads):
        results = measure_all(cases, names, threads, options.seconds, screen)
        found = peers.installed()
        environment = facts() | {f"peer {name}": found[name] for name in names}
    _show(results, [_COPY, _OWN, _OWN_OUT, *names], threads, screen)
    if options.json:
        content = {"environment": environment, "threads": threads, "results": [asdict(result) for result in results]}
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        screen.line(f"numbers: {options.json}")
    if options.plot:
        _plot(results, threads, options.plot)
        screen.line(f"picture: {options.plot}")
    return 0


def _peer_names(wanted: str | None) -> list[str]:
    found = peers.installed()
    if wanted is None:
        return list(found)
    names = [name for name in wanted.split(",") if name]
    for name in names:
        if name not in peers.NAMES:
            raise UsageError(f"--peers {name}: unknown; there are {', '.join(peers.NAMES)}")
        if name not in found:
            raise UsageError(f"--peers {name}: not installed here")
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Contenders


def channels_last(a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same values and axes with axis 1 innermost in memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1)


def arrays_of(case: Case) -> Arrays:
    arrays = make_arrays(case.operation, case.shape, case.dtype, case.options)
    return arrays.laid_out(channels_last) if case.layout == "channels_last" else arrays


def own_calls(case: Case, arrays: Arrays) -> dict[str, Call]:
    """fastnorm as it is called, and with a reused result where the operation has `out=`."""
    call = bind(fastnorm, case.operation, arrays, case.options)
    calls: dict[str, Call] = {_OWN: call}
    result = call()
    result = result[0] if isinstance(result, tuple) else result
    if isinstance(result, np.ndarray) and not case.operation.startswith("dropout_add"):
        out = np.empty_like(result)
        try:
            call(out=out)
        except TypeError:  # no such argument: dropout_mask
            return calls
        calls[_OWN_OUT] = partial(call, out=out)
    return calls


class _Copier:
    """Copies half of the bytes that a case moves, so that reading and writing them moves as many as the case does."""

    def __init__(self, size: int, threads: int, pool: ThreadPoolExecutor) -> None:
        source = np.ones(max(size // 2, 64), np.uint8)
        target = np.zeros_like(source)
        self._whole = partial(np.copyto, target, source)
        parts = zip(np.array_split(target, threads), np.array_split(source, threads), strict=True)
        self._parts = [partial(np.copyto, to, of) for to, of in parts]
        self._pool = pool

    def split(self) -> None:
        for done in [self._pool.submit(part) for part in self._parts]:
            done.result()

    def __call__(self) -> None:
        self._whole()

    def best(self) -> Call:
        """In parts where that is faster (starting the threads has its price), else in one."""
        if len(self._parts) == 1:
            return self._whole
        return min((self.__call__, self.split), key=lambda call: min(_time(call, 1) for _ in range(5)))


def contenders(case: Case, names: Iterable[str], threads: int, pool: ThreadPoolExecutor) -> dict[str, Call]:
    """Everything that takes part in a case, ready to be called."""
    arrays = arrays_of(case)
    calls: dict[str, Call] = {_COPY: _Copier(case.bytes_moved, threads, pool).best(), **own_calls(case, arrays)}
    for name in names:
        call = peers.load(name).prepare(case.operation, arrays, case.options, threads)
        if call is not None:
            calls[name] = call
    return calls


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def _time(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure(case: Case, calls: dict[str, Call], seconds: float) -> list[Result]:
    """Let all contenders take turns for about `seconds`; each turn starts with a call that is not timed."""
    repeats = {}
    for name, call in calls.items():
        call()  # compiles, faults pages in, starts threads
        once = min(_time(call, 1) for _ in range(3))
        repeats[name] = max(1, round(_SAMPLE_SECONDS / max(once, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < _MIN_ROUNDS or (rounds < _MAX_ROUNDS and time.perf_counter() < end):
        for name in order:
            calls[name]()
            samples[name].append(_time(calls[name], repeats[name]))
        order.append(order.pop(0))  # nobody always follows the same neighbour
        rounds += 1
    return [
        Result(case.name, case.dtype, name, min(times), statistics.median(times), rounds, case.bytes_moved)
        for name, times in samples.items()
    ]


def measure_all(
    cases: Sequence[Case], names: Sequence[str], threads: int, seconds: float, screen: Screen
) -> list[Result]:
    results: list[Result] = []
    with ThreadPoolExecutor(threads) as pool, screen.progress("bench", len(cases)) as advance:
        for case in cases:
            results += measure(case, contenders(case, names, threads, pool), seconds)
            own = next(result for result in results[::-1] if result.contender == _OWN)
            advance(f"{case.name} {case.dtype}: {own.rate:.1f} GB/s")
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Showing


def duration(seconds: float) -> str:
    """Seconds with three digits and a unit that fits."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def by_case(results: Iterable[Result]) -> dict[tuple[str, str], dict[str, Result]]:
    grouped: dict[tuple[str, str], dict[str, Result]] = {}
    for result in results:
        grouped.setdefault((result.case, result.dtype), {})[result.contender] = result
    return grouped


def _show(results: list[Result], contenders: Sequence[str], threads: int, screen: Screen) -> None:
    others = [name for name in contenders if name not in (_COPY, _OWN)]
    header = ["case", "dtype", "fastnorm", "median", "GB/s", "copy", "share", *others]
    rows = []
    for (case, dtype), group in by_case(results).items():
        own, copy = group[_OWN], group[_COPY]
        rows.append([
            case, dtype, duration(own.seconds), duration(own.median), f"{own.rate:.1f}", f"{copy.rate:.1f}",
            f"{own.rate / copy.rate:.0%}",
            *(f"{group[name].seconds / own.seconds:.2f}x" if name in group else "-" for name in others),
        ])  # fmt: skip
    screen.table(f"{threads} thread{'s'[: threads != 1]}, fastest round", header, rows, text_columns=2)
    screen.line("GB/s: the arrays that have to be moved once, over the time; copy: a copy that moves as many bytes,")
    screen.line("in the same run; share: fastnorm's GB/s over the copy's; 2.00x: that contender takes twice the time.")


def _plot(results: list[Result], threads: int, file: str) -> None:
    grouped = by_case(results)
    names = [name for name in dict.fromkeys(result.contender for result in results) if name != _COPY]
    height = 0.8 / len(names)
    picture = figure(9, 1.2 + 0.16 * len(names) * len(grouped))
    axes = picture.subplots()
    for rank, name in enumerate(names):
        spots = [(row, group[name].rate) for row, group in enumerate(grouped.values()) if name in group]
        places = [row + (rank + 0.5) * height - 0.4 for row, _ in spots]
        axes.barh(places, [rate for _, rate in spots], height, label=name)
    for row, group in enumerate(grouped.values()):
        label = "copy (memory rate)" if row == 0 else None
        axes.plot([group[_COPY].rate] * 2, [row - 0.45, row + 0.45], color="black", label=label)
    axes.set_yticks(range(len(grouped)), [f"{case} {dtype}" for case, dtype in grouped])
    axes.set_ylim(len(grouped) - 0.5, -0.5)
    axes.set_xlabel(f"GB/s, {threads} thread{'s'[: threads != 1]}, fastest round")
    axes.legend()
    picture.savefig(file, dpi=120)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing two runs


def _load(file: Path) -> dict[str, tuple[float, float]]:
    """(fastest, median) seconds by name, from a file of `--json` or of google-benchmark."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if "benchmarks" in content:
            return _load_google(content["benchmarks"])
        results = [Result(**entry) for entry in content["results"]]
    except OSError as error:
        raise UsageError(f"--compare {file}: {os.strerror(error.errno or 0)}") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"--compare {file}: written neither by bench --json nor by google-benchmark") from None
    return {f"{r.case} {r.dtype} {r.contender}": (r.seconds, r.median) for r in results}


def _load_google(entries: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    units = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
    times: dict[str, list[float]] = {}
    for entry in entries:
        if entry.get("run_type", "iteration") == "iteration" and not entry.get("error_occurred"):
            times.setdefault(entry["run_name"], []).append(entry["real_time"] * units[entry["time_unit"]])
    return {name: (min(values), statistics.median(values)) for name, values in times.items()}


def _compare(before: dict[str, tuple[float, float]], after: dict[str, tuple[float, float]], screen: Screen) -> None:
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
