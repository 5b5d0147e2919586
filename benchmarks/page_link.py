"""A viewer's connection to a live page, for benchmarks."""

from urllib.parse import parse_qs, urlsplit

from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol


def link_to(address: str) -> ClientConnection:
    """Connect to a page's address."""
    parts = urlsplit(address)
    return connect(
        f"ws://{parts.netloc}/ws",
        subprotocols=[Subprotocol("offloop.v1")],
        additional_headers={"Authorization": f"Bearer {parse_qs(parts.query)['token'][0]}"},
        compression=None,
        proxy=None,
        max_size=None,
    )
