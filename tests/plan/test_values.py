"""What is read of a model is a value: fits and looks make others, and leave it as it is."""

from __future__ import annotations

import itertools
from dataclasses import FrozenInstanceError

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_em import ExactPosteriorEM
from pyro_em.fitting.steps.guarded import Guarded
from pyro_em.fitting.steps.loop import endless_steps
from pyro_em.plan.program import Program
from pyro_em.variational.trainer import Trainer

X = torch.cat([torch.linspace(-1, 1, 20), torch.linspace(19, 21, 20)])


def branching(x: Tensor) -> None:
    """A branch far from the start, which the first M-step crosses."""
    mu = pyro.param("mu", torch.tensor([0.0, 1.0]))
    loc = mu if float(mu.detach()[1]) < 5 else mu.flip(0)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def plain(x: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor([0.0, 1.0]))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)


def read(em: ExactPosteriorEM, x: Tensor) -> Program:
    found = em._ready((x,), {})
    assert isinstance(found, Program)
    return found


def test_a_fit_that_distrusts_a_reading_leaves_it_as_it_is() -> None:
    program = read(ExactPosteriorEM(branching), X)
    updates, kernel = dict(program.updates), program.kernel
    em = Guarded(program)
    with pytest.warns(Warning, match="it is not what the mixture kernel computed"):
        list(itertools.islice(endless_steps(em), 2))
    assert program.compiled and program.updates == updates and program.kernel is kernel
    assert not em.program.compiled and em.program.updates != updates


def test_data_that_change_between_steps_are_those_of_another_program() -> None:
    x = X.clone()
    program = read(ExactPosteriorEM(plain), x)
    em = Guarded(program)
    steps = endless_steps(em)
    first = next(steps)
    x += 1.0
    second = next(steps)
    assert em.program is not program and em.program.dependences is not program.dependences
    pyro.get_param_store()["mu"] = first.params["mu"]
    assert second.elbo == pytest.approx(-ExactPosteriorEM(plain).step(x), rel=1e-9)
    assert program.is_changed() and not em.program.is_changed()


def test_values_cannot_be_written() -> None:
    program = read(ExactPosteriorEM(plain), X)
    with pytest.raises(FrozenInstanceError):
        program.compiled = False  # type: ignore[misc]

    def model(x: Tensor) -> None:
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("h", dist.Normal(pyro.param("m", torch.tensor(0.5)), 1.0))

    trainer = ExactPosteriorEM(model, guide, strategy="guide")._ready((torch.tensor(0.3),), {})
    assert isinstance(trainer, Trainer)
    with pytest.raises(FrozenInstanceError):
        trainer.num_particles = 2  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        trainer.variational.weighted = 3  # type: ignore[misc]
