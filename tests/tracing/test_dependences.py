"""What changes between steps, and after a fit: the data, masks, weights, exposures, names."""

import itertools
import warnings
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

from pyro_em import ExactPosteriorEM, PyroEMWarning, UsageError
from pyro_em.fitting.steps.guarded import Guarded
from pyro_em.fitting.steps.loop import endless_steps
from pyro_em.tracing.dependences import _sums, checksum

SCALES = SimpleNamespace(spread=1.0)
FIVE_STEPS = {"max_steps": 5, "tol": 0, "progress": False}


class World:
    """A mixture that reads everything it can: arguments, closure, a buffer, numpy memory."""

    def __init__(self, opaque):
        self.x = torch.tensor([0.0, 1.0, 5.0, 6.5])
        self.weights = torch.ones(4)
        self.exposures = torch.tensor([1.0, 1.2, 0.9, 1.0])
        self.mask = torch.ones(4, dtype=torch.bool)
        self.shift = np.zeros(4, dtype=np.float32)
        self.box = {"offset": torch.zeros(())}
        self.spread = 1.0
        self.opaque = opaque
        SCALES.spread = 1.0

    def model(self, x, box):
        mu = pyro.param("mu", torch.tensor([0.5, 4.0]))
        with pyro.plate("n", 4), poutine.scale(scale=self.weights):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
            loc = mu[z] * self.exposures + torch.from_numpy(self.shift) + box["offset"]
            if self.opaque:
                loc = loc + 0.1 * torch.sin(mu[z])
            with poutine.mask(mask=self.mask):
                pyro.sample("x", dist.Normal(loc, self.spread * SCALES.spread), obs=x)

    def evidence(self, mu):
        """The log evidence, by hand."""
        loc = np.outer(self.exposures.numpy(), mu) + self.shift[:, None] + self.box["offset"].item()
        if self.opaque:
            loc = loc + 0.1 * np.sin(mu)
        s = self.spread * SCALES.spread
        log_p = -0.5 * ((self.x.numpy()[:, None] - loc) / s) ** 2 - np.log(s * np.sqrt(2 * np.pi))
        log_p = np.where(self.mask.numpy()[:, None], log_p, 0.0)
        rows = np.log((np.array([0.4, 0.6]) * np.exp(log_p)).sum(1))
        return float((self.weights.numpy() * rows).sum())


def put(box, key, value):
    box[key] = value


CHANGES = {
    "data": lambda w: w.x.mul_(1.5),
    "data by numpy": lambda w: w.x.numpy().__setitem__(1, 3.0),
    "data by .data": lambda w: w.x.data.add_(1.0),
    "other memory of the data": lambda w: setattr(w.x, "data", w.x.data.flip(0) + 1.0),
    "weights": lambda w: w.weights.mul_(3.0),
    "one weight": lambda w: w.weights[0].fill_(4.0),
    "other weights": lambda w: setattr(w, "weights", w.weights * 2),
    "exposures": lambda w: w.exposures.add_(0.5),
    "exposures by numpy": lambda w: w.exposures.numpy().__setitem__(0, 2.0),
    "mask": lambda w: w.mask[2].fill_(False),
    "mask by numpy": lambda w: w.mask.numpy().__setitem__(0, False),
    "numpy memory": lambda w: w.shift.__setitem__(3, 1.0),
    "a tensor in an argument": lambda w: w.box["offset"].fill_(0.7),
    "an argument's entry": lambda w: put(w.box, "offset", torch.tensor(0.4)),
    "a number": lambda w: setattr(w, "spread", 1.5),
    "a number of a global object": lambda w: setattr(SCALES, "spread", 0.8),
}


def quietly():
    context = warnings.catch_warnings()
    context.__enter__()
    warnings.simplefilter("error", PyroEMWarning)
    return context


