"""What an M-step asks of one part of the data: sums at the posterior, as parameters move.

The posterior is that of the E-step; arguments follow the values that the M-step has found so far. All
answers add up over parts: numerators and denominators of closed forms, normal equations, the expected
log joint with its derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Protocol

import torch
from torch import Tensor

from pyro_em.families.family import Statistics
from pyro_em.graph.factors import FactorGraph
from pyro_em.tracing.parameters import TracedParameter, values_of
from pyro_em.updates.closed_forms.closed_form import Blend, closed_form, solver_of
from pyro_em.updates.closed_forms.edges import refuse_edge
from pyro_em.updates.closed_forms.ends import outermost
from pyro_em.updates.closed_forms.met_ends import outermost_of, pair_at
from pyro_em.updates.decisions.decision import groups_reached
from pyro_em.updates.expectations.gaussian_rows import event_shape
from pyro_em.updates.expectations.statistics import dot, expected_statistics, group_statistics
from pyro_em.updates.regressions.curved import Curved
from pyro_em.updates.regressions.expansion import Expansion
from pyro_em.updates.regressions.idle import Moves
from pyro_em.updates.regressions.least_squares import Equations, equations_of, least_squares
from pyro_em.updates.regressions.predictors import Predictor, predictors_of
from pyro_em.updates.regressions.shift import (
    ImageSums,
    Shift,
    image_of,
    image_sums,
    is_off,
    mean_sums,
)
from pyro_em.updates.regressions.vector_lines import (
    is_vector,
    residual_statistics,
    scatter_statistics,
    zero_location,
)
from pyro_em.updates.sums.summed_objective import SummedGroup
from pyro_em.updates.update import EXACT, LeastSquares, Newton, ParameterUpdate

Evaluate = Callable[[Mapping[str, Tensor], Sequence[int]], Mapping[int, Tensor]]


class Move(Protocol):
    """One thing that an M-step has found, which all parts have to follow."""

    def apply(self, sums: DataSums) -> None:
        """Change what is known of a part."""
        ...


@dataclass(frozen=True, eq=False)
class Written:
    """New values of parameters.

    Attributes:
        new: By name.
    """

    new: Mapping[str, Tensor]

    def apply(self, sums: DataSums) -> None:
        """See `Move.apply`."""
        sums.write(self.new)


@dataclass(frozen=True, eq=False)
class Expanded:
    """Working coefficients of a latent.

    Attributes:
        expansion: The latent.
        working: Its coefficients.
    """

    expansion: Expansion
    working: Tensor

    def apply(self, sums: DataSums) -> None:
        """See `Move.apply`."""
        for g, argument in self.expansion.children:
            before = sums.arguments[g][argument]
            sums.arguments[g][argument] = self.expansion.applied(before, self.working)
            sums.stale.add(g)


@dataclass(frozen=True, eq=False)
class Shifted:
    """The working mean of a latent, about which its spread is estimated.

    Attributes:
        group: The latent's group.
        mean: The mean. # (q,)
    """

    group: int
    mean: Tensor

    def apply(self, sums: DataSums) -> None:
        """See `Move.apply`."""
        group = sums.graph.groups[self.group]
        loc = self.mean.reshape((1,) * (1 + len(group.sizes)) + event_shape(group))
        sums.arguments[self.group]["loc"] = loc.to(group.arguments["loc"].dtype)
        sums.stale.add(self.group)


@dataclass(frozen=True, eq=False)
class Derivatives:
    """The expected log joint of some groups at some values, with its derivatives.

    Attributes:
        value: In nats. # ()
        gradient: In all moved values, one after the other. # (P,)
        hessian: None where it was not asked for. # (P, P)
    """

    value: Tensor
    gradient: Tensor
    hessian: Tensor | None


_Ask = Callable[[Sequence[str], Mapping[str, Tensor]], Curved]
_Move = Callable[[Sequence[str], Mapping[str, Tensor], Tensor], float]
_Cells = tuple[tuple[tuple[str, ...], int], list[tuple[_Ask, _Move]]]


class DataSums:
    """One part of the data in an M-step.

    Args:
        graph: The factor graph with bindings.
        updates: What was decided per parameter.
        counts: Expected counts per group.
        arguments: Arguments per group at the E-step.
        evaluate: From constrained values and group numbers to those groups' log densities.
        values: Constrained parameter values at the E-step; those in the param store where None.
        compiled: Whether bindings are known to be what the model does.

    Attributes:
        arguments: Per group, as they are now.
        stale: Groups whose statistics have to be taken again: deviations do not shift to another
            location, nor do squares with the coefficients of latents.
    """

    def __init__(
        self,
        graph: FactorGraph,
        updates: Mapping[str, ParameterUpdate],
        counts: Sequence[Tensor],
        arguments: Sequence[Mapping[str, Tensor]],
        evaluate: Evaluate,
        values: Mapping[str, Tensor] | None = None,
        compiled: bool = False,
    ) -> None:
        self.compiled = compiled
        self._summed: dict[int, SummedGroup | None] = {}
        self.graph, self.updates, self.counts = graph, updates, counts
        self.evaluate = evaluate
        self.values = values_of(graph.parameters) if values is None else dict(values)
        self.arguments = [dict(a) for a in arguments]
        exact = {n for n, u in updates.items() if isinstance(u.update, EXACT)}
        needed = groups_reached(graph, exact)
        self.needed = [g for g in needed if graph.groups[g].family is not None]
        # Those of sites that read Gaussian latents change with each update: taken when needed.
        lined = [g for g in self.needed if self._is_lined(g)]
        apart = [*lined, *(g for g in self.needed if self._is_predicted(g))]
        plain = [g for g in self.needed if graph.groups[g].belief is None and g not in apart]
        collected = expected_statistics(graph, counts, arguments, plain)
        self._statistics: dict[int, Statistics] = {g: collected.of(g) for g in plain}
        # Of vectors about a line no squares are kept for every row: they follow the line.
        for g in lined:
            self._statistics[g] = residual_statistics(graph.groups[g], counts[g], arguments[g])
        self.lined = frozenset(lined)
        self.stale = set(self.needed) - set(plain) - self.lined
        self._followed = 0
        self._cells: _Cells | None = None

    # ------------------------------------------------------------------ following

    def following(self, moves: Sequence[Move]) -> DataSums:
        """The same after all moves of an M-step so far."""
        for move in moves[self._followed :]:
            move.apply(self)
        self._followed = len(moves)
        return self

    def write(self, new: Mapping[str, Tensor]) -> None:
        """Take in new values, and put them into the arguments that they reach."""
        self.values |= new
        names = set(new)
        for g in groups_reached(self.graph, names):
            group = self.graph.groups[g]
            if group.family is None:
                continue
            for argument, binding in group.bindings.items():
                if binding.is_static and names.intersection(binding.params):
                    dtype = group.outlines[argument].dtype
                    self.arguments[g][argument] = binding.evaluate(self.values).to(dtype)
            moves_with = group.belief is not None or group.family.is_local
            if g in self.needed and (moves_with or not group.family.additive):
                self.stale.add(g)

    def _taken(self, groups: Iterable[int]) -> dict[int, Statistics]:
        """All statistics, those of some groups about the current locations."""
        for g in self.stale.intersection(groups):
            group = self.graph.groups[g]
            self._statistics[g] = group_statistics(group, self.counts[g], self.arguments[g])
            if group.belief is not None and "loc" in self.arguments[g]:
                self._statistics[g]["reference:loc"] = self.arguments[g]["loc"]
            self.stale.discard(g)
        return self._statistics

    def statistics_of(self, group: int) -> Statistics:
        """The expected statistics of a group without a belief, about its arguments at the E-step."""
        known = self._statistics.get(group)
        if known is None:
            return group_statistics(
                self.graph.groups[group], self.counts[group], self.arguments[group]
            )
        return {n: t for n, t in known.items() if not n.startswith("reference:")}

    def _plain(self) -> list[int]:
        """Groups whose statistics do not follow from moments of Gaussian latents."""
        return [g for g in self.needed if self.graph.groups[g].belief is None]

    # ------------------------------------------------------------------ asking

    def _is_lined(self, g: int) -> bool:
        """Whether the means of a group are vectors that least squares solves for."""
        group = self.graph.groups[g]
        if not is_vector(group):
            return False
        return any(isinstance(self.updates[p].update, LeastSquares) for p in group.mean_params)

    def _is_predicted(self, g: int) -> bool:
        """Whether a group is read from its data: coefficients of a predictor without statistics."""
        group = self.graph.groups[g]
        if group.family is None or group.family.predicted is None or group.belief is not None:
            return False
        return any(isinstance(self.updates[p].update, Newton) for p in group.params)

    def _of_uses(
        self, update: ParameterUpdate
    ) -> tuple[dict[int, Statistics], list[dict[str, Tensor]]]:
        """Statistics of the groups that a closed form reads, and the arguments that belong to them."""
        groups = {u.group for u in update.uses}
        statistics, arguments = dict(self._taken(groups)), list(self.arguments)
        for g in groups & self.lined:
            own = self.arguments[g]
            statistics[g] = scatter_statistics(self.graph.groups[g], self.counts[g], own)
            arguments[g] = {**own, "loc": zero_location(own)}
        return statistics, arguments

    def solved(self, name: str, blend: Blend | None = None) -> tuple[Tensor, list[int]]:
        """The maximiser in one parameter, where this part is all of the data; see `closed_form`."""
        update = self.updates[name]
        statistics, arguments = self._of_uses(update)
        return closed_form(
            update, self.graph, statistics, arguments, self.counts, self.values, blend
        )

    def regressed(self, block: Sequence[str], expansions: Sequence[Expansion]) -> dict[str, Tensor]:
        """The maximisers of a block, where this part is all of the data; see `least_squares`."""
        return least_squares(
            block,
            self.graph,
            self._taken(self._plain()),
            self.arguments,
            self.values,
            self.updates,
            expansions,
        )

    def outermost(self, name: str) -> Tensor:
        """Of a parameter at which a support ends the outermost data; see `ends.outermost`."""
        return outermost(self.updates[name], self.graph, self.counts, self.values[name])

    def outermost_of_pair(self, name: str) -> Tensor:
        """Of two parameters that make both ends of a support the outermost data."""
        pair = pair_at(self.graph, name)
        assert pair is not None
        return outermost_of(pair, self.graph, self.counts, self.values[name])

    def closed(self, name: str) -> tuple[Tensor, Tensor]:
        """Numerator and denominator of one closed form, on the parameter's events."""
        update, value = self.updates[name], self.values[name]
        statistics, arguments = self._of_uses(update)
        return solver_of(update, self.graph, value).sums(statistics, arguments, value)

    def feature_sums(self, groups: Sequence[int]) -> dict[int, Statistics]:
        """Σ T(x) and the weight of groups in linear form."""
        statistics, out = self._taken(groups), {}
        for g in groups:
            family, all_data = self.graph.groups[g].family, self.graph.all_data
            assert family is not None and family.joint_form is not None
            feature, group = family.joint_form.gathered(statistics[g]), self.graph.groups[g]
            if family.joint_form.of_counts and all_data is not None:
                most = all_data.largest[group.members[0]] * family.joint_form.per_level
                more = most - feature.shape[-1]
                feature = torch.nn.functional.pad(feature, (0, more))
            out[g] = {"feature": feature, "weight": statistics[g]["weight"]}
        return out

    def sums_of(self, groups: Sequence[int]) -> dict[int, Statistics]:
        """The expected statistics of groups that have no reference."""
        statistics = self._taken(groups)
        return {g: dict(statistics[g]) for g in groups}

    def refuse_edges(self, groups: Sequence[int]) -> bool:
        """Name a datum of some groups that lies at the end of a support; see `refuse_edge`."""
        for g in groups:
            refuse_edge(self.graph.groups[g], self.counts[g], self.arguments[g])
        return False

    def equations(self, block: Sequence[str], expansions: Sequence[Expansion]) -> Equations:
        """The normal equations of a block of coefficients."""
        statistics = self._taken(self._plain())
        return equations_of(block, self.graph, statistics, self.arguments, self.values, expansions)

    def curved(self, block: Sequence[str], values: Mapping[str, Tensor]) -> Curved:
        """The expected log joint in the coefficients of linear predictors, with its derivatives."""
        parts = [curved(block, values) for curved, _ in self._predicted(block)]
        return parts[0] if len(parts) == 1 else sum(parts[1:], parts[0])

    def furthest(self, block: Sequence[str], step: Tensor) -> float:
        """By how much a step of coefficients moves the predictor of any cell that has data."""
        return max(far(block, self.values, step) for _, far in self._predicted(block))

    def moves(self, block: Sequence[str], step: Tensor) -> Moves:
        """What a direction of coefficients does to all predictors; a dispersion counts by itself."""
        mixed = self.updates[block[0]].is_mixed
        each = [
            p.moves(block, self.values, step) if isinstance(p, Predictor) else (inf, 0.0)
            for p in predictors_of(self.graph, block, mixed=mixed)
        ]
        return max(moved for moved, _ in each), max(size for _, size in each)

    def _predicted(self, block: Sequence[str]) -> list[tuple[_Ask, _Move]]:
        """The predictors that a block reaches, with the sums of their cells as arguments are now."""
        if self._cells is None or self._cells[0] != (tuple(block), self._followed):
            mixed = self.updates[block[0]].is_mixed
            found = predictors_of(self.graph, block, mixed=mixed)
            statistics = self._taken(p.group for p in found if isinstance(p, Predictor))
            each: list[tuple[_Ask, _Move]] = []
            for p in found:
                own = self.arguments[p.group]
                if isinstance(p, Predictor):
                    sums = p.cells(statistics[p.group], own)
                    each.append((partial(p.curved, sums), partial(p.furthest, sums)))
                else:
                    cells = p.cells_of(self.counts[p.group], own)
                    each.append((partial(p.curved, cells), partial(p.furthest, cells)))
            self._cells = (tuple(block), self._followed), each
        return self._cells[1]

    def mean_sums(self, shift: Shift) -> tuple[Tensor, Tensor]:
        """Of a latent the sum of its means and of its weights; see `shift.mean_sums`."""
        return mean_sums(shift, self.graph)

    def image_sums(self, shift: Shift, mean: Tensor) -> ImageSums:
        """What a latent's mean adds to those who read it; see `shift.ImageSums`."""
        size = sum(self.values[name].numel() for name in shift.block)
        return image_sums(self._image(shift, mean), mean.new_zeros(size))

    def image_size(self, shift: Shift, mean: Tensor) -> float:
        """The largest number of what a latent's mean adds."""
        image = self._image(shift, mean)
        return 0.0 if image is None else float(image[1].abs().amax())

    def is_off(self, shift: Shift, mean: Tensor, gain: Tensor, size: float) -> bool:
        """Whether coefficients do not take a mean in; see `shift.is_off`."""
        image = self._image(shift, mean)
        return image is None or is_off(*image, gain, size)

    def _image(self, shift: Shift, mean: Tensor) -> tuple[Tensor, Tensor] | None:
        return image_of(shift, self.graph, self.arguments, self.values, mean)

    def masses(self) -> list[float]:
        """Total expected counts per group."""
        return [float(c.sum()) for c in self.counts]

    def expected_log_joint(self, values: Mapping[str, Tensor], groups: Sequence[int]) -> Tensor:
        """E_q[log p] of some groups at given values, in nats; differentiable. # ()"""
        summed = {g: found for g in groups if (found := self._by_sums(g)) is not None}
        rest = [g for g in groups if g not in summed]
        tables = self.evaluate(values, rest) if rest else {}
        parts = [found.at(values) for found in summed.values()]
        return torch.stack([*parts, *(dot(self.counts[g], tables[g]) for g in rest)]).sum()

    def _by_sums(self, g: int) -> SummedGroup | None:
        """A group whose expected log density follows from sums, which are taken once."""
        if not self.compiled:
            return None
        if g not in self._summed:
            group, counts = self.graph.groups[g], self.counts[g]
            self._summed[g] = SummedGroup.of(group, counts, self.arguments[g])
        return self._summed[g]

    def derivatives(
        self,
        values: Mapping[str, Tensor],
        moved: Sequence[TracedParameter],
        groups: Sequence[int],
        order: int,
    ) -> Derivatives:
        """The expected log joint with its derivatives in the constrained values of some parameters.

        Args:
            values: Constrained values of all parameters.
            moved: The parameters.
            groups: Groups that they reach.
            order: 0 for the value alone, 1 with the gradient, 2 with second derivatives.
        """
        own = {p.name: values[p.name].detach().requires_grad_(order > 0) for p in moved}
        fixed = {n: v.detach() for n, v in values.items()}
        with torch.set_grad_enabled(order > 0):
            value = self.expected_log_joint({**fixed, **own}, groups)
            if order == 0 or not value.requires_grad:
                size = sum(v.numel() for v in own.values())
                flat = value.new_zeros(size)
                return Derivatives(
                    value.detach(), flat, flat.new_zeros(size, size) if order > 1 else None
                )
            # A module's own parameter is read from where it lives, not from what it is given.
            leaves = [
                (own[p.name], p.unconstrained) if p.leaf is p.unconstrained else (own[p.name],)
                for p in moved
            ]
            gradient = _gradient(value, leaves, curved=order > 1)
            hessian = None
            if order > 1:
                rows = [
                    _gradient(component, leaves, curved=True).detach()
                    if component.requires_grad
                    else torch.zeros_like(gradient.detach())
                    for component in gradient
                ]
                hessian = torch.stack(rows)
        return Derivatives(value.detach(), gradient.detach(), hessian)


def _gradient(value: Tensor, leaves: Sequence[tuple[Tensor, ...]], *, curved: bool) -> Tensor:
    """The gradient, one parameter after the other. # (P,)"""
    flat = [t for pair in leaves for t in pair if t.requires_grad]
    found = torch.autograd.grad(
        value, flat, allow_unused=True, create_graph=curved, retain_graph=curved
    )
    each = iter(found)
    out = []
    for pair in leaves:
        total = torch.zeros_like(pair[0])
        for t in pair:
            part = next(each) if t.requires_grad else None
            total = total if part is None else total + part.reshape(total.shape)
        out.append(total.reshape(-1))
    return torch.cat(out)
