"""Where fits begin: clusters of what is observed, and short runs before long ones."""

from __future__ import annotations

import itertools
import math
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import constraints

from models import gmm
from pyro_em import EMStatus, ExactPosteriorEM, UsageError
from pyro_em.fitting.steps import beginnings as beginnings_module
from pyro_em.fitting.steps import restarts as restarts_module
from tests.benchmarks.starts import NEAR, blobs, ours, theirs
from tests.data_sets import iris

WORDS = ("kmeans", "random points")


def simplex(name: str, *shape: int):
    return pyro.param(name, torch.ones(*shape) / shape[-1], constraint=constraints.simplex)


def positive(name: str, value: torch.Tensor):
    return pyro.param(name, value, constraint=constraints.positive)


def mixture(y, K: int = 2, scale: torch.Tensor | float = 1.0, ok: torch.Tensor | None = None):
    w, mu, s = simplex("w", K), pyro.param("mu", torch.zeros(K)), positive("s", torch.ones(K))
    with pyro.plate("rows", len(y)), poutine.scale(scale=scale):
        z = pyro.sample("z", dist.Categorical(w))
        with poutine.mask(mask=torch.tensor(True) if ok is None else ok):
            pyro.sample("y", dist.Normal(mu[z], s[z]), obs=y)


def rows(n: int = 60, seed: int = 0, centres=(0.0, 8.0)) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    z = torch.arange(n) % len(centres)
    return torch.tensor(centres)[z] + torch.randn(n, generator=g)


def fit(model, *args, **options):
    pyro.clear_param_store()
    return ExactPosteriorEM(model).fit(*args, progress=False, **options)


# ------------------------------------------------------------------ clusters


def test_iris_from_k_means_reaches_the_best_known_maximum() -> None:
    result = fit(gmm.model, iris(), 3, init="kmeans", seed=0, tol=1e-8)
    assert result.log_evidence == pytest.approx(-180.185477, abs=1e-5)
    assert result.bic == pytest.approx(580.839, abs=1e-3) and result.start == "kmeans"


def test_k_means_is_scikit_learns_then_an_m_step() -> None:
    """The same evidence as from its labels, whatever the order of the components."""
    from sklearn.cluster import KMeans

    x = iris()
    scaled = (x - x.mean(0)) / x.std(0, correction=0)
    labels = KMeans(3, n_init=10, random_state=1).fit_predict(scaled.numpy())
    given = fit(gmm.model, x, 3, init={"z": labels}, max_steps=0)
    found = fit(gmm.model, x, 3, init="kmeans", seed=5, max_steps=0)
    assert found.log_evidence == pytest.approx(given.log_evidence, abs=1e-8)


@pytest.mark.parametrize("init", WORDS)
def test_units_do_not_matter_and_seeds_do(init: str) -> None:
    x = iris()
    units = torch.tensor([1.0, 1000.0, 0.01, 7.0])
    a = fit(gmm.model, x, 4, init=init, seed=3, max_steps=5, tol=0)
    b = fit(gmm.model, x * units, 4, init=init, seed=3, max_steps=5, tol=0)
    jacobian = len(x) * float(units.log().sum())
    assert a.log_evidence == pytest.approx(b.log_evidence + jacobian, abs=1e-6)
    again = fit(gmm.model, x, 4, init=init, seed=3, max_steps=5, tol=0)
    assert list(again.history) == list(a.history)
    if init == "random points":
        other = fit(gmm.model, x, 4, init=init, seed=4, max_steps=5, tol=0)
        assert other.history[0] != a.history[0]


@pytest.mark.parametrize("init", WORDS)
def test_equal_initial_values_are_left(init: str) -> None:
    y = rows()
    result = fit(mixture, y, init=init, seed=0, tol=1e-8)
    low, high = sorted(result.params["mu"].tolist())
    assert low == pytest.approx(float(y[::2].mean()), abs=0.05)
    assert high == pytest.approx(float(y[1::2].mean()), abs=0.05)


