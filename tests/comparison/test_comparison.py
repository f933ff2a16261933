"""compare: one model, one start, every cost counted."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch.distributions import constraints

from pyro_em import (
    AutoAmortizedCategorical,
    ExactPosteriorEM,
    Fixed,
    MonteCarlo,
    TraceExact_ELBO,
    UsageError,
)
from pyro_em.comparison.compare import compare
from pyro_em.comparison.contenders import Direct, standard_contenders
from pyro_em.comparison.table import Comparison
from tests.data_sets import LONDON_COUNTS

pytestmark = pytest.mark.slow  # contenders are trained


_DRAW = torch.Generator().manual_seed(0)
X = torch.cat(
    [
        torch.randn(60, generator=_DRAW, dtype=torch.float64) - 2,
        torch.randn(90, generator=_DRAW, dtype=torch.float64) + 2,
    ]
)


def mixture(x):
    w = pyro.param("w", x.new_tensor([0.5, 0.5]), constraint=constraints.simplex)
    mu = pyro.param("mu", x.new_tensor([-1.0, 1.0]))
    s = pyro.param("s", x.new_tensor([1.5, 1.5]), constraint=constraints.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], s[z]), obs=x)


def london(counts):
    """Deaths per day, 0 to 9, in a mixture of two Poissons: EM's textbook of slowness."""
    w = pyro.param("w", counts.new_tensor([0.3, 0.7]), constraint=constraints.simplex)
    rate = pyro.param("rate", counts.new_tensor([1.0, 2.5]), constraint=constraints.positive)
    with pyro.plate("days", len(counts)), poutine.scale(scale=counts):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("deaths", dist.Poisson(rate[z]), obs=torch.arange(10, dtype=counts.dtype))


def no_guide(*args):
    pass


def exact_svi(model, lr=0.03):
    return SVI(model, no_guide, pyro.optim.Adam({"lr": lr}), TraceExact_ELBO())


@pytest.fixture(scope="module")
def gmm() -> Iterator[Comparison]:
    pyro.clear_param_store()
    yield compare(
        ExactPosteriorEM(mixture),
        X,
        svi_steps=3,
        tol=1e-9,
        learning_rates=(0.01, 0.03, 0.1),
        progress=False,
    )
    pyro.clear_param_store()


def test_em_and_direct_maximisation_agree_and_nothing_is_above_them(gmm: Comparison) -> None:
    em, direct = gmm["exact EM"], gmm["L-BFGS"]
    assert em.final_evidence == pytest.approx(direct.final_evidence, abs=1e-6)
    for by_rate in gmm.sweep.values():
        for curves in by_rate.values():
            for curve in curves:
                assert not curve.failure
                assert max(curve.measure(True)[1]) <= gmm.best + 1e-9 * abs(gmm.best)
    assert gmm.measure == "evidence" and gmm.num_rows == 150
    assert all(r.best_evidence <= gmm.best for r in gmm.table)


def test_all_begin_at_the_same_evidence(gmm: Comparison) -> None:
    runs = [c for by_rate in gmm.sweep.values() for cs in by_rate.values() for c in cs]
    first = runs[0].evidence[0]
    assert math.isfinite(first)
    for run in runs:
        assert run.evidence[0] == pytest.approx(first, rel=1e-9)
        assert run.steps[0] == 0 and run.seconds[0] == 0
        assert list(run.seconds) == sorted(run.seconds)
        assert len(run.steps) == len(run.seconds) == len(run.bound) == len(run.evidence)
    assert gmm.curves["exact EM"][0].bound[0] == pytest.approx(first, rel=1e-9)


