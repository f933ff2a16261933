"""Data at the edge of a support, where a density is zero or infinite as its parameters decide."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pyro_em.errors import DegenerateError, message
from pyro_em.families.exponential import FAR
from pyro_em.graph.factors import Group

_FAR = 1e-6 * FAR


def refuse_edge(group: Group, counts: Tensor, arguments: Mapping[str, Tensor]) -> None:
    """Name the first datum at the edge of the support of a group in linear form.

    Args:
        group: The group.
        counts: Expected counts. # (members, *sizes)
        arguments: The current arguments.

    Raises:
        DegenerateError: If there is one.
    """
    assert group.family is not None
    if group.family.natural is None:
        return
    found = group.family.statistics(group.value, arguments)["feature"]
    at_edge = ~(found.abs() < _FAR)
    at_edge = at_edge.flatten(1 + len(group.sizes)).any(-1)
    weighed = at_edge & (counts > 0)
    if bool(weighed.any()):
        at_edge = weighed
    if not bool(at_edge.any()):
        return
    index = tuple(int(i) for i in at_edge.nonzero()[0])
    names = group.dims[index[0]][: group.n_plates]
    place = ", ".join(f"{n} = {i}" for n, i in zip(names, index[1:], strict=False))
    raise DegenerateError(
        message(
            f"site '{group.members[index[0]]}'" + (f", {place}" if place else ""),
            f"the observed value is at the edge of the support of {group.distribution}. The update was "
            "rolled back.",
            "its density there is zero or infinite, as the parameters decide: the likelihood of "
            f"{', '.join(repr(n) for n in group.params)} has no maximum",
            [
                "move such values inside, as far as they were rounded",
                "explain them by a component of their own: a mixture with a point at the edge",
            ],
        )
    )
