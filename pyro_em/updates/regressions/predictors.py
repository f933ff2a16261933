"""Linear predictors in an M-step: expected log densities with derivatives in their coefficients.

Of a generalised linear argument, with η = J θ + offset of each cell and expected sums n and d there,

    Q(θ) = Σ_cells f(n, d, η),     ∇Q = Σ Jᵀ f′(η),     −∇²Q = Σ Jᵀ (−f″(η)) J,

where f is the functional form of the argument (`pyro_em.families.form.Form.of_predictor`). Of a
predictor in which parameters are multiplied J is ∂η/∂θ at their values, and −∇²Q has −Σ f′(η) ∂²η
besides. Nothing is differentiated by autograd, and the model is not run: J is read off the binding.

Source: McCullagh and Nelder (1989), section 2.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pyro_em.families.family import Arguments, Rule, Statistics
from pyro_em.graph.bindings.binding import LINKS, Binding
from pyro_em.graph.bindings.jacobian import Jacobian
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.tracing.parameters import TracedParameter
from pyro_em.updates.expectations.beliefs import Moments
from pyro_em.updates.expectations.scatter import sum_to
from pyro_em.updates.regressions.curved import Curved
from pyro_em.updates.regressions.designs import designs_of
from pyro_em.updates.regressions.dispersed import Dispersed, dispersed_at, wholly_at
from pyro_em.updates.regressions.idle import Moves


@dataclass(frozen=True, eq=False)
class Predictor:
    """An argument of a group whose predictor is affine in parameters, or bilinear.

    Attributes:
        group: The number of the group.
        argument: The argument's name.
        rule: The family's rule for it.
        binding: The predictor's: affine or bilinear, without a link.
        lead: How many dimensions are rows: members and plates.
    """

    group: int
    argument: str
    rule: Rule
    binding: Binding
    lead: int

    @property
    def params(self) -> tuple[str, ...]:
        """The parameters that reach it."""
        return self.binding.params

    @property
    def event(self) -> int:
        """Dimensions of one value of the predictor: one of a row of logits."""
        return self.rule.kind.event_dim

    def cells(self, statistics: Statistics, arguments: Arguments) -> tuple[Tensor, Tensor]:
        """Numerator and denominator of each cell in which the predictor may differ.

        # (*cells, *event), (*cells, *event or 1s)
        """
        detached = {k: a.detach() for k, a in arguments.items()}
        return self._laid_out(*self.rule.contribution(statistics, detached))

    def _laid_out(self, n: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Sums on the cells of the predictor, in float64."""
        shape = self.binding.constant.shape
        batch = shape[: len(shape) - self.event]
        both = torch.broadcast_shapes(n.shape[: len(batch)], d.shape[: len(batch)])
        n, d = (t.expand(*both, *t.shape[len(batch) :]) for t in (n, d))
        n, d = (sum_to(t, batch, self.event).to(torch.float64) for t in (n, d))
        return (_event_first(n), d) if self.event else (n, d)

    def curved(
        self,
        sums: tuple[Tensor, Tensor],
        block: Sequence[str],
        values: Mapping[str, Tensor],
        *,
        bent: bool = True,
    ) -> Curved:
        """The expected log density in the parameters of a block.

        Args:
            sums: As `cells` returns.
            block: Parameter names.
            values: Of all parameters that reach the predictor.
            bent: Whether second derivatives are asked for; they are zeros where not.
        """
        eta = self.binding.predictor(values).to(torch.float64)
        curve = self.rule.kind.form.of_predictor(*sums, eta)
        linear = self.binding.linear_in(block, values)
        parts = designs_of(linear, block, values, self.lead, self.event)
        row = eta.shape[eta.dim() - self.event :]
        slope = curve.slope.reshape(-1, len(parts), *row)
        weight = curve.curvature.reshape(-1, len(parts), *row)
        total = sum(values[name].numel() for name in block)
        gradient, curvature = eta.new_zeros(total), eta.new_zeros(total, total)
        for k, (columns, narrow) in enumerate(parts):
            if not columns.numel():  # all that its coefficients multiply is zero
                continue
            J, own_slope, w = narrow.to(torch.float64), slope[:, k], weight[:, k]
            if self.event:  # sums over a short row are quicker where its elements lie far apart
                J, own_slope, w = (t.movedim(1, 0) for t in (J, own_slope, w))
            flat = J.reshape(-1, J.shape[-1])
            gradient[columns] += flat.mT @ own_slope.reshape(-1)
            if not bent:
                continue
            weighted = w.reshape(-1, 1) * flat
            own = flat.mT @ weighted
            if self.event:
                size = w.sum(0).unsqueeze(-1)
                mean = weighted.reshape(J.shape).sum(0)
                own = own - mean.mT @ (mean / torch.where(size > 0, size, 1.0))
            place = columns.unsqueeze(-1), columns.unsqueeze(-2)
            curvature[place] = curvature[place] + own
        for (p, q), mixed in (self.binding.pairs or {}).items() if bent else ():
            if p in block and q in block:  # −Σ f′(η) ∂²η/∂p∂q
                own = -torch.einsum("...,...m->m", curve.slope, mixed.dense.to(torch.float64))
                rows, columns = (_places(name, block, values, gradient) for name in (p, q))
                own = own.reshape(len(rows), len(columns))
                curvature[rows.unsqueeze(-1), columns] += own
                curvature[columns.unsqueeze(-1), rows] += own.mT
        return Curved(curve.value.sum(), gradient, curvature)

    def furthest(
        self,
        sums: tuple[Tensor, Tensor],
        block: Sequence[str],
        values: Mapping[str, Tensor],
        step: Tensor,
    ) -> float:
        """By how much a step moves the predictor of any cell that has data; of a row its differences.

        Args:
            sums: As `cells` returns.
            block: Parameter names.
            values: Of all parameters that reach the predictor.
            step: Of all parameters of the block. # (P,)
        """
        n, d = sums
        there = (n.sum(-1) if self.event else d) > 0
        out = 0.0
        linear = self.binding.linear_in(block, values)
        parts = designs_of(linear, block, values, self.lead, self.event)
        for k, (columns, narrow) in enumerate(parts):
            moved = narrow.to(torch.float64) @ step[columns]
            if self.event:
                moved = moved.amax(-1) - moved.amin(-1)
            own = there.reshape(-1, len(parts))[:, k]
            out = max(out, float(torch.where(own, moved.abs(), 0.0).amax()))
        return out

    def moves(self, block: Sequence[str], values: Mapping[str, Tensor], step: Tensor) -> Moves:
        """By how much a step moves the predictor of any cell, and would if nothing cancelled.

        Args:
            block: Parameter names.
            values: Of all parameters that reach the predictor.
            step: Of all parameters of the block. # (P,)
        """
        linear = self.binding.linear_in(block, values)
        moved, size = 0.0, 0.0
        for columns, narrow in designs_of(linear, block, values, self.lead, self.event):
            if not columns.numel():
                continue
            J, own = narrow.to(torch.float64), step[columns]
            of_row = J @ own
            far = (of_row.amax(-1) - of_row.amin(-1)) if self.event else of_row.abs()
            moved = max(moved, float(far.amax()))
            size = max(size, float((J.abs() @ own.abs()).amax()))
        return moved, size


