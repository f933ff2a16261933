"""`GaussianMixture`: scikit-learn's, by exact EM.

z_n ~ Categorical(w),   x_n | z_n = k ~ N(μ_k, Σ_k)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.arguments import whole
from pyro_em.em import ExactPosteriorEM
from pyro_em.errors import DataError, message
from pyro_em.fitting.results.result import EMResult
from pyro_em.sklearn.gaussians import (
    check_kind,
    check_least,
    component,
    covariances,
    covariances_of,
    parameters,
    shape_of,
    weighted,
)
from pyro_em.sklearn.inputs import given, probabilities
from pyro_em.sklearn.latent_model import LatentModel
from pyro_em.sklearn.starts import responsibilities
from pyro_em.updates.update import ClosedForm


@dataclass(frozen=True, eq=False)
class Mixture:
    """The Pyro model, with the values at which its parameters start.

    Attributes:
        weights: # (K,)
        means: # (K, D)
        covariances: # see `pyro_em.sklearn.gaussians.shape_of`
        kind: The structure of the covariances.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    kind: str

    def __call__(self, x: Tensor) -> None:
        """A row is of component z with probability w, and normal there. # x: (N, D)"""
        w = pyro.param("weights", self.weights.clone(), constraint=constraints.simplex)
        values = parameters(self.means, self.covariances, self.kind)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", component(values, self.kind, z), obs=x)


class GaussianMixture(LatentModel):
    """A mixture of normals, with scikit-learn's interface and starts, fitted by exact EM.

    From one start it takes the steps of ``sklearn.mixture.GaussianMixture(reg_covar=0)`` to the same
    optimum. What differs: the stopping rule estimates what is still to be gained (scikit-learn looks
    at the last gain per row, and stops earlier); weights, scores and criteria are those of the
    returned parameters; ``reg_covar`` bounds covariances and is not added to them, so that the log
    evidence never falls, and numbers are those of maximum likelihood wherever the bound is not reached.

    Args:
        n_components: Number of components K.
        covariance_type: ``"full"``, ``"tied"``, ``"diag"`` or ``"spherical"``.
        tol: Estimated remaining gain of the log evidence of all rows, in nats, at which to stop.
        reg_covar: The smallest eigenvalue that a covariance may have, in squared units of X. With 0 a
            component that collapses on equal rows ends the start, by name, at the last sound numbers.
        max_iter: Steps at most, of each start.
        n_init: Number of starts; the best is kept.
        init_params: Where starts come from: ``"kmeans"``, ``"k-means++"``, ``"random"`` or
            ``"random_from_data"``, drawn as scikit-learn draws them.
        weights_init: Weights of the first E-step, in place of those of the start. # (K,)
        means_init: Means of the same. # (K, D)
        precisions_init: Inverse covariances of the same, in the shape of ``covariances_``.
        acceleration: None for EM's own steps; ``"auto"`` for far fewer where they are slow, as in
            `ExactPosteriorEM.fit`.
        random_state: An int, a ``RandomState``, or None for numpy's global one.
        warm_start: Whether a second ``fit`` begins at the parameters of the first.

    Attributes:
        weights_: # (K,)
        means_: # (K, D)
        covariances_: # full (K, D, D), tied (D, D), diag (K, D), spherical (K,)

    Example:
        >>> import numpy as np
        >>> X = np.array([[-2.1], [-1.9], [-2.0], [3.0], [3.2]])
        >>> mixture = GaussianMixture(2, random_state=0).fit(X)
        >>> np.sort(mixture.means_.ravel()), np.sort(mixture.weights_)
        (array([-2. ,  3.1]), array([0.4, 0.6]))
        >>> bool(mixture.predict([[2.9]]) == mixture.predict([[3.3]]))
        True
    """

    latent = "z"
    _of_the_model = ("n_components", "covariance_type")

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: str = "full",
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 1000,
        n_init: int = 1,
        init_params: str = "kmeans",
        weights_init: Any = None,
        means_init: Any = None,
        precisions_init: Any = None,
        acceleration: str | None = None,
        random_state: Any = None,
        warm_start: bool = False,
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.n_init = n_init
        self.init_params = init_params
        self.weights_init = weights_init
        self.means_init = means_init
        self.precisions_init = precisions_init
        self.acceleration = acceleration
        self.random_state = random_state
        self.warm_start = warm_start

    # ------------------------------------------------------------------ fitting

    def _draws_numbers(self) -> bool:
        return False

    def _starts(self, rows: Tensor, rng: Any) -> Iterator[ExactPosteriorEM]:
        K = whole("GaussianMixture", "n_components", self.n_components)
        check_kind(self.covariance_type)
        if len(rows) < K:
            raise DataError(
                message(
                    f"n_components={K}",
                    f"X has {len(rows)} rows.",
                    "a component needs rows of its own",
                    [f"pass n_components={len(rows)} or fewer"],
                )
            )
        check_least("GaussianMixture", self.reg_covar)
        updates = {"scales": ClosedForm(floor=self.reg_covar)}
        for _ in range(whole("GaussianMixture", "n_init", self.n_init)):
            r = torch.from_numpy(responsibilities(rows.numpy(), K, self.init_params, rng))
            yield ExactPosteriorEM(self._start(rows, r), updates=updates)

    def _start(self, rows: Tensor, r: Tensor) -> Mixture:
        """The model where an M-step with responsibilities, and what the user gave, put it."""
        kind, (K, D) = self.covariance_type, (r.shape[1], rows.shape[1])
        w, mu, S = weighted(rows, r, kind, self.reg_covar)
        w = given("weights_init", self.weights_init, w, (K,))
        mu = given("means_init", self.means_init, mu, (K, D))
        if self.precisions_init is not None:
            P = given("precisions_init", self.precisions_init, S, shape_of(kind, K, D))
            S = covariances("precisions_init", P, kind, is_inverse=True)
        return Mixture(probabilities("weights_init", w), mu, S, kind)

    def _run(self, em: ExactPosteriorEM, arguments: tuple, seed: int, goes_on: bool) -> EMResult:
        return em.fit(
            *arguments,
            tol=self.tol,
            max_steps=self.max_iter,
            acceleration=self.acceleration,
            progress=False,
        )

    def _model_keywords(self) -> dict[str, Any]:
        return {}

    def _note_fit(self, result: EMResult) -> None:
        super()._note_fit(result)
        self.weights_, self.means_ = self.params_["weights"], self.params_["means"]
        spread = covariances_of(result.params["scales"], self.covariance_type)
        self.covariances_ = spread.detach().numpy()

    @property
    def _n_features_out(self) -> int:
        return len(self.weights_)

    def _what_is_finite(self) -> bool | str:
        return True
