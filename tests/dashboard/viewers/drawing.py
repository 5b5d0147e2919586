"""What stands on the canvas of a chart, read back from the calls that drew it."""

import re
from collections.abc import Sequence
from typing import Any, Final

from playwright.sync_api import Locator

Point = tuple[float, float]

RECORD: Final = """(() => {
  const prototype = CanvasRenderingContext2D.prototype;
  const around = (name, before) => {
    const original = prototype[name];
    prototype[name] = function (...values) {
      before.call(this, ...values);
      return original.apply(this, values);
    };
  };
  const drawn = (context) => (context.canvas.drawn ??= { strokes: [], fills: [], texts: [], path: [] });
  const like = (context) => ({
    colour: context.strokeStyle, fill: context.fillStyle, alpha: context.globalAlpha, dash: context.getLineDash(),
    width: context.lineWidth,
  });
  around("beginPath", function () { drawn(this).path = []; });
  around("moveTo", function (x, y) { drawn(this).path.push([x, y, "move"]); });
  around("lineTo", function (x, y) { drawn(this).path.push([x, y, "line"]); });
  around("arc", function (x, y) { drawn(this).path.push([x, y, "arc"]); });
  around("stroke", function () { drawn(this).strokes.push({ ...like(this), path: drawn(this).path }); });
  around("fill", function () { drawn(this).fills.push({ ...like(this), path: drawn(this).path }); });
  around("fillText", function (text, x, y) {
    drawn(this).texts.push({ text, x, y, align: this.textAlign, fill: this.fillStyle });
  });
  around("fillRect", function (x, y, width, height) {
    // The ground of a new picture: all that was there is gone.
    const { canvas } = this;
    if (x === 0 && y === 0 && width === canvas.width && height === canvas.height) canvas.drawn = undefined;
    const path = [[x, y, "rect"], [x + width, y + height, "rect"]];
    drawn(this).fills.push({ ...like(this), path });
  });
})();"""
"""For `add_init_script`: each canvas keeps what was drawn on it since it was last cleared."""

_READ: Final = """(figure) => {
  const swatches = [...figure.querySelectorAll(".curve")].map((curve) => [
    curve.querySelector(".curve-label").textContent,
    getComputedStyle(curve.querySelector(".swatch line")).stroke,
  ]);
  const canvas = figure.querySelector("canvas");
  const probe = figure.appendChild(document.createElement("i"));
  probe.style.color = "var(--chart-alert)";
  const alert = getComputedStyle(probe).color;
  probe.remove();
  return { alert,  ...canvas.drawn, colours: Object.fromEntries(swatches), width: canvas.width, height: canvas.height };
}"""
MINUS: Final = "\N{MINUS SIGN}"
_UNITS: Final = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


