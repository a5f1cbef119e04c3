"""The numbers of a bench run and what they amount to: read, written, tabulated, summed up. Measures nothing.

A run is a JSON file: `environment` (machine, versions, settings), `command`, and `results`, one entry for each
contender in each case, dtype and thread count.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, log
from pathlib import Path
from typing import Any

from fastnorm.cli.ceilings import PREFIX

OWN, OWN_OUT, OWN_ONE = "fastnorm", "fastnorm out=", "fastnorm out=, 1 thread"
# From these sizes on the speed contract counts: bytes of x; bytes moved for the ceiling; bytes moved for two threads.
_CONTRACT_INPUT, _CEILING_FROM, _THREADS_FROM = 64_000, 500_000, 1_000_000
_BEHIND = 0.95
_FRESH = ("fresh-calls",)  # peers that make new arrays: beside fastnorm doing the same
_NORMS = ("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm")


@dataclass(frozen=True)
class Result:
    """One contender on one case; seconds are per call, the fastest and the median round."""

    case: str
    operation: str
    dtype: str
    threads: int
    contender: str
    seconds: float
    median: float
    rounds: int
    bytes: int
    input_bytes: int

    @property
    def rate(self) -> float:
        """GB/s, counting the arrays that the operation has to move once."""
        return self.bytes / self.seconds / 1e9


@dataclass(frozen=True)
class Cell:
    """All contenders of one case in one dtype at one thread count."""

    results: dict[str, Result]

    @property
    def own(self) -> Result:
        """fastnorm into a reused result, which is what the speed contract is about; else as it is called."""
        return self.results.get(OWN_OUT) or self.results[OWN]

    @property
    def peers(self) -> dict[str, Result]:
        return {name: result for name, result in self.results.items() if not name.startswith((PREFIX, OWN))}

    @property
    def best_peer(self) -> Result | None:
        """The one that is fastest beside fastnorm doing the same as it."""
        return min(self.peers.values(), key=self._over_own, default=None)

    def _over_own(self, other: Result) -> float:
        own = self.results[OWN] if other.contender in _FRESH else self.own
        return other.seconds / own.seconds

    @property
    def ceiling(self) -> Result | None:
        found = [result for name, result in self.results.items() if name.startswith(PREFIX)]
        return max(found, key=lambda result: result.rate, default=None)

    @property
    def share(self) -> float | None:
        return None if self.ceiling is None else self.own.rate / self.ceiling.rate

    def ratio(self, name: str | None = None) -> float | None:
        """A contender's time over fastnorm's, the best peer's by default; above 1 fastnorm is faster."""
        other = self.best_peer if name is None else self.results.get(name)
        return None if other is None else self._over_own(other)

    @property
    def counts(self) -> bool:
        """Whether the speed contract speaks of this case."""
        return self.own.operation.startswith(_NORMS) and self.own.input_bytes >= _CONTRACT_INPUT


def cells(results: Iterable[Result]) -> list[Cell]:
    grouped: dict[tuple[str, str, int], dict[str, Result]] = {}
    for result in results:
        grouped.setdefault((result.case, result.dtype, result.threads), {})[result.contender] = result
    return [Cell(group) for group in grouped.values() if OWN in group]


def duration(seconds: float) -> str:
    """Seconds with three digits and a unit that fits."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s'[: number != 1]}"


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def table(group: Sequence[Cell], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows for the cells of one thread count; the best peer of each has a star."""
    fresh = any(OWN_OUT in cell.results for cell in group)
    header = ["case", "dtype", "time", "median", "GB/s", "ceiling", "share", *(["fresh"] if fresh else []), *names]
    rows = []
    for cell in group:
        own, ceiling, best = cell.own, cell.ceiling, cell.best_peer
        row = [own.case, own.dtype, duration(own.seconds), duration(own.median), f"{own.rate:.1f}"]
        row += ["-", "-"] if ceiling is None else [f"{ceiling.rate:.1f}", f"{cell.share:.0%}"]
        row += [_times(cell.ratio(OWN) if OWN_OUT in cell.results else None)] if fresh else []
        row += [_times(cell.ratio(name)) + "*" * (best is cell.results.get(name, 0)) for name in names]
        rows.append(row)
    return header, rows


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def legend() -> list[str]:
    return [
        "time, median: fastest and median round of fastnorm, with out= where there is one. GB/s: the arrays",
        "that have to be moved once, over the time. ceiling: the fastest copy (backward: sum of two arrays) of that",
        "memory, in the same rounds; share: fastnorm's part of it. fresh: without out=. Other columns: their time over",
        "fastnorm's; 2.00x: twice the time; *: the best peer of the row. fresh-calls make new arrays, and stand beside",
        "fastnorm without out=.",
    ]


