"""Each promise is broken once on purpose: the library has to notice."""

from __future__ import annotations

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_em import EMStatus, ExactPosteriorEM, Family, Kind, PyroEMError, PyroEMWarning, Rule
from pyro_em.families.registry import REGISTRY, register_family
from pyro_em.posteriors import contraction, enumeration

X = torch.tensor([0.3, 1.1, 0.2, 2.0, 0.7], dtype=torch.float64)


def half_normals(x):
    s = pyro.param("s", torch.tensor([0.5, 1.5]), constraint=constraints.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
        pyro.sample("x", dist.HalfNormal(s[z]), obs=x)


def test_a_fall_of_the_evidence_is_named_and_undone() -> None:
    """A record whose scale is three times too large."""
    wrong = Family(
        dist.HalfNormal,
        statistics=lambda x, a: {"square": 9 * x * x},
        rules={"scale": Rule(Kind.SCALE, lambda s, a: (s["square"], s["weight"]))},
    )
    before = dict(REGISTRY)
    try:
        register_family(wrong, replace=True)
        with pytest.warns(PyroEMWarning, match=r"site 'x', parameters 's'.*the log evidence fell"):
            result = ExactPosteriorEM(half_normals).fit(X)
    finally:
        REGISTRY.clear()
        REGISTRY.update(before)
    assert result.status is EMStatus.FELL and not result.converged
    best = max([*result.history, result.log_evidence])
    assert result.log_evidence == best
    torch.testing.assert_close(result.params["s"], pyro.param("s").detach())


def test_lost_posterior_mass_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring whose gradient is clamped, as that of Pyro's own log-einsum is."""

    def leaky(x: torch.Tensor) -> torch.Tensor:
        y = contraction.log_sum_exp(x)
        return y.detach() + 0.5 * (y - y.detach())

    original = enumeration.run_contraction
    monkeypatch.setattr(enumeration, "run_contraction", lambda *args: original(*args, ring=leaky))
    with pytest.raises(PyroEMError, match=r"site 'z': its posterior sums to 0\.5"):
        ExactPosteriorEM(half_normals).posterior(X)


def test_a_density_that_is_no_number_is_named() -> None:
    def model(x):
        a = pyro.param("a", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Beta(a, 2.0), obs=x)

    x = torch.tensor([0.2, 0.0, 0.4])
    with pytest.raises(PyroEMError, match=r"site 'x': its log density is \+inf at n = 1"):
        ExactPosteriorEM(model).posterior(x)


def test_compiled_and_generic_paths_agree_step_by_step() -> None:
    compiled = ExactPosteriorEM(half_normals).fit(X, max_steps=12, tol=0)
    pyro.clear_param_store()
    em = ExactPosteriorEM(half_normals)
    program = em._look((X,), {})
    program = replace(program, compiled=False)
    path = []
    for _ in range(12):
        evaluation = program.evaluate()
        q = program.posterior(evaluation)
        path.append(q.log_evidence)
        program.m_step(q.counts, evaluation)
    assert path == pytest.approx(list(compiled.history), rel=1e-9)
