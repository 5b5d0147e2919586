"""Address: where a server is, and the token for it. The token is in no text that is shown."""

import os
from typing import Final, Self
from urllib.parse import parse_qs, urlsplit

import msgspec

from offloop.engine import ConfigError

TOKEN_VARIABLE: Final = "OFFLOOP_TOKEN"
"""Environment variable with the token, for addresses without one."""
_PORTS: Final = {"http": 80, "ws": 80, "https": 443, "wss": 443}


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """The address of a server's page, taken apart."""

    host: str
    port: int
    is_secure: bool
    """True for https."""
    path: str
    """Of the websocket."""
    token: str
    shown: str
    """The page's address without a token, for people."""

    @classmethod
    def parse(cls, url: str, token: str | None) -> Self:
        """Take an address apart.

        Args:
            url: The address of a page, with or without a token in it, or that of its websocket.
            token: Goes before the one in the address, and that before `OFFLOOP_TOKEN`.

        Raises:
            ConfigError: It is no such address, or there is no token.
        """
        if not isinstance(url, str):
            raise ConfigError(f"url must be a string, got a {type(url).__name__}")
        try:
            parts = urlsplit(url.strip())
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"url is no address: {error}") from None
        if parts.scheme not in _PORTS or not host:
            shown = url.partition("?")[0].rpartition("@")[2]
            raise ConfigError(
                f"url must be the address of a live page, like http://127.0.0.1:8321/?token=..., got {shown!r}"
            )
        is_secure = parts.scheme in ("https", "wss")
        folder = parts.path.rstrip("/")
        if parts.scheme in ("ws", "wss"):
            folder = folder.removesuffix("/ws")
        port = port or _PORTS[parts.scheme]
        name = f"[{host}]" if ":" in host else host
        shown = f"{'https' if is_secure else 'http'}://{name}:{port}{folder}/"
        in_url = parse_qs(parts.query).get("token", [""])[0]
        chosen = token or in_url or os.environ.get(TOKEN_VARIABLE, "")
        if not chosen:
            raise ConfigError(
                f"there is no token for {shown}: use the address as it was printed (?token=...), give token=, or set "
                f"{TOKEN_VARIABLE}"
            )
        if not (chosen.isascii() and chosen.isprintable()) or " " in chosen:
            raise ConfigError("token must be printable ASCII characters without spaces")
        return cls(host=host, port=port, is_secure=is_secure, path=f"{folder}/ws", token=chosen, shown=shown)

    def __repr__(self) -> str:
        return f"<Address {self.shown}>"
