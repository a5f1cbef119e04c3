"""`python -m fastnorm info`: what this installation is and what it chose on this machine. Changes nothing."""

from __future__ import annotations

import argparse
import os
import platform

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
