"""Fits of exact steps that are broken off and go on from their checkpoint, to the last bit."""

import errno
import os
import random
import signal
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_em import Annealed, Chunks, EMStatus, ExactPosteriorEM, Gradient, MonteCarlo
from pyro_em.errors import FileError, PyroEMWarning, UsageError
from pyro_em.fitting.checkpoint import checkpoint_file
from pyro_em.fitting.checkpoint.checkpoint_file import CheckpointFile
from pyro_em.tracing import files

pytestmark = pytest.mark.slow


class Killed(BaseException):
    """Stands for a process that ends at once."""


def data(rows=90, width=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, rows // 3, width, generator=generator, dtype=torch.float64)
    return (x + 1.5 * torch.arange(3.0)[:, None, None]).reshape(-1, width)


X = data()
SERIES = data(12, 1, seed=1)[:, 0].cumsum(0) / 4


def mixture(x):
    weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([[0.0, 1.0], [2.0, 2.5], [3.0, 3.0]]))
    scale = pyro.param("scale", torch.ones(3, 2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=x)


def chain(y):
    move = pyro.param(
        "move", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex
    )
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    z = 0
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(move[z]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z], scale), obs=y[t])


def bent(x):
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    angle = pyro.param("angle", torch.tensor([0.3, 1.5]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(3 * torch.tanh(angle[z]), 1.0), obs=x[:, 0])


def factors(x):
    loadings = pyro.param(
        "loadings", torch.tensor([[1.0, 0.2], [0.1, 1.0], [0.5, 0.5], [1.0, 1.0]])
    )
    loc = pyro.param("loc", torch.zeros(4))
    noise = pyro.param("noise", torch.ones(4), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = loc + (loadings @ u.unsqueeze(-1)).squeeze(-1)
        pyro.sample("x", dist.Normal(mean, noise).to_event(1), obs=x)


def state_space(y):
    decay = pyro.param("decay", torch.tensor(0.5))
    step = pyro.param("step", torch.tensor(1.0), constraint=constraints.positive)
    noise = pyro.param("noise", torch.tensor(1.0), constraint=constraints.positive)
    h = pyro.sample("h_0", dist.Normal(0.0, 1.0))
    pyro.sample("y_0", dist.Normal(h, noise), obs=y[0])
    for t in pyro.markov(range(1, len(y))):
        h = pyro.sample(f"h_{t}", dist.Normal(decay * h, step))
        pyro.sample(f"y_{t}", dist.Normal(h, noise), obs=y[t])


def with_priors(x):
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((2,), 2.0)))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x[:, 0])


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05)


KINDS = {
    "mixture on sums": (mixture, X, {}, {}),
    "in single precision": (mixture, X.float(), {}, {}),
    "chain kernel": (chain, SERIES, {}, {}),
    "gradient update": (bent, X, {}, {}),
    "optimiser in the M-step": (bent, X, {"updates": {"angle": Gradient(adam, 2)}}, {}),
    "optimiser of Pyro": (bent, X, {"optim": pyro.optim.Adam({"lr": 0.05})}, {}),
    "factor analysis": (factors, data(60, 4), {}, {}),
    "Gaussian chain": (state_space, SERIES, {}, {}),
    "MAP": (with_priors, X, {"guide": "map"}, {}),
    "SQUAREM on sums": (mixture, X, {}, {"acceleration": "squarem"}),
    "quasi-Newton on sums": (mixture, X, {}, {"acceleration": "quasi-newton", "max_steps": 50}),
    "quasi-Newton through tables": (
        mixture,
        X,
        {},
        {"acceleration": "quasi-newton", "callbacks": lambda step: None},
    ),
    "Monte Carlo": (mixture, X[::3], {"strategy": MonteCarlo(3)}, {"max_steps": 12}),
    "annealed": (mixture, X, {"strategy": Annealed([0.3, 0.7])}, {"max_steps": 12}),
    "chunks": (mixture, Chunks(X, rows=40), {}, {"max_steps": 12}),
    "restarts": (mixture, X, {}, {"num_restarts": 2, "init": "random", "max_steps": 60}),
}


