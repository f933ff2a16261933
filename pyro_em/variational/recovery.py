"""Parameters to return to when a stochastic step breaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

EVERY = 8  # steps from copy to copy: one at every step is 3% of the step of a VAE


@dataclass(eq=False)
class Recovery:
    """Copies of parameters at which the loss was finite.

    Attributes:
        step: The step that they entered; None before the first copy.
        copies: Parameters by name, each with its copy.
        is_unbroken: Whether nothing but steps can have changed the parameters since the copy.

    Example:
        >>> p, recovery = torch.zeros(2), Recovery()
        >>> recovery.keep({"p": p}, 0, True)
        >>> _ = p.add_(torch.nan)
        >>> recovery.put_back()
        >>> p
        tensor([0., 0.])
    """

    step: int | None = None
    copies: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    is_unbroken: bool = False

    def keep(self, parameters: Mapping[str, Tensor], step: int, at_once: bool) -> None:
        """Copy the parameters that enter a step, unless one of the last steps was copied.

        Those of earlier steps that this one does not read are copied beside them.

        Args:
            parameters: Tensors by name.
            step: The step.
            at_once: Whether the copy of an earlier step is not enough.
        """
        new = [
            n for n, p in parameters.items() if n not in self.copies or self.copies[n][0] is not p
        ]
        is_recent = self.is_unbroken and self.step is not None and 0 <= step - self.step < EVERY
        if is_recent and not new and not at_once:
            return
        for name in new:
            self.copies[name] = (parameters[name], torch.empty_like(parameters[name]))
        if not self.copies:  # nothing has been read yet
            return
        with torch.no_grad():
            originals = [p.detach() for p, _ in self.copies.values()]
            torch._foreach_copy_([copy for _, copy in self.copies.values()], originals)
        self.step, self.is_unbroken = step, True

    def put_back(self) -> None:
        """Give all parameters the values of their copies."""
        with torch.no_grad():
            for parameter, copy in self.copies.values():
                parameter.copy_(copy)
