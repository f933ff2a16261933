"""Climbs without a run of the model at each point: the same numbers, and where the model has to run."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM, Gradient
from pyro_em.tracing.tape import Recorder, Tape
from pyro_em.updates.gradients.replays import Replays

Model = Callable[[Tensor, Tensor], None]

K, N = 2, 20
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, 3, generator=GENERATOR, dtype=torch.float64)
Y = torch.sin(2 * X[:, 0]) + 0.2 * torch.randn(N, generator=GENERATOR, dtype=torch.float64)


class Doubled(torch.autograd.Function):
    """What no operation of torch's shows."""

    @staticmethod
    def forward(ctx: object, t: Tensor) -> Tensor:
        return 2 * t

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return 2 * g


def network() -> torch.nn.Module:
    torch.manual_seed(1)
    layers = torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, K)
    return torch.nn.Sequential(*layers).double()


def decoder(change: Callable[[Tensor], Tensor]) -> tuple[Model, list[int]]:
    """A mixture whose means are a network's, and how often it has run."""
    net, runs = network(), [0]

    def model(x: Tensor, y: Tensor) -> None:
        runs[0] += 1
        pyro.module("net", net)
        p = pyro.param("p", torch.full((K,), 1 / K, dtype=torch.float64), constraint=C.simplex)
        s = pyro.param("s", torch.ones(K, dtype=torch.float64), constraint=C.positive)
        means = change(net(x))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(p))
            loc = (means * torch.nn.functional.one_hot(z, K)).sum(-1)
            pyro.sample("y", dist.Normal(loc, s[z]), obs=y)

    return model, runs


def held(means: Tensor) -> Tensor:
    with torch.no_grad():
        size = means.abs().mean()
    return means / size


def branched(means: Tensor) -> Tensor:
    return means * 1.1 if means.sum() > 0 else means.clone()


def written(means: Tensor) -> Tensor:
    out = torch.zeros_like(means)
    out[:, 0] += means[:, 0]
    out[:, 1] = means[:, 1].relu_() + means[:, 0]
    return out


def fitted(change: Callable[[Tensor], Tensor]) -> tuple[list[float], int]:
    pyro.clear_param_store()
    model, runs = decoder(change)
    em = ExactPosteriorEM(model, updates={"net*": Gradient(steps=8)})
    em.plan(X, Y)
    runs[0] = 0
    return list(em.fit(X, Y, max_steps=2, tol=0).history), runs[0]


@pytest.mark.parametrize(
    ("change", "replayed"),
    [
        (torch.clone, True),
        (held, True),
        (written, True),
        (branched, False),
        (Doubled.apply, False),
    ],
)
def test_a_climb_is_that_of_the_model(
    change: Callable[[Tensor], Tensor], replayed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, runs = fitted(change)
    monkeypatch.setattr(
        Replays, "densities", lambda self, values, groups, _, run: run(values, groups)
    )
    whole, all_runs = fitted(change)
    assert history == pytest.approx(whole, rel=1e-13)
    assert all_runs > 18
    assert runs < 12 if replayed else runs == all_runs


def test_a_model_that_is_another_in_each_run_is_run() -> None:
    """What stands in the notes as a number is seen to change by the second run."""
    calls = [0]

    def warmed(means: Tensor) -> Tensor:
        calls[0] += 1
        return means * (1 + 1e-3 * calls[0])

    replays, weight = Replays(), torch.tensor([0.5], requires_grad=True)
    replays.begin((), {}, [])

    def run(values: dict[str, Tensor], groups: object) -> dict[int, Tensor]:
        return {0: warmed(values["w"]) ** 2}

    for at in (1.0, 2.0, 3.0):
        found = replays.densities({"w": at * weight}, [0], {}, run)  # type: ignore[arg-type]
        assert float(found[0].detach()) == pytest.approx((at * 0.5 * (1 + 1e-3 * calls[0])) ** 2)
    assert calls[0] == 3


def test_a_tape_leaves_out_what_no_parameter_reaches() -> None:
    a, b = torch.tensor(2.0, requires_grad=True), torch.tensor([1.0, 2.0])
    with Recorder({"a": a}, ()) as recorder:
        known = b.exp().sum()
        found = {"x": a.sin() * known, "b": b + 1}
        a.cos()
    tape = recorder.tape(found)
    assert isinstance(tape, Tape)
    assert len(tape.operations) == 2
    there = torch.tensor(3.0, requires_grad=True)
    (slope,) = torch.autograd.grad(tape({"a": there})["x"], there)
    assert float(slope) == pytest.approx(float(there.detach().cos() * known))
