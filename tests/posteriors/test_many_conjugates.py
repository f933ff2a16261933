"""Conjugate latents of many rows: what a fit holds of them, and that nothing is lost in its slices."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.optimize as so
import scipy.special as sp
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_em import ExactPosteriorEM
from pyro_em.graph.conjugate_children import conjugates_by_rows
from pyro_em.posteriors.conjugates import conjugate_slices
from pyro_em.tracing.freed import keep_freed_memory

N = 200_000


class Held(TorchDispatchMode):
    """The most bytes that tensors made inside hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and not {_storage(t)} & (given | self.sizes.keys()):
                storage = t.untyped_storage()
                self.sizes[_storage(t)] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._left, _storage(t))
        return out

    def _left(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


@pytest.mark.slow
@pytest.mark.parametrize("exposed", [False, True])
def test_steps_on_many_rows_hold_a_few_vectors_and_are_those_of_numpy(
    exposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((conjugates_by_rows, "_SLICE"), (conjugate_slices, "MANY_ROWS")):
        monkeypatch.setattr(module, name, 1 << 12)  # as a slice is to a million rows
    keep_freed_memory()
    generator = np.random.default_rng(2)
    units = generator.uniform(0.5, 1.5, N) if exposed else np.ones(N)
    x = generator.poisson(units * generator.gamma(2.0, 2.0, N)).astype(float)
    given = (torch.as_tensor(x), torch.as_tensor(units)) if exposed else (torch.as_tensor(x),)

    def model(data: Tensor, exposures: Tensor | float = 1.0) -> None:
        a = pyro.param("a", torch.tensor(1.0).double(), constraint=constraints.positive)
        b = pyro.param("b", torch.tensor(1.0).double(), constraint=constraints.positive)
        with pyro.plate("rows", len(data)):
            rate = pyro.sample("rate", dist.Gamma(a, b))
            pyro.sample("x", dist.Poisson(rate * exposures), obs=data)

    with Held() as floor:
        pyro.poutine.trace(model).get_trace(*given)
    em = ExactPosteriorEM(model)
    with Held() as plan:
        assert em.plan(*given).kernel == "conjugate"
    with Held() as held:
        result = em.fit(*given, max_steps=3, tol=0.0)
    assert plan.most < floor.most + 3 * 8 * N
    assert held.most < floor.most + 8 * N

    def step(a: float, b: float) -> tuple[float, float]:
        """EM in numpy: digamma(a) − log a = mean log λ − log mean λ."""
        after, rate = a + x, b + units
        log, mean = (sp.digamma(after) - np.log(rate)).mean(), (after / rate).mean()
        a = so.brentq(
            lambda a: sp.digamma(a) - np.log(a) - log + np.log(mean), 1e-2, 1e2, xtol=1e-14
        )
        return a, a / mean

    at = 1.0, 1.0
    for value in (*result.history, result.log_evidence):
        assert value == pytest.approx(evidence(x, units, *at), rel=1e-12)
        at = step(*at)


def evidence(x: np.ndarray, units: np.ndarray, a: float, b: float) -> float:
    """Negative binomials: Σ log ∫ Poisson(x | u λ) Gamma(λ | a, b) dλ."""
    each = sp.gammaln(a + x) - sp.gammaln(a) - sp.gammaln(x + 1)
    return float((each + a * np.log(b) + x * np.log(units) - (a + x) * np.log(b + units)).sum())
