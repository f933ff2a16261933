"""Names of leaf tensors are found by identity, and are not listed again for each site of a loop."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_em import ExactPosteriorEM
from pyro_em.graph.bindings.autograd import known_below, parameters_below
from pyro_em.graph.bindings.named_leaves import NamedLeaves


def test_names_come_in_the_order_of_the_leaves() -> None:
    a, b, c = (torch.tensor(float(k), requires_grad=True) for k in range(3))
    other = torch.tensor(3.0, requires_grad=True)
    leaves = NamedLeaves({"c": c, "a": a, "b": b})
    assert list(leaves) == ["c", "a", "b"] and leaves["b"] is b and len(leaves) == 3
    assert known_below(a * b + c * other, leaves) == ("c", "a", "b")
    assert parameters_below(b + a, leaves) == ("a", "b")
    assert parameters_below(b + other, leaves) is None
    assert NamedLeaves.of(leaves) is leaves and leaves.name_of(other) is None


def level(x: Tensor) -> None:
    """A random walk seen with noise, as a loop."""
    q = pyro.param("q", torch.tensor(0.5), constraint=dist.constraints.positive)
    z = pyro.sample("z_0", dist.Normal(0.0, 3.0))
    pyro.sample("x_0", dist.Normal(z, 1.0), obs=x[0])
    for t in pyro.markov(range(1, len(x))):
        z = pyro.sample(f"z_{t}", dist.Normal(0.5 * z, q))
        pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[t])


def test_a_chain_lists_the_names_of_its_latents_a_few_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed: list[int] = []
    usual = NamedLeaves.__init__

    def counted(self: NamedLeaves, leaves: dict[str, Tensor]) -> None:
        listed.append(len(leaves))
        usual(self, leaves)

    monkeypatch.setattr(NamedLeaves, "__init__", counted)
    found = []
    for T in (12, 24):
        listed.clear()
        pyro.clear_param_store()
        ExactPosteriorEM(level).plan(torch.linspace(-1.0, 1.0, T))
        found.append(sum(n for n in listed if n >= T))
    assert 0 < found[1] <= 2 * found[0]