def fit(kind, **options):
    """One fit in what stands for a process of its own; a random number after it."""
    model, x, given, usual = KINDS[kind]
    pyro.clear_param_store()
    torch.manual_seed(3)
    if "optim" in given:
        given["optim"].optim_objs.clear()
    em = ExactPosteriorEM(model, **given)
    result = em.fit(x, progress=False, **{"max_steps": 24, **usual, **options})
    return result, float(torch.rand(()))


def killed_after(steps, kind, path, monkeypatch, **options):
    """A fit that ends when its checkpoint has been written after some steps; whether it came there."""
    with monkeypatch.context() as patch:
        write = CheckpointFile.write

        def once(self, make):
            write(self, make)
            raise Killed

        patch.setattr(CheckpointFile, "write", once)
        patch.setattr("pyro_em.fitting.checkpoint.keeper.ExactKeeper.finish", lambda self, em: None)
        try:
            fit(kind, checkpoint=path, checkpoint_every=steps, **options)
        except Killed:
            return True
    return False


def assert_same(a, b):
    """Two results with their random numbers, bit for bit."""
    (one, after_one), (other, after_other) = a, b
    for name, value in one.params.items():
        assert torch.equal(value, other.params[name]), name
    assert one.history == other.history
    assert one.history.after_m_step == other.history.after_m_step
    assert (one.elbo, one.log_evidence) == (other.elbo, other.log_evidence)
    assert (one.status, one.num_steps) == (other.status, other.num_steps)
    assert (one.starts, one.start) == (other.starts, other.start)
    assert one.ends == other.ends
    assert one.total_steps == other.total_steps
    assert after_one == after_other


