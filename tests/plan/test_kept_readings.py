"""A model is read once for each form of its data; whatever it does differently is read anew.

Every number of a later call is held against that of a new object, which has read nothing before, or
against brute force.
"""

import gc
import itertools
import math
import operator
import types
import weakref

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_em import DataError, ExactPosteriorEM, Fixed, Hard, PyroEMError, vectorized_markov
from pyro_em.graph.bindings import signatures
from pyro_em.plan import decisions, first_values, kept
from pyro_em.tracing import runs

X = torch.tensor([0.3, -1.2, 4.1, 3.7, 0.1, 2.2])
OTHER = torch.tensor([5.0, 0.2, -3.0, 1.1, 0.4, 3.3])


@pytest.fixture(autouse=True)
def _clear():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def unread(model):
    """The same model as another function, of which no reading is remembered."""
    return types.FunctionType(
        model.__code__, model.__globals__, model.__name__, model.__defaults__, model.__closure__
    )


@pytest.fixture
def count(monkeypatch):
    """How often a model was read from the beginning, and from one run."""
    seen = {"anew": 0, "again": 0}
    again = kept.Readings.again

    def counted(self, task, first_look):
        found = again(self, task, first_look)
        seen["anew" if found is None else "again"] += 1
        return found

    monkeypatch.setattr(kept.Readings, "again", counted)
    return seen


def mixture(x):
    mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
    w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], 1.5), obs=x)


def by_hand(x, mu=(0.0, 3.0), w=(0.4, 0.6), scale=1.5):
    terms = dist.Normal(torch.tensor(mu), scale).log_prob(x[:, None]) + torch.tensor(w).log()
    return float(terms.logsumexp(-1).sum())


def test_score_is_the_total_log_evidence_in_nats():
    em = ExactPosteriorEM(mixture)
    assert em.score(X) == pytest.approx(by_hand(X), abs=1e-4)
    assert em.score(OTHER) == pytest.approx(by_hand(OTHER), abs=1e-4)
    assert em.score(X[:2]) == pytest.approx(by_hand(X[:2]), abs=1e-4)
    em.fit(X, max_steps=3, tol=0)
    mu, w = pyro.param("mu").detach(), pyro.param("w").detach()
    expected = by_hand(OTHER, mu.tolist(), w.tolist())
    assert em.score(OTHER) == pytest.approx(expected, abs=1e-4)


def test_score_of_impossible_data_says_so():
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([1.0, 0.0])))
            pyro.sample("x", dist.Categorical(torch.tensor([[1.0, 0.0], [0.5, 0.5]])[z]), obs=x)

    em = ExactPosteriorEM(model)
    assert em.score(torch.tensor([0, 0])) == pytest.approx(0.0)
    with pytest.raises(DataError, match=r"impossible under the model.*first at rows = 1"):
        em.score(torch.tensor([0, 1]))


def test_score_is_refused_where_a_guide_draws():
    def model(x):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.StudentT(3.0, h, 1.0), obs=x)

    em = ExactPosteriorEM(model, pyro.infer.autoguide.AutoNormal)
    with pytest.raises(PyroEMError, match=r"(?s)score: the guide draws latents.*estimate_evidence"):
        em.score(torch.tensor(0.3))


def test_one_reading_serves_every_method(count):
    model = unread(mixture)
    em = ExactPosteriorEM(model)
    em.plan(X)
    assert count == {"anew": 1, "again": 0}
    em.fit(X, max_steps=2, tol=0)
    em.posterior(X), em.elbo(X), em.step(X), em.predictive(X, num_samples=2), em.score(OTHER)
    em.fit(OTHER, max_steps=2, tol=0)
    assert count == {"anew": 1, "again": 7}
    em.score(OTHER[:3])
    assert count == {"anew": 2, "again": 7}
    em.reset()
    em.score(X)
    pyro.clear_param_store()
    assert em.score(X) == pytest.approx(by_hand(X), abs=1e-4)
    assert count == {"anew": 2, "again": 9}


def test_objects_share_what_is_known_of_a_model(count):
    model = unread(mixture)
    first = ExactPosteriorEM(model).fit(X, max_steps=4, tol=0)
    pyro.clear_param_store()
    again = ExactPosteriorEM(model).fit(X, max_steps=4, tol=0)
    assert count == {"anew": 1, "again": 1}
    assert again.history == pytest.approx(first.history, abs=1e-9)
    assert again.start == first.start
    pyro.clear_param_store()
    assert ExactPosteriorEM(model).score(OTHER) == pytest.approx(by_hand(OTHER), abs=1e-4)
    assert count == {"anew": 1, "again": 2}


