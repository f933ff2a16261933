"""Which latents are summed, drawn or estimated; what the plan says; what is refused, in words."""

from __future__ import annotations

import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pyro.infer.autoguide as auto
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch.distributions import constraints
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyro_em import Alternating, ExactPosteriorEM, PyroEMError, PyroEMWarning
from pyro_em.fitting.results.history import EMStatus
from pyro_em.variational.recovery import Recovery

T = torch.tensor


def mixture(x):
    """A continuous code under a label, both per row."""
    w = pyro.param("w", T([0.4, 0.6]), constraint=constraints.simplex)
    with pyro.plate("n", len(x)):
        y = pyro.sample("y", dist.Categorical(w))
        h = pyro.sample("h", dist.Normal(T([-1.0, 1.0])[y], 1.0))
        pyro.sample("x", dist.Normal(h, 0.5), obs=x)


def both(x):
    """A guide of both latents, independent."""
    a = pyro.param("a", T(0.5))
    with pyro.plate("n", len(x)):
        pyro.sample("y", dist.Categorical(logits=torch.zeros(2)))
        pyro.sample("h", dist.Normal(a * x, 0.5))


def y_then_h(x):
    """q(y | x) q(h | x, y)."""
    a = pyro.param("a", T([0.5, 0.7]))
    with pyro.plate("n", len(x)):
        y = pyro.sample("y", dist.Categorical(logits=torch.stack([-x, x], -1)))
        pyro.sample("h", dist.Normal(a[y] * x, 0.5))


def bayesian(x):
    """Global continuous latents, one per component, and labels."""
    w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("k", 2):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], s), obs=x)


def normal(x):
    with pyro.plate("n", len(x)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(h, 1.0), obs=x)


def normal_guide(x):
    a = pyro.param("a", T(0.1))
    with pyro.plate("n", len(x)):
        pyro.sample("h", dist.Normal(a * x, 0.7))


def routes(em: ExactPosteriorEM, *args) -> dict[str, str]:
    return {r.site: r.route for r in em.plan(*args).routes}


def reasons(em: ExactPosteriorEM, *args) -> dict[str, str]:
    return {r.site: r.reason for r in em.plan(*args).routes}


def says(text: str, *words: str) -> None:
    for word in words:
        assert word in text, f"{word!r} is not in:\n{text}"


X = [-1.5, -0.5, 0.7, 2.0]


# ------------------------------------------------------------------ routes


def test_an_exact_latent_leaves_its_guide_site_unused() -> None:
    em = ExactPosteriorEM(mixture, both, strategy={"h": "guide"})
    plan = str(em.plan(T(X)))
    assert routes(em, T(X)) == {"y": "enumerate", "h": "guide"}
    says(plan, "its guide site is not used", "reparameterised draw", "stochastic", "no optim")


def test_a_guide_site_that_another_needs_is_kept() -> None:
    em = ExactPosteriorEM(mixture, y_then_h)
    assert routes(em, T(X)) == {"y": "guide", "h": "guide"}
    says(reasons(em, T(X))["y"], "guide's site 'h' depends on it", "enumerated in the guide")


def test_past_the_budget_the_guide_takes_over_and_the_cost_is_named() -> None:
    x = torch.randn(50)

    def model(x):
        with pyro.plate("n", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(30) / 30))
            z = pyro.sample("z", dist.Categorical(torch.ones(30) / 30))
            pyro.sample("x", dist.Normal((y + z).to(x.dtype), 1.0), obs=x)

    def guide(x):
        lo = pyro.param("lo", torch.zeros(30))
        with pyro.plate("n", len(x)):
            pyro.sample("y", dist.Categorical(logits=lo))
            pyro.sample("z", dist.Categorical(logits=lo))

    assert set(routes(ExactPosteriorEM(model, guide), x).values()) == {"enumerate"}
    em = ExactPosteriorEM(model, guide, max_enumeration=10_000)
    assert "guide" in routes(em, x).values()
    words = " ".join(reasons(em, x).values())
    says(words, "45,000 cells", "max_enumeration=10,000", "score function")
    assert "enumerated in the guide" not in words  # that table would be no smaller
    alone = ExactPosteriorEM(model, max_enumeration=10_000)
    assert set(routes(alone, x).values()) == {"none"}
    with pytest.raises(PyroEMError, match="max_enumeration"):
        alone.fit(x)


def test_strategies_by_name_and_glob() -> None:
    def model(x):
        with pyro.plate("n", len(x)):
            zs = [pyro.sample(f"z_{t}", dist.Bernoulli(0.3)) for t in range(3)]
            y = pyro.sample("y", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(sum(zs) + y, 1.0), obs=x)

    def guide(x):
        p = pyro.param("p", T(0.4), constraint=constraints.unit_interval)
        with pyro.plate("n", len(x)):
            for name in ("z_0", "z_1", "z_2", "y"):
                pyro.sample(name, dist.Bernoulli(p))

    def at(strategy):
        pyro.clear_param_store()
        return routes(ExactPosteriorEM(model, guide, strategy=strategy), T(X))

    assert set(at("exact").values()) == {"enumerate"}
    assert set(at("guide").values()) == {"guide"}
    assert at({"z_*": "guide"}) == {
        "z_0": "guide",
        "z_1": "guide",
        "z_2": "guide",
        "y": "enumerate",
    }
    assert at({"z_*": "guide", "z_1": "exact"})["z_1"] == "enumerate"
    em = ExactPosteriorEM(model, guide, strategy={"z_*": "guide"})
    says(reasons(em, T(X))["z_0"], "strategy='guide'", "enumerated in the guide")


