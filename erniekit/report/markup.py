"""Words as HTML: the one way by which what a run brings in enters `report.html`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

# Control characters, and those that turn the direction of the text around them.
_TURNS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_HOSTILE = dict.fromkeys((*range(9), *range(11, 32), *_TURNS), "\ufffd")


def text(value: Any) -> str:
    """Any value as text that is safe between tags and in attributes."""
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return escape(("none" if value is None else str(value)).translate(_HOSTILE))


def table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """Rows of values under a row of names; nothing for no rows."""
    top = "".join(f"<th>{text(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    if not body:
        return ""
    return f'<div class="scroll"><table>{f"<tr>{top}</tr>" if top else ""}{body}</table></div>'