def _chain(steps, held):
    """A chain whose start and a parameter are drawn, and that reads a tensor from outside."""

    def model(x):
        mu = pyro.param("mu", lambda: torch.randn(3))
        A = pyro.param("A", lambda: torch.rand(3, 3).softmax(-1), constraint=constraints.simplex)
        z = None
        for t in steps(len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(3) / 3 if z is None else A[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], held["scale"]), obs=x[t])

    return model


def test_objects_share_what_is_known_of_a_chain_without_a_loop(count):
    held = {"scale": torch.tensor(1.5)}
    without = _chain(lambda n: vectorized_markov("t", n), held)
    loop = _chain(lambda n: pyro.markov(range(n)), held)
    fitted, states = [], []
    for seed, scale, x in ((1, 1.5, X), (1, 1.5, X), (2, 1.5, OTHER), (1, 0.5, X), (1, 0.5, OTHER)):
        held["scale"] = torch.tensor(scale)
        for model in (without, unread(loop)):
            pyro.clear_param_store()
            torch.manual_seed(seed)
            fitted.append(ExactPosteriorEM(model).fit(x, max_steps=4, tol=0))
            states.append(torch.get_rng_state())
        assert fitted[-2].history == pytest.approx(fitted[-1].history, abs=1e-4)
        assert fitted[-2].log_evidence == pytest.approx(fitted[-1].log_evidence, abs=1e-4)
    assert torch.equal(states[0], states[2])  # the same draws, read anew or not
    assert count["again"] == 4  # a scale of another value is another number of the same form


def test_other_parameters_of_one_model_are_read_anew(count):
    """The parameters' form is part of a reading."""
    starts = {"mu": torch.tensor([0.0, 3.0], dtype=torch.float64)}

    def model(x):
        mu = pyro.param("mu", lambda: starts["mu"])
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            pyro.sample("x", dist.Normal(mu[z], 1.5), obs=x)

    assert ExactPosteriorEM(model).score(X) == pytest.approx(by_hand(X), abs=1e-4)
    pyro.clear_param_store()
    starts["mu"] = starts["mu"].to(torch.float32)
    ExactPosteriorEM(model).score(X)
    assert count == {"anew": 2, "again": 0}
    pyro.clear_param_store()
    starts["mu"] = torch.tensor([0.0, math.nan])
    with pytest.raises(PyroEMError, match=r"parameter 'mu'"):
        ExactPosteriorEM(model).score(X)


def test_a_model_is_forgotten_with_its_last_reference():
    model = unread(mixture)
    ExactPosteriorEM(model).fit(X, max_steps=1, tol=0)
    assert model in kept._by_model
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_data_are_not_kept_alive_by_readings():
    model, x = unread(mixture), X.clone()
    alive = weakref.ref(x)
    em = ExactPosteriorEM(model)
    em.plan(x)
    del em, x
    gc.collect()
    assert alive() is None


def test_a_second_fit_is_that_of_a_new_object(count):
    em = ExactPosteriorEM(unread(mixture))
    em.posterior(X)
    em.fit(X, max_steps=4, tol=0)
    again = em.fit(OTHER, max_steps=6, tol=0)
    pyro.clear_param_store()
    ExactPosteriorEM(unread(mixture)).fit(X, max_steps=4, tol=0)
    anew = ExactPosteriorEM(unread(mixture)).fit(OTHER, max_steps=6, tol=0)
    assert again.history == pytest.approx(anew.history, abs=1e-5)
    assert again.log_evidence == pytest.approx(anew.log_evidence, abs=1e-5)
    assert count["again"] == 2


def test_the_random_state_stays_as_it_is():
    em = ExactPosteriorEM(mixture)
    em.score(X)
    torch.manual_seed(3)
    expected = torch.get_rng_state()
    em.score(X), em.score(OTHER), em.plan(X), em.plan(X)
    assert torch.equal(torch.get_rng_state(), expected)


def random_starts(x):
    first = pyro.param("first", lambda: torch.randn(2))
    rows = pyro.plate("rows", len(x))
    with rows:
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
    scale = pyro.param("scale", torch.rand(2) + 1.0, constraint=constraints.positive)
    with rows:
        y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.3)))
        pyro.sample("x", dist.Normal(first[z] + y, scale[z]), obs=x)


def reads_a_latent(x):
    first = pyro.param("first", lambda: torch.randn(2))
    rows = pyro.plate("rows", len(x))
    with rows:
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
        y = pyro.sample("y", dist.Bernoulli(torch.tensor([0.3, 0.9])[z]))
    scale = pyro.param("scale", torch.rand(2) + 1.0, constraint=constraints.positive)
    with rows:
        pyro.sample("x", dist.Normal(first[z] + y, scale[z]), obs=x)


def gaussian_factors(x):
    with pyro.plate("rows", len(x)):
        h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        first = pyro.param("first", lambda: torch.randn(2))
        scale = pyro.param("scale", torch.rand(()) + 1.0, constraint=constraints.positive)
        pyro.sample("x", dist.Normal(h @ first, scale), obs=x)