def steps_in(path):
    runs = torch.load(path, weights_only=True)["search"]["long"]
    return len(runs[-1]["entering"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_fit_goes_on_to_the_last_bit(kind, tmp_path, monkeypatch):
    whole = fit(kind)
    at = [1, 4, 10, 15, 21] if kind != "restarts" else [3, 66, 71, 90, 118, 140, 170]
    for steps in at:
        path = tmp_path / f"{steps}.pt"
        if not killed_after(steps, kind, path, monkeypatch):
            break
        assert_same(whole, fit(kind, checkpoint=path))
    assert steps > at[1]


@pytest.mark.parametrize(
    "kind", ["mixture on sums", "gradient update", "SQUAREM on sums", "restarts"]
)
def test_writing_changes_no_digit_and_what_is_done_is_not_done_again(kind, tmp_path, monkeypatch):
    whole = fit(kind)
    assert_same(whole, fit(kind, checkpoint=tmp_path / "seldom.pt"))
    assert_same(whole, fit(kind, checkpoint=tmp_path / "run.pt", checkpoint_every=4))
    monkeypatch.setattr("pyro_em.fitting.steps.loop.advance", None)  # no step can be taken
    monkeypatch.setattr("pyro_em.fitting.steps.cycles._Cycles.half", None)
    assert_same(whole, fit(kind, checkpoint=tmp_path / "run.pt"))
    assert_same(whole, fit(kind, checkpoint=tmp_path / "seldom.pt"))


@pytest.mark.parametrize("kind", ["mixture on sums", "SQUAREM on sums", "Monte Carlo", "restarts"])
def test_more_steps_are_those_of_one_longer_fit(kind, tmp_path):
    for few in (2, 9, 19, 35):
        path = tmp_path / f"{few}.pt"
        fit(kind, checkpoint=path, max_steps=few)
        assert_same(fit(kind, max_steps=50), fit(kind, checkpoint=path, max_steps=50))


def test_a_smaller_tolerance_goes_on(tmp_path):
    for kind in ("mixture on sums", "SQUAREM on sums"):
        path = tmp_path / f"{kind}.pt"
        first, _ = fit(kind, checkpoint=path, tol=0.5, max_steps=200)
        assert first.status is EMStatus.CONVERGED
        finer = fit(kind, checkpoint=path, tol=1e-6, max_steps=200)
        assert_same(fit(kind, tol=1e-6, max_steps=200), finer)
        assert finer[0].num_steps > first.num_steps


def test_fewer_steps_than_were_done_are_those_that_were_done(tmp_path):
    whole, _ = fit("mixture on sums", checkpoint=tmp_path / "run.pt")
    again, _ = fit("mixture on sums", checkpoint=tmp_path / "run.pt", max_steps=5)
    assert again.num_steps == whole.num_steps
    assert torch.equal(again.params["loc"], whole.params["loc"])


@pytest.mark.parametrize("kind", ["mixture on sums", "restarts"])
def test_processes_that_are_killed_at_random_moments(kind, tmp_path):
    whole, chance = fit(kind), random.Random(4)
    path, deaths = tmp_path / "run.pt", 0
    for _ in range(4):
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)
                fit(kind, checkpoint=path, checkpoint_every=1)
            finally:
                os._exit(0)
        before = path.stat().st_mtime_ns if path.exists() else 0
        end = time.monotonic() + 20
        while not path.exists() or path.stat().st_mtime_ns == before:
            if os.waitpid(child, os.WNOHANG)[0] or time.monotonic() > end:
                break
            time.sleep(0.001)
        else:
            time.sleep(chance.uniform(0, 0.06))
            os.kill(child, signal.SIGKILL)
            deaths += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert deaths
    for left in tmp_path.glob(".pyro_em-*"):
        left.unlink()  # what was being written
    assert_same(whole, fit(kind, checkpoint=path))


def test_a_fit_that_is_killed_loses_few_steps(tmp_path):
    def watch(step):
        if step.index == 16:
            raise Killed

    for every in (1, 3):
        path = tmp_path / f"{every}.pt"
        with pytest.raises(Killed):
            fit("mixture on sums", checkpoint=path, checkpoint_every=every, callbacks=watch)
        assert 16 - every <= steps_in(path) - 1 <= 16


@pytest.mark.parametrize(
    "kind", ["mixture on sums", "chain kernel", "SQUAREM on sums", "Monte Carlo"]
)
def test_an_interrupted_fit_goes_on_in_the_same_process(kind, tmp_path):
    def interrupt(step):
        if step.index == 10:
            raise KeyboardInterrupt

    usual = KINDS[kind][3]
    whole = fit(kind, callbacks=lambda step: None, tol=0)[0]
    pyro.clear_param_store()
    torch.manual_seed(3)
    em = ExactPosteriorEM(KINDS[kind][0], **KINDS[kind][2])

    def call(watch):
        options = {"max_steps": 24, **usual, "callbacks": watch, "tol": 0}
        return em.fit(KINDS[kind][1], progress=False, checkpoint=tmp_path / "run.pt", **options)

    first = call(interrupt)
    assert first.status is EMStatus.INTERRUPTED and 9 <= first.num_steps <= 11
    seen = []
    again = call(lambda step: seen.append(step.index))
    assert seen == list(range(first.num_steps, whole.num_steps))
    assert_same((whole, 0.0), (again, 0.0))


def test_a_callback_that_stops_a_fit_stops_it_for_good(tmp_path):
    calls = []

    def stop(step):
        calls.append(step.index)
        return step.index == 6

    path = tmp_path / "run.pt"
    first = fit("mixture on sums", checkpoint=path, callbacks=stop)
    assert first[0].status is EMStatus.STOPPED
    assert_same(first, fit("mixture on sums", checkpoint=path, callbacks=stop))
    assert calls == list(range(7))


def test_parameters_that_callbacks_write_are_kept(tmp_path, monkeypatch):
    def shrink(step):
        if step.index in (3, 9):
            with torch.no_grad():
                pyro.get_param_store()._params["loc"].mul_(0.9)

    whole = fit("mixture on sums", callbacks=shrink)
    for steps in (4, 5, 10, 12):
        path = tmp_path / f"{steps}.pt"
        assert killed_after(steps, "mixture on sums", path, monkeypatch, callbacks=shrink)
        assert_same(whole, fit("mixture on sums", checkpoint=path, callbacks=shrink))


def test_data_that_a_callback_changed_are_asked_for_as_they_were_then(tmp_path):
    def change(step):
        if step.index == 5:
            x[0] = 3.0
        if step.index == 9:
            raise KeyboardInterrupt

    x, path = X.clone(), tmp_path / "run.pt"
    pyro.clear_param_store()
    ExactPosteriorEM(mixture).fit(x, progress=False, checkpoint=path, callbacks=change)
    pyro.clear_param_store()
    with pytest.raises(UsageError, match="a callback changed the data"):
        ExactPosteriorEM(mixture).fit(X, progress=False, checkpoint=path)
    result = ExactPosteriorEM(mixture).fit(x, progress=False, checkpoint=path)
    assert result.converged and result.num_steps > 10


# ---------------------------------------------------------------- refused


def a_checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    fit("mixture on sums", checkpoint=path, max_steps=8)
    return path


def refused(path, words, call):
    """That a call is refused with some words, and changes nothing."""
    content = path.read_bytes()
    with pytest.raises(UsageError, match=words) as caught:
        call()
    assert path.read_bytes() == content
    return str(caught.value)


def other_model(x):
    weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([[0.0, 1.0], [2.0, 2.5], [3.0, 3.0]]))
    scale = pyro.param("scale", torch.ones(3, 2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Laplace(loc[z], scale[z]).to_event(1), obs=x)


def test_another_fit_is_refused_with_the_first_difference(tmp_path):
    path = a_checkpoint(tmp_path)

    def call(model=mixture, x=X, given=None, **options):
        pyro.clear_param_store()
        em = ExactPosteriorEM(model, **(given or {}))
        return lambda: em.fit(x, progress=False, checkpoint=path, **options)

    text = refused(path, "site 'x' is Normal", call(other_model))
    assert "Laplace" in text and "resume=False" in text and str(path) in text
    refused(path, r"parameter 'weights' is of shape \(3,\)", call(bent))
    refused(path, r"shape \(90, 2\) there and .* shape \(60, 2\) here", call(x=X[:60]))
    changed = X.clone()
    changed[4, 1] += 1e-9
    refused(path, "values of argument 0 are others", call(x=changed))
    refused(path, "argument 0 is a tensor of torch.float64", call(x=X.float()))
    refused(path, "num_restarts is 1 there and 2 here", call(num_restarts=2))
    refused(path, "seed is None there and 1 here", call(seed=1))
    refused(path, "init is None there and 'random' here", call(init="random"))
    refused(path, "acceleration is None there", call(acceleration="squarem"))
    refused(path, "strategy", call(given={"strategy": MonteCarlo(2)}))
    refused(path, "update of .loc. is ClosedForm", call(given={"updates": {"loc": Gradient()}}))
    refused(path, "argument 0 is a tensor .* there and chunks of", call(x=Chunks(X, rows=40)))
    pyro.clear_param_store()
    again = ExactPosteriorEM(mixture).fit(X, progress=False, checkpoint=path, tol=1e-5)
    assert again.num_steps > 8


def test_constants_of_the_model_are_compared(tmp_path):
    def model_of(width, spread):
        def model(x):
            loc = pyro.param("loc", torch.tensor([0.0, 2.0]))
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
                pyro.sample("x", dist.Normal(loc[z] * width, spread), obs=x[:, 0])

        return model

    path, counts = tmp_path / "run.pt", [0]

    def counting(x):
        counts[0] += 1  # a model may count its runs
        return mixture(x)

    ExactPosteriorEM(model_of(1.0, 1.0)).fit(X, progress=False, checkpoint=path)
    pyro.clear_param_store()
    other = ExactPosteriorEM(model_of(1.0, 1.5))
    refused(
        path,
        "argument 'scale' of site 'x'",
        lambda: other.fit(X, progress=False, checkpoint=path),
    )
    pyro.clear_param_store()
    em = ExactPosteriorEM(counting)
    one = em.fit(X, progress=False, checkpoint=tmp_path / "counted.pt", max_steps=4, tol=0)
    two = em.fit(X, progress=False, checkpoint=tmp_path / "counted.pt", max_steps=6, tol=0)
    assert (one.num_steps, two.num_steps) == (4, 6)


def test_a_refused_call_leaves_the_parameters_as_they_were(tmp_path):
    path = a_checkpoint(tmp_path)
    before = pyro.param("loc").detach().clone()
    em = ExactPosteriorEM(mixture)
    refused(path, "seed", lambda: em.fit(X, progress=False, checkpoint=path, seed=2))
    assert torch.equal(pyro.param("loc"), before)


def test_a_file_that_is_no_checkpoint_is_left_alone(tmp_path):
    path = tmp_path / "run.pt"
    pyro.clear_param_store()
    em = ExactPosteriorEM(mixture)
    em.fit(X, progress=False, max_steps=3)
    em.save(path)
    refused(path, "ExactPosteriorEM.save wrote it", lambda: em.fit(X, checkpoint=path))
    path.write_bytes(b"row,value\n1,2\n")
    refused(path, "no whole checkpoint", lambda: em.fit(X, checkpoint=path))
    path.write_bytes(b"")
    refused(path, "empty", lambda: em.fit(X, checkpoint=path))
    path.unlink()
    whole = a_checkpoint(tmp_path).read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:3000] + b"?" + whole[3001:]):
        path.write_bytes(damaged)
        refused(path, "no whole checkpoint", lambda: em.fit(X, checkpoint=path))
    em.fit(X, progress=False, checkpoint=path, resume=False, max_steps=2)
    assert steps_in(path) == 2


