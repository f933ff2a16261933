"""Joint posteriors of any two latents, against a sum over all assignments."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_em import ExactPosteriorEM, UsageError

P2 = torch.tensor([0.3, 0.7], dtype=torch.float64)
P3 = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
T23 = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]], dtype=torch.float64)
T22 = torch.tensor([[0.9, 0.1], [0.4, 0.6]], dtype=torch.float64)
X = torch.tensor([0.3, -0.7], dtype=torch.float64)
Y = torch.tensor([0.1, 1.4, -0.2], dtype=torch.float64)


def _observe(name: str, z: Tensor, value: Tensor) -> None:
    pyro.sample(name, dist.Normal(1.5 * z, 1.0), obs=value)


def crossed_and_apart() -> None:
    n, m = pyro.plate("n", 2, dim=-1), pyro.plate("m", 3, dim=-2)
    with n:
        _observe("x", pyro.sample("a", dist.Categorical(P2)), X)
    with m:
        _observe("y", pyro.sample("b", dist.Categorical(P3)), Y[:, None])


def crossed_below_one() -> None:
    n, m = pyro.plate("n", 2, dim=-1), pyro.plate("m", 3, dim=-2)
    c = pyro.sample("c", dist.Categorical(P2))
    with n:
        _observe("x", pyro.sample("a", dist.Categorical(T22[c])), X)
    with m:
        _observe("y", pyro.sample("b", dist.Categorical(T23[c])), Y[:, None])


def crossed_inside_one() -> None:
    sizes = (("s", 2, -1), ("n", 1, -2), ("m", 2, -3))
    s, n, m = (pyro.plate(name, size, dim=dim) for name, size, dim in sizes)
    with s:
        c = pyro.sample("c", dist.Categorical(P2))
        with n:
            _observe("x", pyro.sample("a", dist.Categorical(T22[c])), X[:1, None] + X)
        with m:
            y = Y[:2, None, None] - X
            _observe("y", pyro.sample("b", dist.Categorical(T22[c])), y)


def same_plate_and_apart() -> None:
    with pyro.plate("n", 2):
        _observe("x", pyro.sample("a", dist.Categorical(P2)), X)
        _observe("y", pyro.sample("b", dist.Categorical(P3)), -X)


def one_in_no_plate() -> None:
    _observe("x", pyro.sample("a", dist.Categorical(P2)), X[0])
    with pyro.plate("m", 3):
        _observe("y", pyro.sample("b", dist.Categorical(P3)), Y)


def both_in_no_plate() -> None:
    _observe("x", pyro.sample("a", dist.Categorical(P2)), X[0])
    _observe("y", pyro.sample("b", dist.Categorical(P3)), Y[0])


def by_way_of_a_third() -> None:
    with pyro.plate("n", 2):
        a = pyro.sample("a", dist.Categorical(P2))
        b = pyro.sample("b", dist.Categorical(P3))
        c = pyro.sample("c", dist.Categorical(T22[a]))
        pyro.sample("y", dist.Normal(1.0 * c + b, 1.0), obs=X)


MODELS = (
    crossed_and_apart,
    crossed_below_one,
    crossed_inside_one,
    same_plate_and_apart,
    one_in_no_plate,
    both_in_no_plate,
    by_way_of_a_third,
)


def brute_joint(model: Callable[[], None], a: str, b: str) -> Tensor:
    """p(a, b | x) for every pair of elements, from plain Pyro's log joints."""
    trace = poutine.trace(model).get_trace()
    latents = {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and n in "abc"}
    sizes = {n: s["fn"].probs.shape[-1] for n, s in latents.items()}
    shapes = {n: s["value"].shape for n, s in latents.items()}
    cells = [range(sizes[n]) for n in latents for _ in range(shapes[n].numel())]
    total, first = 0.0, None
    for flat in itertools.product(*cells):
        left, given = list(flat), {}
        for n in latents:
            own, left = left[: shapes[n].numel()], left[shapes[n].numel() :]
            given[n] = torch.tensor(own).reshape(shapes[n])
        at = poutine.trace(poutine.condition(model, given)).get_trace()
        p = at.log_prob_sum().exp()
        hot_a = torch.nn.functional.one_hot(given[a], sizes[a]).double()
        hot_b = torch.nn.functional.one_hot(given[b], sizes[b]).double()
        part = p * hot_a.unsqueeze(-1) * hot_b.unsqueeze(-2)
        total, first = total + p, part if first is None else first + part
    assert first is not None
    return first / total


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_joint_of_any_two_latents(model: Callable[[], None]) -> None:
    q = ExactPosteriorEM(model).posterior()
    expected = brute_joint(model, "a", "b")
    found = q.joint("a", "b")
    # Plates come left to right, size-one batch dimensions are not among them.
    assert found.numel() == expected.numel()
    torch.testing.assert_close(found, expected.reshape(found.shape), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(q.joint("b", "a"), found.mT)
    names = [n for n in ("a", "b", "c") if n in q.graph.latents]
    for name in names:
        assert q.joint(name, name).shape[-1] == q.probs(name).shape[-1]


def test_joint_across_plates_of_a_weighted_model() -> None:
    def model() -> None:
        with poutine.scale(scale=2.0):
            crossed_below_one()

    q = ExactPosteriorEM(model).posterior()
    with pytest.raises(UsageError, match="plates that cross, in a model with weights"):
        q.joint("a", "b")
