"""The likelihood ratio of two models, and what it is where the smaller one is true."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_em.arguments import seed_of, whole
from pyro_em.errors import PyroEMError, UsageError, message
from pyro_em.fitting.results.result import EMResult
from pyro_em.resampling.refits import Again
from pyro_em.resampling.tasks import run_all
from pyro_em.tracing.randomness import seeds_from

_WHERE = "bootstrap_ratio"


@dataclass(frozen=True, eq=False)
class Ratio:
    """A likelihood ratio with its bootstrap distribution.

    Attributes:
        smaller: The model that is taken as true, in words.
        larger: The model against it, in words.
        ratio: 2 (log p(x; θ̂_larger) − log p(x; θ̂_smaller)).
        draws: The same of data from the smaller model. # (B,)
        failures: Why fits failed, one sentence each; their data sets do not count.
        note: What else there is to say of the two models.

    Example:
        >>> found = Ratio("K=1", "K=2", 9.0, torch.tensor([1.0, 2.0, 10.0]))
        >>> found.p_value
        0.5
    """

    smaller: str
    larger: str
    ratio: float
    draws: Tensor
    failures: tuple[str, ...] = ()
    note: str = ""

    @property
    def p_value(self) -> float:
        """(1 + number of draws at or above the ratio) / (B + 1)."""
        return (1 + int((self.draws >= self.ratio).sum())) / (len(self.draws) + 1)

    def __str__(self) -> str:
        top = torch.quantile(self.draws, 0.95)
        words = (
            f"{self.smaller} against {self.larger}: ratio {self.ratio:.4f}, p = {self.p_value:.4g}\n"
            f"{len(self.draws)} data sets from the model with {self.smaller}: 95% of their ratios are "
            f"below {float(top):.4f}."
        )
        if self.failures:
            words += f"\n{len(self.failures)} more failed, the first: {self.failures[0]}"
        return f"{words}\n{self.note}" if self.note else words

    __repr__ = __str__


def ratio_of(
    smaller: tuple[str, Again, EMResult],
    larger: tuple[str, Again, EMResult],
    n: Any,
    num_restarts: tuple[int, int],
    processes: int | None,
    seed: Any,
    progress: bool | None,
) -> Ratio:
    """Fit both models to data from the smaller one; see `Selection.bootstrap_ratio`.

    Args:
        smaller: Its name, what its fit was, and what that found.
        larger: The same of the larger one.
        n: Number of data sets.
        num_restarts: Starts of each fit of the one and of the other.
        processes: How many processes; None for this one alone.
        seed: Seed of data and starts.
        progress: Whether to show a bar.
    """
    n = whole(_WHERE, "n", n)
    seeds = [s for _, s in zip(range(n), seeds_from(seed_of(_WHERE, seed) or 0), strict=False)]
    (few, few_again, few_found), (many, many_again, many_found) = smaller, larger
    _check_order(few, few_found, many, many_found)
    observed = _difference(few_found, many_found)
    with (
        few_again.at(few_found.params, _WHERE) as null,
        many_again.at(many_found.params, _WHERE) as other,
    ):
        null.parametric(0, _WHERE)  # what no data set can be made of is said before the first fit

        def ratio(i: int) -> float | str:
            own = seeds[i]
            assert own is not None
            try:
                data = null.parametric(own, _WHERE)
                both = zip((null, other), num_restarts, strict=True)
                fits = [model.fit(data, count, own) for model, count in both]
            except PyroEMError as error:
                return str(error).partition("\n")[0]
            return _difference(*fits)

        outcomes = run_all(ratio, n, processes, progress, "data set", _WHERE)
    failures = tuple(o for o in outcomes if isinstance(o, str))
    draws = torch.tensor([o for o in outcomes if not isinstance(o, str)], dtype=torch.float64)
    if not len(draws):
        raise UsageError(message(_WHERE, f"all of {n} fits failed: {failures[0]}"))
    return Ratio(few, many, observed, draws, failures)


def _check_order(few: str, few_found: EMResult, many: str, many_found: EMResult) -> None:
    """Refuse a model against itself, or against one with fewer parameters: no ratio has a meaning."""
    p, larger = few_found.num_free_parameters, many_found.num_free_parameters
    if few == many:
        what = f"{few} is given as both models."
    elif p is not None and larger is not None and larger < p:
        what = f"the larger model, {many}, has {larger} free parameters, and {few} has {p}."
    else:
        return
    why = "the first model is taken as true, the second one has more to fit the same data with"
    raise UsageError(message(_WHERE, what, why, ["name the smaller model first"]))


def _difference(smaller: EMResult, larger: EMResult) -> float:
    assert smaller.log_evidence is not None and larger.log_evidence is not None
    return 2 * (larger.log_evidence - smaller.log_evidence)
