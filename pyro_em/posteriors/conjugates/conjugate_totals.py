"""Sums over many conjugate latents under one prior: their evidence, and their expected statistics.

With the prior's χ and what the data add to each element, Δ_i, and weights w_i,

    Σ w_i (A(χ + Δ_i) − A(χ)),    Σ w_i E[t at χ + Δ_i].

Both are made of log Γ and ψ of single numbers, α + δ: of numbers χ_k + Δ_ik and, for simplexes, of
their sum. Counts have few different values, so that each costs its functions once however many rows
there are; of a Gamma's rate a logarithm for each row remains. Rows are read some at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pyro_em.families.conjugate_kernels import PriorKernel

# Some rows: Δ, and their weights, which are one where None. # (rows, P), (rows,)
Rows = tuple[Tensor, Tensor | None]

_MOST = 1 << 16  # values up to which whole numbers are counted by themselves
_FEW = 1 << 12  # different ones of other numbers that are told apart


class Source(Protocol):
    """Gives all rows, some at a time, as often as it is asked."""

    def __call__(self) -> Iterator[Rows]:
        """The rows."""
        ...


@dataclass(frozen=True, eq=False)
class Tally:
    """The different values of a number of each row, and how often each occurs.

    Attributes:
        values: # (V,)
        counts: Σ w of the rows that have each. # (V,)
    """

    values: Tensor
    counts: Tensor

    @classmethod
    def of(cls, x: Tensor, weights: Tensor | None) -> Tally | None:
        """That of some rows; None where too many are different.

        Example:
            >>> Tally.of(torch.tensor([3.0, 0.0, 3.0]), None).counts
            tensor([1., 0., 0., 2.], dtype=torch.float64)
        """
        if _are_counts(x):
            counts = torch.bincount(x.long(), weights).to(torch.float64)
            return cls(torch.arange(len(counts), dtype=torch.float64, device=x.device), counts)
        if bool((x == x[0]).all()):
            total = x.new_full((1,), len(x)) if weights is None else weights.sum().reshape(1)
            return cls(x[:1].clone(), total)
        values, place = x.unique(return_inverse=True)
        if len(values) > min(_FEW, len(x) // 4):
            return None
        return cls(values, torch.bincount(place, weights).to(torch.float64))

    def __add__(self, other: Tally) -> Tally | None:
        values, place = torch.cat([self.values, other.values]).unique(return_inverse=True)
        if len(values) > _MOST:
            return None
        both = torch.cat([self.counts, other.counts])
        return Tally(values, both.new_zeros(len(values)).index_add_(0, place, both))


def _are_counts(x: Tensor) -> bool:
    low, high = (float(v) for v in x.aminmax())
    return low >= 0 and high < _MOST and bool((x == x.floor()).all())


def tallies(source: Source, numbers: Callable[[Tensor], Tensor]) -> list[Tally | None]:
    """A tally of each of some numbers of all rows; None of those that have many values.

    Args:
        source: Gives the rows.
        numbers: From Δ to the numbers. # (rows, P) -> (rows, C)
    """
    out: list[Tally | None] | None = None
    for delta, weights in source():
        columns = numbers(delta).unbind(-1)
        if out is None:
            out = [Tally.of(x, weights) for x in columns]
            continue
        for c, x in enumerate(columns):
            before = out[c]
            own = None if before is None else Tally.of(x, weights)
            out[c] = None if before is None or own is None else before + own
    return [] if out is None else [_present(t) for t in out]


def _present(tally: Tally | None) -> Tally | None:
    if tally is None:
        return None
    there = tally.counts != 0
    return Tally(tally.values[there], tally.counts[there])


@dataclass(frozen=True, eq=False)
class GammaFunctions:
    """Σ w (log Γ(α_c + δ_c) − log Γ(α_c)) and Σ w ψ(α_c + δ_c) of some numbers δ of each row.

    Attributes:
        values: Of numbers of few values these, one number after the other. # (V,)
        counts: How often each occurs. # (V,)
        which: The number that each is of. # (V,)
        many: The numbers that have many values.
    """

    values: Tensor
    counts: Tensor
    which: Tensor
    many: tuple[int, ...]

    @classmethod
    def of(cls, found: list[Tally | None]) -> GammaFunctions:
        """Those of numbers with the tallies of all rows."""
        few = [(c, t) for c, t in enumerate(found) if t is not None]
        many = tuple(c for c, t in enumerate(found) if t is None)
        if not few:
            none = torch.zeros(0, dtype=torch.float64)
            return cls(none, none, none.long(), many)
        which = [torch.full_like(t.values, c, dtype=torch.long) for c, t in few]
        values, counts = (torch.cat(list(ts)) for ts in zip(*_pairs(few), strict=True))
        return cls(values, counts, torch.cat(which), many)

    def few(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of numbers of few values, zero of others. # (C,) each"""
        if not len(self.values):
            return torch.zeros_like(alpha), torch.zeros_like(alpha)
        own = alpha[self.which]
        at = own + self.values
        zero, which = torch.zeros_like(alpha), self.which
        log = self.counts * (at.lgamma() - own.lgamma())
        return zero.index_add(0, which, log), zero.index_add(0, which, self.counts * at.digamma())

    def of_rows(self, alpha: Tensor, x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """What some rows add to the sums of numbers of many values. # (C,) each"""
        log, psi = torch.zeros_like(alpha), torch.zeros_like(alpha)
        for c in self.many:
            at = x[:, c] + alpha[c]
            log[c] = _sum(at.lgamma() - alpha[c].lgamma(), weights)
            psi[c] = _sum(at.digamma(), weights)
        return log, psi


def _pairs(few: Iterable[tuple[int, Tally]]) -> list[tuple[Tensor, Tensor]]:
    return [(t.values, t.counts) for _, t in few]


class Totals(Protocol):
    """Evidence and expected statistics of all elements, at any χ of the prior."""

    def at(self, chi: Tensor) -> tuple[Tensor, Tensor]:
        """Σ w (A(χ + Δ) − A(χ)) in nats, and Σ w E[t].

        Args:
            chi: The prior's. # (P,)

        Returns:
            # (), (P,)
        """
        ...


@dataclass(frozen=True, eq=False)
class OfGammas:
    """The totals of Gammas, A(χ) = log Γ(a) − a log b.

    Attributes:
        source: Gives the rows.
        shapes: The sums of what is of their shapes.
        events: Σ w Δ of the shapes. # ()
        weight: Σ w. # ()
        rate: What the data add to the rate, where it is the same for all. # () or None
    """

    source: Source
    shapes: GammaFunctions
    events: Tensor
    weight: Tensor
    rate: Tensor | None

    @classmethod
    def of(cls, kernel: PriorKernel, source: Source) -> OfGammas:
        """Those of all rows."""
        events = weight = torch.zeros((), dtype=torch.float64)
        rate: Tensor | None = None
        alike = True
        for delta, w in source():
            events = events + _sum(delta[:, 0], w)
            weight = weight + (len(delta) if w is None else w.sum())
            rate = delta[0, 1].clone() if rate is None else rate
            alike = alike and bool((delta[:, 1] == rate).all())
        found = tallies(source, lambda delta: delta[:, :1])
        return cls(source, GammaFunctions.of(found), events, weight, rate if alike else None)

    def at(self, chi: Tensor) -> tuple[Tensor, Tensor]:
        """See `Totals.at`."""
        a, b = chi.unbind()
        log, psi = self.shapes.few(chi[:1])
        if self.rate is not None and not self.shapes.many:
            more = (self.rate / b).log1p()  # log b' − log b
            total = self.weight * a + self.events
            logs, rises, means = self.weight * more, total * more, total / (b + self.rate)
        else:
            logs = rises = means = torch.zeros_like(a)
            for delta, w in self.source():
                more = (delta[:, 1] / b).log1p_()
                shape = delta[:, 0] + a
                weighed = shape if w is None else w * shape
                rises = rises + weighed.dot(more)
                means = means + (weighed / (delta[:, 1] + b)).sum()
                logs = logs + _sum(more, w)
                if self.shapes.many:
                    own = self.shapes.of_rows(chi[:1], delta[:, :1], w)
                    log, psi = log + own[0], psi + own[1]
        evidence = log[0] - rises - self.events * b.log()
        return evidence, torch.stack([psi[0] - logs - self.weight * b.log(), -means])


@dataclass(frozen=True, eq=False)
class OfSimplexes:
    """The totals of Betas and Dirichlets, A(χ) = Σ log Γ(χ_k) − log Γ(Σ χ_k).

    Attributes:
        source: Gives the rows.
        functions: Of the numbers χ_k + Δ_k, and of their sum.
    """

    source: Source
    functions: GammaFunctions

    @classmethod
    def of(cls, kernel: PriorKernel, source: Source) -> OfSimplexes:
        """Those of all rows."""
        return cls(source, GammaFunctions.of(tallies(source, _and_sum)))

    def at(self, chi: Tensor) -> tuple[Tensor, Tensor]:
        """See `Totals.at`."""
        alpha = _and_sum(chi)
        log, psi = self.functions.few(alpha)
        if self.functions.many:
            for delta, w in self.source():
                own = self.functions.of_rows(alpha, _and_sum(delta), w)
                log, psi = log + own[0], psi + own[1]
        return log[:-1].sum() - log[-1], psi[:-1] - psi[-1]


def _and_sum(t: Tensor) -> Tensor:
    return torch.cat([t, t.sum(-1, keepdim=True)], -1)


@dataclass(frozen=True, eq=False)
class OfRows:
    """The totals of any other prior, row by row.

    Attributes:
        kernel: The form of prior and posterior.
        source: Gives the rows.
    """

    kernel: PriorKernel
    source: Source

    @classmethod
    def of(cls, kernel: PriorKernel, source: Source) -> OfRows:
        """Those of all rows."""
        return cls(kernel, source)

    def at(self, chi: Tensor) -> tuple[Tensor, Tensor]:
        """See `Totals.at`."""
        evidence, t = torch.zeros_like(chi[0]), torch.zeros_like(chi)
        before = self.kernel.normaliser(chi)
        for delta, w in self.source():
            after = chi + delta
            evidence = evidence + _sum(self.kernel.normaliser(after) - before, w)
            own = self.kernel.expected(after)
            t = t + (own.sum(0) if w is None else w @ own)
        return evidence, t


def _sum(x: Tensor, weights: Tensor | None) -> Tensor:
    return x.sum() if weights is None else weights.dot(x)


# By the kernel's kind; others are summed row by row.
_TOTALS: dict[str, type[OfGammas] | type[OfSimplexes]] = {
    "gamma": OfGammas,
    "beta": OfSimplexes,
    "dirichlet": OfSimplexes,
}


def totals(kernel: PriorKernel, source: Source) -> Totals:
    """Evidence and expected statistics of all elements of a latent.

    Args:
        kernel: The form of prior and posterior.
        source: Gives what the data add to each element, some rows at a time.
    """
    return _TOTALS.get(kernel.kind, OfRows).of(kernel, source)
