"""Tables in Markdown, and pages whose measured sections are replaced by a command, never by hand.

A section lies between `<!-- NAME: begin ... -->` and `<!-- NAME: end -->`, each on a line of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fastnorm.cli.screen import UsageError


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> str:
    """The first `text_columns` columns are words, the others numbers."""
    lines = [header, ["---" if column < text_columns else "---:" for column in range(len(header))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _section(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name}: begin[^\n]*-->\n).*?(<!-- {name}: end -->)", re.DOTALL)


def replace_section(file: Path, name: str, text: str) -> None:
    """Put `text` between the section's marks; raises UsageError where the file has no such marks."""
    page = file.read_text(encoding="utf-8") if file.exists() else ""
    pattern = _section(name)
    if not pattern.search(page):
        raise UsageError(f"{file}: no section between <!-- {name}: begin --> and <!-- {name}: end -->")
    file.write_text(pattern.sub(lambda marks: f"{marks[1]}{text.strip()}\n{marks[2]}", page), encoding="utf-8")


def require_section(option: str, file: str | None, name: str) -> None:
    """Raise UsageError, before any work is done, where replace_section would not succeed."""
    if file is None:
        return
    path = Path(file)
    if not path.is_file() or not _section(name).search(path.read_text(encoding="utf-8")):
        raise UsageError(f"{option} {file}: expected a file with <!-- {name}: begin --> and <!-- {name}: end -->")
