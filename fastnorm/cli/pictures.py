"""The two pictures of a bench run: the peers' time over fastnorm's in every cell, and GB/s against the working set.

Both show float32 where it was measured, one panel for each thread count. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from pathlib import Path
from typing import Any

from fastnorm.cli.peers import TITLES
from fastnorm.cli.scores import Cell, Result, cells, counted
from fastnorm.cli.screen import figure

# One colour and mark a contender, the same in both pictures.
_MARKS = {
    "numpy": ("#8c8c8c", "s"),
    "torch": ("#d95f02", "o"),
    "jax": ("#7570b3", "^"),
    "onnxruntime": ("#e7298a", "v"),
    "numba": ("#1f78b4", "D"),
    "hash": ("#66a61e", "x"),
    "calls": ("#a6761d", "+"),
    "fresh-calls": ("#e6ab02", "+"),
}
_OWN_COLOUR = "#1b7837"
_FARTHEST = 20.0  # ratios beyond are drawn here: what they say is "far behind"


def draw(results: Sequence[Result], file: Path) -> list[Path]:
    """FILE.png gives FILE-ratio.png and FILE-roofline.png; returns their names."""
    panels, dtype = _panels(results)
    names = [file.with_name(f"{file.stem}-{kind}{file.suffix}") for kind in ("ratio", "roofline")]
    for name, picture in zip(names, (_ratio(panels, dtype), _roofline(panels, dtype)), strict=True):
        _save(picture, name)
    return names


def draw_ratio(results: Sequence[Result], file: Path, cases: Sequence[str]) -> Path:
    """The first picture for the cases of these names alone, where the run has them; returns `file`."""
    panels, dtype = _panels([result for result in results if result.case in cases] or results)
    _save(_ratio(panels, dtype), file)
    return file


def _save(picture: Any, file: Path) -> None:
    # No date in the file: the same numbers give the same picture.
    picture.savefig(file, dpi=90, metadata={"Date": None} if file.suffix == ".svg" else None)


def _panels(results: Sequence[Result]) -> tuple[dict[int, list[Cell]], str]:
    """The cells of each thread count, in float32 where the run has it, and the dtype."""
    every = cells(results)
    dtype = "float32" if any(cell.own.dtype == "float32" for cell in every) else every[0].own.dtype
    shown = [cell for cell in every if cell.own.dtype == dtype]
    counts = dict.fromkeys(cell.own.threads for cell in shown)
    return {threads: [cell for cell in shown if cell.own.threads == threads] for threads in counts}, dtype


def _dots(axes: Any, spots: Sequence[tuple[float, float]], mark: str, label: str, colour: str, **style: Any) -> None:
    axes.plot(*zip(*spots, strict=True), mark, color=colour, label=label, linestyle="none", **style)


def _panel(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _ratio(panels: dict[int, list[Cell]], dtype: str) -> Any:
    rows = max(len(group) for group in panels.values())
    picture = figure(3.2 + 4.2 * len(panels), 1.3 + 0.145 * rows)
    all_axes = picture.subplots(1, len(panels), squeeze=False)[0]
    for axes, (threads, group) in zip(all_axes, panels.items(), strict=True):
        _panel(axes, f"{counted(threads, 'thread')}, {dtype}")
        for name, (colour, mark) in _MARKS.items():
            ratios = [(cell.ratio(name), row) for row, cell in enumerate(group)]
            found = [(min(ratio, _FARTHEST), row) for ratio, row in ratios if ratio is not None]
            if found:
                axes.plot(
                    *zip(*found, strict=True), mark, color=colour, markersize=3.5, label=TITLES[name], linestyle="none"
                )
        axes.axvline(1, color=_OWN_COLOUR, linewidth=1.4)
        axes.set_xscale("log")
        axes.set_xlim(right=_FARTHEST * 1.15)
        ticks = (0.25, 0.5, 1, 2, 4, 8, _FARTHEST)
        axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks[:-1]] + [f"{_FARTHEST:g}x+"])
        axes.minorticks_off()
        axes.set_ylim(len(group) - 0.5, -0.5)
        axes.set_yticks(
            range(len(group)), [cell.own.case for cell in group] if axes is all_axes[0] else [], fontsize=6.5
        )
        axes.set_xlabel("time over fastnorm's (right of the line: fastnorm is faster)")
    handles, labels = all_axes[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False, fontsize=8)
    return picture


def _envelope(group: Sequence[Cell]) -> list[tuple[int, float]]:
    """The best ceiling of each half octave of working sets, where cases lie close together, by size."""
    best: dict[int, tuple[int, float]] = {}
    for cell in group:
        if cell.ceiling is not None:
            place = round(2 * log2(cell.own.bytes))
            best[place] = max(best.get(place, (0, 0.0)), (cell.own.bytes, cell.ceiling.rate), key=lambda spot: spot[1])
    return sorted(best.values())


def _roofline(panels: dict[int, list[Cell]], dtype: str) -> Any:
    picture = figure(5.2 * len(panels), 4.2)
    all_axes = picture.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (threads, group) in zip(all_axes, panels.items(), strict=True):
        norms = [
            cell for cell in group if "_norm" in cell.own.operation and not cell.own.operation.startswith("dropout")
        ]
        norms = norms or group
        _panel(axes, f"{counted(threads, 'thread')}, {dtype}")
        copies = _envelope(norms)
        axes.plot(*zip(*copies, strict=True), color="black", linewidth=1.2, label="copy, sum of two arrays")
        best = [(cell.own.bytes, cell.best_peer.rate) for cell in norms if cell.best_peer is not None]
        if best:
            _dots(axes, best, "x", "best peer", "#999999", markersize=4)
        for backward, mark, label, fill in (
            (False, "o", "fastnorm, forward", _OWN_COLOUR),
            (True, "s", "fastnorm, backward", "none"),
        ):
            spots = [(c.own.bytes, c.own.rate) for c in norms if c.own.operation.endswith("_backward") == backward]
            if spots:
                _dots(axes, spots, mark, label, _OWN_COLOUR, markerfacecolor=fill, markersize=4.5)
        axes.set_xscale("log", base=2)
        ticks = [2**k for k in range(14, 30, 2) if copies[0][0] / 2 <= 2**k <= copies[-1][0] * 2]
        axes.set_xticks(ticks, [f"{t >> 20} MB" if t >= 1 << 20 else f"{t >> 10} KB" for t in ticks])
        axes.set_xlabel("working set (bytes moved)")
    all_axes[0].set_ylim(0, 1.08 * max(c.ceiling.rate if c.ceiling else c.own.rate for g in panels.values() for c in g))
    all_axes[0].set_ylabel("GB/s")
    all_axes[0].legend(frameon=False, fontsize=8)
    return picture