def test_svi_is_no_straw_man(gmm: Comparison) -> None:
    for label in ("SVI, exact marginal", "SVI, guide"):
        by_rate = gmm.sweep[label]
        assert {0.01, 0.03, 0.1} <= set(by_rate)
        assert gmm[label].seeds == 5
        for curves in by_rate.values():
            assert set().union(*(c.seeds for c in curves)) == {0, 1, 2, 3, 4}
        finals = {r: sorted(c.evidence[-1] for c in cs)[len(cs) // 2] for r, cs in by_rate.items()}
        best = max(finals, key=finals.__getitem__)
        assert gmm[label].learning_rate == best
        assert gmm[label].final_evidence == pytest.approx(finals[best], rel=1e-12)
        spent = sum(c.seconds[-1] for cs in by_rate.values() for c in cs)
        assert gmm[label].total_seconds == pytest.approx(spent)
        assert gmm[label].total_seconds > gmm[label].seconds  # other rates have to be paid for
        # Beyond the edge of the sweep, or a note that it ends there.
        assert best not in (min(by_rate), max(by_rate)) or "edge of the sweep" in gmm[label].note
    assert len(gmm.curves["SVI, guide"]) == 5
    assert len({c.bound for c in gmm.curves["SVI, guide"]}) == 5
    assert "one run stands for all" in gmm["SVI, exact marginal"].note
    assert len(gmm.curves["SVI, exact marginal"]) == 1


def test_steps_and_seconds_to_the_best(gmm: Comparison) -> None:
    row, curve = gmm["exact EM"], gmm.curves["exact EM"][0]
    k = row.steps_to_best
    target = gmm.best - 0.01 * 150
    assert k is not None and curve.evidence[k] >= target > curve.evidence[k - 1]
    assert row.seconds_to_best == curve.seconds[k] <= row.seconds <= row.total_seconds
    assert row.steps == curve.steps[-1]


def test_the_table_prints(gmm: Comparison) -> None:
    text = str(gmm)
    lines = text.splitlines()
    assert lines[0].startswith("contender") and "seconds with sweep" in lines[0]
    assert [line.split("  ")[0] for line in lines[1:5]] == list(gmm.curves)
    assert f"{gmm.best:.6f} nats, N = 150" in text
    with pytest.raises(KeyError):
        gmm["no such contender"]


def test_the_figure(gmm: Comparison) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    left, right = gmm.plot()
    assert left.get_xlabel() == "steps" and right.get_xlabel() == "wall-clock seconds"
    for ax in (left, right):
        assert ax.get_ylabel() == "gap to the best log evidence (nats per datum)"
        assert ax.get_xscale() == ax.get_yscale() == "log"
        assert len(ax.collections) == 1  # the band of the one contender whose seeds differ
    labels = [t.get_text() for t in left.get_legend().get_texts()]
    assert labels[0] == "exact EM" and labels[-1] == "L-BFGS"
    assert labels[1].startswith("SVI, exact marginal (rate ")
    figure = matplotlib.figure.Figure()
    given = figure.subplots(1, 2)
    assert gmm.plot(given) == tuple(given)


def test_slow_em_loses_to_gradients() -> None:
    """EM needs hundreds of steps where curvature is small; L-BFGS and Adam do not."""
    contenders = {
        "exact EM": ExactPosteriorEM(london),
        "Adam": exact_svi(london),
        "L-BFGS": Direct(),
    }
    found = compare(
        contenders,
        LONDON_COUNTS.double(),
        max_steps=600,
        svi_steps=140,
        tolerance=1e-6,
        learning_rates=(0.03, 0.1),
        seeds=(0,),
        progress=False,
    )
    assert found.num_rows == 1096
    assert found.best == pytest.approx(-1989.945860, abs=1e-5)
    slow, adam, direct = (found[label].steps_to_best for label in contenders)
    assert slow is not None and adam is not None and direct is not None
    assert direct < adam < slow and 5 * direct < slow
    assert found["L-BFGS"].seconds_to_best < found["exact EM"].seconds_to_best


def test_the_callers_store_and_random_state_are_unchanged() -> None:
    em = ExactPosteriorEM(mixture)
    em.fit(X, max_steps=2, progress=False)
    guide = AutoAmortizedCategorical(mixture)
    guide(X)
    store = pyro.get_param_store()
    leaves = dict(store._params)
    values = {n: p.detach().clone() for n, p in leaves.items()}
    random_state = torch.get_rng_state()
    evidence = em.posterior(X).log_evidence
    found = compare(
        {"EM": em, "guide": ExactPosteriorEM(mixture, guide, strategy="guide")},
        X,
        max_steps=5,
        svi_steps=3,
        seeds=(0, 1),
        learning_rates=(0.1,),
        progress=False,
    )
    assert found.curves["EM"][0].evidence[0] == pytest.approx(evidence, rel=1e-12)
    assert dict(store._params).keys() == leaves.keys()
    for name, leaf in store._params.items():
        assert leaf is leaves[name]
        assert torch.equal(leaf, values[name])
    assert torch.equal(torch.get_rng_state(), random_state)


class Mixture(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.mu = torch.nn.Parameter(torch.tensor([-1.0, 1.0]))
        self.s = PyroParam(torch.tensor(1.5), constraints.positive)
        self.net = torch.nn.Linear(1, 1)

    def forward(self, x):
        mu, s = self.mu, self.s
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("x", dist.Normal(mu[z] + self.net(x.new_ones(1)), s), obs=x)


def test_modules_are_as_before_and_begin_alike() -> None:
    model = Mixture()
    state = {n: v.clone() for n, v in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    before = -TraceExact_ELBO().loss(model, no_guide, X)
    pyro.clear_param_store()
    found = compare(
        {"Adam": exact_svi(model), "L-BFGS": Direct(), "EM": ExactPosteriorEM(model)},
        X,
        max_steps=5,
        svi_steps=5,
        learning_rates=(0.03,),
        seeds=(0, 1),
        progress=False,
    )
    for row in found.table:
        assert row.note == "" or "failed" not in row.note
        assert found.curves[row.contender][0].evidence[0] == pytest.approx(before, rel=1e-9)
        assert row.final_evidence > before + 1
    assert len(pyro.get_param_store()) == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert {n: id(p) for n, p in model.named_parameters()} == {
        n: id(p) for n, p in parameters.items()
    }
    assert all(p.grad is None for p in model.parameters())


def test_networks_behind_pyro_module_and_guides_that_set_themselves_up() -> None:
    network = torch.nn.Linear(1, 1)
    weight = network.weight.detach().clone()

    def model(x):
        pyro.module("network", network)
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(network(h.exp()[..., None])[..., 0], 1.0), obs=x)

    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    found = compare(
        {"SVI": svi}, X[:20], svi_steps=30, learning_rates=(0.03,), seeds=(0, 1, 2), progress=False
    )
    assert found.measure == "bound" and found.num_rows == 20
    row = found["SVI"]
    assert row.final_evidence is None and row.best_evidence is None and not row.note.count("failed")
    assert len({c.bound for c in found.curves["SVI"]}) == 3
    assert torch.equal(network.weight, weight)
    assert guide.prototype_trace is None and not list(guide.parameters())
    assert len(pyro.get_param_store()) == 0
    assert found.plot()[0].get_ylabel() == "gap to the best log bound (nats per datum)"


def test_a_contender_that_fails_is_a_row_with_its_reason() -> None:
    def nan_loss(model, guide, *args):
        return TraceExact_ELBO().differentiable_loss(model, guide, *args) * math.nan

    def no_latent(x):
        raise RuntimeError("this guide breaks")

    adam = pyro.optim.Adam({"lr": 0.1})
    found = compare(
        {
            "EM": ExactPosteriorEM(mixture),
            "nan": SVI(mixture, no_guide, adam, nan_loss),
            "broken": SVI(mixture, no_latent, adam, Trace_ELBO()),
        },
        X,
        svi_steps=5,
        learning_rates=(0.1,),
        seeds=(0, 1),
        progress=False,
    )
    assert found["nan"].note == "2 of 2 runs failed: the bound was nan at step 0"
    assert found["broken"].note == "2 of 2 runs failed: RuntimeError: this guide breaks"
    assert found["nan"].final_evidence is None and found["nan"].steps_to_best is None
    assert found["EM"].final_evidence == found.best
    assert "never" in str(found)


def test_too_large_a_learning_rate_does_not_win() -> None:
    found = compare(
        {"SVI": exact_svi(mixture)},
        X,
        svi_steps=30,
        learning_rates=(0.1, 1e4),
        seeds=(0, 1),
        progress=False,
    )
    assert found["SVI"].learning_rate == 0.1
    assert set(found.sweep["SVI"]) >= {0.03, 0.1, 1e4}  # its own rate takes part


def test_enumerating_svi_and_an_optimiser_that_cannot_be_changed() -> None:
    guide = AutoAmortizedCategorical(mixture, hidden=(4,))
    found = compare(
        {
            "TraceEnum": SVI(
                config_enumerate(mixture),
                config_enumerate(guide),
                pyro.optim.Adam(lambda name: {"lr": 0.05}),
                TraceEnum_ELBO(max_plate_nesting=1),
            ),
            "torch optimiser": ExactPosteriorEM(
                mixture, guide, lambda p: torch.optim.SGD(p, lr=1e-4), strategy="guide"
            ),
        },
        X,
        svi_steps=4,
        learning_rates=(1e-4, 1e-3),
        seeds=(0, 1),
        progress=False,
    )
    assert found["TraceEnum"].learning_rate is None
    assert "keeps its own learning rates" in found["TraceEnum"].note
    assert len(found.sweep["TraceEnum"]) == 1
    assert {1e-4, 1e-3} <= set(found.sweep["torch optimiser"])
    first, second = (found.sweep["torch optimiser"][r][0] for r in (1e-4, 1e-3))
    assert first.evidence[-1] != second.evidence[-1]
    assert all(r.final_evidence is not None for r in found.table)


def test_a_random_e_step_has_seeds_and_seconds_end_a_run() -> None:
    found = compare(
        {"MCEM": ExactPosteriorEM(mixture, strategy=MonteCarlo(2)), "Adam": exact_svi(mixture)},
        X,
        max_steps=10,
        svi_steps=100_000,
        seconds=0.3,
        learning_rates=(0.03,),
        seeds=(0, 1),
        progress=False,
    )
    assert found["MCEM"].seeds == 2 and len({c.evidence for c in found.curves["MCEM"]}) == 2
    assert found["Adam"].steps < 100_000 and 0.3 <= found["Adam"].seconds < 3


@pytest.mark.parametrize(
    ("contenders", "sentence"),
    [
        ({}, "compare: contenders: it is empty"),
        ([ExactPosteriorEM(mixture)], "compare: contenders: list"),
        ({"a": mixture}, "contender 'a': function is no method of inference"),
        ({"a": Direct}, "contender 'a': the class Direct is no method of inference"),
        ({"a": Direct()}, "compare: no contender has a model"),
        (
            {"a": ExactPosteriorEM(mixture), "b": ExactPosteriorEM(lambda x: None)},
            "contender 'b': its model and that of 'a' differ: one has no parameter 'mu'",
        ),
    ],
)
def test_bad_contenders_get_a_sentence(contenders, sentence) -> None:
    with pytest.raises(UsageError, match=sentence):
        compare(contenders, X, progress=False)
    assert len(pyro.get_param_store()) == 0


def test_bad_numbers_and_colliding_names_get_a_sentence() -> None:
    em = ExactPosteriorEM(mixture)
    with pytest.raises(UsageError, match="svi_steps=0"):
        compare({"a": em}, X, svi_steps=0)
    with pytest.raises(UsageError, match="different seeds"):
        compare({"a": em}, X, seeds=(1, 1))
    with pytest.raises(UsageError, match=r"seconds=-1"):
        compare({"a": em}, X, seconds=-1)

    def collides(x, seeds):
        mixture(x)

    with pytest.raises(UsageError, match="'seeds' is also a keyword of compare"):
        compare({"a": ExactPosteriorEM(collides)}, X)
    with pytest.raises(UsageError, match="updates holds 'mu' fixed"):
        standard_contenders(ExactPosteriorEM(mixture, updates={"mu": Fixed()}))


def test_one_em_that_draws_has_no_standard_contenders() -> None:
    def model(x):
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    def guide(x):
        with pyro.plate("n", len(x)):
            pyro.sample("h", dist.Normal(pyro.param("a", torch.tensor(0.0)) * x, 1.0))

    before = len(pyro.get_param_store())
    with pytest.raises(UsageError, match=r"no exact EM to compare with(.|\n)*pass a mapping"):
        compare(ExactPosteriorEM(model, guide, strategy="guide"), torch.zeros(3), progress=False)
    assert len(pyro.get_param_store()) == before


def test_the_best_drawn_bound_is_not_the_luckiest_draw() -> None:
    """Linear and Gaussian, which the model hides: the evidence is known, no bound is above it."""
    x = X

    def model(x):
        mu = pyro.param("mu", x.new_tensor(0.0))
        s = pyro.param("s", x.new_tensor(1.0), constraint=constraints.positive)
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(h.sinh().asinh(), s), obs=x)

    def guide(x):
        a = pyro.param("a", x.new_tensor(0.3))
        t = pyro.param("t", x.new_tensor(0.5), constraint=constraints.positive)
        with pyro.plate("n", len(x)):
            pyro.sample("h", dist.Normal(a * x, t))

    adam = pyro.optim.Adam({"lr": 0.1})
    found = compare(
        {
            "joint": ExactPosteriorEM(model, guide, adam),
            "SVI": SVI(model, guide, adam, Trace_ELBO()),
        },
        x,
        svi_steps=80,
        learning_rates=(0.1,),
        seeds=(0, 1),
        progress=False,
    )
    deviation = max(float(x.std(correction=0)), 1.0)
    evidence = float(dist.Normal(x.mean(), deviation).log_prob(x).sum())
    assert found.measure == "bound"
    luckiest = max(r.top(False) for s in found.sweep.values() for cs in s.values() for r in cs)
    assert luckiest > evidence + 0.5  # noise of the means of twenty draws
    assert found.best < evidence + 0.5
    assert any(row.steps_to_best is not None for row in found.table)
    gaps = found.gaps(found.curves["joint"])[1]
    assert gaps.min() >= 1e-3
