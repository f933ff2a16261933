"""The bootstrap of a fit: how far its parameters move from data set to data set.

    θ*_b = fit(x*_b),    x*_b ~ p(x; θ̂)   or rows of x drawn with replacement,    b = 1, …, B

Spreads of θ* are those of θ̂ over data sets of the same size. Components of each refit are put into the
order of the fit before any spread is taken. An end of the parameters' space (an empty class, a zero
variance) is no obstacle, as it is to the curvature of the evidence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_em.arguments import a_level, seed_of, truth, whole
from pyro_em.errors import PyroEMError, UsageError, message
from pyro_em.fitting.parts.chunked import chunks_in
from pyro_em.fitting.results.labels import Labels, labels_of, unknown_axes
from pyro_em.fitting.results.summary import as_frame, elements
from pyro_em.fitting.results.table import Table
from pyro_em.globs import listed
from pyro_em.portable import Portable
from pyro_em.resampling.matching import components_in, matched
from pyro_em.resampling.refits import Again, Data
from pyro_em.resampling.tasks import run_all
from pyro_em.tracing.randomness import seeds_from
from pyro_em.variational.batches import is_loader

if TYPE_CHECKING:
    from pyro_em.fitting.results.result import EMResult

_COLUMNS = ("estimate", "standard_error", "lower", "upper")
_SHOWN = 64  # elements of a parameter that are printed


@dataclass(frozen=True, eq=False, repr=False)
class Bootstrap(Portable):
    """Refits of a model to other data sets; prints as a table.

    Attributes:
        estimates: The parameters of the fit.
        draws: Per parameter those of the refits, components matched. # (B, *shape)
        log_evidence: Of the refits, each on its own data, in nats. # (B,)
        failures: Why refits failed, one sentence each; they are in no spread.
        parametric: Whether data were drawn from the model, or rows from the data.
        level: The probability that the printed intervals hold.
        axes: Per parameter the names of its axes; see `pyro_em.graph.axes.axis_names`.
        labels: Per parameter and axis a label for each place.

    Example:
        >>> draws = {"mu": torch.tensor([1.0, 2.0, 3.0])}
        >>> found = Bootstrap({"mu": torch.tensor(2.0)}, draws, torch.zeros(3), (), True)
        >>> found.standard_errors["mu"], found.interval(0.5)["mu"].tolist()
        (tensor(1.), [1.5, 2.5])
    """

    estimates: Mapping[str, Tensor]
    draws: Mapping[str, Tensor]
    log_evidence: Tensor
    failures: tuple[str, ...]
    parametric: bool
    level: float = 0.95
    axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    labels: Labels = field(default_factory=dict)

    @property
    def standard_errors(self) -> dict[str, Tensor]:
        """Per parameter the standard deviation over refits. # its shape"""
        return {name: d.std(0) for name, d in self.draws.items()}

    @property
    def bias(self) -> dict[str, Tensor]:
        """Per parameter the mean over refits less the estimate. # its shape"""
        return {name: d.mean(0) - self.estimates[name] for name, d in self.draws.items()}

    def interval(self, level: float | None = None) -> dict[str, Tensor]:
        """Percentile intervals (Efron and Tibshirani 1993, chapter 13).

        Args:
            level: The probability that each holds; that of the bootstrap where None.

        Returns:
            Per parameter its lower and upper ends. # (2, *shape)
        """
        level = self.level if level is None else a_level("interval", level)
        ends = [(1 - level) / 2, (1 + level) / 2]
        return {
            name: torch.quantile(d, torch.tensor(ends, dtype=d.dtype, device=d.device), dim=0)
            for name, d in self.draws.items()
        }

    @property
    def table(self) -> Any:
        """A row per element, named as in ``summary()``: a DataFrame, or a `Table` without pandas."""
        how = "of the model" if self.parametric else "of rows drawn with replacement"
        attrs = {"fits": len(self.log_evidence), "to data": how, "intervals hold": self.level}
        return as_frame(replace(self._table(), attrs=attrs))

    def _table(self) -> Table:
        shown = {n: v for n, v in self.estimates.items() if v.numel() <= _SHOWN}
        axes = {n: self.axes.get(n) or unknown_axes(v.dim()) for n, v in shown.items()}
        labels = {
            n: self.labels.get(n) or tuple(tuple(range(s)) for s in v.shape)
            for n, v in shown.items()
        }
        names, places = elements(axes, labels)
        errors, intervals = self.standard_errors, self.interval()
        index: list[tuple[Any, ...]] = []
        rows: list[tuple[float, ...]] = []
        for name, value in shown.items():
            columns = (value, errors[name], *intervals[name])
            index += places[name]
            rows += zip(*(c.reshape(-1).tolist() for c in columns), strict=True)
        return Table(names, tuple(index), _COLUMNS, tuple(rows))

    def __repr__(self) -> str:
        return f"Bootstrap:\n{self}"

    def __str__(self) -> str:
        return f"{str(self._table()).lstrip()}\n{self._about()}"

    def _about(self) -> str:
        what = "new data from the model" if self.parametric else "rows drawn with replacement"
        words = f"{len(self.log_evidence)} fits to {what}; intervals hold {self.level:.0%}."
        large = [n for n, v in self.estimates.items() if v.numel() > _SHOWN]
        if large:
            words += f" Not shown: {listed(large)}."
        if self.failures:
            reason, often = Counter(self.failures).most_common(1)[0]
            words += f"\n{len(self.failures)} more failed, {often} of them: {reason}"
        return words

    def _repr_html_(self) -> str:
        return f"{self._table()._repr_html_()}<p>{escape(self._about())}</p>"


