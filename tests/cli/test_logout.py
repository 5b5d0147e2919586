"""`offloop logout`: browsers must be let in again, programs with a token need not."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from offloop.cli.main import app
from offloop.dashboard.options import Options
from offloop.dashboard.serving.security import UserKey
from offloop.dashboard.serving.server import Server


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "offloop"


def logout() -> tuple[int, str]:
    result = CliRunner().invoke(app, ["logout"])
    return result.exit_code, result.output.strip()


def test_it_forgets_the_key_of_all_pages(state: Path) -> None:
    assert logout() == (0, "No browser was logged in.")
    server = Server(Options(port=0))
    try:
        gate = server._gate
        cookie, key = gate.cookie("control", secure=False), gate.page_key("control", server.port)
        assert gate.role_of_page([cookie], [key], server.port) == "control"
        assert logout() == (0, "All browsers are logged out.")
        assert gate.role_of_page([cookie], [key], server.port) is None
        assert gate.role_of_token(server.token) == "control"
    finally:
        server.close("the test is over")
    assert list(state.iterdir()) == []


def test_what_cannot_be_deleted_is_an_error(state: Path) -> None:
    UserKey().ensure()
    (state / "dashboard.key").unlink()
    (state / "dashboard.key").mkdir()
    code, said = logout()
    assert code == 2 and said.startswith(f"offloop: {state}/dashboard.key cannot be deleted: ")


def test_it_needs_no_torch(state: Path) -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from offloop.cli.main import app; "
        "assert CliRunner().invoke(app, ['logout']).exit_code == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
