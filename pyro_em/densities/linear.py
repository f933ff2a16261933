"""Log densities that are linear in functions of their argument, read off the family's own rule.

The form of a simplex, a probability or a rate (`pyro_em.families.forms`) is linear in logarithms:

    simplex       Σ_s n_s log a_s
    probability   n log a + (d − n) log(1 − a)
    rate          n log a − d a

so that log p(x | a) = Σ_p f_p(x) η_p(a) + h(x), where the features f are the numerators and
denominators that the rule makes of one datum. Nothing has to be written for a family: its record has
all of it, and h, which is what is left over, is taken at one argument and checked at another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from pyro_em.densities.symbols import with_values_once
from pyro_em.families import saddle_point
from pyro_em.families.family import IDENTITY, Rule, main_rule
from pyro_em.families.forms import Kind
from pyro_em.graph.factors import Group
from pyro_em.updates.expectations.statistics import known_statistics

_FEW = 2**8  # numbers of a value whose linear form is remembered

_CELLS = 2**18  # numbers of a value that are read at once

# Those with complements after those without, and rates last: the order of `natural`.
KINDS = tuple(
    sorted(
        (kind for kind in Kind if kind.form.is_log_linear),
        key=lambda kind: (kind.form.has_rate, kind.form.has_complement),
    )
)


@dataclass(frozen=True, eq=False)
class Linear:
    """The linear form of a group's log density.

    Attributes:
        argument: The argument.
        rule: Its rule.
        n: Numerators of each datum, or of each value that occurs where there are codes.
            # (members, *sizes or 1s, *to_event, *event), or (values, *1s, *event)
        d: Denominators; of a simplex unused. # like n
        base: h. # (members, *sizes or 1s), or (values, *1s)
        codes: Which value each datum is, where data take few (`symbols`).
            # (members, *sizes or 1s)
        is_remembered: Whether later runs of the model meet the same object (`linear`).
    """

    argument: str
    rule: Rule
    n: Tensor
    d: Tensor
    base: Tensor
    codes: Tensor | None = None
    is_remembered: bool = False


def main_argument(group: Group) -> tuple[str, Rule] | None:
    """The argument in which a group may be linear, if parameters reach no other."""
    if group.family is None or group.value_binding is not None:
        return None
    argument_and_rule = main_rule(group.family, group.arguments)
    if (
        argument_and_rule is None
        or argument_and_rule[1].kind not in KINDS
        or group.family.has_reference
    ):
        return None
    if argument_and_rule[1].link is not IDENTITY:  # a large logit is more than its probability
        return None
    if any(
        b.how != "constant" for name, b in group.bindings.items() if name != argument_and_rule[0]
    ):
        return None
    binding = group.bindings[argument_and_rule[0]]
    plain = all(s.factor is None for s in binding.selections)
    return argument_and_rule if binding.how in ("constant", "selection") and plain else None


def linear(group: Group, main: tuple[str, Rule] | None = None) -> Linear | None:
    """The linear form of a group that has a `main_argument`; None where it does not hold.

    It depends on the data and on nothing else that changes from run to run of a model. A latent's own
    density reads its support, and what few numbers gave before is remembered by the selection.

    Args:
        group: The group.
        main: That argument with its rule, where they are known.
    """
    main = main_argument(group) if main is None else main
    if main is None:
        return None
    name, rule = main
    selections, value = group.bindings[name].selections, group.value
    is_plain = len(group.arguments) == 1 and group.mask is None and group.elements is None
    if not is_plain or len(selections) != 1 or value.numel() > _FEW or value.requires_grad:
        return _linear(group, name, rule)
    argument = group.arguments[name]
    form = (name, argument.shape, argument.dtype, group.sizes, group.n_plates, group.event_dims)
    asked = (linear, *form, value.shape, value.dtype, value.device)
    family, before, found = selections[0].remembered.get(asked, (None, None, None))
    if family is not group.family or not torch.equal(before, value):
        found = _linear(group, name, rule)
        found = None if found is None else replace(found, is_remembered=True)
        selections[0].remembered[asked] = group.family, value.clone(), found
    return found  # type: ignore[no-any-return]


def would_cancel(kind: Kind, n: Tensor, d: Tensor) -> bool:
    """Whether data are so large that products of n and d with logarithms lose what is left of them."""
    return saddle_point.is_large(n) or (kind.form.has_complement and saddle_point.is_large(d))


def _linear(group: Group, name: str, rule: Rule) -> Linear | None:
    """The linear form of a group in one of its arguments; None where it does not hold."""
    event, codes = rule.kind.event_dim, None
    if (once := with_values_once(group)) is not None:
        group, codes = once
    constants = {
        n: _narrow(a.detach(), 1 + group.n_plates, 1 + len(group.sizes))
        for n, a in group.arguments.items()
        if n != name
    }
    given = {**constants, name: group.arguments[name].detach()}
    statistics = known_statistics(replace(group, arguments=given))
    if statistics is None:
        return None
    batch = 1 + len(group.sizes) + group.event_dims
    one = torch.ones((1,) * batch, dtype=torch.float64, device=group.value.device)
    n, d = rule.contribution({**statistics, "weight": one}, given)
    if n.dim() != batch + event or d.dim() != batch + event:
        return None
    n, d = n.to(torch.float64), d.to(torch.float64)
    if d.dim() > 1 and d.shape[1] > 1 and bool((d == d[:, :1]).all()):
        d = d[:, :1].clone()  # one rate of each row: no row has its own exposure
    del statistics  # of vectors as many numbers as the data
    if group.observed and would_cancel(rule.kind, n, d):
        return None
    if event == 0:
        n, d = torch.broadcast_tensors(n, d)
    if group.elements is not None:
        counted = group.elements.reshape(group.elements.shape + (1,) * event)
        n, d = n * counted, d * counted
    base = _base(group, rule, name, constants, n, d)
    return None if base is None else Linear(name, rule, n, d, base, codes)


def _narrow(constant: Tensor, first: int, end: int) -> Tensor:
    """Without the values of latents that a distribution expanded it over."""
    for axis in range(first, end):
        one = constant.narrow(axis, 0, 1)
        constant = one if bool((constant == one).all()) else constant
    return constant


def _base(
    group: Group, rule: Rule, name: str, constants: dict[str, Tensor], n: Tensor, d: Tensor
) -> Tensor | None:
    """h; None where it differs between two arguments. Of many rows some at a time."""
    value, out = group.value, []
    rows = value.shape[1] if group.n_plates else 1
    most = max(1, _CELLS * rows // max(value.numel(), 1))
    for begin in range(0, rows, most):
        some = partial(_some_rows, begin=begin, end=begin + most)
        part = replace(
            group,
            value=some(value),
            mask=None if group.mask is None else some(group.mask),
            elements=None if group.elements is None else some(group.elements),
        )
        given = {a: some(c) for a, c in constants.items()}
        features = rule.kind.form.features(some(n), some(d))
        bases = [_rest(part, rule, name, given, some(n), features, which) for which in (0, 1)]
        one, other = (b if part.mask is None else torch.where(part.mask, b, 0.0) for b in bases)
        if not torch.allclose(one, other, rtol=1e-9, atol=1e-9):
            return None
        out.append(bases[0])
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def _some_rows(t: Tensor, begin: int, end: int) -> Tensor:
    """Some elements of the first plate."""
    return t[:, begin:end] if t.dim() > 1 and t.shape[1] > 1 else t


def _rest(
    group: Group,
    rule: Rule,
    name: str,
    constants: dict[str, Tensor],
    n: Tensor,
    features: Sequence[Tensor],
    which: int,
) -> Tensor:
    """log p(x | a) less its linear form, at one of two arguments inside. # (members, *sizes or 1s)"""
    assert group.family is not None
    form, event = rule.kind.form, n.shape[n.dim() - rule.kind.event_dim :]
    a = form.inside(n.new_empty(event), which)
    parts = [
        feature @ eta if event else feature * eta
        for feature, eta in zip(features, form.natural_parameters(a), strict=True)
    ]
    argument = a.reshape((1,) * (n.dim() - len(event)) + a.shape)
    wide = {k: c.to(torch.float64) for k, c in constants.items()}
    log_p = group.family.log_prob(group.value, {**wide, name: argument})
    if group.elements is not None:
        log_p = torch.where(group.elements, log_p, 0.0)
    rest = log_p - sum(parts[1:], parts[0])
    return rest.sum(tuple(range(-group.event_dims, 0))) if group.event_dims else rest
