"""Tensors that are linear in parameters, bound to them with few vectors where each element reads one.

Mostly they are parameters as they stand, which equal numbers show. Else, with J = ∂a/∂θ, J 1 and
J (0, 1, 2, …) tell which element of θ an element of a reads, and its factor. A random vector verifies
either. Loadings have thousands of elements, and a vector for each would be too many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from pyro_em.graph.bindings.autograd import bind, known_below
from pyro_em.graph.bindings.bilinear import as_bilinear
from pyro_em.graph.bindings.binding import Binding, Selection
from pyro_em.graph.bindings.jacobian import Jacobian
from pyro_em.graph.bindings.linearity import why_not_linear
from pyro_em.graph.bindings.nodes import Point
from pyro_em.graph.bindings.reached import Reached
from pyro_em.tracing.without_sympy import pull_back, pull_back_all

_DIGIT = 1024  # element numbers are read in digits that single precision holds
_DENSE = 512  # elements of a parameter that are tried one by one
_CELLS = 2**26  # of a Jacobian
_ROWS = 64  # that are looked at before all
_FEW = 2**14  # random numbers that are remembered

Forward = Callable[[Tensor], Tensor]


def forward_of(output: Tensor, source: Tensor, *, attached: bool = False) -> Forward:
    """t ↦ J t for J = ∂output/∂source.

    Args:
        output: As a run computed it.
        source: What it depends on.
        attached: Whether results stay differentiable in what else ``output`` depends on.
    """
    v = torch.zeros_like(output, requires_grad=True)
    g = pull_back(output, source, v, create_graph=True, allow_unused=True)

    def forward(t: Tensor) -> Tensor:
        if g is None or not g.requires_grad:
            return torch.zeros_like(v)
        out = pull_back(g, v, t.to(g).expand(g.shape), create_graph=attached, allow_unused=True)
        return torch.zeros_like(v) if out is None else out

    return forward


def numbers_read(forward: Forward, slope: Tensor, shape: torch.Size, count: int) -> Tensor:
    """Which element of the source each element of the output reads, where it reads one alone.

    Args:
        forward: t ↦ J t.
        slope: J 1. # output's shape
        shape: That to which a number for each element is brought.
        count: How many elements the source has.

    Returns:
        Numbers, −1 where nothing is read. # output's shape
    """
    used = slope != 0
    safe = torch.where(used, slope, 1.0)
    out = torch.zeros_like(slope, dtype=torch.long)
    base = 1
    while base == 1 or base < count:
        digits = torch.arange(count, device=slope.device).div_(base, rounding_mode="floor")
        digits = digits.remainder_(_DIGIT).to(slope.dtype).reshape(shape)
        out += (forward(digits).detach() / safe).round_().long().mul_(base)
        base *= _DIGIT
    return out.clamp_(0, count - 1).masked_fill_(~used, -1)


def random_like(t: Tensor, seed: int = 37) -> Tensor:
    """Random numbers of a tensor's shape, of either sign and between one and two in size."""
    return _noise(t.shape, seed).to(t) if t.numel() > _FEW else _few(t.shape, seed).to(t, copy=True)


