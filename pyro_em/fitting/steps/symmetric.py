"""Starts at which all components are equal: a saddle that EM cannot leave."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from pyro_em.densities.tying import Arguments
from pyro_em.errors import message, sites_in_words, warn
from pyro_em.fitting.steps.em_on_sums import SumsPoint
from pyro_em.fitting.steps.guarded import Guarded
from pyro_em.fitting.steps.point import Point, Values
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.tracing.sites import Role

_CELLS = 2**18  # of an argument that are looked at together


def is_symmetric(em: Guarded, at: Point) -> bool:
    """Whether the data say nothing of any latent: each of its values explains them equally well.

    Args:
        em: The map.
        at: Where it stands; without tables where arguments already tell the components apart.
    """
    if isinstance(at, SumsPoint) and (not at.program.graph.latents or _tells_apart(at)):
        return False
    return _is_symmetric(_at_hand(em, at))


def _tells_apart(at: SumsPoint) -> bool:
    """Whether the components differ in an argument of what is observed."""
    theta = at.block.theta
    return any(
        _differs(part, 1 + group.n_plates, 1 + len(group.sizes))
        for group, evaluators in zip(theta.graph.groups, theta.evaluators, strict=True)
        if group.observed
        and group.role is not Role.POINT
        and (group.mask is None or bool(group.mask.any()))
        for a in evaluators.values()
        if a.dtype.is_floating_point
        for part in _parts(a, 1 + group.n_plates, at.values)
    )


def _parts(a: Arguments, lead: int, values: Values) -> Iterator[Tensor]:
    """An argument at parameter values, some rows at a time where it has many numbers.

    Args:
        a: How it is computed.
        lead: How many dimensions are members and plates.
        values: The parameters.
    """
    along = max(range(lead), key=lambda d: a.shape[d])
    rows = a.shape[along]
    step = rows * _CELLS // max(math.prod(a.shape), 1)
    if a.param is not None or step >= rows:
        yield a.evaluate(values)
        return
    step = max(step, 1)
    for begin in range(0, rows, step):
        size = min(step, rows - begin)

        def some(t: Tensor, begin: int = begin, size: int = size) -> Tensor:
            return t.narrow(along, begin, size) if t.shape[along] > 1 else t

        yield a.binding.mapped(some).evaluate(values)


def _differs(argument: Tensor, first: int, dims: int) -> bool:
    """Whether an argument differs between values of a latent."""
    axes = [i for i in range(first, dims) if argument.shape[i] > 1]
    if not axes:
        return False
    low, high = argument.amin(axes), argument.amax(axes)
    return bool((high - low > 1e-6 * high.abs().clamp(min=1.0)).any())


def _at_hand(em: Guarded, at: Point) -> Posterior:
    """The E-step at a point, of the part at hand where the data come in parts."""
    if em.data is None:
        return at.q
    return em.program.posterior(em.program.evaluate())


def _is_symmetric(q: Posterior) -> bool:
    if not q.graph.latents:
        return False
    for name, mask in q.graph.structure.masked_pairs.items():
        if f"{name}_unobserved" in q.graph.latents and bool(mask.any()):
            return False  # rows where it is observed tell its values apart
    informative = False
    for group, table in zip(q.graph.groups, q.tables, strict=True):
        if not group.observed or (group.mask is not None and not bool(group.mask.any())):
            continue
        for i, dims in enumerate(group.dims):
            axes = [k for k, d in enumerate(dims) if d in q.graph.latents and table[i].shape[k] > 1]
            if not axes:
                continue
            informative = True
            low, high = table[i].amin(axes), table[i].amax(axes)
            near = high - low <= 1e-9 * high.abs().clamp(min=1.0)
            if not bool((near | (low == high)).all()):
                return False
    return informative


def warn_symmetric(em: Guarded, at: Point) -> None:
    """Say that no step can tell the components apart.

    Args:
        em: The map.
        at: Where it stands.
    """
    warn(
        message(
            sites_in_words(list(_at_hand(em, at).graph.latents)),
            "the start is symmetric: every value explains the data equally well.",
            "EM cannot leave such a saddle; all components stay equal",
            [
                "fit(..., init='random', seed=0)",
                "give the components different initial values",
            ],
        ),
    )
