"""Answers: what the page's own files and short texts are answered with, whichever server sends them. No socket."""

import http
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from offloop.dashboard.protocol.limits import Role
from offloop.dashboard.serving.page import NOT_BUILT, Asset, Page
from offloop.dashboard.serving.places import Places
from offloop.dashboard.serving.security import SECURITY_HEADERS, content_security_policy

LOCAL_ORIGINS: Final = tuple(
    f"{scheme}://{host}:*" for scheme in ("http", "https") for host in ("localhost", "127.0.0.1")
)
"""Origins of notebooks on this machine, as a policy names them."""
FOR_GOOD: Final = "public, max-age=31536000, immutable"


class Answer(NamedTuple):
    """An answer to an HTTP request."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def phrase(self) -> str:
        return http.HTTPStatus(self.status).phrase


def answer(status: int, body: bytes | str, more: dict[str, str] | None = None) -> Answer:
    """Make an answer; a string becomes a line of plain text."""
    if isinstance(body, str):
        body = f"{body}\n".encode()
    headers = {
        "Content-Type": "text/plain; charset=utf-8",
        "Cache-Control": "no-store",
        **SECURITY_HEADERS,
        **(more or {}),
    }
    # In a 304 the length would be that of the browser's copy.
    if status != 304:
        headers["Content-Length"] = str(len(body))
    return Answer(status, headers, body)


def status_answer(places: Places, role: Role, server_id: str) -> Answer:
    """Answer what a page asks when its websocket was refused: whether the server knows it, and has a place for it."""
    status = {"viewers": len(places), "full": places.is_full(role), "role": role, "server": server_id}
    return answer(200, msgspec.json.encode(status), {"Content-Type": "application/json"})


class Files:
    """Answers requests for the files of the built page."""

    def __init__(self, page: Page | None, frame_ancestors: Sequence[str]) -> None:
        self._page = page
        self._ancestors = tuple(frame_ancestors)

    def answer(
        self, path: str, *, known: Sequence[str], codings: Sequence[str], is_framed: bool = False
    ) -> Answer:
        """Answer a request for a file.

        Args:
            path: Below the page's own, beginning with a slash.
            known: `If-None-Match` headers.
            codings: `Accept-Encoding` headers.
            is_framed: Let pages of this machine embed the page.
        """
        ancestors = (*self._ancestors, *(LOCAL_ORIGINS if is_framed else ()))
        policy = {"Content-Security-Policy": content_security_policy(ancestors)}
        if self._page is None:
            return _asset(NOT_BUILT, 503, "no-store", known, codings, policy)
        asset = self._page.assets.get(path)
        if asset is None:
            return answer(404, "Not found.")
        return _asset(asset, 200, "no-cache" if path == "/" else FOR_GOOD, known, codings, policy)


def _asset(
    asset: Asset, status: int, keep: str, known: Sequence[str], codings: Sequence[str], policy: dict[str, str]
) -> Answer:
    more = policy | {
        "Content-Type": asset.content_type,
        "Cache-Control": keep,
        "ETag": asset.etag,
        "Vary": "Accept-Encoding",
    }
    if status == 200 and asset.etag in ",".join(known):
        return answer(304, b"", more)
    if _accepts_gzip(codings):
        return answer(status, asset.gzipped, more | {"Content-Encoding": "gzip"})
    return answer(status, asset.body, more)


def _accepts_gzip(headers: Sequence[str]) -> bool:
    for coding in ",".join(headers).split(","):
        name, _, weight = coding.partition(";")
        if name.strip().lower() in ("gzip", "*"):
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False
