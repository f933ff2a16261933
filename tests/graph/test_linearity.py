"""Programs that are linear in Gaussian latents are solved, whatever they are made of; others are not.

All that is refused passes a test at two points, or hides what it does from autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_em import ExactPosteriorEM, ModelError
from tests.posteriors.gaussian_models import dense_joint

N = 5
Y = torch.tensor([0.3, -1.2, 0.7, 2.0, -0.4], dtype=torch.float64)
X = torch.arange(25.0, dtype=torch.float64).reshape(N, N).cos()
FEW = torch.tensor([2, 0, 2, 1, 4])
SEEN = torch.tensor([True, False, True, True, False])


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def of_rows(loc: Callable[[Tensor], Any], scale: Any = 1.0) -> Callable[[], None]:
    """A latent and an observation in each row."""

    def model() -> None:
        with pyro.plate("rows", N):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            spread = scale(h) if callable(scale) else scale
            pyro.sample("y", dist.Normal(loc(h), spread), obs=Y)

    return model


def of_one(loc: Callable[[Tensor], Any]) -> Callable[[], None]:
    """One latent that all rows read."""

    def model() -> None:
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Normal(loc(h), 1.0), obs=Y)

    return model


def of_vector(loc: Callable[[Tensor], Any]) -> Callable[[], None]:
    """A vector, read by all rows."""

    def model() -> None:
        h = pyro.sample("h", dist.Normal(torch.zeros(N), 1.0).to_event(1))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Normal(loc(h), 1.0), obs=Y)

    return model


def in_part(h: Tensor) -> Tensor:
    loc = torch.zeros(N, 2)
    loc[:, 0] = h
    return loc.sum(-1)


def in_secret(h: Tensor) -> Tensor:
    loc = torch.zeros(N)
    loc.copy_(h.detach())
    return loc


def without_grad(h: Tensor) -> Tensor:
    with torch.no_grad():
        return h + 1


class Mirror(torch.autograd.Function):
    """Pretends to be linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.abs()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def between(how: str) -> Callable[[], None]:
    """Models in which more than a mean is wrong."""

    def model() -> None:
        with pyro.plate("rows", N):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            if how == "mask":
                with poutine.mask(mask=h > -100):
                    pyro.sample("y", dist.Normal(h, 1.0), obs=Y)
            elif how == "mask of a distribution":
                pyro.sample("y", dist.Normal(h, 1.0).mask(h > -100), obs=Y)
            elif how == "obs_mask":
                pyro.sample("y", dist.Normal(h, 1.0), obs=Y, obs_mask=h > -100)
            elif how == "weights":
                with poutine.scale(scale=h.exp()):
                    pyro.sample("y", dist.Normal(h, 1.0), obs=Y)
            elif how == "value":
                pyro.sample("y", dist.Normal(h, 1.0), obs=Y - h)
            elif how == "factor":
                pyro.sample("y", dist.Normal(h, 1.0), obs=Y)
                pyro.factor("f", -(h**2))
            elif how == "Poisson":
                pyro.sample("y", dist.Poisson(h.exp()), obs=Y.abs().round())
            elif how == "Bernoulli":
                pyro.sample("y", dist.Bernoulli(logits=h), obs=(Y > 0).double())
            elif how == "LogNormal":
                pyro.sample("y", dist.LogNormal(h, 1.0), obs=Y.exp())
            elif how == "StudentT":
                pyro.sample("y", dist.StudentT(3.0, h, 1.0), obs=Y)
            elif how == "product":
                u = pyro.sample("u", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(h * u, 1.0), obs=Y)
            elif how == "small product":
                u = pyro.sample("u", dist.Normal(h, 1.0))
                pyro.sample("y", dist.Normal(h + u + 1e-9 * u * h, 1.0), obs=Y)
            elif how == "scale of a latent":
                u = pyro.sample("u", dist.Normal(0.0, h.exp()))
                pyro.sample("y", dist.Normal(u, 1.0), obs=Y)
            elif how == "covariance":
                S = (1 + h.square())[:, None, None] * torch.eye(2)
                both = torch.stack([Y, Y], -1)
                pyro.sample("y", dist.MultivariateNormal(h[:, None].expand(N, 2), S), obs=both)
            elif (h > 1e6).any():
                pyro.sample("y", dist.Normal(h, 1.0), obs=Y)
            else:
                pyro.sample("y", dist.Normal(2 * h, 1.0), obs=Y)

    return model


