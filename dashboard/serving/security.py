"""Security: who may use the server, decided from a request's headers alone. No socket.

The attacker to consider is a page in another browser tab: it can send requests to 127.0.0.1, and a host name that its
owner resolves to 127.0.0.1 makes such a request look like one of ours. The token and the check of `Origin` prevent the
first, the list of accepted host names prevents the second.

The token in the address is valid while the process lives. The browser exchanges it at once for two halves, of which
neither is enough: a cookie that scripts cannot read, and a key for the page. Cookies know no ports: the browser sends
them to any server on 127.0.0.1. The key it gives to nobody: the page keeps it in the storage of its own address, port
included, and sends it in `hi`. Both come from a key of the user, so that a tab also finds the user's next run.
"""

import contextlib
import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import parse_qs, urlsplit

from offloop.dashboard.protocol.limits import Role

COOKIE_DAYS: Final = 30
LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})
SECURITY_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def content_security_policy(frame_ancestors: Sequence[str] = ()) -> str:
    """Return the policy of the page: it loads only from its own server, and only `frame_ancestors` may embed it."""
    ancestors = " ".join(frame_ancestors) or "'none'"
    return (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob:; "
        f"base-uri 'none'; form-action 'none'; frame-ancestors {ancestors}; "
        "require-trusted-types-for 'script'"
    )


def is_loopback(host: str) -> bool:
    """True for names and addresses that are reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_name(header: str) -> str | None:
    """Return the name in a `Host` header, without port and brackets, in lower case; None if it is malformed."""
    if any(character.isspace() or character in "/\\@?#," for character in header) or not header:
        return None
    try:
        parts = urlsplit(f"//{header}")
        # Raises if the port is not a number.
        _ = parts.port
    except ValueError:
        return None
    return parts.hostname


class Key(Protocol):
    """The key of a user."""

    def current(self) -> bytes | None:
        """Return the key; None if there is none."""

    def ensure(self) -> bytes:
        """Return the key, or create it."""


class Gate:
    """Decides which requests are answered, and with which role."""

    def __init__(
        self,
        *,
        bound_to: str,
        token: str,
        read_only_token: str,
        key: Key,
        read_only: bool = False,
        allow_hosts: Sequence[str] = (),
    ) -> None:
        """Guard a server.

        Args:
            bound_to: The address that it listens on.
            token: Grants the control role.
            read_only_token: Grants the read_only role.
            key: Signs cookies, and makes the keys of pages.
            read_only: Grant at most the read_only role, also to cookies of earlier servers.
            allow_hosts: More host names under which browsers may reach the server.
        """
        self._bound_to = bound_to
        self._tokens: tuple[tuple[str, Role], ...] = ((token, "control"), (read_only_token, "read_only"))
        self._key = key
        self._read_only = read_only
        # What lets a page be in a frame, and in, once a notebook shows it. Any thread may set it, once.
        self._frame: tuple[str, str] | None = None
        self._names = LOOPBACK_NAMES | {bound_to.lower(), *(name.lower() for name in allow_hosts)}

    def allows_host(self, headers: Sequence[str]) -> bool:
        """True for exactly one `Host` header that names this server.

        A literal address cannot be a name that an attacker resolves to this machine, so any is accepted if the
        server listens for other machines.
        """
        if len(headers) != 1:
            return False
        name = host_name(headers[0])
        if name is None:
            return False
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not is_loopback(self._bound_to)

    def allows_origin(self, origins: Sequence[str], host: str, *, has_bearer: bool) -> bool:
        """True if our own page opens the websocket, or a program that is no browser and has a token."""
        if not origins:
            return has_bearer
        if len(origins) != 1:
            return False
        try:
            parts = urlsplit(origins[0])
        except ValueError:
            return False
        return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()

    def role_of_token(self, token: str) -> Role | None:
        """Return the role that a token grants."""
        found: Role | None = None
        # Compare all tokens, so that the duration reveals nothing.
        for known, role in self._tokens:
            if hmac.compare_digest(known.encode(), token.encode("utf-8", "replace")):
                found = found or role
        return self._at_most(found)

    def role_of_bearer(self, authorizations: Sequence[str]) -> Role | None:
        """Return the role that the `Authorization` header of a program grants."""
        if len(authorizations) != 1:
            return None
        scheme, _, token = authorizations[0].partition(" ")
        return self.role_of_token(token.strip()) if scheme.lower() == "bearer" else None

    def role_of_cookie(self, cookies: Sequence[str]) -> Role | None:
        """Return the role that `Cookie` headers claim. It is not enough: others may have the cookie."""
        return self._at_most(self._role_in(cookies))

    def admit_frames(self) -> tuple[str, str]:
        """Let notebooks show the page in frames. Any thread.

        Returns:
            What the query of a frame's address has as `embed`: only then other pages of this machine may be around it,
            so that none can have the user click on what they do not see. And the key that the frame's page needs: where
            another site embeds it, the browser keeps the cookie away, so this key is enough. 128 bits each, valid
            while the process lives.
        """
        if self._frame is None:
            self._frame = secrets.token_hex(16), secrets.token_hex(16)
        return self._frame

    @property
    def admits_frames(self) -> bool:
        """True once a notebook shows the page."""
        return self._frame is not None

    def may_be_framed(self, query: str) -> bool:
        """True for the address of a frame that a notebook shows."""
        given = re.search(r"(?:^|&)embed=([0-9a-f]{32})(?:&|$)", query)
        return self._frame is not None and given is not None and hmac.compare_digest(given[1], self._frame[0])

    def role_of_page(self, cookies: Sequence[str], keys: Sequence[str], port: int) -> Role | None:
        """Return the role that a cookie and the keys of a page grant together: the lower one of both.

        The key of frames needs no cookie.
        """
        if self._frame is not None and _is_among(self._frame[1], keys):
            return self._at_most("control")
        claimed, key = self._role_in(cookies), self._key.current()
        if claimed is None or key is None:
            return None
        roles: tuple[Role, ...] = ("control", "read_only")
        granted = [role for role in roles if _is_among(_page_key(key, role, port), keys)]
        if not granted:
            return None
        return self._at_most("read_only" if "read_only" in (claimed, granted[0]) else "control")

    def knows_cookie(self, cookies: Sequence[str]) -> bool:
        """False once the user has logged out."""
        return self._role_in(cookies, with_expired=True) is not None

    def _role_in(self, cookies: Sequence[str], *, with_expired: bool = False) -> Role | None:
        key = self._key.current()
        if key is None:
            return None
        wanted = _cookie_name(key)
        for header in cookies:
            for pair in header.split(";"):
                name, _, value = pair.strip().partition("=")
                if name == wanted and (role := _read_cookie(key, value, with_expired)) is not None:
                    return role
        return None

    def _at_most(self, role: Role | None) -> Role | None:
        return "read_only" if self._read_only and role is not None else role

    def role_in_query(self, query: str) -> Role | None:
        """Return the role of the token in an address; None if there is no valid one."""
        try:
            tokens = parse_qs(query, max_num_fields=16).get("token", [])
        except ValueError:
            # Too many fields.
            return None
        return self.role_of_token(tokens[0]) if len(tokens) == 1 else None

    def cookie(self, role: Role, *, secure: bool) -> str:
        """Return a `Set-Cookie` header for a role."""
        key = self._key.ensure()
        text = f"{role}.{int(time.time()) + COOKIE_DAYS * 86_400}"
        value = f"{text}.{_sign(key, 'cookie', text)}"
        return (
            f"{_cookie_name(key)}={value}; HttpOnly; SameSite=Strict; Path=/; Max-Age={COOKIE_DAYS * 86_400}"
            + ("; Secure" if secure else "")
        )

    def page_key(self, role: Role, port: int) -> str:
        """Return the key of a page at a port of this machine, for a role: 128 bits that the cookie does not contain."""
        return _page_key(self._key.ensure(), role, port)


def _cookie_name(key: bytes) -> str:
    """Depends on the key: another user's server, tunnelled to the same host name, uses another cookie."""
    return f"offloop_page_{_sign(key, 'name', '')[:8]}"


