"""The screen of `offloop watch`: what a terminal shows of a run, as lines. No terminal and no connection."""

import math
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from rich.cells import cell_len
from rich.text import Text

from offloop.cli.braille import braille_chart
from offloop.cli.output import cut, duration, number
from offloop.dashboard.client.curves import MetricCurve
from offloop.dashboard.protocol.from_server import Status
from offloop.engine.visible_text import visible

LEAST_CHART: Final = 3
"""Lines below which a curve is not drawn."""
MOST_EVENTS: Final = 6
"""Lines for events."""
AXIS: Final = 10
"""Columns for the values beside a curve."""
POINTS: Final = 4_000
"""Most points that are drawn: neighbours are reduced to minima and maxima."""
STYLES: Final = {
    "completed": "green",
    "stopped": "green",
    "failed": "red",
    "lost": "red",
    "cancelled": "red",
    "paused": "yellow",
}
KEYS: Final = "p pause  s stop  ← → metric  Tab run  q quit"
KEYS_OF_READERS: Final = "← → metric  Tab run  q quit"


class Seen(NamedTuple):
    """What there is to show."""

    name: str
    state: str
    status: Status
    metrics: Sequence[str]
    """Names of the curves."""
    metric: str
    """The one that is drawn; empty for none."""
    curve: MetricCurve | None
    events: Sequence[str]
    """The newest last."""
    notice: str
    """What was asked for and how it went; or a question."""
    is_connected: bool
    may_steer: bool
    has_braille: bool = True


def screen(seen: Seen, columns: int, lines: int) -> list[Text]:
    """Return what to show on so many columns and lines."""
    head = [_title(seen, columns), _progress(seen.status, columns), _figures(seen, columns)]
    foot = [_notice(seen, columns), Text(_cut(KEYS if seen.may_steer else KEYS_OF_READERS, columns), "dim")]
    room = lines - len(head) - len(foot)
    count = min(MOST_EVENTS, room // 3)
    events = list(seen.events)[-count:] if count > 0 else []
    body = [
        *_chart(seen, columns, room - len(events)),
        *(Text(_cut(each, columns), "dim") for each in events),
    ]
    padding = [Text("")] * max(0, room - len(body))
    shown = [*head, *body, *padding, *foot][:lines]
    for line in shown:
        line.truncate(columns)
    return shown


def line_of(seen: Seen) -> str:
    """Return one plain line that says how the run stands."""
    status = seen.status
    parts = [seen.name, seen.state, f"step {status.step}"]
    if status.progress is not None:
        parts.append(f"{math.floor(100 * status.progress)} %")
    if status.loss is not None:
        parts.append(f"loss {_value(status.loss)}")
    if seen.curve is not None and seen.metric != "loss" and len(seen.curve):
        parts.append(f"{seen.metric} {number(float(seen.curve.value[-1]))}")
    if status.time_left is not None:
        parts.append(f"{duration(status.time_left)} left")
    if status.error or status.reason:
        parts.append(status.error or status.reason)
    return visible("  ".join(parts))


def clock_time(moment: float) -> str:
    """Return a Unix time as the hour of the day."""
    return time.strftime("%H:%M:%S", time.localtime(moment))


def _title(seen: Seen, columns: int) -> Text:
    state = seen.state if seen.is_connected else "connection lost"
    style = STYLES.get(seen.state, "cyan") if seen.is_connected else "red"
    reason = seen.status.error or seen.status.reason
    text = Text(_cut(seen.name, max(1, columns - cell_len(state) - 2)), "bold")
    text.append(f"  {state}", style)
    left = columns - cell_len(text.plain) - 2
    if reason and left > 8:
        text.append(f"  {_cut(reason, left)}")
    return text


def _progress(status: Status, columns: int) -> Text:
    share = status.progress
    parts = [f"step {status.step:,}", f"epoch {status.epoch}"]
    if status.time_left is not None:
        parts.append(f"{duration(status.time_left)} left")
    words = "  ".join([*([] if share is None else [f"{math.floor(100 * share):3} %"]), *parts])
    room = min(columns, 100) - cell_len(words) - 1
    if share is None or room < 5:
        return Text(_cut(words, columns))
    done = round(room * share)
    text = Text("━" * done, "blue")
    text.append("─" * (room - done), "dim")
    return text.append(f" {words}")


def _figures(seen: Seen, columns: int) -> Text:
    status = seen.status
    parts = [] if status.loss is None else [f"loss {_value(status.loss)}"]
    if status.lr is not None:
        parts.append(f"lr {number(status.lr)}")
    parts.append(f"{status.steps_per_second:.3g} steps/s")
    for name, share in (
        ("data", status.data_share),
        ("compute", status.compute_share),
        ("callbacks", status.callback_share),
    ):
        parts.append(f"{name} {100 * share:.0f} %")
    if status.saving:
        parts.append("saving a checkpoint")
    if status.stalled is not None:
        parts.append(f"no step for {duration(status.stalled)}")
    return Text(_cut("  ".join(parts), columns))


def _chart(seen: Seen, columns: int, lines: int) -> list[Text]:
    if lines < LEAST_CHART + 1:
        return []
    curve = seen.curve
    if curve is None or not np.isfinite(curve.value).any():
        what = "no curves yet" if not seen.metrics else f"{seen.metric}: no values yet"
        return [Text(_cut(what, columns), "bold")]
    place = f"{list(seen.metrics).index(seen.metric) + 1} of {len(seen.metrics)}" if seen.metrics else ""
    known = curve.value[np.isfinite(curve.value)]
    title = Text(_cut(visible(seen.metric), columns), "bold")
    title.append(
        _cut(f"  {number(float(curve.value[-1]))}   {place}", max(1, columns - cell_len(title.plain)))
    )
    width = columns - AXIS - 1
    if not seen.has_braille or width < 4:
        return [title]
    steps, values = _reduced(curve)
    low, high = number(float(known.min())), number(float(known.max()))
    drawn = braille_chart(steps, values, width, lines - 2)
    rows = [title]
    for place_of_row, row in enumerate(drawn):
        label = high if place_of_row == 0 else low if place_of_row == len(drawn) - 1 else ""
        rows.append(Text(f"{label:>{AXIS}} ", "dim").append(row, "cyan"))
    first, last = f"{curve.step[0]:,}", f"step {curve.step[-1]:,}"
    rows.append(Text(" " * (AXIS + 1) + first + last.rjust(max(1, width - len(first))), "dim"))
    return rows


def _reduced(curve: MetricCurve) -> tuple[list[float], list[float]]:
    """Return the points to draw: of many, the least and the greatest of each stretch."""
    steps, values = curve.step, curve.value
    if len(values) > POINTS:
        size = math.ceil(2 * len(values) / POINTS)
        chosen: list[int] = []
        for start in range(0, len(values), size):
            part = values[start : start + size]
            if np.isfinite(part).any():
                chosen += sorted({start + int(np.nanargmin(part)), start + int(np.nanargmax(part))})
        steps, values = steps[chosen], values[chosen]
    return steps.tolist(), values.tolist()


def _notice(seen: Seen, columns: int) -> Text:
    return Text(_cut(seen.notice, columns), "yellow")


def _value(loss: object) -> str:
    return number(loss) if isinstance(loss, float | int) else str(loss)


def _cut(text: str, columns: int) -> str:
    """Return a text as one line of at most so many columns."""
    return cut(visible(text), columns)
