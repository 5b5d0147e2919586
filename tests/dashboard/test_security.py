"""dashboard/serving/security.py: who is let in, and with what right."""

import hashlib
import hmac
import itertools
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloop.dashboard.protocol.limits import Role
from offloop.dashboard.serving.security import (
    COOKIE_DAYS,
    Gate,
    UserKey,
    content_security_policy,
    forget_key,
    host_name,
    is_loopback,
    new_token,
)

TOKEN, READER = "t" * 24, "r" * 24


class Fixed:
    """A key in memory."""

    def __init__(self, key: bytes) -> None:
        self.key: bytes | None = key

    def current(self) -> bytes | None:
        return self.key

    def ensure(self) -> bytes:
        assert self.key is not None
        return self.key


def gate(**options: Any) -> Gate:
    arguments: dict[str, Any] = {
        "bound_to": "127.0.0.1",
        "token": TOKEN,
        "read_only_token": READER,
        "key": Fixed(b"k" * 32),
    }
    return Gate(**(arguments | options))


def value_of(set_cookie: str) -> str:
    """Return what a browser sends back."""
    return set_cookie.partition(";")[0]


# Names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound_to", "hosts", "is_answered"),
    [
        pytest.param("127.0.0.1", ["127.0.0.1:8321"], True, id="address"),
        pytest.param("127.0.0.1", ["localhost:8321"], True, id="localhost"),
        pytest.param("127.0.0.1", ["LocalHost"], True, id="any-case"),
        pytest.param("127.0.0.1", ["[::1]:8321"], True, id="IPv6"),
        pytest.param("127.0.0.1", ["127.8.9.1:80"], True, id="other-loopback-address"),
        pytest.param("127.0.0.1", ["hub.example.org"], True, id="allowed-name"),
        pytest.param("127.0.0.1", ["evil.example.org:8321"], False, id="rebound-name"),
        pytest.param(
            "127.0.0.1", ["127.0.0.1.evil.example.org"], False, id="name-that-begins-like-an-address"
        ),
        pytest.param("127.0.0.1", ["192.168.1.7:8321"], False, id="address-that-is-not-listened-on"),
        pytest.param("127.0.0.1", [], False, id="none"),
        pytest.param("127.0.0.1", ["127.0.0.1", "127.0.0.1"], False, id="two"),
        pytest.param("127.0.0.1", [""], False, id="empty"),
        pytest.param("127.0.0.1", ["127.0.0.1:port"], False, id="port-that-is-no-number"),
        pytest.param("127.0.0.1", ["me@127.0.0.1"], False, id="with-a-user"),
        pytest.param("127.0.0.1", ["127.0.0.1/x"], False, id="with-a-path"),
        pytest.param("127.0.0.1", ["127.0.0.1, evil"], False, id="list"),
        pytest.param("127.0.0.1", ["[::1"], False, id="half-an-address"),
        pytest.param("0.0.0.0", ["192.168.1.7:8321"], True, id="address-of-an-open-server"),
        pytest.param("0.0.0.0", ["evil.example.org"], False, id="rebound-name-of-an-open-server"),
        pytest.param("Train.example.org", ["train.example.org:8321"], True, id="name-it-is-bound-to"),
    ],
)
def test_only_own_names_are_answered(bound_to: str, hosts: list[str], is_answered: bool) -> None:
    assert gate(bound_to=bound_to, allow_hosts=["Hub.example.org"]).allows_host(hosts) is is_answered


@given(st.text(max_size=60))
def test_any_host_header_has_an_answer(header: str) -> None:
    assert gate().allows_host([header]) in (True, False)
    name = host_name(header)
    assert name is None or not any(character.isspace() or character in "/@" for character in name)


@pytest.mark.parametrize(
    ("origins", "has_bearer", "is_allowed"),
    [
        pytest.param(["http://127.0.0.1:8321"], False, True, id="own-page"),
        pytest.param(["https://127.0.0.1:8321"], False, True, id="behind-a-proxy-that-speaks-https"),
        pytest.param([], True, True, id="program-with-a-token"),
        pytest.param([], False, False, id="program-with-a-cookie"),
        pytest.param(["http://127.0.0.1:9999"], False, False, id="page-on-another-port"),
        pytest.param(["http://localhost:8321"], False, False, id="another-name-of-this-machine"),
        pytest.param(["http://evil.example.org"], True, False, id="page-with-a-token"),
        pytest.param(["http://127.0.0.1:8321@evil.example.org"], False, False, id="with-a-user"),
        pytest.param(["http://127.0.0.1:8321", "http://127.0.0.1:8321"], False, False, id="two"),
        pytest.param(["null"], False, False, id="sandboxed-frame"),
        pytest.param(["file://"], False, False, id="file"),
        pytest.param(["http://["], False, False, id="malformed"),
    ],
)
def test_a_websocket_is_opened_by_our_own_page_or_with_a_token(
    origins: list[str], has_bearer: bool, is_allowed: bool
) -> None:
    assert gate().allows_origin(origins, "127.0.0.1:8321", has_bearer=has_bearer) is is_allowed


