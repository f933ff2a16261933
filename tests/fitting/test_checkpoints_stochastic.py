"""Stochastic fits that are broken off and go on from their checkpoint, to the last bit."""

import os
import random
import signal
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyro_em import Alternating, ClosedForm, EMStatus, ExactPosteriorEM
from pyro_em.errors import UsageError
from pyro_em.fitting.checkpoint.checkpoint_file import CheckpointFile
from pyro_em.variational.bound import Variational

pytestmark = pytest.mark.slow

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Killed(BaseException):
    """Stands for a process that ends at once."""


class Autoencoder(nn.Module):
    def __init__(self, extra=()):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), *extra, nn.Tanh(), nn.Linear(6, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        h = self.encoder(x)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(h[:, :2], h[:, 2:].exp()).to_event(1))


def global_latents(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        shift = torch.tensor([0.0, 2.0])
        pyro.sample("x", dist.StudentT(4.0, loc + shift[z], scale), obs=x[:, 0])


class Noisy(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] + 0.1 * np.random.randn() + 0.1 * random.random()


def autoencoder(optim=None, extra=(), **given):
    pair = Autoencoder(extra)
    return ExactPosteriorEM(pair.model, pair.guide, optim, **given)


def loader(generator):
    def data():
        own = None if generator is None else torch.Generator().manual_seed(generator)
        return DataLoader(TensorDataset(X), batch_size=12, shuffle=True, generator=own)

    return data


def augmented():
    return DataLoader(Noisy(), batch_size=12, shuffle=True)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)


BATCHES = {"batch_size": 12}
KINDS = {
    "Adam, validation": (
        autoencoder,
        lambda: X,
        {**BATCHES, "num_epochs": 3, "max_steps": 1000, "validation": X[:9] + 0.1},
    ),
    "own seed": (autoencoder, lambda: X, {**BATCHES, "seed": 4}),
    "optimiser of Pyro": (
        lambda: autoencoder(pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.9})),
        lambda: X,
        BATCHES,
    ),
    "momentum, normalised, dropped out": (
        lambda: autoencoder(sgd, (nn.BatchNorm1d(6), nn.Dropout(0.2))),
        lambda: X,
        BATCHES,
    ),
    "guide and model take turns": (
        autoencoder,
        lambda: X,
        {**BATCHES, "schedule": Alternating(2, 1, guide_optim=sgd)},
    ),
    "global latents, closed form": (
        lambda: ExactPosteriorEM(
            global_latents, AutoNormal, updates={"weights": ClosedForm()}, num_particles=2
        ),
        lambda: X,
        BATCHES,
    ),
    "loader on the global state": (autoencoder, loader(None), {}),
    "loader with its own generator": (autoencoder, loader(5), {"num_epochs": 3}),
    "loader that changes its data": (autoencoder, augmented, {}),
}


def begun(kind):
    """A fit in what stands for a process of its own, as a call of keywords."""
    make, data, usual = KINDS[kind]
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    em, x = make(), data()

    def call(**options):
        result = em.fit(x, progress=False, **{"max_steps": 12, **usual, **options})
        return result, (float(torch.rand(())), np.random.rand(), random.random())

    return call


def fit(kind, **options):
    return begun(kind)(**options)


def assert_same(a, b):
    """Two results with their random numbers, bit for bit."""
    (one, after_one), (other, after_other) = a, b
    for name, value in one.params.items():
        assert torch.equal(value, other.params[name]), name
    assert one.history == other.history
    assert one.history.validation == other.history.validation
    assert (one.elbo, one.status, one.num_steps) == (other.elbo, other.status, other.num_steps)
    assert (one.start, one.total_steps) == (other.start, other.total_steps)
    assert after_one == after_other


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_fit_goes_on_to_the_last_bit(kind, tmp_path, monkeypatch):
    whole = fit(kind)
    write = CheckpointFile.write

    def once(self, make):
        write(self, make)
        raise Killed

    for steps in (1, 4, 7, 10):
        path = tmp_path / f"{steps}.pt"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(CheckpointFile, "write", once)
            fit(kind, checkpoint=path, checkpoint_every=steps)
        assert_same(whole, fit(kind, checkpoint=path))
    # What is done is not done again, and writing has changed no digit.
    monkeypatch.setattr("pyro_em.variational.trainer.Trainer.step", None)
    assert_same(whole, fit(kind, checkpoint=path))