def long_chain(x):
    h = 0.0
    for t in vectorized_markov("time", 260):
        h = pyro.sample(f"h_{t}", dist.Normal(h, 1.0))
        first = pyro.param("first", lambda: torch.randn(2))
        pyro.sample(f"x_{t}", dist.Normal(h * first[0] + first[1], 1.0), obs=x.new_zeros(260)[t])
    scale = pyro.param("scale", torch.rand(()) + 1.0, constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(0.0, scale), obs=x)


RANDOM_STARTS = [random_starts, reads_a_latent, gaussian_factors, long_chain]


@pytest.mark.parametrize("model", RANDOM_STARTS)
def test_random_starts_do_not_tell_whether_a_model_was_read_before(model, monkeypatch):
    plain = []
    run = first_values.first_run_again
    monkeypatch.setattr(
        first_values, "first_run_again", lambda *a, **k: plain.append(1) or run(*a, **k)
    )
    found = []
    for data in (X, X, OTHER, X):
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        ExactPosteriorEM(model).plan(data)
        found.append((pyro.param("first"), pyro.param("scale"), torch.rand(1)))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
    assert len(plain) == (3 if model is reads_a_latent else 0)


class _Config:
    scale = 1.5


def _held_over(change):
    """Models that read something beside their arguments, and what changes it."""
    return pytest.param(change, id=change.__name__)


def closed_over_tensor():
    held = {"mu": torch.tensor([0.0, 3.0])}

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            pyro.sample("x", dist.Normal(held["mu"][z], 1.5), obs=x)

    def change():
        held["mu"] = torch.tensor([1.0, -2.0])

    return model, change, {"mu": (1.0, -2.0)}


def closed_over_tensor_in_place():
    mu = torch.tensor([0.0, 3.0])

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            pyro.sample("x", dist.Normal(mu[z], 1.5), obs=x)

    def change():
        mu.numpy()[:] = [1.0, -2.0]

    return model, change, {"mu": (1.0, -2.0)}


def number_of_an_object():
    config = _Config()

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            pyro.sample("x", dist.Normal(torch.tensor([0.0, 3.0])[z], config.scale), obs=x)

    def change():
        config.scale = 0.5

    return model, change, {"scale": 0.5}


def numpy_array():
    config = np.array([0.0, 3.0], dtype=np.float32)

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            pyro.sample("x", dist.Normal(torch.tensor(config)[z], 1.5), obs=x)

    def change():
        config[:] = [1.0, -2.0]

    return model, change, {"mu": (1.0, -2.0)}


def deep_in_containers():
    config = {"a": [{"b": [{"c": [torch.tensor([0.0, 3.0])]}]}]}

    def model(x):
        mu = config["a"][0]["b"][0]["c"][0]
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            pyro.sample("x", dist.Normal(mu[z], 1.5), obs=x)

    def change():
        config["a"][0]["b"][0]["c"][0] = torch.tensor([1.0, -2.0])

    return model, change, {"mu": (1.0, -2.0)}


def numbers_deep_in_containers():
    config = {"a": [{"b": [{"c": [0.0, 3.0]}]}]}

    def model(x):
        for _ in range(4):  # memory that is given back, and used again for what comes next
            torch.tensor([7.0, 7.0])
        mu = torch.tensor(config["a"][0]["b"][0]["c"])
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            pyro.sample("x", dist.Normal(mu[z], 1.5), obs=x)

    def change():
        config["a"][0]["b"][0]["c"][:] = [1.0, -2.0]

    return model, change, {"mu": (1.0, -2.0)}


def module_swapped():
    held = [torch.nn.Linear(1, 2)]
    with torch.no_grad():
        held[0].weight.zero_(), held[0].bias.copy_(torch.tensor([0.0, 3.0]))

    def model(x):
        net = pyro.module("net", held[0])
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            pyro.sample("x", dist.Normal(net(torch.ones(1))[z], 1.5), obs=x)

    def change():
        held[0] = torch.nn.Linear(1, 2)
        with torch.no_grad():
            held[0].weight.zero_(), held[0].bias.copy_(torch.tensor([1.0, -2.0]))
        pyro.clear_param_store()

    return model, change, {"mu": (1.0, -2.0)}


def a_file():
    import tempfile
    from pathlib import Path

    path = Path(tempfile.mkdtemp()) / "mu.npy"
    np.save(path, np.array([0.0, 3.0], dtype=np.float32))

    def model(x):
        mu = torch.from_numpy(np.load(path))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            pyro.sample("x", dist.Normal(mu[z], 1.5), obs=x)

    def change():
        np.save(path, np.array([1.0, -2.0], dtype=np.float32))

    return model, change, {"mu": (1.0, -2.0)}


