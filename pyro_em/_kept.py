"""Parameters to return to when a stochastic step breaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

EVERY = 8  # steps from copy to copy: one at every step is 3% of the step of a VAE


@dataclass(eq=False)
class Kept:
    """Copies of parameters at which the loss was finite.

    Attributes:
        step: The step that they entered; None before the first copy.
        copies: Parameters by name, each with its copy.

    Example:
        >>> p, kept = torch.zeros(2), Kept()
        >>> kept.keep({"p": p}, 0, True)
        >>> _ = p.add_(torch.nan)
        >>> kept.put_back()
        >>> p
        tensor([0., 0.])
    """

    step: int | None = None
    copies: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def keep(self, parameters: Mapping[str, Tensor], step: int, at_once: bool) -> None:
        """Copy parameters that enter a step, if there is no copy of late steps.

        Args:
            parameters: Tensors by name.
            step: The step.
            at_once: Whether an older copy will not do.
        """
        new = [
            n for n, p in parameters.items() if n not in self.copies or self.copies[n][0] is not p
        ]
        if not at_once and not new and self.step is not None and 0 <= step - self.step < EVERY:
            return
        for name in new:
            self.copies[name] = (parameters[name], torch.empty_like(parameters[name]))
        with torch.no_grad():
            copies = [self.copies[n][1] for n in parameters]
            torch._foreach_copy_(copies, [p.detach() for p in parameters.values()])
        self.step = step

    def put_back(self) -> None:
        """Give all parameters the values of their copies."""
        with torch.no_grad():
            for parameter, copy in self.copies.values():
                parameter.copy_(copy)
