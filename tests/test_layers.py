"""Rules of the house that no linter knows: floors, literals, names, sizes, imports, docs."""

import abc
import ast
import importlib
import inspect
import io
import re
import shutil
import subprocess
import sys
import tokenize
import typing
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "symflow"
FILES = sorted(PACKAGE.rglob("*.py"))

MAX_LINES = 420
LOADED_WHEN_USED = {
    "geoopt",
    "hypothesis",
    "matplotlib",
    "pytorch_lightning",
    "scipy.optimize",
    "sklearn",
    "torch_geometric",
    "torchdyn",
}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = [module_name(file) for file in FILES if file.name != "__main__.py"]
PACKAGES = [module_name(file) for file in FILES if file.name == "__init__.py"]


def run(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


# ---------------------------------------------------------------- floors


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    config = str(ROOT / "pyproject.toml")
    return run(
        "from importlinter.cli import lint_imports\n"
        f"raise SystemExit(lint_imports(config_filename={config!r}, no_cache=True))",
        cwd=folder,
    )


def test_modules_import_only_from_floors_below():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_import_from_above_or_of_a_reserved_library_breaks_the_contract(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "symflow", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "symflow" / "errors.py").open("a") as file:
        file.write("\ndef late():\n    import geoopt\n    import symflow.cli\n")
    result = lint_imports(tmp_path)
    assert result.returncode != 0
    assert "symflow.errors -> symflow.cli" in result.stdout
    assert "symflow.errors -> geoopt" in result.stdout


def root_imports(source: str) -> list[int]:
    """Lines that import from symflow itself, whose lazy names import-linter cannot follow."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            if any(alias.name == "symflow" for alias in node.names):
                found.append(node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module == "symflow":
            names = {alias.name for alias in node.names}
            if not all((PACKAGE / n).is_dir() or (PACKAGE / f"{n}.py").exists() for n in names):
                found.append(node.lineno)
    return found


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_only_the_top_floor_imports_the_root(file):
    top = {"cli", "report", "__main__"}
    if file.relative_to(PACKAGE).with_suffix("").parts[0] not in top:
        assert root_imports(file.read_text()) == []


def test_root_imports_are_seen():
    source = "import symflow\nfrom symflow import Quotient\nimport symflow.errors\n"
    assert root_imports(source + "from symflow import errors\n") == [1, 2]


# ---------------------------------------------------------------- literals, names, sizes


def small_literals(source: str) -> list[str]:
    """Numbers typed as 1e-6, which belong into the table of tolerances."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [
        f"line {token.start[0]}: {token.string}"
        for token in tokens
        if token.type == tokenize.NUMBER and re.search("e-", token.string, re.IGNORECASE)
    ]


@pytest.mark.parametrize(
    "file", [f for f in FILES if f != PACKAGE / "numerics.py"], ids=module_name
)
def test_tolerances_are_typed_only_in_numerics(file):
    assert small_literals(file.read_text()) == []


@pytest.mark.parametrize("number", ["1e-6", "2.5E-08", ".5e-3", "1_0e-2"])
def test_small_literals_are_seen(number):
    assert small_literals(f"x = y + {number}\n") == [f"line 1: {number}"]


def test_comments_strings_and_large_numbers_are_no_small_literals():
    assert small_literals('x = 1e3  # not 1e-6\ny = "1e-6"\nz = 0.001 - 1e5 - 1\n') == []


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_module_says_what_is_inside(file):
    parts = set(file.relative_to(PACKAGE).with_suffix("").parts)
    assert not parts & {"utils", "util", "helpers", "helper", "common", "misc"}


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_file_fits_in_a_head(file):
    assert len(file.read_text().splitlines()) <= MAX_LINES


# ---------------------------------------------------------------- what an import costs


def test_import_leaves_heavy_parts_for_later():
    result = run("import sys, symflow\nprint(*sys.modules)")
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert "torch" in loaded
    assert not loaded & LOADED_WHEN_USED


# ---------------------------------------------------------------- classes and docstrings


def public_members(module_name: str, kind) -> list:
    module = importlib.import_module(module_name)
    return [
        value
        for name, value in vars(module).items()
        if kind(value) and value.__module__ == module_name and not name.startswith("_")
    ]


def abstract_or_final(cls: type) -> bool:
    if issubclass(cls, BaseException):  # meant to be derived from, and to be caught by its base
        return True
    abstract = inspect.isabstract(cls) or vars(cls).get("_is_protocol", False)
    return abstract != vars(cls).get("__final__", False)


@pytest.mark.parametrize("name", MODULES)
def test_classes_are_abstract_or_final(name):
    assert [
        c.__name__ for c in public_members(name, inspect.isclass) if not abstract_or_final(c)
    ] == []


def test_open_classes_are_seen():
    class Open:
        pass

    class Abstract(abc.ABC):
        @abc.abstractmethod
        def act(self): ...

    @typing.final
    class Final(Abstract):
        def act(self): ...

    class Leaking(Final):  # type: ignore[misc]
        pass

    assert [abstract_or_final(c) for c in (Open, Abstract, Final, Leaking)] == [
        False,
        True,
        True,
        False,
    ]


def undocumented(cls: type) -> list[str]:
    """Public methods and properties of a class without a docstring, own or of the contract."""
    return [
        f"{cls.__name__}.{name}"
        for name, value in vars(cls).items()
        if not name.startswith("_")
        and (inspect.isroutine(value) or isinstance(value, property | classmethod | staticmethod))
        and not any(vars(base)[name].__doc__ for base in cls.__mro__ if name in vars(base))
    ]


@pytest.mark.parametrize("name", MODULES)
def test_methods_are_documented_where_they_are_promised(name):
    assert [m for c in public_members(name, inspect.isclass) for m in undocumented(c)] == []


def test_undocumented_methods_are_seen():
    class Contract:
        def told(self):
            """Told."""

    class Fulfilled(Contract):
        def told(self): ...

        def untold(self): ...

        @property
        def bare(self): ...

    assert undocumented(Fulfilled) == ["Fulfilled.untold", "Fulfilled.bare"]


@pytest.mark.parametrize("name", PACKAGES)
def test_exported_names_have_an_example(name):
    package = importlib.import_module(name)
    exported = {n: getattr(package, n) for n in package.__all__}
    without = [
        n
        for n, value in exported.items()
        if (inspect.isroutine(value) or inspect.isclass(value))
        and not (inspect.isclass(value) and issubclass(value, BaseException))
        and not inspect.isabstract(value)  # shown by the examples of those who fulfil it
        and ">>>" not in (inspect.getdoc(value) or "")
    ]
    assert without == []