class _Elsewhere:
    """What no name of a model stands for: read through functions of other modules, say."""

    value = 1.5
    numbers = np.array([0.0, 3.0], dtype=np.float32)

    @staticmethod
    def get(name):
        return getattr(_Elsewhere, name)


_get, _get_numbers = (operator.methodcaller("get", name) for name in ("value", "numbers"))


def written_by_numpy_in_the_run():
    _Elsewhere.numbers = np.array([0.0, 3.0], dtype=np.float32)

    def model(x):
        mu = torch.zeros(2)
        mu.numpy()[:] = _get_numbers(_Elsewhere)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            pyro.sample("x", dist.Normal(mu[z], 1.5), obs=x)

    def change():
        _Elsewhere.numbers = np.array([1.0, -2.0], dtype=np.float32)

    return model, change, {"mu": (1.0, -2.0)}


def number_of_a_transform():
    _Elsewhere.value = 1.5

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            base = dist.Normal(torch.tensor([0.0, 2.0])[z], 1.0)
            scale = dist.transforms.AffineTransform(0.0, _get(_Elsewhere))
            pyro.sample("x", dist.TransformedDistribution(base, [scale]), obs=x)

    def change():
        _Elsewhere.value = 0.5

    return model, change, {"mu": (0.0, 1.0), "scale": 0.5}


class _ByClass(dist.TorchDistribution):
    """A Normal whose scale is an attribute of its class."""

    arg_constraints = {"loc": constraints.real}  # noqa: RUF012
    support = constraints.real

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape)

    def expand(self, shape, _instance=None):
        return type(self)(self.loc.expand(shape))

    def sample(self, shape=()):
        return self.loc.expand(shape + self.loc.shape).clone()

    def log_prob(self, value):
        return dist.Normal(self.loc, _Elsewhere.value).log_prob(value)


def number_of_a_class():
    _Elsewhere.value = 1.5

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            pyro.sample("x", _ByClass(torch.tensor([0.0, 3.0])[z]), obs=x)

    def change():
        _Elsewhere.value = 0.5

    return model, change, {"scale": 0.5}


CHANGES = [
    written_by_numpy_in_the_run,
    number_of_a_transform,
    number_of_a_class,
    closed_over_tensor,
    closed_over_tensor_in_place,
    number_of_an_object,
    numpy_array,
    deep_in_containers,
    numbers_deep_in_containers,
    module_swapped,
    a_file,
]


@pytest.mark.parametrize("make", [_held_over(c) for c in CHANGES])
@pytest.mark.parametrize("whole", [False, True], ids=["after a posterior", "after a plan"])
def test_what_the_model_holds_may_change(make, whole):
    model, change, expected = make()
    em = ExactPosteriorEM(model)
    em.plan(X) if whole else em.posterior(X)
    assert em.score(X) == pytest.approx(by_hand(X), abs=1e-4)
    change()
    assert em.score(X) == pytest.approx(by_hand(X, **expected), abs=1e-4)
    assert em.elbo(X).log_evidence == pytest.approx(by_hand(X, **expected), abs=1e-4)
    em.plan(X)
    assert em.posterior(X).log_evidence == pytest.approx(by_hand(X, **expected), abs=1e-4)


def normalised_inside(x):
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.6)).long()
        pyro.sample("x", dist.Normal(mu[z], 0.5), obs=(x - x.mean()) / x.std())


def normalised_by_numbers(x):
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    y = (x - float(x.mean())) / x.std().item()
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.6)).long()
        pyro.sample("x", dist.Normal(mu[z], 0.5), obs=y)


def through_a_list(x):
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.6)).long()
        pyro.sample("x", dist.Normal(mu[z], 0.5), obs=torch.tensor([2 * v for v in x.tolist()]))


def through_numpy(x):
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.6)).long()
        pyro.sample("x", dist.Normal(mu[z], 0.5), obs=torch.from_numpy(np.sort(x.numpy())))


def another_parameter(x):
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    nu = pyro.param("nu", torch.tensor([4.0, 2.0]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.6)).long()
        pyro.sample("x", dist.Normal((mu if x.numpy()[0] < 1 else nu)[z], 0.5), obs=x)


def another_distribution(x):
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    kind = dist.Normal if x.numpy()[0] < 1 else dist.Laplace
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.6)).long()
        pyro.sample("x", kind(mu[z], 0.5), obs=x)


def another_component(x):
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0, 5.0]))
    first = int(x.argmax()) % 2
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.6)).long()
        pyro.sample("x", dist.Normal(mu[first:][z], 0.5), obs=x)


