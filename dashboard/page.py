"""Page: the built page, read once and served from memory.

A server answers a request by a look-up of its path in `Page.assets`: no request ever becomes the path of a
file. What the build left is checked against `build.json`, so that a page that is damaged, or half there
because a build runs at this moment, counts as not built.
"""

import gzip
import hashlib
import importlib.resources
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from types import MappingProxyType
from typing import Final, Self

import msgspec

CONTENT_TYPES: Final = MappingProxyType(
    {
        "css": "text/css; charset=utf-8",
        "html": "text/html; charset=utf-8",
        "js": "text/javascript; charset=utf-8",
        "svg": "image/svg+xml",
        "txt": "text/plain; charset=utf-8",
    }
)
"""Content types of what the build makes, by the ending of the file's name."""


class Asset(msgspec.Struct, frozen=True, kw_only=True):
    """One file of the page, ready to be sent."""

    content_type: str
    body: bytes
    gzipped: bytes
    """The body for a browser that accepts gzip."""
    etag: str
    """The SHA-256 of the body, quoted and weak: it stands for the body and for its compressed form."""

    @classmethod
    def of(cls, body: bytes, content_type: str) -> Self:
        """Compress and name a body."""
        return cls(
            content_type=content_type,
            body=body,
            gzipped=gzip.compress(body, mtime=0),
            etag=f'W/"{hashlib.sha256(body).hexdigest()}"',
        )


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """The page as it was built."""

    page_hash: str
    """Names the build: 16 hexadecimal digits that change with any file of the page."""
    assets: Mapping[str, Asset]
    """What stands under which path below the page's own: `/` and `/static/<page_hash>/<name>`.

    All but `/` may be kept by browsers for good, because their address changes with them. index.html, under
    `/`, names them by relative addresses; so the page works below any path that ends with a slash.
    """

    @classmethod
    def load(cls, folder: Traversable | None = None) -> Self | None:
        """Read the page; None if it has not been built or is damaged, and then `NOT_BUILT` is what to show.

        Blocks its thread for some milliseconds. What it returns never changes: a page that is built anew
        is served after the next call.

        Args:
            folder: Where the built page is; that of the installed package by default.
        """
        if folder is None:
            folder = importlib.resources.files("offloop.dashboard") / "static"
        try:
            build = msgspec.json.decode((folder / "build.json").read_bytes(), type=_Build)
            bodies = {name: (folder / name).read_bytes() for name in build.outputs}
        except (OSError, msgspec.DecodeError):
            return None
        damaged = [name for name in bodies if hashlib.sha256(bodies[name]).hexdigest() != build.outputs[name]]
        if damaged or INDEX not in bodies:
            return None
        assets = {
            "/" if name == INDEX else f"/static/{build.page_hash}/{name}": Asset.of(
                body, CONTENT_TYPES.get(name.rpartition(".")[2], "application/octet-stream")
            )
            for name, body in bodies.items()
        }
        return cls(page_hash=build.page_hash, assets=MappingProxyType(assets))


class _Build(msgspec.Struct, frozen=True):
    """What build.json says."""

    page_hash: str
    outputs: dict[str, str]
    """The SHA-256 of each file, by its name."""


INDEX: Final = "index.html"

NOT_BUILT: Final = Asset.of(
    b"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>offloop: page not built</title>
<h1>This installation of offloop has no live page</h1>
<p>Training is not affected. To get the page, then start this program again:</p>
<ul>
<li>in a checkout: <code>make page</code>, or <code>python dashboard/web/build_page.py</code></li>
<li>elsewhere, without OFFLOOP_PAGE=skip:
<code>pip install --no-cache-dir --force-reinstall offloop</code></li>
</ul>
</html>
""",
    CONTENT_TYPES["html"],
)
"""What to answer with status 503 where there is no page: how to get it."""
