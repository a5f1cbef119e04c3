"""`python -m examples.run_all`: every claim of the notes measured, as a table, and on one page with every picture.

The page is Markdown (`--page FILE`, by default claims-report/claims.md) and its pictures lie in a folder beside it;
docs/claims.md is such a page. What a claim is and when it counts as true stands in its script; this one only runs them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import claim  # noqa: E402
import numpy as np  # noqa: E402

import fastnorm as fn  # noqa: E402
from fastnorm.cli.screen import Screen, optional  # noqa: E402

HEAD = """# The notes' claims, measured

Eighteen claims of the lecture notes that fastnorm grew out of, each measured by a script in [examples]({examples}) on
the digits that the package ships, or on synthetic numbers where the claim is a formula. The rule by which a measurement
agrees with its claim stands in the script's docstring, and was fixed before the first run; where a claim does not hold
here, the table says so, and the section below says what was seen instead. `±` is the standard deviation over seeds. The
notes are named by letter: A, proofs on dropout and batch norm as regularisers; B, training tricks; C, notes on
arXiv:1805.11604; D, normalization and regularization; E, why dropout and batch norm together can hurt.

This page is written by the run: `{command}`
({versions}; {seconds:.0f} s on {cpus} CPUs).
{shorter}
"""
SHORTER = """Its last column is whether the claim agrees in the run that takes a minute or two, without `--full`,
which has fewer seeds and trains for fewer epochs: where the two differ, the claim depends on that."""
LONGER = "Another seed is `--seed 1`; `--full` has more seeds and trains for longer."


def examples() -> list[ModuleType]:
    """The modules of all claims, by number."""
    found = [importlib.import_module(path.stem) for path in sorted(HERE.glob("claim_*.py"))]
    return sorted(found, key=lambda module: module.CLAIM.number)


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def write_page(
    page: Path,
    found: list[tuple[ModuleType, claim.Finding, float]],
    options: argparse.Namespace,
    seconds: float,
    pictures: dict[int, Path],
    usual: dict[int, claim.Finding],
) -> None:
    """The table of all claims, then a section for each with its picture."""
    flags = "" if options.size == "usual" else f" --{options.size}"
    head = HEAD.format(
        examples=Path(os.path.relpath(HERE, page.parent)).as_posix(),
        command=f"python -m examples.run_all{flags} --seed {options.seed} --page {options.page}",
        versions=f"fastnorm {fn.__version__}, NumPy {np.__version__}, Python {platform.python_version()}",
        seconds=seconds,
        cpus=os.cpu_count(),
        shorter=SHORTER if usual else LONGER,
    )
    extra = " shorter run |" if usual else ""
    rows = [f"| | claim | notes | measured | agrees |{extra}", "|---|---|---|---|---|" + "---|" * bool(extra)]
    sections = []
    for module, finding, _ in found:
        c, script = module.CLAIM, Path(str(module.__file__))
        agrees = "yes" if finding.agrees else "**no**"
        row = f"| {c.number} | {cell(c.text)} | {c.notes} | {cell(finding.measured)} | {agrees} |"
        rows.append(row + (f" {'yes' if usual[c.number].agrees else '**no**'} |" if usual else ""))
        link = Path(os.path.relpath(script, page.parent)).as_posix()
        section = [f"## {c.number}. {c.text[0].upper()}{c.text[1:]}\n"]
        section.append(f"Notes {c.notes}; [{script.name}]({link}) has the formula and the rule.\n")
        section.append(f"Measured: {finding.measured}. Agrees: **{'yes' if finding.agrees else 'no'}**.\n")
        if finding.seen:
            section.append(f"Seen: {finding.seen}.\n")
        if usual:
            there = usual[c.number]
            section.append(f"In the shorter run: {there.measured}. Agrees: **{'yes' if there.agrees else 'no'}**.\n")
        if c.number in pictures:
            where = pictures[c.number].relative_to(page.parent).as_posix()
            section.append(f"![{cell(c.text)}]({where})\n")
        sections.append("\n".join(section))
    failed = [str(module.CLAIM.number) for module, finding, _ in found if not finding.agrees]
    summary = f"{len(found) - len(failed)} of {len(found)} agree."
    summary += f" Those that do not: {', '.join(failed)}.\n" if failed else "\n"
    page.write_text("\n".join([head, "\n".join(rows), "", summary, *sections]), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    claim.add_size(parser)
    parser.add_argument("--page", default="claims-report/claims.md", help="where to write the page (Markdown)")
    parser.add_argument("--json", metavar="FILE", help="also write every number to FILE")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="only these claims")
    options = parser.parse_args(arguments)
    screen, page, start = Screen(), Path(options.page), time.perf_counter()
    chosen = [module for module in examples() if not options.only or module.CLAIM.number in options.only]
    if not chosen or options.seed < 0:
        screen.error(f"no claim with a number of {options.only}" if not chosen else "--seed must be 0 or more")
        return 2
    found, pictures, usual = [], {}, {}
    folder = page.parent / page.stem
    (folder if optional("matplotlib") else page.parent).mkdir(parents=True, exist_ok=True)
    with screen.progress("claims", len(chosen)) as advance:
        for module in chosen:
            began = time.perf_counter()
            finding = module.measure(options.seed, options.size)
            found.append((module, finding, time.perf_counter() - began))
            if options.size == "full":
                usual[module.CLAIM.number] = module.measure(options.seed, "usual")
            if optional("matplotlib"):
                pictures[module.CLAIM.number] = folder / f"{Path(str(module.__file__)).stem}.png"
                claim.draw(module.CLAIM, finding, module.plot, str(pictures[module.CLAIM.number]))
            advance(module.CLAIM.text[:60])
    seconds = time.perf_counter() - start
    for module, finding, _ in found:
        screen.line(claim.line(module.CLAIM, finding))
        if finding.seen:
            screen.line(f"    {finding.seen}")
    screen.line()
    rows = [
        [str(m.CLAIM.number), m.CLAIM.text[:70], "yes" if finding.agrees else "no", f"{took:.1f}"]
        for m, finding, took in found
    ]
    screen.table("The notes' claims", ["", "claim", "agrees", "seconds"], rows, text_columns=3)
    write_page(page, found, options, seconds, pictures, usual)
    screen.line(f"page: {page}" + ("" if pictures else " (no pictures: pip install '.[examples]')"))
    if options.json:
        numbers = {m.CLAIM.number: {"agrees": finding.agrees, **finding.numbers} for m, finding, _ in found}
        Path(options.json).write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