def test_starting_over_replaces_the_file(tmp_path):
    path = a_checkpoint(tmp_path)
    whole = fit("mixture on sums", max_steps=4)
    assert_same(whole, fit("mixture on sums", checkpoint=path, resume=False, max_steps=4))
    assert steps_in(path) == 4


def test_options_that_mean_nothing_are_refused():
    em = ExactPosteriorEM(mixture)
    for options, words in (
        ({"checkpoint_every": 3}, "without checkpoint"),
        ({"checkpoint": "x.pt", "checkpoint_every": 0}, "checkpoint_every=0"),
        ({"checkpoint": 3}, "no path"),
        ({"checkpoint": "x.pt", "resume": "yes"}, "resume"),
        ({"checkpoint": "x.pt", "on_checkpoint_error": "ignore"}, "'warn' or 'raise'"),
    ):
        with pytest.raises(UsageError, match=words):
            em.fit(X, **options)


# ---------------------------------------------------------------- files that cannot be written


def full_disk(path, content, mode):
    Path(path).write_bytes(content[:10])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_said_once_and_the_fit_goes_on(tmp_path, monkeypatch):
    path, whole = a_checkpoint(tmp_path), fit("mixture on sums")
    content = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(files, "_write_new", full_disk)
        with pytest.warns(PyroEMWarning, match="no room") as caught:
            assert_same(whole, fit("mixture on sums", checkpoint=path, checkpoint_every=1))
        assert len(caught) == 1 and "goes on" in str(caught[0].message)
        assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
        assert path.read_bytes() == content
        with pytest.raises(FileError, match="no room"):
            options = {"checkpoint": path, "checkpoint_every": 3, "on_checkpoint_error": "raise"}
            fit("mixture on sums", **options)
        after = fit("mixture on sums", max_steps=11)[0].params["loc"]  # of the 8 there were, and 3
        pyro.clear_param_store()
        with pytest.raises(FileError, match="no room"):
            fit("mixture on sums", **options)
        assert torch.equal(pyro.param("loc").detach(), after)
    assert_same(whole, fit("mixture on sums", checkpoint=path))


