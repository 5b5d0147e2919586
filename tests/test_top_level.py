"""offloop/__init__.py: the names that programs import, and what importing them costs."""

import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Final

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


def test_dir_shows_names_packages_and_version() -> None:
    assert {*offloop.__all__, "engine", "callbacks", "dashboard", "__version__"} <= set(dir(offloop))


def test_the_version_is_that_of_the_installed_package() -> None:
    assert offloop.__version__ == metadata.version("offloop")


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
