"""A criterion of the candidates of a selection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyro_em.plotting.axes import colour, or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyro_em.selection.criteria import Criterion
    from pyro_em.selection.selection import Selection


def selection(found: Selection, criterion: Criterion, ax: Axes | None = None) -> Axes:
    """Draw a criterion against the first keyword that is a number, a line for each of the others.

    Args:
        found: What `pyro_em.select` returned.
        criterion: What is drawn; a ring marks the best.
        ax: Axes to draw on; new ones by default.

    Returns:
        The axes.
    """
    ax = or_new(ax, (5.2, 3.6))
    numbers = [i for i in range(len(found.names)) if _is_number(found, i)]
    at = numbers[0] if numbers else 0
    known = [r for r in found.rows if r.is_sound and getattr(r, criterion.column) is not None]
    places = list(dict.fromkeys(r.key[at] for r in found.rows))
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in known:
        others = [f"{n} {row.key[i]}" for i, n in enumerate(found.names) if i != at]
        x = float(row.key[at]) if numbers else float(places.index(row.key[at]))
        lines.setdefault(", ".join(others), []).append((x, getattr(row, criterion.column)))
    for c, (label, points) in enumerate(lines.items()):
        xs, ys = zip(*points, strict=True)
        ax.plot(xs, ys, "o-", color=colour(c), label=label or None)
    if known:
        best = max(((y * criterion.sign, x, y) for own in lines.values() for x, y in own))
        ax.plot(best[1], best[2], "o", markersize=13, markerfacecolor="none", color="#333333")
    ax.set_xticks([float(p) for p in places] if numbers else range(len(places)))
    ax.set_xticklabels([str(p) for p in places])
    ax.set_xlabel(found.names[at])
    ax.set_ylabel(criterion.words)
    ax.grid(True, linewidth=0.4, alpha=0.5)
    if any(lines):
        ax.legend(fontsize="small")
    return ax


def _is_number(found: Selection, i: int) -> bool:
    return all(
        isinstance(r.key[i], (int, float)) and not isinstance(r.key[i], bool) for r in found.rows
    )
