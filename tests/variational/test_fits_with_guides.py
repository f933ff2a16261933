"""What a stochastic fit leaves behind: parameters, posteriors, optimisers; and what batches mean."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from torch.distributions import constraints
from torch.utils.data import DataLoader

from pyro_em import (
    Alternating,
    AutoAmortizedNormal,
    ClosedForm,
    EMStatus,
    ExactPosteriorEM,
    Fixed,
    Gradient,
    MonteCarlo,
    PyroEMWarning,
    TraceExact_ELBO,
    UsageError,
)
from pyro_em.variational.batches import Batch, factors_of

pytestmark = pytest.mark.slow


def sgd(lr: float) -> Any:
    return lambda p: torch.optim.SGD(p, lr=lr)


def adam(lr: float) -> Any:
    return lambda p: torch.optim.Adam(p, lr=lr)


def rows(x):
    mu = pyro.param("mu", torch.tensor(0.0))
    with pyro.plate("n", len(x)):
        h = pyro.sample("h", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(h, 0.5), obs=x)


def slopes(x):
    a = pyro.param("a", torch.tensor(0.3))
    with pyro.plate("n", len(x)):
        pyro.sample("h", dist.Normal(a * x, 0.45))


def shared(x):
    h = pyro.sample("h", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(h, 1.0), obs=x)


def evidence_of_rows(x: torch.Tensor, mu: float = 0.0) -> float:
    return float(dist.Normal(mu, math.sqrt(1.25)).log_prob(x).sum())


def test_a_first_fit_of_an_autoguide_returns_and_saves_what_was_fitted(tmp_path: Path) -> None:
    x = torch.randn(10) + 4
    em = ExactPosteriorEM(shared, AutoNormal, adam(0.1), strategy="guide")
    seen: list[float] = []
    result = em.fit(
        x,
        max_steps=100,
        seed=0,
        callbacks=[lambda s: seen.append(float(s.params["AutoNormal.locs.h"]))],
    )
    fitted = float(em.guide.locs.h.detach())
    assert fitted == pytest.approx(float(10 * x.mean() / 11), abs=0.5)
    assert float(result.params["AutoNormal.locs.h"]) == fitted
    assert seen[-1] == fitted and seen[0] != seen[-1]
    em.save(tmp_path / "fit.pt")
    pyro.clear_param_store()
    other = ExactPosteriorEM(shared, AutoNormal, adam(0.1), strategy="guide")
    other.load(tmp_path / "fit.pt", x)
    assert float(other.guide.locs.h.detach()) == fitted


def test_a_second_em_does_not_go_on_with_the_guide_of_the_first(tmp_path: Path) -> None:
    x = torch.randn(10) + 4
    first = ExactPosteriorEM(shared, AutoNormal, adam(0.1), strategy="guide")
    first.fit(x, max_steps=50, seed=0)
    kept = float(first.guide.locs.h.detach())
    second = ExactPosteriorEM(shared, AutoNormal, adam(0.1), strategy="guide")
    second.plan(x)
    assert float(second.guide.locs.h.detach()) != kept
    second.fit(x, max_steps=3, seed=1)
    assert float(first.guide.locs.h.detach()) == kept
    first.save(tmp_path / "one.pt")
    second.load(tmp_path / "one.pt", x)  # names in a file do not depend on who was first
    assert float(second.guide.locs.h.detach()) == kept
    for _ in range(2):  # a cell that is run twice
        ExactPosteriorEM(rows, AutoAmortizedNormal, strategy="guide").fit(x, max_steps=2, seed=0)


def test_a_result_keeps_its_posterior_when_the_fit_goes_on() -> None:
    x = torch.randn(6)
    em = ExactPosteriorEM(rows, slopes, adam(0.05), strategy="guide")
    result = em.fit(x, max_steps=5, seed=0)
    before = result.posterior.mean("h").clone()
    em.fit(x, max_steps=50, seed=0)
    torch.testing.assert_close(result.posterior.mean("h"), before)
    assert not torch.allclose(em.posterior(x).mean("h"), before)


def test_no_steps_change_nothing() -> None:
    x = torch.randn(5)
    em = ExactPosteriorEM(rows, slopes, adam(0.05), strategy="guide")
    result = em.fit(x, max_steps=0)
    assert result.num_steps == 0 and float(result.params["mu"]) == 0.0


def test_a_reset_forgets_the_optimiser() -> None:
    x = torch.randn(20)
    for optim in (adam(0.1), pyro.optim.Adam({"lr": 0.1})):
        em = ExactPosteriorEM(rows, slopes, optim, strategy="guide")
        ends = []
        for _ in range(2):
            ends.append(float(em.fit(x, max_steps=7, seed=3).params["a"]))
            em.reset()
        assert ends[0] == ends[1]


def test_a_new_schedule_brings_its_own_optimisers() -> None:
    x = torch.randn(20) + 3
    em = ExactPosteriorEM(rows, slopes, strategy="guide")
    em.fit(x, max_steps=3, schedule=Alternating(1, 1, sgd(1e-3), sgd(1e-3)))
    before = float(pyro.param("mu").detach())
    em.fit(x, max_steps=3, schedule=Alternating(1, 1, sgd(1e-30), sgd(1e-30)))
    assert float(pyro.param("mu").detach()) == pytest.approx(before, abs=1e-12)


def test_validation_does_not_change_the_path() -> None:
    x = torch.randn(20)
    ends = []
    for held_out in (None, x[:5]):
        pyro.clear_param_store()
        em = ExactPosteriorEM(rows, slopes, adam(0.05), strategy="guide")
        result = em.fit(x, batch_size=5, num_epochs=3, seed=0, validation=held_out)
        ends.append(float(result.params["a"]))
    assert ends[0] == ends[1]
    with pytest.raises(UsageError, match="by position"):
        em.fit(x=x, num_epochs=1, validation=x[:5])


@pytest.mark.parametrize("batch", [100, 300])
def test_a_closed_form_on_batches_may_have_arguments_of_its_own_for_each_row(batch: int) -> None:
    """300 leaves a smaller last batch."""
    torch.manual_seed(0)
    c = torch.linspace(-10, 10, 1000)
    x = c + 0.3 * torch.randn(1000)

    def model(c, x):
        s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(torch.tensor(0.0), 0.01))
            pyro.sample("x", dist.Normal(c + h, s), obs=x)

    def guide(c, x):
        with pyro.plate("n", len(x)):
            pyro.sample("h", dist.Normal(pyro.param("a", torch.tensor(0.0)) * x, 0.01))

    em = ExactPosteriorEM(model, guide, updates={"s": ClosedForm(), "a": Fixed()}, strategy="guide")
    result = em.fit(c, x, batch_size=batch, num_epochs=10, seed=0)
    assert float(result.params["s"]) == pytest.approx(
        float((x - c).square().mean().sqrt()), rel=0.05
    )


def test_a_median_has_no_closed_form_on_batches() -> None:
    def model(x):
        m = pyro.param("m", torch.tensor(0.0))
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Laplace(m, 1.0), obs=x)
            pyro.sample("y", dist.Normal(h, 1.0), obs=x)

    em = ExactPosteriorEM(model, slopes, updates={"m": ClosedForm()}, strategy="guide")
    with pytest.raises(UsageError, match=r"updates\['m'\].*closed form"):
        em.fit(torch.randn(8), max_steps=2)


def test_importance_weights_of_batches_bound_the_evidence() -> None:
    torch.manual_seed(1)
    x = torch.randn(100)
    updates = {"mu": Fixed(), "a": Fixed()}
    pyro.param("a", torch.tensor(0.8))
    em = ExactPosteriorEM(rows, slopes, strategy=MonteCarlo(20), updates=updates)
    bounds = torch.tensor(em.fit(x, batch_size=10, num_epochs=5, seed=0).history)
    error = float(bounds.std()) / len(bounds) ** 0.5
    truth = evidence_of_rows(x)
    assert abs(float(bounds.mean()) - truth) < 3 * error + 1.0


def test_scaled_rows_are_replicated_rows_in_importance_weights() -> None:
    x = torch.tensor([0.5, -1.0, 2.0])
    em = ExactPosteriorEM(
        pyro.poutine.scale(rows, scale=10.0), pyro.poutine.scale(slopes, scale=10.0)
    )
    pyro.param("a", torch.tensor(0.8))
    torch.manual_seed(0)
    estimate = em.estimate_evidence(x, num_particles=1000)
    assert estimate.value == pytest.approx(10 * evidence_of_rows(x), abs=0.2)


def test_a_plate_of_the_batch_size_by_chance_is_not_scaled() -> None:
    groups = torch.arange(5.0)
    torch.manual_seed(0)
    x = 3 * torch.randn(40)

    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("groups", 5):
            pyro.sample("g", dist.Normal(mu, 1.0), obs=groups)
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(mu, 10.0), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(pyro.param("m", torch.tensor(1.5)), 0.4))

    em = ExactPosteriorEM(model, guide, updates={"m": Fixed()}, strategy="guide")
    likelihood = dist.Normal(1.5, 1.0).log_prob(groups).sum() - 5 * 0.4**2 / 2
    likelihood = likelihood + dist.Normal(1.5, 10.0).log_prob(x).sum() - 40 * 0.4**2 / 200
    full = float(likelihood) - ((1.5**2 + 0.4**2 - 1) / 2 - math.log(0.4))
    drawn = em.elbo(x, num_particles=100)
    assert abs(drawn.value - full) < 3.5 * drawn.standard_error
    for batch in (5, 10):
        bounds = torch.tensor(em.fit(x, batch_size=batch, num_epochs=30, seed=0).history)
        assert abs(float(bounds.mean()) - full) < 3.5 * float(bounds.std()) / len(bounds) ** 0.5


def test_a_loader_of_dicts_counts_its_rows() -> None:
    x = torch.randn(100) + 2

    def model(batch):
        return shared(batch["x"])

    def guide(batch):
        pyro.sample("h", dist.Normal(pyro.param("m", torch.tensor(1.8)), 0.1))

    em = ExactPosteriorEM(model, guide, updates={"m": Fixed()}, strategy="guide")
    loader = DataLoader([{"x": v} for v in x], 10)
    history = torch.tensor(em.fit(loader, num_epochs=10, seed=0).history)
    full = em.elbo({"x": x}, num_particles=250)
    error = math.hypot(float(history.std()) / len(history) ** 0.5, full.standard_error)
    assert abs(float(history.mean()) - full.value) < 3.5 * error


@pytest.mark.parametrize("wrap", ["scale", "mask"])
def test_a_guide_messenger_keeps_scale_and_mask(wrap: str) -> None:
    x = torch.tensor([0.5, -1.0, 2.0, 1.0])

    def model(x):
        with pyro.plate("n", len(x)):
            handler = (
                pyro.poutine.scale(scale=3.0)
                if wrap == "scale"
                else pyro.poutine.mask(mask=torch.tensor([True, False, True, False]))
            )
            with handler:
                h = pyro.sample("h", dist.Normal(torch.tensor(0.0), 1.0))
                pyro.sample("x", dist.Normal(h, 0.5), obs=x)

    em = ExactPosteriorEM(model, AutoNormalMessenger)
    em.plan(x)
    messenger = em.guide.messenger
    q = pyro.poutine.trace(messenger).get_trace(x).nodes["h"]["fn"].base_dist
    kl = (q.mean**2 + q.variance - 1) / 2 - q.stddev.log()
    data = dist.Normal(q.mean, 0.5).log_prob(x) - q.variance / (2 * 0.5**2)
    weight = torch.tensor([3.0] * 4 if wrap == "scale" else [1.0, 0.0, 1.0, 0.0])
    exact = float((weight * (data - kl)).sum().detach())
    ours = em.elbo(x, num_particles=350)
    assert abs(ours.value - exact) < 3.5 * ours.standard_error
    theirs = torch.tensor([-Trace_ELBO().loss(model, messenger, x) for _ in range(100)])
    assert abs(float(theirs.mean()) - exact) < 3.5 * float(theirs.std()) / 100**0.5


def test_a_score_function_of_a_site_without_data_is_unbiased() -> None:
    """The guide makes h depend on a, on which no data depend in the model."""
    x = torch.tensor([1.0, -0.5, 2.0, 0.3])

    def model(x):
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(h, 0.5), obs=x)
            pyro.sample("a", dist.Poisson(torch.exp(0.5 * h)))

    def guide(x):
        p = pyro.param("p", torch.tensor(1.5), constraint=constraints.positive)
        with pyro.plate("n", len(x)):
            a = pyro.sample("a", dist.Poisson(p))
            pyro.sample("h", dist.Normal(0.4 * a, 0.7))

    em = ExactPosteriorEM(model, guide, strategy="guide")
    found = em._look((x,), {})
    leaf = pyro.get_param_store()._params["p"]

    def gradient(loss: Any) -> float:
        leaf.grad = None
        loss().backward()
        return float(leaf.grad)

    # The same by a sum over a and quadrature over h: half the draws weigh as much beside it.
    nodes, weights = (torch.as_tensor(v) for v in np.polynomial.hermite_e.hermegauss(60))
    a, log_p = torch.arange(40.0)[:, None], torch.tensor(math.log(1.5), requires_grad=True)
    h = 0.4 * a + 0.7 * nodes
    log_q = dist.Poisson(log_p.exp()).log_prob(a)
    cost = log_q + dist.Normal(0.4 * a, 0.7).log_prob(h) - dist.Normal(0.0, 1.0).log_prob(h)
    cost = cost - dist.Poisson(torch.exp(0.5 * h)).log_prob(a)
    rows = cost - dist.Normal(h, 0.5).log_prob(x[:, None, None])
    (log_q.exp() * rows * weights / weights.sum()).sum().backward()
    assert log_p.grad is not None

    for loss, n in (
        (lambda: found.loss((x,), {}), 350),
        (lambda: Trace_ELBO().differentiable_loss(model, guide, x), 100),
    ):
        drawn = torch.tensor([gradient(loss) for _ in range(n)])
        assert abs(float(drawn.mean() - log_p.grad)) < 3.5 * float(drawn.std()) / n**0.5
    leaf.grad = None


def test_nan_under_a_mask_is_no_obstacle() -> None:
    x = torch.randn(30)
    x[::3] = math.nan

    def model(x):
        with pyro.plate("n", len(x)), pyro.poutine.mask(mask=~torch.isnan(x)):
            h = pyro.sample("h", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(h, 0.5), obs=x)

    result = ExactPosteriorEM(model, AutoAmortizedNormal).fit(x, max_steps=20, seed=0)
    assert result.num_steps == 20 and math.isfinite(result.elbo)


def test_rows_of_an_autoguide_and_batches_do_not_go_together() -> None:
    em = ExactPosteriorEM(rows, AutoNormal, strategy="guide")
    with pytest.raises(
        UsageError, match=r"AutoNormal.*each of the 20 rows(.|\n)*AutoAmortizedNormal"
    ):
        em.fit(torch.randn(20), batch_size=5, num_epochs=1)


def test_an_exact_estimate_is_exact_in_double_precision() -> None:
    def model(x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7], dtype=torch.float64)))
            pyro.sample("x", dist.Normal(z.double(), 1.0), obs=x)

    x = torch.randn(5000, dtype=torch.float64)
    em = ExactPosteriorEM(model)
    torch.set_default_dtype(torch.float32)
    estimate = em.estimate_evidence(x, num_particles=30)
    assert estimate.value == pytest.approx(em.posterior(x).log_evidence, rel=1e-12)


def test_buffers_are_saved_with_a_fit(tmp_path: Path) -> None:
    """The standardisation of an amortised guide comes from the data that it saw first."""
    x = 100 + torch.randn(50)
    em = ExactPosteriorEM(rows, AutoAmortizedNormal, strategy="guide")
    em.fit(x, max_steps=20, seed=0)
    em.save(tmp_path / "fit.pt")
    torch.manual_seed(0)
    before = em.elbo(x, num_particles=5).value
    pyro.clear_param_store()
    other = ExactPosteriorEM(rows, AutoAmortizedNormal, strategy="guide")
    other.load(tmp_path / "fit.pt")
    other.plan(x - 100)  # another first look
    torch.manual_seed(0)
    assert other.elbo(x, num_particles=5).value == pytest.approx(before, rel=1e-6)


def test_a_bound_prints_its_parts() -> None:
    x = torch.randn(5)
    em = ExactPosteriorEM(rows, slopes, strategy="guide")
    text = str(em.elbo(x, num_particles=10))
    assert "ELBO" in text and "±" in text and "reconstruction" in text
    assert "num_particles" in str(em.elbo(x))


def test_a_free_scale_above_a_point_estimate_is_warned_about() -> None:
    def model(x):
        tau = pyro.param("tau", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(torch.tensor(0.0), tau))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    assert "grows without bound" in str(ExactPosteriorEM(model, "map").plan(torch.randn(6)))


def test_data_may_be_finer_than_parameters() -> None:
    def model(x):
        mu = pyro.param("mu", torch.zeros(2, 2) + torch.tensor([[0.0], [1.0]]))
        S = pyro.param("S", torch.eye(2).repeat(2, 1, 1), constraint=constraints.positive_definite)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.MultivariateNormal(mu[z], S[z]), obs=x)

    torch.set_default_dtype(torch.float32)
    result = ExactPosteriorEM(model).fit(torch.randn(40, 2, dtype=torch.float64), max_steps=5)
    assert result.num_steps == 5 and result.params["mu"].dtype is torch.float32


def test_of_nested_plates_of_one_size_the_outer_one_holds_the_rows() -> None:
    """Documents of four words in batches of four, the words on the left."""
    words = torch.randn(4, 8)

    def model(words):  # (words, documents)
        with pyro.plate("documents", words.shape[1], dim=-1):
            h = pyro.sample("h", dist.Normal(torch.tensor(0.0), 1.0))
            with pyro.plate("words", len(words), dim=-2):
                pyro.sample("w", dist.Normal(h, 1.0), obs=words)

    def guide(words):
        with pyro.plate("documents", words.shape[1], dim=-1):
            pyro.sample("h", dist.Normal(pyro.param("m", torch.tensor(0.0)), 0.4))

    em = ExactPosteriorEM(model, guide, strategy="guide")
    found = em._look((words[:, :4],), {})
    structure = found.structure((words[:, :4],), {})
    batch = Batch((words[:, :4],), {}, size=4, total=8)
    assert factors_of(structure, batch) == {"documents": 2.0}


# ------------------------------------------------------------------ what is said of a fit


def coins(x):
    p = pyro.param("p", torch.tensor([0.3, 0.6]), constraint=constraints.unit_interval)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("x", dist.Bernoulli(p[z]), obs=x)


def coins_guide(x):
    logits = pyro.param("logits", torch.tensor([[0.1, 0.2], [0.3, -0.5]]))
    with pyro.plate("n", len(x)):
        pyro.sample("z", dist.Categorical(logits=logits[x.long()]))


BITS = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])


def test_one_draw_has_no_standard_error() -> None:
    em = ExactPosteriorEM(coins, coins_guide, strategy="guide")
    for proposal in ("guide", "prior"):
        one = em.estimate_evidence(BITS, num_particles=1, proposal=proposal)
        assert one.standard_error is None
        assert "±" not in str(one) and "1 draw of the" in str(one) and "num_particles=n" in str(one)
        few = em.estimate_evidence(BITS, num_particles=10, proposal=proposal)
        assert few.standard_error is not None and few.standard_error > 0
        assert "needs 25 draws" in str(few) and "nan" not in str(few)
    exact = em.estimate_evidence(BITS, num_particles=1, proposal="posterior")
    assert exact.standard_error == 0.0 and not math.isnan(exact.value)


@pytest.mark.parametrize("n", [0, -2, 2.5, True])
def test_numbers_of_draws_that_cannot_be(n: Any) -> None:
    em = ExactPosteriorEM(rows, slopes, strategy="guide")
    for ask in (em.elbo, em.estimate_evidence):
        with pytest.raises(UsageError, match=f"num_particles={n} is no number of draws"):
            ask(torch.randn(3), num_particles=n)
    with pytest.raises(UsageError, match=f"num_particles={n}"):
        ExactPosteriorEM(rows, slopes, num_particles=n, strategy="guide")
    with pytest.raises(UsageError, match=f"TraceExact_ELBO: num_particles={n}"):
        TraceExact_ELBO(num_particles=n, strategy="guide")
    with pytest.raises(UsageError, match="strategy='hard'"):
        TraceExact_ELBO(strategy="hard")


def test_a_plan_says_whether_anything_is_drawn() -> None:
    summed = ExactPosteriorEM(coins, coins_guide, strategy="guide").plan(BITS)
    assert summed.stochastic and not summed.draws
    assert "no draws" in str(summed) and "drawn" not in str(summed)
    drawn = ExactPosteriorEM(rows, slopes, strategy="guide").plan(torch.randn(4))
    assert drawn.stochastic and drawn.draws
    assert "each draws from the guide" in str(drawn) and "closed form" in str(drawn)
    # Importance weights take log q(h) of each draw, not the closed form of the divergence.
    weighted = ExactPosteriorEM(rows, slopes, strategy=MonteCarlo(5)).plan(torch.randn(4))
    assert "closed form" not in str(weighted)


def test_an_optimiser_that_nothing_needs_is_said_to_be_unused() -> None:
    em = ExactPosteriorEM(coins, None, adam(0.1))
    assert "optim is not used" in str(em.plan(BITS))
    with pytest.warns(PyroEMWarning, match="optim is not used"):
        em.fit(BITS, max_steps=2)
    used = ExactPosteriorEM(coins, None, adam(0.1), updates={"p": Gradient()})
    assert "not used" not in str(used.plan(BITS))


def test_optimisers_that_are_none_for_draws() -> None:
    em = ExactPosteriorEM(rows, slopes, torch.optim.LBFGS, strategy="guide")
    with pytest.raises(UsageError, match="LBFGS evaluates the loss several times"):
        em.fit(torch.randn(4), max_steps=2)
    with pytest.raises(UsageError, match="returned a list, not a torch optimiser"):
        ExactPosteriorEM(rows, slopes, lambda p: p, strategy="guide").fit(
            torch.randn(4), max_steps=2
        )


def test_one_torch_optimiser_serves_all_parameters() -> None:
    built: list[int] = []

    def fused(parameters):
        built.append(len(parameters))
        return torch.optim.Adam(parameters, lr=0.01, fused=True)

    ExactPosteriorEM(rows, slopes, fused, strategy="guide").fit(
        torch.randn(6), batch_size=2, num_epochs=3
    )
    assert built == [2]


def test_a_closed_form_of_a_guides_parameter_is_refused_in_the_users_words() -> None:
    em = ExactPosteriorEM(rows, slopes, updates={"a": ClosedForm()}, strategy="guide")
    with pytest.raises(UsageError) as refused:
        em.fit(torch.randn(4), max_steps=2)
    assert "guide site 'h'" in str(refused.value) and "guide:" not in str(refused.value)
    assert str(refused.value).count("was asked for") == 1


def test_a_stochastic_fit_cannot_be_accelerated() -> None:
    with pytest.raises(UsageError, match="needs exact EM steps"):
        ExactPosteriorEM(rows, slopes, strategy="guide").fit(
            torch.randn(4), max_steps=2, acceleration="squarem"
        )


@pytest.mark.parametrize(
    ("n", "name"), [(None, "ELBO"), (20, "importance-weighted bound of 20 dr")]
)
def test_a_result_says_which_bound_it_holds(n, name) -> None:
    torch.manual_seed(1)
    x = torch.randn(30)
    pyro.param("a", torch.tensor(0.1))
    strategy = "guide" if n is None else MonteCarlo(n)
    held = {"mu": Fixed(), "a": Fixed()}
    em = ExactPosteriorEM(rows, slopes, strategy=strategy, updates=held, num_particles=20)
    result = em.fit(x, max_steps=2, seed=0)
    assert name in str(result).splitlines()[0] and name in str(result.summary())
    terms = em.elbo(x, num_particles=200)
    assert terms.standard_error is not None
    above = result.elbo - terms.value
    assert (above > 10 * terms.standard_error) is (n is not None)


def test_the_plan_says_whose_turn_moves_a_parameter_of_both() -> None:
    """One parameter centres the prior and the guide: it stays where it is in the model's turns."""

    def guide(x):
        mu, a = pyro.param("mu"), pyro.param("a", torch.tensor(0.3))
        with pyro.plate("n", len(x)):
            pyro.sample("h", dist.Normal(mu + a * x, 0.45))

    def start(x):
        pyro.param("mu", torch.tensor(0.0))
        return guide(x)

    x = torch.tensor([1.0, 2.0, 4.0])
    em = ExactPosteriorEM(rows, start, adam(0.1), strategy="guide")
    reasons = {u.name: u.reason for u in em.plan(x).updates.values()}
    assert reasons["mu"].startswith("of the guide and model (under Alternating it moves in the gui")
    assert reasons["a"].startswith("of the guide;")
    em.fit(x, max_steps=3, schedule=Alternating(0, 1), progress=False)
    assert float(pyro.param("mu").detach()) == 0.0
    em.fit(x, max_steps=3, schedule=Alternating(1, 0), progress=False)
    assert float(pyro.param("mu").detach()) != 0.0


def test_a_callback_sees_the_held_out_bound_and_can_stop_early() -> None:
    torch.manual_seed(0)
    x, held_out = torch.randn(20), torch.randn(10)
    seen = []

    def patience(step):
        """Stop when two epochs in a row brought nothing."""
        if step.validation is not None and step.validation not in seen:
            seen.append(step.validation)
        return len(seen) > 2 and max(v for _, v in seen[-2:]) <= seen[-3][1]

    em = ExactPosteriorEM(rows, slopes, adam(0.05), strategy="guide")
    result = em.fit(
        x, batch_size=5, num_epochs=200, validation=held_out, callbacks=patience, seed=0
    )
    assert result.status is EMStatus.STOPPED and result.converged
    assert tuple(seen) == result.history.validation and len(seen) < 200
    assert [at for at, _ in seen] == [4 * (i + 1) for i in range(len(seen))]
    assert result.num_steps == seen[-1][0] + 1  # seen at the first step after it was taken
    assert all(step.validation is None for step, _ in zip(em.steps(x), range(2), strict=False))