@pytest.mark.parametrize("init", WORDS)
@pytest.mark.parametrize("gaps", [False, True])
def test_the_steps_of_a_chain_share_their_clusters(init: str, gaps: bool) -> None:
    """Each state is one cluster at every step, through steps without an observation."""

    def chain(y, K: int):
        pi, A = simplex("pi", K), simplex("A", K, K)
        mu, s, z = pyro.param("mu", torch.zeros(K)), positive("s", torch.ones(K)), None
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
            if not gaps or t % 4:
                pyro.sample(f"y_{t}", dist.Normal(mu[z], s[z]), obs=y[t])

    y = rows(40, centres=(0.0, 0.0, 0.0, 0.0, 10.0, 10.0, 10.0, -10.0))
    result = fit(chain, y, 3, init=init, seed=0, max_steps=30)
    assert sorted(round(v / 10) for v in result.params["mu"].tolist()) == [-1, 0, 1]


def items(x, K: int = 2, form: str = "plate", ok: torch.Tensor | None = None):
    J = x.shape[1]
    w = simplex("w", K)
    p = pyro.param("p", torch.full((K, J), 0.5), constraint=constraints.unit_interval)
    if form == "plate":
        with pyro.plate("people", len(x), dim=-2):
            z = pyro.sample("z", dist.Categorical(w))
            with pyro.plate("items", J, dim=-1):
                mask = torch.tensor(True) if ok is None else ok
                with poutine.mask(mask=mask):
                    probs = pyro.ops.indexing.Vindex(p)[z, torch.arange(J)]
                    pyro.sample("x", dist.Bernoulli(probs), obs=x)
        return
    with pyro.plate("people", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        if form == "event":
            pyro.sample("x", dist.Bernoulli(p[z]).to_event(1), obs=x)
        for j in range(J * (form == "sites")):
            pyro.sample(f"x_{j}", dist.Bernoulli(p[z, j]), obs=x[:, j])


def answers(n: int = 80, J: int = 6) -> torch.Tensor:
    g = torch.Generator().manual_seed(2)
    p = torch.tensor([0.9, 0.15])[torch.arange(n) % 2].unsqueeze(-1)
    return (torch.rand(n, J, generator=g) < p).double()


@pytest.mark.parametrize("init", WORDS)
def test_symbols_of_one_row_in_any_spelling(init: str) -> None:
    x = answers()
    found = [fit(items, x, 2, form, init=init, seed=1, max_steps=3, tol=0) for form in SPELLINGS]
    for other in found[1:]:
        assert list(other.history) == pytest.approx(list(found[0].history), abs=1e-9)
    rates = sorted(found[0].params["p"].mean(-1).tolist())
    assert rates[0] < 0.3 and rates[1] > 0.75


SPELLINGS = ("plate", "event", "sites")


@pytest.mark.parametrize("init", WORDS)
def test_masked_values_do_not_count(init: str) -> None:
    """Whatever stands in a masked cell; rows without a value take no side."""
    x = answers()
    ok = torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) < 0.8
    ok[:3] = False
    fits = []
    for junk in (0.0, 1.0):
        data = torch.where(ok, x, junk)
        fits.append(fit(items, data, 2, "plate", ok, init=init, seed=1, max_steps=3, tol=0))
    assert list(fits[0].history) == list(fits[1].history)
    rates = sorted(fits[0].params["p"].mean(-1).tolist())
    assert rates[0] < 0.3 and rates[1] > 0.75


@pytest.mark.parametrize("init", WORDS)
def test_nan_under_a_mask(init: str) -> None:
    y = rows()
    ok = torch.arange(len(y)) % 5 != 0
    there = fit(mixture, y[ok], init="kmeans", seed=0, tol=1e-9).params["mu"].sort().values
    y[~ok] = math.nan
    result = fit(mixture, y, 2, 1.0, ok, init=init, seed=0, tol=1e-9)
    torch.testing.assert_close(result.params["mu"].sort().values, there, rtol=0, atol=1e-3)


def test_weights_are_replicated_rows() -> None:
    y = rows(40, centres=(0.0, 3.0, 5.0))
    times = torch.arange(40) % 3 + 1
    weighted = fit(mixture, y, 3, times.double(), init="kmeans", seed=0, max_steps=0)
    replicated = fit(mixture, y.repeat_interleave(times), 3, init="kmeans", seed=0, max_steps=0)
    assert weighted.log_evidence == pytest.approx(replicated.log_evidence, abs=1e-8)