def bootstrap(
    again: Again,
    result: EMResult,
    n: Any,
    parametric: Any,
    num_restarts: Any,
    level: Any,
    processes: int | None,
    seed: Any,
    progress: bool | None,
) -> Bootstrap:
    """Fit the model again to ``n`` data sets; see `EMResult.bootstrap`.

    Args:
        again: What the fit was.
        result: What it found.
        n: Number of data sets.
        parametric: Whether they are drawn from the model.
        num_restarts: Starts of each fit.
        level: The probability that intervals hold.
        processes: How many processes; None for this one alone.
        seed: Seed of the data and of the starts.
        progress: Whether to show a bar.
    """
    where = "bootstrap"
    n, num_restarts = whole(where, "n", n, 2), whole(where, "num_restarts", num_restarts)
    level, seed = a_level(where, level), seed_of(where, seed) or 0
    parametric = truth(where, "parametric", parametric)
    if result.log_evidence is not None and not result.is_parted:
        _ = result.posterior  # refuses data that have changed since
    if chunks_in(again.args) is not None or (again.args and is_loader(again.args[0])):
        raise UsageError(
            message(where, "the data came in chunks or batches.", "they are not held as a whole")
        )
    seeds = [s for _, s in zip(range(n), seeds_from(seed), strict=False)]
    with again.at(result.params, where) as fitted:
        components = components_in(fitted.program, result.params)
        drawn = fitted.resampling(where) if not parametric else None

        def data_of(own: int) -> Data:
            return fitted.parametric(own, where) if drawn is None else drawn(own)

        data_of(0)  # what no data set can be made of is said before the first fit

        def refit(i: int) -> tuple[dict[str, Tensor], float] | str:
            own = seeds[i]
            assert own is not None
            try:
                found = fitted.fit(data_of(own), num_restarts, own)
            except PyroEMError as error:
                return str(error).partition("\n")[0]
            assert found.log_evidence is not None
            return matched(fitted.program, components, found.params), found.log_evidence

        outcomes = run_all(refit, n, processes, progress, "fit", where)
    sound = [o for o in outcomes if not isinstance(o, str)]
    failures = tuple(o for o in outcomes if isinstance(o, str))
    if len(sound) < 2:
        raise UsageError(
            message(
                where,
                f"{len(failures)} of {n} fits failed: {failures[0]}",
                "a spread needs two fits at least",
            )
        )
    draws = {name: torch.stack([p[name] for p, _ in sound]) for name in result.params}
    evidence = torch.tensor([e for _, e in sound], dtype=torch.float64)
    axes = {name: form.axes for name, form in result.forms.items()}
    shapes = {name: value.shape for name, value in result.params.items()}
    labels = labels_of(None, result.forms, shapes, result.columns.values())
    params = dict(result.params)
    return Bootstrap(params, draws, evidence, failures, parametric, level, axes, labels)
