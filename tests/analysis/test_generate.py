"""``em.generate`` against closed forms: new data, and which arguments it takes the size of."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_em import ExactPosteriorEM, UsageError, vectorized_markov


def mixture(x: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor([0.0, 10.0]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.25, 0.75])))
        pyro.sample("x", dist.Normal(mu[z], 2.0), obs=x)


def regression(x: Tensor, u: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(3 * u, 0.1), obs=x)


def autoregression(y: Tensor) -> None:
    for t in pyro.markov(range(1, len(y))):
        pyro.sample(f"y_{t}", dist.Normal(0.5 * y[t - 1], 1.0), obs=y[t])


def chains(x: Tensor, lengths: Tensor | None = None) -> None:
    """As many sequences as steps: which dimension is which shows in a run alone."""
    A, z = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), 0
    with pyro.plate("sequences", len(x)):
        for t in vectorized_markov("time", x.shape[1]):
            with poutine.mask(mask=True if lengths is None else t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
                pyro.sample(f"x_{t}", dist.Normal(9.0 * z, 1.0), obs=x[:, t])


def test_mixture() -> None:
    """Moments of the mixture; a row's observation belongs to its component; nothing else changes."""
    pyro.clear_param_store()
    em, x, before = ExactPosteriorEM(mixture), torch.tensor([1.0, 2.0]), torch.get_rng_state()
    pyro.param("mu", torch.tensor([0.0, 20.0]))  # fitted values count, not those in the model
    new = em.generate(4000, x, seed=3)
    assert x.tolist() == [1.0, 2.0] and torch.get_rng_state().equal(before)
    assert list(pyro.get_param_store().keys()) == ["mu"]
    own = new["x"] - torch.tensor([0.0, 20.0])[new["z"]]
    assert abs(float(new["z"].double().mean()) - 0.75) < 5 * (0.1875 / 4000) ** 0.5
    assert abs(float(own.mean())) < 5 * 2 / 4000**0.5
    assert abs(float(own.var()) - 4) < 5 * 4 * (2 / 4000) ** 0.5
    assert em.generate(4000, x.numpy(), seed=3)["x"].equal(new["x"])


def test_autoregression() -> None:
    """Each step reads what was drawn before it, the first one what the data begin with."""
    y = torch.zeros(5)
    y[0] = 1e6
    new = ExactPosteriorEM(autoregression).generate(200, y, seed=0)["y_*"].double()
    steps = torch.cat([y[:1].double(), new])
    noise = steps[1:] - 0.5 * steps[:-1]
    assert noise[:30].abs().max() < 5  # from a million down
    assert (
        abs(float(noise.mean())) < 5 / 200**0.5
        and abs(float(noise.var()) - 1) < 5 * (2 / 200) ** 0.5
    )
    assert abs(float(noise[1:] @ noise[:-1]) / 200) < 5 / 200**0.5


def test_asked_for() -> None:
    """What the model reads of each row is asked for by name; with it, data of another size serve."""
    em, x, u = ExactPosteriorEM(regression), torch.zeros(5), torch.arange(5.0)
    with pytest.raises(
        UsageError, match="'u' has a value for each of the 5 elements of plate 'rows'"
    ):
        em.generate(7, x, u)
    assert (em.generate(5, x, u, seed=0)["x"] - 3 * u).abs().max() < 1
    assert (
        em.generate(7, x, u=torch.arange(7.0), seed=0)["x"] - 3 * torch.arange(7)
    ).abs().max() < 1
    lengths = torch.tensor([1, 2, 3])
    with pytest.raises(UsageError, match="'lengths' has a value"):
        ExactPosteriorEM(chains).generate(4, torch.zeros(3, 3), lengths)
    new = ExactPosteriorEM(chains).generate(4, torch.zeros(3, 3), torch.ones(4))
    assert new["x_*"].shape == (3, 4)


def test_sizes() -> None:
    """Sequences, not steps; containers; numbers of rows; nothing observed; obs_mask and NaN."""
    new = ExactPosteriorEM(chains).generate(40, torch.zeros(3, 3), seed=0)
    assert new["x_*"].shape == (3, 40) and new["z_*"].float().var() > 0
    assert ((new["x_*"] > 4.5) == (new["z_*"] == 1)).all()

    def sized(data: dict[str, Tensor | None], rows: int = 10, mask: Tensor | None = None) -> None:
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data["x"], obs_mask=mask)

    em = ExactPosteriorEM(sized)
    assert em.generate(6, {"x": None})["x"].shape == (6,)
    gone = torch.full((4,), torch.nan)
    assert not em.generate(6, {"x": gone}, 4, mask=torch.zeros(4).bool())["x"].isnan().any()
    marked = ExactPosteriorEM(mixture, missing="nan")
    assert not marked.generate(3, gone)["x"].isnan().any()


