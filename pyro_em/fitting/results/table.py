"""A table with names of its rows; what a user holds where pandas is not installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pyro_em import html

_MOST = 100  # rows that a notebook shows


@dataclass(frozen=True, repr=False)
class Table:
    """Rows with names, and what describes them all.

    Attributes:
        names: Of the levels of the index.
        index: For each row its labels, one per level.
        columns: The columns' names.
        rows: The cells.
        attrs: What describes the whole; printed above.
        over: What the columns run over, where they are no quantities.
    """

    names: tuple[str, ...]
    index: tuple[tuple[Any, ...], ...]
    columns: tuple[Any, ...]
    rows: tuple[tuple[Any, ...], ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    over: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        lines = [tuple(map(str, (*self.names, *self.columns)))]
        lines += [
            tuple(map(_shown, (*labels, *cells)))
            for labels, cells in zip(self.index, self.rows, strict=True)
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        left = {*range(len(self.names)), *self._words()}
        body = [
            "  ".join(
                cell.ljust(w) if i in left else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([above(self.attrs), *body])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        header = (*self.names, *self.columns)
        rows = [
            tuple(map(_shown, (*labels, *cells)))
            for labels, cells in zip(self.index[:_MOST], self.rows[:_MOST], strict=True)
        ]
        left = {*range(len(self.names)), *self._words()}
        numbers = [i for i in range(len(header)) if i not in left]
        parts = [above_in_html(self.attrs)] if self.attrs else []
        parts.append(html.table(header, rows, numbers))
        if len(self) > _MOST:
            parts.append(html.line(f"… {len(self) - _MOST:,} rows more"))
        return html.whole(*parts)

    def _words(self) -> list[int]:
        """The columns that hold words."""
        return [len(self.names) + i for i, name in enumerate(self.columns) if name == "note"]


def above(attrs: Mapping[str, Any]) -> str:
    """What describes a table, one quantity in a line."""
    width = max((len(name) for name in attrs), default=0)
    return "".join(f"{name.ljust(width)}  {_about(value)}\n" for name, value in attrs.items())


def above_in_html(attrs: Mapping[str, Any]) -> str:
    """The same as HTML."""
    return html.table(("", ""), [(name, _about(value)) for name, value in attrs.items()])


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _about(value: Any) -> str:
    """A quantity of a fit: six digits behind the point."""
    if isinstance(value, float):
        return f"{value:.6f}".rstrip("0").rstrip(".")
    return "-" if value is None else str(value)
