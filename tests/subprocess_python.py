"""A fresh interpreter for what cannot be tried in the test process: environment variables, forks, crashes.

The child sees the tests' modules and the installed fastnorm; it ends in time or is killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run_python(code: str | Path, *, timeout: float = 60.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code, or a file, with the environment's variables changed, from a directory that holds no source tree."""
    program = [str(code)] if isinstance(code, Path) else ["-c", textwrap.dedent(code)]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("FASTNORM_", "OMP_"))}
    env |= {"PYTHONPATH": str(HERE), **environment}
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", *program],
        env=env,
        cwd=HERE,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def output_of(code: str | Path, *, timeout: float = 60.0, **environment: str) -> str:
    """What the code prints; a failure shows what the child wrote."""
    done = run_python(code, timeout=timeout, **environment)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()