def test_strategy_guide_sums_what_the_guide_lacks() -> None:
    em = ExactPosteriorEM(mixture, lambda x: normal_guide(x), strategy="guide")
    assert routes(em, T(X)) == {"y": "enumerate", "h": "guide"}
    says(reasons(em, T(X))["y"], "the guide lacks it")


def test_an_unneeded_guide_is_said() -> None:
    def model(x):
        mu = pyro.param("mu", T([-1.0, 1.0]))
        with pyro.plate("n", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(mu[y], 1.0), obs=x)

    def guide(x):
        with pyro.plate("n", len(x)):
            pyro.sample("y", dist.Categorical(logits=pyro.param("lo", torch.zeros(2))))

    em = ExactPosteriorEM(model, guide)
    says(str(em.plan(T(X))), "the guide is not used")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert em.fit(T(X), progress=False).log_evidence is not None


def test_points_and_labels_are_exact_whatever_the_guide_has_beside() -> None:
    """A Delta for the means; a guide site of the summed label that stays unused."""

    def guide(x):
        pyro.sample("w", dist.Delta(pyro.param("pw", T([0.5, 0.5])), event_dim=1))
        pyro.sample("s", dist.Delta(pyro.param("ps", T(1.0), constraint=constraints.positive)))
        with pyro.plate("k", 2):
            pyro.sample("mu", dist.Delta(pyro.param("pm", T([-1.0, 1.0]))))
        with pyro.plate("n", len(x)):
            pyro.sample("z", dist.Categorical(logits=pyro.param("lo", torch.zeros(2))))

    em = ExactPosteriorEM(bayesian, guide)
    want = dict.fromkeys(("w", "s", "mu"), "point estimate") | {"z": "enumerate"}
    assert routes(em, T(X)) == want
    terms = em.elbo(T(X))
    assert terms.exact and terms.gap == pytest.approx(0.0, abs=1e-9)


def test_a_delta_with_a_log_density_is_no_point() -> None:
    def guide(x):
        with pyro.plate("n", len(x)):
            pyro.sample("h", dist.Delta(pyro.param("a", torch.zeros(4)), log_density=T(0.7)))

    em = ExactPosteriorEM(normal, guide)
    assert routes(em, T(X)) == {"h": "guide"}
    x = T(X)
    want = dist.Normal(0.0, 1.0).log_prob(torch.zeros(4)) + dist.Normal(0.0, 1.0).log_prob(x) - 0.7
    assert em.elbo(x).value == pytest.approx(float(want.sum()), abs=1e-9)


# ------------------------------------------------------------------ autoguides

GUIDES = {
    "AutoNormal": auto.AutoNormal,
    "AutoDiagonalNormal": auto.AutoDiagonalNormal,
    "AutoMultivariateNormal": auto.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": auto.AutoLowRankMultivariateNormal,
    "AutoIAFNormal": partial(auto.AutoIAFNormal, hidden_dim=[8]),
    "AutoDelta": auto.AutoDelta,
    "AutoLaplaceApproximation": auto.AutoLaplaceApproximation,
    "partial": partial(auto.AutoNormal, init_scale=0.3),
    "factory": lambda model: auto.AutoNormal(model, init_scale=0.3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(GUIDES))
def test_autoguides_of_a_model_with_labels(name) -> None:
    em = ExactPosteriorEM(bayesian, GUIDES[name], lambda p: torch.optim.Adam(p, lr=0.02))
    found = routes(em, T(X))
    points = name == "AutoDelta"
    assert found["z"] == "enumerate"
    if name == "AutoLaplaceApproximation":
        # Its Deltas of constrained sites carry a Jacobian: no plain points.
        assert (found["mu"], found["s"]) == ("point estimate", "guide")
    else:
        assert {found[n] for n in ("w", "s", "mu")} == {"point estimate" if points else "guide"}
    before = em.elbo(T(X), num_particles=20).value
    result = em.fit(T(X), max_steps=4, seed=0, progress=False)
    assert em.elbo(T(X), num_particles=20).value > before - 1.0
    assert result.posterior.probs("z").shape == (4, 2)


def test_a_list_of_autoguides() -> None:
    def build(model):
        guide = auto.AutoGuideList(model)
        guide.append(auto.AutoNormal(poutine.block(model, hide=["w"])))
        guide.append(auto.AutoDelta(poutine.block(model, expose=["w"])))
        return guide

    em = ExactPosteriorEM(bayesian, build)
    found = routes(em, T(X))
    assert found == {"w": "point estimate", "s": "guide", "mu": "guide", "z": "enumerate"}
    assert em.elbo(T(X)).log_prior == pytest.approx(0.0, abs=1e-9)  # log Dirichlet(1, 1) density


def test_an_autoguide_on_the_full_model_gets_advice() -> None:
    with pytest.raises(PyroEMError) as error:
        ExactPosteriorEM(bayesian, auto.AutoNormal(bayesian)).plan(T(X))
    says(str(error.value), "AutoNormal", "pass the class", "poutine.block")


@pytest.mark.parametrize(
    "cls", [auto.AutoNormalMessenger, auto.AutoHierarchicalNormalMessenger, auto.AutoGaussian]
)
def test_every_kind_of_autoguide_on_the_full_model_gets_advice(cls) -> None:
    with pytest.raises(PyroEMError) as error:
        ExactPosteriorEM(bayesian, cls(bayesian)).plan(T(X))
    says(str(error.value), f"ExactPosteriorEM(model, {cls.__name__})", "poutine.block")


def test_a_class_that_needs_more_than_a_model() -> None:
    with pytest.raises(PyroEMError) as error:
        ExactPosteriorEM(bayesian, auto.AutoNormalizingFlow).plan(T(X))
    says(str(error.value), "init_transform_fn", "lambda model: AutoNormalizingFlow(model, ...)")
    with pytest.raises(PyroEMError, match="building it raised ZeroDivisionError"):
        ExactPosteriorEM(bayesian, lambda model: 1 / 0).plan(T(X))


def test_a_list_of_autoguides_with_labels_is_built_on_the_whole_model() -> None:
    def build(model):
        guide = auto.AutoGuideList(model)
        guide.append(auto.AutoNormal(poutine.block(bayesian, hide=["z"])))
        guide.append(auto.AutoDiscreteParallel(poutine.block(bayesian, expose=["z"])))
        return guide

    with pytest.raises(PyroEMError, match="on the whole model"):
        ExactPosteriorEM(bayesian, build).plan(T(X))
    em = ExactPosteriorEM(bayesian, build(bayesian), strategy="guide")
    assert set(routes(em, T(X)).values()) == {"guide"}


def test_an_autoguide_built_by_the_user_on_the_continuous_part() -> None:
    guide = auto.AutoNormal(poutine.block(bayesian, hide=["z"]))
    em = ExactPosteriorEM(bayesian, guide)
    assert routes(em, T(X))["z"] == "enumerate" and em.guide is guide


# ------------------------------------------------------------------ refusals


def refused(call, *words: str) -> None:
    with pytest.raises(PyroEMError) as error:
        call()
    says(str(error.value), *words)


def test_latents_without_a_route() -> None:
    def bent(x):
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(h.exp(), 1.0), obs=x)

    assert routes(ExactPosteriorEM(bent), T(X)) == {"h": "none"}
    refused(lambda: ExactPosteriorEM(bent).fit(T(X)), "'h'", "guide", "not linear in 'h' (exp)")

    def misses(x):
        pyro.sample("s", dist.Delta(pyro.param("ps", T(1.0))))

    em = ExactPosteriorEM(bayesian, misses)
    assert routes(em, T(X)) == {"w": "none", "s": "point estimate", "mu": "none", "z": "enumerate"}
    refused(lambda: em.fit(T(X)), "'w'", "'mu'", "the guide lacks it")


