"""`python -m fastnorm bench`: the kernels beside NumPy and whichever peer is installed, in one interleaved run.

For each case all contenders take turns, round after round, so that a machine that slows down slows them all. Copies of
the same memory take part and give the ceiling. Several thread counts run one after the other, each in a process of its
own, because some peers take their thread count at start only. Refuses to compare what does not do the same work: a
peer without the operation leaves a gap.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import fastnorm
from fastnorm import _core
from fastnorm.cli import compare, measuring, peers, pictures, scores
from fastnorm.cli.calls import Arrays, bind, make_arrays
from fastnorm.cli.cases import Case, select_cases
from fastnorm.cli.ceilings import PREFIX, ceilings
from fastnorm.cli.info import facts, machine
from fastnorm.cli.peers.memory import keep_freed_memory
from fastnorm.cli.scores import OWN, OWN_ONE, OWN_OUT, Result, counted
from fastnorm.cli.screen import Screen, UsageError, require_plots, require_writable

Call = Callable[[], Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", default="*", metavar="PATTERNS", help="e.g. 'layer_norm*,dropout-8x64'")
    parser.add_argument("--dtypes", default="float32", help="float32, float64 or both with a comma (default: float32)")
    parser.add_argument(
        "--threads", default=None, help="for every contender, e.g. 1 or 1,2 (default: what fastnorm uses)"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="time for the rounds of one case (default: 1)")
    parser.add_argument(
        "--cold", action="store_true", help="time single calls, each after the caches were filled with something else"
    )
    parser.add_argument("--peers", default=None, help=f"default: every installed one of {','.join(peers.NAMES)}")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--json", metavar="FILE", help="write every number to FILE")
    parser.add_argument(
        "--plot", metavar="FILE",
        help="draw two pictures beside each other's name: FILE.png gives FILE-ratio.png, the time of the peers over "
        "fastnorm's, and FILE-roofline.png, GB/s against the size of the working set (.png, .svg, .pdf)",
    )  # fmt: skip
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)  # one of several counts of a run
    parser.add_argument(
        "--compare", nargs=2, metavar=("BEFORE", "AFTER"),
        help="compare two files written by --json, or by bench_kernels --benchmark_out=FILE, and measure nothing",
    )  # fmt: skip


def run(options: argparse.Namespace, screen: Screen) -> int:
    if options.compare:
        before, after = (compare.load(Path(file)) for file in options.compare)
        compare.show(before, after, screen)
        return 0
    cases = select_cases(options.cases, options.dtypes)
    if options.list:
        for case in cases:
            screen.line(f"{case.name} {case.dtype}: {case.bytes_moved / 1e6:.2f} MB moved ({' '.join(case.moves)})")
        return 0
    require_plots(options.plot)
    require_writable("--json", options.json)
    names = peers.chosen(options.peers)
    counts = _thread_counts(options.threads)
    command = "python -m fastnorm bench " + shlex.join(_arguments(options, options.threads))
    if len(counts) == 1:
        with fastnorm.num_threads(counts[0]):
            results = measure_all(cases, names, counts[0], options, screen)
            environment = facts() | machine() | {f"peer {name}": peers.installed()[name] for name in names}
        _show(results, screen)
    else:
        environment, results = _in_processes(counts, options)
    if not options.part:
        cold = ["", "Each time is that of a single call, after the caches were filled with something else."]
        for line in (*cold * options.cold, "", *scores.summary(results)):
            screen.line(line)
    if options.json:
        scores.write(Path(options.json), environment, command.strip(), results)
        if not options.part:
            screen.line(f"numbers: {options.json}")
    if options.plot:
        screen.line("pictures: " + ", ".join(map(str, pictures.draw(results, Path(options.plot)))))
    return 0


def _thread_counts(wanted: str | None) -> list[int]:
    if wanted is None:
        return [fastnorm.get_num_threads()]
    try:
        counts = [int(word) for word in wanted.split(",")]
    except ValueError:
        raise UsageError(f"--threads {wanted}: expected numbers, separated by commas") from None
    if min(counts) < 1:
        raise UsageError(f"--threads must be 1 or more, not {min(counts)}")
    return list(dict.fromkeys(counts))


def _arguments(options: argparse.Namespace, threads: str | None) -> list[str]:
    """The options that decide what is measured, as words of a command line."""
    given = {"cases": options.cases, "dtypes": options.dtypes, "threads": threads, "peers": options.peers}
    usual = {"cases": "*", "dtypes": "float32", "threads": None, "peers": None}
    words = [word for name, value in given.items() if value != usual[name] for word in (f"--{name}", value)]
    words += ["--cold"] * options.cold
    return words if options.seconds == 1.0 else [*words, "--seconds", f"{options.seconds:g}"]


def _in_processes(counts: Sequence[int], options: argparse.Namespace) -> tuple[dict[str, str], list[Result]]:
    """One process for each thread count, one after the other; what they measured, together."""
    results: list[Result] = []
    environment: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for threads in counts:
            file = Path(folder) / f"{threads}.json"
            words = ["bench", *_arguments(options, str(threads)), "--part", "--json", str(file)]
            words += ["--plain"] * options.plain
            subprocess.run([sys.executable, "-m", "fastnorm", *words], check=True)
            content, measured = scores.read(file)
            environment = content["environment"]
            results += measured
    return environment | {"threads": f"{', '.join(map(str, counts))} of {os.cpu_count()} CPUs"}, results


# ---------------------------------------------------------------------------------------------------------------------
# Contenders


def channels_last(a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same values and axes with axis 1 innermost in memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1)


def arrays_of(case: Case) -> Arrays:
    arrays = make_arrays(case.operation, case.shape, case.dtype, case.options)
    return arrays.laid_out(channels_last) if case.layout == "channels_last" else arrays


def own_calls(case: Case, arrays: Arrays, threads: int = 1) -> dict[str, Call]:
    """fastnorm as it is called; with a reused result, where the operation has `out=`; the same on one thread."""
    call = bind(fastnorm, case.operation, arrays, case.options)
    calls: dict[str, Call] = {OWN: call}
    result = call()
    out: Any
    if case.operation.startswith("dropout_add"):
        out = tuple(np.empty_like(arrays.x) for _ in range(2))
    else:
        result = result[0] if isinstance(result, tuple) else result
        if not isinstance(result, np.ndarray):
            return calls
        out = np.empty_like(result)
    try:
        call(out=out)
    except TypeError:  # no such argument: dropout_mask
        return calls
    calls[OWN_OUT] = reusing = partial(call, out=out)
    if threads > 1:

        def alone() -> None:
            with fastnorm.num_threads(1):
                reusing()

        calls[OWN_ONE] = alone
    return calls


def _ceiling_reads(case: Case) -> int:
    """Whether a copy (1) or a sum of two arrays (2) moves memory as the case does."""
    return 2 if len(case.moves) - case.moves.count("keep") > 2 else 1


def contenders(case: Case, names: Iterable[str], threads: int, pool: ThreadPoolExecutor) -> dict[str, Call]:
    """Everything that takes part in a case, ready to be called."""
    arrays = arrays_of(case)
    calls = own_calls(case, arrays, threads)
    calls |= ceilings([arrays.x, arrays.dy][: _ceiling_reads(case)], np.empty_like(arrays.x), threads, pool)
    for name in names:
        call = peers.load(name).prepare(case.operation, arrays, case.options, threads)
        if call is not None:
            calls[name] = call
    return calls


# ---------------------------------------------------------------------------------------------------------------------
# Measuring and showing


def spoiler() -> Call:
    """Fills the caches with something else."""
    memory = np.zeros(2 * _core.cache_bytes() // 8)
    return partial(np.add, memory, 1, out=memory)


def measure(
    case: Case, calls: dict[str, Call], seconds: float, threads: int, spoil: Call | None = None
) -> list[Result]:
    subject = OWN_OUT if OWN_OUT in calls else OWN
    timings = measuring.take_turns(calls, seconds, subject=subject, pause=threads > 1, spoil=spoil)
    given = case.elements * np.dtype(case.dtype).itemsize
    own_bytes, copied = case.bytes_moved, given * (_ceiling_reads(case) + 1)
    return [
        Result(
            case.name, case.operation, case.dtype, threads, name, *timing,
            bytes=copied if name.startswith(PREFIX) else own_bytes, input_bytes=given,
        )
        for name, timing in timings.items()
    ]  # fmt: skip


def measure_all(
    cases: Sequence[Case], names: Sequence[str], threads: int, options: argparse.Namespace, screen: Screen
) -> list[Result]:
    # Before any peer starts its OpenMP: its idle threads shall not spin into the turn of the next contender.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    if {"torch", "jax"} & set(names):
        keep_freed_memory()
    results: list[Result] = []
    spoil = spoiler() if options.cold else None
    with (
        ThreadPoolExecutor(threads) as pool,
        screen.progress(f"bench, {counted(threads, 'thread')}", len(cases)) as step,
    ):
        for case in cases:
            measured = measure(case, contenders(case, names, threads, pool), options.seconds, threads, spoil)
            results += measured
            own = scores.cells(measured)[0].own
            step(f"{case.name} {case.dtype}: {own.rate:.1f} GB/s")
    return results


def _show(results: list[Result], screen: Screen) -> None:
    for threads in dict.fromkeys(result.threads for result in results):
        group = [cell for cell in scores.cells(results) if cell.own.threads == threads]
        names = [name for name in peers.NAMES if any(name in cell.peers for cell in group)]
        header, rows = scores.table(group, names)
        screen.table(f"{counted(threads, 'thread')}, fastest round", header, rows, text_columns=2)
    for line in scores.legend():
        screen.line(line)
