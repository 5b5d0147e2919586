"""The head that all binary frames have."""

import json
import struct

import numpy as np
import pytest

from offloop.dashboard.curves.chart_frame import ChartFrame, ChartHeader, decode_chart, encode_chart
from offloop.dashboard.protocol.encoding import encode_head
from offloop.dashboard.runs.sample_frame import SampleHeader, encode_sample

NOT_UTF8 = b"run-\xff".decode(errors="surrogateescape")
"""Name of a directory, as the system has it."""


@pytest.mark.parametrize("multiple", [1, 8])
def test_head_has_the_length_of_the_header_and_ends_at_a_multiple(multiple: int) -> None:
    header = SampleHeader(run="a", query=3)
    head = encode_head(header, multiple=multiple)
    (length,) = struct.unpack_from("<I", head)
    assert len(head) == 4 + length and len(head) % multiple == 0
    assert json.loads(head[4:]) == {"type": "sample", "run": "a", "query": 3}


def test_frames_of_a_run_whose_name_is_not_utf8_have_it_as_the_text_messages_have_it() -> None:
    header = ChartHeader(run=NOT_UTF8, kind="snapshot", rows=1, series=[])
    column = np.zeros(1)
    frame = ChartFrame(header=header, step=column, time=column, epoch=column, values=[], indices=[])
    assert decode_chart(encode_chart(frame)).header.run == "run-\\udcff"
    (sample,) = encode_sample(SampleHeader(run=NOT_UTF8, query=1), b"text")
    assert json.loads(sample[4:-4])["run"] == "run-\\udcff"
