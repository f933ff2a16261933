"""Linear groups that every row reads, as one product over features of the rows.

    ℓ = Θ Φ + Θ' c,     N = R Φᵀ,     N' = (Σ_n r_n) cᵀ

with Θ = η[columns]. What is the same in all rows, c, is no feature of a row: of counts under a rate
that is one per row, the exposure. Features of data that take few values are written into Φ from these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_em.densities.features import weighted, weights_of, where_counted
from pyro_em.densities.natural import Feature
from pyro_em.graph.factors import Group
from pyro_em.tracing.freed import return_freed_memory


@dataclass(frozen=True, eq=False)
class Piece:
    """One feature of a group, at the elements of η that it multiplies.

    Attributes:
        few: In float64; one row of data where all are the same. # (P, rows), (P, values) or (P, 1)
        columns: # (K, P)
        codes: Which value each row is, where rows take few. # (rows,)
    """

    few: Tensor
    columns: Tensor
    codes: Tensor | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether all rows have the same."""
        return self.codes is None and self.few.shape[1] == 1


@dataclass(frozen=True, eq=False)
class RowFeatures:
    """Linear groups over the same rows.

    Attributes:
        phi: Φ. # (P, rows)
        columns: # (K, P)
        fixed: c. # (F,)
        fixed_columns: # (K, F)
    """

    phi: Tensor
    columns: Tensor
    fixed: Tensor
    fixed_columns: Tensor

    @classmethod
    def of(cls, pieces: Sequence[Piece], rows: int) -> RowFeatures:
        """The features of some groups as one; each is written where it belongs."""
        device = pieces[0].few.device
        own = [p for p in pieces if not p.is_fixed or rows == 1]
        fixed = [p for p in pieces if p.is_fixed and rows > 1]
        return_freed_memory(p.few for p in own)  # of finding them
        if len(own) == 1 and own[0].codes is None:
            phi = own[0].few.contiguous()
        else:
            size = sum(len(p.few) for p in own)
            phi, begin = torch.empty(size, rows, dtype=torch.float64, device=device), 0
            for p in own:
                place = phi[begin : begin + len(p.few)]
                if p.codes is None:
                    place.copy_(p.few)
                else:
                    torch.index_select(p.few, 1, p.codes, out=place)
                begin += len(p.few)
        K = len(pieces[0].columns)
        none = torch.empty(K, 0, dtype=torch.long, device=device)
        return cls(
            phi,
            torch.cat([none, *(p.columns for p in own)], 1),
            torch.cat([phi.new_empty(0), *(p.few[:, 0] for p in fixed)]),
            torch.cat([none, *(p.columns for p in fixed)], 1),
        )

    def thetas(self, eta: Tensor) -> tuple[Tensor, Tensor | None]:
        """Θ, and what all rows add, where they add something. # (K, P), (K, 1)"""
        theta = eta.take(self.columns)
        if not len(self.fixed):
            return theta, None
        return theta, (eta.take(self.fixed_columns) @ self.fixed).unsqueeze(-1)

    def at_cells(self, cells: slice) -> RowFeatures:
        """The same of some values of the latents."""
        return replace(self, columns=self.columns[cells], fixed_columns=self.fixed_columns[cells])

    @property
    def entries(self) -> Tensor:
        """The elements of η that `counts` adds to, one after the other."""
        return torch.cat([self.columns.reshape(-1), self.fixed_columns.reshape(-1)])

    def counts(self, sums: Tensor, mass: Tensor) -> Tensor:
        """Expected features, in the order of `entries`.

        Args:
            sums: R Φᵀ over all rows. # (K, P)
            mass: Σ_n r_n. # (K,)
        """
        return torch.cat([sums.reshape(-1), (mass.unsqueeze(-1) * self.fixed).reshape(-1)])


def pieces_of(group: Group, features: Sequence[Feature], K: int) -> list[Piece] | None:
    """The features of a group whose members all read the same rows; None where columns depend on them.

    Args:
        group: A group whose last dimension is the latent and whose data do not depend on it.
        features: Its features.
        K: Values of the latent.
    """
    lead, members, weight = 1 + group.n_plates, len(group.members), weights_of(group)
    sizes = [1, *group.sizes[: group.n_plates]]
    out = []
    for part in features:
        coded = weight is None and part.codes is not None and members == 1
        f, c = part.few if coded else weighted(part.f, weight), part.columns
        if coded:
            assert part.codes is not None
            few, codes = [len(f), *(1,) * group.n_plates], part.codes
            codes = codes.squeeze(tuple(range(lead, codes.dim()))).expand(sizes).reshape(-1)
        else:
            f = f.expand(members, *f.shape[1:])
            f, c = (t.movedim(0, lead).unsqueeze(0) for t in (f, c))
            few, codes = sizes, None
        if f.shape[lead] != 1 or any(size != 1 for size in c.shape[:lead]):
            return None
        f = f.expand(*few, *f.shape[lead:]).squeeze(lead)
        axes = [lead + i for i, size in enumerate(c.shape[lead + 1 :]) if size == 1]
        axes = [i for i in axes if f.shape[i] > 1]
        if axes:  # data that read the same element
            f = f.sum(axes, keepdim=True)
        f = f.reshape(math.prod(few), -1).T
        if codes is None and f.stride(1) == 0:
            f = f[:, :1]
        elif codes is not None and bool((f == f[:, :1]).all()):
            f, codes = f[:, :1], None
        out.append(Piece(f, c.reshape(c.shape[lead], -1).expand(K, -1), codes))
    return out


def base_of(group: Group, base: Tensor, repeats: Tensor | None) -> float | None:
    """Σ h over the rows, each as often as it occurs; None where it depends on the latent.

    Args:
        group: As in `pieces_of`.
        base: h.
        repeats: How often each row occurs; None for once each. # (rows,)
    """
    lead = 1 + group.n_plates
    if base.shape[lead] != 1:
        return None
    h = where_counted(base, weights_of(group)).squeeze(lead)
    rows = h.expand(len(group.members), *group.sizes[: group.n_plates]).sum(0).reshape(-1)
    return float(rows.sum() if repeats is None else rows @ repeats)