def looked_up_by_the_data(x):
    mu = pyro.param("mu", torch.arange(8.0).reshape(4, 2))
    group = x.abs().long() % 4
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.6)).long()
        pyro.sample("x", dist.Normal(mu[group, z], 0.5), obs=x)


def regression_on_itself(x):
    slope = pyro.param("slope", torch.tensor([-1.0, 1.0]))
    with pyro.plate("rows", len(x) - 1):
        z = pyro.sample("z", dist.Bernoulli(0.6)).long()
        pyro.sample("x", dist.Normal(slope[z] * x[:-1], 0.5), obs=x[1:])


def missing_where_negative(x):
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.6)).long()
        pyro.sample("x", dist.Normal(mu[z], 0.5), obs=x, obs_mask=x > 0)


def chained_on_a_sign(x):
    """Its elements read each other on some data only."""
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.6)).long()
        z = torch.where(x[0] > 1, z.roll(1, -1), z)
        pyro.sample("x", dist.Normal(mu[z], 0.5), obs=x)


READS = [
    normalised_inside,
    normalised_by_numbers,
    through_a_list,
    through_numpy,
    another_parameter,
    another_distribution,
    another_component,
    looked_up_by_the_data,
    regression_on_itself,
    missing_where_negative,
    chained_on_a_sign,
]


def outcome(call):
    """What a call returns or raises, in words for what it raises."""
    try:
        return call()
    except PyroEMError as error:
        return str(error)


