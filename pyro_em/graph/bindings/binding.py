"""Bindings: how parameters reach an argument of a distribution.

A *selection* takes every element of the argument from one element of a parameter, possibly through
elementwise maps and a known factor; *affine* arguments are linear in parameters, *bilinear* ones in
each of them while the others have values; in *composite* ones several parameters meet, number by
number; *computed* ones are made of parameters alone, by operations that are done again; *opaque* ones
are none of these, and come from a run of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_em.expanded import once_each
from pyro_em.families.short_rows import log_softmax, softmax
from pyro_em.graph.bindings.computed import Computed
from pyro_em.graph.bindings.expression import Expression
from pyro_em.graph.bindings.jacobian import Jacobian
from pyro_em.graph.bindings.jacobian import joined as joined_jacobians


@dataclass(frozen=True)
class ElementwiseMap:
    """An invertible map of single numbers that autograd shows as one node.

    Attributes:
        name: Shown in plans.
        forward: The map.
        inverse: Its inverse; values outside the map's range go to the nearest end.
        exponent: Of a power.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    exponent: float | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _map_named, (self.name, self.exponent)

    @property
    def is_power(self) -> bool:
        """Whether it is x ↦ x^e for some e."""
        named = ("sqrt", "rsqrt", "reciprocal")
        return self.name in named or self.exponent is not None

    @property
    def has_pole(self) -> bool:
        """Whether a value outside the range has no nearest value inside."""
        return self.name in ("reciprocal", "rsqrt") or self.name.startswith("power -")


@dataclass(frozen=True)
class MatrixMap(ElementwiseMap):
    """A map of square matrices, the last two dimensions, with a right inverse."""


def _positive(a: Tensor) -> Tensor:
    """Zero raised to the smallest number, so that an estimate on the boundary stays finite."""
    return a.clamp(min=torch.finfo(a.dtype).tiny)


MAPS = {
    "Exp": ElementwiseMap("exp", torch.exp, lambda a: _positive(a).log()),
    "Log": ElementwiseMap("log", torch.log, torch.exp),
    "Sqrt": ElementwiseMap("sqrt", torch.sqrt, lambda a: a.clamp(min=0).square()),
    "Rsqrt": ElementwiseMap("rsqrt", torch.rsqrt, lambda a: _positive(a) ** -2),
    "Reciprocal": ElementwiseMap(
        "reciprocal", torch.reciprocal, lambda a: torch.where(a == 0, _positive(a), a).reciprocal()
    ),
    "Sigmoid": ElementwiseMap(
        "sigmoid", torch.sigmoid, lambda a: _positive(a).log() - _positive(1 - a).log()
    ),
    "Softplus": ElementwiseMap(
        "softplus",
        torch.nn.functional.softplus,
        lambda a: a + torch.log(_positive(-torch.expm1(-a))),
    ),
}


# Any factor of a covariance is a maximiser where one is: the lower one is taken.
PRODUCT = MatrixMap("A Aᵀ", lambda a: a @ a.mT, torch.linalg.cholesky)


def _map_named(name: str, exponent: float | None) -> ElementwiseMap:
    """The map of a name, in place of functions, which do not pickle."""
    if exponent is not None:
        return power_map(exponent)
    return next(m for m in (*MAPS.values(), PRODUCT) if m.name == name)


