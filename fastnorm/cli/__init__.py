"""The command line: `python -m fastnorm info | check | demo | bench | accuracy`.

Reads the arguments and hands them to one module per command: add_arguments(parser), run(options, screen) -> status.
Needs numpy alone; tables, progress bars and pictures get better with `pip install 'fastnorm[cli]'`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from fastnorm.cli.screen import Screen, UsageError

_COMMANDS = {
    "info": "version, build, instruction sets found and chosen, threads",
    "check": "every function against fastnorm.reference; exit status 1 on any miss",
    "demo": "train a small network on real digits, with the kernels and with the references",
    "bench": "the kernels beside NumPy and the installed peers, in one interleaved run",
    "accuracy": "worst errors of fastnorm and of the installed peers on hard inputs",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastnorm", description="Normalization and dropout from NumPy.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(_COMMANDS))
    for name, summary in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        command.add_argument("--plain", action="store_true", help="plain text even where rich is installed")
        import_module(f"fastnorm.cli.{name}").add_arguments(command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 fine, 1 the command found a fault, 2 wrong use)."""
    parser = _parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help()
        return 2
    options = parser.parse_args(arguments)
    screen = Screen(plain=options.plain)
    try:
        status: int = import_module(f"fastnorm.cli.{options.command}").run(options, screen)
    except UsageError as error:
        screen.error(f"python -m fastnorm {options.command}: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough; nothing may be written any more, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status