def test_guide_sites_that_do_not_fit() -> None:
    def stranger(x):
        normal_guide(x)
        pyro.sample("q", dist.Normal(0.0, 1.0))

    refused(lambda: ExactPosteriorEM(normal, stranger).plan(T(X)), "'q'", "no such site", "'h'")

    def observed(x):
        normal_guide(x)
        pyro.sample("x", dist.Normal(0.0, 1.0))

    refused(lambda: ExactPosteriorEM(normal, observed).plan(T(X)), "'x'", "observes")

    def larger(x):
        with pyro.plate("n", len(x) + 1):
            pyro.sample("h", dist.Normal(pyro.param("a", T(0.0)), 1.0))

    refused(lambda: ExactPosteriorEM(normal, larger).plan(T(X)), "plate 'n'", "5", "4")


def labelled(x):
    mu = pyro.param("mu", T([-1.0, 1.0]))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda: dist.Normal(pyro.param("a", T(0.0)), 1.0), ("Normal is continuous", "discrete")),
        (lambda: dist.Bernoulli(pyro.param("a", T(0.4))), ("values of different types",)),
        (lambda: dist.Categorical(logits=pyro.param("a", torch.zeros(3))), ("3 values", " 2.")),
        (lambda: dist.OneHotCategorical(torch.ones(2) / 2), ("event shape is (2,)", "()")),
    ],
)
def test_draws_of_another_kind_are_refused(fn, words) -> None:
    """Unchecked, torch raises an IndexError inside the model at the first step."""

    def guide(x):
        with pyro.plate("n", len(x)):
            pyro.sample("z", fn())

    em = ExactPosteriorEM(labelled, guide, strategy="guide")
    refused(lambda: em.plan(T(X)), "guide site 'z'", *words)


def test_counts_for_a_continuous_latent_are_refused() -> None:
    """A mass beside a density would be a bound on nothing."""

    def guide(x):
        with pyro.plate("n", len(x)):
            pyro.sample("h", dist.Poisson(pyro.param("a", T(1.0))))

    refused(lambda: ExactPosteriorEM(normal, guide).plan(T(X)), "Poisson is discrete", "continuous")


def test_a_guide_of_fewer_values_is_a_guide() -> None:
    """q(z = 2) = 0: the gap is the divergence, by hand."""

    def model(x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(T([-1.0, 1.0, 2.0])[z], 1.0), obs=x)

    def guide(x):
        with pyro.plate("n", len(x)):
            pyro.sample("z", dist.Categorical(logits=pyro.param("lo", torch.zeros(2))))

    x = T(X)
    log_x = dist.Normal(T([-1.0, 1.0]), 1.0).log_prob(x[:, None])
    want = float((log_x - torch.tensor(3.0).log() + torch.tensor(2.0).log()).mean(-1).sum())
    terms = ExactPosteriorEM(model, guide, strategy="guide").elbo(x)
    assert terms.value == pytest.approx(want, abs=1e-5) and terms.gap > 0.1


