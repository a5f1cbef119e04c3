"""Sessions for people who change fastnorm: `nox -l` lists them, `nox -s lint types` runs two.

Promises fresh environments and the commands of CONTRIBUTING.md; holds no logic of its own.
"""

import nox

# The pinned tools of the "dev" extra, without installing (and so compiling) fastnorm for them.
DEV = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["dev"]

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["lint", "types", "tests"]


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """The README's test command."""
    session.install(".[test]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python=["3.10"])
def oldest(session: nox.Session) -> None:
    """The suite on the oldest NumPy that fastnorm promises to work with."""
    session.install(".[test]", "numpy==1.26.*")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """The pre-commit hooks on every file: they correct what they can, and fail when they had to."""
    session.install(*DEV, "numpy")
    session.run("pre-commit", "run", "--all-files", "--show-diff-on-failure", *session.posargs)


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict on fastnorm/ (settings in pyproject.toml)."""
    session.install(*(tool for tool in DEV if tool.startswith("mypy")), "numpy")
    session.run("mypy", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Builds bench_kernels and runs it: `nox -s bench -- --benchmark_filter=layer_norm`."""
    session.install("cmake", "ninja")
    session.run("cmake", "--preset", "bench")
    session.run("cmake", "--build", "--preset", "bench")
    session.run("build/bench/bench/bench_kernels", *session.posargs, external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Links of the Markdown files, the README's code, and docs/api.md against the docstrings."""
    session.install(".[test]")
    session.run("python", "-m", "pytest", "tests/test_docs.py", *session.posargs)