def _geometric_mean(values: Iterable[float]) -> float:
    logs = [log(value) for value in values]
    return exp(sum(logs) / len(logs))


def summary(results: Iterable[Result]) -> list[str]:
    """What the speed contract asks for, one paragraph of lines for each thread count and dtype that was measured."""
    every = [cell for cell in cells(results) if cell.counts]
    lines = []
    for threads, dtype in sorted({(cell.own.threads, cell.own.dtype) for cell in every}):
        group = [cell for cell in every if (cell.own.threads, cell.own.dtype) == (threads, dtype)]
        lines.append(
            f"{dtype}, {counted(threads, 'thread')}, {counted(len(group), 'norm cell')} from 64 KB of input up"
        )
        alone = {cell.own.case: cell.ceiling for cell in every if cell.own.threads == 1 and cell.own.dtype == dtype}
        lines += ["  " + line for line in (*_against(group), *_movement(group), *_scaling(group, alone))]
    return lines


def _against(group: Sequence[Cell]) -> list[str]:
    best = {cell: ratio for cell, ratio in ((cell.own.case, cell.ratio()) for cell in group) if ratio is not None}
    torch = [ratio for ratio in (cell.ratio("torch") for cell in group) if ratio is not None]
    lines = []
    if best:
        lines.append(f"geometric mean against the best peer: {_geometric_mean(best.values()):.2f}x")
    if torch:
        lines.append(f"geometric mean against PyTorch: {_geometric_mean(torch):.2f}x")
    if best:
        behind = sorted((ratio, case) for case, ratio in best.items() if ratio < _BEHIND)
        worst = ", ".join(f"{case} {ratio:.2f}x" for ratio, case in behind[:5])
        lines.append(
            f"behind the best peer by more than 5 %: {len(behind)} of {len(best)}" + f" ({worst})" * bool(behind)
        )
    return lines


def _movement(group: Sequence[Cell]) -> list[str]:
    shares = [cell.share for cell in group if cell.share is not None and cell.own.bytes >= _CEILING_FROM]
    return [f"median share of the ceiling from 0.5 MB up: {statistics.median(shares):.0%}"] if shares else []


def _scaling(group: Sequence[Cell], ceilings_of_one: Mapping[str, Result | None]) -> list[str]:
    ratios = {cell.own.case: cell.ratio(OWN_ONE) for cell in group if cell.own.bytes >= _THREADS_FROM}
    known = {case: ratio for case, ratio in ratios.items() if ratio is not None}
    if not known:
        return []
    worst = min(known, key=lambda case: known[case])
    line = (
        f"one thread's time over {counted(group[0].own.threads, 'thread')}' from 1 MB up: geometric mean "
        f"{_geometric_mean(known.values()):.2f}x, least {known[worst]:.2f}x ({worst})"
    )
    pairs = [(ceilings_of_one.get(cell.own.case), cell.ceiling) for cell in group if cell.own.case in known]
    gains = [many.rate / one.rate for one, many in pairs if one is not None and many is not None]
    return [line, f"the same of the ceiling: geometric mean {_geometric_mean(gains):.2f}x"] if gains else [line]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write(file: Path, environment: dict[str, str], command: str, results: Sequence[Result]) -> None:
    content = {"environment": environment, "command": command, "results": [asdict(result) for result in results]}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(file: Path) -> tuple[dict[str, Any], list[Result]]:
    """All but the results, and the results; raises ValueError, KeyError or TypeError for another kind of file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return content, [Result(**entry) for entry in content.pop("results")]
