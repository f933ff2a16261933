"""Arguments that differ from row to row and component to component, computed when somebody asks.

An argument x_n · w_k has as many numbers as there are rows and components together; what it is
computed from has those of the covariates and of the coefficients. Kernels compute it some rows at a
time, so that nobody need hold all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pyro_em.graph.bindings.binding import Binding


class LaterArguments(Mapping[str, Tensor]):
    """Arguments of a group, some of which are computed from bindings at each look.

    Args:
        held: The arguments by name, in order; None for one that is computed.
        bindings: How parameters reach the latter.
        values: The parameters at which the group was traced.
        dtypes: The dtypes of the latter.
    """

    def __init__(
        self,
        held: Mapping[str, Tensor | None],
        bindings: Mapping[str, Binding],
        values: Mapping[str, Tensor],
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        self.held, self.bindings, self.at, self.dtypes = held, bindings, values, dtypes

    def __getitem__(self, name: str) -> Tensor:
        own = self.held[name]
        if own is not None:
            return own
        with torch.no_grad():
            return self.bindings[name].evaluate(self.at).to(self.dtypes[name])

    def __contains__(self, name: object) -> bool:
        return name in self.held

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)

    @property
    def outlines(self) -> dict[str, Tensor]:
        """Per argument a tensor of its shape and dtype, whose numbers say nothing of it."""
        out = {}
        for name, own in self.held.items():
            if own is None:
                like = self.bindings[name].constant
                own = torch.zeros((), dtype=self.dtypes[name], device=like.device)
                own = own.expand(like.shape)
            out[name] = own
        return out

    def rebound(
        self, held: Mapping[str, Tensor], bindings: Mapping[str, Binding]
    ) -> LaterArguments:
        """The same laid out anew: what is held, and the bindings of what is not."""
        own = {name: held.get(name) for name in self.held}
        return LaterArguments(own, bindings, self.at, self.dtypes)