def _noise(shape: torch.Size, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    return noise + noise.sign()


_few = lru_cache(maxsize=32)(_noise)  # a reading asks for the same ones several times


def is_close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree up to rounding at the size of their largest elements."""
    # Where they agree, either's largest element is that of both.
    return not a.numel() or is_rounding(a - b, a)


def is_rounding(difference: Tensor, t: Tensor) -> bool:
    """Whether a tensor's differences are no larger than rounding at the size of its largest element."""
    off, eps = _largest(difference), rounding(t.dtype)
    if t.numel() > _ROWS:
        # An element of a few rows mostly is large enough to see it.
        longest = max(range(t.dim()), key=lambda d: t.shape[d])
        few = min(_ROWS, t.shape[longest])
        if off <= eps * _largest(t.narrow(longest, 0, few)):
            return True
    return off <= eps * _largest(t)


def rounding(dtype: torch.dtype) -> float:
    """How large rounding may be, as a share of a tensor's largest element."""
    return 1e3 * torch.finfo(dtype).eps


def _largest(t: Tensor) -> float:
    """The size of a tensor's largest element, without a copy of it."""
    if t.numel() == 1:  # as at each step of a loop
        return abs(float(t))
    low, high = t.aminmax()
    return float(torch.maximum(-low, high))


def narrowed(t: Tensor, plates: int) -> Tensor:
    """The tensor with one slice of each plate along which it is constant. # (*sizes or 1s, *event)"""
    for d in range(plates):
        if t.shape[d] > 1 and bool((t.detach() == t.detach().narrow(d, 0, 1)).all()):
            t = t.narrow(d, 0, 1)
    return t


def bind_line(
    tensor: Tensor, leaves: Mapping[str, Tensor], plates: int, *, bound: bool = True
) -> Binding:
    """How parameters reach a tensor that should be linear in them.

    Args:
        tensor: At parameters in general position. # (*sizes or 1s, *event)
        leaves: The leaf tensor of each parameter in that run.
        plates: How many of its leading dimensions are plates.
        bound: Whether a binding is of use; it is opaque otherwise where parameters reach it.

    Returns:
        A binding of the narrowest tensor that stands for all. # (1, *sizes or 1s, *event)
    """
    narrow = narrowed(tensor, plates).unsqueeze(0)
    constant = narrow.detach().clone()
    names = known_below(narrow, leaves)
    if not names:
        return Binding("constant", (), constant)
    if not bound:
        return Binding("opaque", names, constant, reason="no update follows")
    as_they_stand = _as_they_stand(narrow, {n: leaves[n] for n in names})
    if as_they_stand is not None:
        return as_they_stand
    plain = bind(narrow, leaves)
    # A factor may have any sign in a mean: such an element is solved for as a coefficient.
    if plain.how == "selection" and all(s.maps or s.factor is None for s in plain.selections):
        used = tuple(s for s in plain.selections if bool((s.index >= 0).any()))
        if not used:  # it is multiplied by zero
            return Binding("constant", (), constant)
        return replace(plain, params=tuple(s.param for s in used), selections=used)
    # What is multiplied by zero has no slope anywhere.
    slopes = {n: _Slope.of(narrow, leaves[n]) for n in names}
    slopes = {n: slope for n, slope in slopes.items() if bool((slope.there != 0).any())}
    own = {n: leaves[n] for n in slopes}
    reason = why_not_linear(narrow, own, "parameters")
    if reason:
        assert narrow.grad_fn is not None
        point = Point(narrow, narrow.grad_fn, tuple(narrow.shape))
        every = torch.arange(narrow.numel(), device=narrow.device).reshape(narrow.shape)
        product = as_bilinear(Reached(point, every, constant, tuple(own), own, 0, _CELLS))
        return product or Binding("opaque", tuple(own), constant, reason=reason)
    jacobians: dict[str, Jacobian] = {}
    for name in own:
        jacobian = _jacobian(narrow, leaves[name], slopes[name])
        if jacobian is None:
            return Binding("opaque", names, constant, reason=f"too many elements of '{name}' meet")
        jacobians[name] = Jacobian.of(jacobian)
    if not jacobians:
        return Binding("constant", (), constant)
    offset = constant
    for name, jacobian in jacobians.items():
        offset = offset - jacobian @ leaves[name].detach().reshape(-1).to(jacobian.dtype)
    # What is left of rounding is no offset.
    size = max(float(constant.abs().amax()), 1.0)
    offset = torch.where(offset.abs() <= 64 * torch.finfo(offset.dtype).eps * size, 0.0, offset)
    return Binding("affine", tuple(jacobians), offset, jacobians=jacobians)


def _as_they_stand(tensor: Tensor, leaves: Mapping[str, Tensor]) -> Binding | None:
    """The binding of a tensor that is made of elements of parameters, or zeros; None where it is not.

    Args:
        tensor: At parameters in general position. # (*sizes or 1s, *event)
        leaves: The leaf tensors of the parameters that reach it.
    """
    constant = tensor.detach().clone()
    if any(leaf.dtype != constant.dtype for leaf in leaves.values()):
        return None
    values, order = torch.cat([t.detach().reshape(-1) for t in leaves.values()]).sort()
    if bool((values[1:] == values[:-1]).any()):
        return None
    place = torch.searchsorted(values, constant.contiguous()).clamp(max=len(values) - 1)
    used = values[place] == constant
    if not bool((used | (constant == 0)).all()) or not bool(used.any()):
        return None
    number = torch.where(used, order[place], -1)
    probes = {name: random_like(leaf) for name, leaf in leaves.items()}
    probe = torch.cat([t.reshape(-1) for t in probes.values()])
    predicted = torch.where(used, probe[number.clamp(min=0)], 0.0)
    if why_not_linear(tensor, leaves, "parameters"):
        return None
    if not is_close(predicted, _pushed_forward(tensor, leaves, probes)):
        return None
    selections, begin = [], 0
    for name, leaf in leaves.items():
        own = used & (number >= begin) & (number < begin + leaf.numel())
        if bool(own.any()):
            selections.append(Selection(name, torch.where(own, number - begin, -1)))
        begin += leaf.numel()
    params = tuple(s.param for s in selections)
    return Binding("selection", params, constant, tuple(selections))


def _pushed_forward(
    tensor: Tensor, leaves: Mapping[str, Tensor], along: Mapping[str, Tensor]
) -> Tensor:
    """∂a/∂θ t for all parameters together."""
    v = torch.zeros_like(tensor, requires_grad=True)
    found = pull_back_all([tensor], [*leaves.values()], [v], create_graph=True, allow_unused=True)
    pairs = [
        (g, t) for g, t in zip(found, along.values(), strict=True) if g is not None and g.grad_fn
    ]
    (out,) = pull_back_all(
        [g for g, _ in pairs], [v], [t.to(g) for g, t in pairs], allow_unused=True
    )
    return torch.zeros_like(v) if out is None else out


@dataclass(frozen=True, eq=False)
class _Slope:
    """∂a/∂θ along a random direction.

    Attributes:
        forward: t ↦ J t.
        probe: The direction.
        there: J t for it.
    """

    forward: Forward
    probe: Tensor
    there: Tensor

    @classmethod
    def of(cls, tensor: Tensor, leaf: Tensor) -> _Slope:
        forward, probe = forward_of(tensor, leaf), random_like(leaf)
        return cls(forward, probe, forward(probe))


def _jacobian(tensor: Tensor, leaf: Tensor, along: _Slope) -> Tensor | None:
    """∂a/∂θ, None where it is too large. # (*a's shape, θ.numel())"""
    forward, probe, there, count = along.forward, along.probe, along.there, leaf.numel()
    if tensor.numel() * count > _CELLS:
        return None
    slope = forward(torch.ones_like(leaf))
    index = numbers_read(forward, slope, leaf.shape, count)
    one = torch.where(index >= 0, slope * probe.reshape(-1)[index.clamp(min=0)], 0.0)
    if is_close(one, there):
        out = tensor.new_zeros(*tensor.shape, count).detach()
        return out.scatter_(-1, index.clamp(min=0).unsqueeze(-1), slope.unsqueeze(-1))
    if count > _DENSE:
        return None
    columns = []
    for j in range(count):
        unit = torch.zeros_like(leaf).reshape(-1)
        unit[j] = 1
        columns.append(forward(unit.reshape(leaf.shape)))
    return torch.stack(columns, -1).detach()
