"""A draw of guide and model by one handler, against Pyro's own handlers and Pyro's own bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_em import ExactPosteriorEM
from pyro_em.tracing.capture import ParameterRecord
from pyro_em.tracing.draws import drawn_run
from pyro_em.tracing.handlers import OfBatch
from pyro_em.variational.bound import Variational
from pyro_em.variational.trainer import Trainer

Case = tuple[Callable[..., Any], Callable[..., Any]]
X = (torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.4).double()


def image(rows: str) -> Case:
    """A network of images; ``rows`` says what is special about its sites."""
    torch.manual_seed(1)
    encoder, decoder = nn.Linear(5, 4), nn.Linear(2, 5)
    sub = {"subsample_size": 3} if rows == "drawn rows" else {}
    scale = 0.3 if rows == "weights" else 1.0

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        spread = pyro.param("spread", torch.tensor(1.5), constraint=constraints.positive)
        with pyro.plate("data", len(x), **sub) as i, poutine.scale(scale=scale):
            x = x[i] if sub else x
            h = pyro.sample("h", dist.Normal(torch.zeros(2), spread).to_event(1))
            pyro.deterministic("twice", 2 * h)
            pyro.factor("pull", -0.1 * h.square().sum(-1))
            image = dist.Bernoulli(logits=decoder(h)).to_event(1)
            if rows == "masks":
                image = dist.Bernoulli(logits=decoder(h)).mask(x.cumsum(-1) < 2).to_event(1)
                with poutine.mask(mask=x.sum(-1) > 1):
                    pyro.sample("seen", dist.Normal(h.sum(-1), 1.0), obs=x[:, 0])
            pyro.sample("x", image, obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), **sub) as i, poutine.scale(scale=scale):
            out = encoder(x[i] if sub else x)
            if rows == "auxiliary draws":
                out = out + pyro.sample(
                    "u", dist.Normal(torch.zeros(4), 1.0).to_event(1), infer={"is_auxiliary": True}
                )
            pyro.sample("h", dist.Normal(out[:, :2], out[:, 2:].exp()).to_event(1))

    return model, guide


KINDS = ["plain", "drawn rows", "weights", "masks", "auxiliary draws"]


def variational(model: Any, guide: Any, x: Tensor) -> Variational:
    pyro.clear_param_store()
    em = ExactPosteriorEM(model, guide, strategy="guide")
    em.step(x)
    trainer = em._session.trainer
    assert isinstance(trainer, Trainer)
    return trainer.variational


@pytest.mark.parametrize("kind", KINDS)
def test_one_handler_draws_as_four(kind: str) -> None:
    """Sites, values, scales and masks, in the same order and from the same random state."""
    v = variational(*image(kind), X)
    factors = {"data": 2.5}
    torch.manual_seed(5)
    one = v.pair.drawn((X,), {}, factors)
    torch.manual_seed(5)
    with OfBatch(factors):
        four = drawn_run(v.pair, (X,), {}).sites
    assert list(one) == list(four)
    for name, site in one.items():
        theirs = four[name]
        assert torch.equal(site["value"], theirs["value"])
        for key in ("scale", "mask", "is_observed", "infer"):
            mine, other = site[key], theirs[key]
            same = torch.equal(mine, other) if isinstance(mine, Tensor) else mine == other
            assert same, (name, key)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_minus_the_sum_of_the_terms_and_pyros(kind: str) -> None:
    """Added up at once, term by term, and by Pyro from the same draw, with the same gradients."""
    model, guide = image(kind)
    v = variational(model, guide, X)
    leaves = [p.unconstrained for p in v.parameters.values()]

    def gradients(loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        return [torch.zeros(()) if g is None else g for g in found]

    losses = []
    for at_once in (True, False):
        torch.manual_seed(7)
        particle = v.particle((X,), {})
        assert particle.cost is not None
        terms = torch.stack([t.value.sum() for t in particle.terms])
        torch.manual_seed(7)
        losses.append(v.loss((X,), {}) if at_once else -terms.sum())
    if kind != "auxiliary draws":  # Pyro counts their densities
        torch.manual_seed(7)
        losses.append(TraceMeanField_ELBO().differentiable_loss(model, guide, X))
    for other in losses[1:]:
        torch.testing.assert_close(losses[0], other, rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(gradients(losses[0]), gradients(other), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_duplicate_site_is_still_refused() -> None:
    model, guide = image("plain")
    v = variational(model, guide, X)

    def twice(x: Tensor) -> None:
        guide(x)
        guide(x)

    object.__setattr__(v.pair, "guide", twice)
    with pytest.raises(RuntimeError, match="Multiple sample sites"):
        v.loss((X,), {})


def test_parameters_come_from_the_store_and_from_handlers_outside() -> None:
    """One without a constraint is the store's own tensor, unless somebody waits for the message."""
    pyro.clear_param_store()

    def model() -> tuple[Tensor, Tensor]:
        free = pyro.param("free", torch.ones(2))
        return free, pyro.param("positive", torch.ones(2), constraint=constraints.positive)

    for _ in range(2):
        with ParameterRecord() as record:
            free, positive = model()
        store = pyro.get_param_store()
        assert free is store._params["free"] is record.found["free"]
        assert record.found["positive"] is store._params["positive"]
        assert torch.equal(positive, torch.ones(2)) and positive.requires_grad
    seen = []

    class Sees(Messenger):
        def _pyro_param(self, msg: Any) -> None:
            seen.append(msg["value"])

    with Sees(), poutine.trace() as outside, ParameterRecord():
        model()
    assert outside.trace.nodes["free"]["value"] is free and seen == [None, None]
    with poutine.substitute(data={"free": torch.zeros(2)}), ParameterRecord():
        assert torch.equal(model()[0], torch.zeros(2))
    pyro.clear_param_store()
    with ParameterRecord() as record:
        assert model()[0] is pyro.get_param_store()._params["free"] is record.found["free"]
