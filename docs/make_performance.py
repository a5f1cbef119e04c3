"""Writes the measured sections of docs/performance.md and README.md, and their pictures, from a file of `bench --json`.

    python -m fastnorm bench --dtypes float32,float64 --threads 1,2 --json run.json
    python docs/make_performance.py run.json

Measures nothing: every figure on the pages is in that file. Needs matplotlib (`pip install 'fastnorm[cli]'`).
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

# The pages are about the installed package: the source tree has no compiled module.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

from fastnorm.cli import markdown, pictures, scores  # noqa: E402
from fastnorm.cli.peers import NAMES, TITLES  # noqa: E402
from fastnorm.cli.scores import Cell, Result, counted, duration  # noqa: E402
from fastnorm.cli.screen import UsageError  # noqa: E402

PAGE = Path("docs") / "performance.md"
# What the README shows, where the run has it: one line for each operation and layout, and a small call.
HEADLINES = (
    "layer_norm-512x768",
    "layer_norm_backward-512x768",
    "layer_norm-16384x1024",
    "rms_norm-512x768",
    "rms_norm_backward-512x768",
    "batch_norm_forward-32x64x14x14",
    "batch_norm_forward-32x64x56x56",
    "batch_norm_forward-32x64x14x14-channels_last",
    "batch_norm_backward-32x64x14x14",
    "group_norm-32x64x14x14",
    "group_norm_backward-32x64x14x14",
    "dropout-512x768",
    "layer_norm-8x64",
)


def _known_peers(cells: Sequence[Cell]) -> list[str]:
    return [name for name in NAMES if any(name in cell.peers for cell in cells)]


def _bullets(lines: Sequence[str]) -> str:
    """The summary, whose indented lines belong to the line before them."""
    wrapped = [
        textwrap.fill(line.strip(), 118, initial_indent=mark, subsequent_indent=" " * len(mark), break_on_hyphens=False)
        for line in lines
        for mark in ("  - " if line.startswith(" ") else "- ",)
    ]
    return "\n".join(wrapped)


def performance_page(content: dict[str, object], results: Sequence[Result], images: Sequence[Path]) -> str:
    """The measured part of docs/performance.md."""
    environment = content["environment"]
    assert isinstance(environment, dict)
    facts = markdown.table(
        ["machine and versions", ""], [[str(k), str(v)] for k, v in environment.items()], text_columns=2
    )
    parts = ["The command:", f"```console\n$ {content['command']} --json run.json\n```", facts]
    parts += ["What it amounts to:", _bullets(scores.summary(results))]
    parts += [f"![{alt}]({image.name})" for image, alt in zip(images, ALTERNATIVES, strict=True)]
    parts += [textwrap.fill(" ".join(scores.legend()), 120)]
    every = scores.cells(results)
    for threads, dtype in dict.fromkeys((cell.own.threads, cell.own.dtype) for cell in every):
        group = [cell for cell in every if (cell.own.threads, cell.own.dtype) == (threads, dtype)]
        header, rows = scores.table(group, _known_peers(group))
        header = [TITLES.get(column, column) for column in header]
        # The dtype is in the heading.
        rows = [[cell for column, cell in zip(header, row, strict=True) if column != "dtype"] for row in rows]
        header = [column for column in header if column != "dtype"]
        parts += [f"### {dtype}, {counted(threads, 'thread')}", markdown.table(header, [_escaped(row) for row in rows])]
    return "\n\n".join(parts)


ALTERNATIVES = (
    "Time of each library over fastnorm's, for every case",
    "GB/s against the size of the working set, with the rate of a copy",
)


def _escaped(row: Sequence[str]) -> list[str]:
    return [cell.replace("*", r"\*") for cell in row]


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2f}x"


def readme_section(content: dict[str, object], results: Sequence[Result], image: Path) -> str:
    """The measured part of the README: one thread, the dtype that was measured first."""
    environment = content["environment"]
    assert isinstance(environment, dict)
    every = [cell for cell in scores.cells(results) if cell.own.dtype == results[0].dtype]
    threads = min(cell.own.threads for cell in every)
    by_name = {cell.own.case: cell for cell in every if cell.own.threads == threads}
    shown = [by_name[name] for name in HEADLINES if name in by_name]
    names = _known_peers(shown)
    rows = []
    for cell in shown:
        best = cell.best_peer
        ratios = {name: cell.ratio(name) for name in names}
        rows.append([
            f"`{cell.own.case}`", duration(cell.own.seconds), f"{cell.own.rate:.0f}",
            *("" if ratio is None else f"**{_times(ratio)}**" if best is cell.results[name] else _times(ratio)
              for name, ratio in ratios.items()),
        ])  # fmt: skip
    lead = (
        f"Time of others over fastnorm's (above 1: fastnorm is faster; the best of them in bold), {results[0].dtype}, "
        f"{counted(threads, 'thread')} of {environment.get('CPU', 'this machine')}, the fastest of many rounds of one "
        f"interleaved run of `{content['command']}`. fastnorm writes into a reused `out=`, numba and ONNX Runtime into "
        "reused results too. numba's loops are fastmath and do not keep the accuracy contract: they are the measure of "
        "what loops alone can do."
    )
    return "\n\n".join([
        f"![Time of each library over fastnorm's]({(PAGE.parent / image.name).as_posix()})",
        textwrap.fill(lead, 120, break_on_hyphens=False),
        markdown.table(["case", "fastnorm", "GB/s", *(TITLES[name] for name in names)], rows),
        _bullets(scores.summary(results)),
        f"Every case, both pictures and the machine: [{PAGE.as_posix()}]({PAGE.as_posix()}).",
    ])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN.json", help="written by python -m fastnorm bench --json")
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are (default: here)")
    options = parser.parse_args(arguments)
    try:
        content, results = scores.read(options.run)
        images = pictures.draw(results, options.root / PAGE.with_suffix(".png"))
        headlines = images[0].with_stem("performance-headlines")
        pictures.draw_ratio(results, headlines, HEADLINES)
        markdown.replace_section(options.root / PAGE, "performance", performance_page(content, results, images))
        markdown.replace_section(options.root / "README.md", "performance", readme_section(content, results, headlines))
    except (UsageError, OSError, ValueError, KeyError, TypeError) as error:
        print(f"{parser.prog}: {options.run}: {error}", file=sys.stderr)
        return 2
    print(f"written: {PAGE}, README.md, {', '.join(image.name for image in (*images, headlines))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
