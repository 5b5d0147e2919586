"""Security: who may use the server, decided from a request's headers alone. No socket.

The attacker to consider is a page in another browser tab: it can send requests to 127.0.0.1, and a host name that its
owner resolves to 127.0.0.1 makes such a request look like one of ours. The token and the check of `Origin` prevent the
first, the list of accepted host names prevents the second.

The token in the address is valid while the process lives. The browser exchanges it at once for a cookie that scripts
cannot read. A key of the user signs the cookie, so that a tab also finds the user's next run.
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


class Gate:
    """Decides which requests are answered, and with which role."""

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
            token: Grants the control role.
            read_only_token: Grants the read_only role.
            key: Signs cookies; 32 bytes.
            read_only: Grant at most the read_only role, also to cookies of earlier servers.
            allow_hosts: More host names under which browsers may reach the server.
        """
        self._bound_to = bound_to
        self._tokens: tuple[tuple[str, Role], ...] = ((token, "control"), (read_only_token, "read_only"))
        self._key = key
        self._read_only = read_only
        self._names = LOOPBACK_NAMES | {bound_to.lower(), *(name.lower() for name in allow_hosts)}
        # The name depends on the key: another user's server, tunnelled to the same host name, uses another cookie.
        self.cookie_name = f"offloop_{hashlib.sha256(key).hexdigest()[:8]}"

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

    def role_of(self, cookies: Sequence[str], authorizations: Sequence[str]) -> Role | None:
        """Return the role that the `Authorization` or `Cookie` headers grant."""
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
        """Return the role of the token in an address; None if there is no valid one."""
        try:
            tokens = parse_qs(query, max_num_fields=16).get("token", [])
        except ValueError:
            # Too many fields.
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
    """Return a random token of 192 bits."""
    return secrets.token_urlsafe(24)


def state_directory() -> Path:
    """Return the directory for the files that offloop keeps for a user between runs."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "offloop"


def user_key() -> bytes:
    """Return the key that signs this user's cookies, from a file that only the user can read; created on first use.

    If no such file can be written, return a key for this process alone: open tabs then cannot find the next run.
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
                # Two processes that create the key at once both use the first one.
                os.link(temporary, path)
        finally:
            temporary.unlink()
        if (key := _read_key(path)) is not None:
            return key
    return secrets.token_bytes(32)


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
