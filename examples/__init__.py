"""Lets the examples be run both ways, `python -m examples.run_all` and `python examples/run_all.py`.

They import their two shared modules by bare name, as a script beside them would; nothing else is promised here.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