def _page_key(key: bytes, role: Role, port: int) -> str:
    return _sign(key, "page", f"{role}.{port}")[:32]


def _is_among(wanted: str, keys: Sequence[str]) -> bool:
    found = [hmac.compare_digest(wanted.encode(), key.strip().encode("utf-8", "replace")) for key in keys]
    return any(found)


def _read_cookie(key: bytes, value: str, with_expired: bool) -> Role | None:
    text, _, signature = value.rpartition(".")
    if not hmac.compare_digest(_sign(key, "cookie", text).encode(), signature.encode("utf-8", "replace")):
        return None
    role, _, until = text.partition(".")
    if not until.isascii() or not until.isdigit() or (int(until) < time.time() and not with_expired):
        return None
    return "control" if role == "control" else "read_only"


def _sign(key: bytes, purpose: str, text: str) -> str:
    """Sign a text; what is signed for one purpose is worth nothing for another."""
    return hmac.new(key, f"{purpose} 2 {text}".encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def new_token() -> str:
    """Return a random token of 192 bits."""
    return secrets.token_urlsafe(24)


def state_directory() -> Path:
    """Return the directory for the files that offloop keeps for a user between runs."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "offloop"


class UserKey:
    """The key of this user, in a file that only the user can read. `forget_key` deletes it."""

    def __init__(self) -> None:
        self._path = key_path()
        # Made if no such file can be written: for this process alone, so open tabs cannot find the next run.
        self._own: bytes | None = None
        # As last read, for when the file system does not answer.
        self._last: bytes | None = None

    def current(self) -> bytes | None:
        """Return the key; None if there is none, as after `offloop logout`. Reads the file each time."""
        with contextlib.suppress(OSError):
            self._last = _read_key(self._path)
        return self._last or self._own

    def ensure(self) -> bytes:
        """Return the key; the first call creates it."""
        path = self._path
        with contextlib.suppress(OSError):
            if (key := _read_key(path)) is not None:
                return key
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(secrets.token_bytes(32))
                    file.flush()
                    os.fsync(file.fileno())
                with contextlib.suppress(FileExistsError):
                    # Two processes that create the key at once both use the first one.
                    os.link(temporary, path)
            finally:
                temporary.unlink()
            if (key := _read_key(path)) is not None:
                return key
        self._own = self._own or secrets.token_bytes(32)
        return self._own


def key_path() -> Path:
    """Return the file of the user's key."""
    return state_directory() / "dashboard.key"


def forget_key() -> bool:
    """Delete the user's key, and with it all that browsers hold; False if there was none.

    Raises:
        OSError: The file cannot be deleted.
    """
    try:
        key_path().unlink()
    except FileNotFoundError:
        return False
    return True


def _read_key(path: Path) -> bytes | None:
    """Return the key in a file; None if there is none. Delete a key that is damaged or that others may read."""
    try:
        is_private = not path.stat().st_mode & 0o077
        key = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(key) != 32 or not is_private:
        path.unlink(missing_ok=True)
        return None
    return key
