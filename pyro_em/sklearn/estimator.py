"""What all estimators share: a fit in a param store of its own, and questions to what was fitted."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    DensityMixin,
    TransformerMixin,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from pyro_em.analysis.generate import Generated
from pyro_em.em import ExactPosteriorEM
from pyro_em.errors import UsageError, message
from pyro_em.fitting.results.history import EMStatus
from pyro_em.fitting.results.result import EMResult
from pyro_em.sklearn.inputs import as_rows
from pyro_em.sklearn.kept_store import AsFitted, in_store, kept_store


@dataclass(frozen=True, eq=False)
class _Fitted:
    em: ExactPosteriorEM
    store: dict[str, Any]
    result: EMResult

    @property
    def bound(self) -> float:
        evidence = self.result.log_evidence
        return self.result.elbo if evidence is None else evidence

    def is_better_than(self, other: _Fitted) -> bool:
        """A start that ended soundly before one that collapsed, then by evidence."""
        bad = (EMStatus.DEGENERATE, EMStatus.UNBOUNDED)
        ranks = [(f.result.status not in bad, f.result.elbo) for f in (self, other)]
        return ranks[0] > ranks[1]


class EMEstimator(
    ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityMixin, BaseEstimator, ABC
):
    """What `LatentModel`, `GaussianMixture` and `HMM` share; a subclass says what is fitted and how.

    A fit has a param store of its own: the user's, Pyro's and torch's random states and torch's default
    precision are left as they are. Numbers are computed in the precision of X, float32 or float64.

    Attributes:
        result_: The `EMResult` of the last fit, with its plan, its history and standard errors. A
            pickle of the estimator is without it.
        params_: The parameters by name, as arrays.
        converged_: Whether a stopping rule was met; None for a stochastic fit without one.
        n_iter_: Steps of the best start.
        lower_bound_: The log evidence per row of the fit, in nats; where a guide draws, its bound.
        n_parameters_: Free parameters, as BIC and AIC count them.
    """

    random_state: Any
    warm_start: Any
    _em: ExactPosteriorEM
    _store: dict[str, Any]

    # ------------------------------------------------------------------ what a subclass says

    @abstractmethod
    def _starts(self, rows: Tensor, rng: Any) -> Iterator[ExactPosteriorEM]:
        """Models that are fitted, each in a store of its own; the best is kept. # rows: (N, D)"""

    @abstractmethod
    def _run(self, em: ExactPosteriorEM, arguments: tuple, seed: int, goes_on: bool) -> EMResult:
        """Fit one, inside its store.

        Args:
            em: One of `_starts`, or the last fit.
            arguments: The model's.
            seed: Of random starts and draws.
            goes_on: Whether it starts at the parameters of the last fit.
        """

    @property
    @abstractmethod
    def _n_features_out(self) -> int:
        """Columns of ``transform``."""

    def _model_keywords(self) -> dict[str, Any]:
        """The model's keyword arguments."""
        return {}

    def _note_fit(self, result: EMResult) -> None:
        """Set what the subclass shows of a fit."""

    # ------------------------------------------------------------------ fitting

    _of_the_model: ClassVar[tuple[str, ...]] = ()
    """Parameters with which a fit cannot go on from another one's."""

    def _goes_on(self) -> bool:
        """Whether a fit begins at the parameters of the last one.

        Raises:
            UsageError: If it should, and the model is another one now.
        """
        if not self.warm_start or not hasattr(self, "_em"):
            return False
        changed = [n for n in self._of_the_model if getattr(self, n) != self._fitted_with[n]]
        if changed:
            raise UsageError(
                message(
                    f"{type(self).__name__}: warm_start",
                    f"{changed[0]} was {self._fitted_with[changed[0]]!r} in the last fit.",
                    "a fit cannot go on with the parameters of another model",
                    ["pass warm_start=False", "fit a clone: sklearn.base.clone(estimator)"],
                )
            )
        return True

    def fit_predict(self, X: Any, y: Any = None, **options: Any) -> np.ndarray:
        """Fit, and ``predict`` for the same rows; options go to both (``lengths`` of an `HMM`)."""
        return self.fit(X, y, **options).predict(X, **options)

    def _fit(self, X: Any, arguments: Callable[[Tensor], tuple]) -> Self:
        rows = self._rows(X, reset=True)
        given = arguments(rows)
        rng = check_random_state(self.random_state)
        seed = int(rng.randint(2**31 - 1)) if self._draws_numbers() else 0
        goes_on = self._goes_on()
        best: _Fitted | None = None
        for em in [self._em] if goes_on else self._starts(rows, rng):
            store = self._store if goes_on else {"params": {}, "constraints": {}}
            with kept_store(store, seed, rows.dtype):
                fitted = _Fitted(em, store, self._run(em, given, seed, goes_on))
            best = fitted if best is None or fitted.is_better_than(best) else best
        assert best is not None
        result = best.result
        self.result_ = in_store(result, best.store, seed, rows.dtype)
        self._em, self._store, self._seed = best.em, best.store, seed
        self.params_ = {n: v.detach().cpu().numpy().copy() for n, v in result.params.items()}
        self.converged_, self.n_iter_ = result.converged, result.num_steps
        self._is_exact = result.log_evidence is not None
        self.lower_bound_ = best.bound / len(rows)
        self.n_parameters_ = result.num_free_parameters
        self._fitted_with = {name: getattr(self, name) for name in self._of_the_model}
        self._example = rows[:1].clone()
        self._note_fit(result)
        if result.converged is False:
            warnings.warn(
                f"{type(self).__name__} did not converge: {result.message}",
                ConvergenceWarning,
                stacklevel=3,
            )
        return self

    def _draws_numbers(self) -> bool:
        """Whether ``fit`` of the `ExactPosteriorEM` draws random numbers."""
        return True

    def _rows(self, X: Any, *, reset: bool = False) -> Tensor:
        if not reset:
            check_is_fitted(self)
        X = validate_data(
            self,
            X,
            reset=reset,
            dtype=[np.float64, np.float32],
            ensure_min_samples=2 if reset else 1,
            ensure_all_finite=self._what_is_finite(),
        )
        return as_rows(X)

    def _what_is_finite(self) -> bool | str:
        return True

    # ------------------------------------------------------------------ asking

    @contextmanager
    def em(self) -> Iterator[ExactPosteriorEM]:
        """The `ExactPosteriorEM` behind a fitted estimator, with its parameters, for as long as asked.

            with estimator.em() as em:
                em.predictive(x, num_samples=100)

        Tensors are to be of the precision of the fit's X.

        Yields:
            It, while Pyro's param store is the estimator's own.
        """
        check_is_fitted(self)
        with kept_store(self._store, self._seed, self._example.dtype), AsFitted():
            yield self._em

    def _ask(self, rows: Tensor, question: Callable[[], Any]) -> Any:
        """An answer of the fitted model, computed inside its own store."""
        with kept_store(self._store, self._seed, rows.dtype), AsFitted():
            return question()

    def _drawn(self, rows: Tensor, arguments: tuple) -> Generated:
        """New data in place of what the arguments hold, as many rows. # rows: (n, D)"""
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        given = arguments, self._model_keywords()
        return self._ask(rows, lambda: self._em._generated(None, *given, seed, "sample"))

    def _evidence(self, arguments: tuple) -> float:
        """The log evidence of all rows; where a guide draws, its bound."""
        keywords = self._model_keywords()
        if self._is_exact:
            return self._em.score(*arguments, **keywords)
        terms = self._em.elbo(*arguments, **keywords)
        return terms.value - terms.log_prior

    def _criterion(self, evidence_per_row: float, N: int, price: float) -> float:
        return -2 * evidence_per_row * N + self.n_parameters_ * price

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_em")

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        state.pop("result_", None)
        return state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
