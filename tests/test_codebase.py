"""The house rules that a reader relies on: what is exported is complete, and the tree is what CONTRIBUTING says it is.

Reads the sources as text and never judges results. Parts that need the repository are skipped where it is not there.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import typing
from pathlib import Path

import pytest

import fastnorm as fn
from conftest import ROOT
from fastnorm import _core, reference
from fastnorm.cli.cases import load_cases
from operations import OPERATIONS
from subprocess_python import output_of

# Exports that are not array functions: they have tests of their own, and neither a reference nor a bench case.
CONTROLS = {"get_num_threads", "set_num_threads", "num_threads", "verify"}
FUNCTIONS = sorted(n for n in fn.__all__ if inspect.isfunction(getattr(fn, n)) and n not in CONTROLS)
PACKAGE = ROOT / "fastnorm"
# Modules that test a property of all functions at once.
WALKERS = {f"test_{name}.py" for name in ("codebase", "docs", "errors", "fork", "guard_pages", "isa", "overlap")} | {
    "test_threads.py"
}

in_repository = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the repository is not around the tests")


def tracked_files() -> list[Path]:
    """What git would commit; every file, where this is no clone."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        files = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        hidden = {"build", "__pycache__"}
        files = [p for p in ROOT.rglob("*") if not any(part in hidden or part.startswith(".") for part in p.parts)]
    environments = {path.parent for path in files if path.name == "pyvenv.cfg"}  # whatever their names
    return [path for path in files if path.is_file() and not environments.intersection(path.parents)]


def sources(*suffixes: str) -> list[Path]:
    return [path for path in tracked_files() if path.suffix in suffixes]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_registry_of_operations_is_complete() -> None:
    assert sorted(OPERATIONS) == FUNCTIONS


