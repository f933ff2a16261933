"""What a draw adds to the bound, by its elements: added up at once, made into terms when asked for.

The loss of a step is one number. Its densities are not first summed over events, then scaled, negated
and summed over plates: each is summed once, as a loss written by hand would be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_em.tracing.sites import Role
from pyro_em.variational.particle import Term, dims_of


@dataclass(frozen=True, eq=False, slots=True)
class Summand:
    """One summand of a drawn bound before it is summed.

    Attributes:
        name: The term's, see `Term`.
        role: What the site stands for.
        site: The site, whose plates and scale are the term's.
        elements: The nats of each element of its events; scaled and masked. # (*batch, *event)
        event_dim: How many of the last dimensions are the event's.
        sign: What the elements are multiplied by.
    """

    name: str
    role: Role
    site: Mapping[str, Any]
    elements: Tensor
    event_dim: int = 0
    sign: int = 1

    def term(self) -> Term:
        """It as a term, one number for each element of its plates."""
        value = self.elements
        if self.event_dim:
            value = value.flatten(-self.event_dim).sum(-1)
        value = value if self.sign > 0 else -value
        return Term(self.name, self.role, dims_of(self.site, value), value, self.site["scale"])


def cost_of(summands: Sequence[Summand]) -> Tensor:
    """Minus the sum of all terms, in nats, where the first that is not on the processor is."""
    device = next((s.elements.device for s in summands if s.elements.device.type != "cpu"), None)
    out: Tensor | None = None
    for s in sorted(summands, key=_sign):  # no sign has to be changed where there is a cost
        part = s.elements.sum()
        if device is not None:
            part = part.to(device)
        if out is None:
            out = part if s.sign < 0 else -part
        else:
            out = out + part if s.sign < 0 else out - part
    assert out is not None
    return out


def _sign(summand: Summand) -> int:
    return summand.sign
