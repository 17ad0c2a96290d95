"""Heat maps of the experts' load as SVG text: a row an expert (or a layer), a column a step.

Colours are classes of the page, `l0` to `l7`, by load over the mean of the layer: what is even is
pale, what is idle one hue, what is overloaded another. `levels` tells a reader of the file, row by
row, what is drawn.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby

from erniekit.report.markup import text
from erniekit.report.plots import _BOTTOM, _HEIGHT, _LEFT, _RIGHT, _TOP, _WIDTH, exact, short

# Load over the mean from which on a level begins, after that of no token at all.
BOUNDS = (0.0, 0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
_MOST_COLUMNS = 48
NAMES = ("no token", "< ¼", "< ½", "< 0.8", "even", "< 2", "< 4", "≥ 4 times the mean")


def level(ratio: float) -> int:
    """0 for no token, else 1 to 7."""
    return bisect_right(BOUNDS, ratio) if ratio > 0 else 0


def thinned(records: Sequence[dict]) -> list[dict]:
    """At most `_MOST_COLUMNS` of some records, evenly, the last one among them."""
    size = min(len(records), _MOST_COLUMNS)
    return [records[(i + 1) * len(records) // size - 1] for i in range(size)]


def heat(ratios: Sequence[Sequence[float]], steps: Sequence[int], name: str) -> str:
    """The SVG of `ratios[row][column]`; columns are `steps`, rows are told as `name` and number."""
    num_rows, num_columns = len(ratios), len(steps)
    width, height = (_RIGHT - _LEFT) / num_columns, (_BOTTOM - _TOP) / num_rows
    drawn: dict[int, list[str]] = {}
    told, tips = [], []
    for number, row in enumerate(ratios):
        levels = [level(ratio) for ratio in row]
        told.append("".join(map(str, levels)))
        top, start = _TOP + number * height, 0
        for kind, run in groupby(levels):
            length = len(list(run))
            x, w = _LEFT + start * width, length * width
            drawn.setdefault(kind, []).append(f"M{x:.1f} {top:.1f}h{w:.1f}v{height:.1f}h-{w:.1f}z")
            start += length
        tip = f"<title>{text(name)} {number}: {exact(row[-1])} times the mean at the end</title>"
        area = f'x="{_LEFT:g}" y="{top:.1f}" width="{_RIGHT - _LEFT:g}" height="{height:.1f}"'
        tips.append(f'<rect class="tip" {area}>{tip}</rect>')
    cells = "".join(f'<path class="l{k}" d="{"".join(d)}"/>' for k, d in sorted(drawn.items()))
    return (
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" data-levels="{" ".join(told)}">'
        f"{cells}{_axes(num_rows, steps)}{''.join(tips)}</svg>"
    )


def _axes(num_rows: int, steps: Sequence[int]) -> str:
    width, height = (_RIGHT - _LEFT) / len(steps), (_BOTTOM - _TOP) / num_rows
    parts = []
    for row in sorted({0, num_rows // 2, num_rows - 1}):
        y = _TOP + (row + 0.5) * height + 4
        parts.append(f'<text x="{_LEFT - 6:g}" y="{y:.1f}" class="y">{row}</text>')
    for column in sorted({0, len(steps) // 2, len(steps) - 1}):
        x = _LEFT + (column + 0.5) * width
        label = short(steps[column])
        parts.append(f'<text x="{x:.1f}" y="{_BOTTOM + 18:g}" class="x">{label}</text>')
    return "".join(parts)
