"""Layouts of chains, kept by all that they follow from.

Where the numbers of a chain lie follows from which elements its sites read, not from any number. A key
holds all of that, so that a layout that is found again is the one that would be made. With it is what
it remembers itself: the kinds of its steps, and where numbers go in matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from pyro_em.posteriors.states.state_layout import StateLayout

_MOST = 8  # layouts

_NUMBERS = 2**18  # of the states and the data of one that is kept

_layouts: dict[Hashable, StateLayout] = {}


def remembered(key: Hashable | None, make: Callable[[], StateLayout]) -> StateLayout:
    """The layout of a key, made where it is not known.

    Args:
        key: All that the layout follows from; None where it is not to be kept. A large one is not kept
            either: with it would be as many places of numbers.
        make: Makes it.
    """
    if key is None:
        return make()
    found = _layouts.pop(key, None) or make()
    if not may_be_kept(found):
        return found
    _layouts[key] = found  # the latest last
    while len(_layouts) > _MOST:
        del _layouts[next(iter(_layouts))]
    return found


def may_be_kept(layout: StateLayout) -> bool:
    """Whether a layout is small enough for what follows from it to be kept."""
    form = layout.form
    return form.chains * form.steps * (form.size + form.width) <= _NUMBERS


def forget_layouts() -> None:
    """Let go of all layouts."""
    _layouts.clear()