@dataclass(frozen=True, eq=False)
class Selection:
    """The elements of an argument that come from one parameter.

    Attributes:
        param: The parameter's name.
        index: For each element of the argument the flat index into the parameter, −1 where the
            element comes from elsewhere. # argument's shape
        maps: Maps between the selected element and the argument, innermost first; a map of matrices
            may be the last one, where whole matrices are selected.
        factor: A known positive factor, or None. # argument's shape
    """

    param: str
    index: Tensor
    maps: tuple[ElementwiseMap, ...] = ()
    factor: Tensor | None = None

    @cached_property
    def is_whole(self) -> bool:
        """Whether every element of the argument comes from the parameter."""
        return not self.index.numel() or int(once_each(self.index).min()) >= 0

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Tensors over the argument's cells whose sum is the index."""
        return (self.index,)

    @property
    def of_kinds_of_rows(self) -> Tensor:
        """The index, of rows that read the same at least once. # (rows, *cells)"""
        return self.index[:1] if self.index.stride(0) == 0 else self.index

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Selection:
        """The same with the dimensions of the argument laid out anew."""
        factor = None if self.factor is None else change(self.factor)
        return Selection(self.param, change(self.index), self.maps, factor)

    @cached_property
    def of_matrices(self) -> bool:
        """Whether elements of the argument are made of more than one element each."""
        return any(isinstance(m, MatrixMap) for m in self.maps)

    @cached_property
    def is_in_order(self) -> bool:
        """Whether its elements are those of the parameter, 0, 1, 2, …"""
        return is_in_order(self.index)

    @cached_property
    def alone(self) -> Selection:
        """The same as the only one of a stack, with what is remembered of that. # (1, *argument)"""
        factor = None if self.factor is None else self.factor.unsqueeze(0)
        own = Selection(self.param, self.index.unsqueeze(0), self.maps, factor)
        own.__dict__["is_whole"] = self.is_whole  # which a dimension more does not change
        return own

    @cached_property
    def remembered(self) -> dict[Any, Any]:
        """What was found out about its index, for the next who asks; copies begin without."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {n: v for n, v in vars(self).items() if n not in ("alone", "remembered")}

    def forward(self, parameter: Tensor) -> Tensor:
        """The argument's elements at a parameter value (anything where ``index`` is −1)."""
        index = self.index if self.is_whole else self.index.clamp(min=0)
        out = parameter.reshape(-1)[index]
        for m in self.maps:
            out = m.forward(out)
        return out if self.factor is None else out * self.factor

    def inverse(self, natural: Tensor) -> Tensor:
        """The parameter's elements whose maps give ``natural`` (before any factor)."""
        for m in reversed(self.maps):
            natural = m.inverse(natural)
        return natural