def around(how: str) -> Callable[[], None]:
    """Latents that are no single Gaussian for each element of their plates."""

    def model() -> None:
        with pyro.plate("rows", N):
            if how == "masked":
                with poutine.mask(mask=SEEN):
                    h = pyro.sample("h", dist.Normal(0.0, 1.0))
            elif how == "weighted":
                with poutine.scale(scale=2.0):
                    h = pyro.sample("h", dist.Normal(0.0, 1.0))
            elif how == "rows":
                rows = dist.MultivariateNormal(torch.zeros(N, 3, 2), torch.eye(2)).to_event(1)
                h = pyro.sample("h", rows)[..., 0, 0]
            else:
                h = pyro.sample("h", dist.Normal(0.0, 1.0))
                rows = dist.MultivariateNormal(h[:, None, None].expand(N, 3, 2), torch.eye(2))
                pyro.sample("x", rows.to_event(1), obs=torch.zeros(N, 3, 2))
            pyro.sample("y", dist.Normal(h, 1.0), obs=Y)

    return model


LINEAR: dict[str, Callable[[], None]] = {
    "views": of_rows(lambda h: (h[None] @ torch.eye(N)).squeeze(0).clone()[...]),
    "index": of_rows(lambda h: h[FEW]),
    "gather": of_rows(lambda h: h.gather(0, FEW)),
    "index_select": of_rows(lambda h: 2 * h.index_select(0, FEW) - 1),
    "flip and roll": of_rows(lambda h: h.flip(0) + h.roll(1)),
    "cumsum": of_rows(lambda h: h.cumsum(0)),
    "mean": of_rows(lambda h: h - h.mean()),
    "where a mask is known": of_rows(lambda h: torch.where(SEEN, h, -h)),
    "masked_fill": of_rows(lambda h: h.masked_fill(SEEN, 3.0)),
    "division": of_rows(lambda h: (h - 1) / (1 + X[0].abs())),
    "copied": of_rows(lambda h: torch.zeros(N).copy_(h)),
    "added": of_rows(lambda h: torch.add(Y, h, alpha=0.3).neg().to(torch.float64)),
    "lerp of constants": of_rows(lambda h: h * torch.lerp(X[0], X[1], 0.3)),
    "a row that reads another": of_rows(lambda h: h[torch.tensor([0, 1, 2, 3, 3])]),
    "a row with more": of_rows(lambda h: h * torch.tensor([1.0, 1.0, 1.0, 1.0, 1 + 1e-9])),
    "a row that adds another": of_rows(lambda h: h + torch.eye(N)[4] * 1e-9 * h[0]),
    "zeros_like": of_rows(lambda h: h + torch.zeros_like(h) + h.new_ones(N)),
    "one": of_one(lambda h: h * X[0] + 1),
    "one, expanded": of_one(lambda h: h.expand(N)),
    "stack": of_one(lambda h: torch.stack([h, 2 * h, -h, 0 * h, h + 1])),
    "matmul": of_vector(lambda h: X @ h),
    "mv": of_vector(lambda h: torch.mv(X, h)),
    "linear": of_vector(lambda h: torch.nn.functional.linear(h, X, Y)),
    "einsum": of_vector(lambda h: torch.einsum("ij,j->i", X, h)),
    "tensordot": of_vector(lambda h: torch.tensordot(X, h, 1)),
    "elementwise": of_vector(lambda h: (X * h).sum(-1)),
    "parts": of_vector(lambda h: torch.cat([h[:2], -h[2:]])),
    "split": of_vector(lambda h: sum(h.unbind()) * X[0]),
    "baddbmm": of_vector(
        lambda h: torch.baddbmm(X[None, :, :1], X[None], h[None, :, None])[0, :, 0]
    ),
    "pad": of_vector(lambda h: torch.nn.functional.pad(h[:3], (1, 1))),
    "tril": of_vector(lambda h: (h * X).tril().sum(-1)),
    "outer": of_vector(lambda h: torch.outer(h, Y).sum(0)),
    "repeat": of_vector(lambda h: h[:1].repeat(N) + h[:2].repeat_interleave(3)[:N]),
    "index_add": of_vector(lambda h: torch.zeros(N).index_add(0, FEW, h)),
    "trace": of_vector(lambda h: torch.trace(h * X) * Y),
}