def test_all_lists_every_public_name_once() -> None:
    assert len(fn.__all__) == len(set(fn.__all__))
    modules = {n for n in vars(fn) if inspect.ismodule(getattr(fn, n))}
    public = {n for n in vars(fn) if not n.startswith("_")} - modules - {"annotations"}
    assert public <= set(fn.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_reference_has_the_same_name_and_signature(name: str) -> None:
    ours, theirs = inspect.signature(getattr(fn, name)), inspect.signature(getattr(reference, name))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_a_bench_case(name: str) -> None:
    assert name in {case.operation for case in load_cases()}


@in_repository
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_a_test_of_its_own(name: str) -> None:
    """A test module about the operation uses it by name; the modules that walk the registry do not count."""
    walkers = {
        path.name for path in (ROOT / "tests").glob("test_*.py") if "import OPERATIONS" in path.read_text("utf-8")
    }
    users = [
        path.name
        for path in (ROOT / "tests").glob("test_*.py")
        if path.name not in walkers and re.search(rf"\b{name}\b", path.read_text("utf-8"))
    ]
    assert users, f"no tests/test_*.py names {name}"


def stub_names() -> set[str]:
    tree = ast.parse((PACKAGE / "_core.pyi").read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_") or name == "__version__"}


@in_repository
def test_stub_of_the_extension_module_is_complete() -> None:
    public = {name for name in dir(_core) if not name.startswith("_")} | {"__version__"}
    assert stub_names() == public


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_are_typed(name: str) -> None:
    signature = inspect.signature(getattr(fn, name))
    assert signature.return_annotation is not inspect.Signature.empty
    assert [p.name for p in signature.parameters.values() if p.annotation is inspect.Parameter.empty] == []
    hints = typing.get_type_hints(getattr(fn, name))
    assert hints.keys() >= {*signature.parameters, "return"}


def test_type_hints_can_be_read_of_the_references_alone() -> None:
    """In a program of its own: a name that one module has read, others need not find for themselves."""
    code = """
    import inspect, typing
    from fastnorm import reference
    for name, function in vars(reference).items():
        if inspect.isfunction(function) and not name.startswith("_"):
            typing.get_type_hints(function)
            print(name)
    """
    assert "dropout_add_layer_norm" in output_of(code)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_are_numpydoc(name: str) -> None:
    function = getattr(fn, name)
    doc = inspect.getdoc(function) or ""
    sections = re.findall(r"^(\w[\w ]*)\n-{3,}$", doc, re.MULTILINE)
    assert sections[:2] == ["Parameters", "Returns"]
    assert "Raises" in sections
    parameters = doc.split("Parameters\n")[1].split("\nReturns\n")[0]
    documented = {
        n for line in re.findall(r"^(\*{0,2}\w+(?:, \w+)*) ?:", parameters, re.MULTILINE) for n in line.split(", ")
    }
    wanted = {
        p.name if p.kind is not p.VAR_POSITIONAL else f"*{p.name}"
        for p in inspect.signature(function).parameters.values()
    }
    assert documented == wanted
    first_line = doc.splitlines()[0]
    assert first_line.endswith("."), first_line


def test_public_classes_have_docstrings() -> None:
    for name in fn.__all__:
        if inspect.isclass(getattr(fn, name)):
            assert inspect.getdoc(getattr(fn, name)), name


@in_repository
def test_only_the_bindings_know_python() -> None:
    users = [relative(p) for p in sources(".cpp", ".hpp") if re.search(r"pybind11|Python\.h", p.read_text("utf-8"))]
    assert users
    assert [path for path in users if not path.startswith("csrc/bindings/")] == []


@in_repository
def test_instruction_set_flags_are_in_the_build_files_alone() -> None:
    pattern = re.compile(r"-m(avx|fma|sse|arch)|__attribute__\s*\(\(\s*target|#pragma GCC (target|optimize)|immintrin")
    users = [relative(p) for p in sources(".cpp", ".hpp", ".toml", ".json") if pattern.search(p.read_text("utf-8"))]
    assert users == ["csrc/isa/vec.hpp"]  # what vector types cannot say, under the build files' own flags
    for path in sources(".txt", ".cmake"):
        assert "-ffast-math" not in re.sub(r"#.*", "", path.read_text("utf-8")), relative(path)


@in_repository
def test_isa_files_hold_no_std_containers() -> None:
    """Rules 1 and 2 of the folder: what allocates leaves weak symbols, what is static and dynamic runs at import."""
    pattern = re.compile(
        r"std::(vector|string|map|function|unique_ptr|shared_ptr)\b|#include <(iostream|vector|string)>"
    )
    users = [relative(p) for p in (ROOT / "csrc" / "isa").iterdir() if pattern.search(p.read_text("utf-8"))]
    assert users == []


@in_repository
def test_nothing_is_left_for_later() -> None:
    # Put together here, so that this file does not find itself.
    pattern = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"]) + r")\b")
    found = [
        f"{relative(path)}:{number}"
        for path in sources(".py", ".pyi", ".cpp", ".hpp", ".md", ".toml", ".cmake", ".txt", ".json", ".yaml")
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


@in_repository
def test_every_source_file_opens_with_what_it_promises() -> None:
    silent = []
    for path in sources(".py", ".cpp", ".hpp"):
        text = path.read_text("utf-8")
        opening = ast.get_docstring(ast.parse(text)) if path.suffix == ".py" else text.startswith("//")
        if not opening and text.strip():
            silent.append(relative(path))
    assert silent == []


@in_repository
def test_lines_are_at_most_120_characters() -> None:
    long = [
        f"{relative(path)}:{number}"
        for path in sources(".py", ".pyi", ".cpp", ".hpp", ".cmake")
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if len(line) > 120
    ]
    assert long == []


def test_installed_package_is_complete() -> None:
    """The wheel carries the type information and the data, and imports numpy alone."""
    installed = Path(inspect.getfile(fn)).parent
    for name in ("py.typed", "_core.pyi"):
        assert (installed / name).is_file(), name


def test_versions_agree() -> None:
    from importlib.metadata import version

    assert fn.__version__ == _core.__version__ == version("fastnorm")


def test_import_needs_numpy_alone() -> None:
    code = """
    import sys
    before = set(sys.modules)
    import numpy
    with_numpy = set(sys.modules)
    import fastnorm
    new = {name.partition(".")[0] for name in set(sys.modules) - with_numpy} - sys.stdlib_module_names
    print(sorted(new))
    """
    assert output_of(code) == "['fastnorm']"
