"""Everything the commands show: lines, tables, progress and pictures.

rich draws tables and progress and matplotlib draws pictures where they are installed (`pip install 'fastnorm[cli]'`);
otherwise plain text does, with the same content. No other module knows which of the two is at work.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

# Picture formats that matplotlib always writes.
_FORMATS = (".png", ".svg", ".pdf")


class UsageError(Exception):
    """A request that cannot be met as given; shown as one line, exit status 2."""


def optional(name: str) -> Any:
    """The module of that name, or None where it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        return None


class Screen:
    """Where a command writes. `plain=True` keeps to plain text even where rich is installed."""

    def __init__(self, *, plain: bool = False) -> None:
        self._console = None if plain or optional("rich") is None else import_module("rich.console").Console()

    def line(self, text: str = "") -> None:
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def error(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> None:
        """A table whose first `text_columns` columns are words and whose other columns are numbers."""
        if self._console is not None and self._console.is_terminal:
            table = import_module("rich.table").Table(title=title, title_justify="left", box=None, pad_edge=False)
            for position, name in enumerate(header):
                table.add_column(name, justify="left" if position < text_columns else "right", no_wrap=True)
            for row in rows:
                table.add_row(*(import_module("rich.text").Text(cell) for cell in row))
            self._console.print(table)
            return
        # Into a file or a pipe a table is never cut to a width.
        self.line(title)
        widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]
        for row in (header, ["-" * width for width in widths], *rows):
            cells = [
                cell.ljust(width) if k < text_columns else cell.rjust(width)
                for k, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            self.line("  ".join(cells).rstrip())

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[str], None]]:
        """Yield a function to call after each of `total` steps, with a few words on where things stand."""
        if self._console is not None and self._console.is_terminal:
            parts = import_module("rich.progress")
            bar = parts.Progress(
                parts.TextColumn("{task.description}"),
                parts.BarColumn(),
                parts.MofNCompleteColumn(),
                parts.TimeElapsedColumn(),
                parts.TextColumn("{task.fields[words]}", markup=False),
                console=self._console,
            )
            with bar:
                task = bar.add_task(label, total=total, words="")
                yield lambda words: bar.update(task, advance=1, words=words)
            return
        yield _plain_progress(label, total, live=sys.stdout.isatty())


def _plain_progress(label: str, total: int, *, live: bool) -> Callable[[str], None]:
    """On a terminal one line that is rewritten; otherwise ten lines in all, so that a log stays short."""
    start = time.perf_counter()
    done = 0

    def advance(words: str) -> None:
        nonlocal done
        done += 1
        text = f"{label} {done}/{total}  {time.perf_counter() - start:.1f} s  {words}"
        if live:
            print(f"\r\x1b[2K{text[:119]}", end="\n" if done == total else "", flush=True)
        elif done * 10 // total > (done - 1) * 10 // total:
            print(text, flush=True)

    return advance


def require_plots(file: str | None) -> None:
    """Raise UsageError, before any work is done, where `--plot FILE` could not be honoured in the end."""
    if file is None:
        return
    if optional("matplotlib") is None:
        raise UsageError("--plot needs matplotlib; install it with: pip install 'fastnorm[cli]'")
    if Path(file).suffix not in _FORMATS:
        raise UsageError(f"--plot {file}: the name must end in one of {', '.join(_FORMATS)}")
    require_writable("--plot", file)


def require_writable(option: str, file: str | None) -> None:
    """Raise UsageError where the folder of a file to be written later does not exist."""
    if file is not None and not Path(file).resolve().parent.is_dir():
        raise UsageError(f"{option} {file}: there is no folder {Path(file).resolve().parent}")


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure that belongs to no window system."""
    return import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
