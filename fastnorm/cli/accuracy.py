"""`python -m fastnorm accuracy`: how far from the exact result are fastnorm and the installed peers on hard inputs?

The same float32 arrays go to every library, each called as its users call it; results are held against the references,
which compute in longdouble. Errors are in u = 2^-24: of `max(1, |y|)` forward, of the sum of the absolute values of its
terms for a gradient, and never less than the spacing of the smallest numbers. Judges values, not speed; exit status 1
where fastnorm itself is beyond its contract.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import fastnorm
from fastnorm import reference
from fastnorm.cli import markdown, peers
from fastnorm.cli.calls import Array, Arrays, Options, bind, make_arrays
from fastnorm.cli.check import error_in_units, expected
from fastnorm.cli.screen import Screen

_SECTION = "comparison"
_CONTRACT = {"forward": 4.0, "gradients": 8.0}

Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]


def _normal(mean: float, scale: float = 1.0) -> Draw:
    return lambda rng, shape: mean + scale * rng.standard_normal(shape)


def _outlier(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """One huge value in every sample; the others then share one tiny distance from the mean."""
    x = rng.standard_normal(shape)
    x.reshape(shape[0], -1)[:, 3] = 1e30
    return x


INPUTS: dict[str, Draw] = {
    "N(0, 1)": _normal(0),
    "N(1e3, 1)": _normal(1e3),
    "N(1e6, 1)": _normal(1e6),
    "N(1e7, 1)": _normal(1e7),
    "1e19 N(0, 1)": _normal(0, 1e19),
    "1e37 N(0, 1)": _normal(0, 1e37),
    "1e-37 N(0, 1)": _normal(0, 1e-37),
    "constant 1234.567": lambda rng, shape: np.full(shape, 1234.567),
    "4096 or 4096.002": lambda rng, shape: 4096 + rng.integers(0, 2, shape) / 512,
    "N(0, 1), one 1e30": _outlier,
}


@dataclass(frozen=True)
class Subject:
    """An operation on one shape; `quick` is the shape with `--quick`; `inputs` are names of INPUTS."""

    stem: str
    shape: tuple[int, ...]
    quick: tuple[int, ...]
    inputs: tuple[str, ...] = tuple(INPUTS)
    options: Options = field(default_factory=dict)

    @property
    def forward(self) -> str:
        return self.stem + "_forward" * (self.stem == "batch_norm")

    def label(self, shape: tuple[int, ...]) -> str:
        return f"{self.stem} {'x'.join(map(str, shape))}"


SUBJECTS = (
    Subject("layer_norm", (64, 1024), (8, 1024)),
    Subject("rms_norm", (64, 1024), (8, 1024)),
    Subject("batch_norm", (1048576, 8), (4096, 8), ("N(0, 1)", "N(1e3, 1)", "N(1e6, 1)")),
    Subject("batch_norm", (16, 32, 14, 14), (4, 8, 7, 7)),
    Subject("group_norm", (16, 32, 14, 14), (4, 16, 7, 7), options={"num_groups": 8}),
    Subject("instance_norm", (16, 32, 14, 14), (4, 8, 7, 7), ("N(0, 1)", "N(1e3, 1)", "1e19 N(0, 1)")),
)


@dataclass(frozen=True)
class Row:
    """The worst error of every library in one operation on one input; None where a library has no such operation."""

    kind: str
    operation: str
    input: str
    errors: dict[str, float | None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="small arrays: seconds instead of a minute")
    parser.add_argument("--peers", default=None, help=f"default: every installed one of {','.join(peers.NAMES)}")
    parser.add_argument(
        "--markdown", metavar="FILE",
        help=f"replace the section between <!-- {_SECTION}: begin --> and <!-- {_SECTION}: end --> in FILE",
    )  # fmt: skip


def run(options: argparse.Namespace, screen: Screen) -> int:
    names = peers.chosen(options.peers)
    markdown.require_section("--markdown", options.markdown, _SECTION)
    rows: list[Row] = []
    with screen.progress("accuracy", sum(len(subject.inputs) for subject in SUBJECTS)) as step:
        for subject in SUBJECTS:
            for data in subject.inputs:
                rows += judge(subject, data, names, quick=options.quick)
                step(f"{rows[-1].operation} {data}")
    titles = {"forward": "Forward, worst error in u", "gradients": "Gradients, worst error in u of the sum of terms"}
    for kind, title in titles.items():
        screen.table(title, *_table(rows, kind, names), text_columns=2)
        screen.line()
    if options.markdown:
        markdown.replace_section(Path(options.markdown), _SECTION, _page(rows, names, quick=options.quick))
        screen.line(f"written: {options.markdown}")
    missed = [row for row in rows if not (row.errors["fastnorm"] or 0.0) <= _CONTRACT[row.kind]]
    for row in missed:
        screen.line(f"MISS {row.operation} {row.kind}, {row.input}: {shown(row.errors['fastnorm'])} u")
    if not missed:
        screen.line("fastnorm is within its contract: 4 u forward, 8 u of the sum of terms for gradients.")
    return 1 if missed else 0


# ---------------------------------------------------------------------------------------------------------------------
# Judging


def arrays_of(subject: Subject, data: str, *, quick: bool) -> Arrays:
    """Arguments with weight 1 and bias 0: exact to multiply and to add, and every library takes them."""
    shape = subject.quick if quick else subject.shape
    arrays = make_arrays(subject.stem, shape, "float32", subject.options)
    x = INPUTS[data](np.random.default_rng(len(data)), shape).astype(np.float32)
    weight, bias = arrays.weight, arrays.bias
    return replace(
        arrays,
        x=x,
        weight=None if weight is None else np.ones_like(weight),
        bias=None if bias is None else np.zeros_like(bias),
    )


def judge(subject: Subject, data: str, names: list[str], *, quick: bool) -> Iterator[Row]:
    """The errors of fastnorm and of the named peers, forward and for the gradients."""
    arrays = arrays_of(subject, data, quick=quick)
    for kind, function in (("forward", subject.forward), ("gradients", f"{subject.stem}_backward")):
        exact = expected(function, bind(reference, function, arrays, subject.options))
        wanted = [exact["y"]] if kind == "forward" else [exact[name] for name in ("dx", "dweight", "dbias")]
        calls = {"fastnorm": bind(fastnorm, function, arrays, subject.options)}
        for name in names:
            # One thread: results of some peers depend on the count.
            with np.errstate(all="ignore"):
                calls[name] = peers.load(name).prepare(function, arrays, subject.options, 1)
        errors: dict[str, float | None] = {
            name: None if call is None else _worst(call, wanted) for name, call in calls.items()
        }
        yield Row(kind, subject.label(arrays.x.shape), data, errors)


def _worst(call: Callable[[], Any], wanted: list[Any]) -> float:
    with np.errstate(all="ignore"):
        result = call()
    found = list(result) if isinstance(result, tuple | list) else [result]
    worst = 0.0
    for value, exact in zip(found, wanted, strict=False):
        if value is None or exact is None:
            continue
        array = np.asarray(value.detach() if hasattr(value, "detach") else value)
        # Below the smallest normal number what is left of a gradient is rounded to multiples of the very smallest.
        scaled = exact._replace(scale=np.maximum(exact.scale, np.finfo(np.float32).tiny))
        worst = max(worst, error_in_units(array.reshape(exact.value.shape), scaled)[0])
    return worst


# ---------------------------------------------------------------------------------------------------------------------
# Showing


def shown(error: float | None) -> str:
    """Three digits; an infinite error is a NaN or an Inf where the exact result is a number."""
    if error is None:
        return "-"
    if not np.isfinite(error):
        return "NaN"
    return f"{error:.2f}" if error < 100 else f"{error:,.0f}" if error < 1e5 else f"{error:.1e}"


def _table(rows: list[Row], kind: str, names: list[str]) -> tuple[list[str], list[list[str]]]:
    group = [row for row in rows if row.kind == kind]
    present = [name for name in ("fastnorm", *names) if any(row.errors[name] is not None for row in group)]
    header = ["operation", "input", *(peers.TITLES.get(name, name) for name in present)]
    return header, [[row.operation, row.input, *(shown(row.errors[name]) for name in present)] for row in group]


def _page(rows: list[Row], names: list[str], *, quick: bool) -> str:
    versions = peers.installed()
    took_part = [name for name in names if any(row.errors[name] is not None for row in rows)]
    libraries = [f"fastnorm {fastnorm.__version__}", *(f"{peers.TITLES[name]} {versions[name]}" for name in took_part)]
    command = "python -m fastnorm accuracy" + " --quick" * quick
    parts = [
        f"Made by `{command} --markdown docs/accuracy.md` with {', '.join(libraries)}; float32, weight 1, bias 0, one "
        "thread. NaN: a NaN or an Inf came where the exact result is a number. -: no such operation there.",
        "Forward, worst error in units of `u max(1, abs(y))`:",
        markdown.table(*_table(rows, "forward", names), text_columns=2),
        "Gradients (`dx`, `dweight`, `dbias`, the worst of them), in units of u times the sum of the absolute values "
        "of their terms:",
        markdown.table(*_table(rows, "gradients", names), text_columns=2),
    ]
    return "\n\n".join(part if part.startswith("|") else textwrap.fill(part, 120) for part in parts)