NONLINEAR: dict[str, tuple[Callable[[], None], str]] = {
    "relu": (of_rows(lambda h: torch.relu(h + 100)), r"not linear in 'h' \(relu\)"),
    "abs": (of_rows(lambda h: (h + 100).abs()), r"not linear in 'h' \(abs\)"),
    "where": (of_rows(lambda h: torch.where(h > -100.0, h, 2 * h)), r"outside autograd \(gt\)"),
    "if": (of_one(lambda h: h if h > -100 else 2 * h), r"outside autograd \(gt\)"),
    "all of it": (of_rows(lambda h: h if (h < 100).all() else 2 * h), r"outside autograd \(lt\)"),
    "equal": (
        of_rows(lambda h: 2 * h if torch.equal(h, Y) else h),
        r"outside autograd \(equal\)",
    ),
    "allclose": (
        of_rows(lambda h: 2 * h if torch.allclose(h, Y) else h),
        r"outside autograd \(allclose\)",
    ),
    "float": (of_rows(lambda h: h + (h > 100).double()), r"outside autograd \(gt\)"),
    "floor": (of_rows(lambda h: h.floor()), r"not linear in 'h' \(floor\)"),
    "round": (of_rows(lambda h: h.round()), r"not linear in 'h' \(round\)"),
    "sign": (of_rows(lambda h: h + h.sign()), r"not linear in 'h' \(sign\)"),
    "detach": (of_rows(lambda h: h.detach()), r"outside autograd \(detach\)"),
    "data": (of_rows(lambda h: h + h.data), "outside autograd"),
    "item": (of_one(lambda h: torch.tensor(h.item()) + Y), r"outside autograd \(item\)"),
    "number": (of_one(lambda h: torch.tensor(float(h)) + Y), r"outside autograd \(float\)"),
    "list": (of_rows(lambda h: torch.tensor(h.tolist())), r"outside autograd \(tolist\)"),
    "text": (of_one(lambda h: Y + float(f"{h:.3f}")), "in a way that autograd does not show"),
    "numpy": (of_rows(lambda h: torch.as_tensor(np.abs(h.detach().numpy()))), "outside autograd"),
    "no_grad": (of_rows(without_grad), r"outside autograd \(add\)"),
    "clamp": (of_rows(lambda h: h.clamp(-50, 50)), r"not linear in 'h' \(clamp\)"),
    "square": (of_rows(lambda h: h * h), "a product of 'h' with itself"),
    "power": (of_rows(lambda h: h**2), r"not linear in 'h' \(pow\)"),
    "exp": (of_rows(lambda h: h.exp()), r"not linear in 'h' \(exp\)"),
    "division": (of_rows(lambda h: 1 / (h + 10)), r"not linear in 'h' \(reciprocal\)"),
    "ratio": (of_rows(lambda h: h / (1 + h)), r"not linear in 'h' \(div\)"),
    "sort": (of_rows(lambda h: h.sort().values), r"outside autograd \(sort\)"),
    "argsort": (of_rows(lambda h: h[h.argsort()]), r"outside autograd \(argsort\)"),
    "max": (of_rows(lambda h: h.max().expand(N)), r"not linear in 'h' \(max\)"),
    "maximum": (of_rows(lambda h: torch.maximum(h, Y - 100)), r"not linear in 'h' \(maximum\)"),
    "mask": (of_rows(lambda h: h[h > -1e9]), r"outside autograd \(gt\)"),
    "remainder": (of_rows(lambda h: h % 100), r"not linear in 'h' \(remainder\)"),
    "long": (of_rows(lambda h: h.long().double()), r"outside autograd \(long\)"),
    "einsum": (of_rows(lambda h: torch.einsum("i,i->i", h, h)), "a product of 'h' with itself"),
    "matrix": (of_vector(lambda h: torch.outer(h, h) @ Y), "a product of 'h' with itself"),
    "softmax": (of_vector(lambda h: h.softmax(0)), r"not linear in 'h' \(softmax\)"),
    "norm": (of_vector(lambda h: h.norm() * Y), "not linear in 'h'"),
    "in place": (of_rows(in_part), r"written into a part of a tensor in place"),
    "in secret": (of_rows(in_secret), r"outside autograd \(detach\)"),
    "a function of its own": (of_rows(Mirror.apply), "outside autograd|not linear"),
    "scale": (of_rows(lambda h: h, lambda h: h.exp()), "its scale depends on 'h'"),
    "hidden scale": (of_rows(lambda h: h, lambda h: h.detach().exp()), r"autograd \(detach\)"),
    "mask of the site": (between("mask"), r"outside autograd \(gt\)"),
    "mask of a distribution": (between("mask of a distribution"), r"outside autograd \(gt\)"),
    "obs_mask": (between("obs_mask"), r"outside autograd \(gt\)"),
    "weights": (between("weights"), "its value, mask or scale depends on 'h'"),
    "value": (between("value"), "its value, mask or scale depends on 'h'"),
    "factor": (between("factor"), "site 'f'"),
    "Poisson": (between("Poisson"), "Poisson of Gaussian 'h' has no exact posterior"),
    "Bernoulli": (between("Bernoulli"), "Bernoulli of Gaussian 'h' has no exact posterior"),
    "LogNormal": (between("LogNormal"), r"only its logarithm is Normal(.*\n)*.*obs=y\.log"),
    "StudentT": (between("StudentT"), "StudentT of Gaussian 'h' has no exact posterior"),
    "product": (between("product"), "a product of latents 'h' and 'u'"),
    "small product": (between("small product"), "a product of latents 'h' and 'u'"),
    "scale of a latent": (between("scale of a latent"), "its scale depends on 'h'"),
    "covariance": (between("covariance"), "its covariance_matrix depends on 'h'"),
    "masked latent": (around("masked"), r"a mask covers it(.*\n)*.*around its observations alone"),
    "weighted latent": (around("weighted"), "poutine.scale weighs it"),
    "latent rows": (around("rows"), "site 'h': it is a MultivariateNormal under to_event"),
    "rows": (around("data"), "site 'x': it is a MultivariateNormal under to_event"),
    "other sites": (between("other sites"), r"outside autograd \(gt\)"),
}


