"""Rows of which a latent is seen: every cell but that of the label is impossible."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.clamped import Clamped
from pyro_em.graph.factors import Group


@dataclass(frozen=True, eq=False)
class Labels:
    """What is seen of a latent of the rows.

    Attributes:
        places: Where each label is in the support. # (N,)
        seen: Which rows have one; None where all have. # (N,)
    """

    places: Tensor
    seen: Tensor | None

    @classmethod
    def of(cls, group: Group, K: int, N: int) -> Labels | None:
        """The labels that a group is; None where it is something else, or a label is impossible.

        Args:
            group: A collapsed group of rows.
            K: Values of the latent.
            N: Rows.
        """
        if group.family is None or group.family.distribution is not Clamped:
            return None
        held, mask = group.arguments["held"], group.mask
        if len(group.members) > 1 or held.numel() != K or (mask is not None and mask.shape[2] > 1):
            return None
        places = group.value.reshape(-1).expand(N)
        seen = None if mask is None else mask.reshape(-1).expand(N)
        counted = places if seen is None else places[seen]
        if counted.numel() and not 0 <= float(counted.min()) <= float(counted.max()) < K:
            return None
        return cls(places, seen)

    def clamp(self, joint: Tensor, rows: slice) -> Tensor:
        """Log densities of some rows, which are overwritten. # (K, rows)"""
        if self.seen is None:
            own = self.places[rows].long().unsqueeze(0)
            kept = joint.gather(0, own)
            return joint.fill_(-torch.inf).scatter_(0, own, kept)
        at = self.seen[rows].nonzero().squeeze(1)
        if not len(at):
            return joint
        own = self.places[rows][at].long()
        kept = joint[own, at]
        return joint.index_fill_(1, at, -torch.inf).index_put_((own, at), kept)