@pytest.mark.parametrize("opaque", [False, True], ids=["compiled", "opaque"])
@pytest.mark.parametrize("change", CHANGES)
def test_steps_are_taken_on_what_there_is(change, opaque):
    world = World(opaque)
    em = ExactPosteriorEM(world.model)
    mu, context = None, quietly()
    try:
        for step in itertools.islice(em.steps(world.x, world.box), 6):
            if step.index:
                assert step.elbo == pytest.approx(world.evidence(mu), rel=1e-5)
            if step.index == 2:
                CHANGES[change](world)
            mu = step.params["mu"].numpy()
    finally:
        context.__exit__(None, None, None)
    assert step.index == 5


@pytest.mark.parametrize("opaque", [False, True], ids=["compiled", "opaque"])
@pytest.mark.parametrize("change", ["data", "weights", "exposures by numpy", "mask", "a number"])
def test_a_callback_may_change_what_there_is(change, opaque):
    world = World(opaque)
    em, path = ExactPosteriorEM(world.model), []

    def look(step):
        path.append((step.elbo, world.evidence(step.params["mu"].numpy())))
        if step.index in (2, 5):
            CHANGES[change](world)
            path[-1] = (step.elbo, world.evidence(step.params["mu"].numpy()))

    context = quietly()
    try:
        result = em.fit(world.x, world.box, max_steps=6, tol=0, callbacks=look)
    finally:
        context.__exit__(None, None, None)
    assert result.num_steps == 6
    for (_, expected), (elbo, _) in itertools.pairwise(path):
        assert elbo == pytest.approx(expected, rel=1e-5)
    at = world.evidence(result.params["mu"].numpy())
    assert result.log_evidence == pytest.approx(at, rel=1e-5)


@pytest.fixture(scope="module")
def references():
    """Standard errors and responsibilities of the fit in a world that nothing changes."""
    found = {}
    for opaque in (False, True):
        with pyro.get_param_store().scope():
            world, before = World(opaque), torch.get_default_dtype()
            torch.set_default_dtype(torch.float64)
            try:
                result = ExactPosteriorEM(world.model).fit(world.x, world.box, **FIVE_STEPS)
                errors = result.standard_errors()["mu"]
                found[opaque] = errors, result.posterior.probs("z")
            finally:
                torch.set_default_dtype(before)
    return found


@pytest.mark.parametrize("opaque", [False, True], ids=["compiled", "opaque"])
@pytest.mark.parametrize("change", CHANGES)
def test_late_results_are_those_of_the_fit_or_refused(change, opaque, references):
    world = World(opaque)
    em = ExactPosteriorEM(world.model)
    result = em.fit(world.x, world.box, **FIVE_STEPS)
    errors, probs = references[opaque]
    before = SCALES.spread
    CHANGES[change](world)
    for late, expected in (
        (lambda: result.standard_errors()["mu"], errors),
        (lambda: result.posterior.probs("z"), probs),
    ):
        try:
            found = late()
        except UsageError as error:
            assert "changed in place after the fit" in str(error)
        else:
            assert torch.allclose(found, expected, rtol=1e-4)
    SCALES.spread = before


def test_standard_errors_of_changed_data_are_refused():
    world = World(False)
    result = ExactPosteriorEM(world.model).fit(world.x, world.box)
    world.x.add_(1.0)
    with pytest.raises(UsageError, match="standard_errors: the data, or something else that the"):
        result.standard_errors()


def test_an_earlier_steps_posterior_is_refused_on_other_data():
    world = World(False)
    steps = ExactPosteriorEM(world.model).steps(world.x, world.box)
    first, second = next(steps), next(steps)
    kept = first.posterior.probs("z")
    world.x.add_(1.0)
    third = next(steps)
    assert third.posterior.probs("z").shape == kept.shape
    try:
        found = second.posterior.probs("z")
    except UsageError as error:
        assert "changed in place" in str(error)
    else:
        assert torch.allclose(found.sum(-1), torch.ones(4))


