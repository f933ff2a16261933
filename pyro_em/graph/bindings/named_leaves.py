"""Leaf tensors by name, which are known by their identity as well.

A loop over T steps has as many latents, and each site asks which of them reach it: whoever lists all
names for each answer takes T² steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor


class NamedLeaves(dict[str, Tensor]):
    """Leaf tensors by name, which also finds the name of a tensor.

    Args:
        leaves: The tensors by name. They are not to change as long as this is in use.

    Attributes:
        names: Of the tensors, by their identity.
    """

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        super().__init__(leaves)
        self.names = {id(leaf): name for name, leaf in leaves.items()}
        self._places: dict[str, int] | None = None

    @classmethod
    def of(cls, leaves: Mapping[str, Tensor]) -> NamedLeaves:
        """Leaves whose names are found: as they are, where they are known to be."""
        return leaves if isinstance(leaves, cls) else cls(leaves)

    def name_of(self, tensor: Tensor) -> str | None:
        """The name of a tensor; None where it is none of the leaves."""
        return self.names.get(id(tensor))

    def among(self, tensors: Iterable[Tensor]) -> tuple[tuple[str, ...], bool]:
        """The names of leaves among some tensors, in their order; whether all of these are leaves."""
        found = {self.name_of(t) for t in tensors}
        return self.in_order([n for n in found if n is not None]), None not in found

    def in_order(self, names: Iterable[str]) -> tuple[str, ...]:
        """Each of some names once, in the order of the leaves."""
        known = set(names)
        if len(known) <= 1:
            return tuple(known)
        if self._places is None:
            self._places = {name: place for place, name in enumerate(self)}
        return tuple(sorted(known, key=self._places.__getitem__))
