"""A model's directed graph: open nodes hidden, filled nodes observed, half-filled in part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pyro_em.errors import UsageError, message
from pyro_em.plan.plan import Plan
from pyro_em.plotting.axes import or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyro_em.graph.independence import ModelGraph


Place = tuple[float, float]


_OBSERVED, _HIDDEN, _MARGIN, _RADIUS = "#cfe2f3", "white", 0.36, 0.3


def graph(
    model: ModelGraph | Plan,
    ax: Axes | None = None,
    *,
    positions: Mapping[str, Place] | None = None,
    labels: Mapping[str, str] | None = None,
    plates: bool = True,
) -> Axes:
    """Draw the graph of a model, as ``em.plan(...).graph`` has it.

    Hidden sites are open, observed ones filled, those under an ``obs_mask`` filled to the half, and
    ``pyro.factor`` terms are squares. Parents stand above their children. A plate is a box around
    its sites; where a box would hold a stranger, the plate's name stands beside each of its sites
    instead.

    Args:
        model: Sites, and edges from a site to the sites that use its value; or a plan that has it.
        ax: Axes to draw on; new ones by default.
        positions: Where each site stands, (across, up); in layers by default.
        labels: What to write for a site; its name by default.
        plates: Whether plates are drawn.

    Returns:
        The axes, without frame or ticks.

    Raises:
        UsageError: If ``positions`` leaves a site out.
    """
    from matplotlib.patches import FancyArrowPatch

    sites: ModelGraph = model.graph if isinstance(model, Plan) else model
    places = _layers(sites) if positions is None else dict(positions)
    missing = [site for site in sites if site not in places]
    if missing:
        raise UsageError(
            message(
                f"site '{missing[0]}'",
                "positions has no place for it.",
                fixes=[f"name all of {', '.join(sites)}", "leave positions out"],
            )
        )
    across, up = zip(*(places[site] for site in sites), strict=True)
    width, height = max(across) - min(across), max(up) - min(up)
    ax = or_new(ax, (1.6 + 0.9 * width, 1.6 + 0.9 * height))
    ax.set_xlim(min(across) - 0.8, max(across) + 0.8)
    ax.set_ylim(min(up) - 0.8, max(up) + 0.7)
    boxed = _draw_plates(sites, places, ax) if plates else set()
    for a, b in sites.edges:
        arrow = FancyArrowPatch(
            places[a],
            places[b],
            arrowstyle="-|>",
            mutation_scale=12,
            shrinkA=14,
            shrinkB=14,
            color="0.45",
        )
        ax.add_patch(arrow)
    for site, node in sites.nodes.items():
        x, y = places[site]
        shape = "s" if node.get("kind") == "factor" else "o"
        face = _OBSERVED if node.get("observed") else _HIDDEN
        ax.plot(x, y, shape, markersize=25, markerfacecolor=face, markeredgecolor="0.2")
        if node.get("partly"):
            half: dict[str, Any] = {
                "fillstyle": "left",
                "markerfacecoloralt": "none",
                "markeredgewidth": 0,
            }
            ax.plot(x, y, shape, markersize=24, markerfacecolor=_OBSERVED, **half)
        text = site if labels is None else labels.get(site, site)
        outside = sorted(set(node.get("plates", ())) - boxed) if plates else []
        inside = text.startswith("$") or len(text) <= 4
        ax.annotate(
            text if inside else "",
            (x, y),
            ha="center",
            va="center",
            fontsize=10 if len(text) <= 3 or text.startswith("$") else 8,
        )
        beside = ([] if inside else [text]) + ([f"[{', '.join(outside)}]"] if outside else [])
        if beside:
            ax.annotate(
                "\n".join(beside),
                (x, y),
                xytext=(15, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color="0.2",
            )
    ax.set_axis_off()
    return ax


def _layers(model: ModelGraph) -> dict[str, Place]:
    """Layers by the longest path from a root, each in the order of its parents' middles."""
    import networkx

    places: dict[str, Place] = {}
    for depth, layer in enumerate(networkx.topological_generations(model)):

        def middle(site: str) -> tuple[tuple[str, ...], float]:
            above = [places[p][0] for p in model.predecessors(site)]
            return model.nodes[site].get("plates", ()), sum(above) / len(above) if above else 0.0

        row = sorted(layer, key=middle)
        for i, site in enumerate(row):
            places[site] = (1.2 * (i - (len(row) - 1) / 2), -1.3 * depth)
    return places


def _draw_plates(model: ModelGraph, places: Mapping[str, Place], ax: Axes) -> set[str]:
    """Boxes around the plates that can have one; returns their names."""
    from matplotlib.patches import FancyBboxPatch

    members: dict[str, list[str]] = {}
    for site, plates in model.nodes(data="plates", default=()):
        for plate in plates:
            members.setdefault(plate, []).append(site)
    boxed = set()
    # The plates with most sites first, so that a nested plate lies inside, with a smaller margin.
    ordered = sorted(members, key=lambda plate: -len(members[plate]))
    for i, plate in enumerate(ordered):
        xs, ys = zip(*(places[site] for site in members[plate]), strict=True)
        left, right, low, high = min(xs), max(xs), min(ys), max(ys)
        strangers = [
            site
            for site, (x, y) in places.items()
            if site not in members[plate]
            and left - 2 * _RADIUS < x < right + 2 * _RADIUS
            and low - 2 * _RADIUS < y < high + 2 * _RADIUS
        ]
        if strangers:
            continue
        boxed.add(plate)
        inside = len(ordered) - 1 - i
        m = _MARGIN + 0.1 * inside
        foot = low - _MARGIN - 0.2 * (inside + 1)
        corner, size = (left - m, foot), (right - left + 2 * m, high + m - foot)
        box = FancyBboxPatch(
            corner,
            *size,
            boxstyle="round,pad=0,rounding_size=0.1",
            facecolor="none",
            edgecolor="0.6",
            linewidth=0.9,
        )
        ax.add_patch(box)
        ax.text(
            right + m - 0.06, foot + 0.03, plate, ha="right", va="bottom", fontsize=8, color="0.4"
        )
    return boxed
