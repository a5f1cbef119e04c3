"""`python -m fastnorm info`: what this installation is and what it chose on this machine. Changes nothing."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path

import numpy as np

import fastnorm
from fastnorm import _core
from fastnorm.cli.screen import Screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def facts() -> dict[str, str]:
    """What `info` prints, by label; `bench --json` records it too."""
    build = _core.build_info()
    openmp = build["openmp"]
    verify = os.environ.get("FASTNORM_VERIFY", "")
    return {
        "fastnorm": fastnorm.__version__,
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "numpy": np.__version__,
        "compiler": f"{build['compiler']}, {build['build_type']} build",
        "OpenMP": "for SIMD (threads are fastnorm's own)" if openmp == "simd" else "no: slower kernels",
        "instruction sets built": build["levels"].replace(",", ", "),
        "instruction sets usable": ", ".join(_core.isa_levels()),
        "instruction set in use": _core.isa() + _chosen_by("FASTNORM_ISA"),
        "threads": f"{fastnorm.get_num_threads()} of {os.cpu_count()} CPUs" + _chosen_by("FASTNORM_NUM_THREADS"),
        "verification": "off" if verify in ("", "0") else f"on (by FASTNORM_VERIFY={verify})",
    }


def machine() -> dict[str, str]:
    """What a published figure needs to say about the machine; `bench --json` records it. Empty where it is not told."""
    found: dict[str, str] = {"system": f"{platform.system()} {platform.release()}"}
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
        names = {name.strip(): value.strip() for name, value in fields.items()}
        found["CPU"] = f"{names['model name']} (family {names['cpu family']}, model {names['model']})"
    except (OSError, KeyError, ValueError):
        found["CPU"] = platform.processor() or platform.machine()
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text("utf-8").strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level} cache"] = size
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        found["memory"] = f"{memory / 2**30:.0f} GB"
        found["load before"] = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    except (AttributeError, ValueError, OSError):
        pass
    return found


def _chosen_by(variable: str) -> str:
    value = os.environ.get(variable)
    return f" (by {variable}={value})" if value else ""


def run(options: argparse.Namespace, screen: Screen) -> int:
    del options
    labels = facts()
    width = max(map(len, labels))
    for label, value in labels.items():
        screen.line(f"{label:<{width}}  {value}")
    return 0
