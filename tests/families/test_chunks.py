"""Log densities of many cells: what members share is evaluated once, and nothing else changes."""

import weakref
from dataclasses import replace

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_em.families import chunks, family_of
from pyro_em.families.chunks import log_density
from pyro_em.updates.expectations.statistics import dot


def test_arguments_that_members_share_are_evaluated_once() -> None:
    g = torch.Generator().manual_seed(0)
    value = torch.randint(0, 4, (50, 1), generator=g)
    probs = torch.rand(3, 4, generator=g, dtype=torch.float64).requires_grad_()
    family, seen = family_of(dist.Categorical(probs)), []
    assert family is not None and family.log_density is not None
    density = family.log_density

    def noted(value: Tensor, arguments: dict[str, Tensor]) -> Tensor:
        seen.append((tuple(value.shape), tuple(arguments["probs"].shape)))
        return density(value, arguments)

    watched = replace(family, log_density=noted)
    shared = log_density(watched, value, {"probs": probs.expand(50, 3, 4)}, 2, 0)
    assert seen == [((50, 1), (1, 3, 4))]
    expected = probs.log()[:, value[:, 0]].T
    torch.testing.assert_close(shared, expected)
    weight = torch.rand(50, 3, generator=g, dtype=torch.float64)
    (ours,) = torch.autograd.grad((weight * shared).sum(), probs)
    (theirs,) = torch.autograd.grad((weight * expected).sum(), probs)
    torch.testing.assert_close(ours, theirs)


def test_cells_that_members_share_keep_the_shape_of_all() -> None:
    family = family_of(dist.Normal(0.0, 1.0))
    assert family is not None
    loc = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(7, 2)
    value, scale = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    table = log_density(family, value.expand(7, 1), {"loc": loc, "scale": scale}, 2, 0)
    torch.testing.assert_close(table, dist.Normal(loc, 1.0).log_prob(torch.zeros(7, 1)))


def test_weighted_sums_of_shared_densities_count_each_weight_and_no_zero_times_infinity() -> None:
    table = torch.tensor([[-1.0, -torch.inf], [-2.0, -3.0]], dtype=torch.float64).expand(5, 2, 2)
    weight = torch.arange(20.0, dtype=torch.float64).reshape(5, 2, 2)
    weight[:, 0, 1] = 0.0
    expected = -weight[:, 0, 0].sum() - 2 * weight[:, 1, 0].sum() - 3 * weight[:, 1, 1].sum()
    torch.testing.assert_close(dot(weight, table), expected)
    torch.testing.assert_close(dot(weight, table.clone()), expected)
    weight[2, 0, 1] = 1e-30
    assert float(dot(weight, table)) == -torch.inf


def test_no_piece_waits_among_the_temporaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory between pieces that wait for each other is not given back."""
    monkeypatch.setattr(chunks, "_PIECE", 30)
    x = torch.randn(100, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    arguments = {"loc": torch.arange(3.0).double(), "scale": torch.ones(1, 3).double()}
    arguments["loc"] = arguments["loc"].unsqueeze(0)
    family, made, alive = family_of(dist.Normal(0.0, 1.0)), [], []
    assert family is not None and family.log_density is not None
    density = family.log_density

    def noted(value: Tensor, arguments: dict[str, Tensor]) -> Tensor:
        alive.append(sum(own() is not None for own in made))
        out = density(value, arguments)
        made.append(weakref.ref(out))
        return out

    watched = replace(family, log_density=noted)
    with torch.no_grad():
        found = log_density(watched, x, arguments, 2, 0)
    assert len(alive) == 10 and max(alive) <= 1
    assert torch.equal(found, dist.Normal(arguments["loc"], 1.0).log_prob(x))