def test_a_drawn_posterior_of_changed_data_is_refused():
    x = torch.tensor([0.0, 1.0, 5.0])

    def model(x):
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    def guide(x):
        a = pyro.param("a", torch.tensor(0.3))
        with pyro.plate("n", len(x)):
            pyro.sample("h", dist.Normal(a * x, 0.5))

    result = ExactPosteriorEM(model, guide, strategy="guide").fit(x, max_steps=3)
    mean = result.posterior.mean("h")
    assert mean.shape == (3,)
    x.mul_(2.0)
    for ask in (
        lambda: result.posterior.mean("h"),
        lambda: result.posterior.sample(2),
        lambda: result.posterior.entropy(),
    ):
        with pytest.raises(UsageError, match="changed in place after the fit"):
            ask()


def test_a_drawn_posterior_is_that_of_the_moment_when_it_was_asked_for():
    x = torch.tensor([0.0, 1.0, 5.0])

    def model(x):
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    def guide(x):
        a = pyro.param("a", torch.tensor(0.3))
        with pyro.plate("n", len(x)):
            pyro.sample("h", dist.Normal(a * x, 0.5))

    em = ExactPosteriorEM(model, guide, strategy="guide")
    q = em.posterior(x)
    mean = q.mean("h")
    em.fit(x, max_steps=5)
    assert torch.equal(q.mean("h"), mean)
    assert not torch.equal(em.posterior(x).mean("h"), mean)
    x.add_(1.0)
    with pytest.raises(UsageError, match="changed in place"):
        q.mean("h")


def test_what_the_model_itself_changes_is_no_change():
    calls = {"n": 0}
    norm = torch.nn.BatchNorm1d(1)

    def model(x):
        calls["n"] += 1
        mu = pyro.param("mu", torch.tensor([0.0, 4.0]))
        norm(x.reshape(-1, 1))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(mu[z] + 0.1 * torch.sin(mu[z]), 1.0), obs=x)

    x = torch.tensor([0.0, 1.0, 5.0, 6.5])
    em = ExactPosteriorEM(model)
    result = em.fit(x, max_steps=4, callbacks=lambda step: None)
    assert result.posterior.probs("z").shape == (4, 2)
    assert result.standard_errors()["mu"].shape == (2,)
    program = em._ready((x,), {})
    steps = Guarded(program)
    list(itertools.islice(endless_steps(steps), 3))
    assert steps.program.dependences is program.dependences  # it was not read anew


def test_a_name_that_the_fit_has_read_may_be_used_again():
    x = torch.tensor([0.0, 1.0, 5.0, 6.5])
    weights = torch.ones(4)

    def model():
        mu = pyro.param("mu", torch.tensor([0.0, 4.0]))
        with pyro.plate("n", len(x)), poutine.scale(scale=weights):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    result = ExactPosteriorEM(model).fit()
    before = x.clone()
    x = torch.zeros(7)
    assert result.posterior.probs("z").shape == (4, 2)
    assert result.standard_errors()["mu"].shape == (2,)
    x = before


