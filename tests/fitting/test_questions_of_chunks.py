"""Questions to chunks against the same questions to all rows at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions import constraints

from pyro_em import Chunks, DataError, ExactPosteriorEM, Hard, UsageError, compare

N = 11
_generator = torch.Generator().manual_seed(3)
X = torch.randn(N, 2, generator=_generator) + 2.0 * (torch.arange(N) % 2).unsqueeze(-1)


def mixture(x: Tensor, spread: float = 1.0) -> None:
    w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    m = pyro.param("m", torch.tensor([[-1.0, 0.0], [1.0, 2.0]]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(m[z], spread).to_event(1), obs=x)


def with_data_outside(x: Tensor) -> None:
    m = pyro.param("m", torch.tensor([[-1.0, 0.0], [1.0, 2.0]]))
    pyro.sample("o", dist.Normal(m[0, 0], 1.0), obs=torch.tensor(-5.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5)).long()
        pyro.sample("x", dist.Normal(m[z], 1.0).to_event(1), obs=x)


def with_prior(x: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5)).long()
        pyro.sample("x", dist.Normal(m[z].unsqueeze(-1) * torch.ones(2), 1.0).to_event(1), obs=x)


def factors(x: Tensor) -> None:
    loadings = pyro.param("l", torch.tensor([1.0, 0.5]))
    with pyro.plate("rows", len(x)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(h.unsqueeze(-1) * loadings, 1.0).to_event(1), obs=x)


MODELS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "mixture": (mixture, {}),
    "hard": (mixture, {"strategy": Hard()}),
    "data outside": (with_data_outside, {}),
    "prior": (with_prior, {"guide": "map"}),
    "factors": (factors, {}),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_number_of_all_rows_is_one_number(case: str) -> None:
    model, given = MODELS[case]
    em = ExactPosteriorEM(model, **given)
    whole, loss = em.elbo(X), em.evaluate_loss(X)
    evidence = em.score(X)
    for rows in (4, 20):
        chunks = Chunks(X, rows=rows)
        if case == "hard":
            with pytest.raises(UsageError, match="only exact E-steps add up"):
                em.elbo(chunks)
            continue
        assert em.score(chunks) == pytest.approx(evidence, rel=1e-12)
        assert em.evaluate_loss(chunks) == pytest.approx(loss, rel=1e-12)
        found = em.elbo(chunks)
        for name, value in vars(whole).items():
            if name != "pointwise":
                assert getattr(found, name) == pytest.approx(value, rel=1e-12, abs=1e-9), name
        assert found.pointwise is None and float(found) == found.value


def test_other_values_of_parameters() -> None:
    em = ExactPosteriorEM(mixture)
    params = {"m": torch.tensor([[0.0, 0.0], [1.0, 1.0]])}
    there = float(em.elbo(Chunks(X, rows=4), params=params))
    assert there == pytest.approx(float(em.elbo(X, params=params)), rel=1e-12)
    assert there != pytest.approx(float(em.elbo(Chunks(X, rows=4))))
    # Arguments beside the chunks, by place and by name.
    for ask in (em.score, em.evaluate_loss):
        expected = pytest.approx(ask(X, 2.0), rel=1e-12)
        assert ask(Chunks(X, rows=4), 2.0) == expected == ask(Chunks(X, rows=4), spread=2.0)


def test_posteriors_and_predictions_come_chunk_by_chunk() -> None:
    em = ExactPosteriorEM(mixture)
    chunks = Chunks(X, rows=4)
    pieces = em.posterior(chunks)
    probs = torch.cat([q.probs("z") for q in pieces])
    torch.testing.assert_close(probs, em.posterior(X).probs("z"), rtol=1e-12, atol=1e-12)
    assert next(pieces, None) is None
    drawn = list(em.predictive(chunks, num_samples=5, seed=0))
    assert [d["x"].shape for d in drawn] == [(5, 4, 2), (5, 4, 2), (5, 3, 2)]
    again = list(em.predictive(chunks, num_samples=5, seed=0))
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(drawn, again, strict=True))
    zeros = Chunks(torch.zeros(8, 2), rows=4)
    first, second = em.predictive(zeros, num_samples=5, seed=0)
    assert not torch.equal(first["x"], second["x"])  # rows of different chunks are independent


def test_pieces_are_made_when_they_are_asked_for() -> None:
    em = ExactPosteriorEM(mixture)
    pieces = em.posterior(Chunks(X, rows=4))
    before = next(pieces)
    pyro.param("m").data += 1.0
    after = next(pieces)
    torch.testing.assert_close(after.probs("z"), em.posterior(X[4:8]).probs("z"))
    assert before.probs("z").shape == (4, 2)
    pieces.close()


def test_what_is_wrong_names_its_row() -> None:
    x = X.clone()
    x[9, 1] = math.nan
    em = ExactPosteriorEM(mixture)
    says = "1 of 6 observed values are NaN.*The first is in row 9 of all data"
    for ask in (em.score, em.elbo, em.fit, lambda chunks: list(em.posterior(chunks))):
        with pytest.raises(DataError, match=says):
            ask(Chunks(x, rows=4))
    assert em.score(Chunks(X, rows=4)) == pytest.approx(em.score(X), rel=1e-12)


def test_a_row_that_cannot_be_is_named_among_all() -> None:
    def model(x: Tensor) -> None:
        p = pyro.param("p", torch.tensor([0.3, 0.7, 0.0]), constraint=constraints.simplex)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Categorical(p), obs=x)

    x = torch.tensor([0, 1, 0, 1, 1, 1, 2, 0])
    for ask in (ExactPosteriorEM(model).fit, ExactPosteriorEM(model).score):
        with pytest.raises(DataError, match=r"impossible.*The first is in row 6 of all data"):
            pyro.clear_param_store()
            ask(Chunks(x, rows=3))


def test_other_questions_are_refused_or_asked_of_the_first_chunk() -> None:
    em, chunks = ExactPosteriorEM(mixture), Chunks(X, rows=4)
    assert str(em.plan(chunks)) == str(em.plan(X[:4]))
    assert em.sort_components("z", "w", chunks).tolist() == [0, 1]
    compared = partial(compare, {"em": em})
    for ask in (em.step, em.steps, em.estimate_evidence, em.forecast, compared):
        with pytest.raises(UsageError, match="Chunks were given"):
            ask(chunks)
    with pytest.raises(UsageError, match="q was given together with Chunks"):
        em.elbo(chunks, q={"z": torch.full((N, 2), 0.5)})

    def drawn(x: Tensor) -> None:
        m = pyro.sample("m", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    with pytest.raises(UsageError, match="the guide draws latents"):
        ExactPosteriorEM(drawn, AutoNormal(drawn)).score(Chunks(X[:, 0], rows=4))
