"""Security: who may talk to the server, decided from a request's head alone. No socket.

A page in another browser tab is the attacker to think of: it can send requests to 127.0.0.1, and a name that its
owner resolves to 127.0.0.1 makes such a request look like ours. Against the first stand the token and the
check of `Origin`, against the second the list of host names that are answered at all.

The token in the address is good as long as the process lives. It is exchanged at once for a cookie that
scripts cannot read, signed with a key of the user's own, so that a tab finds the next run too.
"""

import contextlib
import hashlib
import hmac
import ipaddress
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit

from offloop.dashboard.protocol import Role

COOKIE_DAYS: Final = 30
LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})
SECURITY_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def content_security_policy(frame_ancestors: Sequence[str] = ()) -> str:
    """Return what the page may load and who may frame it: nothing but its own server, and nobody."""
    ancestors = " ".join(frame_ancestors) or "'none'"
    return (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob:; "
        f"base-uri 'none'; form-action 'none'; frame-ancestors {ancestors}; "
        "require-trusted-types-for 'script'"
    )


def is_loopback(host: str) -> bool:
    """True for names and addresses that only this machine can reach."""
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
        _ = parts.port  # raises for one that is no number
    except ValueError:
        return None
    return parts.hostname


class Gate:
    """Decides about requests."""

    def __init__(
        self,
        *,
        bound_to: str,
        token: str,
        read_only_token: str,
        key: bytes,
        read_only: bool = False,
        allow_hosts: Sequence[str] = (),
    ) -> None:
        """Guard a server.

        Args:
            bound_to: The address that it listens on.
            token: Gives the control role.
            read_only_token: Gives the right to look.
            key: Signs cookies, 32 bytes.
            read_only: Nobody gets more than the right to look, whatever an older cookie says.
            allow_hosts: Further names under which browsers may reach it.
        """
        self._bound_to = bound_to
        self._tokens: tuple[tuple[str, Role], ...] = ((token, "control"), (read_only_token, "read_only"))
        self._key = key
        self._read_only = read_only
        self._names = LOOPBACK_NAMES | {bound_to.lower(), *(name.lower() for name in allow_hosts)}
        # Named after the key: another user's server, seen through a tunnel under the same name, has another one.
        self.cookie_name = f"offloop_{hashlib.sha256(key).hexdigest()[:8]}"

    def allows_host(self, headers: Sequence[str]) -> bool:
        """True for exactly one `Host` header that names this server.

        A literal address cannot be a name that somebody has resolved to us; where the server is meant to be
        reached from elsewhere, each is fine.
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
        """True if a websocket may be opened: by our own page, or by a program that is no browser."""
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
        """Return what a token is good for."""
        found: Role | None = None
        for known, role in self._tokens:  # all are compared: how long it takes says nothing
            if hmac.compare_digest(known.encode(), token.encode("utf-8", "replace")):
                found = found or role
        return self._at_most(found)

    def role_of(self, cookies: Sequence[str], authorizations: Sequence[str]) -> Role | None:
        """Return the role that the `Authorization` or `Cookie` headers give."""
        if authorizations:
            scheme, _, token = authorizations[0].partition(" ")
            if len(authorizations) != 1 or scheme.lower() != "bearer":
                return None
            return self.role_of_token(token.strip())
        for header in cookies:
            for pair in header.split(";"):
                name, _, value = pair.strip().partition("=")
                if name == self.cookie_name and (role := self._read_cookie(value)) is not None:
                    return self._at_most(role)
        return None

    def _at_most(self, role: Role | None) -> Role | None:
        return "read_only" if self._read_only and role is not None else role

    def role_in_query(self, query: str) -> Role | None:
        """Return the role of the token in an address, None if there is no valid one."""
        try:
            tokens = parse_qs(query, max_num_fields=16).get("token", [])
        except ValueError:  # more fields than anybody needs
            return None
        return self.role_of_token(tokens[0]) if len(tokens) == 1 else None

    def cookie(self, role: Role, *, secure: bool) -> str:
        """Return a `Set-Cookie` header for a role."""
        text = f"{role}.{int(time.time()) + COOKIE_DAYS * 86_400}"
        value = f"{text}.{self._sign(text)}"
        return (
            f"{self.cookie_name}={value}; HttpOnly; SameSite=Strict; Path=/; Max-Age={COOKIE_DAYS * 86_400}"
            + ("; Secure" if secure else "")
        )

    def _read_cookie(self, value: str) -> Role | None:
        text, _, signature = value.rpartition(".")
        if not hmac.compare_digest(self._sign(text).encode(), signature.encode("utf-8", "replace")):
            return None
        role, _, until = text.partition(".")
        if not until.isascii() or not until.isdigit() or int(until) < time.time():
            return None
        return "control" if role == "control" else "read_only"

    def _sign(self, text: str) -> str:
        return hmac.new(self._key, text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def new_token() -> str:
    """Return a token that nobody guesses."""
    return secrets.token_urlsafe(24)


def state_directory() -> Path:
    """Return the directory for what offloop keeps of a user between runs."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "offloop"


def user_key() -> bytes:
    """Return the key that signs this user's cookies; made on first use, in a file that only the user can read.

    Where no file can be kept, a key for this process alone: tabs then have to be opened anew for the next run.
    """
    path = state_directory() / "dashboard.key"
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
                os.link(temporary, path)  # whoever is first wins: two processes end with the same key
        finally:
            temporary.unlink()
        if (key := _read_key(path)) is not None:
            return key
    return secrets.token_bytes(32)


def _read_key(path: Path) -> bytes | None:
    """Return the key in a file; None if there is none, it is damaged, or others may read it."""
    try:
        is_private = not path.stat().st_mode & 0o077
        key = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(key) != 32 or not is_private:
        path.unlink(missing_ok=True)
        return None
    return key
