"""Sample frames of protocol `offloop.v1`: the binary messages with a text, a picture or a table. Types and bytes."""

from collections.abc import Iterator
from typing import Final

import msgspec

from offloop.dashboard.protocol.encoding import encode_head
from offloop.dashboard.protocol.limits import MAX_CHART_FRAME

PART: Final = MAX_CHART_FRAME
"""Bytes of content in one frame: with more, a slow network would hold up all else for long."""


class SampleHeader(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="sample", omit_defaults=True
):
    """Header of a sample frame."""

    run: str
    query: int
    """Number of the answered query."""
    more: bool = False
    """True: the content continues in another frame with the same query."""
    error: str = ""
    """Why there is no content, for people."""
    media_type: str = ""
    """Of the content."""
    event: msgspec.Raw | None = None
    """The sample as in `events.jsonl`, but a text without its text, which is the content; in the first frame."""


def encode_sample(header: SampleHeader, content: bytes) -> Iterator[bytes]:
    """Yield the frames of an answer.

    u32         length of the header, little-endian
    header      JSON
    content     up to the end of the frame
    """
    for start in range(0, max(len(content), 1), PART):
        more = start + PART < len(content)
        of_part = msgspec.structs.replace(header, more=more, event=header.event if start == 0 else None)
        yield encode_head(of_part) + content[start : start + PART]