@pytest.mark.parametrize("init", WORDS)
def test_observed_labels_stay_and_name_the_components(init: str) -> None:
    def model(y, labels, known):
        w, mu, s = simplex("w", 3), pyro.param("mu", torch.zeros(3)), positive("s", torch.ones(3))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(w), obs=labels, obs_mask=known)
            pyro.sample("y", dist.Normal(mu[z], s[z]), obs=y)

    y = rows(60, centres=(8.0, 0.0, -8.0))
    y[0] = -8.0  # of class 0 all the same
    labels, known = torch.arange(60) % 3, torch.arange(60) < 9
    result = fit(model, y, torch.where(known, labels, 0), known, init=init, seed=7, max_steps=0)
    assert [round(v / 8) for v in result.params["mu"].tolist()] == [1, 0, -1]
    if init == "kmeans":  # each row belongs to its label or its cluster, which agree but for one
        assert result.params["mu"][0].item() == pytest.approx(y[labels == 0].mean().item())


@pytest.mark.parametrize("init", WORDS)
def test_float32_stays_float32(init: str) -> None:
    torch.set_default_dtype(torch.float32)
    result = fit(mixture, rows().float(), init=init, seed=0)
    assert result.dtype is torch.float32 and result.params["mu"].dtype is torch.float32
    assert abs(float(result.params["mu"].max()) - 8) < 0.5


@pytest.mark.parametrize("init", WORDS)
def test_latents_of_the_same_data_take_turns(init: str) -> None:
    """The second clusters what the first leaves over; the same clusters twice would tell nothing."""

    def model(y):
        a, b = pyro.param("a", torch.zeros(2)), pyro.param("b", torch.zeros(2))
        s = positive("s", torch.tensor(1.0))
        with pyro.plate("rows", len(y)):
            u = pyro.sample("u", dist.Categorical(torch.ones(2) / 2))
            v = pyro.sample("v", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("y", dist.Normal(a[u] + b[v], s), obs=y)

    i = torch.arange(80)
    y = 9.0 * (i % 2) + 3.0 * (i // 2 % 2) + 0.1 * rows(80, centres=(0.0,))
    result = fit(model, y, init=init, seed=0, tol=1e-8)
    steps = sorted(abs(float(result.params[n].diff())) for n in "ab")
    assert steps[0] == pytest.approx(3, abs=0.1) and steps[1] == pytest.approx(9, abs=0.1)


@pytest.mark.parametrize("init", WORDS)
def test_a_latent_above_latents_sees_what_is_observed_below_them(init: str) -> None:
    def model(y):
        w, v = simplex("w", 2), simplex("v", 2, 2)
        mu, s = pyro.param("mu", torch.zeros(2)), positive("s", torch.tensor(1.0))
        with pyro.plate("groups", y.shape[0], dim=-2):
            g = pyro.sample("g", dist.Categorical(w))
            with pyro.plate("rows", y.shape[1], dim=-1):
                z = pyro.sample("z", dist.Categorical(v[g]))
                pyro.sample("y", dist.Normal(mu[z], s), obs=y)

    share = torch.tensor([0.1, 0.9])[torch.arange(20) % 2].unsqueeze(-1)
    g = torch.Generator().manual_seed(3)
    y = 6.0 * (torch.rand(20, 15, generator=g) < share) + torch.randn(20, 15, generator=g)
    result = fit(model, y, init=init, seed=0)
    assert abs(float(result.params["v"][0, 0] - result.params["v"][1, 0])) > 0.6


@pytest.mark.parametrize("init", WORDS)
def test_exact_zeros_are_kept(init: str) -> None:
    """A chain that only moves on: clusters that contradict it are overruled."""
    zeros = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])

    def chain(y):
        A = pyro.param("A", zeros, constraint=constraints.simplex)
        mu, s = pyro.param("mu", torch.zeros(3)), positive("s", torch.ones(3))
        z = pyro.sample("z_0", dist.Categorical(torch.tensor([1.0, 0.0, 0.0])))
        for t in pyro.markov(range(len(y))):
            if t:
                z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"y_{t}", dist.Normal(mu[z], s[z]), obs=y[t])

    y = torch.cat([rows(8, seed=i, centres=(c,)) for i, c in enumerate((5.0, -5.0, 20.0))])
    result = fit(chain, y, init=init, seed=2, max_steps=1)
    assert bool((result.params["A"][zeros == 0] == 0).all())


