"""The record of a distribution family, and the few shapes that a closed-form update can have.

For a family with sufficient statistics T(x), the part of the expected log joint that an argument
sees depends on the data only through S = Σ_cells w T(x), which is additive over data, sites and
time steps. A `Rule` turns S into a numerator and a denominator for one argument, given the
others. What happens next depends only on the rule's `Kind`: numerators and denominators of all
uses of a parameter are added, and the kind's solution is taken. Two uses of one parameter can be
added if and only if their kinds are equal, because a kind *is* a functional form:

| kind | form in the argument a | maximiser |
|---|---|---|
| mean | −½ d a² + n a | n / d |
| scale | −d log a − n / (2 a²) | √(n / d) |
| absolute scale | −d log a − n / a | n / d |
| probability | n log a + (d − n) log(1 − a) | n / d |
| rate | n log a − d a | n / d |
| simplex | Σ_k n_k log a_k | n / Σ n |
| mean vector | −½ aᵀ d a + nᵀ a | d⁻¹ n |
| covariance | −½ d log det a − ½ tr(a⁻¹ n) | n / d |
| median | −Σ_i w_i abs(x_i − a) | weighted median (from data, not additive) |

Source: Wainwright and Jordan (2008), section 3; Meng and Rubin (1993) for one argument at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_em.families.forms import Kind
from pyro_em.families.predicted import PredictedForm

Arguments = Mapping[str, Tensor]

Statistics = dict[str, Tensor]


def log_of(p: Tensor) -> Tensor:
    """log p, floored where p = 0 so that a logit stays finite."""
    return p.clamp(min=torch.finfo(p.dtype).tiny).log()


def _logit(p: Tensor) -> Tensor:
    return log_of(p) - log_of(1 - p)


def _cholesky(c: Tensor) -> Tensor:
    return torch.linalg.cholesky(c)


def _inverse(c: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(c))


@dataclass(frozen=True)
class Link:
    """How a kind's natural value becomes the distribution's argument, and back.

    Attributes:
        name: Shown where two uses of a parameter disagree.
        forward: From the natural value (a probability) to the argument (a logit).
        inverse: Back.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


IDENTITY = Link("identity", lambda a: a, lambda a: a)

LOGIT = Link("logit", _logit, torch.sigmoid)

LOG_SIMPLEX = Link("log", log_of, lambda a: torch.softmax(a, -1))

CHOLESKY = Link("Cholesky factor", _cholesky, lambda a: a @ a.mT)

PRECISION = Link("inverse", _inverse, _inverse)


@dataclass(frozen=True)
class Rule:
    """The closed-form update of one argument, the others given.

    Attributes:
        kind: The functional form.
        contribution: From summed statistics and the arguments at the cells where they were summed
            to (numerator, denominator), each of shape ``(*cells, *event)``.
        link: From the kind's natural value to the argument.
    """

    kind: Kind
    contribution: Callable[[Statistics, Arguments], tuple[Tensor, Tensor]]
    link: Link = IDENTITY

    @cached_property
    def takes_products(self) -> bool:
        """Whether a product A Aᵀ of a parameter has an update: a covariance, or its inverse."""
        return self.kind.form.is_gram and self.link is not CHOLESKY


def feature_of(statistics: Statistics) -> Tensor:
    """The statistics of a density in linear form, as one tensor. # (*cells, P)"""
    return statistics["feature"]


