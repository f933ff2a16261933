"""Run a model file as a user does, and hold its plans against its row of ``docs/models.md``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

MODELS = (Path(__file__).parent.parent / "docs" / "models.md").read_text()

ROUTES = {
    "enumerate": "sum",
    "Gaussian": "Gaussian",
    "conjugate": "conjugate",
    "guide": "guide",
    "point estimate": "point estimate",
}
UPDATES = {
    "closed form": "closed form",
    "least squares": "least squares",
    "Newton": "Newton",
    "Newton on sums": "Newton on sums",
    "gradient (L-BFGS)": "L-BFGS",
    "gradient (optimiser)": "optimiser",
}


def run_main(
    module: ModuleType,
    monkeypatch,
    capsys,
    tmp_path: Path,
    *options: str,
    as_in_table: bool = True,
) -> str:
    """Call ``main``; its figure must be there, and its plans must be what its row says of it.

    Args:
        module: The model file.
        monkeypatch: pytest's.
        capsys: pytest's.
        tmp_path: Where the figure goes.
        *options: Of the command line.
        as_in_table: False for options that change routes or updates.

    Returns:
        What it printed.
    """
    from matplotlib.figure import Figure

    save = Figure.savefig

    def in_place(self: Figure, *args: object, **kwargs: object) -> None:
        # Measuring all texts takes as long as drawing; nobody looks at these.
        self.set_layout_engine("none")
        save(self, *args, **{**kwargs, "dpi": 60})

    monkeypatch.setattr(Figure, "savefig", in_place)
    figure = tmp_path / "figures" / "figure.png"
    monkeypatch.setattr(sys, "argv", ["model", "--figure", str(figure), *options])
    module.main()
    assert figure.stat().st_size > 10_000
    out = capsys.readouterr().out
    if as_in_table:
        name = module.__name__.removeprefix("models.")
        assert planned(out) == row_of(name)
    return out


def row_of(name: str) -> tuple[set[str], set[str]]:
    """Routes and updates in a model's row."""
    row = re.search(rf"^\| \[`{name}`\]\(\.\./models/{name}\.py\) \|(.*)\|$", MODELS, re.M)
    assert row, f"docs/models.md has no row for {name}"
    _, routes, updates, _ = (cell.strip() for cell in row.group(1).split("|"))
    known = set(ROUTES.values())
    return {r for r in routes.split(", ") if r in known}, set(updates.split(", ")) - {"none"}


def planned(out: str) -> tuple[set[str], set[str]]:
    """Routes and updates in all the plans of an output."""
    plans = re.findall(r"^Latents\n(.*?)^(?:Cost|Iterations)", out, re.M | re.S)
    routes = {word for plan in plans for cell in cells(plan) for word in [ROUTES.get(cell)] if word}
    updates = {w for plan in plans for cell in cells(plan) for w in [UPDATES.get(cell)] if w}
    updates |= set(re.findall(r"\w: (closed form|least squares)", out))  # a table of many fits
    return routes, updates


def cells(plan: str) -> list[str]:
    """The cells of a printed plan, two spaces apart, without what an update goes with."""
    words = [word for line in plan.splitlines() for word in re.split(r"\s{2,}", line)]
    return [re.sub(r"(, floor| with) .*", "", word) for word in words]