@pytest.mark.parametrize("model", READS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("first", ["plan", "posterior", "fit"])
def test_data_may_be_read_in_any_way(model, first):
    em = ExactPosteriorEM(model)
    em.fit(X, max_steps=1, tol=0) if first == "fit" else getattr(em, first)(X)
    for data in (OTHER, X, OTHER.flip(0)):
        got = outcome(lambda d=data: em.score(d))
        expected = outcome(lambda d=data: ExactPosteriorEM(unread(model)).score(d))
        assert got == (expected if isinstance(expected, str) else pytest.approx(expected, abs=1e-5))
        begin = {n: p.clone() for n, p in pyro.get_param_store().named_parameters()}
        got = outcome(lambda d=data: em.fit(d, max_steps=3, tol=0).history)
        with torch.no_grad():
            for name, p in pyro.get_param_store().named_parameters():
                p.copy_(begin[name])
        expected = outcome(
            lambda d=data: ExactPosteriorEM(unread(model)).fit(d, max_steps=3, tol=0).history
        )
        assert got == (expected if isinstance(expected, str) else pytest.approx(expected, abs=1e-4))


def test_a_draw_that_was_the_same_by_chance_is_drawn_again():
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            mu = torch.tensor([0.0, 3.0]) + torch.randint(0, 2, ())
            pyro.sample("x", dist.Normal(mu[z], 1.5), obs=x)

    em = ExactPosteriorEM(model)
    em.plan(X)
    for seed in range(6):
        torch.manual_seed(seed)
        got = em.score(X)
        torch.manual_seed(seed)
        shift = float(torch.randint(0, 2, ()))
        assert got == pytest.approx(by_hand(X, mu=(shift, 3.0 + shift)), abs=1e-4)


def _chain_with_odd_steps(x):
    A = pyro.param("A", torch.tensor([[0.9, 0.1], [0.3, 0.7]]), constraint=constraints.simplex)
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    nu = pyro.param("nu", torch.tensor([2.0, 0.5]))
    z = 0
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        pyro.sample(f"x_{t}", dist.Normal((nu if t in (1, 3) else mu)[z], 1.0), obs=x[t])


def test_the_order_of_sums_is_that_of_the_factors_with_their_bindings():
    em = ExactPosteriorEM(_chain_with_odd_steps, strategy=Hard())
    A, mu, nu = ([[0.9, 0.1], [0.3, 0.7]], [-1.0, 1.0], [2.0, 0.5])
    joints = []
    for path in itertools.product((0, 1), repeat=len(X)):
        came = (0, *path[:-1])
        loc = torch.tensor([(nu if t in (1, 3) else mu)[z] for t, z in enumerate(path)])
        prior = sum(math.log(A[i][j]) for i, j in zip(came, path, strict=True))
        joints.append(prior + float(dist.Normal(loc, 1.0).log_prob(X).sum()))
    em.posterior(X)
    assert em.fit(X, max_steps=1, tol=0).history[0] == pytest.approx(max(joints), abs=1e-4)
    pyro.clear_param_store()
    exact = ExactPosteriorEM(_chain_with_odd_steps)
    exact.posterior(X)
    expected = float(torch.tensor(joints).logsumexp(0))
    assert exact.fit(X, max_steps=1, tol=0).history[0] == pytest.approx(expected, abs=1e-4)
    entering = exact.score(X)
    assert exact.step(X) == pytest.approx(-entering, abs=1e-4)


def test_models_whose_comparison_raises_are_kept_apart():
    class Shifted:
        def __init__(self, by):
            self.by = by

        def __call__(self, x):
            return mixture(x + self.by)

        def __eq__(self, other):  # as a dataclass that holds tensors
            if not isinstance(other, Shifted):
                return NotImplemented
            raise RuntimeError("Boolean value of Tensor is ambiguous")

        def __hash__(self):
            return 7

    models = [Shifted(by) for by in (0.0, 1.0)]
    for model in models:
        em = ExactPosteriorEM(model)
        for _ in range(2):
            assert em.score(X) == pytest.approx(by_hand(X + model.by), abs=1e-4)


def test_weights_are_held_to_be_positive():
    def model(x, s):
        with pyro.plate("rows", len(x)), pyro.poutine.scale(scale=s):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            pyro.sample("x", dist.Normal(torch.tensor([0.0, 3.0])[z], 1.5), obs=x)

    em = ExactPosteriorEM(model)
    em.score(X, torch.ones(6))
    for bad in (-torch.ones(6), torch.arange(6.0)):
        with pytest.raises(PyroEMError, match=r"poutine.scale: \d of its 6 numbers"):
            em.score(X, bad)


def test_a_latent_that_was_masked_everywhere_is_seen_where_it_is_not():
    def model(x, seen):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            with pyro.poutine.mask(mask=seen):
                h = pyro.sample("h", dist.Normal(0.0, 1.0))
            mu = torch.tensor([0.0, 3.0])[z] + torch.where(seen, h, 0.0)
            pyro.sample("x", dist.Normal(mu, 1.5), obs=x)

    em = ExactPosteriorEM(model)
    nowhere = torch.zeros(6, dtype=torch.bool)
    assert em.score(X, nowhere) == pytest.approx(by_hand(X), abs=1e-4)
    with pytest.raises(PyroEMError, match="site 'h'"):
        em.score(X, ~nowhere)


def test_a_parameter_may_come_to_couple_rows():
    def model(x):
        t = pyro.param("t", torch.tensor(-1.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6))
            z = torch.where(t > 0, z.roll(1, -1), z)
            pyro.sample("x", dist.Normal(3 * z, 1.5), obs=x)

    em = ExactPosteriorEM(model)
    em.plan(X)
    assert em.score(X) == pytest.approx(by_hand(X), abs=1e-4)
    pyro.param("t").data.fill_(1.0)
    for data in (X, OTHER):
        with pytest.raises(PyroEMError, match="reads latent 'z' of other elements"):
            em.score(data)


def test_data_of_inference_mode_are_refused_as_at_first():
    em = ExactPosteriorEM(mixture)
    em.score(X)
    with torch.inference_mode():
        other = OTHER.clone()
        with pytest.raises(PyroEMError, match="inference_mode"):
            em.score(X)
    with pytest.raises(PyroEMError, match="inference_mode"):
        em.score(other)


def test_a_tensor_that_comes_to_need_a_gradient_is_told_of():
    shift = torch.tensor([0.0, 1.0])

    def model(x):
        mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            pyro.sample("x", dist.Normal((mu + shift)[z], 1.5), obs=x)

    em = ExactPosteriorEM(model)
    em.plan(X)
    shift.requires_grad_(True)
    assert "'shift' of shape (2,)) that requires a gradient" in str(em.plan(X))


def test_arguments_inside_a_compound_are_held_to_their_constraints():
    def model(x, a):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            pyro.sample("x", dist.DirichletMultinomial(a[z], total_count=x.sum(-1)), obs=x)

    em = ExactPosteriorEM(model)
    x, a = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    em.score(x, a)
    with pytest.raises(PyroEMError, match="Expected parameter concentration"):
        em.score(x, -a)


def test_an_initial_value_of_another_shape_is_refused():
    held = [torch.tensor([0.0, 3.0])]

    def model(x):
        mu = pyro.param("mu", held[0])
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            pyro.sample("x", dist.Normal(mu[z], 1.5), obs=x)

    em = ExactPosteriorEM(model)
    em.plan(X)
    held[0] = torch.zeros(3)
    for data in (X, OTHER):
        with pytest.raises(PyroEMError, match=r"holds a value of shape \(2,\).*shape \(3,\)"):
            em.score(data)


def test_data_that_are_changed_in_place_are_read_as_they_are():
    em = ExactPosteriorEM(mixture)
    x = X.clone()
    em.plan(x), em.fit(x, max_steps=1, tol=0)
    pyro.get_param_store().clear()
    em.plan(x)
    for write in (lambda: x.mul_(2), lambda: x.numpy().__iadd__(1)):
        write()
        assert em.score(x) == pytest.approx(by_hand(x), abs=1e-4)
        assert em.posterior(x).log_evidence == pytest.approx(by_hand(x), abs=1e-4)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (torch.tensor([0.3, math.nan, 4.1, 3.7, 0.1, 2.2]), "1 of 6 observed values are NaN"),
        (torch.tensor([0.3, math.inf, 4.1, 3.7, 0.1, 2.2]), "1 of 6 observed values are infinite"),
    ],
)
def test_data_that_are_no_numbers_are_refused(bad, says):
    em = ExactPosteriorEM(mixture)
    em.score(X)
    with pytest.raises(DataError, match=says):
        em.score(bad)


