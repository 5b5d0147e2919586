"""Names, limits and close codes of the protocol."""

from typing import Final, Literal

SUBPROTOCOL: Final = "offloop.v1"
"""Name in the websocket handshake."""

MAX_MESSAGE: Final = 64 * 1024
"""Most bytes of a viewer's message; a longer one closes its connection with 1009."""
MAX_CHART_FRAME: Final = 256 * 1024
"""Bytes above which a snapshot or an answer is split into parts."""
MAX_SERIES_SHOWN: Final = 200
"""Most curves of one run on one viewer's screen."""
MAX_OVERLAID: Final = 9
"""Most runs whose curves a viewer receives beside those of the watched one."""
MAX_POINTS: Final = 4_000
"""Most points of one curve in a snapshot or an answer, unless all are requested."""

# Close codes, besides the usual ones (1001: the server closes, 1009: a message was too long). A viewer that is not
# admitted receives an HTTP answer instead of a websocket: 401, 403 or 503. A browser with the cookie and without the
# key receives 4001.
CLOSE_FULL: Final = 1013
"""There is no place left."""
CLOSE_UNAUTHORISED: Final = 4001
"""No key in `hi` belongs to the cookie, or the user has logged out."""
CLOSE_PROTOCOL: Final = 4002
"""The viewer violated this protocol; the reason says how."""
CLOSE_SLOW: Final = 4008
"""The viewer did not keep up; it may reconnect at once."""

Role = Literal["control", "read_only"]
LayerStatistic = Literal["norm", "update_ratio", "dead", "mean", "std", "minimum", "maximum"]
CommandName = Literal["pause", "resume", "stop", "set_lr", "checkpoint", "validate", "tag"]
State = Literal[
    "starting",
    "waiting",
    "running",
    "validating",
    "paused",
    "stopping",
    "closing",
    "completed",
    "stopped",
    "cancelled",
    "failed",
    "lost",
]
