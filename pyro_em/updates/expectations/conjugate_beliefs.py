"""What an M-step knows of conjugate latents: their expected statistics, in place of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_em.expanded import once_each
from pyro_em.families.conjugate_kernels import PriorKernel
from pyro_em.families.conjugate_pairs import Pair
from pyro_em.families.family import Family, Statistics
from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.conjugate_children.conjugate_record import ConjugateRead
from pyro_em.graph.factors import Group
from pyro_em.updates.expectations.beliefs import Moments

MANY_ROWS = 1 << 16  # rows that are computed at a time


@dataclass(frozen=True, eq=False)
class PriorBelief:
    """The expected statistics of a latent, at its own site.

    Attributes:
        kernel: Its prior's.
        t: E_q[t] given the discrete latents. # (1, *plates or 1s, *states or 1s, *to_event or 1s, P)
    """

    kernel: PriorKernel
    t: Tensor

    def expected_log_density(self, group: Group, arguments: Mapping[str, Tensor]) -> Tensor:
        """See `pyro_em.graph.factors.Belief`."""
        return cells_of(group, self.kernel.log_density(self.t, wide(arguments)))

    def statistics(self, group: Group, arguments: Mapping[str, Tensor]) -> Statistics:
        """See `pyro_em.graph.factors.Belief`."""
        return self.kernel.statistics(self.t)


@dataclass(frozen=True, eq=False)
class PriorInRows:
    """The expected statistics of many elements of a latent, computed when they are summed.

    Attributes:
        kernel: Its prior's.
        rows: Gives E_q[t] of some elements, those that are alike once. # (rows, 1, P)
        whole: Gives those of all, as `PriorBelief` holds them.
        place: Which of these each element has; None where all are distinct. # (elements,)
    """

    kernel: PriorKernel
    rows: Callable[[slice], Tensor]
    whole: Callable[[], Tensor]
    place: Tensor | None = None

    def expected_log_density(self, group: Group, arguments: Mapping[str, Tensor]) -> Tensor:
        """See `pyro_em.graph.factors.Belief`."""
        return PriorBelief(self.kernel, self.whole()).expected_log_density(group, arguments)

    def statistics(self, group: Group, arguments: Mapping[str, Tensor]) -> Statistics:
        """See `pyro_em.graph.factors.Belief`."""
        return self.kernel.statistics(self.whole())

    def summed(self, family: Family, weights: Tensor) -> Statistics:
        """Σ w T over all elements, some rows at a time.

        Args:
            family: The prior's.
            weights: One of each element. # (members, *sizes)

        Returns:
            # (1, *1s, *event)
        """
        flat, out = weights.reshape(1, -1), dict[str, Tensor]()
        if self.place is not None:
            distinct = as_wide(weights.new_zeros(1, int(self.place.max()) + 1))
            flat = distinct.index_add_(1, self.place, as_wide(flat))
        for rows in slices_of(flat.shape[1]):
            own, t = as_wide(flat[:, rows]), self.rows(rows)[:, 0].unsqueeze(0)
            value = own.new_zeros(()).expand(own.shape)
            known = self.kernel.statistics(t)
            part = family.expected_statistics(own, value, {}, (False, False), known)
            out = {n: s + out[n] if out else s for n, s in part.items()}
        ones = (1,) * weights.dim()
        return {n: s.reshape(*ones, *s.shape[2:]) for n, s in out.items()}


@dataclass(frozen=True, eq=False)
class ChildBelief:
    """The expected statistics of the latent that each cell of a site reads.

    Attributes:
        pair: What the site adds to the latent's kernel.
        t: E_q[t]. # (1, *plates or 1s, *states or 1s, *to_event or 1s, P)
        reads: Where a cell reads the latent; None where all do.
    """

    pair: Pair
    t: Tensor
    reads: Tensor | None

    def expected_log_density(self, group: Group, arguments: Mapping[str, Tensor]) -> Tensor:
        """See `pyro_em.graph.factors.Belief`."""
        own, value = wide(arguments), as_wide(group.value)
        log_p = (self.pair.delta(value, own) * self.t).sum(-1) + self.pair.log_base(value, own)
        if self.reads is not None:
            assert group.family is not None
            log_p = torch.where(self.reads, log_p, group.family.log_prob(value, own))
        return cells_of(group, log_p)

    def statistics(self, group: Group, arguments: Mapping[str, Tensor]) -> Statistics:
        """Such a site is updated by a gradient alone."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class ScaledMoments(Moments):
    """The moments of a site whose spread reads a latent, which no binding of its spread knows.

    Attributes:
        argument: The spread.
        factor: By what it is multiplied where the latent is at its mean. # (1, *argument or 1s)
    """

    argument: str = ""
    factor: Tensor | None = None

    @classmethod
    def of(cls, moments: Moments, argument: str, at_mean: Tensor, at_unit: Tensor) -> ScaledMoments:
        """Those of a site whose spread is known where the latent is at its mean, and at its unit."""
        own = moments.moments, moments.coefficients, moments.weights, moments.constant
        factor = torch.where(at_unit == 0, 1.0, at_mean / at_unit)
        return cls(*own, argument, factor.detach())

    def expected_log_density(self, group: Group, arguments: Mapping[str, Tensor]) -> Tensor:
        """See `pyro_em.graph.factors.Belief`."""
        assert self.factor is not None
        scaled = arguments[self.argument] * self.factor.to(arguments[self.argument])
        return super().expected_log_density(group, {**arguments, self.argument: scaled})


