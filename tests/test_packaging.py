"""What is installed is what stands in the folders."""

import json
import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS: dict[str, Any] = PYPROJECT["tool"]["setuptools"]
PREFIX = "offloop."


def folder_of(package: str) -> Path:
    """Return the folder of a package: folder X at the top is imported as offloop.X."""
    return ROOT.joinpath(*package.removeprefix(PREFIX).split("."))


def packages_in_folders() -> list[str]:
    """Name every package that the folders hold: all that have an `__init__.py`, except tests."""
    tops = [
        path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name not in ("offloop", "tests")
    ]
    folders = [init.parent for top in tops for init in top.rglob("__init__.py")]
    return ["offloop", *sorted(PREFIX + ".".join(folder.relative_to(ROOT).parts) for folder in folders)]


def test_every_package_is_listed() -> None:
    assert sorted(SETUPTOOLS["packages"]) == packages_in_folders()


def test_top_folders_are_mapped_by_their_names() -> None:
    tops = {package for package in SETUPTOOLS["packages"] if package.count(".") == 1}
    assert SETUPTOOLS["package-dir"] == {top: top.removeprefix(PREFIX) for top in tops}


@pytest.mark.parametrize("package", SETUPTOOLS["packages"])
def test_every_package_says_that_it_is_typed(package: str) -> None:
    assert (folder_of(package) / "py.typed").is_file()


@pytest.mark.skipif(
    not (ROOT / "offloop" / "engine").exists(), reason="they are in a checkout, not in an sdist"
)
def test_the_top_folder_links_to_every_other() -> None:
    links = {path.name: path.resolve() for path in (ROOT / "offloop").iterdir() if path.is_symlink()}
    assert links == {name: ROOT / name for name in SETUPTOOLS["package-dir"].values()}


def test_no_removed_module_waits_in_build() -> None:
    """setuptools packs whatever an earlier build left in build/lib, deleted modules included."""
    built = ROOT / "build" / "lib" / "offloop"
    stale = [
        path.relative_to(built)
        for path in built.rglob("*.py")
        if not (ROOT / path.relative_to(built)).exists()
    ]
    assert stale == [], "remove them with: make clean"


def test_the_page_is_packed_and_built_by_the_backend() -> None:
    """What the build does is shown in tests/dashboard/test_build.py."""
    build_system = PYPROJECT["build-system"]
    (folder,) = build_system["backend-path"]
    assert (ROOT / folder / f"{build_system['build-backend']}.py").is_file()
    assert SETUPTOOLS["package-data"]["offloop.dashboard"] == ["static/*"]


def test_packages_of_the_page_are_pinned_exactly() -> None:
    web = ROOT / "dashboard" / "web"
    package = json.loads((web / "package.json").read_bytes())
    wanted = package["dependencies"] | package["devDependencies"]
    assert [name for name, version in wanted.items() if not re.fullmatch(r"\d+\.\d+\.\d+", version)] == []
    locked = json.loads((web / "package-lock.json").read_bytes())["packages"]
    for name, version in wanted.items():
        assert locked[f"node_modules/{name}"]["version"] == version
    for name, entry in locked.items():
        if name:  # "" is the page itself
            assert entry["resolved"].startswith("https://registry.npmjs.org/"), name
            assert entry["integrity"].startswith("sha512-"), name


def test_sources_of_the_page_are_the_same_bytes_on_every_system() -> None:
    """Windows' line ends would make a page that is current look outdated."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(
        ["git", "check-attr", "eol", "dashboard/web/src/page.ts", "dashboard/web/package.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert [line.rpartition(": ")[2] for line in done.stdout.splitlines()] == ["lf", "lf"]


def test_no_build_leftover_is_tracked() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    ).stdout.splitlines()
    leftovers = ("build", "dist", ".venv", "__pycache__", "static", "node_modules")
    assert [name for name in listed if set(leftovers) & set(Path(name).parts)] == []
    assert [name for name in listed if name.startswith("runs/")] == []
    assert [name for name in listed if ".egg-info/" in name or name.endswith(".pyc")] == []


def test_constraints_pin_every_dependency_exactly() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if pin.count("==") != 1 or "+" in pin] == []
    pinned = {pin.partition("==")[0].lower() for pin in pins}
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    wanted = [*PYPROJECT["project"]["dependencies"], *(one for extra in extras for one in extra)]
    names = {requirement.partition(">=")[0].lower() for requirement in wanted}
    assert {name for name in names if not name.startswith("offloop[")} <= pinned


def test_offloop_command_is_the_command_line() -> None:
    try:
        entry_points = metadata.distribution("offloop").entry_points
    except metadata.PackageNotFoundError:
        pytest.skip("offloop is on the path, but not installed")
    (command,) = entry_points.select(group="console_scripts", name="offloop")
    assert command.value == PYPROJECT["project"]["scripts"]["offloop"]
    assert callable(command.load())
