"""Sums of a model's groups over rows, which are kept from batch to batch.

Of a Normal whose mean is a line they are those of `LineSums`, of another family its sufficient
statistics, S_g = Σ_rows E_q[T_g]. Both are taken about a point, and are brought to another one exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_em.families.family import Arguments, Statistics, expected_log_density
from pyro_em.families.student import about
from pyro_em.graph.factors import Group
from pyro_em.reduction.trees import SAME, added, mapped
from pyro_em.updates.expectations.statistics import as_float64
from pyro_em.updates.regressions.line_sums import LineSums


@dataclass(frozen=True, eq=False)
class PlainSums:
    """Sufficient statistics of a group, summed.

    Attributes:
        sums: By name. # (members, *sizes or 1s, *event)
        references: The arguments about which deviations were taken.
    """

    sums: Statistics
    references: Arguments = field(metadata=SAME)

    def about(self, references: Arguments) -> PlainSums:
        """The same sums, deviations taken about other arguments.

        Example:
            >>> zero, two = torch.zeros(1), torch.full((1,), 2.0)
            >>> s = PlainSums({"deviation": zero, "square": two, "weight": two}, {"loc": zero})
            >>> s.about({"loc": torch.ones(1)}).sums["square"].item()  # x = ±1, about 1
            4.0
        """
        s = self.sums
        if "feature" in s and s["feature"].shape[-1] >= 3 and "loc" in self.references:
            feature = about(s["feature"], references["loc"] - self.references["loc"])
            return PlainSums({**s, "feature": feature}, references)
        if "deviation" not in s:
            return PlainSums(s, references)
        step = references["loc"] - self.references["loc"]
        first, second, weight = s["deviation"], s["square"], s.get("precision", s["weight"])
        if second.dim() > first.dim():
            each = weight[..., None, None]
            cross = first.unsqueeze(-1) * step.unsqueeze(-2)
            outer = step.unsqueeze(-1) * step.unsqueeze(-2)
            moved = second - cross - cross.mT + each * outer
            weight = weight.unsqueeze(-1)
        else:
            moved = second - 2 * step * first + weight * step**2
        return PlainSums({**s, "deviation": first - weight * step, "square": moved}, references)

    def named(self) -> Statistics:
        """The statistics together with their references, as rules read them."""
        return {**self.sums, **{f"reference:{n}": a for n, a in self.references.items()}}


GroupSums = PlainSums | LineSums


@dataclass(frozen=True, eq=False)
class ModelSums:
    """The sums of all groups that an M-step reads, over rows.

    Attributes:
        groups: By the number of the group.
        masses: Total expected counts, likewise.
        parameters: Of parameters whose arguments differ between rows, numerators and denominators of
            their closed forms, on their events.
    """

    groups: Mapping[int, GroupSums]
    masses: Mapping[int, float]
    parameters: Mapping[str, tuple[Tensor, Tensor]]

    def __add__(self, other: ModelSums) -> ModelSums:
        return added(self, other)

    def __mul__(self, factor: float) -> ModelSums:
        return mapped(self, lambda leaf: factor * leaf)

    __rmul__ = __mul__

    def about_those_of(self, other: ModelSums) -> ModelSums:
        """The same, each taken about the point of the other's."""
        moved: dict[int, GroupSums] = {}
        for g, own in self.groups.items():
            there = other.groups[g]
            if isinstance(own, PlainSums):
                assert isinstance(there, PlainSums)
                moved[g] = own.about(there.references)
            else:
                assert isinstance(there, LineSums)
                moved[g] = own.about(there.coefficients)
        return ModelSums(moved, self.masses, self.parameters)


@dataclass(frozen=True, eq=False)
class SummedDensity:
    """The expected log density of a group from its sums, in place of data; a `Belief`.

    Attributes:
        sums: The sums.
    """

    sums: PlainSums

    def expected_log_density(self, group: Group, arguments: Mapping[str, Tensor]) -> Tensor:
        """E_q[log p] of all cells together, up to a term free of the arguments, in nats. # ()"""
        assert group.family is not None
        wide = {n: as_float64(a) for n, a in arguments.items()}
        return expected_log_density(group.family, self.sums.named(), wide)

    def statistics(self, group: Group, arguments: Mapping[str, Tensor]) -> Statistics:
        """The sums themselves."""
        return self.sums.named()


def of_one_form(sums: Statistics) -> Statistics:
    """Sums in float64 with a weight for each entry, whether or not the entries of these rows differ."""
    wide = {n: as_float64(t) for n, t in sums.items()}
    weight = wide["weight"]
    alike = [t.shape for t in wide.values() if t.dim() == weight.dim()]
    return {**wide, "weight": weight.expand(torch.broadcast_shapes(*alike))}
