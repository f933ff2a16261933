"""Arguments that are computed of parameters alone, whatever the operations are.

    a = f(θ)[index],     f: an order of means, a decoder of embeddings, sticks that are broken

No derivative says what f is; the notes of a run do (`pyro_em.tracing.tape`): they are done again at
other parameters. What f makes is a few numbers, which the cells of the argument read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.tracing.tape import Tape


@dataclass(frozen=True, eq=False)
class Computed:
    """An argument as a function of parameters, by what a run did.

    Attributes:
        tape: The operations; its results follow each other.
        index: Which number of the results each cell is. # argument's shape
    """

    tape: Tape
    index: Tensor

    def evaluate(self, values: Mapping[str, Tensor]) -> Tensor:
        """The argument at parameter values; differentiable in them."""
        made = [t.reshape(-1) for t in self.tape(values).values()]
        return (made[0] if len(made) == 1 else torch.cat(made))[self.index]

    @torch.enable_grad()
    def reached(self, name: str, values: Mapping[str, Tensor], cells: Tensor | None) -> Tensor:
        """Which elements of a parameter some cells depend on at parameter values. # (numel,)

        Args:
            name: The parameter.
            values: Of all parameters.
            cells: Which cells; all where None. # argument's shape
        """
        own = values[name].detach().requires_grad_()
        made = self.evaluate({**values, name: own})
        made = made if cells is None else made[cells]
        # Weights that nobody chose: what moves two cells may move their sum by nothing.
        weights = torch.rand(made.shape, generator=torch.Generator().manual_seed(0))
        total = (made * weights.to(made)).sum()
        if not total.requires_grad:
            return torch.zeros(own.numel(), dtype=torch.bool, device=own.device)
        (slope,) = torch.autograd.grad(total, own, allow_unused=True)
        return (torch.zeros_like(own) if slope is None else slope != 0).reshape(-1).bool()

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Computed:
        """The same with the dimensions of the argument laid out anew."""
        return Computed(self.tape, change(self.index))