class Drawing:
    """One picture of a chart. Positions are given as values, by the labels of the axes."""

    def __init__(self, figure: Locator) -> None:
        self.raw: dict[str, Any] = figure.evaluate(_READ)
        self.texts: list[str] = [each["text"] for each in self.raw["texts"]]
        labels = self.raw["texts"]
        self._y = _scale([(each["y"], each["text"]) for each in labels if each["align"] == "right"])
        self._x = _scale([(each["x"], each["text"]) for each in labels if each["align"] == "center"])

    def line(self, label: str, *, raw: bool = False, dashed: bool | None = None) -> list[Point]:
        """Return the points of a curve's line, or of the faint line of its raw values: x and y as the axes say.

        Args:
            label: The curve's or the run's name in the legend.
            raw: The faint one.
            dashed: Of the lines with this colour, the dashed one or the one that is not; None: there is one only.
        """
        return [(self.x(x), self.y(y)) for x, y, _ in self._line(label, raw=raw, dashed=dashed)["path"]]

    def width(self, label: str, *, raw: bool = False, dashed: bool | None = None) -> float:
        """Return the width of a line in pixels; see `line` for the arguments."""
        width: float = self._line(label, raw=raw, dashed=dashed)["width"]
        return width

    def _line(self, label: str, *, raw: bool, dashed: bool | None) -> dict[str, Any]:
        colour = _hex(self.raw["colours"][label])
        lines = [
            stroke
            for stroke in self.raw["strokes"]
            if stroke["colour"] == colour
            and (stroke["alpha"] < 1) == raw
            and dashed in (None, bool(stroke["dash"]))
            and all(kind != "arc" for *_, kind in stroke["path"])
        ]
        assert len(lines) == 1, f"{label} has {len(lines)} lines, not one"
        line: dict[str, Any] = lines[0]
        return line

    def band(self, label: str) -> tuple[list[Point], list[Point]]:
        """Return the upper and the lower edge of a group's band, from left to right."""
        colour = _hex(self.raw["colours"][label])
        bands = [
            fill["path"] for fill in self.raw["fills"] if fill["fill"] == colour and 0 < fill["alpha"] < 1
        ]
        assert len(bands) == 1, f"{label} has {len(bands)} bands, not one"
        points = [(self.x(x), self.y(y)) for x, y, _ in bands[0]]
        half = len(points) // 2
        return points[:half], points[half:][::-1]

    def order(self, *labels: str) -> list[str]:
        """Return some lines in the order in which they were drawn: those that come later are on top."""
        colours = {_hex(self.raw["colours"][label]): label for label in labels}
        drawn = [colours.get(stroke["colour"]) for stroke in self.raw["strokes"]]
        return list(dict.fromkeys(label for label in drawn if label is not None))

    def alerts(self) -> list[float]:
        """Return where on the x axis an alert is a line from the top to the foot."""
        alert = _hex(self.raw["alert"])
        lines = [
            stroke["path"]
            for stroke in self.raw["strokes"]
            if stroke["colour"] == alert and stroke["dash"] and len(stroke["path"]) == 2
        ]
        return [self.x(line[0][0]) for line in lines]

    def wedges(self, label: str) -> list[float]:
        """Return where on the x axis a wedge at the edge says that a point of a curve is outside."""
        colour = _hex(self.raw["colours"][label])
        wedges = [
            fill["path"] for fill in self.raw["fills"] if fill["fill"] == colour and len(fill["path"]) == 3
        ]
        return [self.x(wedge[0][0]) for wedge in wedges]

    def signs(self) -> list[float]:
        """Return where on the x axis a cross says that values are not finite."""
        alert = _hex(self.raw["alert"])
        crosses = [
            [x for x, _, _ in stroke["path"]]
            for stroke in self.raw["strokes"]
            if stroke["colour"] == alert and len(stroke["path"]) == 4
        ]
        return [self.x((min(places) + max(places)) / 2) for places in crosses]

    def x(self, pixel: float) -> float:
        """Return the place on the x axis at a pixel."""
        return self._x[0] + self._x[1] * pixel

    def y(self, pixel: float) -> float:
        """Return the value at a pixel of the y axis."""
        return self._y[0] + self._y[1] * pixel


def _scale(labels: Sequence[tuple[float, str]]) -> tuple[float, float]:
    """Return offset and slope of a linear axis, by its first and last label."""
    read = sorted((pixel, number) for pixel, text in labels if (number := _number(text)) is not None)
    (first, low), (last, high) = read[0], read[-1]
    slope = (high - low) / (last - first)
    return low - slope * first, slope


def _number(label: str) -> float | None:
    found = re.fullmatch(r"(-?[\d.]+(?:e-?\d+)?)\s?([kMGT]?)(?:B|%|s)?", label.replace(MINUS, "-"))
    return float(found[1]) * _UNITS[found[2]] if found else None


def _hex(colour: str) -> str:
    """Return `rgb(0, 114, 178)` as a canvas writes it: `#0072b2`."""
    red, green, blue = re.findall(r"\d+", colour)[:3]
    return f"#{int(red):02x}{int(green):02x}{int(blue):02x}"
