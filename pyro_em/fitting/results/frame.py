"""A table as a pandas DataFrame that prints what describes it above; needs pandas."""

from __future__ import annotations

from typing import Any

import pandas

from pyro_em import html
from pyro_em.fitting.results.table import Table, above, above_in_html


class SummaryFrame(pandas.DataFrame):
    """A DataFrame that prints its ``attrs`` above; what is made of it is an ordinary DataFrame."""

    @property
    def _constructor(self) -> Any:
        return pandas.DataFrame

    def __repr__(self) -> str:
        return f"{above(self.attrs)}\n{super().__repr__()}"

    def __str__(self) -> str:
        return f"{above(self.attrs)}\n{self.to_string()}"

    def _repr_html_(self) -> str:
        return html.whole(above_in_html(self.attrs), super()._repr_html_() or "")


def frame_of(table: Table) -> SummaryFrame:
    """A DataFrame with the index, columns and ``attrs`` of a table.

    Args:
        table: The table.
    """
    if len(table.names) == 1:
        index = pandas.Index([labels[0] for labels in table.index], name=table.names[0])
    else:
        levels = [list(dict.fromkeys(labels)) for labels in zip(*table.index, strict=True)]
        places = [{label: i for i, label in enumerate(level)} for level in levels]
        codes = [
            [place[label] for label in labels]
            for place, labels in zip(places, zip(*table.index, strict=True), strict=True)
        ]
        # In order of appearance, so that rows stay sorted and are found quickly.
        index = pandas.MultiIndex(
            [pandas.Index(level, dtype=object) for level in levels], codes, names=table.names
        )
    columns = pandas.Index(list(table.columns), name=table.over or None)
    frame = SummaryFrame(list(table.rows), index=index, columns=columns)
    frame.attrs.update(table.attrs)
    return frame