@dataclass(frozen=True, eq=False)
class Binding:
    """Which parameters reach one argument, and how.

    Attributes:
        how: ``"constant"``, ``"selection"``, ``"affine"``, ``"bilinear"``, ``"sum"`` (of selections,
            and a constant), ``"composite"`` (an expression of selections), ``"computed"`` or
            ``"opaque"``.
        params: Names of the parameters that reach it.
        constant: The argument where no parameter reaches it, or the offset of an affine or bilinear map
            or a sum.
        selections: One part per parameter.
        jacobians: ∂a/∂θ of an affine map, per parameter; of a bilinear one where all others are zero.
        reason: Why it is no stronger, in words.
        normalise: ``"probs"`` or ``"logits"`` where the distribution normalises the rows.
        link: Of an affine binding what makes the argument of the predictor, by its name in `LINKS`.
        logs: Parameters in whose logarithms the predictor is affine, with derivatives in these.
        expression: Of a composite binding what is made of its selections.
        known: The tensors that the expression knows. # argument's shape
        pairs: Of a bilinear one ∂a/∂(θ_p ⊗ θ_q), per two parameters that are multiplied.
        computed: Of a computed one what makes it.
    """

    how: str
    params: tuple[str, ...]
    constant: Tensor
    selections: tuple[Selection, ...] = ()
    jacobians: Mapping[str, Jacobian] | None = None
    reason: str = ""
    normalise: str = ""
    link: str = ""
    logs: tuple[str, ...] = ()
    expression: Expression | None = None
    known: tuple[Tensor, ...] = ()
    pairs: Mapping[tuple[str, str], Jacobian] | None = None
    computed: Computed | None = None

    @cached_property
    def is_static(self) -> bool:
        """Whether the argument can be recomputed from the parameters without the model."""
        return self.how != "opaque"

    @cached_property
    def is_one_for_all(self) -> bool:
        """Whether one row stands for all along the first dimension."""
        return self.constant.dim() > 1 and self.is_static and self._is_expanded

    @cached_property
    def _is_expanded(self) -> bool:
        """Whether all of it is expanded along the first dimension."""
        if self.constant.shape[0] == 1:
            return False
        return not any(t.stride(0) for t in self.tensors)

    @property
    def tensors(self) -> list[Tensor]:
        """All that it is made of, over the cells of the argument."""
        tensors = [self.constant, *(t for s in self.selections for t in s.parts), *self.known]
        tensors += [s.factor for s in self.selections if s.factor is not None]
        tensors += [] if self.computed is None else [self.computed.index]
        return tensors + [t for j in self.slopes for t in j.tensors]

    @property
    def slopes(self) -> list[Jacobian]:
        """The derivatives in all parameters and in their products."""
        return [*(self.jacobians or {}).values(), *(self.pairs or {}).values()]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Binding:
        """The same with the dimensions of its argument laid out anew."""
        jacobians = self.jacobians
        return Binding(
            self.how,
            self.params,
            change(self.constant),
            tuple(s.mapped(change) for s in self.selections),
            None if jacobians is None else {n: j.mapped(change) for n, j in jacobians.items()},
            self.reason,
            self.normalise,
            self.link,
            self.logs,
            self.expression,
            tuple(change(t) for t in self.known),
            None if self.pairs is None else {n: j.mapped(change) for n, j in self.pairs.items()},
            None if self.computed is None else self.computed.mapped(change),
        )

    @property
    def alone(self) -> Binding:
        """The same as the only one of a stack. # (1, *argument)"""
        held = (self.jacobians, self.pairs, self.computed)
        if self.known or any(h is not None for h in held):
            return self.mapped(lambda t: t.unsqueeze(0))
        return Binding(
            self.how,
            self.params,
            self.constant.unsqueeze(0),
            tuple([s.alone for s in self.selections]),
            None,
            self.reason,
            self.normalise,
            self.link,
            self.logs,
            self.expression,
        )

    def thin(self) -> Binding:
        """The same, held once where all of it is expanded along the first dimension."""
        return self._thin if self._is_expanded else self

    @cached_property
    def _thin(self) -> Binding:
        return self.mapped(lambda t: t[:1])

    def __getstate__(self) -> dict[str, Any]:
        return {name: v for name, v in vars(self).items() if name != "_thin"}

    def predictor(self, values: Mapping[str, Tensor]) -> Tensor:
        """J θ + offset of an affine or bilinear binding; differentiable in ``values``."""
        assert self.jacobians is not None
        out = None if self.is_without_constant else self.constant
        for name, jacobian in self.jacobians.items():
            # A parameter may be coarser than the data.
            theta = values[name].reshape(-1).to(jacobian.dtype)
            term = jacobian @ (theta.log() if name in self.logs else theta)
            out = term if out is None else out + term
        for pair, jacobian in (self.pairs or {}).items():
            term = jacobian @ outer(values, pair).to(jacobian.dtype)
            out = term if out is None else out + term
        return self.constant if out is None else out

    def linear_in(self, block: Sequence[str], values: Mapping[str, Tensor]) -> Binding:
        """The affine binding of a bilinear one in parameters of which no two are multiplied.

        Of parameters that are multiplied it has the derivatives at their values, and so is tangent.

        Args:
            block: These parameters.
            values: The others keep theirs.
        """
        if not self.pairs:
            return self
        jacobians = {n: j.dense for n, j in (self.jacobians or {}).items() if n in block}
        for (p, q), mixed in self.pairs.items():
            table = mixed.dense.unflatten(-1, (values[p].numel(), values[q].numel()))
            if p in block:
                jacobians[p] = jacobians[p] + table @ values[q].reshape(-1).to(table.dtype)
            if q in block:
                jacobians[q] = jacobians[q] + table.mT @ values[p].reshape(-1).to(table.dtype)
        alone = {n: torch.zeros_like(v) if n in block else v for n, v in values.items()}
        offset = self.predictor(alone)
        slopes = {n: Jacobian.of(j) for n, j in jacobians.items()}
        return Binding("affine", tuple(slopes), offset, jacobians=slopes)

    @cached_property
    def is_without_constant(self) -> bool:
        """Whether the constant is zero at every cell, and held once."""
        held = self.constant.untyped_storage().nbytes() == self.constant.element_size()
        return held and not bool(self.constant.any())

    def evaluate(self, values: Mapping[str, Tensor]) -> Tensor:
        """The argument at parameter ``values``; differentiable in them."""
        if self.how == "constant":
            return self.constant
        if self.is_one_for_all:
            one = self.thin().evaluate(values)
            return one.expand(len(self.constant), *one.shape[1:])
        if self.how == "bilinear":
            return self.predictor(values)
        if self.how == "affine":
            return normalised(LINKS[self.link].forward(self.predictor(values)), self.normalise)
        if self.how == "sum":
            terms = ((part, part.forward(values[part.param])) for part in self.selections)
            none = torch.zeros((), dtype=self.constant.dtype, device=self.constant.device)
            kept = (t if p.of_matrices else torch.where(p.index >= 0, t, none) for p, t in terms)
            return sum(kept, self.constant)
        if self.how == "composite":
            assert self.expression is not None
            leaves = [s.forward(values[s.param]) for s in self.selections]
            made = self.expression.evaluate(leaves, self.known)
            assert isinstance(made, Tensor)
            return made
        if self.computed is not None:
            return self.computed.evaluate(values)
        if self.how == "opaque":
            raise ValueError("an opaque binding cannot be evaluated without its model")
        out = self.constant
        for part in self.selections:
            found = part.forward(values[part.param])
            plain = part.is_whole and found.dtype == out.dtype
            out = found if plain else torch.where(part.index >= 0, found, out)
        return normalised(out, self.normalise)


