"""Whether each row of a plate has Gaussian latents of its own: no unknown connects one with another."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pyro_em.graph.factors import Group
from pyro_em.graph.gaussian_lines.lines import Line
from pyro_em.graph.gaussian_lines.lines_by_rows import is_straight

MANY = 2**17  # rows of which it is not looked at each how its unknowns lie


def own_rows(groups: Sequence[Group], lines: Sequence[Line]) -> int | None:
    """How many rows the outermost plate has, if each reads latents of its own, in one order.

    Args:
        groups: The sites of a block.
        lines: What the mean of each reads.

    Returns:
        Their number; None where there is one row, or where rows share latents.
    """
    first = groups[0]
    if not first.n_plates or first.sizes[0] < 2:
        return None
    plate, rows = first.dims[0][0], first.sizes[0]
    sites = {g.members[0]: g for g in groups}
    for group, line in zip(groups, lines, strict=True):
        if len(group.members) > 1 or not group.n_plates or group.dims[0][0] != plate:
            return None
        for read in line.reads:
            latent = sites[read.latent]
            inner = latent.sizes[1 : latent.n_plates]
            if not is_straight(read.elements, rows, math.prod(inner)):
                return None
    return rows
