"""How an example says what it found: one line, numbers by name, a picture; and the command line that all of them share.

Promises that a finding is reported as measured: `agrees` follows from a rule that stands in the example's docstring.
Refuses to judge anything itself.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

# Before NumPy, so examples import this module first. On matrices as small as here a second thread of the matrix product
# waits more than it works: ten times as long in all, where another program wants the core.
for _library in ("OPENBLAS", "MKL", "BLIS"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")

import numpy as np  # noqa: E402

from fastnorm.cli.screen import UsageError, figure, require_plots  # noqa: E402

Size = Literal["quick", "usual", "full"]
_T = TypeVar("_T")

# One colour for each thing that comes back from picture to picture.
PLAIN, BATCH, LAYER, OTHER, INK = "#c1443c", "#2f6db5", "#3b9a5b", "#8a5fb0", "#444444"


@dataclass(frozen=True)
class Claim:
    """A claim of the notes: its number in docs/claims.md, the notes it is from, and itself in one line."""

    number: int
    notes: str
    text: str


@dataclass(frozen=True)
class Finding:
    """What a run measured.

    `measured` is the number in words, `agrees` whether it is what the claim says, `numbers` the same by name, `seen`
    what else a reader should know (always there when the claim does not hold), `data` what the picture is drawn from.
    """

    measured: str
    agrees: bool
    numbers: dict[str, float]
    seen: str = ""
    data: Any = field(default=None, repr=False)


Measure = Callable[[int, Size], Finding]
Plot = Callable[[Finding, Any], None]


def pick(size: Size, quick: _T, usual: _T, full: _T) -> _T:
    """The setting for this size of run."""
    return {"quick": quick, "usual": usual, "full": full}[size]


def seeds(seed: int, count: int) -> list[int]:
    """As many seeds as repetitions, which follow from one."""
    return [int(s) for s in np.random.SeedSequence(seed).generate_state(count)]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds, in words."""
    return f"{np.mean(values):.{digits}g} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.2g}"


def percent(values: Sequence[float]) -> str:
    """The same for shares, in percent."""
    return f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1) if len(values) > 1 else 0:.1f} %"


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the straight line nearest to log y against log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def line(claim: Claim, finding: Finding) -> str:
    return (
        f"claim: {claim.number}. {claim.text} [{claim.notes}]  measured: {finding.measured}  "
        f"agrees: {'yes' if finding.agrees else 'no'}"
    )


def draw(claim: Claim, finding: Finding, plot: Plot, file: str) -> None:
    picture = figure(6.4, 3.2)
    plot(finding, picture)
    picture.savefig(file, dpi=80)


def add_size(parser: argparse.ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help="the least that shows it")
    size.add_argument("--full", dest="size", action="store_const", const="full", help="more seeds, longer training")
    parser.set_defaults(size="usual")
    parser.add_argument("--seed", type=int, default=0, help="where every random number follows from (default: 0)")


def main(doc: str | None, claim: Claim, measure: Measure, plot: Plot) -> None:
    """The command line of one example."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size(parser)
    parser.add_argument("--plot", metavar="FILE", help="draw the picture into FILE (.png, .svg or .pdf)")
    options = parser.parse_args()
    try:
        if options.seed < 0:
            raise UsageError(f"--seed must be 0 or more, not {options.seed}")
        require_plots(options.plot)
    except UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    start = time.perf_counter()
    finding = measure(options.seed, options.size)
    print(line(claim, finding))
    if finding.seen:
        print(finding.seen)
    if options.plot:
        draw(claim, finding, plot, options.plot)
    print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr)
