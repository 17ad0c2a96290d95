"""Line plots as SVG text, without a library: what `report.html` shows.

Coordinates are pixels of a 420 x 216 view box, y downwards. The plot's `data-x` and `data-y` hold
the values at its edges, so that a reader of the file can turn every point back into numbers.
Colours are CSS classes of the page. Long series are thinned by keeping the least and the greatest
value of each stretch, so that no spike is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from erniekit.report.markup import text

Point = tuple[float, float]

_WIDTH, _HEIGHT = 420.0, 216.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 404.0, 10.0, 190.0
_MOST_POINTS = 400
_MOST_TIPS = 60


@dataclass(frozen=True)
class Line:
    """A named series; `look` is its CSS class: a colour (c0 to c3), and `faint` or `dots`."""

    name: str
    points: Sequence[Point]
    look: str


def plot(lines: Sequence[Line], marks: Sequence[float] = ()) -> str:
    """The SVG of some series with a common scale; `marks` are places on x to be struck through.

    Every line needs at least one point, and all numbers must be finite.
    """
    xs = [x for line in lines for x, _ in line.points] + list(marks)
    ys = [y for line in lines for _, y in line.points]
    x_ticks, x_edges = _axis(min(0.0, *xs), max(xs), whole=True)
    y_ticks, y_edges = _axis(min(ys), max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_edges[0]) / (x_edges[1] - x_edges[0])
        up = (y - y_edges[0]) / (y_edges[1] - y_edges[0])
        return _LEFT + across * (_RIGHT - _LEFT), _BOTTOM - up * (_BOTTOM - _TOP)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" '
        f'data-x="{x_edges[0]!r} {x_edges[1]!r}" data-y="{y_edges[0]!r} {y_edges[1]!r}">'
    ]
    y_step = y_ticks[1] - y_ticks[0] if len(y_ticks) > 1 else 0.0
    for y in y_ticks:
        _, v = at(x_edges[0], y)
        parts.append(f'<path class="grid" d="M{_LEFT:g} {v:.2f}H{_RIGHT:g}"/>')
        parts.append(f'<text x="{_LEFT - 6:g}" y="{v + 4:.2f}" class="y">{short(y, y_step)}</text>')
    for x in x_ticks:
        u, _ = at(x, y_edges[0])
        parts.append(f'<text x="{u:.2f}" y="{_BOTTOM + 18:g}" class="x">{short(x)}</text>')
    for x in marks:
        u, _ = at(x, y_edges[0])
        tip = f"<title>step {x:g}: skipped</title>"
        parts.append(f'<path class="mark" d="M{u:.2f} {_TOP:g}V{_BOTTOM:g}">{tip}</path>')
    for line in lines:
        places = [at(x, y) for x, y in thinned(line.points, _MOST_POINTS)]
        drawn = " ".join(f"{u:.2f},{v:.2f}" for u, v in places)
        name = text(line.name)
        parts.append(f'<polyline class="{line.look}" data-name="{name}" points="{drawn}"/>')
        if "dots" in line.look or len(places) == 1:
            parts += [f'<circle class="{line.look}" cx="{u:.2f}" cy="{v:.2f}" r="3"/>'
                      for u, v in places]  # fmt: skip
        if "faint" not in line.look:
            parts += _tips(line, at)
    return "".join(parts) + "</svg>"


def _tips(line: Line, at) -> list[str]:
    """Unseen discs that tell the number under the pointer."""
    every = max(math.ceil(len(line.points) / _MOST_TIPS), 1)
    tips = []
    for x, y in line.points[::every]:
        u, v = at(x, y)
        tip = f"<title>{text(line.name)} at step {x:g}: {exact(y)}</title>"
        tips.append(f'<circle class="tip" cx="{u:.1f}" cy="{v:.1f}" r="7">{tip}</circle>')
    return tips


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points: the least and the greatest of each stretch, in their order."""
    if len(points) <= most:
        return list(points)
    num = most // 2
    bounds = [i * len(points) // num for i in range(num + 1)]
    kept = []
    for start, end in pairwise(bounds):
        stretch = range(start, end)
        low = min(stretch, key=lambda i: points[i][1])
        high = max(stretch, key=lambda i: points[i][1])
        kept += [points[i] for i in sorted({low, high})]
    return kept


def smoothed(points: Sequence[Point], span: float) -> list[Point]:
    """The mean of the points around each, with weights that fall off exponentially over `span`
    points to both sides, so that the curve does not lag behind.
    """
    decay = math.exp(-1 / span)
    ys = [y for _, y in points]
    before, after = _decaying_sums(ys, decay), _decaying_sums(ys[::-1], decay)[::-1]
    return [(x, (a + b - y) / (m + n - 1)) for (x, y), (a, m), (b, n) in zip(points, before, after)]


def _decaying_sums(values: Sequence[float], decay: float) -> list[tuple[float, float]]:
    """Up to each value: the sum of values times `decay` to the power of their age, and of the
    weights alone.
    """
    total = weight = 0.0
    sums = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        sums.append((total, weight))
    return sums


def _axis(low: float, high: float, *, whole: bool = False) -> tuple[list[float], Point]:
    """Round ticks within a range, and its edges with some air (none on x)."""
    if low == high:
        air = 1.0 if whole else abs(low) * 0.1 or 1.0
        low, high = low - air * (not whole), high + air
    elif not whole:
        air = 0.06 * (high - low)
        low, high = (0.0 if 0 <= low < air else low - air), high + air
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    if whole:
        step = max(round(step), 1)
    first = math.ceil(low / step - 1e-9)
    ticks = [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
    return ticks, (low, high)


def short(value: float, step: float = 0.0) -> str:
    """A number for an axis: 1.5k, 20M, 3e-05; with all figures that tell it from its neighbours, a
    `step` away.
    """
    size, figures = abs(value), 4
    if 0 < step < size:
        figures = max(figures, math.ceil(math.log10(size / step)) + 2)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.{figures}g}{name}"
    if size >= 1e-3 or size < 1e-12:
        return f"{value:.{figures}g}"
    return f"{value:.{figures - 1}g}".replace("e-0", "e-")


def exact(value: float) -> str:
    """A number to be read: grouped when large, else with four figures."""
    return f"{value:,.0f}" if abs(value) >= 1e4 or value == int(value) else f"{value:.4g}"
