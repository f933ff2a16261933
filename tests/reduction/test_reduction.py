"""Parts of data and what becomes of their values."""

from __future__ import annotations

import torch

from pyro_em.reduction.over_parts import OverParts
from pyro_em.reduction.reduction import Whole
from pyro_em.reduction.trees import added, larger, leaves
from pyro_em.updates.expectations.statistics import Expectation


def test_an_expectation_of_parts_keeps_the_references_of_one() -> None:
    sums = {0: {"weight": torch.tensor([1.0, 2.0])}}
    one = Expectation(-1.0, sums, {0: {"loc": torch.tensor(3.0)}}, 0.5)
    total = OverParts(lambda: iter([one, one, one])).sum(lambda part: part)
    assert total.log_evidence == -3.0 and total.noise == 1.5
    assert torch.equal(total.sums[0]["weight"], torch.tensor([3.0, 6.0]))
    assert torch.equal(total.references[0]["loc"], torch.tensor(3.0))
    assert torch.equal(one.sums[0]["weight"], torch.tensor([1.0, 2.0]))


def test_trees_are_combined_leaf_by_leaf() -> None:
    a, b = (torch.tensor([1.0, 5.0]), [2, None]), (torch.tensor([3.0, 4.0]), [7, None])
    assert torch.equal(added(a, b)[0], torch.tensor([4.0, 9.0])) and added(a, b)[1] == [9, None]
    assert torch.equal(larger(a, b)[0], torch.tensor([3.0, 5.0])) and larger(a, b)[1] == [7, None]
    assert len(leaves(a)) == 2


def test_all_parts_are_asked() -> None:
    asked = []
    over = OverParts(lambda: iter([1, 2, 3]))
    assert over.any(lambda part: asked.append(part) is None) and asked == [1, 2, 3]
    assert not over.any(lambda part: part > 3)
    assert Whole(2).sum(lambda part: part + 1) == 3 and Whole(2).is_whole and not over.is_whole