def test_point_estimates_and_guides() -> None:
    """A latent outside the plate stays at its point estimate; a drawn one has its prior."""

    def centred(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 100.0))
        with pyro.plate("rows", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 3.0))
            pyro.sample("x", dist.Normal(m + h.exp(), 0.1), obs=x)

    pyro.clear_param_store()
    data = torch.full((5,), 50.0)
    em = ExactPosteriorEM(centred, "map", strategy={"m": "guide"})
    fitted = em.fit(data, max_steps=1).params
    new = em.generate(2000, data, seed=0)
    assert new["m"].equal(fitted["m"])
    assert (new["x"] - new["m"] - new["h"].exp()).abs().max() < 1
    assert abs(float(new["h"].var()) / 9 - 1) < 5 * (2 / 2000) ** 0.5
    drawn = ExactPosteriorEM(centred, AutoNormal, strategy="guide").generate(2000, data, seed=0)
    assert abs(float(drawn["h"].var()) / 9 - 1) < 5 * (2 / 2000) ** 0.5


def reads_at_once(y: Tensor) -> None:
    with pyro.plate("steps", len(y) - 1):
        pyro.sample("y", dist.Normal(y[:-1], 1.0), obs=y[1:])


def reads_its_mean(x: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(x.mean(), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def of_arrays(x: np.ndarray) -> None:
    mixture(torch.as_tensor(x))


def of_its_own() -> None:
    with pyro.plate("rows", 4):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(4))


@pytest.mark.parametrize(
    ("model", "args", "words"),
    [
        (reads_at_once, (torch.zeros(6),), "another density at the new data"),
        (reads_its_mean, (torch.zeros(6),), "site 'm' has another density"),
        (of_its_own, (), "no argument has a value for each of the 4 elements of plate 'rows'"),
        (of_arrays, (torch.zeros(4).numpy(),), "'x': an array of numpy"),
        (mixture, (), "missing a required argument: 'x'"),
    ],
)
def test_refused(model: Callable[..., None], args: tuple, words: str) -> None:
    """What cannot be drawn in order, or has no size that an argument gives, is refused in words."""
    with pytest.raises(UsageError, match=words):
        ExactPosteriorEM(model).generate(5, *args)


def test_factors() -> None:
    """A factor that weighs latents or data is no distribution; a penalty on parameters is no matter."""

    def weighted(x: Tensor, by: Tensor | None = None) -> None:
        m = pyro.param("m", torch.tensor([0.0, 3.0]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            pyro.factor(
                "tilt", torch.tensor([0.0, -3.0])[z] if by is None else -by * m.square().sum()
            )
            pyro.sample("x", dist.Normal(m[z], 1.0), obs=x)

    def penalised(y: Tensor) -> None:
        b = pyro.param("b", torch.tensor(0.5))
        pyro.factor("penalty", -b.square())
        for t in pyro.markov(range(1, len(y))):
            pyro.sample(f"y_{t}", dist.Normal(b * y[t - 1], 1.0), obs=y[t])

    def by_hand(x: Tensor) -> None:
        m = pyro.param("m", torch.tensor(0.0))
        with pyro.plate("rows", len(x)):
            pyro.factor("x", -0.5 * (x - m) ** 2)

    pyro.clear_param_store()
    with pytest.raises(UsageError, match="factor 'tilt' reads the latent 'z'"):
        ExactPosteriorEM(weighted).generate(4, torch.zeros(4))
    assert "x" in ExactPosteriorEM(weighted).generate(4, torch.zeros(4), torch.tensor(0.1))
    assert len(ExactPosteriorEM(penalised).generate(4, torch.zeros(5))) == 4
    pyro.clear_param_store()
    found = ExactPosteriorEM(by_hand).fit(torch.arange(3.0), progress=False)
    with pytest.raises(UsageError, match="factor 'x' reads 'x'"):
        found.bootstrap(2)
