"""Rows of counts out of numbers of trials, by a table of the pairs of both that occur.

    ℓ_k(x, n) = t_k[v],    v: the pair (x, n) of the row

A density is evaluated once for each pair, and not for each row, whose numbers of trials may differ.
Responsibilities are summed over the rows of each pair, and the family makes its sums of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.densities.density import PlainRows
from pyro_em.families.family import Family, Statistics
from pyro_em.families.overdispersed import MANY, histogram
from pyro_em.graph.all_data import AllData
from pyro_em.graph.factors import Group

_FEW_PAIRS = 2**12  # below which there may be as many pairs as rows
_ROWS_OF_A_PAIR = 4  # on average, where there are more of them


@dataclass(frozen=True, eq=False)
class PairTable:
    """Log densities of all pairs.

    Attributes:
        table: # (K, pairs)
        size: No term is expanded.
    """

    table: Tensor
    size: float = 0.0

    def part(self, cells: slice) -> PairTable:
        """Some of the components."""
        return PairTable(self.table[cells])


@dataclass(eq=False)
class TrialRows(PlainRows):
    """The rows of a group of counts out of trials, with component-wise arguments beside these.

    Attributes:
        family: The record.
        codes: Which pair each row is. # (rows,)
        counts: Of each pair. # (pairs, 1)
        trials: Of each pair. # (pairs, 1)
        largest: The largest number of trials, of all data.
        K: Components.
        lead: Dimensions of the group before the component's: members and plates.
    """

    family: Family
    codes: Tensor
    counts: Tensor
    trials: Tensor
    largest: int
    K: int
    lead: int

    @property
    def width(self) -> int:
        """Numbers per row that a chunk holds."""
        return 1 + self.K

    @property
    def _known(self) -> dict[str, Tensor]:
        (name,) = self.family.constants
        return {name: self.trials}

    def prepare(self, arguments: Mapping[str, Tensor]) -> PairTable:
        """The table at some arguments."""
        form = self.family.natural
        assert form is not None
        own = {name: arguments[name].to(torch.float64).reshape(1, -1) for name in form.arguments}
        table = self.family.log_prob(self.counts, {**own, **self._known})
        return PairTable(table.expand(len(self.counts), self.K).T.contiguous())

    def features(self, rows: slice, p: PairTable | None = None) -> Tensor:
        """The pairs of some rows. # (rows,)"""
        return self.codes[rows]

    def log_density(self, p: PairTable, features: Tensor, onto: Tensor | None = None) -> Tensor:
        """Log densities of some rows, added to what is there. # (K, rows)"""
        found = p.table.index_select(1, features)
        return found if onto is None else found.add_(onto)

    def moments(self, p: PairTable, weights: Tensor, features: Tensor) -> Tensor:
        """Σ r of some rows at each pair. # (K, pairs)"""
        columns = weights.to(torch.float64).T.contiguous()
        return histogram(columns, features, len(self.counts))

    def over_rows(self, p: PairTable, moments: Tensor) -> Tensor:
        """The family's sums and Σ r, of one size for all data. # (K, P + 1)"""
        form, accumulate = self.family.natural, self.family.accumulate
        assert form is not None and accumulate is not None
        found = accumulate(moments.T, self.counts, self._known, (False, True))["feature"][0]
        more = form.per_level * self.largest - found.shape[-1]
        found = torch.nn.functional.pad(found, (0, more))
        return torch.cat([found, moments.sum(-1, keepdim=True)], -1)

    def statistics(
        self, p: PairTable, moments: Tensor, mass: Tensor, arguments: Mapping[str, Tensor]
    ) -> Statistics:
        """The family's statistics."""
        found = moments.reshape(*(1,) * self.lead, self.K, -1)
        return {"feature": found[..., :-1], "weight": found[..., -1]}


def as_trials(group: Group, K: int, all_data: AllData | None = None) -> TrialRows | None:
    """The rule of counts out of trials, of which each row may have a number of its own, or None.

    Args:
        group: A collapsed group with one member; its only plate is the rows.
        K: Number of components.
        all_data: What is known of all data, where the group holds a part of them.
    """
    family = group.family
    form = None if family is None else family.natural
    if form is None or family is None or not group.observed or form.levels is None:
        return None
    value, lead = group.value, 2
    plain = family.accumulate is not None and len(family.constants) == 1
    if not plain or group.n_plates != 1 or value.shape != (1, group.sizes[0], 1):
        return None
    arguments, (known,) = group.arguments, family.constants
    trials = form.levels(value, arguments)
    own = [arguments[name] for name in form.arguments]
    if trials.dim() > 3 or any(a.dim() != 3 or a.shape[:lead] != (1, 1) for a in own):
        return None
    if trials.numel() not in (1, value.numel()) or group.bindings[known].params:
        return None
    largest = int(trials.max()) if all_data is None else all_data.largest[group.members[0]]
    if largest > MANY:
        return None
    counts, trials = value.reshape(-1).long(), trials.reshape(-1).long()
    pairs, codes = torch.unique(counts * (largest + 1) + trials, return_inverse=True)
    if len(pairs) > max(_FEW_PAIRS, len(codes) // _ROWS_OF_A_PAIR):
        return None
    counts, trials = (
        t.to(torch.float64).unsqueeze(1) for t in (pairs // (largest + 1), pairs % (largest + 1))
    )
    return TrialRows(family, codes, counts, trials, largest, K, lead)
