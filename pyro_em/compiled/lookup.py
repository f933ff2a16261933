r"""Rows of symbols: each reads one row of a small table, which is cheaper than a product.

With s_t the symbol of row t, ℓ_t = E[s_t] for all of them, and Σ_t γ_t [s_t = s] back. Exponentials
and maxima are taken of the table, once per symbol.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.compiled.counted import Counted


@dataclass(frozen=True, eq=False)
class Lookup:
    """A linear group whose rows each have one feature, and that feature is one.

    Attributes:
        index: The symbol of each row; one past the last where a row is masked. # (rows,)
        often: How many rows have it. # (S,) or (S + 1,)
        columns: The elements of η. # (S, K)
    """

    index: Tensor
    often: Tensor
    columns: Tensor

    def table(self, eta: Tensor) -> Tensor:
        """Log densities of the symbols; zero where a row is masked. # (S or S + 1, K)"""
        table = eta.take(self.columns)
        if len(self.often) == len(table):
            return table
        return torch.cat([table, table.new_zeros(1, table.shape[1])])

    def rows(self, table: Tensor) -> Tensor:
        """A table's row for each row of the data. # (rows, K)"""
        return table.index_select(0, self.index)

    def counts(self, rows: Tensor) -> Tensor:
        """Posterior masses of rows, summed per symbol, as the elements of η have them. # (K * S,)"""
        S, K = self.columns.shape
        total = rows.new_zeros(len(self.often), K).index_add_(0, self.index, rows)
        return total[:S].T.reshape(-1)


def as_lookup(part: Counted) -> Lookup | None:
    """The lookup that rows are, or None where a row has other features than one that is one."""
    each = part.phi.sum(0)
    if not bool(((part.phi == 0) | (part.phi == 1)).all()) or not bool((each <= 1).all()):
        return None
    S = len(part.phi)
    index = torch.where(each == 1, part.phi.argmax(0), S)
    size = S + int(bool((each == 0).any()))
    often = torch.bincount(index, minlength=size).to(torch.float64)
    return Lookup(index, often, part.columns.T.contiguous())
