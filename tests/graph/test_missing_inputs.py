"""``missing="nan"`` fills nothing that a density reads as input, and says where it was asked to."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints as C

from pyro_em import DataError, ExactPosteriorEM, PyroEMError, UsageError, vectorized_markov
from pyro_em.graph.factors import seen_entries

NAN = float("nan")
Y = torch.tensor([1.0, NAN, 2.0, 4.0], dtype=torch.float64)


def regression(x, y):
    b = pyro.param("b", torch.zeros(2))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)


def counts(y, exposure):
    rate = pyro.param("rate", torch.tensor(0.5), constraint=C.positive)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson(rate * exposure), obs=y)


def weighted(y, w):
    mu = pyro.param("mu", torch.tensor(0.0))
    with pyro.plate("rows", len(y)), pyro.poutine.scale(scale=w):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def lagged(y, _=None):
    b, before = pyro.param("b", torch.tensor(0.5)), torch.tensor(0.0)
    for t in range(len(y)):
        before = pyro.sample(f"y_{t}", dist.Normal(b * before, 1.0), obs=y[t])


def caused(y, x):
    b = pyro.param("b", torch.zeros(2))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Bernoulli(logits=x @ b))
        pyro.sample("y", dist.Normal(2 * z, 1.0), obs=y)


def initial(y, _=None):
    mu = pyro.param("mu", y.mean())
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def indexed(y, code):
    mu = pyro.param("mu", torch.zeros(3))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu[code.long()], 1.0), obs=y)


COVARIATES = torch.tensor([[1.0, 2.0], [0.0, 1.0], [NAN, 1.0], [1.0, 1.0]], dtype=torch.float64)
NUMBERS = torch.tensor([1.0, 2.0, NAN, 1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("model", "args", "text"),
    [
        (regression, (COVARIATES, Y), r"site 'y', argument 'loc': 1 of 4 numbers is NaN, .*\(2,\)"),
        (counts, (Y, NUMBERS), r"site 'y', argument 'rate': 1 of 4 numbers is NaN"),
        (weighted, (Y, NUMBERS), r"site 'y', poutine.scale: 1 of 4 numbers is NaN"),
        (lagged, (Y,), r"site 'y_2', argument 'loc': 1 of 1 numbers is NaN"),
        (caused, (Y, COVARIATES), r"site 'z', argument 'logits': 1 of 4 numbers is NaN"),
        (initial, (Y,), r"argument 'y': 1 of 4 numbers is NaN[\s\S]*parameter 'mu'"),
        (indexed, (Y, NUMBERS), r"IndexError: index -9223372036854775808[\s\S]*NaN became"),
    ],
)
def test_inputs_are_never_filled(model: Any, args: tuple, text: str) -> None:
    with pytest.raises(DataError, match=text):
        ExactPosteriorEM(model, missing="nan").fit(*args)


def test_the_same_models_take_missing_observations() -> None:
    covariates, numbers = COVARIATES.nan_to_num(), NUMBERS.nan_to_num(1.0)
    for model, args in (
        (regression, (covariates, Y)),
        (counts, (Y, numbers)),
        (weighted, (Y, numbers)),
    ):
        pyro.clear_param_store()
        kept = ExactPosteriorEM(model, missing="nan").fit(*args).log_evidence
        rows = [a[~Y.isnan()] for a in args]
        pyro.clear_param_store()
        assert kept == pytest.approx(ExactPosteriorEM(model).fit(*rows).log_evidence, abs=1e-12)


def test_nan_that_has_become_an_integer_is_named() -> None:
    def model(x):
        p = pyro.param("p", torch.ones(3) / 3, constraint=C.simplex)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Categorical(p), obs=x)

    x = torch.tensor([0.0, 1.0, NAN, 2.0])
    for codes in (x.long(), x.int()):
        with pytest.raises(
            DataError, match=r"site 'x': 1 of 4 .*-\d+, the first .*\(2,\)[\s\S]*NaN became"
        ):
            ExactPosteriorEM(model, missing="nan").fit(codes)
    assert ExactPosteriorEM(model, missing="nan").score(x) == pytest.approx(-3.295837)

    def real(x, keep):
        with pyro.plate("rows", len(x)), pyro.poutine.mask(mask=keep):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    # Every number is in the support of a Normal, which would take it in silence.
    keep = torch.ones(4, dtype=torch.bool)
    for numbers in (x.long(), x.long().double(), x.int()):
        with pytest.raises(DataError, match=r"site 'x': 1 of 4 .*-\d+[\s\S]*NaN became"):
            ExactPosteriorEM(real).score(numbers, keep)
        assert ExactPosteriorEM(real).score(numbers, ~x.isnan()) < 0


def test_without_it_nan_is_refused_and_the_message_knows_the_way() -> None:
    with pytest.raises(DataError, match=r"1 of 4 observed values are NaN[\s\S]*missing='nan'"):
        ExactPosteriorEM(counts).fit(Y, NUMBERS.nan_to_num(1.0))
    with pytest.raises(UsageError, match=r"missing='NaN' is no mark"):
        ExactPosteriorEM(counts, missing="NaN")


def test_nan_under_masks_of_the_user_stays_harmless() -> None:
    """Rows that are masked hold NaN in some coordinates, or in all, and count as little as before."""

    def model(x, keep, how):
        mu = pyro.param("mu", torch.zeros(2))
        s = pyro.param("s", torch.eye(2), constraint=C.positive_definite)
        with pyro.plate("rows", len(x)):
            fn = dist.MultivariateNormal(mu, s)
            if how == "obs_mask":
                pyro.sample("x", fn, obs=x, obs_mask=keep)
            else:
                with pyro.poutine.mask(mask=keep):
                    pyro.sample("x", fn, obs=x)

    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 2, generator=g, dtype=torch.float64)
    keep = torch.arange(12) % 3 > 0
    x[0], x[3, 1] = NAN, NAN  # under the mask
    for incomplete in (False, True):
        if incomplete:
            x[1, 0] = NAN  # not under it
        found = []
        for how in ("obs_mask", "mask"):
            pyro.clear_param_store()
            em = ExactPosteriorEM(model, missing="nan")
            found.append(em.fit(x, keep, how, max_steps=8, tol=0).log_evidence)
        pyro.clear_param_store()
        rows = x[keep]
        every = torch.ones(len(rows), dtype=torch.bool)
        only = ExactPosteriorEM(model, missing="nan").fit(rows, every, "mask", max_steps=8, tol=0)
        assert found == pytest.approx([only.log_evidence] * 2, abs=1e-10)


def test_the_plan_counts_what_is_missing_per_site() -> None:
    def model(x, y):
        for t in range(3):
            pyro.sample(f"x_{t}", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=x[t])
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    x = torch.tensor([[NAN, 1.0], [NAN, NAN], [1.0, 1.0]])
    plan = ExactPosteriorEM(model, missing="nan").plan(x, Y)
    assert [(m.site, m.entries, m.of) for m in plan.missing] == [
        ("x_0", 1, 2),
        ("x_1", 2, 2),
        ("y", 1, 4),
    ]
    assert "Missing entries" in str(plan)
    assert "  x_*   3        4        integrated out" in str(plan)
    assert not ExactPosteriorEM(model, missing="nan").plan(x.nan_to_num(), Y.nan_to_num()).missing


def test_a_mask_of_coordinates_in_the_place_of_one_of_events_is_told_where_it_belongs() -> None:
    def model(x):
        mu = pyro.param("mu", torch.zeros(3))
        with pyro.plate("rows", len(x)):
            fn = dist.Normal(mu, 1.0).to_event(1)
            pyro.sample("x", fn, obs=x.nan_to_num(), obs_mask=~x.isnan())

    x = torch.ones(4, 3)
    x[0, 0] = NAN
    for rows in (x, x[:3]):  # as many rows as coordinates would pass in Pyro
        with pytest.raises(PyroEMError, match=r"missing='nan'[\s\S]*fn.mask\(seen\).to_event\(1\)"):
            ExactPosteriorEM(model).fit(rows)


def test_a_site_without_any_entry_is_noted() -> None:
    """What is standardised with NaN is NaN everywhere."""

    def model(x, loop):
        x = (x - x.mean(0)) / x.std(0) if loop is None else x
        if loop is None:
            with pyro.plate("rows", len(x)):
                pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=x)
            return
        z = None
        for t in vectorized_markov("t", len(x)) if loop else pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(0.5 if z is None else 0.2 + 0.6 * z))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[t])

    x = torch.tensor([[1.0, NAN], [NAN, 2.0], [1.0, 1.0]])
    em = ExactPosteriorEM(model, missing="nan")
    assert "site 'x': all of its entries are missing" in str(em.plan(x, None))
    steps = torch.tensor([1.0, NAN, 2.0, NAN, 0.5])
    for loop in (True, False):
        assert "all of its entries" not in str(em.plan(steps, loop))
        lost = em.plan(torch.full_like(steps, NAN), loop)
        assert "site 'x_*': all of its entries are missing" in str(lost)


def test_one_function_says_which_entries_are_seen() -> None:
    def model(x, y, keep):
        with pyro.plate("rows", len(x)):
            with pyro.poutine.mask(mask=keep):
                pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), obs=x)
            pyro.sample("y", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=y)
            pyro.sample("whole", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x.nan_to_num())

    x = torch.tensor([[1.0, NAN], [NAN, NAN], [1.0, 2.0], [3.0, 4.0]])
    keep = torch.tensor([True, True, True, False])
    em = ExactPosteriorEM(model, missing="nan")
    graph = em._session.look((x, x.flip(0), keep), {}).graph
    seen = {g.members[0]: seen_entries(g) for g in graph.groups}
    assert torch.equal(seen["x"][0], ~x.isnan() & keep.unsqueeze(-1))
    assert torch.equal(seen["y"][0], ~x.flip(0).isnan())
    assert seen["whole"] is None


def autoregression(y, how):
    """Of values themselves, or of latents that are seen as they are."""
    phi, s = pyro.param("phi", Y.new_tensor(0.6)), pyro.param("s", Y.new_tensor(0.8))
    h = Y.new_tensor(0.0)
    for t in range(len(y)):
        fn = dist.Normal(0.1 + phi * h, s)
        if how == "latents":
            h = pyro.sample(f"h_{t}", fn)
            pyro.sample(f"y_{t}", dist.Normal(h, 1e-6), obs=y[t])
        elif how == "obs_mask":
            h = pyro.sample(f"y_{t}", fn, obs=y[t].nan_to_num(), obs_mask=~y[t].isnan())
        else:
            h = pyro.sample(f"y_{t}", fn, obs=y[t])


def test_an_autoregression_with_gaps_is_told_to_be_one_of_latents_which_has_the_exact_evidence():
    words = "an autoregression whose values may be missing: let them be latents that are seen"
    for how in ("nan", "obs_mask"):
        with pytest.raises(PyroEMError, match=words):
            ExactPosteriorEM(autoregression, missing="nan").posterior(Y, how)
    rows = [(Y[0], 0.1, 0.8), (Y[2], 0.1 + 0.6 * (0.1 + 0.6 * Y[0]), 0.8 * (1 + 0.6**2) ** 0.5)]
    rows += [(Y[3], 0.1 + 0.6 * Y[2], 0.8)]
    expected = sum(float(dist.Normal(mean, scale).log_prob(y)) for y, mean, scale in rows)
    q = ExactPosteriorEM(autoregression, missing="nan").posterior(Y, "latents")
    assert q.log_evidence == pytest.approx(expected, abs=1e-9)