def test_point_estimates_outside_the_support_are_refused() -> None:
    def model(x):
        r = pyro.sample("r", dist.Exponential(1.0))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(r, 1.0), obs=x)

    def guide(x):
        pyro.sample("r", dist.Delta(pyro.param("a", T(start))))

    start = -1.0
    refused(lambda: ExactPosteriorEM(model, guide).plan(T(X)), "'r'", "outside the support")
    pyro.clear_param_store()
    start = 0.3  # inside; the data pull it out, and no MAP estimate out there is published
    with pytest.warns(PyroEMWarning, match=r"site 'r'.*outside its support"):
        result = ExactPosteriorEM(model, guide).fit(T(X) - 4.0)
    assert result.status is EMStatus.DEGENERATE and float(result.params["a"]) > 0


@pytest.mark.parametrize("how", ["drawn", "summed", "enumerated"])
def test_draws_outside_the_support_end_a_fit_by_name(how) -> None:
    """Exponential(1) at -3 would count e^3 where a record is asked, and crash where torch is."""

    def model(x):
        r = pyro.sample("r", dist.Exponential(1.0))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2)) if how != "drawn" else 1.0
            pyro.sample("x", dist.Normal(z * r, 1.0), obs=x)

    def guide(x):
        pyro.sample("r", dist.Normal(pyro.param("a", T(-3.0)), 0.1))
        if how == "enumerated":
            with pyro.plate("n", len(x)):
                pyro.sample("z", dist.Categorical(torch.ones(2) / 2))

    em = ExactPosteriorEM(model, guide, strategy="guide" if how == "enumerated" else "exact")
    refused(lambda: em.fit(T(X), max_steps=2, progress=False), "step 0", "site 'r'", "LogNormal")
    refused(lambda: em.elbo(T(X)), "site 'r'")
    assert float(pyro.param("a")) == -3.0


def test_nan_under_an_enumerated_guide_keeps_the_last_good_parameters() -> None:
    def model(x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            h = pyro.sample("h", dist.StudentT(3.0, 0.0, 1.0))
            pyro.sample("x", dist.Normal(h + z, 1.0), obs=x)

    def guide(x):
        s = pyro.param("s", T(0.5))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("h", dist.Normal(z.to(x.dtype), s.sqrt()))

    em = ExactPosteriorEM(model, guide, lambda p: torch.optim.SGD(p, lr=0.3))
    with pytest.warns(PyroEMWarning, match=r"step \d+: .*parameter scale"):
        result = em.fit(T(X), max_steps=300, seed=0, progress=False)
    assert result.status is EMStatus.DEGENERATE and float(result.params["s"]) > 0


def test_a_normal_guide_of_a_positive_latent_runs_as_in_pyro() -> None:
    """Pyro's second regression tutorial: its divergence is infinite, its draws are all inside."""

    def model(x):
        s = pyro.sample("s", dist.Uniform(0.0, 10.0))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(0.0, s), obs=x)

    def guide(x):
        pyro.sample("s", dist.Normal(pyro.param("m", T(1.5)), 0.05))

    em = ExactPosteriorEM(model, guide, lambda p: torch.optim.Adam(p, lr=0.01))
    assert "closed form" not in str(em.plan(T(X)))
    terms = em.elbo(T(X), num_particles=100)
    loss = pyro.infer.Trace_ELBO()
    theirs = torch.tensor([-loss.loss(model, guide, T(X)) for _ in range(100)])
    error = (terms.standard_error**2 + float(theirs.var()) / 100) ** 0.5
    assert abs(terms.value - float(theirs.mean())) < 3.5 * error
    assert em.fit(T(X), max_steps=5, progress=False).status is EMStatus.STEPS_DONE


def test_a_discrete_latent_without_a_route_is_not_sent_to_point_estimates() -> None:
    def model(x):
        c = pyro.sample("c", dist.Poisson(3.0))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    for guide in ("map", auto.AutoNormal):
        assert routes(ExactPosteriorEM(model, guide), T(X)) == {"c": "none"}
        with pytest.raises(PyroEMError) as error:
            ExactPosteriorEM(model, guide).fit(T(X))
        says(str(error.value), "'c'", "infinite support", "truncate it")
        assert "pass guide='map'" not in str(error.value)


def test_one_draw_for_a_whole_plate_is_refused() -> None:
    """Pyro: "Model and guide shapes disagree at site 'h'"."""

    def guide(x):
        pyro.sample("h", dist.Normal(pyro.param("a", T(0.0)), 1.0))

    refused(lambda: ExactPosteriorEM(normal, guide).plan(T(X)), "'h'")


def test_draws_along_another_dim_are_refused() -> None:
    def model(x):
        with pyro.plate("n", len(x), dim=-2):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x[:, None])

    def guide(x):
        pyro.sample("h", dist.Normal(pyro.param("a", torch.zeros(4)), 1.0))

    refused(lambda: ExactPosteriorEM(model, guide).plan(T(X)), "'h'")


def test_a_guide_that_raises() -> None:
    def guide(x):
        raise ValueError("no such luck")

    refused(lambda: ExactPosteriorEM(normal, guide).plan(T(X)), "guide", "no such luck")


def test_an_unknown_number_of_data_names_the_users_site() -> None:
    em = ExactPosteriorEM(with_global, with_global_guide, strategy="guide")
    loader = DataLoader(Stream(torch.randn(8)), 4)
    refused(lambda: em.fit(loader, num_epochs=1, progress=False), "'g'")


