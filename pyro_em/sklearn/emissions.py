"""What the states of a hidden Markov model emit: a table of distributions with their starts.

An emission has parameters with names, values at which they start, and for each state a distribution
of a row. The names are those of hmmlearn's attributes without their underscore.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.distributions import constraints

from pyro_em.errors import DataError, message
from pyro_em.sklearn.gaussians import (
    as_matrices,
    component,
    covariances_of,
    parameters,
    weighted,
)

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Emission(ABC):
    """A distribution of a row for each state.

    Attributes:
        K: Number of states.
        covariance_type: Of normal emissions.
        least: The smallest eigenvalue of their covariances.
    """

    K: int
    covariance_type: str
    least: float

    @abstractmethod
    def start(self, rows: Tensor, rng: np.random.RandomState) -> dict[str, Tensor]:
        """Values at which parameters start.

        Args:
            rows: The data. # (N, D)
            rng: Where random numbers come from.

        Raises:
            DataError: If rows are none that it can emit.
        """

    @abstractmethod
    def parameters(self, start: Mapping[str, Tensor]) -> Values:
        """The parameters of a Pyro model, where they start."""

    @abstractmethod
    def component(self, values: Values, z: Tensor) -> Any:
        """The distribution that a state selects."""

    @abstractmethod
    def shown(self, params: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Attributes of a fitted estimator, by name."""

    def check(self, rows: Tensor) -> None:  # noqa: B027
        """Refuse rows that no state can emit.

        Raises:
            DataError: If there are any.
        """

    def observed(self, rows: Tensor) -> Tensor:
        """Rows as the distribution takes them. # (N, D) -> (N, *event)"""
        return rows

    def log_density(self, values: Values, rows: Tensor) -> Tensor:
        """Log densities of rows in each state. # (N, D) -> (N, K)"""
        every = self.component(values, torch.arange(self.K))
        return every.log_prob(self.observed(rows).unsqueeze(1))

    def _clusters(self, rows: Tensor, rng: np.random.RandomState) -> Tensor:
        """One-hot labels by k-means. # (N, K)"""
        labels = KMeans(self.K, n_init=1, random_state=rng).fit(rows.numpy()).labels_
        return torch.nn.functional.one_hot(torch.as_tensor(labels).long(), self.K).to(rows)


class Gaussian(Emission):
    """A row is normal; start: clusters of the rows."""

    def start(self, rows: Tensor, rng: np.random.RandomState) -> dict[str, Tensor]:
        """See `Emission.start`."""
        r = self._clusters(rows, rng)
        _, means, covariances = weighted(rows, r, self.covariance_type, self.least)
        return {"means": means, "covars": covariances}

    def parameters(self, start: Mapping[str, Tensor]) -> Values:
        """See `Emission.parameters`."""
        return parameters(start["means"], start["covars"], self.covariance_type)

    def component(self, values: Values, z: Tensor) -> Any:
        """See `Emission.component`."""
        return component(values, self.covariance_type, z)

    def shown(self, params: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """See `Emission.shown`; ``covars_`` are matrices, as hmmlearn shows them."""
        spread = covariances_of(params["scales"], self.covariance_type)
        matrices = as_matrices(spread, self.covariance_type, *params["means"].shape)
        values = {"means_": params["means"], "covariances_": spread, "covars_": matrices}
        return {name: value.numpy().copy() for name, value in values.items()}


class Poisson(Emission):
    """Counts, independent of each other given the state; start: means of clusters of the rows."""

    def start(self, rows: Tensor, rng: np.random.RandomState) -> dict[str, Tensor]:
        """See `Emission.start`."""
        r = self._clusters(rows, rng)
        means = r.T @ rows / r.sum(0).clamp(min=1).unsqueeze(-1)
        return {"lambdas": means + 0.01 * rows.mean(0) + 1e-3}  # no rate starts at zero

    def check(self, rows: Tensor) -> None:
        """See `Emission.check`."""
        if bool((rows < 0).any()) or bool((rows != rows.round()).any()):
            raise _not_whole("poisson", "counts", rows)

    def parameters(self, start: Mapping[str, Tensor]) -> Values:
        """See `Emission.parameters`."""
        rate = pyro.param("lambdas", start["lambdas"].clone(), constraint=constraints.positive)
        return {"lambdas": rate}

    def component(self, values: Values, z: Tensor) -> Any:
        """See `Emission.component`."""
        return dist.Poisson(values["lambdas"][z]).to_event(1)

    def shown(self, params: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """See `Emission.shown`."""
        return {"lambdas_": params["lambdas"].numpy().copy()}


class Categorical(Emission):
    """Symbols 0, 1, …; start: random probabilities, as hmmlearn draws them."""

    def start(self, rows: Tensor, rng: np.random.RandomState) -> dict[str, Tensor]:
        """See `Emission.start`."""
        probs = rng.dirichlet(np.ones(int(rows.max()) + 1), size=self.K)
        return {"emissionprob": torch.as_tensor(probs).to(rows)}

    def check(self, rows: Tensor) -> None:
        """See `Emission.check`."""
        if rows.shape[1] != 1 or bool((rows < 0).any()) or bool((rows != rows.round()).any()):
            raise _not_whole("categorical", "symbols 0, 1, … in one column", rows)

    def parameters(self, start: Mapping[str, Tensor]) -> Values:
        """See `Emission.parameters`."""
        given, simplex = start["emissionprob"].clone(), constraints.simplex
        return {"emissionprob": pyro.param("emissionprob", given, constraint=simplex)}

    def component(self, values: Values, z: Tensor) -> Any:
        """See `Emission.component`."""
        return dist.Categorical(values["emissionprob"][z])

    def log_density(self, values: Values, rows: Tensor) -> Tensor:
        """See `Emission.log_density`; a probability of zero is one, not the smallest number."""
        symbols, known = self.observed(rows), values["emissionprob"].shape[1]
        if bool((symbols >= known).any()):
            raise DataError(
                message(
                    "X",
                    f"symbol {int(symbols.max())} is new to the model, which knows 0, …, {known - 1}.",
                    "no state emits what the fit has not seen",
                    ["give the fit room: init={'emissionprob': …} with a column for each symbol"],
                )
            )
        return values["emissionprob"].log().T[symbols]

    def observed(self, rows: Tensor) -> Tensor:
        """See `Emission.observed`."""
        return rows[:, 0].long()

    def shown(self, params: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """See `Emission.shown`."""
        return {"emissionprob_": params["emissionprob"].numpy().copy()}


def _not_whole(emission: str, what: str, rows: Tensor) -> DataError:
    bad = (rows < 0) | (rows != rows.round())
    seen = f" {float(rows[bad][0]):g} is none" if bool(bad.any()) else ""
    return DataError(
        message(
            "X",
            f"emission='{emission}' is of {what}.{seen}",
            f"X has {rows.shape[1]} columns" if not seen else "",
            ["choose another emission: 'gaussian', 'poisson', 'categorical'"],
        )
    )


EMISSIONS: Mapping[str, type[Emission]] = {
    "gaussian": Gaussian,
    "poisson": Poisson,
    "categorical": Categorical,
}
