"""``pyro_em.select`` against least squares in closed form; ratios; what users get wrong."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, Selection, UsageError, select, vectorized_markov
from pyro_em.tracing.randomness import seeds_from

U = torch.linspace(-1, 1, 24).double()
Y = 1 - 2 * U**2 + 0.3 * torch.randn(24, generator=torch.Generator().manual_seed(2)).double()


@pytest.fixture(autouse=True)
def _empty_store() -> Iterator[None]:
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def polynomial(degree: int) -> Callable[..., None]:
    if degree == 9:
        raise RuntimeError("too high")

    def model(y: Tensor, u: Tensor) -> None:
        b = pyro.param("b", torch.zeros(degree + 1).double())
        s = pyro.param("s", torch.ones(()).double(), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            mean = (u[:, None] ** torch.arange(degree + 1)) @ b
            pyro.sample("y", dist.Normal(mean, s), obs=y)

    return model


def least_squares(degree: int, kept: Tensor, asked: Tensor) -> float:
    """The log density of some rows under the fit to others."""
    X = U[:, None] ** torch.arange(degree + 1)
    b = torch.linalg.lstsq(X[kept], Y[kept]).solution
    s = (Y[kept] - X[kept] @ b).square().mean().sqrt()
    return float(dist.Normal(X[asked] @ b, s).log_prob(Y[asked]).sum())


@pytest.fixture(scope="module")
def selected() -> Selection:
    random = torch.get_rng_state()
    pyro.clear_param_store()
    mu = pyro.param("b", torch.zeros(7))
    found = select(
        polynomial,
        Y.numpy(),
        U,
        degree=[1, 2, 9],
        folds=3,
        num_restarts=1,
        tol=1e-10,
        seed=5,
        progress=False,
    )
    assert pyro.param("b") is mu and list(pyro.get_param_store()) == ["b"]
    assert torch.get_rng_state().equal(random)
    return found


def test_table(selected: Selection) -> None:
    """Evidence, criteria and held-out evidence are those of least squares; the best is the best."""
    every = torch.arange(24)
    folds = torch.randperm(24, generator=torch.Generator().manual_seed(5)).tensor_split(3)
    for row in selected.rows[:2]:
        (degree,) = row.key
        evidence = least_squares(degree, every, every)
        assert row.log_evidence == pytest.approx(evidence, abs=1e-6)
        assert row.bic == pytest.approx(-2 * evidence + (degree + 2) * math.log(24), abs=1e-6)
        held = sum(least_squares(degree, every[~torch.isin(every, f)], f) for f in folds)
        assert row.held_out == pytest.approx(held, abs=1e-6)
    assert selected.best_row.key == (2,) and selected.criterion == "held_out"
    assert selected.rows[2].status == "failed" and "degree=9: RuntimeError: too high" in str(
        selected
    )
    assert list(selected.table.loc[2].index[:2]) == ["log_evidence", "num_free_parameters"]
    assert "RuntimeError" in selected._repr_html_()
    assert selected.by("aic").best_row.key == (2,)


def test_the_best_is_at_hand(selected: Selection) -> None:
    """Its result, its model at the fitted parameters, its posterior; a copy keeps the numbers."""
    assert selected.best_em.score(Y, U) == pytest.approx(selected.best.log_evidence, abs=1e-9)
    assert selected.best.params["b"].equal(pyro.param("b"))
    assert selected[1].posterior.log_evidence == pytest.approx(selected.rows[0].log_evidence)
    assert selected.best.bootstrap(2).draws["b"].shape == (2, 3)
    copied = pickle.loads(pickle.dumps(selected))
    assert copied.rows == selected.rows and copied.best.params["b"].equal(pyro.param("b"))
    with pytest.raises(UsageError, match="degree=9 has no fit"):
        selected[9]
    with pytest.raises(UsageError, match="degree=4 is no candidate; these are: 1, 2, 9"):
        selected.em(4)


def test_ratio(selected: Selection) -> None:
    """Each draw is n log(RSS_1 / RSS_2) of data from the smaller model; the same bits in processes."""
    found = selected.bootstrap_ratio(1, n=4, num_restarts=1, seed=1)
    beside = selected.bootstrap_ratio(1, n=4, num_restarts=1, seed=1, processes=2)
    assert found.draws.equal(beside.draws)

    def ratio(y: Tensor) -> float:
        rss = []
        for degree in (1, 2):
            X = U[:, None] ** torch.arange(degree + 1)
            rss.append((y - X @ torch.linalg.lstsq(X, y).solution).square().sum())
        return float(24 * (rss[0] / rss[1]).log())

    assert found.ratio == pytest.approx(ratio(Y), abs=1e-5)
    again = selected[1]._bootstrap.args[0]  # type: ignore[union-attr]
    with again.at(selected[1].params, "") as fitted:
        for draw, seed in zip(found.draws, seeds_from(1), strict=False):
            (y, _), _ = fitted.parametric(seed, "")
            assert float(draw) == pytest.approx(ratio(y), abs=1e-5)
    assert found.p_value == (1 + int((found.draws >= found.ratio).sum())) / 5


def mixture(K: int, spread: str = "own") -> Any:
    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.ones(K).double() / K, constraint=constraints.simplex)
        mu = pyro.param("mu", torch.linspace(-1, 1, K).double())
        s = pyro.param("s", torch.ones(K).double(), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(mu[z], s[z]), obs=x)

    return ExactPosteriorEM(model)


def test_entropy_and_collapse() -> None:
    """ICL has the entropy of responsibilities; an unbounded evidence is never the best."""
    x = torch.cat(
        [torch.full((3,), -9.0), torch.linspace(0, 2, 7), torch.linspace(1, 4, 8)]
    ).double()
    found = select(mixture, x[3:], K=[1, 2], num_restarts=1, progress=False)
    p, row = found[2].params, found.rows[1]
    joint = p["w"].log() + dist.Normal(p["mu"], p["s"]).log_prob(x[3:, None])
    r = (joint - joint.logsumexp(-1, keepdim=True)).exp()
    assert row.icl == pytest.approx(row.bic - 2 * float((r * r.log()).sum()), abs=1e-6)
    broken = select(mixture, x, K=[1, 2], num_restarts=1, progress=False)
    assert broken.rows[1].bic is not None and broken.rows[1].bic < (broken.rows[0].bic or 0)
    assert broken.best_row.key == (1,) and "variance collapses" in broken.rows[1].note


def test_ratio_of_several_keywords() -> None:
    """A number of components alone is that of the best candidate's row; models in order."""
    found = select(
        mixture, Y, K=[1, 2], spread=["own", "b"], num_restarts=1, max_steps=3, progress=False
    )
    ratio = found.bootstrap_ratio(1, n=2, num_restarts=1, progress=False)
    assert (ratio.smaller, ratio.larger) == ("K=1, spread=own", "K=2, spread=own")
    assert "spread=own: as in the best candidate by bic" in str(ratio)
    with pytest.raises(UsageError, match=r"name one by the values of 'K', 'spread': \(1, 'own'\)"):
        found.bootstrap_ratio(7)
    with pytest.raises(UsageError, match="has 2 free parameters, and K=2, spread=b has 5"):
        found.bootstrap_ratio((2, "b"), 1)


