"""Page: the built page, read once and served from memory.

The server looks a request's path up in `Page.assets`; it never becomes the path of a file. The files of the build are
checked against `build.json`, so a page that is damaged, or incomplete because a build is running, counts as not built.
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
"""Content types of the built files, by suffix."""


class Asset(msgspec.Struct, frozen=True, kw_only=True):
    """One file of the page, ready to send."""

    content_type: str
    body: bytes
    gzipped: bytes
    """The body for browsers that accept gzip."""
    etag: str
    """The SHA-256 of the body; weak, because it identifies the body and its compressed form."""

    @classmethod
    def of(cls, body: bytes, content_type: str) -> Self:
        """Compress and hash a body."""
        return cls(
            content_type=content_type,
            body=body,
            gzipped=gzip.compress(body, mtime=0),
            etag=f'W/"{hashlib.sha256(body).hexdigest()}"',
        )


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """The built page."""

    page_hash: str
    """Identity of the build: 16 hexadecimal digits that change with any file of the page."""
    assets: Mapping[str, Asset]
    """Files by path below the page's own: `/` and `/static/<page_hash>/<name>`.

    Browsers may cache all but `/` forever, because a changed file has another address. index.html, served as `/`,
    uses relative addresses, so the page works below any path that ends with a slash.
    """

    @classmethod
    def load(cls, folder: Traversable | None = None) -> Self | None:
        """Read the page; None if it is not built or damaged, in which case serve `NOT_BUILT`.

        Blocks its thread for some milliseconds. The result is immutable: load again to serve a new build.

        Args:
            folder: The folder of the built page; by default that of the installed package.
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
    """The contents of build.json."""

    page_hash: str
    outputs: dict[str, str]
    """The SHA-256 of every file, by name."""


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
"""Answer with status 503 if there is no page: how to get it."""