def test_a_buffer_that_changes_counts():
    class Mixture(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("offset", torch.zeros(()))

        def forward(self, x):
            mu = pyro.param("mu", torch.tensor([0.0, 4.0]))
            with pyro.plate("n", len(x)):
                z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
                pyro.sample("x", dist.Normal(mu[z] + self.offset, 1.0), obs=x)

    x, model = torch.tensor([0.0, 1.0, 5.0, 6.5]), Mixture()
    em = ExactPosteriorEM(model)
    found = []
    for step in itertools.islice(em.steps(x), 4):
        found.append(step.elbo)
        if step.index == 1:
            model.offset.fill_(2.0)
            mu = step.params["mu"].numpy() + 2.0
    rows = np.exp(-0.5 * (x.numpy()[:, None] - mu) ** 2).mean(1) / np.sqrt(2 * np.pi)
    assert found[2] == pytest.approx(np.log(rows).sum(), rel=1e-5)
    result = em.fit(x, max_steps=2)
    model.offset.fill_(3.0)
    with pytest.raises(UsageError, match="changed in place"):
        result.standard_errors()


def test_parameters_that_a_watcher_lowers_are_no_fall():
    """Who writes a parameter may lower the evidence; the steps go on and nothing is said."""
    world = World(True)
    steps = ExactPosteriorEM(world.model).steps(world.x, world.box)
    context = quietly()
    try:
        for step in itertools.islice(steps, 5):
            if step.index == 1:
                with torch.no_grad():
                    pyro.param("mu").unconstrained().copy_(torch.tensor([40.0, -30.0]))
    finally:
        context.__exit__(None, None, None)
    assert step.index == 4


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0),
        torch.arange(6.0).reshape(2, 3).T,
        torch.arange(12.0)[1::2],
        torch.ones(5, dtype=torch.bool),
        torch.tensor(1.0),
        torch.ones(3, dtype=torch.complex64),
        torch.arange(3, dtype=torch.int16),
        torch.ones(4, dtype=torch.bfloat16),
        torch.zeros(1, 3).expand(4, 3),
    ],
    ids=[
        "plain",
        "transposed",
        "strided",
        "bool",
        "number",
        "complex",
        "int16",
        "half",
        "expanded",
    ],
)
def test_a_checksum_sees_every_write(tensor):
    before = checksum(tensor)
    assert checksum(tensor) == before
    base = tensor if tensor.dim() == 0 else tensor[-1]
    base.data.reshape(-1)[-1:].copy_(torch.zeros(1) + 7 if tensor.dtype != torch.bool else False)
    if tensor.dim() == 0:
        tensor.data.fill_(9.0)
    assert checksum(tensor) != before
    swapped = torch.tensor([1.0, 2.0])
    assert checksum(swapped) != checksum(swapped.flip(0))


def test_a_checksum_of_large_data_sees_what_is_written_all_over():
    x = torch.zeros(6_000_000)
    before = checksum(x)
    x.numpy()[:] = np.arange(6_000_000)
    assert checksum(x) != before


def test_a_checksum_where_the_data_are():
    """The one that needs no copy to the CPU sees signs, places and single numbers."""
    x = torch.randn(1001, dtype=torch.float64)
    before = _sums(x)
    x.numpy()[:] *= -1
    assert _sums(x) != before
    x.numpy()[:] *= -1
    assert _sums(x) == before
    x.numpy()[[3, 700]] = x.numpy()[[700, 3]]
    assert _sums(x) != before
    x.numpy()[[3, 700]] = x.numpy()[[700, 3]]
    x.numpy()[-1] += 1e-9
    assert _sums(x) != before
    assert _sums(torch.tensor(True)) != _sums(torch.tensor(False))


@pytest.mark.parametrize("how", ["tolist", "numpy", "item"])
def test_data_that_leave_torch_are_watched(how):
    """The model copies what it closes over, so that no operation of torch reads the data."""
    data = torch.tensor([0.0, 1.0, 5.0, 6.5])

    def values():
        if how == "tolist":
            return torch.tensor(data.tolist())
        if how == "numpy":
            return torch.from_numpy(data.numpy() * 1.0)
        return torch.tensor([v.item() for v in data])

    def model():
        mu = pyro.param("mu", torch.tensor([0.0, 4.0]))
        with pyro.plate("n", 4):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=values())

    em, mu = ExactPosteriorEM(model), np.zeros(2)
    for step in itertools.islice(em.steps(), 5):
        if step.index == 3:
            rows = np.exp(-0.5 * (data.numpy()[:, None] - mu) ** 2).mean(1) / np.sqrt(2 * np.pi)
            assert step.elbo == pytest.approx(np.log(rows).sum(), rel=1e-5)
        if step.index == 2:
            data.add_(1.5)
        mu = step.params["mu"].numpy()