def test_clusters_too_small_for_a_component_are_shared() -> None:
    """A lone point has no covariance; some of every other row keeps its component alive."""
    x = torch.cat([iris()[:50], torch.full((1, 4), 50.0)])
    result = fit(gmm.model, x, 2, init="kmeans", seed=0, max_steps=0)
    assert math.isfinite(result.log_evidence) and float(result.params["w"].min()) > 0


@pytest.mark.parametrize("init", WORDS)
def test_fewer_distinct_rows_than_values(init: str) -> None:
    def counts(y):
        rate = positive("rate", torch.ones(4))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(simplex("w", 4)))
            pyro.sample("y", dist.Poisson(rate[z]), obs=y)

    result = fit(counts, torch.tensor([1.0, 1.0, 30.0]), init=init, seed=0, max_steps=20)
    assert float(result.params["w"].min()) > 0
    assert sorted({round(v) for v in result.params["rate"].tolist()}) == [1, 30]


# ------------------------------------------------------------------ where it makes no sense


def without_rows(y):
    mu = pyro.param("mu", torch.zeros(2))
    z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)


def without_latents(y):
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(pyro.param("mu", torch.tensor(0.0)), 1.0), obs=y)


@pytest.mark.parametrize("init", WORDS)
def test_refusals(init: str) -> None:
    with pytest.raises(UsageError, match=rf"init='{init}'.*row of site 'z'(.|\n)*two rows"):
        fit(without_rows, rows(), init=init)
    with pytest.raises(UsageError, match=r"each row of site 'z'"):
        fit(mixture, torch.tensor([3.0]), init=init)
    with pytest.raises(UsageError, match="no latent that is summed"):
        fit(without_latents, rows(), init=init)


def test_scikit_learn_is_named_where_it_is_missing(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(UsageError, match=r"scikit-learn is not installed(.|\n)*pyro-em\[data\]"):
        fit(mixture, rows(), init="kmeans")
    assert fit(mixture, rows(), init="random points", seed=0).converged
    assert fit(mixture, rows(), num_restarts=3, seed=0).converged


# ------------------------------------------------------------------ several starts


@pytest.mark.slow
def test_restarts_find_what_random_assignments_do_not() -> None:
    result = fit(gmm.model, iris(), 3, num_restarts=10, seed=0, tol=1e-8)
    assert result.log_evidence == pytest.approx(-180.185477, abs=1e-5)
    assert len(result.starts) == 10 and result.log_evidence == max(result.starts)
    assert result.starts[0] == pytest.approx(-186.569, abs=1e-2)
    assert result.start.split(": ")[1] in restarts_module.MIX
    assert result.ends[0].start == "values in the model"
    assert "10 runs: " in str(result) and "ended at -180.185 (" in str(result)
    assert "starts" in result.summary().attrs


def test_restarts_are_reproducible_and_leave_the_best_in_the_store() -> None:
    x = iris()
    a = fit(gmm.model, x, 4, num_restarts=4, seed=3, max_steps=15, tol=0)
    b = fit(gmm.model, x, 4, num_restarts=4, seed=3, max_steps=15, tol=0)
    assert a.starts == b.starts and list(a.history) == list(b.history)
    assert a.num_steps == 15 and all(e.num_steps == 15 for e in a.ends)
    torch.testing.assert_close(pyro.param("mu").detach(), b.params["mu"])
    em = ExactPosteriorEM(gmm.model)
    assert em.elbo(x, 4).value == pytest.approx(b.log_evidence, abs=1e-9)
    assert list(a.history) == sorted(a.history)


@pytest.mark.parametrize("max_steps", [0, 3, 12])
def test_no_run_has_more_steps_than_allowed(max_steps: int) -> None:
    result = fit(mixture, rows(), num_restarts=3, seed=0, max_steps=max_steps, tol=0)
    assert result.num_steps == max_steps and len(result.starts) == 3
    assert len(result.history) == max_steps


@pytest.mark.parametrize("route", ["plain", "squarem", "callbacks", "generic"])
def test_routes_of_several_starts(route: str) -> None:
    seen = []
    options = {
        "squarem": {"acceleration": "squarem"},
        "callbacks": {"callbacks": lambda step: seen.append(step.index)},
    }.get(route, {})
    y = rows(90, centres=(0.0, 6.0, 12.0))

    def generic(y, K):
        mu = pyro.param("mu", torch.zeros(K))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(K) / K))
            pyro.sample("y", dist.Normal(torch.tanh(mu[z] / 30) * 30, 1.0), obs=y)

    model = generic if route == "generic" else mixture
    result = fit(model, y, 3, num_restarts=4, seed=0, tol=1e-3, **options)
    assert sorted(round(v / 6) for v in result.params["mu"].tolist()) == [0, 1, 2]
    assert not seen or seen.count(0) > 4