@given(st.text(max_size=60))
def test_any_origin_has_an_answer(origin: str) -> None:
    if origin not in ("http://127.0.0.1:8321", "https://127.0.0.1:8321"):
        assert not gate().allows_origin([origin], "127.0.0.1:8321.", has_bearer=False)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("127.example.org", False),
        ("", False),
    ],
)
def test_loopback_is_told_by_structure(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


# Tokens ------------------------------------------------------------------------------------------


def test_each_token_gives_its_role() -> None:
    assert gate().role_of_token(TOKEN) == "control"
    assert gate().role_of_token(READER) == "read_only"
    assert gate().role_of_token("") is None
    assert gate().role_of_token(TOKEN[:-1]) is None
    assert new_token() != new_token() and len(new_token()) >= 32


@pytest.mark.parametrize(
    ("query", "role"),
    [
        (f"token={TOKEN}", "control"),
        (f"x=1&token={READER}", "read_only"),
        (f"token={TOKEN}&token={TOKEN}", None),
        ("token=", None),
        ("token=%FF%00", None),
        ("nothing", None),
        ("&".join(f"a{number}=1" for number in range(50)) + f"&token={TOKEN}", None),
    ],
)
def test_token_in_the_address(query: str, role: str | None) -> None:
    assert gate().role_in_query(query) == role


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=16, max_size=40))
def test_any_token_survives_the_address_and_the_header(token: str) -> None:
    guard = gate(token=token)
    assert guard.role_in_query(f"token={quote(token, safe='')}") == "control"
    assert guard.role_of_bearer([f"Bearer {token}"]) == "control"


@pytest.mark.parametrize(
    ("headers", "role"),
    [
        ([f"Bearer {TOKEN}"], "control"),
        ([f"bearer  {READER} "], "read_only"),
        ([f"Basic {TOKEN}"], None),
        ([TOKEN], None),
        ([""], None),
        ([f"Bearer {TOKEN}", f"Bearer {TOKEN}"], None),
        (["Bearer wr\xf6ng"], None),
    ],
)
def test_bearer(headers: list[str], role: str | None) -> None:
    assert gate().role_of_bearer(headers) == role


# Cookies -----------------------------------------------------------------------------------------


def test_a_cookie_gives_its_role_back() -> None:
    guard = gate()
    roles: tuple[Role, ...] = ("control", "read_only")
    for role in roles:
        header = guard.cookie(role, secure=False)
        assert guard.role_of_cookie([value_of(header)]) == role
        assert guard.role_of_cookie([f"a=b; {value_of(header)}; c"]) == role
        flags = {part.strip() for part in header.split(";")[1:]}
        assert flags == {"HttpOnly", "SameSite=Strict", "Path=/", f"Max-Age={COOKIE_DAYS * 86400}"}
    assert "; Secure" in guard.cookie("control", secure=True)


def test_a_cookie_survives_the_process_and_not_the_key() -> None:
    cookie = value_of(gate().cookie("control", secure=False))
    assert gate(token="other" * 5, read_only_token="again" * 5).role_of_cookie([cookie]) == "control"
    stranger = gate(key=Fixed(b"x" * 32))
    assert stranger.role_of_cookie([cookie]) is None
    # Two users' tunnels under one name do not meet.
    assert stranger.cookie("control", secure=False).partition("=")[0] != cookie.partition("=")[0]


def test_a_cookie_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = gate()
    cookie = value_of(guard.cookie("control", secure=False))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + COOKIE_DAYS * 86_400 - 60)
    assert guard.role_of_cookie([cookie]) == "control"
    monkeypatch.setattr(time, "time", lambda: now + COOKIE_DAYS * 86_400 + 60)
    assert guard.role_of_cookie([cookie]) is None


def test_a_read_only_server_gives_nobody_control() -> None:
    """Not even who has a cookie, or a token, from before."""
    cookie = value_of(gate().cookie("control", secure=False))
    guard = gate(read_only=True)
    assert guard.role_of_cookie([cookie]) == "read_only"
    assert guard.role_of_token(TOKEN) == "read_only"
    assert guard.role_of_bearer([f"Bearer {TOKEN}"]) == "read_only"
    assert guard.role_of_token("wrong") is None


@given(st.data())
def test_a_cookie_that_was_changed_is_worth_nothing(data: st.DataObject) -> None:
    guard = gate()
    name, _, value = value_of(guard.cookie("read_only", secure=False)).partition("=")
    place = data.draw(st.integers(0, len(value) - 1))
    put = data.draw(st.characters(min_codepoint=33, max_codepoint=255, exclude_characters=";"))
    changed = value[:place] + put + value[place + 1 :]
    if changed != value:
        assert guard.role_of_cookie([f"{name}={changed}"]) is None


@given(st.text(max_size=200))
def test_any_cookie_header_has_an_answer(header: str) -> None:
    guard = gate()
    assert guard.role_of_cookie([header]) is None
    name = guard.cookie("control", secure=False).partition("=")[0]
    assert guard.role_of_cookie([f"{name}={header}"]) is None