def _event_first(t: Tensor) -> Tensor:
    """The same rows, in memory one element of all after the other. # (*cells, event)"""
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


def _places(name: str, block: Sequence[str], values: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """Where the elements of a parameter stand among those of a block. # (θ.numel(),)"""
    begin = sum(values[n].numel() for n in block[: list(block).index(name)])
    return torch.arange(begin, begin + values[name].numel(), device=like.device)


def predictors_of(
    graph: FactorGraph, names: Sequence[str], *, mixed: bool = False
) -> list[Predictor | Dispersed]:
    """All predictors that some parameters reach; those of a group with a dispersion together.

    Args:
        graph: The factor graph.
        names: The parameters.
        mixed: Whether sites of different kinds read them: each group is then a whole.
    """
    out: list[Predictor | Dispersed] = []
    if mixed:
        reached = [(g, o) for g, o in enumerate(graph.groups) if set(names).intersection(o.params)]
        whole = (wholly_at(g, group, graph.parameters) for g, group in reached)
        return [site for site in whole if site is not None]
    for g, group in enumerate(graph.groups):
        if not set(names).intersection(group.params):
            continue
        dispersed = dispersed_at(g, group, graph.parameters)
        if dispersed is not None:
            if set(names).intersection(dispersed.params):
                out.append(dispersed)
            continue
        for argument, binding in group.bindings.items():
            if not set(names).intersection(binding.params):
                continue
            linear = predictor_binding(group, argument, graph.parameters)
            if linear is not None:
                assert group.family is not None
                rule = group.family.rules[argument]
                out.append(Predictor(g, argument, rule, linear, 1 + group.n_plates))
    return out


_known: WeakKeyDictionary[Binding, Binding] = WeakKeyDictionary()


def predictor_binding(
    group: Group, argument: str, parameters: Mapping[str, TracedParameter]
) -> Binding | None:
    """How parameters reach the predictor of an argument; None where it has none.

    The binding is affine, or bilinear.

    A selection without a map is its own predictor where the argument is one (logits); where the
    argument is a link of it, the selection has the link for its only map.

    Args:
        group: The stacked factors.
        argument: The argument's name.
        parameters: All parameters, for their sizes.
    """
    reads_latents = isinstance(group.belief, Moments)
    if group.family is None or reads_latents or argument not in group.bindings:
        return None
    link, binding = group.family.links.get(argument), group.bindings[argument]
    if (
        link is None
        or argument not in group.family.rules
        or binding.how not in ("affine", "bilinear", "selection")
    ):
        return None
    if binding in _known:
        return _known[binding]
    found: Binding | None = None
    sizes = {name: parameters[name].leaf.numel() for name in binding.params}
    if binding.how == "bilinear":
        found = binding
    elif binding.how == "affine":
        found = _bare(binding) if binding.link == link else None
    elif binding.normalise in ("", "logits") and all(
        [m.name for m in s.maps] == ([link] if link else []) for s in binding.selections
    ):
        found = _selected(binding, link, sizes)
    if found is not None:
        _known[binding] = found
    return found


def _bare(binding: Binding) -> Binding:
    """The predictor of an affine binding, without its link."""
    if not binding.link and not binding.normalise:
        return binding
    return Binding("affine", binding.params, binding.constant, jacobians=binding.jacobians)


def _selected(binding: Binding, link: str, sizes: Mapping[str, int]) -> Binding:
    """A selection as a predictor: each element is one element of a parameter, or known."""
    used = torch.stack([s.index >= 0 for s in binding.selections]).any(0)
    offset = torch.where(used, 0.0, LINKS[link].inverse(binding.constant))
    jacobians = {}
    for s in binding.selections:
        columns = torch.arange(sizes[s.param], device=s.index.device)
        chosen = (s.index.unsqueeze(-1) == columns).to(offset.dtype)
        if s.factor is not None and link:  # a factor on exp η
            offset = offset + torch.where(s.index >= 0, s.factor.log(), 0.0)
        elif s.factor is not None:
            chosen = chosen * s.factor.unsqueeze(-1)
        jacobians[s.param] = Jacobian.of(chosen)
    return Binding("affine", binding.params, offset, jacobians=jacobians)
