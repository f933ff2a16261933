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
        is_late: Whether parameters can only have been changed by steps since.

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
    is_late: bool = False

    def keep(self, parameters: Mapping[str, Tensor], step: int, at_once: bool) -> None:
        """Copy parameters that enter a step, if there is no copy of late steps.

        Those of earlier steps that this one does not read are copied beside them.

        Args:
            parameters: Tensors by name.
            step: The step.
            at_once: Whether an older copy will not do.
        """
        new = [
            n for n, p in parameters.items() if n not in self.copies or self.copies[n][0] is not p
        ]
        late = self.is_late and self.step is not None and 0 <= step - self.step < EVERY
        if late and not new and not at_once:
            return
        for name in new:
            self.copies[name] = (parameters[name], torch.empty_like(parameters[name]))
        if not self.copies:  # nothing has been read yet
            return
        with torch.no_grad():
            originals = [p.detach() for p, _ in self.copies.values()]
            torch._foreach_copy_([copy for _, copy in self.copies.values()], originals)
        self.step, self.is_late = step, True

    def put_back(self) -> None:
        """Give all parameters the values of their copies."""
        with torch.no_grad():
            for parameter, copy in self.copies.values():
                parameter.copy_(copy)