class Stream(IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x)


def with_global(x):
    g = pyro.sample("g", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(g, 1.0), obs=x)


def with_global_guide(x):
    pyro.sample("g", dist.Normal(pyro.param("a", T(0.1)), 0.5))


def test_loaders() -> None:
    em = ExactPosteriorEM(with_global, with_global_guide, strategy="guide")
    loader = DataLoader(Stream(torch.randn(8)), 4)
    refused(lambda: em.fit(loader, num_epochs=1, progress=False), "num_data")
    assert em.fit(loader, num_epochs=1, num_data=8, progress=False).num_steps == 2
    refused(lambda: em.fit(loader, batch_size=2), "batch_size", "DataLoader")
    refused(lambda: em.step(loader), "one batch")


def test_a_loader_of_other_arguments_than_the_models() -> None:
    """(x, y) for a model of x, and x for a model of (x, y); by keyword it is complete."""
    x, y = torch.randn(8), torch.zeros(8)
    em = ExactPosteriorEM(normal, normal_guide, strategy="guide")
    both = DataLoader(TensorDataset(x, y), 4)
    refused(lambda: em.fit(both, num_epochs=1), "DataLoader", "2 items", "takes 'x'", "labels=None")
    one = DataLoader(TensorDataset(x), 4)
    assert em.fit(one, num_epochs=1, progress=False).num_steps == 2

    def of_two(x, y, on=True):
        normal(x)

    def guide(x, y, on=True):
        normal_guide(x)

    em = ExactPosteriorEM(of_two, guide, strategy="guide")
    refused(lambda: em.fit(one, num_epochs=1), "1 item;", "'x', 'y'", "fit(loader, y=...)")
    assert em.fit(one, num_epochs=1, y=0.0, progress=False).num_steps == 2
    assert em.fit(both, num_epochs=1, progress=False).num_steps == 2
    assert em.fit(one, y, num_epochs=1, progress=False).num_steps == 2


def test_an_empty_loader() -> None:
    em = ExactPosteriorEM(normal, normal_guide)
    loader = DataLoader(TensorDataset(torch.zeros(0)), 2)
    refused(lambda: em.fit(loader, num_epochs=1, progress=False), "empty")


def test_keywords_of_the_other_kind_of_fit() -> None:
    def model(x):
        mu = pyro.param("mu", T([-1.0, 1.0]))
        with pyro.plate("n", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(mu[y], 1.0), obs=x)

    refused(lambda: ExactPosteriorEM(model).fit(T(X), batch_size=2), "batch_size", "exact fit")
    em = ExactPosteriorEM(normal, normal_guide, strategy="guide")
    refused(lambda: em.fit(T(X), init="random"), "init", "stochastic")
    refused(lambda: em.fit(T(X), num_restarts=3), "num_restarts", "stochastic")
    refused(lambda: em.fit(T(X), batch_size=9), "batch_size=9", "4 rows")
    refused(lambda: em.fit(T(X), batch_size=2, schedule="both"), "schedule")
    refused(lambda: em.elbo(T(X), q={"h": torch.ones(4)}), "q was given")
    refused(lambda: em.estimate_evidence(T(X), proposal="posterior"), "no exact posterior")
    refused(lambda: em.estimate_evidence(T(X), proposal="oracle"), "oracle")


# ------------------------------------------------------------------ fits that break


def breaking(at: int):
    """A model whose loss is NaN at run ``at`` after being armed."""
    count = {"left": 10**9}

    def model(x):
        count["left"] -= 1
        b = pyro.param("b", T(1.0))
        scale = b * (float("nan") if count["left"] == 0 else 1.0)
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(h * scale, 1.0, validate_args=False), obs=x)

    return model, count


def test_a_nan_loss_keeps_the_last_good_parameters_and_names_the_step() -> None:
    model, count = breaking(5)
    em = ExactPosteriorEM(
        model, normal_guide, lambda p: torch.optim.SGD(p, lr=0.01), strategy="guide"
    )
    seen = []

    def watch(step) -> None:
        seen.append({n: v.detach().clone() for n, v in step.params.items()})
        if len(seen) == 5:
            count["left"] = 1

    with pytest.warns(PyroEMWarning, match="step 5"):
        result = em.fit(T(X), max_steps=20, callbacks=watch, seed=0, progress=False)
    assert result.status is EMStatus.DEGENERATE and result.num_steps == 5
    for name, value in seen[-1].items():
        assert torch.equal(result.params[name], value)
    assert not result.converged
    says(result.message, "step 5", "kept")


def test_a_step_too_far_returns_to_parameters_with_a_finite_bound() -> None:
    em = ExactPosteriorEM(
        normal, normal_guide, lambda p: torch.optim.SGD(p, lr=1e200), strategy="guide"
    )
    with pytest.warns(PyroEMWarning):
        result = em.fit(T(X), max_steps=20, seed=0, progress=False)
    assert result.status is EMStatus.DEGENERATE
    assert torch.isfinite(T(result.elbo))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("far", [3, 8, 13, 21])