def test_a_folder_that_cannot_be_written_is_said_at_the_beginning(tmp_path, monkeypatch):
    folder = tmp_path / "locked"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "access", lambda path, mode: Path(path) != folder)

        def forbidden(path, content, mode):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        patch.setattr(files, "_write_new", forbidden)
        with pytest.warns(PyroEMWarning, match="cannot be written") as caught:
            result, _ = fit("mixture on sums", checkpoint=folder / "run.pt", checkpoint_every=2)
        assert len(caught) == 1 and result.num_steps == 24
        with pytest.raises(FileError, match="cannot be written"):
            fit("mixture on sums", checkpoint=folder / "run.pt", on_checkpoint_error="raise")
    with pytest.warns(PyroEMWarning, match="does not exist"):
        fit("mixture on sums", checkpoint=tmp_path / "missing" / "run.pt", max_steps=2)


def test_writing_by_the_clock_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(checkpoint_file.time, "perf_counter", lambda: clock[0])
    file = CheckpointFile(tmp_path / "run.pt", None, True)
    written = 0
    for _ in range(2000):
        clock[0] += 0.02
        if file.is_due():

            def make():
                clock[0] += 0.05  # what it costs
                return {}

            file.write(make)
            written += 1
    assert 5 <= written <= 10 and written * 0.05 <= 0.012 * clock[0]
