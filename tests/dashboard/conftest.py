"""What the tests of the live page share."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    # Only where there is a browser
    from live_page import OpenPage, Training
    from notebook import Lab, Notebook
    from playwright.sync_api import Browser, Page

CHROMIUM: Final = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(autouse=True, scope="session")
def state_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the key that signs cookies away from the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    folder = tmp_path_factory.mktemp("certificate")
    files = folder / "certificate.pem", folder / "key.pem"
    if shutil.which("openssl") is None:
        pytest.skip("making a certificate needs openssl")
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=offloop", "-addext", "subjectAltName=IP:127.0.0.1"]
    where = ["-out", str(files[0]), "-keyout", str(files[1])]
    subprocess.run(["openssl", "req", *kind, *names, *where], check=True, capture_output=True)
    return files


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of the Chromium that the machine has, for playwright's `executable_path`.

    Tests that need it are skipped where it or playwright is missing; OFFLOOP_REQUIRE_BROWSER=1,
    which .ci/run sets, makes them fail instead.
    """
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is not None and importlib.util.find_spec("playwright") is not None:
        return found
    missing = f"tests in a browser need playwright (offloop[browser]) and one of {', '.join(CHROMIUM)}"
    if os.environ.get("OFFLOOP_REQUIRE_BROWSER") == "1":
        pytest.fail(missing)
    pytest.skip(missing)


@pytest.fixture(scope="module")
def browser(chromium: str) -> "Iterator[Browser]":
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: "Browser") -> "Iterator[OpenPage]":
    """Open addresses in tabs of their own; fails if a page breaks a policy or throws."""
    from drawing import RECORD
    from live_page import PATIENCE
    from playwright.sync_api import expect

    expect.set_options(timeout=PATIENCE)
    problems: list[str] = []
    contexts = []

    def open_page(url: str, **options: Any) -> "Page":
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        context.set_default_timeout(PATIENCE)
        context.add_init_script(RECORD)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console",
            lambda message: problems.append(message.text) if "Content Security" in message.text else None,
        )
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture
def training() -> "Iterator[Callable[..., Training]]":
    from live_page import Training

    with contextlib.ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(Training(*arguments, **options))


@pytest.fixture
def started(
    training: "Callable[..., Training]", open_page: "OpenPage", tmp_path: Path
) -> "tuple[Training, Page]":
    """A run that has done ten steps, and its page."""
    from live_page import figure, word
    from playwright.sync_api import expect

    run = training(tmp_path).begin()
    for number in range(1, 11):
        run.step(loss=1 / number)
    page = open_page(run.dashboard.url)
    expect(word(page)).to_have_text("live")
    expect(figure(page, "Step")).to_contain_text("10")
    return run, page


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Iterator[Notebook]":
    """A notebook with a kernel of its own."""
    from notebook import Notebook

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    made = Notebook(tmp_path)
    yield made
    made.close()


@pytest.fixture
def lab() -> "Iterator[Lab]":
    """A site of another name."""
    from notebook import Lab

    made = Lab()
    yield made
    made.close()
