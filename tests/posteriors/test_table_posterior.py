"""Posteriors of many rows, through tables of some at a time: those of all rows at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import DataError, ExactPosteriorEM
from pyro_em.graph.many_rows import slices
from pyro_em.plan.kept import forget_readings
from pyro_em.posteriors import table_posterior
from pyro_em.posteriors.answers import row_faces
from pyro_em.posteriors.continuous import table_rows

K, N, D = 3, 48, 2
GENERATOR = torch.Generator().manual_seed(0)
X = 3 * torch.randn(N, D, generator=GENERATOR, dtype=torch.float64)
W = 0.5 + torch.rand(N, generator=GENERATOR, dtype=torch.float64)
SEEN = torch.rand(N, generator=GENERATOR) < 0.7
MU = torch.tensor([[-3.0, 0.0, 3.0], [0.5, -0.5, 0.2]], dtype=torch.float64).T

Model = Callable[..., None]


def normals(x: Tensor, *_: Tensor) -> None:
    p = pyro.param("p", torch.tensor([0.2, 0.3, 0.5]).double(), constraint=C.simplex)
    mu, s = pyro.param("mu", MU.clone()), pyro.param("s", 2 + MU.abs(), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        pyro.sample("x", dist.Normal(mu[z], s[z]).to_event(1), obs=x)


def weighted(x: Tensor, w: Tensor, seen: Tensor) -> None:
    with pyro.poutine.scale(scale=w), pyro.poutine.mask(mask=seen):
        normals(x)


def apart(x: Tensor, w: Tensor, seen: Tensor) -> None:
    """Sites of one row that are alike, one of them masked, and labels that are seen in part."""
    mu = pyro.param("mu", MU.clone())
    with pyro.plate("n", len(x)):
        labels = (w > 1).long()
        z = pyro.sample(
            "z", dist.Categorical(torch.ones(K).double() / K), obs=labels, obs_mask=seen
        )
        for d in range(D):
            pyro.sample(f"x{d}", dist.Normal(mu[z, d], 1.0), obs=x[:, d])
        with pyro.poutine.mask(mask=seen):
            pyro.sample("w", dist.Normal(mu[z, 1], 2.0), obs=w)


def two_latents(x: Tensor, *_: Tensor) -> None:
    """One of which depends on the other, in front of a plate inside the rows."""
    q = pyro.param("q", torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]]).double(), C.simplex)
    mu = pyro.param("mu", torch.tensor([[-3.0, 0.0], [1.0, 4.0], [0.0, -2.0]]).double())
    with pyro.plate("n", len(x), dim=-2):
        a = pyro.sample("a", dist.Categorical(torch.ones(K).double() / K))
        b = pyro.sample("b", dist.Categorical(q[a]))
        with pyro.plate("d", D, dim=-1):
            c = pyro.sample("c", dist.Bernoulli(0.2 + 0.5 * b.double()))
            pyro.sample("x", dist.Normal(mu[a, b] + c, 1.0), obs=x)


def experts(x: Tensor, w: Tensor, *_: Tensor) -> None:
    v, u = pyro.param("v", MU.clone()), pyro.param("u", MU.flip(0).clone())
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(logits=x @ v.T))
        pyro.sample("w", dist.Normal((x * u[z]).sum(-1), 2.0), obs=w)


def _answers(model: Model, fitted: bool, is_first: bool = True) -> dict[str, Any]:
    """What a posterior says, and what the questions that need one."""
    if is_first:
        pyro.clear_param_store()
        forget_readings()
    em, data = ExactPosteriorEM(model), (X, W, SEEN)
    if fitted:
        em.fit(*data, max_steps=2, tol=0, progress=False)
    q, out = em.posterior(*data), dict[str, Any]()
    out["evidence"], out["entropy"], out["rows"] = q.log_evidence, q.entropy(), q.evidence_per_row
    for name in ("cells", "counts", "tables"):
        out |= {f"{name} {i}": t for i, t in enumerate(getattr(q, name))}
    out |= {f"mode {n}": v for n, v in q.mode().items()}
    out |= {f"draw {n}": v for n, v in q.sample(5, seed=3).items()}
    out["elbo"], out["loss"] = float(em.elbo(*data)), em.evaluate_loss(*data)
    out["score"] = em.score(*data)
    out["step"] = em.step(*data)
    out |= {f"after {n}": v.detach().clone() for n, v in pyro.get_param_store().items()}
    out["moved"] = em.score(*data)
    return out


def _in_parts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(table_rows, "_MANY", 0)
    patch.setattr(slices, "_MANY", 1)
    patch.setattr(slices, "_CELLS", 50)
    for module in (table_posterior, row_faces):
        patch.setattr(module, "_CELLS", 40)


@pytest.mark.parametrize(
    ("model", "fitted"),
    [
        (normals, False),
        (normals, True),
        (weighted, True),
        (apart, False),
        (two_latents, False),
        (experts, False),
        (experts, True),
    ],
)
def test_a_posterior_is_that_of_all_rows(
    model: Model, fitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _answers(model, fitted)
    _in_parts(monkeypatch)
    made: list[Any] = []
    by_rows = table_posterior.posterior_by_rows
    monkeypatch.setattr(
        "pyro_em.plan.program.posterior_by_rows", lambda *a: made.append(by_rows(*a)) or made[-1]
    )
    parted = _answers(model, fitted)
    assert made and all(q is not None for q in made)
    assert whole.keys() == parted.keys()
    for name, value in whole.items():
        if name.startswith(("mode", "draw")):
            assert torch.equal(value, parted[name])
        elif isinstance(value, Tensor):
            assert value.shape == parted[name].shape and value.dtype == parted[name].dtype
            assert torch.allclose(value, parted[name], rtol=1e-10, atol=1e-12), name
        else:
            assert value == pytest.approx(parted[name], rel=1e-12, abs=1e-10), name


def test_what_all_rows_share_is_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _in_parts(monkeypatch)
    pyro.clear_param_store()
    q = ExactPosteriorEM(normals).posterior(X)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in [*q.cells, *q.counts]}
    held |= {t.untyped_storage().data_ptr(): t.untyped_storage() for t in q.tables}
    assert sum(s.nbytes() for s in held.values()) <= 8 * (2 * N * K + K)


def test_what_is_wrong_is_said_of_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    _in_parts(monkeypatch)
    pyro.clear_param_store()

    def bounded(x: Tensor) -> None:
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Uniform(z - 40.0, z + 40.0, validate_args=False), obs=x)

    x = X[:, 0].clone()
    x[47] = 99.0
    with pytest.raises(DataError, match="47"):
        ExactPosteriorEM(bounded).posterior(x)
