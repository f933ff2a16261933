r"""What the expected log density of a family is, as a function of its argument and sums over data.

Each kind of closed form is the maximiser of one functional form in the argument a, given the
numerator n and the denominator d of its rule:

    rate          n log a − d a
    probability   n log a + (d − n) log(1 − a)
    simplex       Σ_k n_k log a_k
    scale         −d log a − n / (2 a²)
    covariance    −½ d log det a − ½ tr(a⁻¹ n)

A location has no form of its own: n of the family's scale or covariance is taken about it. Terms free
of the argument are left out, so that only differences between two values of it mean something.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_em.families import Family, Kind
from pyro_em.families.record import Rule, Statistics

_FORMS = (Kind.RATE, Kind.PROBABILITY, Kind.SIMPLEX, Kind.SCALE, Kind.COVARIANCE)


def main_rule(family: Family, given: Mapping[str, Tensor]) -> tuple[str, Rule] | None:
    """The argument whose form is the whole density, among the arguments that a site was given.

    Args:
        family: The record.
        given: The site's arguments.

    Returns:
        Its name and rule; None where the density has no such form.
    """
    if not family.additive:
        return None
    rules = {name: rule for name, rule in family.rules.items() if name in given}
    forms = [(name, rule) for name, rule in rules.items() if rule.kind in _FORMS]
    others = [rule for rule in rules.values() if rule.kind not in _FORMS]
    spread = forms and forms[0][1].kind.is_spread
    if len(forms) != 1 or any(not r.kind.is_location for r in others) or (others and not spread):
        return None
    return forms[0]


def expected(kind: Kind, n: Tensor, d: Tensor, a: Tensor) -> Tensor:
    """The expected log density up to a term free of the argument, summed over all cells, in nats.

    Args:
        kind: The functional form.
        n: Numerators. # (*cells, *event)
        d: Denominators. # (*cells, *event or 1s)
        a: Natural values. # (*cells or 1s, *event)

    Example:
        >>> n, d = torch.tensor(6.0), torch.tensor(2.0)
        >>> more = expected(Kind.RATE, n, d, torch.tensor(3.0))
        >>> bool(more > expected(Kind.RATE, n, d, torch.tensor(2.9)))
        True
    """
    if kind is Kind.RATE:
        return (torch.xlogy(n, a) - d * a).sum()
    if kind is Kind.PROBABILITY:
        return (torch.xlogy(n, a) + torch.xlogy((d - n).clamp(min=0), 1 - a)).sum()
    if kind is Kind.SIMPLEX:
        return torch.xlogy(n, a).sum()
    if kind is Kind.SCALE:
        return (-d * a.log() - 0.5 * n / (a * a)).sum()
    assert kind is Kind.COVARIANCE
    tril = torch.linalg.cholesky(a)
    log_det = 2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    trace = (torch.cholesky_inverse(tril) * n).sum((-2, -1))
    return (-0.5 * d.squeeze(-1).squeeze(-1) * log_det - 0.5 * trace).sum()


def expected_log_density(
    family: Family, statistics: Statistics, arguments: Mapping[str, Tensor]
) -> Tensor:
    """E_q[log p(x | arguments)] of a group, up to a term free of the arguments, in nats.

    Args:
        family: A family that has a `main_rule` for these arguments.
        statistics: Expected statistics with their references.
        arguments: Where to take it.
    """
    found = main_rule(family, arguments)
    assert found is not None
    name, rule = found
    n, d = rule.contribution(statistics, arguments)
    return expected(rule.kind, n, d, rule.link.inverse(arguments[name]))
