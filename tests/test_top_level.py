"""offloop/__init__.py: the names that programs import, and what importing them costs."""

import ast
import importlib
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import pytest

import offloop

ROOT: Final = Path(__file__).parent.parent
SOURCE: Final = ROOT / "offloop" / "__init__.py"


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    """Return what Python prints, run in a folder of its own."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={"PATH": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", offloop.__all__)
def test_a_name_is_that_of_its_package(name: str) -> None:
    value = getattr(offloop, name)
    home = importlib.import_module(f"offloop.{offloop._HOME[name]}")
    assert value is getattr(home, name)
    assert name in home.__all__
    assert value.__doc__


def test_type_checkers_see_the_names_that_there_are() -> None:
    (block,) = (
        node
        for node in ast.parse(SOURCE.read_text()).body
        if isinstance(node, ast.If) and node.orelse == [] and "TYPE_CHECKING" in ast.unparse(node.test)
    )
    seen: dict[str, Any] = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.module is not None
        seen.update({alias.asname or alias.name: node.module for alias in node.names})
    assert seen == {name: f"offloop.{package}" for name, package in offloop._HOME.items()}


def test_all_is_sorted_and_dir_shows_names_packages_and_version() -> None:
    assert offloop.__all__ == sorted(set(offloop.__all__))
    assert {*offloop.__all__, "engine", "callbacks", "dashboard", "__version__"} <= set(dir(offloop))


def test_the_version_is_that_of_the_installed_package() -> None:
    assert offloop.__version__ == metadata.version("offloop")


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'offloop' has no attribute 'Trianer'"):
        offloop.Trianer  # noqa: B018  # type: ignore[attr-defined]


def test_importing_offloop_loads_no_large_package_and_finds_the_others_at_their_first_use(
    tmp_path: Path,
) -> None:
    script = """
import sys, offloop
assert not {"torch", "msgspec", "anyio"} & set(sys.modules), sorted(sys.modules)
print(offloop.engine.EpochEnd is offloop.EpochEnd, "torch" in sys.modules)
"""
    assert python("-c", script, cwd=tmp_path) == "True False\n"


def test_python_m_offloop_is_the_command_line(tmp_path: Path) -> None:
    assert python("-m", "offloop", "--version", cwd=tmp_path) == f"offloop {offloop.__version__}\n"


def test_help_begins_with_what_offloop_is() -> None:
    assert offloop.__doc__ is not None
    assert offloop.__doc__.startswith("Offloop trains a PyTorch model in a thread of its own")


def test_a_tree_without_links_works_as_it_is(tmp_path: Path) -> None:
    """An unpacked sdist has none: the folders stand beside offloop/."""
    (tmp_path / "offloop").mkdir()
    for file in (SOURCE, SOURCE.with_name("__main__.py")):
        shutil.copy(file, tmp_path / "offloop")
    shutil.copytree(ROOT / "engine", tmp_path / "engine", ignore=shutil.ignore_patterns("__pycache__"))
    script = "import sys; sys.path.insert(0, '.'); import offloop.engine.events as e; print(e.__file__)"
    found = python("-c", script, cwd=tmp_path)
    assert Path(found.strip()).resolve() == (tmp_path / "engine" / "events.py").resolve()