def slices_of(count: int) -> list[slice]:
    """Rows, so many at a time that what is computed of them stays in the cache."""
    return [slice(begin, begin + MANY_ROWS) for begin in range(0, count, MANY_ROWS)]


def as_wide(t: Tensor) -> Tensor:
    """In double precision."""
    return t.to(torch.float64)


def wide(arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Arguments in double precision."""
    return {n: as_wide(a) for n, a in arguments.items()}


def cells_of(group: Group, log_p: Tensor) -> Tensor:
    """Log densities of cells: summed over events, zero where they do not count. # (1, *sizes)"""
    log_p = log_p.reshape(
        log_p.shape + (1,) * (1 + len(group.sizes) + group.event_dims - log_p.dim())
    )
    if group.elements is not None:
        log_p = torch.where(group.elements, log_p, 0.0)
    elif group.mask is not None:
        mask = group.mask.reshape(group.mask.shape + (1,) * group.event_dims)
        log_p = torch.where(mask, log_p, 0.0)
    if group.event_dims:
        elements = element_sizes(group)
        log_p = (
            log_p.expand(*log_p.shape[: -group.event_dims], *elements)
            .flatten(-group.event_dims)
            .sum(-1)
        )
    return log_p.expand(len(group.members), *group.sizes)


def element_sizes(group: Group) -> tuple[int, ...]:
    """The sizes of the dimensions of ``to_event``."""
    family = group.family
    assert family is not None
    lead = 1 + len(group.sizes)
    shapes = [group.value.shape[lead : lead + group.event_dims]]
    for name, a in group.arguments.items():
        own = a.dim() - family.argument_dims.get(name, 0)
        shapes.append(a.shape[lead : min(own, lead + group.event_dims)])
    return tuple(torch.broadcast_shapes(*shapes))


def with_factor(binding: Binding, factor: Tensor) -> Binding | None:
    """A binding whose argument is multiplied by known factors; None where it cannot be.

    Args:
        binding: How parameters reach the argument.
        factor: # (1, *argument or 1s)
    """
    constant = binding.constant * factor.to(binding.constant)
    if binding.how == "constant":
        return replace(binding, constant=constant)
    if binding.how == "selection" and not binding.normalise:
        selections = tuple(
            replace(
                s,
                index=s.index.expand(constant.shape),
                factor=(
                    factor if s.factor is None else _once(s.factor) * factor.to(s.factor)
                ).expand(constant.shape),
            )
            for s in binding.selections
        )
        return replace(binding, constant=constant, selections=selections)
    if binding.how == "affine" and not binding.normalise and binding.jacobians is not None:
        slopes = binding.jacobians
        if binding.link == "":
            scaled = {n: j.times(factor) for n, j in slopes.items()}
            return replace(binding, constant=constant, jacobians=scaled)
        if binding.link == "exp":
            moved = binding.constant + factor.log().to(binding.constant)
            return replace(binding, constant=moved)
    return None


def _once(factor: Tensor) -> Tensor:
    """A factor without its copies; what is the same for all rows is looked at, too."""
    one = once_each(factor)
    if one.dim() < 2 or one.shape[1] > 1:
        return one
    for axis in range(2, one.dim()):
        first = one.narrow(axis, 0, 1)
        one = first if bool((one == first).all()) else one
    return one


def is_plugged(group: Group, read: ConjugateRead, kernel: PriorKernel) -> bool:
    """Whether, in what parameters of a site maximise, the latent's mean stands for its posterior.

    It does where the latent is a factor: E[log p(x | f g)] = log p(x | f E[g]) + const, as long as the
    number of events is no matter of parameters. So does E[Λ] for a precision matrix, in a mean vector.
    """
    family, pair = group.family, read.pair
    if family is None or pair.argument not in family.rules:
        return False
    if kernel.kind == "wishart":  # a known matrix, or a number that multiplies it
        binding = group.bindings.get(pair.argument)
        return binding is not None and binding.how in ("constant", "selection")
    if kernel.kind != "gamma":
        return False
    if any(group.bindings[a].params for a in pair.counts if a in group.bindings):
        return False
    return with_factor(group.bindings[pair.argument], torch.ones(())) is not None