@dataclass(frozen=True)
class NaturalForm:
    """A log density that is linear in statistics of the data alone, jointly in several arguments.

        log p(x | a) = Σ_p T_p(x) η_p(a) − A(a) + h(x)

    The family's only statistic is then ``feature``, T(x) of shape ``(*batch, P)``. Counts may have as
    many as the largest of them, T_p(x) = 1 where x > p and else 0.

    Attributes:
        arguments: The arguments a.
        coefficients: From arguments and P to η_1(a), …, η_P(a), −A(a). # (*batch, P + 1)
        derivatives: From sums and arguments to the first and second derivatives of `expected` in all
            numbers of the arguments, one argument after the other; by autograd where None.
            # (*cells, A), (*cells, A, A)
        of_counts: Whether T(x) says which numbers a count is above.
        levels: The counts whose largest says how many these numbers are; the data where None.
        per_level: How many statistics there are for each of these numbers.
        limit: Arguments that run off together where data vary no more than those of another
            distribution, and which this is, for a note.
        base: h of data, where it is not zero. # (*batch)
        references: Arguments of the E-step about which T(x) is taken.
        is_augmented: Whether the E-step takes in more than the model's latents: T(x) holds expectations
            under a posterior at the arguments of the E-step, and `terms` is a lower bound up to terms
            free of the arguments.
        spread: A spread, and the location that it is about, where the density has no bound as the
            spread goes to zero on equal data; of an inverse spread, which rises then, no location.
        maximum: From sums and arguments to the numbers of all arguments at which `expected` is largest,
            one argument after the other, where nothing else is asked of them; None where it is to be
            searched for. # (*cells, A)
        gathered: T(x) from the statistics of a family that names them otherwise.
        shapes: Arguments with which, where they are large, products of T(x) and η cancel.
        reaches: Where sums hold near the references alone: whether they still tell the density at some
            arguments. # (*cells)
    """

    arguments: tuple[str, ...]
    coefficients: Callable[[Arguments, int], Tensor] | None = None
    derivatives: Callable[[Statistics, Arguments], tuple[Tensor, Tensor]] | None = None
    of_counts: bool = False
    levels: Callable[[Tensor, Arguments], Tensor] | None = None
    per_level: int = 1
    limit: tuple[tuple[str, ...], str] = ((), "")
    base: Callable[[Tensor], Tensor] | None = None
    references: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    is_augmented: bool = False
    spread: tuple[str, str] | None = None
    maximum: Callable[[Statistics, Arguments], Tensor | None] | None = None
    gathered: Callable[[Statistics], Tensor] = feature_of
    reaches: Callable[[Statistics, Arguments], Tensor] | None = None

    def largest(self, value: Tensor, arguments: Arguments) -> int:
        """The largest count, where it `of_counts`."""
        counts = value if self.levels is None else self.levels(value, arguments)
        return int(counts.max()) if counts.numel() else 0

    @property
    def is_local(self) -> bool:
        """Whether sums tell the density near the arguments at which they were taken only."""
        return self.reaches is not None

    def terms(self, statistics: Statistics, arguments: Arguments) -> Tensor:
        """What E_q[log p] of each cell is a sum of, up to Σ h, in nats. # (*cells, terms)

        Args:
            statistics: ``feature`` and ``weight``, summed. # (*cells, P), (*cells)
            arguments: Where to take it.
        """
        assert self.coefficients is not None
        sums = torch.cat([statistics["feature"], statistics["weight"].unsqueeze(-1)], -1)
        found = sums * self.coefficients(arguments, sums.shape[-1] - 1)
        # A cell without data has no value, whatever its density is.
        return torch.where(sums == 0, 0.0, found)

    def expected(self, statistics: Statistics, arguments: Arguments) -> Tensor:
        """E_q[log p] of each cell from its sums; see `terms`. # (*cells)"""
        return self.terms(statistics, arguments).sum(-1)


def weigh(weights: Tensor, statistic: Tensor, keep: tuple[bool, ...]) -> Tensor:
    """Sum ``weights * statistic`` over the batch dimensions that are not kept.

    Args:
        weights: Expected counts. # (*batch,)
        statistic: T(x), broadcastable from the left. # (*batch or 1s, *event)
        keep: For each batch dimension, whether the result keeps it.

    Returns:
        The weighted sum. # (*batch with 1 where summed, *event)

    Example:
        >>> weigh(torch.ones(2, 3), torch.arange(3.).reshape(1, 3), (True, False))
        tensor([[3.],
                [3.]])
    """
    n_batch = weights.dim()
    event = statistic.shape[n_batch:]
    fast = _as_product(weights, statistic, keep)
    if fast is not None:
        return fast
    letters = [chr(ord("a") + i) for i in range(26)] + [chr(ord("A") + i) for i in range(26)]
    batch_letters, event_letters = letters[:n_batch], letters[n_batch : n_batch + len(event)]
    # A dimension of size one is left out of an operand, so that no product is ever expanded.
    in_w = [i for i in range(n_batch) if weights.shape[i] != 1]
    in_t = [i for i in range(n_batch) if statistic.shape[i] != 1]
    out = [i for i in range(n_batch) if keep[i] and (i in in_w or i in in_t)]
    w = weights.reshape([weights.shape[i] for i in in_w])
    t = statistic.reshape([statistic.shape[i] for i in in_t] + list(event))
    equation = "{},{}->{}".format(
        "".join(batch_letters[i] for i in in_w),
        "".join([batch_letters[i] for i in in_t] + event_letters),
        "".join([batch_letters[i] for i in out] + event_letters),
    )
    total = torch.einsum(equation, w, t.to(w.dtype))
    sizes = [max(a, b) for a, b in zip(weights.shape, statistic.shape, strict=False)]
    shape = [sizes[i] if i in out else 1 for i in range(n_batch)]
    return total.reshape(shape + list(event))