def test_parameters_that_broke_are_replaced_by_a_late_copy(far: int, fused: bool) -> None:
    """One step is so long that the next loss is infinite."""
    seen = []

    class Breaks(torch.optim.SGD):
        def step(self, closure=None):
            seen.append({n: pyro.param(n).detach().clone() for n in pyro.get_param_store()})
            if len(seen) == far + 1:
                self.param_groups[0]["lr"] = 1e200
            return super().step(closure)

    em = ExactPosteriorEM(
        normal, normal_guide, lambda p: Breaks(p, lr=0.01, fused=fused), strategy="guide"
    )
    em.fit(T(X), max_steps=1, seed=0, progress=False)
    with pytest.warns(PyroEMWarning, match=f"step {far + 1}"):
        result = em.fit(T(X), max_steps=50, progress=False)
    assert result.status is EMStatus.DEGENERATE and len(seen) == far + 1
    at = next(i for i, s in enumerate(seen) if all(torch.equal(s[n], result.params[n]) for n in s))
    assert far + 1 - 8 <= at <= far and (fused or at == far)
    kept = "The last good parameters" if at == far else f"that entered step {at}"
    says(result.message, kept, "were kept")


class _Recorded(torch.optim.SGD):
    """Notes what enters each step; one step is so long that the next loss is infinite."""

    def __init__(self, parameters, far: int) -> None:
        super().__init__(parameters, lr=0.01, fused=True)
        self.far, self.seen = far, []

    def step(self, closure=None):
        store = pyro.get_param_store()
        self.seen.append({n: store[n].detach().clone() for n in store})
        if len(self.seen) == self.far + 1:
            self.param_groups[0]["lr"] = 1e200
        return super().step(closure)


def test_a_parameter_that_few_steps_read_returns_with_the_others() -> None:
    built: list[_Recorded] = []

    def model(x, whole):
        b = pyro.param("b", T(0.0)) if whole else 0.0
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(h + b, 1.0), obs=x)

    def guide(x, whole):
        normal_guide(x)

    def optim(parameters):
        built.append(_Recorded(parameters, far=22))
        return built[-1]

    em = ExactPosteriorEM(model, guide, optim, strategy="guide")
    with pytest.raises(PyroEMError, match="that entered step 16 were kept"):
        for i in range(50):
            em.step(T(X), i % 3 == 0)  # not by the steps 8 and 16
    assert len(built) == 1
    for name, value in built[0].seen[16].items():
        assert torch.equal(pyro.param(name), value)


def test_a_step_may_read_no_parameter() -> None:
    kept, parameter = Recovery(), torch.zeros(2)
    kept.keep({}, 0, at_once=False)
    kept.put_back()
    assert kept.step is None
    for step, read in enumerate(({"p": parameter}, {}, {"p": parameter})):
        kept.keep(read, step, at_once=True)
        parameter += 1.0
    kept.put_back()
    assert kept.step == 2 and parameter.tolist() == [2.0, 2.0]


def test_a_later_fit_that_breaks_at_once_says_which_parameters_it_kept() -> None:
    built: list[_Recorded] = []

    def optim(parameters):
        built.append(_Recorded(parameters, far=13))
        return built[-1]

    em = ExactPosteriorEM(normal, normal_guide, optim, strategy="guide")
    em.fit(T(X), max_steps=14, progress=False)
    with pytest.raises(PyroEMError, match=r"step 14.* that entered step 8 were kept"):
        em.fit(T(X), max_steps=5, progress=False)
    assert torch.equal(pyro.param("a"), built[0].seen[8]["a"])


