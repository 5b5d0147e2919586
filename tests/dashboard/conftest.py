"""What the tests of the live page share."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import Final

import pytest

CHROMIUM: Final = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(autouse=True, scope="session")
def state_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the key that signs cookies away from the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


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
