"""Options: the settings of a server."""

import ssl as tls

import msgspec

from offloop.dashboard.curves.history import HISTORY_BYTES
from offloop.dashboard.hub import FRAME_INTERVAL
from offloop.dashboard.runs.milestones import MILESTONE_BYTES


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a server; see `Dashboard` for their meaning."""

    host: str = "127.0.0.1"
    port: int | None = None
    token: str | None = None
    read_only: bool = False
    frames_per_second: float = 1 / FRAME_INTERVAL
    history_bytes: int = HISTORY_BYTES
    milestone_bytes: int = MILESTONE_BYTES
    max_viewers: int = 64
    allow_hosts: tuple[str, ...] = ()
    frame_ancestors: tuple[str, ...] = ()
    compression: bool = False
    ssl: tls.SSLContext | None = None
    is_mounted: bool = False
    """True if an application serves the page: the server opens no port."""