def test_data_outside_the_support_and_arguments_outside_their_constraints_are_refused():
    def model(x, s):
        rate = pyro.param("rate", torch.tensor([1.0, 3.0]), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            pyro.sample("x", dist.Gamma(2.0, rate[z] * s), obs=x)

    em, ones = ExactPosteriorEM(model), torch.ones(6)
    for method in (em.score, em.plan):
        method(X.abs(), ones)
        with pytest.raises(DataError, match="outside the support of Gamma"):
            method(X, ones)
        with pytest.raises(PyroEMError, match=r"rate"):
            method(X.abs(), -ones)


def test_one_step_of_many_is_held_to_its_constraints(count):
    """Steps of equal form are looked at together."""

    def counts(x, exposure):
        rate = pyro.param("rate", torch.tensor([1.0, 4.0]), constraint=constraints.positive)
        z = 0
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.8, 0.2], [0.3, 0.7]])[z]))
            pyro.sample(f"x_{t}", dist.Poisson(rate[z] * exposure[t]), obs=x[t])

    x, ones = torch.tensor([0.0, 1.0, 5.0, 3.0, 0.0, 2.0]).repeat(2), torch.ones(12)
    em = ExactPosteriorEM(counts)
    before = em.score(x, ones)
    for t, bad in ((4, -1.0), (0, 0.5), (11, math.nan)):
        wrong = x.clone()
        wrong[t] = bad
        with pytest.raises(DataError, match=f"site 'x_{t}'"):
            em.score(wrong, ones)
    for t, bad in ((7, -1.0), (0, math.nan)):
        wrong = ones.clone()
        wrong[t] = bad
        with pytest.raises(PyroEMError):
            em.score(x, wrong)
    seen = dict(count)
    assert em.score(x.clone(), ones.clone()) == before
    assert count == {**seen, "again": seen["again"] + 1}


def _spread(x):
    """A start that follows from the data, and may leave its constraint."""
    s = pyro.param("s", x.mean())
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("x", dist.Normal(torch.tensor([0.0, 3.0])[z], s), obs=x)


def _waiting(x):
    p = pyro.param("p", x.min() / 10)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("x", dist.Geometric(p * torch.tensor([1.0, 0.5])[z]), obs=x)


def _between(x):
    end = pyro.param("end", x.max() - 1.0)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("y", dist.Normal(torch.tensor([0.0, 3.0])[z], 1.0), obs=x)
        pyro.sample("u", dist.Uniform(0.0, end), obs=torch.full_like(x, 0.1))


def _in_part(x):
    """A latent on which nothing depends."""
    s = pyro.param("s", x.mean())
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("x", dist.Normal(torch.tensor([0.0, 3.0])[z], 1.0), obs=x)
        pyro.sample("new", dist.Normal(0.0, s))


@pytest.mark.parametrize(
    "model, good, bad",
    [
        (_spread, X, -OTHER.abs()),
        (_waiting, torch.tensor([1.0, 2.0, 3.0, 1.0]), torch.tensor([0.0, 2.0, 3.0, 1.0])),
        (_between, X, X.clamp(max=0.5)),
        (_in_part, X, -OTHER.abs()),
    ],
)
def test_a_first_run_on_other_data_finds_what_a_first_look_finds(model, good, bad):
    """Parameters begin anew: their values are those that the other data give."""
    ExactPosteriorEM(model).score(good)
    pyro.clear_param_store()
    with pytest.raises(PyroEMError) as again:
        ExactPosteriorEM(model).score(bad)
    pyro.clear_param_store()
    with pytest.raises(PyroEMError) as first:
        ExactPosteriorEM(unread(model)).score(bad)
    assert str(again.value) == str(first.value)


def test_an_event_of_copies_is_held_to_the_support_as_a_whole():
    def shares(x):
        a = pyro.param("a", torch.tensor([[1.0, 2.0, 1.0], [4.0, 1.0, 1.0]]))
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(2) / 2))
            pyro.sample(f"x_{t}", dist.Dirichlet(a[z]), obs=x[t])

    em = ExactPosteriorEM(shares)
    em.score(torch.full((10, 1), 1 / 3).expand(10, 3))
    with pytest.raises(DataError, match="outside the support"):
        em.score(torch.ones(10, 1).expand(10, 3))