def series(K: int) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        z, mu = 0, pyro.param("mu", torch.linspace(0, 3, K))
        for t in vectorized_markov("time", len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical((torch.eye(K) + 1)[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])

    return model


@pytest.mark.parametrize(
    ("build", "keywords", "words"),
    [
        (mixture, {"k": [1, 2]}, "build has no keyword 'k'; did you mean 'K'?"),
        (mixture, {"K": 2}, "no keyword has several values"),
        (mixture, {"spread": ["own", "tied"]}, "build also takes 'K', which has no value"),
        (lambda K: None, {"K": [1, 2]}, "build(K=1) returned nothing"),
        (ExactPosteriorEM(series(2)), {"K": [1, 2]}, "not a function that makes models"),
        (series, {"K": [1, 2], "folds": 3}, "the data are one series of 24 steps"),
        (
            mixture,
            {"K": [1, 2], "folds": 30},
            "folds=30, and the data have 24 rows in plate 'rows'",
        ),
        (mixture, {"K": [1, 2], "criterion": "BIC"}, "criterion='BIC' is no criterion"),
        (mixture, {"K": [1, 2], "fit": {"seed": 1}}, "cannot be passed on to em.fit"),
        (mixture, {"K": [1, 2], "max_steps": 0.5}, "max_steps=0.5 is no number"),
    ],
)
def test_mistakes(build: Any, keywords: dict[str, Any], words: str) -> None:
    """Each is answered before anything is fitted, in a sentence that names it."""
    with pytest.raises(UsageError) as caught:
        select(build, Y, progress=False, **keywords)
    assert words in str(caught.value)


def test_models_whose_latents_are_integrated_have_few_starts() -> None:
    def build(shared: bool) -> Any:
        def model(x: Tensor) -> None:
            s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
            with pyro.plate("rows", len(x)):
                b = pyro.sample("b", dist.Normal(0.0, s if shared else 1.0))
                pyro.sample("x", dist.Normal(b, s), obs=x)

        return model

    found = select(build, torch.randn(12), shared=[True, False], max_steps=2, progress=False)
    assert [row.ends.split(" ")[0] for row in found.rows] == ["2", "2"]


def test_a_mixture_of_one_component_is_fitted_once() -> None:
    x = torch.tensor([-2.1, -1.9, -2.3, -1.6, 1.7, 2.2, 2.1, 1.9])

    def build(K: int) -> Any:
        def model(x: Tensor) -> None:
            mu = pyro.param("mu", x[:K].clone())
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Categorical(torch.ones(K) / K))
                pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

        return model

    found = select(build, x, K=[1, 2], num_restarts=2, progress=False)
    assert [len(found[K].starts) for K in (1, 2)] == [1, 2]
    ratio = found.bootstrap_ratio(1, n=2, progress=False)
    assert ratio.ratio == pytest.approx(2 * (found[2].log_evidence - found[1].log_evidence))