def each_alone(bindings: Mapping[str, Binding]) -> dict[str, Binding]:
    """The bindings of several arguments, each as `Binding.alone`."""
    return {name: b.alone for name, b in bindings.items()}


def evaluated(
    bindings: Mapping[str, Binding], values: Mapping[str, Tensor], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Those of several arguments that can be recomputed from the parameters, at their ``values``.

    Args:
        bindings: Of the arguments.
        values: Of the parameters, which may be coarser than the data.
        like: Tensors of the arguments' dtypes.
    """
    return {n: b.evaluate(values).to(like[n].dtype) for n, b in bindings.items() if b.is_static}


def joined(bindings: Sequence[Binding], join: Callable[[list[Tensor]], Tensor]) -> Binding:
    """Bindings of one form as one, their tensors joined along the cells."""
    first = bindings[0]
    selections = []
    for i, part in enumerate(first.selections):
        same = [b.selections[i] for b in bindings]
        factors = [s.factor for s in same if s.factor is not None]
        factor = join(factors) if factors else None
        selections.append(Selection(part.param, join([s.index for s in same]), part.maps, factor))
    jacobians = None
    if first.jacobians is not None:
        each = [b.jacobians for b in bindings if b.jacobians is not None]
        jacobians = {n: joined_jacobians([own[n] for own in each], join) for n in first.jacobians}
    pairs = None
    if first.pairs is not None:
        mixed = [b.pairs for b in bindings if b.pairs is not None]
        pairs = {n: joined_jacobians([own[n] for own in mixed], join) for n in first.pairs}
    return Binding(
        first.how,
        first.params,
        join([b.constant for b in bindings]),
        tuple(selections),
        jacobians,
        first.reason,
        first.normalise,
        first.link,
        first.logs,
        first.expression,
        tuple(join([b.known[i] for b in bindings]) for i in range(len(first.known))),
        pairs,
    )


def outer(values: Mapping[str, Tensor], pair: tuple[str, str]) -> Tensor:
    """θ_p ⊗ θ_q, row by row. # (θ_p.numel() * θ_q.numel(),)"""
    p, q = (values[name].reshape(-1) for name in pair)
    return (p.unsqueeze(-1) * q).reshape(-1)


@dataclass(frozen=True)
class Link:
    """How a linear predictor becomes an argument, and back.

    Attributes:
        forward: From the predictor.
        inverse: Back; of rows up to a shift.
    """

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


LINKS = {
    "": Link(lambda a: a, lambda a: a),
    "exp": Link(torch.exp, torch.log),
    "sigmoid": Link(torch.sigmoid, torch.logit),
    "softmax": Link(softmax, torch.log),
}


def normalised(rows: Tensor, how: str) -> Tensor:
    """Rows as a distribution holds them: probabilities summing to one, or logits so shifted."""
    if how == "probs":
        return rows / rows.sum(-1, keepdim=True)
    return log_softmax(rows) if how == "logits" else rows


def power_map(exponent: float) -> ElementwiseMap:
    """x ↦ x^e on the positive numbers."""
    return ElementwiseMap(
        f"power {exponent:g}",
        lambda a: a**exponent,
        lambda a: a.clamp(min=0) ** (1 / exponent),
        exponent,
    )


def is_in_order(index: Tensor) -> bool:
    """Whether an index map is 0, 1, 2, …"""
    flat = index.reshape(-1)
    return bool((flat == torch.arange(len(flat), device=flat.device)).all())


def whole_matrices(binding: Binding, values: Mapping[str, Tensor]) -> tuple[str | None, bool]:
    """The parameter whose matrices are the argument's, in order, and whether as factors A of A Aᵀ."""
    parts = binding.selections
    is_product = len(parts) == 1 and [m.name for m in parts[0].maps] == [PRODUCT.name]
    if is_product:
        binding = replace(binding, selections=(replace(parts[0], maps=()),))
    return whole_parameter(binding, values), is_product


def whole_parameter(binding: Binding, values: Mapping[str, Tensor]) -> str | None:
    """The parameter whose elements are the argument's, one to one and in order."""
    if binding.how != "selection" or len(binding.selections) != 1:
        return None
    (s,) = binding.selections
    plain = not s.maps and s.factor is None and s.index.numel() == values[s.param].numel()
    return s.param if plain and s.is_in_order else None
