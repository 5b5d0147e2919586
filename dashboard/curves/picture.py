"""A picture of a run's curves, as SVG without scripts: what stays in a notebook when the page is gone."""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple
from xml.sax.saxutils import escape

import numpy as np

from offloop.dashboard.curves.chart_frame import Float64s
from offloop.dashboard.curves.history import History
from offloop.dashboard.protocol.from_server import SeriesInfo

POINTS: Final = 300
"""About the most points of a curve: the width of a panel in pixels."""
MOST_PANELS: Final = 8
_COLUMNS: Final = 2
_WIDTH, _HEIGHT, _MARGIN = 440, 220, 12
# Space for the title and for the axes
_TOP, _LEFT, _BOTTOM = 40, 52, 22
_HEAD: Final = 34
# Those of the page: blue, vermilion and green, which colour-blind people can tell apart
_COLORS: Final = {"step": "#0072b2", "val": "#d55e00", "train": "#009e73", "eval": "#cc79a7"}
_OTHERS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")


class Line(NamedTuple):
    """A curve as it is drawn."""

    label: str
    color: str
    last: float
    """Its last finite value."""
    first_step: float
    last_step: float
    steps: Float64s
    """Of the points that are drawn; shape (n,)."""
    values: Float64s
    """Of these points; shape (n,), NaN for a gap."""


def picture(history: History, series: Sequence[SeriesInfo], title: str) -> str:
    """Return the curves of a run as SVG: loss first, the learning rate last, of the rest the first panels.

    Args:
        history: Its curves.
        series: What they are.
        title: The first line.
    """
    panels: dict[str, list[SeriesInfo]] = {}
    for each in series:
        # Groups are layers and resources: too many, and not what a run is judged by.
        if not each.group:
            panels.setdefault(each.panel, []).append(each)
    names = sorted(panels, key=lambda name: (name == "lr") - (name == "loss"))[:MOST_PANELS]
    drawn = [(name, lines) for name in names if (lines := _lines(history, panels[name]))]
    width = _COLUMNS * _WIDTH + _MARGIN
    height = _HEAD + math.ceil(len(drawn) / _COLUMNS) * _HEIGHT + _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="11" fill="#1f2937">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_MARGIN}" y="22" font-size="14" font-weight="600">{escape(title)}</text>',
    ]
    for place, (name, lines) in enumerate(drawn):
        row, column = divmod(place, _COLUMNS)
        parts.append(f'<g transform="translate({_MARGIN + column * _WIDTH},{_HEAD + row * _HEIGHT})">')
        parts += _panel(name, lines)
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def _lines(history: History, panel: Sequence[SeriesInfo]) -> list[Line]:
    lines: list[Line] = []
    for place, each in enumerate(panel):
        curve, end = history.curves[each.id], history.axis.rows
        all_rows, all_values, _ = curve.view(0, end, None)
        known = all_values[np.isfinite(all_values)]
        if len(known):
            rows, values, _ = curve.view(0, end, POINTS)
            ends = history.axis.at(all_rows[[0, -1]])["step"]
            color = _COLORS.get(each.label, _OTHERS[place % len(_OTHERS)])
            steps = history.axis.at(rows)["step"]
            lines.append(
                Line(each.label, color, float(known[-1]), float(ends[0]), float(ends[1]), steps, values)
            )
    return lines


def _panel(name: str, lines: Sequence[Line]) -> list[str]:
    width, height = _WIDTH - _MARGIN - _LEFT, _HEIGHT - _TOP - _BOTTOM
    finite = np.concatenate([line.values[np.isfinite(line.values)] for line in lines])
    low, high = _spread(float(finite.min()), float(finite.max()))
    first, last = min(line.first_step for line in lines), max(line.last_step for line in lines)
    parts = [f'<text x="0" y="14" font-weight="600">{escape(name)}</text>']
    at = 0.0
    for line in lines:
        text = f"{line.label} {line.last:.4g}"
        parts.append(f'<text x="{at:.0f}" y="30" fill="{line.color}">{escape(text)}</text>')
        at += 6.5 * len(text) + 14
    for share in (0.0, 0.5, 1.0):
        y = _TOP + height * (1 - share)
        parts.append(f'<path d="M{_LEFT} {y:.1f}h{width}" stroke="#e5e7eb"/>')
        value = low + share * (high - low)
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    foot = _TOP + height + 16
    parts.append(f'<text x="{_LEFT}" y="{foot}">{first:.0f}</text>')
    parts.append(f'<text x="{_LEFT + width}" y="{foot}" text-anchor="end">step {last:.0f}</text>')
    for line in lines:
        across = _LEFT + width * (line.steps - first) / max(last - first, 1.0)
        down = _TOP + height * (1 - (line.values - low) / (high - low))
        parts.append(
            f'<path d="{_path(across, down)}" fill="none" stroke="{line.color}" stroke-width="1.5"/>'
        )
    return parts


def _spread(low: float, high: float) -> tuple[float, float]:
    """Return limits of an axis that are apart."""
    if high > low:
        return low, high
    room = abs(low) / 10 or 1.0
    return low - room, high + room


def _path(x: Float64s, y: Float64s) -> str:
    """Return a path through points; a gap where one is not finite, and a dot for a point alone."""
    parts, is_drawing = [], False
    for across, down in zip(x, y, strict=True):
        if math.isfinite(down):
            # The first one is a dot, even if no other follows.
            parts.append(f"L{across:.1f} {down:.1f}" if is_drawing else f"M{across:.1f} {down:.1f}h0.1")
        is_drawing = math.isfinite(down)
    return "".join(parts)