@pytest.mark.parametrize("how", list(LINEAR))
def test_what_is_linear_has_the_evidence_of_its_dense_joint(how: str) -> None:
    model = LINEAR[how]

    def log_joint(h: dict[str, Tensor]) -> Tensor:
        return poutine.trace(poutine.condition(model, data=h)).get_trace().log_prob_sum()

    h = poutine.trace(model).get_trace().nodes["h"]["value"]
    joint = dense_joint({"h": h.shape}, log_joint)
    em = ExactPosteriorEM(model)
    assert [r.route for r in em.plan().routes] == ["Gaussian"]
    found = em.posterior().log_evidence
    assert found == pytest.approx(joint.log_evidence, rel=1e-11)
    assert math.isfinite(found)


@pytest.mark.parametrize("how", list(NONLINEAR))
def test_what_is_not_linear_is_refused_with_the_reason(how: str) -> None:
    model, reason = NONLINEAR[how]
    with pytest.raises(ModelError, match=reason) as refused:
        ExactPosteriorEM(model).posterior()
    of_h = next(p for p in refused.value.problems if "'h'" in p.where)
    assert not any("integrate it out" in fix or "its posterior" in fix for fix in of_h.fixes)


def test_what_helps_one_step_of_a_chain_is_said_once_for_all() -> None:
    def model() -> None:
        h = torch.zeros(())
        for t in range(3):
            h = pyro.sample(f"h_{t}", dist.Normal(h, 1.0))
            pyro.sample(f"y_{t}", dist.LogNormal(h, 1.0), obs=Y[t].exp())

    with pytest.raises(ModelError) as refused:
        ExactPosteriorEM(model).posterior()
    assert "(and 2 more alike, up to site 'h_2')" in str(refused.value)
    assert str(refused.value).count("Why:") == 1


@pytest.mark.parametrize("what", ["loc", "scale"])
def test_the_one_step_of_a_loop_that_hides_a_latent_is_named(what: str) -> None:
    def model() -> None:
        h = torch.zeros(())
        for t in range(6):
            h = pyro.sample(f"h_{t}", dist.Normal(h, 1.0))
            secret = 0.1 * float(f"{h:.3f}") if t == 3 else 0.0
            loc, scale = (h + secret, 1.0) if what == "loc" else (h, 1.0 + abs(secret))
            pyro.sample(f"y_{t}", dist.Normal(loc, scale), obs=Y[t % N])

    with pytest.raises(ModelError, match=r"site 'y_3'(.*\n)*.*that autograd does not show"):
        ExactPosteriorEM(model).posterior()