class _WithGaps(PyroModule):
    """A weight that is a view of every other number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, 6)[:, ::2])
        self.bias = torch.nn.Parameter(T(0.5))

    def forward(self, x, read):
        b = self.bias
        if read:
            b = b + self.weight.sum()
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(h + b, 1.0), obs=x)


@pytest.mark.parametrize("late", [False, True])
def test_adam_moves_parameters_with_gaps_in_memory(late: bool) -> None:
    """Torch's fused kernel takes a view's memory for that of its elements."""
    found = []
    for optim in (None, lambda p: torch.optim.Adam(p, lr=0.005, fused=False)):
        with pyro.settings.context(module_local_params=True), pyro.get_param_store().scope():
            model = _WithGaps()
            em = ExactPosteriorEM(model, lambda x, read: normal_guide(x), optim, strategy="guide")
            torch.manual_seed(0)
            for i in range(4):
                em.step(T(X), not late or i > 0)
        found.append(model.weight.detach())
    assert not bool((found[0] == 1.0).any())
    assert torch.allclose(*found)


@pytest.mark.parametrize("far", [False, True])
def test_sparse_gradients_are_followed_and_looked_at(far: bool) -> None:
    table = torch.nn.Embedding(5, 1, sparse=True)
    kinds = torch.arange(len(X)) % 2
    weight, count = torch.zeros(()), {"left": 4 if far else 10**9}

    def model(x):
        pyro.module("table", table)
        count["left"] -= 1
        mean = table(kinds).squeeze(-1)
        if count["left"] <= 0:  # finite, with a gradient that is not
            mean = mean + (mean - mean.detach() + weight).sqrt()
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    def guide(x):
        with pyro.plate("n", len(x)):
            pyro.sample("h", dist.Normal(0.5 * x, 0.7))

    before = table.weight.detach().clone()
    em = ExactPosteriorEM(model, guide, lambda p: torch.optim.SparseAdam(p), strategy="guide")
    if far:
        with pytest.raises(PyroEMError, match=r"'table.*weight': its gradient is not finite"):
            for _ in range(9):
                em.step(T(X))
    else:
        em.step(T(X))
        assert ((table.weight != before).squeeze(-1) == (torch.arange(5) < 2)).all()


def test_a_large_gradient_that_is_finite_is_followed() -> None:
    """In single precision its norm overflows."""

    def model(x):
        a = pyro.param("a", torch.zeros(3).float())
        with pyro.plate("n", 3):
            h = pyro.sample("h", dist.Normal(torch.zeros(3).float(), 1.0))
            pyro.sample("x", dist.Normal(h + 1e25 * a, 1.0), obs=x)

    def guide(x):
        with pyro.plate("n", 3):
            pyro.sample("h", dist.Normal(0.5 * x, 0.7))

    assert torch.isinf(torch._foreach_norm([torch.full((3,), 1e25).float()])[0])
    em = ExactPosteriorEM(model, guide, lambda p: torch.optim.SGD(p, lr=1e-30), strategy="guide")
    with pytest.warns(PyroEMWarning, match="parameter 'a': .* the square of it is not"):
        em.step(torch.full((3,), 100.0).float())  # Adam would not move it any more
    assert bool((pyro.param("a") > 0.0).all())


def test_an_alternating_step_that_breaks_is_undone_whole() -> None:
    model, count = breaking(0)
    em = ExactPosteriorEM(
        model, normal_guide, lambda p: torch.optim.SGD(p, lr=0.01), strategy="guide"
    )
    seen = []

    def watch(step) -> None:
        seen.append({n: v.detach().clone() for n, v in step.params.items()})
        if len(seen) == 3:
            count["left"] = 2  # the guide's run is fine, the model's is not

    with pytest.warns(PyroEMWarning, match="step 3"):
        result = em.fit(
            T(X), max_steps=9, callbacks=watch, seed=0, progress=False, schedule=Alternating(1, 1)
        )
    for name, value in seen[-1].items():
        assert torch.equal(result.params[name], value), name


def test_an_interrupt_returns_a_result() -> None:
    def stop(step) -> None:
        if step.index == 3:
            raise KeyboardInterrupt

    em = ExactPosteriorEM(normal, normal_guide, strategy="guide")
    result = em.fit(T(X), max_steps=20, callbacks=stop, progress=False)
    assert result.status is EMStatus.INTERRUPTED and result.num_steps == 4
    assert em.fit(T(X), max_steps=2, progress=False).total_steps == 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_half_an_alternating_step_is_undone(error) -> None:
    """The guide has moved when the model's turn is interrupted."""
    seen, calls = [], []

    class Breaks(torch.optim.SGD):
        def step(self, closure=None):
            calls.append(1)
            if len(calls) == 4:
                raise error
            return super().step(closure)

    def optim(parameters):
        return torch.optim.SGD(parameters, lr=0.01)

    def breaks(parameters):
        return Breaks(parameters, lr=0.01)

    def watch(step) -> None:
        seen.append({n: v.detach().clone() for n, v in step.params.items()})

    model, _ = breaking(0)
    em = ExactPosteriorEM(model, normal_guide, optim, strategy="guide")
    schedule = Alternating(2, 1, model_optim=breaks)
    options = {"max_steps": 9, "callbacks": watch, "seed": 0, "schedule": schedule}
    if error is KeyboardInterrupt:
        result = em.fit(T(X), progress=False, **options)
        assert result.status is EMStatus.INTERRUPTED and result.num_steps == 3
    else:
        with pytest.raises(RuntimeError):
            em.fit(T(X), progress=False, **options)
    assert len(seen) == 3
    for name, value in seen[-1].items():
        assert torch.equal(pyro.param(name).detach(), value), name


@pytest.mark.parametrize("at", [5, 9, 13])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_half_a_move_of_an_optimiser_is_undone(error, at: int) -> None:
    """One that moves parameter by parameter is interrupted between two of them."""
    entered = []

    class Breaks(torch.optim.SGD):
        def step(self, closure=None):
            parameters = self.param_groups[0]["params"]
            entered.append([p.detach().clone() for p in parameters])
            if len(entered) == at:
                parameters[0].data.add_(1.0)
                raise error
            return super().step(closure)

    em = ExactPosteriorEM(normal, normal_guide, lambda p: Breaks(p, lr=0.01), strategy="guide")
    if error is KeyboardInterrupt:
        result = em.fit(T(X), max_steps=30, progress=False)
        assert result.status is EMStatus.INTERRUPTED and result.num_steps == at - 1
    else:
        with pytest.raises(RuntimeError):
            em.fit(T(X), max_steps=30, progress=False)
    last = [v.detach() for v in pyro.get_param_store().values()]
    assert sorted(map(float, last)) == sorted(map(float, entered[-1]))


# ------------------------------------------------------------------ keeping


def counts(x):
    with pyro.plate("n", len(x)):
        h = pyro.sample("h", dist.Poisson(2.0))
        pyro.sample("x", dist.Normal(h, 1.0), obs=x)


def counts_guide(x):
    a = pyro.param("a", T(1.0), constraint=constraints.positive)
    with pyro.plate("n", len(x)):
        pyro.sample("h", dist.Poisson(a))


OPTIMS = {
    "torch": lambda: partial(torch.optim.Adam, lr=0.05),
    "pyro": lambda: pyro.optim.Adam({"lr": 0.05}),
}


def some_read(x, whole):
    a = pyro.param("a", T(0.5)) if whole else 0.0
    b = pyro.param("b", T(0.5))
    with pyro.plate("n", len(x)):
        h = pyro.sample("h", dist.Normal(b, 1.0))
        pyro.sample("x", dist.Normal(h + a, 1.0), obs=x)


def some_read_guide(x, whole):
    with pyro.plate("n", len(x)):
        pyro.sample("h", dist.Normal(0.5 * x, 0.7))