def _as_product(weights: Tensor, statistic: Tensor, keep: tuple[bool, ...]) -> Tensor | None:
    """`weigh` as one matrix product: leading dimensions are summed, the others only weigh.

    Rows of data before values of latents, as nearly everything is laid out; None for the rest.
    """
    n = weights.dim()
    summed = sum(not k for k in keep)
    if any(keep[:summed]):
        return None
    if any(a != b for a, b in zip(weights.shape[:summed], statistic.shape, strict=False)):
        return None
    if any(size != 1 for size in statistic.shape[summed:n]):
        return None
    rows = math.prod(weights.shape[:summed])
    event = statistic.shape[n:]
    w = weights.reshape(rows, -1)
    t = statistic.reshape(rows, -1)
    total = w.T @ (t if t.dtype == w.dtype else t.to(w.dtype))
    return total.reshape((1,) * summed + weights.shape[summed:] + event)


@dataclass(frozen=True)
class Family:
    """A distribution family with closed-form updates.

    Attributes:
        distribution: The exact class that the record is for (subclasses do not inherit it).
        statistics: T(x) per named statistic, from a value and the arguments at which the E-step
            was made (a point of reference, so that squares do not cancel). Each result has shape
            ``(*batch, *statistic event)``; batch dimensions may be of size one.
        rules: The update of each argument that has one.
        log_density: log p(x | arguments); by default the distribution's own ``log_prob``.
        accumulate: Replaces the weighted sum of ``statistics`` where the full T(x) must not be
            formed. Takes (weights, value, arguments, keep) like `weigh`.
        constants: Arguments that are never parameters (``total_count``).
        plain: Arguments in which nothing is known of the density but its value.
        event_dim: Rightmost dimensions of one observation (1 for vectors).
        event_dims: Rightmost dimensions of one value of an argument that has no rule.
        additive: Whether statistics can be summed over parts of the data.
        magnitude: The size of data on the scale of the location, against which a spread is called
            collapsed; the absolute value by default.
        natural: The linear form of the density; arguments without rules have a joint maximiser from its
            sums.
        predicted: The density in predictors of its arguments, of which none has a rule.
        multiples: Of arguments that are matrices, the rules of a number that multiplies a known matrix:
            numerator and denominator are those at a = 1, where the matrix is as it stands.
        degrees: The argument that is the degrees of freedom of a Wishart; empty for none.
        together: Of a family whose arguments have rules the linear form in which parameters that reach
            several of its arguments are solved for.

    Example:
        >>> from pyro_em.families import family_of
        >>> import pyro.distributions as dist
        >>> sorted(family_of(dist.Poisson(1.0)).rules)
        ['rate']
    """

    distribution: type
    statistics: Callable[[Tensor, Arguments], Statistics]
    rules: Mapping[str, Rule]
    log_density: Callable[[Tensor, Arguments], Tensor] | None = None
    accumulate: Callable[[Tensor, Tensor, Arguments, tuple[bool, ...]], Statistics] | None = None
    constants: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    event_dim: int = 0
    event_dims: Mapping[str, int] = field(default_factory=dict)
    additive: bool = True
    magnitude: Callable[[Tensor], Tensor] = torch.abs
    natural: NaturalForm | None = None
    predicted: PredictedForm | None = None
    multiples: Mapping[str, Rule] = field(default_factory=dict)
    degrees: str = ""
    together: NaturalForm | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A record of this library goes by its distribution: most functions have no name."""
        if BUILT_IN.get(self.distribution) is self:
            return record_of, (self.distribution,)
        return Family, tuple(getattr(self, f.name) for f in fields(self))

    @cached_property
    def name(self) -> str:
        """The distribution's name, for plans and messages."""
        return self.distribution.__name__

    @property
    def is_local(self) -> bool:
        """Whether its sums are to be taken anew where arguments have moved far."""
        return self.natural is not None and self.natural.is_local

    @cached_property
    def joint_form(self) -> NaturalForm | None:
        """The linear form in which sums tell all arguments together, if there is one."""
        return self.natural if self.together is None else self.together

    @cached_property
    def may_meet(self) -> bool:
        """Whether parameters that meet in its arguments have an update."""
        ends = [r.kind.form.end for r in self.rules.values()]
        return self.joint_form is not None or (bool(ends) and all(ends))

    @cached_property
    def argument_dims(self) -> Mapping[str, int]:
        """Rightmost dimensions of one value of an argument; those that are not named have none."""
        return {**self.event_dims, **{n: r.kind.event_dim for n, r in self.rules.items()}}

    @cached_property
    def links(self) -> Mapping[str, str]:
        """By argument what makes it of a linear predictor in which the log density is concave.

        The name of a function, empty where the argument itself is the predictor. Arguments of which no
        such update is known are not named.
        """
        forms = {n: (r.kind.form.inverse_link, r.link) for n, r in self.rules.items()}
        out = {n: name if link is IDENTITY else "" for n, (name, link) in forms.items() if name}
        return out if self.predicted is None else {**out, **self.predicted.links}

    def log_prob(self, value: Tensor, arguments: Arguments) -> Tensor:
        """log p(value | arguments) in nats, of the broadcast batch shape."""
        if self.log_density is not None:
            return self.log_density(value, arguments)
        return self.distribution(**arguments, validate_args=False).log_prob(value)

    @cached_property
    def has_reference(self) -> bool:
        """Whether T(x) is taken about a location, and so changes with the arguments."""
        if self.natural is not None:
            return self.natural.is_augmented or self.natural.is_local
        return self.accumulate is not None or any(r.kind.is_location for r in self.rules.values())

    def expected_statistics(
        self,
        weights: Tensor,
        value: Tensor,
        arguments: Arguments,
        keep: tuple[bool, ...],
        known: Statistics | None = None,
        elements: Tensor | None = None,
    ) -> Statistics:
        """S = Σ w T(x), summed over the batch dimensions that are not kept; ``weight`` is Σ w.

        Args:
            weights: Expected counts. # (*batch,)
            value: The data. # (*batch or 1s, *event)
            arguments: Where the E-step was made.
            keep: For each batch dimension, whether the result keeps it.
            known: T(x), where it was computed before.
            elements: Which elements of an event count, where some are masked. # (*batch or 1s,)
        """
        if elements is not None and self.accumulate is not None:
            weights, elements = weights * elements, None
        if self.accumulate is not None and known is None:
            stats = self.accumulate(weights, value, arguments, keep)
        else:
            known = self.statistics(value, arguments) if known is None else known
            if elements is not None:  # as a part of T(x): weights need not be expanded
                counted = elements.to(weights.dtype)
                known = {
                    name: t * counted.reshape(counted.shape + (1,) * (t.dim() - counted.dim()))
                    for name, t in known.items()
                }
            stats = {name: weigh(weights, t, keep) for name, t in known.items()}
        if elements is not None:
            batch = torch.broadcast_shapes(value.shape[: weights.dim()], elements.shape)
            stats["weight"] = weigh(weights, elements.to(weights.dtype).expand(batch), keep)
            return stats
        # A dimension along which only the data vary still counts its elements.
        batch = value.shape[: weights.dim()]
        shape = [1 if w > 1 else v for w, v in zip(weights.shape, batch, strict=True)]
        if math.prod(shape) == 1:
            axes = [i for i, counted in enumerate(keep) if not counted]
            stats["weight"] = weights.sum(axes, keepdim=True) if axes else weights
        else:
            one = torch.ones(shape, dtype=weights.dtype, device=weights.device)
            stats["weight"] = weigh(weights, one, keep)
        return stats


