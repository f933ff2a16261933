"""Stages of moves in logarithms, for `product_steps`: maxima, and the filter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pyro_em.posteriors.messages.moves import Label, Moves, Stage


@dataclass(frozen=True, eq=False)
class LogStage:
    """A stage in logarithms: a message times a table, with the labels that leave as the last dimension.

    Attributes:
        of: The stage.
        gone: The labels that leave.
        after: The shape of what is left. # (B, *after)
        order: The message's dimensions in the order of what comes out.
        shape: Its shape there. # (B, *after or 1s, *gone)
        logs: The table of each move. # (T - 1, B, *after or 1s, *gone or 1s)
        full: The shape of their sum. # (B, *after, *gone)
    """

    of: Stage
    gone: tuple[Label, ...]
    after: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]
    logs: np.ndarray
    full: tuple[int, ...]

    @classmethod
    def of_stage(cls, moves: Moves, stage: Stage, log: Tensor) -> LogStage:
        """The stage with its tables at every move. # (T - 1, B, *table)"""
        gone = tuple(label for label in stage.before if label not in stage.after)
        labels = (*stage.after, *gone)

        def axes(own: Sequence[Label]) -> list[int]:
            return [own.index(label) for label in labels if label in own]

        def sizes(own: Sequence[Label]) -> tuple[int, ...]:
            return tuple(
                n if v in own else 1 for v, n in zip(labels, moves.shape(labels), strict=True)
            )

        order = (0, *(1 + a for a in axes(stage.before)))
        logs = log.permute(0, 1, *(2 + a for a in axes(stage.table)))
        logs = logs.reshape(*log.shape[:2], *sizes(stage.table))
        B = log.shape[1]
        return cls(
            stage,
            gone,
            (B, *moves.shape(stage.after)),
            order,
            (B, *sizes(stage.before)),
            logs.cpu().numpy(),
            (B, *moves.shape(labels)),
        )

    def times(self, message: np.ndarray, move: int) -> np.ndarray:
        """The sum of a message and a table. # (B, values of after, values that leave)"""
        both = message.transpose(self.order).reshape(self.shape) + self.logs[move]
        if both.shape != self.full:
            both = np.broadcast_to(both, self.full)
        return both.reshape(self.full[0], math.prod(self.after[1:]), -1)
