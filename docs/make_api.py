"""Writes docs/api.md from the docstrings of the installed fastnorm; `--check` only says whether the page is up to date.

The page is plain Markdown, so that it is read where the repository is read, without a site.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# The page is about the installed package: the source tree has no compiled module.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

import fastnorm as fn  # noqa: E402

PAGE = ROOT / "docs" / "api.md"

SECTIONS: dict[str, tuple[str, ...]] = {
    "Normalization": ("batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm", "NormGrads", "NormCache"),
    "Statistics": ("moments", "Moments"),
    "Dropout and noise": ("dropout", "apply_dropout", "drop_connect", "gaussian", "Philox"),
    "Threads and verification": ("set_num", "get_num", "num_", "verify", "Verification"),
}

HEAD = """# API

Made by `docs/make_api.py` from the docstrings: change those, then run it. `help(fn.layer_norm)` shows the same.
"""


def section_of(name: str) -> str:
    for section, prefixes in SECTIONS.items():
        if name.startswith(prefixes):
            return section
    return "Other"


def call_of(name: str, function: Any, *, method: bool = False) -> str:
    """How it is called: names and defaults, without types."""
    parameters = list(inspect.signature(function).parameters.values())[method:]
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    text = f"{name}{inspect.Signature(plain)}"
    return re.sub(r"<.*?>", "...", re.sub(r"<class '(numpy\.\w+)'>", r"\1", text))


def entry(name: str, home: ModuleType = fn) -> str:
    """A function or class: its call, then its docstring as it stands (numpydoc reads well as text)."""
    thing = getattr(home, name)
    doc = inspect.getdoc(thing) or ""
    if inspect.isfunction(thing):
        call = call_of(name, thing)
    else:
        # Of the submodules' classes, what they have from a base without a name of its own as well.
        bases = [thing] if home is fn else [c for c in thing.__mro__ if c is thing or c.__name__.startswith("_")]
        init = next((vars(c)["__init__"] for c in bases if "__init__" in vars(c)), None)
        call = f"class {name}" if home is fn or init is None else call_of(f"class {name}", init, method=True)
        seen: set[str] = set()
        for member, value in (item for c in bases for item in vars(c).items()):
            # A method without words of its own is described where it comes from.
            text = inspect.getdoc(value) if value.__doc__ else None
            if not member.startswith("_") and inspect.isroutine(getattr(thing, member)) and text and member not in seen:
                seen.add(member)
                doc += f"\n\n{name}.{member}: {text}"
    return f"### {name}\n\n```text\n{call}\n\n{doc}\n```\n"


def page() -> str:
    names = [name for name in fn.__all__ if inspect.isfunction(getattr(fn, name)) or inspect.isclass(getattr(fn, name))]
    parts = [HEAD]
    for section in [*SECTIONS, "Other"]:
        entries = [entry(name) for name in names if section_of(name) == section]
        if entries:
            parts += [f"## {section}\n", *entries]
    for module in (fn.nn, fn.preprocessing, fn.regularization):
        parts += [f"## {module.__name__}\n", f"{inspect.getdoc(module)}\n"]
        parts += [entry(name, module) for name in module.__all__]
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with status 1 when docs/api.md is out of date")
    check = parser.parse_args().check
    text = page()
    if not check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print("docs/api.md is out of date: run python docs/make_api.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
