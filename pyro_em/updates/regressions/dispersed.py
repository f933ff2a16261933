"""Groups whose density is a function of several predictors: coefficients together with a dispersion.

With predictors ζ_a = J_a u + offset of each cell, one for each argument a, and expected counts w,

    Q(u) = Σ w f(x, ζ),     ∇Q = Σ_a Σ w J_aᵀ f_a,     −∇²Q = Σ_ab Σ w J_aᵀ (−f_ab) J_b,

in coordinates u that are coefficients, or logarithms of positive parameters. Q is not concave
everywhere: Newton's method climbs with `positive` second derivatives.

Source: Yee (2015), "Vector Generalized Linear and Additive Models", section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pyro_em.distributions import bounds
from pyro_em.families.family import Arguments
from pyro_em.families.predicted import Data, PredictedForm
from pyro_em.families.predictor_forms import predicted_form_of
from pyro_em.graph.bindings.binding import LINKS, Binding, ElementwiseMap
from pyro_em.graph.bindings.jacobian import Jacobian
from pyro_em.graph.factors import Group, is_incomplete
from pyro_em.tracing.parameters import TracedParameter
from pyro_em.tracing.sites import INTEGRATED, Role
from pyro_em.updates.expectations.beliefs import Moments
from pyro_em.updates.regressions.curved import Curved
from pyro_em.updates.regressions.designs import designs_of

_LONGEST = 3.0  # of a logarithm in one step

Sums = tuple[Tensor, Data, Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Dispersed:
    """A group as a function of predictors.

    Attributes:
        group: The number of the group.
        stack: The group.
        form: Its density in predictors.
        bindings: The predictors that parameters reach, by argument: affine, without a link.
    """

    group: int
    stack: Group
    form: PredictedForm
    bindings: Mapping[str, Binding]

    @property
    def params(self) -> tuple[str, ...]:
        """The parameters that reach a predictor."""
        return tuple(dict.fromkeys(p for b in self.bindings.values() for p in b.params))

    def places(self, name: str) -> list[str]:
        """The arguments that a parameter reaches, for the plan: ``Gamma.rate``."""
        return [
            f"{self.stack.distribution}.{a}" for a, b in self.bindings.items() if name in b.params
        ]

    def cells_of(self, counts: Tensor, arguments: Arguments) -> Sums:
        """Weights of all cells, what is read of data, and predictors that no parameter reaches.

        Args:
            counts: Expected counts. # (members, *sizes)
            arguments: As they are now.
        """
        weights = counts.reshape(counts.shape + (1,) * self.stack.event_dims)
        if self.stack.elements is not None:
            weights = weights * self.stack.elements
        known = {
            a: LINKS[self.form.links.get(a, "")].inverse(t.detach().to(torch.float64))
            for a, t in arguments.items()
            if a not in self.bindings
        }
        if self.stack.belief is None:
            return (
                weights.to(torch.float64),
                self.form.data(self.stack.value.to(torch.float64)),
                known,
            )
        assert self.form.of_features is not None  # a latent: its prior is linear in features
        feature = self.stack.belief.statistics(self.stack, arguments)["feature"]
        return weights.to(torch.float64), self.form.of_features(feature.to(torch.float64)), known

    def curved(self, sums: Sums, block: Sequence[str], values: Mapping[str, Tensor]) -> Curved:
        """The expected log density in the coordinates of a block; see `Predictor.curved`."""
        weights, data, known = sums
        at = dict(known)
        for argument, binding in self.bindings.items():
            at[argument] = binding.predictor(values).to(torch.float64)
        bend = self.form.at(data, at)
        lead = 1 + self.stack.n_plates
        shape = torch.broadcast_shapes(weights.shape, bend.value.shape)

        def weighed(t: Tensor) -> Tensor:  # (rows, cells)
            out = torch.where(weights == 0, 0.0, weights * t)
            return out.expand(shape).reshape(shape[:lead].numel(), -1)

        names = [a for a, b in self.bindings.items() if set(b.params).intersection(block)]
        slopes = {a: weighed(bend.slope[a]) for a in names}
        bends = {
            (a, b): weighed(bend.curvature[a, b])
            for a, b in bend.curvature
            if a in names and b in names
        }
        total = sum(values[name].numel() for name in block)
        gradient, curvature = weights.new_zeros(total), weights.new_zeros(total, total)
        designs = {a: self._designs(a, block, values, shape, lead) for a in names}
        for k in range(shape[lead:].numel()):
            own = {a: design[k] for a, design in designs.items()}
            for a, (columns, J) in own.items():
                gradient[columns] += _transposed_times(J, slopes[a][:, k])
            for (a, b), w in bends.items():
                (rows, J), (columns, H) = own[a], own[b]
                part = _between(J, w[:, k], H)
                curvature[rows.unsqueeze(-1), columns] += part
                if a != b:
                    curvature[columns.unsqueeze(-1), rows] += part.mT
        return Curved(weighed(bend.value).sum(), gradient, curvature)

    def furthest(
        self, sums: Sums, block: Sequence[str], values: Mapping[str, Tensor], step: Tensor
    ) -> float:
        """By how much a step of coefficients moves a predictor of any cell that has data.

        Steps of logarithms do not count: a dispersion that runs off separates nothing.
        """
        out, begin, moved = 0.0, 0, step.clone()
        logs = {p for b in self.bindings.values() for p in b.logs}
        for name in block:
            size = values[name].numel()
            if name in logs:
                moved[begin : begin + size] = 0.0
            begin += size
        lead = 1 + self.stack.n_plates
        for binding in self.bindings.values():
            if not set(binding.params).intersection(block):
                continue
            for columns, narrow in designs_of(binding, block, values, lead):
                if columns.numel():
                    far = (narrow.to(torch.float64) @ moved[columns]).abs().amax()
                    out = max(out, float(far))
        return out

    def _designs(
        self,
        argument: str,
        block: Sequence[str],
        values: Mapping[str, Tensor],
        shape: torch.Size,
        lead: int,
    ) -> list[tuple[Tensor, Tensor]]:
        """Columns and design of one argument for each cell; a design of one row stands for all.

        # (columns,), (rows or 1, columns)
        """
        binding = self.bindings[argument]
        own = binding.constant.shape
        parts = designs_of(binding, block, values, lead)
        rows, rest = own[:lead], own[lead:]
        wide = []
        for columns, narrow in parts:
            J = narrow.to(torch.float64)
            if rows.numel() > 1 and rows != shape[:lead]:
                J = J.reshape(*rows, -1).expand(*shape[:lead], J.shape[-1]).flatten(0, -2)
            wide.append((columns, J))
        places = (
            torch.arange(len(parts)).reshape(rest) if rest else torch.zeros((), dtype=torch.long)
        )
        out = []
        for cell in product(*(range(n) for n in shape[lead:])):
            place = tuple(min(c, n - 1) for c, n in zip(cell, rest, strict=True))
            out.append(wide[int(places[place])])
        return out


def dispersed_at(
    g: int, group: Group, parameters: Mapping[str, TracedParameter]
) -> Dispersed | None:
    """A group as a function of predictors that are affine in coordinates; None where it is none.

    One of them at least reads covariates: the maximiser of others follows from sums.

    Args:
        g: The number of the group.
        group: The group.
        parameters: All parameters.
    """
    form = None if group.family is None else group.family.predicted
    if form is None or not _is_read(group, form):
        return None
    if not any(b.how == "affine" for b in group.bindings.values()):
        return None
    found = _predictors(group, form, parameters)
    if not any(group.bindings[a].how == "affine" for a in found):
        return None
    return Dispersed(g, group, form, found)


def wholly_at(g: int, group: Group, parameters: Mapping[str, TracedParameter]) -> Dispersed | None:
    """A group as a function of predictors of all its parameters; None where it is none.

    Args:
        g: The number of the group.
        group: The group.
        parameters: All parameters.
    """
    form = None if group.family is None else predicted_form_of(group.family)
    if form is None or not _is_read(group, form) or group.lines:
        return None
    found = _predictors(group, form, parameters)
    if {p for b in found.values() for p in b.params} != set(group.params):
        return None
    return Dispersed(g, group, form, found)


def _is_read(group: Group, form: PredictedForm) -> bool:
    """Whether the values of a group are data, or expected features that its form needs."""
    if isinstance(group.belief, Moments) or group.nested is not None or is_incomplete(group):
        return False
    if group.role is Role.POINT or group.raw_params != ():  # its value moves with parameters
        return False
    return group.role not in INTEGRATED or form.of_features is not None


def _predictors(
    group: Group, form: PredictedForm, parameters: Mapping[str, TracedParameter]
) -> dict[str, Binding]:
    """The predictors of a group by argument, those left out whose parameters are read otherwise too."""
    found = {
        a: linear
        for a, b in group.bindings.items()
        if b.params
        and a in form.links
        and (linear := _predictor(b, form.links[a], parameters)) is not None
    }
    left = {p for a, b in group.bindings.items() if a not in found for p in b.params}
    straight = {p for b in found.values() for p in b.params if p not in b.logs}
    by_logs = {p for b in found.values() for p in b.logs}
    mixed = (straight & by_logs) | left
    return {a: b for a, b in found.items() if not mixed.intersection(b.params)}


_known: WeakKeyDictionary[Binding, dict[str, Binding | None]] = WeakKeyDictionary()


def _predictor(
    binding: Binding, link: str, parameters: Mapping[str, TracedParameter]
) -> Binding | None:
    """The predictor of an argument, as an affine binding; None where it has none."""
    known = _known.setdefault(binding, {})
    if link in known:
        return known[link]
    found: Binding | None = None
    if binding.how == "affine" and binding.link == link and not binding.pairs:
        found = Binding(
            "affine",
            binding.params,
            binding.constant,
            jacobians=binding.jacobians,
            logs=binding.logs,
        )
    elif binding.how == "selection" and not binding.normalise:
        found = _selected(binding, link, parameters)
    if found is not None and not all(
        bounds(parameters[p].constraint)
        == ((0.0, math.inf) if p in found.logs else (-math.inf, math.inf))
        for p in found.params
    ):
        found = None
    known[link] = found
    return found


def _selected(
    binding: Binding, link: str, parameters: Mapping[str, TracedParameter]
) -> Binding | None:
    """A selection of coefficients, or of positive parameters by their logarithms."""
    used = torch.stack([s.index >= 0 for s in binding.selections]).any(0)
    offset = torch.where(used, 0.0, LINKS[link].inverse(binding.constant))
    jacobians, logs = {}, []
    for s in binding.selections:
        maps = [m.name for m in s.maps]
        power = 1.0
        if link == "exp" and all(m.is_power for m in s.maps):
            logs.append(s.param)
            power = math.prod(_exponent(m) for m in s.maps)
        elif maps != ([link] if link else []):
            return None
        there = s.index >= 0
        slope = there.to(offset.dtype) * power
        if s.factor is not None and link == "exp":
            offset = offset + torch.where(there, s.factor.log(), 0.0)
        elif s.factor is not None and not link:
            slope = slope * s.factor
        elif s.factor is not None:
            return None
        jacobians[s.param] = Jacobian(
            slope.unsqueeze(-1),
            s.index.clamp(min=0).unsqueeze(-1),
            parameters[s.param].leaf.numel(),
        )
    return Binding("affine", binding.params, offset, jacobians=jacobians, logs=tuple(logs))


def _exponent(power: ElementwiseMap) -> float:
    """The exponent of a power."""
    named = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}
    return named[power.name] if power.exponent is None else power.exponent


def positive(found: Curved, logs: Tensor) -> Curved:
    """The same with second derivatives under which a step goes up, and not far.

    Eigenvalues are taken by their absolute values, and what no datum reads has none. A logarithm moves
    by about three at most, also where nothing bends: its slope over three is added, which vanishes
    where Newton's steps converge.

    Args:
        found: A function with its derivatives.
        logs: Which coordinates are logarithms. # (P,)

    Example:
        >>> saddle = Curved(torch.zeros(()), torch.ones(2), torch.diag(torch.tensor([4.0, -1.0])))
        >>> positive(saddle, torch.tensor([False, False])).curvature.diagonal()
        tensor([4., 1.])
    """
    if not bool(torch.isfinite(found.curvature).all()):
        return found
    more = torch.where(logs, found.gradient.abs() / _LONGEST, 0.0)
    if not bool(torch.linalg.cholesky_ex(found.curvature)[1]):
        return Curved(found.value, found.gradient, found.curvature + torch.diag(more))
    size = found.curvature.diagonal().abs()
    scale = torch.where(size > 0, size, 1.0).sqrt()
    values, vectors = torch.linalg.eigh(found.curvature / scale / scale.unsqueeze(-1))
    bent = (vectors * values.abs()) @ vectors.mT * scale * scale.unsqueeze(-1)
    # What no datum reads stays apart: rounding would give it a curvature of 1e-31, and no bound.
    read = (found.curvature != 0).any(-1)
    bent = torch.where(read & read.unsqueeze(-1), (bent + bent.mT) / 2, 0.0)
    return Curved(found.value, found.gradient, bent + torch.diag(more))


def _transposed_times(J: Tensor, w: Tensor) -> Tensor:
    """Jᵀ w, of a design whose one row stands for all too. # (columns,)"""
    return J[0] * w.sum() if len(J) == 1 else J.mT @ w


def _between(J: Tensor, w: Tensor, H: Tensor) -> Tensor:
    """Jᵀ diag(w) H. # (columns of J, columns of H)"""
    if len(J) == 1:
        return J.mT @ _transposed_times(H, w).unsqueeze(0)
    if len(H) == 1:
        return (J.mT @ w).unsqueeze(-1) @ H
    return J.mT @ (w.unsqueeze(-1) * H)