def at_call(n: int, error: type[BaseException] | None = None):
    """A callback whose n-th call raises, or asks to stop."""
    calls = itertools.count()

    def callback(step):
        if next(calls) != n:
            return None
        if error is not None:
            raise error("mine")
        return True

    return callback


def test_an_interrupt_or_a_stop_in_a_short_run_loses_nothing() -> None:
    y = rows()
    first = fit(mixture, y, init="kmeans", seed=0)
    after = first.num_steps + 14  # in the second short run
    for callback in (at_call(after, KeyboardInterrupt), at_call(after)):
        result = fit(mixture, y, init="kmeans", num_restarts=5, seed=0, callbacks=callback)
        assert result.log_evidence >= first.log_evidence - 1e-9
        last = result.ends[-1].status
        assert last in (EMStatus.INTERRUPTED, EMStatus.STOPPED)
        torch.testing.assert_close(pyro.param("mu").detach(), result.params["mu"])
        assert result.posterior.probs("z").shape == (60, 2)


def test_an_error_in_a_short_run_keeps_what_was_fitted() -> None:
    y = rows()
    first = fit(mixture, y, init="kmeans", seed=0)

    broken = at_call(first.num_steps + 14, RuntimeError)
    with pytest.raises(RuntimeError, match="mine"):
        fit(mixture, y, init="kmeans", num_restarts=5, seed=0, callbacks=broken)
    torch.testing.assert_close(pyro.param("mu").detach(), first.params["mu"])


def test_candidates_that_collapse_are_replaced() -> None:
    """Two equal rows tempt a component; the starts that fall for it do not use up the others."""
    y = torch.cat([rows(20, centres=(0.0,)), torch.tensor([9.0, 9.0])])
    result = fit(mixture, y, 3, num_restarts=4, seed=0)
    assert len(result.starts) == 4
    assert any(e.has_collapsed for e in result.ends) and "collapsed" in str(result)
    assert result.status is not EMStatus.DEGENERATE


def test_one_start_is_as_before(monkeypatch) -> None:
    monkeypatch.setattr(restarts_module, "_others", None)
    monkeypatch.setattr(beginnings_module, "rows_of", None)
    torch.manual_seed(4)
    result = fit(gmm.model, iris(), 3)
    assert result.start == "values in the model" and len(result.starts) == 1
    assert "runs:" not in str(result)


@pytest.mark.parametrize(
    ("data", "K", "covariance"),
    [("iris", 2, "tied"), ("iris", 3, "full"), ("blobs", 4, "spherical"), ("iris", 4, "diagonal")],
)
def test_no_lower_than_scikit_learn(data: str, K: int, covariance: str) -> None:
    """The whole table: ``python -m tests.benchmarks.starts``."""
    x = iris() if data == "iris" else blobs(1)
    own, _ = ours(x, K, covariance, 5)
    peer, _ = theirs(x.numpy(), K, covariance, 5)
    assert own >= peer - NEAR