@pytest.mark.parametrize("max_steps", [24, 30, 40])
def test_accelerated_steps_take_what_there_is(max_steps):
    torch.manual_seed(0)
    x, y = torch.randn(12, 2), torch.randn(12)

    def model(x, y):
        b = pyro.param("b", torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("y", dist.Normal((b[z] * x).sum(-1), 1.0), obs=y)

    def look(step):
        if step.index == 7:
            x.mul_(1.5)

    context = quietly()
    try:
        result = ExactPosteriorEM(model).fit(
            x, y, max_steps=max_steps, tol=0, callbacks=look, acceleration="squarem"
        )
    finally:
        context.__exit__(None, None, None)
    loc = x.numpy() @ result.params["b"].numpy().T
    rows = np.exp(-0.5 * (y.numpy()[:, None] - loc) ** 2).mean(1) / np.sqrt(2 * np.pi)
    assert result.log_evidence == pytest.approx(np.log(rows).sum(), rel=1e-5)


def test_an_object_that_holds_the_data_is_looked_into():
    held = SimpleNamespace(x=torch.tensor([0.0, 1.0, 5.0, 6.5]), weight=1.0)

    def model(data):
        mu = pyro.param("mu", torch.tensor([0.0, 4.0]))
        with pyro.plate("n", 4), poutine.scale(scale=data.weight):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=data.x)

    mu = np.zeros(2)
    for step in itertools.islice(ExactPosteriorEM(model).steps(held), 6):
        if step.index:
            rows = np.exp(-0.5 * (held.x.numpy()[:, None] - mu) ** 2).mean(1) / np.sqrt(2 * np.pi)
            assert step.elbo == pytest.approx(held.weight * np.log(rows).sum(), rel=1e-5)
        if step.index == 2:
            held.weight = 2.0
        if step.index == 3:
            held.x = torch.tensor([1.0, 2.0, 3.0, 7.0])
        mu = step.params["mu"].numpy()


def test_a_guide_that_reads_changed_data_takes_them():
    """Point estimates: the pair of model and guide is read anew."""
    world = World(False)

    def model(x, box):
        with pyro.plate("k", 2):
            mu = pyro.sample("mu", dist.Normal(torch.tensor([0.5, 4.0]), 10.0))
        with pyro.plate("n", 4), poutine.scale(scale=world.weights):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    em = ExactPosteriorEM(model, "map")
    mu, context = np.zeros(2), quietly()
    try:
        for step in itertools.islice(em.steps(world.x, world.box), 5):
            if step.index == 3:
                log_p = -0.5 * (world.x.numpy()[:, None] - mu) ** 2 - 0.5 * np.log(2 * np.pi)
                expected = (2 * np.log((np.array([0.4, 0.6]) * np.exp(log_p)).sum(1))).sum()
                assert step.log_evidence == pytest.approx(expected, rel=1e-5)
            if step.index == 2:
                world.weights.fill_(2.0)
                mu = step.params["AutoDelta.mu"].numpy()
    finally:
        context.__exit__(None, None, None)


def test_an_autoguides_posterior_of_changed_weights_is_refused():
    x, weights = torch.tensor([0.0, 1.0, 5.0]), torch.ones(3)

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("n", len(x)), poutine.scale(scale=weights):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    result = ExactPosteriorEM(model, AutoNormal, strategy="guide").fit(x, max_steps=2)
    assert result.posterior.sample(2)["mu"].shape == (2,)
    weights.mul_(2.0)
    with pytest.raises(UsageError, match="changed in place after the fit"):
        result.posterior.sample(1)


@pytest.mark.parametrize("shape", [(1, 2), (5, 2), (1, 3, 2)])
def test_a_column_of_any_length_has_a_checksum(shape):
    """One element counts as contiguous whatever its stride says."""
    x = torch.arange(30.0, dtype=torch.float64)[: np.prod(shape)].reshape(shape)[..., 0]
    assert checksum(x) == checksum(x.clone(memory_format=torch.contiguous_format))
    assert checksum(x) != checksum(x + 1)


def test_one_row_that_is_a_column_of_a_table():
    def model(x):
        mu = pyro.param("mu", torch.ones(2, 2)[:1, 0])
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(mu + z, 1.0), obs=x)

    em = ExactPosteriorEM(model)
    assert em.fit(torch.ones(3, 2)[:1, 0], max_steps=3, progress=False).num_steps > 0