def test_more_epochs_and_steps_are_those_of_one_longer_fit(tmp_path):
    kind = "Adam, validation"
    fit(kind, checkpoint=tmp_path / "epochs.pt", num_epochs=2)
    assert_same(fit(kind), fit(kind, checkpoint=tmp_path / "epochs.pt"))
    kind = "own seed"
    for few in (3, 4, 6):
        path = tmp_path / f"{few}.pt"
        fit(kind, checkpoint=path, max_steps=few)
        assert_same(fit(kind), fit(kind, checkpoint=path))


def test_a_process_that_is_killed_at_a_random_moment(tmp_path):
    kind, path = "Adam, validation", tmp_path / "run.pt"
    whole, child = fit(kind, num_epochs=40), os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            fit(kind, num_epochs=40, checkpoint=path, checkpoint_every=1)
        finally:
            os._exit(0)
    end = time.monotonic() + 20
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.002)
    time.sleep(random.Random(1).uniform(0, 0.3))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    steps = len(torch.load(path, weights_only=True)["bounds"])
    assert 1 <= steps < 160
    assert_same(whole, fit(kind, num_epochs=40, checkpoint=path))


@pytest.mark.parametrize("where", ["a callback", "the loss", "the optimiser"])
def test_an_interrupted_fit_goes_on_in_the_same_process(where, tmp_path, monkeypatch):
    kind = "momentum, normalised, dropped out"
    whole, count = fit(kind, callbacks=lambda step: None), [0]
    loss, move = Variational.loss, torch.optim.SGD.step

    def interrupted(original):
        def inside(*args, **kwargs):
            found = original(*args, **kwargs)
            count[0] += 1
            if count[0] == 7:
                raise KeyboardInterrupt
            return found

        return inside

    call = begun(kind)
    with monkeypatch.context() as patch:
        if where == "the loss":
            patch.setattr(Variational, "loss", interrupted(loss))
        if where == "the optimiser":
            patch.setattr(torch.optim.SGD, "step", interrupted(move))
        watch = interrupted(lambda step: None) if where == "a callback" else ()
        options = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 3}
        first, _ = call(callbacks=watch, **options)
    assert first.status is EMStatus.INTERRUPTED and first.num_steps in (6, 7)
    steps = len(torch.load(tmp_path / "run.pt", weights_only=True)["bounds"])
    # In the midst of an optimiser's step nobody knows where it is: what was written before counts.
    assert steps == (6 if where == "the optimiser" else first.num_steps)
    seen = []
    again = call(callbacks=lambda step: seen.append(step.index), **options)
    assert seen == list(range(steps, 12))
    assert_same(whole, again)


def test_another_fit_is_refused(tmp_path):
    path, kind = tmp_path / "run.pt", "own seed"
    fit(kind, checkpoint=path, max_steps=3)
    content = path.read_bytes()

    def refused(words, call):
        with pytest.raises(UsageError, match=words):
            call()
        assert path.read_bytes() == content

    refused("batch_size is 12 there and 9 here", lambda: fit(kind, checkpoint=path, batch_size=9))
    refused("seed is 4 there", lambda: fit(kind, checkpoint=path, seed=None))
    refused("schedule", lambda: fit(kind, checkpoint=path, schedule=Alternating()))
    refused("validation", lambda: fit(kind, checkpoint=path, validation=X[:5]))

    def other(x=X, **given):
        pyro.clear_param_store()
        em = autoencoder(**given)
        return lambda: em.fit(
            x, progress=False, max_steps=12, seed=4, batch_size=12, checkpoint=path
        )

    refused("optim is None there", other(optim=sgd))
    refused("num_particles is 1 there and 2 here|num_particles", other(num_particles=2))
    refused("values of argument 0 are others", other(X + 1e-12))
    refused(r"argument 0 is .* \(40, 4\)", other(X[:30]))
    exact = ExactPosteriorEM(global_latents, guide="map")
    refused("belongs to another fit", lambda: exact.fit(X, checkpoint=path))