def test_a_cookie_of_an_earlier_version_is_worth_nothing() -> None:
    """It was enough by itself, and may have been seen by any server on this machine."""
    guard = gate()
    text = f"control.{int(time.time()) + 86_400}"
    value = f"{text}.{hmac.new(b'k' * 32, text.encode(), hashlib.sha256).hexdigest()}"
    for name in (
        f"offloop_{hashlib.sha256(b'k' * 32).hexdigest()[:8]}",
        guard.cookie("control", secure=False),
    ):
        assert guard.role_of_cookie([f"{name.partition('=')[0]}={value}"]) is None


# Keys of pages -----------------------------------------------------------------------------------


def test_cookie_and_key_give_the_lower_role_of_both_together() -> None:
    guard = gate()
    roles: tuple[Role, ...] = ("control", "read_only")
    for cookie_role, key_role in itertools.product(roles, roles):
        cookie = value_of(guard.cookie(cookie_role, secure=False))
        key = guard.page_key(key_role, 8321)
        expected = "control" if (cookie_role, key_role) == ("control", "control") else "read_only"
        assert guard.role_of_page([cookie], [key], 8321) == expected
        assert guard.role_of_page([cookie], ["old", key], 8321) == expected
        assert guard.role_of_page([cookie], [key], 8322) is None
        assert guard.role_of_page([cookie], [], 8321) is None
        assert guard.role_of_page([], [key], 8321) is None
        assert key not in cookie and cookie.rpartition(".")[2] != key


def test_a_read_only_server_gives_no_control_for_cookie_and_key_either() -> None:
    guard = gate(read_only=True)
    cookie = value_of(gate().cookie("control", secure=False))
    assert guard.role_of_page([cookie], [gate().page_key("control", 8321)], 8321) == "read_only"


def test_without_the_users_key_nothing_is_known() -> None:
    key = Fixed(b"k" * 32)
    guard = gate(key=key)
    cookie, half = value_of(guard.cookie("control", secure=False)), guard.page_key("control", 8321)
    assert guard.knows_cookie([cookie]) and guard.role_of_page([cookie], [half], 8321) == "control"
    for gone in (None, b"x" * 32):
        key.key = gone
        assert not guard.knows_cookie([cookie])
        assert guard.role_of_cookie([cookie]) is guard.role_of_page([cookie], [half], 8321) is None


@given(st.lists(st.text(max_size=40)))
def test_any_keys_have_an_answer(keys: list[str]) -> None:
    cookie = value_of(gate().cookie("control", secure=False))
    assert gate().role_of_page([cookie], keys, 8321) is None


def test_the_policy_of_the_page() -> None:
    policy = content_security_policy()
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
    assert "frame-ancestors 'none'" in policy and "unsafe" not in policy and "*" not in policy
    assert "frame-ancestors https://hub.example.org;" in content_security_policy(["https://hub.example.org"])


# The key -----------------------------------------------------------------------------------------


@pytest.fixture
def key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    yield tmp_path / "offloop" / "dashboard.key"


def test_the_key_is_made_once(key_file: Path) -> None:
    key = UserKey().ensure()
    assert len(key) == 32 and UserKey().ensure() == key and key_file.read_bytes() == key
    assert [file.name for file in key_file.parent.iterdir()] == ["dashboard.key"]


def test_only_its_user_can_read_the_key(key_file: Path) -> None:
    before = os.umask(0)
    try:
        UserKey().ensure()
    finally:
        os.umask(before)
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(key_file.parent.stat().st_mode) == 0o700


def test_processes_that_race_for_the_key_end_with_the_same(key_file: Path) -> None:
    imports = "import sys; from offloop.dashboard.serving.security import UserKey"
    script = f"{imports}; input(); print(UserKey().ensure().hex())"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for _ in range(2)
    ]
    for racer in racers:  # they are ready when they read, and go together
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    keys = {racer.communicate(timeout=60)[0].strip() for racer in racers}
    assert keys == {key_file.read_bytes().hex()}
    assert [file.name for file in key_file.parent.iterdir()] == ["dashboard.key"]


def test_a_damaged_key_is_replaced(key_file: Path) -> None:
    first = UserKey().ensure()
    key_file.write_bytes(b"half")
    second = UserKey().ensure()
    assert len(second) == 32 and second != first and UserKey().ensure() == second


def test_a_key_that_others_could_read_is_replaced(key_file: Path) -> None:
    first = UserKey().ensure()
    key_file.chmod(0o640)
    second = UserKey().ensure()
    assert second != first and stat.S_IMODE(key_file.stat().st_mode) == 0o600


def test_a_key_that_is_forgotten_is_read_as_none(key_file: Path) -> None:
    key = UserKey()
    assert key.current() is None
    first = key.ensure()
    assert key.current() == first and forget_key() and not forget_key()
    assert key.current() is None
    assert key.ensure() != first and UserKey().current() == key.current()


def test_without_a_place_for_it_the_key_is_for_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("no directory")
    monkeypatch.setenv("XDG_STATE_HOME", str(file))
    key = UserKey()
    assert len(key.ensure()) == 32 and key.current() == key.ensure()
