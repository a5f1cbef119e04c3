"""The documentation holds: links lead somewhere, the README's Python runs, docs/api.md is what the docstrings say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from subprocess_python import output_of

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md"), *ROOT.glob("examples/*.md")])

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="the repository is not around the tests")


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, fragment = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (fragment and linked.suffix == ".md" and fragment not in anchors(linked)):
            broken.append(target)
    assert broken == []


def python_blocks() -> list[tuple[str, str]]:
    return [
        (f"{page_id(page)}-{i}", block)
        for page in PAGES
        for i, block in enumerate(
            re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
        )
    ]


@pytest.mark.parametrize(("name", "block"), [pytest.param(n, b, id=n) for n, b in python_blocks()])
def test_python_in_the_pages_runs(name: str, block: str) -> None:
    output_of("import warnings; warnings.simplefilter('error')\nimport numpy as np\n" + block)


def test_readme_training_step_learns() -> None:
    """The step shown to a newcomer is a real one: repeated, it brings the loss down."""
    text = (ROOT / "README.md").read_text("utf-8")
    step = re.search(r"^```python\n(.*?loss.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert step
    names: dict[str, object] = {"np": np}
    exec(step[1], names)
    train_step = names["train_step"]
    losses = [train_step(seed) for seed in range(60)]  # type: ignore[operator]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_api_page_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "make_api.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