def test_parameters_that_are_no_numbers_are_refused():
    em = ExactPosteriorEM(mixture)
    em.plan(X)
    pyro.param("mu").data[0] = math.nan
    for data in (X, OTHER):
        with pytest.raises(PyroEMError, match=r"parameter 'mu': its current value is not finite"):
            em.score(data)


def test_parameters_may_be_cleared_set_or_declared_anew():
    em = ExactPosteriorEM(mixture)
    em.fit(X, max_steps=3, tol=0)
    pyro.clear_param_store()
    assert em.score(X) == pytest.approx(by_hand(X), abs=1e-4)
    pyro.get_param_store()["mu"] = torch.tensor([1.0, -2.0])
    assert em.score(X) == pytest.approx(by_hand(X, mu=(1.0, -2.0)), abs=1e-4)
    pyro.param("mu").data.copy_(torch.tensor([2.0, 5.0]))
    assert em.score(X) == pytest.approx(by_hand(X, mu=(2.0, 5.0)), abs=1e-4)
    del pyro.get_param_store()["mu"]
    pyro.param("mu", torch.zeros(3))
    with pytest.raises(PyroEMError, match=r"holds a value of shape \(3,\).*asks for shape \(2,\)"):
        em.score(X)


def test_random_numbers_are_not_remembered():
    def model(x):
        mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.6)).long()
            pyro.sample("x", dist.Normal(mu[z], 1.5), obs=x + torch.randn(len(x)))

    em = ExactPosteriorEM(model)
    em.plan(X)
    for seed in (1, 2):
        torch.manual_seed(seed)
        got = em.score(X)
        torch.manual_seed(seed)
        assert got == pytest.approx(by_hand(X + torch.randn(len(X))), abs=1e-4)


def test_default_dtypes_are_told_apart():
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.6))).long()
            pyro.sample("x", dist.Normal(torch.tensor([0.0, 3.0])[z], 1.5), obs=x)

    em = ExactPosteriorEM(model)
    em.posterior(X.double())
    torch.set_default_dtype(torch.float64)
    try:
        terms = dist.Normal(torch.tensor([0.0, 3.0]), 1.5).log_prob(X.double()[:, None])
        terms = terms + torch.tensor([0.4, 0.6]).log()
        expected = float(terms.logsumexp(-1).sum())
        assert em.score(X.double()) == pytest.approx(expected, abs=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_form_that_was_seen_costs_one_run(monkeypatch):
    em = ExactPosteriorEM(mixture)
    em.plan(X)
    calls = []

    def model_runs(name):
        run = getattr(runs, name)

        def counted(*args, **kwargs):
            calls.append(name)
            return run(*args, **kwargs)

        return counted

    from pyro_em.graph import enumerated
    from pyro_em.graph.findings import examination, first_run

    for module, name in (
        (first_run, "plain_run"),
        (examination, "provenance_run"),
        (enumerated, "enumerated_run"),
    ):
        monkeypatch.setattr(module, name, model_runs(name))
    em.score(OTHER)
    em.posterior(X)
    em.plan(X)
    em.plan(OTHER)
    assert calls == ["enumerated_run"] * 4


def test_only_the_latest_forms_are_remembered():
    model = unread(mixture)
    for n in range(1, 15):
        ExactPosteriorEM(model).score(torch.linspace(0, 1, n))
    assert len(kept._by_model[model]) == 8


def test_bindings_and_decisions_of_many_rows_are_found_once(monkeypatch):
    """The second fit of a form finds selections where the first left them, the third also updates."""

    def model(x):
        w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
        mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
        scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(mu[z], scale[z]), obs=x)

    def fit(x, **how):
        pyro.clear_param_store()
        return ExactPosteriorEM(model, **how).fit(x, max_steps=1, tol=0, progress=False)

    def refuse(*args, **kwargs):
        raise AssertionError("it is read again")

    x = torch.linspace(-2, 5, 3000)
    fit(x), fit(x)
    with monkeypatch.context() as patch:
        patch.setattr(signatures, "bind", refuse)
        patch.setattr(decisions, "decide_updates", refuse)
        found = fit(x.square())
        with pytest.raises(AssertionError):
            fit(x, updates={"mu": Fixed()})
    w, mu, scale = (found.params[n] for n in ("w", "mu", "scale"))
    terms = dist.Normal(mu, scale).log_prob(x.square()[:, None]) + w.log()
    assert found.log_evidence == pytest.approx(float(terms.logsumexp(-1).sum()), rel=1e-5)
    fixed = fit(x, updates={"mu": Fixed()})
    assert fixed.params["mu"].tolist() == [0.0, 3.0] and fit(x).params["mu"].tolist() != [0.0, 3.0]