def test_a_built_guide_with_another_name_continues(tmp_path) -> None:
    """A second AutoNormal of a process has parameters with a name of their own."""
    path, losses = tmp_path / "fit.pt", []
    em = ExactPosteriorEM(normal, auto.AutoNormal, strategy="guide")
    em.fit(T(X), max_steps=5, progress=False)
    em.save(path)
    torch.manual_seed(3)
    losses.append([em.step(T(X)) for _ in range(5)])
    other = ExactPosteriorEM(normal, auto.AutoNormal, strategy="guide")
    other.load(path, T(X))
    torch.manual_seed(3)
    losses.append([other.step(T(X)) for _ in range(5)])
    assert len({n.partition(".")[0] for n in pyro.get_param_store()}) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize("saves", [1, 2])
@pytest.mark.parametrize("first", [[True, True, False], [False, True, True], [False, False, True]])
def test_a_loaded_optimiser_knows_parameters_by_name(tmp_path, first, saves: int) -> None:
    """They may join the optimiser in another order, and late."""
    path, wholes = tmp_path / "fit.pt", [False, False, True, False, True]

    def last(em) -> dict:
        torch.manual_seed(5)
        for whole in [*first, True]:
            em.step(T(X), whole)
        return {n: p.detach().clone() for n, p in pyro.get_param_store().items()}

    em = ExactPosteriorEM(some_read, some_read_guide, strategy="guide")
    for whole in wholes:
        em.step(T(X), whole)
    em.save(path)
    expected = last(em)
    for _ in range(saves):
        pyro.clear_param_store()
        em = ExactPosteriorEM(some_read, some_read_guide, strategy="guide")
        em.load(path, T(X), True)
        em.save(path)
    found = last(em)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ("new", "path"),
        ("same", "path"),
        ("new", "score"),
        ("same", "score"),
    ],
)
@pytest.mark.parametrize("optim", list(OPTIMS))
def test_a_loaded_fit_continues_as_if_it_had_not_stopped(tmp_path, where, optim, kind) -> None:
    pair = (normal, normal_guide) if kind == "path" else (counts, counts_guide)
    x = T(X).abs()

    def run(em, seed):
        torch.manual_seed(seed)
        return [em.step(x) for _ in range(8)]

    em = ExactPosteriorEM(*pair, OPTIMS[optim](), strategy="guide")
    run(em, 1)
    em.save(tmp_path / "fit.pt")
    want = run(em, 2)
    end = pyro.param("a").detach().clone()
    if where == "new":
        pyro.clear_param_store()
        em = ExactPosteriorEM(*pair, OPTIMS[optim](), strategy="guide")
    em.load(tmp_path / "fit.pt")
    if where == "new":
        em.plan(x)
    assert run(em, 2) == pytest.approx(want, abs=1e-12)
    assert torch.allclose(pyro.param("a"), end, atol=1e-12)


@pytest.mark.parametrize(
    "guide",
    [
        "drawn",
        "enumerated",
        "exact sums",
        "points",
    ],
)
def test_looking_changes_no_parameter_and_no_random_number(guide) -> None:
    x = T(X)
    given = {
        "drawn": (normal, normal_guide, "guide"),
        "enumerated": (mixture, y_then_h, "guide"),
        "exact sums": (mixture, both, "exact"),
        "points": (bayesian, auto.AutoDelta, "exact"),
    }[guide]
    em = ExactPosteriorEM(given[0], given[1], strategy=given[2])
    em.plan(x)
    store = pyro.get_param_store()
    before = {n: (id(p), p.detach().clone()) for n, p in store._params.items()}
    state = torch.get_rng_state()
    em.plan(x)
    assert torch.equal(state, torch.get_rng_state())
    em.posterior(x).mode()
    em.elbo(x)
    em.evaluate_loss(x)
    for proposal in ("prior", None):
        em.estimate_evidence(x, num_particles=5, proposal=proposal)
    assert {n: id(p) for n, p in store._params.items()} == {n: i for n, (i, _) in before.items()}
    for name, p in store._params.items():
        assert torch.equal(p.detach(), before[name][1]) and p.grad is None


@pytest.mark.parametrize("label", [0, 1])
def test_a_delta_of_a_discrete_latent_has_a_gap(label) -> None:
    """KL(delta ‖ posterior) = −log p(ẑ | x): a value is no parameter with a prior."""
    weights, means = T([0.3, 0.7]), T([0.0, 2.0])

    def model(x):
        mu = pyro.param("mu", means)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    def guide(x):
        with pyro.plate("n", len(x)):
            pyro.sample("z", dist.Delta(torch.full((len(x),), label)))

    x = T(X)
    em = ExactPosteriorEM(model, guide, strategy="guide")
    says(reasons(em, x)["z"], "Delta", "nothing is drawn")
    joint = dist.Normal(means, 1.0).log_prob(x[:, None]) + weights.log()
    terms = em.elbo(x)
    evidence, value = float(joint.logsumexp(-1).sum()), float(joint[:, label].sum())
    assert terms.value == pytest.approx(value, abs=1e-5) and terms.log_prior == 0.0
    assert terms.log_evidence == pytest.approx(evidence, abs=1e-5)
    assert terms.gap == pytest.approx(evidence - value, abs=1e-5) and terms.gap > 1
    assert terms.standard_error == 0.0 and terms.entropy == 0.0
    result = em.fit(x, max_steps=20, progress=False)
    assert result.log_evidence is None and result.elbo > value
