"""`HMM`: hidden Markov models with hmmlearn's interface, by exact EM.

z_1 ~ Categorical(π),   z_t | z_{t-1} ~ Categorical(A[z_{t-1}]),   x_t | z_t = k ~ emission k
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.utils.validation import _num_samples, check_is_fitted
from torch import Tensor
from torch.distributions import constraints

from pyro_em.arguments import shown, whole
from pyro_em.em import ExactPosteriorEM
from pyro_em.errors import DataError, UsageError, message
from pyro_em.fitting.results.result import EMResult
from pyro_em.sklearn.chains import best_paths, one_step_ahead, smoothed
from pyro_em.sklearn.emissions import EMISSIONS, Emission
from pyro_em.sklearn.estimator import EMEstimator
from pyro_em.sklearn.gaussians import check_kind, check_least, covariances
from pyro_em.sklearn.inputs import Sequences, given, probabilities
from pyro_em.tracing.vectorized import vectorized_markov
from pyro_em.updates.update import ClosedForm


@dataclass(frozen=True, eq=False)
class Chain:
    """The Pyro model, with the values at which its parameters start.

    Attributes:
        start: By name; ``startprob`` # (K,), ``transmat`` # (K, K), and those of the emission.
        emission: What a state emits.
    """

    start: Mapping[str, Tensor]
    emission: Emission

    def __call__(self, x: Tensor, lengths: Tensor | None = None) -> None:
        """Sequences side by side, each a chain of its own.

        Args:
            x: Padded rows. # (B, T, *event)
            lengths: Rows of each sequence, where they differ. # (B,)
        """
        simplex = constraints.simplex
        pi = pyro.param("startprob", self.start["startprob"].clone(), constraint=simplex)
        A = pyro.param("transmat", self.start["transmat"].clone(), constraint=simplex)
        values = self.emission.parameters(self.start)
        z = None
        with pyro.plate("sequences", len(x)):
            for t in vectorized_markov("time", x.shape[1]):
                mask = True if lengths is None else t < lengths
                with pyro.poutine.mask(mask=mask):
                    z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
                    pyro.sample(f"x_{t}", self.emission.component(values, z), obs=x[:, t])


class HMM(EMEstimator):
    """A hidden Markov model of sequences of rows, with hmmlearn's ``lengths``, fitted by exact EM.

    From one start it takes the steps of hmmlearn without its priors (``GaussianHMM(covars_prior=0,
    covars_weight=0, min_covar=0)``). What differs: ``score`` is per row, as in scikit-learn (hmmlearn's
    is this times the number of rows); ``score_samples`` is one number per row; ``lengths`` is given by
    name; ``tol`` is what is still to be gained, not the last gain.

    Args:
        n_components: Number of states K.
        emission: ``"gaussian"`` (rows of numbers), ``"poisson"`` (rows of counts) or ``"categorical"``
            (one column of symbols 0, 1, …).
        covariance_type: Of normal emissions: ``"diag"``, ``"full"``, ``"tied"`` or ``"spherical"``.
        init: Values at which the first start begins, in place of k-means and even probabilities, by the
            names of the attributes: ``{"startprob": …, "transmat": …, "means": …, "covars": …,
            "lambdas": …, "emissionprob": …}``. A probability of zero stays zero.
        n_init: Number of starts; the best is kept (``num_restarts`` of `ExactPosteriorEM.fit`).
        tol: Estimated remaining gain of the log evidence of all rows, in nats, at which to stop.
        reg_covar: The smallest eigenvalue that a covariance may have, in squared units of X.
        max_iter: Steps at most.
        acceleration: None for EM's own steps; ``"auto"`` for far fewer where they are slow, as in
            `ExactPosteriorEM.fit`.
        random_state: An int, a ``RandomState``, or None for numpy's global one.
        warm_start: Whether a second ``fit`` begins at the parameters of the first.

    Attributes:
        startprob_: # (K,)
        transmat_: # (K, K)
        means_: Of normal emissions. # (K, D)
        covariances_: # full (K, D, D), tied (D, D), diag (K, D), spherical (K,)
        covars_: The same as matrices. # (K, D, D)
        lambdas_: Of counts. # (K, D)
        emissionprob_: Of symbols. # (K, S)

    Example:
        >>> import numpy as np
        >>> X = np.array([[0.1], [-0.2], [0.0], [5.1], [4.8], [5.0], [0.2], [-0.1]])
        >>> model = HMM(2, random_state=0).fit(X, lengths=[6, 2])
        >>> states = model.predict(X, lengths=[6, 2])
        >>> states == states[0]
        array([ True,  True,  True, False, False, False,  True,  True])
        >>> model.means_.ravel()[[states[0], states[3]]].round(2)
        array([0.  , 4.97])
    """

    _of_the_model = ("n_components", "emission", "covariance_type")

    def __init__(
        self,
        n_components: int = 1,
        emission: str = "gaussian",
        *,
        covariance_type: str = "diag",
        init: Mapping[str, Any] | None = None,
        n_init: int = 1,
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 1000,
        acceleration: str | None = None,
        random_state: Any = None,
        warm_start: bool = False,
    ) -> None:
        self.n_components = n_components
        self.emission = emission
        self.covariance_type = covariance_type
        self.init = init
        self.n_init = n_init
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.acceleration = acceleration
        self.random_state = random_state
        self.warm_start = warm_start

    # ------------------------------------------------------------------ fitting

    def fit(self, X: Any, y: Any = None, *, lengths: Any = None) -> Self:
        """Fit the model to sequences that stand one below the other.

        Args:
            X: The rows. # (N, D)
            y: Nothing.
            lengths: Rows of each sequence, in their order; all rows are one sequence where None.

        Returns:
            The estimator.

        Raises:
            ValueError: If X or the lengths cannot be used.
        """
        emission = self._emission()
        return self._fit(X, lambda rows: _arguments(_unlabelled(rows, y), lengths, emission))

    def _starts(self, rows: Tensor, rng: Any) -> Iterator[ExactPosteriorEM]:
        emission = self._emission()
        emission.check(rows)
        K = emission.K
        if len(rows) < K:
            raise DataError(
                message(
                    f"n_components={K}",
                    f"X has {len(rows)} rows.",
                    "a state needs rows of its own",
                    [f"pass n_components={len(rows)} or fewer"],
                )
            )
        even = rows.new_ones(K, K) / K
        start = {"startprob": even[0], "transmat": 0.5 * (even + torch.eye(K).to(rows))}
        start |= emission.start(rows, rng)
        start |= self._given(start)
        updates = {"scales": ClosedForm(floor=self.reg_covar)}
        is_normal = self.emission == "gaussian"
        yield ExactPosteriorEM(Chain(start, emission), updates=updates if is_normal else {})

    def _run(self, em: ExactPosteriorEM, arguments: tuple, seed: int, goes_on: bool) -> EMResult:
        return em.fit(
            *arguments,
            num_restarts=1 if goes_on else self.n_init,
            tol=self.tol,
            max_steps=self.max_iter,
            acceleration=self.acceleration,
            seed=seed,
            progress=False,
        )

    def _emission(self) -> Emission:
        K = whole("HMM", "n_components", self.n_components)
        check_kind(self.covariance_type)
        check_least("HMM", self.reg_covar)
        kind = EMISSIONS.get(self.emission) if isinstance(self.emission, str) else None
        if kind is None:
            raise UsageError(
                message(
                    f"emission={shown(self.emission)}",
                    "there is no such emission.",
                    "",
                    [
                        f"pass {', '.join(map(repr, EMISSIONS))}",
                        "write the chain as a Pyro model, for LatentModel or ExactPosteriorEM",
                    ],
                )
            )
        return kind(K, self.covariance_type, self.reg_covar)

    def _given(self, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the user gave in place of starts, of the same names and shapes."""
        if self.init is None:
            return {}
        known = isinstance(self.init, Mapping)
        wrong = [name for name in self.init if name not in start] if known else [self.init]
        if wrong:
            raise UsageError(
                message(
                    "init",
                    f"{shown(wrong[0])} is no parameter of this model.",
                    "",
                    [f"pass a dict with any of {', '.join(map(repr, start))}"],
                )
            )
        shapes = {name: tuple(value.shape) for name, value in start.items()}
        if "emissionprob" in self.init:  # of more symbols than are seen
            symbols = np.shape(self.init["emissionprob"])[-1:]
            shapes["emissionprob"] = (len(start["startprob"]), *symbols)
        out = {}
        for name, value in self.init.items():
            where = f"init['{name}']"
            out[name] = given(where, value, start[name], shapes[name])
            if name == "covars":
                out[name] = covariances(where, out[name], self.covariance_type, is_inverse=False)
            elif name in ("startprob", "transmat", "emissionprob"):
                out[name] = probabilities(where, out[name])
        return out

    @property
    def _fitted_emission(self) -> Emission:
        chain = self._em.model
        assert isinstance(chain, Chain)
        return chain.emission

    def _note_fit(self, result: EMResult) -> None:
        self.startprob_, self.transmat_ = self.params_["startprob"], self.params_["transmat"]
        values = {name: value.detach() for name, value in result.params.items()}
        for name, value in self._fitted_emission.shown(values).items():
            setattr(self, name, value)

    @property
    def _n_features_out(self) -> int:
        return len(self.startprob_)

    # ------------------------------------------------------------------ asking

    def predict(self, X: Any, lengths: Any = None) -> np.ndarray:
        """The most probable path of states as a whole (Viterbi).

        Args:
            X: The rows. # (N, D)
            lengths: Rows of each sequence.

        Returns:
            A state per row. # (N,)
        """
        sequences, chain = self._chain(self._rows(X), lengths)
        return sequences.rows(best_paths(*chain, sequences.inside)).numpy()

    def predict_proba(self, X: Any, lengths: Any = None) -> np.ndarray:
        """The probabilities of the states at each row, given its whole sequence (smoothing).

        Args:
            X: The rows. # (N, D)
            lengths: Rows of each sequence.

        Returns:
            They sum to one. # (N, K)
        """
        rows = self._rows(X)
        sequences, chain = self._chain(rows, lengths)
        gamma, log_evidence = smoothed(*chain)
        if not np.isfinite(log_evidence):  # near an underflow, or impossible, which is told by name
            given = _arguments(rows, lengths, self._fitted_emission)
            steps = self._ask(rows, lambda: self._em.posterior(*given).probs("z_*"))
            gamma = steps.detach().transpose(0, 1)
        return sequences.rows(gamma).to(rows).numpy()

    def transform(self, X: Any, lengths: Any = None) -> np.ndarray:
        """The same as ``predict_proba``. # (N, D) -> (N, K)"""
        return self.predict_proba(X, lengths)

    def fit_transform(self, X: Any, y: Any = None, *, lengths: Any = None) -> np.ndarray:
        """Fit, and the probabilities of the states at the rows of the fit. # (N, D) -> (N, K)"""
        return self.fit(X, y, lengths=lengths).transform(X, lengths)

    def score_samples(self, X: Any, lengths: Any = None) -> np.ndarray:
        """The log density of each row given those before it in its sequence, in nats.

            log p(x_t | x_1, …, x_{t-1}),   which adds up to the log evidence

        Args:
            X: The rows. # (N, D)
            lengths: Rows of each sequence.

        Returns:
            One number per row. # (N,)
        """
        rows = self._rows(X)
        sequences, chain = self._chain(rows, lengths)
        return sequences.rows(one_step_ahead(*chain)).to(rows).numpy()

    def score(self, X: Any, y: Any = None, *, lengths: Any = None) -> float:
        """The log evidence per row in nats; hmmlearn's is this times the number of rows.

        Args:
            X: The rows. # (N, D)
            y: Nothing.
            lengths: Rows of each sequence.
        """
        rows = _unlabelled(self._rows(X), y)
        log_evidence = smoothed(*self._chain(rows, lengths)[1])[1]
        if not np.isfinite(log_evidence):  # near an underflow, or impossible, which is told by name
            given = _arguments(rows, lengths, self._fitted_emission)
            log_evidence = self._ask(rows, lambda: self._evidence(given))
        return log_evidence / len(rows)

    def sample(self, n_samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """One new sequence from the fitted model, with its states.

        Args:
            n_samples: Number of rows.

        Returns:
            The rows # (n, D), and their states # (n,). Draws follow ``random_state``: with an int each
            call gives the same ones.
        """
        check_is_fitted(self)
        rows = self._example.expand(whole("sample", "n_samples", n_samples), -1).clone()
        drawn = self._drawn(rows, _arguments(rows, None, self._fitted_emission))
        states = drawn.values["z_*"][:, 0].numpy().astype(np.int64)
        return drawn.args[0][0].to(rows).reshape(len(rows), -1).numpy(), states

    def bic(self, X: Any, lengths: Any = None) -> float:
        """BIC of rows: −2 log evidence + p log N, every row counts; lower is better. # X: (N, D)"""
        price = float(np.log(len(X)))
        return self._criterion(self.score(X, lengths=lengths), len(X), price)

    def aic(self, X: Any, lengths: Any = None) -> float:
        """AIC of rows: −2 log evidence + 2 p; lower is better. # X: (N, D)"""
        return self._criterion(self.score(X, lengths=lengths), len(X), 2.0)

    def _chain(self, rows: Tensor, lengths: Any) -> tuple[Sequences, tuple[Tensor, Tensor, Tensor]]:
        """The sequences; log densities of their steps, of first states and of transitions."""
        sequences, emission = Sequences.of(len(rows), lengths), self._fitted_emission
        emission.check(rows)
        values = {name: torch.from_numpy(value) for name, value in self.params_.items()}
        log_density = sequences.padded(emission.log_density(values, rows).double())
        log_density[~sequences.inside] = 0.0
        first, then = (values[name].double().log() for name in ("startprob", "transmat"))
        return sequences, (log_density, first, then)


def _arguments(rows: Tensor, lengths: Any, emission: Emission) -> tuple:
    """The arguments of `Chain`: padded sequences, and their lengths where they differ."""
    sequences = Sequences.of(len(rows), lengths)
    padded = sequences.padded(emission.observed(rows))
    return (padded,) if sequences.are_equal else (padded, sequences.lengths)


def _unlabelled(rows: Tensor, y: Any) -> Tensor:
    """The rows; ``fit(X, lengths)`` is hmmlearn's, but scikit-learn's second argument is y.

    Raises:
        UsageError: If y has another length than the rows, so that it is meant for lengths.
    """
    if y is not None and _num_samples(y) != len(rows):
        raise UsageError(
            message(
                "HMM",
                f"y has {_num_samples(y)} numbers for {len(rows)} rows.",
                "scikit-learn's second argument is y, which a model without labels does not use",
                ["pass lengths by name: fit(X, lengths=lengths)"],
            )
        )
    return rows