# The library's own records by distribution; `pyro_em.families` fills it.
BUILT_IN: dict[type, Family] = {}


def record_of(distribution: type) -> Family:
    """The library's own record of a distribution."""
    return BUILT_IN[distribution]


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
    main: tuple[str, Rule] | None = None
    has_location = False
    for name, rule in family.rules.items():
        if name not in given:
            continue
        if rule.kind.is_whole:
            if main is not None:
                return None
            main = name, rule
        elif rule.kind.is_location:
            has_location = True
        else:
            return None
    if main is None or (has_location and not main[1].kind.is_spread):
        return None
    return main


def has_sums(family: Family, given: Mapping[str, Tensor]) -> bool:
    """Whether sums over the data give the expected log density at any arguments.

    Args:
        family: The record.
        given: The site's arguments.
    """
    return family.natural is not None or main_rule(family, given) is not None


def expected_log_density(
    family: Family, statistics: Statistics, arguments: Mapping[str, Tensor]
) -> Tensor:
    """E_q[log p(x | arguments)] of a group, up to a term free of the arguments, in nats.

    Args:
        family: A family that `has_sums` for these arguments.
        statistics: Expected statistics with their references.
        arguments: Where to take it.
    """
    if family.natural is not None:
        return family.natural.expected(statistics, arguments).sum()
    argument_and_rule = main_rule(family, arguments)
    assert argument_and_rule is not None
    name, rule = argument_and_rule
    n, d = rule.contribution(statistics, arguments)
    return rule.kind.form.expected(n, d, rule.link.inverse(arguments[name]))
