"""The joint maximiser of all parameters of densities in linear form, by Newton steps on sums.

With S = Σ_cells q T(x) and its weight w, the expected log joint of one cell of a group is

    Q(a) = Σ_p S_p η_p(a) − w A(a),      a = f(θ),

and each number of an argument is one element of a parameter, through elementwise maps. Elements that
meet in a cell form a block; blocks are independent problems of a few numbers each, and all of them
are solved side by side in coordinates u without bounds (log θ of what is positive):

    u ← u + t |H|⁻¹ g,

where |H| is the Hessian of −Q with its eigenvalues made positive, steps are at most a factor of twenty
and t is made smaller until Q does not fall. The data are not looked at again.

Source: Minka (2000), "Estimating a Dirichlet distribution", for the sums; Nocedal and Wright (2006),
"Numerical Optimization", section 3.4, for modified Newton steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_em.errors import DegenerateError
from pyro_em.families.family import Statistics
from pyro_em.graph.factors import FactorGraph
from pyro_em.updates.closed_forms.collapses import refuse_collapse
from pyro_em.updates.linear_cells.blocks import EDGE, Places, Problem, There
from pyro_em.updates.linear_cells.coordinates import Coordinates
from pyro_em.updates.linear_cells.placed import places_of
from pyro_em.updates.sums.parted_problem import PartedProblem
from pyro_em.updates.unbounded import Runaway, unbounded_in_words

_LONGEST = 3.0  # of a coordinate in one step

_STEPS = 200

_TRIALS = 30

_CUTS = 3  # steps in a row that end where sums no longer tell, before these are taken anew

_LAST = 1e-5  # a step after which the next is lost in rounding: convergence is quadratic

_NOTHING = 1e-18  # nats per datum that no sum shows: of a density that tends to its bound for ever

_UNFINISHED = 1e-6  # nats per datum that a maximum cannot still promise

_BLURRED = 1e-3  # nats per datum of rounding: what grew so large has no maximum

_TINY = 1e-290


class AtEdge(Exception):
    """Data at the end of a support, where a density is zero or infinite, have weight."""


class Further(Exception):
    """A maximum is further away than sums tell; they are to be taken anew at a better place.

    Args:
        values: The parameters there.
        empty: The flat indices of elements without data.
    """

    def __init__(self, values: dict[str, Tensor], empty: dict[str, list[int]]) -> None:
        super().__init__("the maximum is further away than sums tell")
        self.values, self.empty = values, empty


class NewtonSolver:
    """The maximiser of one block of parameters, decided once and solved from sums over the data.

    The sums are a few numbers, and their many small steps are taken by the host.

    Args:
        block: The parameters.
        graph: The graph whose groups the sums are of.
    """

    def __init__(self, block: tuple[str, ...], graph: FactorGraph) -> None:
        self.block, self.graph = block, graph
        parameters = [graph.parameters[name] for name in block]
        # Steps on sums run in inference mode, whose tensors know no derivatives: factors are copied.
        with torch.inference_mode(False):
            self.coordinates = Coordinates.of(parameters)
            self.places: Places = places_of(self.coordinates, graph)

    @property
    def groups(self) -> tuple[int, ...]:
        """The groups whose sums it needs."""
        return self.places.groups

    def solve(
        self,
        statistics: Mapping[int, Statistics],
        arguments: Mapping[int, Mapping[str, Tensor]] | Sequence[Mapping[str, Tensor]],
        values: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
        """The maximisers of the expected log joint in the block.

        Args:
            statistics: Expected statistics per group.
            arguments: The current arguments per group, for what is known of them.
            values: The current parameters.

        Returns:
            New values, and the flat indices of elements without data, which keep theirs.

        Raises:
            AtEdge: If data at the end of a support decide.
            Further: If the maximum is further away than the sums tell.
            DegenerateError: If the expected log joint rises without end, or a spread collapses.
        """
        # An M-step on sums runs in inference mode, which knows no derivatives.
        with torch.inference_mode(False):
            problem = self.places.at(statistics, arguments, values)
            return self.solve_problem(problem, values)

    def solve_problem(
        self, problem: Problem | PartedProblem, values: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
        """The same of a problem that sums have posed already; see `solve`."""
        with torch.inference_mode(False):
            before = {n: values[n].detach().to("cpu", torch.float64, copy=True) for n in self.block}
            u, is_told = problem.maximum(self.coordinates.enter(before)), True
            if u is None:
                u, is_told = self._climb(problem, self.coordinates.enter(before))
            new, empty = {}, {}
            mass = problem.masses() if problem.may_lack_data() else None
            for name, value in self.coordinates.values(u).items():
                own = None if mass is None else mass[self.coordinates.slices[name]]
                without = None if own is None else own <= 0
                if own is not None and without is not None and bool(without.any()):
                    value = torch.where(without, before[name].reshape(-1), value)
                    read = without & (own > -1)
                    empty[name] = [int(i) for i in read.nonzero().reshape(-1)]
                new[name] = value.reshape(before[name].shape).to(values[name])
        families = {g: self.graph.groups[g].family for g in self.groups}
        forms = {g: f.joint_form for g, f in families.items() if f is not None}
        spreads = {g: f.spread for g, f in forms.items() if f is not None and f.spread is not None}
        refuse_collapse(self.graph, spreads, self.block, {**values, **new})
        if not is_told:
            raise Further(new, empty)
        return new, empty

    def _climb(self, problem: Problem | PartedProblem, u: Tensor) -> tuple[Tensor, bool]:
        """The coordinates of the maximum, from where parameters are.

        Returns:
            The coordinates, and whether the maximum is there: else it is further away than sums tell.

        Raises:
            AtEdge: If data at the end of a support decide.
            DegenerateError: If a block has none.
        """
        here, last, begin, held_back = problem.derivatives(u), None, u, 0
        if not bool((here.slope.abs() < EDGE).all()):
            raise AtEdge
        mass = 1 + problem.block_masses()
        for _ in range(_STEPS):
            step, promise = _direction(here)
            length = step.abs().amax(-1)
            # Within rounding steps no longer shrink: what is left is noise.
            is_noise = promise <= here.rounding
            is_noise &= length >= 0.5 * last if last is not None else length <= _LAST
            if bool((is_noise | (length == 0)).all()):
                break
            step = torch.where(is_noise.unsqueeze(-1), 0.0, step)
            if bool((is_noise | (length <= _LAST) | (promise <= _NOTHING * mass)).all()):
                u = u + problem.spread(step)
                break
            u, here, is_cut = self._searched(problem, u, step, here)
            held_back = held_back + 1 if is_cut else 0
            if held_back >= _CUTS:
                return u, False
            last = length
        else:
            promise = _direction(here)[1]
        ends = (promise <= _UNFINISHED * mass + here.rounding) & (here.rounding <= _BLURRED * mass)
        if not bool(ends.all()):
            self._refuse(problem, begin, u, here, ~ends)
        return u, True

    def _searched(
        self, problem: Problem | PartedProblem, u: Tensor, step: Tensor, here: There
    ) -> tuple[Tensor, There, bool]:
        """As far along the step as Q does not fall, block by block; whether sums end before."""
        is_cut = False
        along = problem.spread(step)
        t: Tensor | None = None
        for _ in range(_TRIALS):
            moved = u + (along if t is None else problem.spread_one(t) * along)
            there = problem.derivatives(moved)
            fine = there.value >= here.value - here.rounding - there.rounding
            # A sum is finite where all of it is.
            fine &= torch.isfinite(there.slope.sum(-1) + there.curvature.sum((-2, -1)))
            is_cut |= bool((there.value == -math.inf).any())
            if bool(fine.all()):
                return moved, there, is_cut
            t = torch.ones_like(here.value) if t is None else t
            t = torch.where(fine, t, torch.where(t > 1e-6, t / 4, 0.0))
        return u, here, is_cut

    def _refuse(
        self,
        problem: Problem | PartedProblem,
        begin: Tensor,
        u: Tensor,
        here: There,
        without_end: Tensor,
    ) -> None:
        """Name the parameter that runs off."""
        way = (u - begin).abs() * problem.spread_one(1.0 * without_end)
        at = int(way.nan_to_num(math.inf).argmax())
        name, element = self.coordinates.name_of(at)
        now = float(self.coordinates.values(u)[name][element])
        runaway = Runaway(name, element, float(problem.spread(here.slope.abs())[at]))
        raise DegenerateError(unbounded_in_words(self.graph, runaway, now))


def _direction(at: There) -> tuple[Tensor, Tensor]:
    """A modified Newton step of each block, and what it promises, in nats. # (B, m), (B,)"""
    factor, failed = torch.linalg.cholesky_ex(at.curvature)
    if not bool(failed.any()):
        step = torch.cholesky_solve(at.slope.unsqueeze(-1), factor).squeeze(-1)
    else:
        values, vectors = torch.linalg.eigh(at.curvature)
        values = values.abs()
        least = 1e-14 * values.amax(-1, keepdim=True) + _TINY
        along = (vectors.mT @ at.slope.unsqueeze(-1)).squeeze(-1)
        step = (vectors @ (along / values.clamp(min=least)).unsqueeze(-1)).squeeze(-1)
    promise = 0.5 * (at.slope * step).sum(-1)
    length = step.abs().amax(-1, keepdim=True)
    return step * (_LONGEST / length.clamp(min=_LONGEST)), promise
