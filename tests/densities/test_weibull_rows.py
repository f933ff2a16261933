"""Weibull distributions on sums about the shapes of the E-step: the joint table, numpy, far starts."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import Chunks, DegenerateError, ExactPosteriorEM, Gradient, PyroEMError
from pyro_em.densities import compiled
from pyro_em.fitting.steps.guarded import Guarded
from pyro_em.posteriors.chains.chain import Chain
from pyro_em.posteriors.mixtures.mixture import Mixture
from pyro_em.testing import check_block
from pyro_em.updates.update import NewtonOnSums
from tests.benchmarks.exponential import weibull_steps

W = torch.tensor([0.4, 0.6], dtype=torch.float64)
SCALE, SHAPE = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 4.0], [0.8, 3.0]))


def positive(name: str, value: Tensor) -> Tensor:
    return pyro.param(name, value.clone(), constraint=C.positive)


def rows(x: Tensor, seen: Tensor) -> None:
    """Two numbers per row, some masked, with one shape for both; a third of a known shape."""
    w = pyro.param("w", W.clone(), constraint=C.simplex)
    scale, k = positive("l", torch.stack([SCALE, 2 * SCALE], -1)), positive("k", SHAPE)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        both = dist.Weibull(scale[z], k[z].unsqueeze(-1))
        pyro.sample("x", both.mask(seen).to_event(1), obs=x)
        pyro.sample("y", dist.Weibull(scale[z, 0], 2.0), obs=x[:, 0])


def chain(x: Tensor, seen: Tensor) -> None:
    w = pyro.param("w", W.clone(), constraint=C.simplex)
    P = pyro.param("P", torch.stack([W, W.flip(0)]), constraint=C.simplex)
    scale, k = positive("l", SCALE), positive("k", SHAPE)
    z = None
    for i in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{i}", dist.Categorical(w if z is None else P[z]))
        pyro.sample(f"x_{i}", dist.Weibull(scale[z], k[z]).mask(seen[i]), obs=x[i])


def mixture(x: Tensor, shape: Tensor = SHAPE) -> None:
    w = pyro.param("w", W.clone(), constraint=C.simplex)
    scale, k = positive("l", SCALE), positive("k", shape)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Weibull(scale[z], k[z]), obs=x)


def data(n: int) -> Tensor:
    torch.manual_seed(3)
    return dist.Weibull(SCALE, 2 * SHAPE).sample((n,)).reshape(-1)


def test_blocks() -> None:
    quantile = (-torch.tensor([0.1, 0.5, 0.9]).double().log()).unsqueeze(-1)
    x = torch.stack([s * quantile ** (1 / k) for s, k in zip(SCALE, SHAPE, strict=True)])
    x = x.reshape(6, 1) * torch.tensor([1.0, 2.0]).double()
    seen = torch.tensor([[1, 1], [0, 1], [1, 1], [1, 0], [1, 1], [1, 1]]) > 0
    check_block(Mixture, rows, x, seen, states=1)
    check_block(Chain, chain, x[:4, 0], seen.any(-1)[:4], states=1)


@pytest.mark.parametrize("shape", [SHAPE, SHAPE**4 / 2], ids=["near", "far"])
def test_against_numpy(shape: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """On sums, where the shape moves so far that they are taken anew, in chunks, in a compiled loop."""
    x = data(40)
    start = {"w": W.numpy(), "l": SCALE.numpy(), "k": shape.numpy()}
    evidence, values = weibull_steps(x.numpy(), start, 5)
    assert min(np.diff(evidence)) > 0
    sound: list[int] = []
    step = Guarded._sound_step

    def noted(self: Guarded, at: object, index: int, *args: object) -> object:
        sound.append(index)
        return step(self, at, index, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Guarded, "_sound_step", noted)
    plain = compiled._FEW
    ways = ((plain, x), (0, x)) if shape is SHAPE else ((plain, x), (plain, Chunks(x, rows=30)))
    for few, given in ways:
        monkeypatch.setattr(compiled, "_FEW", few)
        pyro.clear_param_store()
        em = ExactPosteriorEM(lambda x: mixture(x, shape))
        result = em.fit(given, max_steps=5, tol=0)
        assert result.plan.kernel == "mixture"
        assert list(result.history) == pytest.approx(evidence, rel=1e-11)
        for name, value in values.items():
            assert result.params[name].tolist() == pytest.approx(value.tolist(), rel=1e-8)
    # The first steps from afar go through the data as often as it takes, the others do not.
    assert set(sound) <= {0, 1, 2} and (0 in sound) == (shape is not SHAPE)


def tied_shape(x: Tensor) -> None:
    w = pyro.param("w", W.clone(), constraint=C.simplex)
    mean, k = positive("m", SCALE), positive("k", torch.tensor(0.2).double())
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Weibull(mean[z] / torch.lgamma(1 + 1 / k).exp(), k), obs=x)


def test_a_tied_shape_and_means_climb_no_more() -> None:
    x, found = data(20), []
    for updates in ({}, {"[mk]": Gradient()}):
        pyro.clear_param_store()
        em = ExactPosteriorEM(tied_shape, updates=updates)
        assert (em.plan(x).kernel == "mixture") == (not updates)
        found.append(list(em.fit(x, max_steps=3, tol=0).history))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_without_a_latent_and_without_a_maximum() -> None:
    def model(x: Tensor) -> None:
        scale, k = positive("l", SCALE[0]), positive("k", torch.tensor(9.0).double())
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Weibull(scale, k), obs=x)

    x = data(30)
    em = ExactPosteriorEM(model)
    assert isinstance(em.plan(x).updates["k"].update, NewtonOnSums)
    result = em.fit(x, max_steps=2, tol=0)
    k = float(result.params["k"])
    y = x.log().numpy()
    power = np.exp(k * y)
    assert 1 / k + y.mean() == pytest.approx((power @ y) / power.sum(), rel=1e-10)
    assert float(result.params["l"]) == pytest.approx(power.mean() ** (1 / k), rel=1e-10)
    with pytest.raises(
        (DegenerateError, PyroEMError), match="its spread collapses: concentration would become"
    ):
        em.step(torch.full((9,), 2.0).double())


def test_sums_of_batches_do_not_add() -> None:
    """Sums about one shape say nothing of another: steps after each batch are refused, or have rows."""
    x = data(40)[torch.randperm(80, generator=torch.Generator().manual_seed(0))]
    with pytest.raises(PyroEMError, match="Weibull"):
        ExactPosteriorEM(mixture).fit(Chunks(x, rows=20), online="incremental", num_epochs=2)
