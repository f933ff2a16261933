"""One candidate's fit, to all rows or to those outside a fold, in a param scope of its own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_em.analysis.rows import Rows, rows_of, run
from pyro_em.arguments import whole
from pyro_em.em import ExactPosteriorEM
from pyro_em.errors import PyroEMError, PyroEMWarning, UsageError, message
from pyro_em.fitting.results.result import EMResult
from pyro_em.plan.program import Program
from pyro_em.portable import Refused, StaysHere
from pyro_em.resampling.refits import BROKEN, EMPTY
from pyro_em.selection.candidates import Grid, Key
from pyro_em.tracing.randomness import seeded
from pyro_em.tracing.scopes import Keeper, own_store
from pyro_em.tracing.sites import users
from pyro_em.variational.bound import Variational

_NO_MODEL = message(
    "posterior",
    "this is a pickled copy of a selection, without its models.",
    "the posterior of each is computed when it is asked for",
    ["ask the original, in the process that selected: selection.best.posterior"],
)

STARTS = 10  # of a fit with discrete latents that are summed

FEW_STARTS = 2  # of a fit whose latents are integrated: factors, random effects, conjugate latents


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of one task.

    Attributes:
        failure: Why there is no fit, in a sentence; empty where there is one.
        error: All that was said of it.
        result: The fit to all rows.
        state: Its parameters, as `ExactPosteriorEM` keeps them in a file.
        entropy: Of its discrete latents, in nats.
        held_out: Log evidence of the rows that were held out, in nats.
    """

    failure: str = ""
    result: EMResult | None = None
    state: Mapping[str, Any] | None = None
    entropy: float | None = None
    held_out: float | None = None
    error: str = ""


@dataclass(frozen=True, eq=False)
class Fits(StaysHere):
    """The fits of a grid to one data set.

    Attributes:
        grid: The candidates.
        data: The model's positional arguments.
        wishes: Keywords of ``fit``, those of starts excepted.
        num_restarts: Starts of each fit; None for what the latents ask for.
        seed: Of all starts.
        folds: Per fold the rows that are held out; none where there are no folds.
        rows: The rows of the data; None without folds.
    """

    grid: Grid
    data: tuple
    wishes: Mapping[str, Any]
    num_restarts: int | None
    seed: int
    folds: tuple[Tensor, ...] = ()
    rows: Rows | None = None

    def outcome(self, key: Key, fold: int | None) -> Outcome:
        """Fit one candidate.

        Args:
            key: The candidate.
            fold: The fold whose rows are held out; None for a fit to all rows.
        """
        try:
            em = self.grid.made(key)
            keeper = Keeper([em.model, em._session.request.guide])
            try:
                with own_store(EMPTY), warnings.catch_warnings():
                    warnings.simplefilter("ignore", PyroEMWarning)  # the status is in the table
                    return self._fitted(em, fold)
            finally:
                keeper.restore()
        except Exception as error:  # one model that fails does not take the others with it
            return Outcome(failure=_in_a_line(error), error=str(error))

    def _fitted(self, em: ExactPosteriorEM, fold: int | None) -> Outcome:
        if fold is None:
            result = self.fit(em, self.data)
            known = result.log_evidence is not None
            entropy = result.criteria().entropy if known else None
            light = replace(result, _posterior=Refused(_NO_MODEL))
            return Outcome("", light, em._session.fitted(), entropy)
        assert self.rows is not None
        out = self.folds[fold]
        every = torch.arange(self.rows.size)
        kept = every[~torch.isin(every, out)]
        result = self.fit(em, self.rows.taken(self.data, {}, kept)[0])
        if result.status in BROKEN:
            return Outcome(failure=result.message.partition("\n")[0])
        held = self.rows.taken(self.data, {}, out)[0]
        with seeded(self.seed):
            is_exact = isinstance(em._session.look(held, {}, look_only=True), Program)
            found = em.score(*held) if is_exact else -em.evaluate_loss(*held)
        return Outcome(held_out=found)

    def fit(self, em: ExactPosteriorEM, data: tuple) -> EMResult:
        """The fit of one model, with the starts of all."""
        starts = self.starts(em, data)
        return em.fit(*data, num_restarts=starts, seed=self.seed, progress=False, **self.wishes)

    def starts(self, em: ExactPosteriorEM, data: tuple) -> int:
        """How many starts the fit of one model has."""
        if self.num_restarts == 1:
            return 1
        return _starts(em._session.look(data, {}), self.num_restarts)


def folded(fits: Fits, folds: Any, keys: list[Key]) -> Fits:
    """The same with rows that are held out in turn: every row once.

    Args:
        fits: The fits.
        folds: How many folds.
        keys: Candidates whose models show what the rows are: the first that runs.

    Raises:
        UsageError: If the data have too few rows, or are one series.
    """
    folds = whole("select", "folds", folds, 2)
    rows = _rows(fits, keys)
    if rows.plate is None:
        raise UsageError(
            message(
                "select",
                f"folds={folds}, and the data are one series of {rows.size} steps.",
                "a fold holds rows or sequences out; steps of one series depend on those beside them",
                [
                    "leave folds out and choose by BIC, whose N are the steps",
                    "cut the series into sequences, in a plate of their own",
                ],
            )
        )
    if rows.size < folds:
        raise UsageError(
            message(
                "select",
                f"folds={folds}, and the data have {rows.size} rows in plate '{rows.plate}'.",
                "each fold holds one row out at least",
                [f"pass folds={min(5, rows.size)}"],
            )
        )
    generator = torch.Generator().manual_seed(fits.seed)
    order = torch.randperm(rows.size, generator=generator)
    return replace(fits, folds=tuple(order.tensor_split(folds)), rows=rows)


def _starts(found: Program | Variational, wanted: int | None) -> int:
    """How many starts a model gets: many maxima are those of discrete latents, mostly."""
    if not isinstance(found, Program):
        return 1 if wanted is None else wanted
    integrated = any(group.nested is not None for group in found.graph.groups)
    sizes = [latent.size for latent in found.graph.latents.values()]
    if sizes and max(sizes) == 1 and not integrated:
        return 1  # a mixture of one component: whatever assigns rows to it begins alike
    if wanted is not None:
        return wanted
    if sizes:
        return STARTS
    return FEW_STARTS if integrated else 1


def _rows(fits: Fits, keys: list[Key]) -> Rows:
    failed: Exception | None = None
    for key in keys:
        try:
            em = fits.grid.made(key)
            with own_store(EMPTY), em._session.buffers_kept():
                model = users(em.model)
                sites = run(model, fits.data, {})
                return rows_of(model, fits.data, {}, "select", sites)
        except Exception as error:  # of this candidate; another one may run
            failed = failed or error
    assert failed is not None
    if isinstance(failed, PyroEMError):
        raise failed
    raise UsageError(message("select", f"no model can be run on these data: {_in_a_line(failed)}"))


def _in_a_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, PyroEMError) else f"{type(error).__name__}: {text}"


def total(values: list[float | None]) -> float | None:
    """The sum; None if one is missing.

    Example:
        >>> total([1.0, 2.0]), total([1.0, None])
        (3.0, None)
    """
    known = [v for v in values if v is not None]
    return math.fsum(known) if len(known) == len(values) and values else None
