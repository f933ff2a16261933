"""Starts at which all components are equal: a saddle that EM cannot leave."""

from __future__ import annotations

from pyro_em.errors import message, sites_in_words, warn
from pyro_em.fitting.steps.em_on_sums import tells_apart
from pyro_em.fitting.steps.guarded import Guarded
from pyro_em.fitting.steps.point import Point, SumsPoint
from pyro_em.posteriors.answers.posterior import Posterior


def is_symmetric(em: Guarded, at: Point) -> bool:
    """Whether the data say nothing of any latent: each of its values explains them equally well.

    Args:
        em: The map.
        at: Where it stands; without tables where arguments already tell the components apart.
    """
    if isinstance(at, SumsPoint) and (not at.program.graph.latents or tells_apart(at)):
        return False
    return _is_symmetric(_at_hand(em, at))


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
