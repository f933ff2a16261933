"""HTML of what prints as a table, for notebooks: escaped, without scripts, in the colours of the page.

No colour of text or background is set, so that it reads on a light page and on a dark one; lines are
half-transparent grey.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

_LINE = "1px solid rgba(128, 128, 128, 0.35)"
_TABLE = "border-collapse: collapse; margin: 0.3em 0 0.8em 0;"
_CELL = "padding: 0.15em 0.7em 0.15em 0; vertical-align: top; background: none;"


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]], numbers: Iterable[int] = ()) -> str:
    """A table.

    Args:
        header: A name for each column; none where all are empty.
        rows: As many cells each.
        numbers: Columns that are aligned to the right.

    Example:
        >>> "&lt;b&gt;" in table(["site"], [["<b>"]])
        True
    """
    right = set(numbers)
    side = ["right" if i in right else "left" for i in range(len(header))]
    head = "".join(
        f'<th style="{_CELL} text-align: {s}; border-bottom: {_LINE};">{escape(str(h))}</th>'
        for h, s in zip(header, side, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td style="{_CELL} text-align: {s};">{escape(str(cell))}</td>'
            for cell, s in zip(row, side, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    top = f"<thead><tr>{head}</tr></thead>" if any(str(h) for h in header) else ""
    return f'<table style="{_TABLE}">{top}<tbody>{body}</tbody></table>'


def heading(text: str) -> str:
    """The name of what comes next."""
    return f'<div style="font-weight: bold;">{escape(text)}</div>'


def line(text: str) -> str:
    """A line of words, or several of one text."""
    return f'<div style="white-space: pre-wrap;">{escape(text)}</div>'


def whole(*parts: str) -> str:
    """All parts of one answer."""
    return f"<div>{''.join(parts)}</div>"
