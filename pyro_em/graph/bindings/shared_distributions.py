"""Steps of a loop that hold equal distributions hold one and the same, from the moment they are met.

With its latents enumerated, each step of a chain of K states makes two tables of K × K anew, the one
that it selects and the one that its distribution normalises. A distribution stands for another where
nothing tells them apart: their class and their layout, the bits of their tensors, and the autograd
graph of each tensor down to the parameters, with all that its operations saved (`outline`).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_em.graph.bindings.signatures import outline
from pyro_em.graph.forms import have_equal_bits, layout_of_distribution
from pyro_em.tracing.lean import Aside
from pyro_em.tracing.sites import tensors_of

_LEAST = 256  # numbers in a distribution from which on it is shared
_KINDS = 4  # of distributions of one form that are told apart


class SharedDistributions:
    """Gives sites of a run the distribution of an earlier site where it is the same."""

    def __init__(self) -> None:
        self._first: dict[Hashable, Distribution | None] = {}  # None once another was met
        self._known: dict[Hashable, list[tuple[Distribution, list[Tensor]]]] = {}

    def __call__(self, site: dict[str, Any], aside: Aside) -> bool:
        """Look at a site that has just been traced.

        The first distribution of its class and shape is looked at when there is a second one: most
        models have none.

        Args:
            site: The site, which is changed.
            aside: A block whose operations are none of the model's.

        Returns:
            Whether distributions of its class and shape may be large enough to be shared.
        """
        fn = site["fn"]
        kind = type(fn), fn.batch_shape, fn.event_shape
        if kind not in self._first:
            if _is_small(fn):
                return False
            self._first[kind] = fn
            return True
        with aside, torch.no_grad():
            first, self._first[kind] = self._first[kind], None
            if first is not None:
                self._first_like(first)
            site["fn"] = self._first_like(fn)
        return True

    def _first_like(self, fn: Distribution) -> Distribution:
        """The first distribution that this one equals, which may be itself."""
        tensors = list({id(t): t for t in tensors_of(fn)}.values())
        if sum([t.numel() for t in tensors]) < _LEAST:
            return fn
        layout = layout_of_distribution(fn)
        try:
            graphs = [outline(t, {}) for t in tensors if t.requires_grad]
        except RuntimeError:  # what an operation saved has been written since
            return fn
        shown = [g for g in graphs if g is not None]
        if layout is None or len(shown) < len(graphs):
            return fn
        numbers = [*tensors, *(saved for g in shown for saved in g[1])]
        alike = self._known.setdefault((layout, *(g[0] for g in shown)), [])
        for first, own in alike:
            if all(map(have_equal_bits, own, numbers)):
                return first
        if len(alike) < _KINDS:
            alike.append((fn, numbers))
        return fn


def _is_small(fn: Distribution) -> bool:
    """Whether a distribution that holds no other is surely too small to be shared."""
    sizes = {}
    with torch._C.DisableTorchFunction():  # no call of the model's, which a log would see
        for held in vars(fn).values():
            if isinstance(held, Tensor):
                sizes[id(held)] = held.numel()
            elif isinstance(held, (Distribution, list, tuple)) and type(held) is not torch.Size:
                return False
    return sum(sizes.values()) < _LEAST
