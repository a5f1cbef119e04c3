"""Writes docs/api.md from the docstrings of the installed fastnorm; `--check` only says whether the page is up to date.

The page is plain Markdown, so that it is read where the repository is read, without a site.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path

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


def entry(name: str) -> str:
    """A function or class: its call, then its docstring as it stands (numpydoc reads well as text)."""
    thing = getattr(fn, name)
    doc = inspect.getdoc(thing) or ""
    if inspect.isfunction(thing):
        parameters = inspect.signature(thing).parameters.values()
        plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        call = re.sub(r"<.*?>", "...", f"{name}{inspect.Signature(plain)}")
    else:
        call = f"class {name}"
        for member, value in vars(thing).items():
            text = inspect.getdoc(value)
            if not member.startswith("_") and inspect.isroutine(getattr(thing, member)) and text:
                doc += f"\n\n{name}.{member}: {text}"
    return f"### {name}\n\n```text\n{call}\n\n{doc}\n```\n"


def page() -> str:
    names = [name for name in fn.__all__ if inspect.isfunction(getattr(fn, name)) or inspect.isclass(getattr(fn, name))]
    parts = [HEAD]
    for section in [*SECTIONS, "Other"]:
        entries = [entry(name) for name in names if section_of(name) == section]
        if entries:
            parts += [f"## {section}\n", *entries]
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
