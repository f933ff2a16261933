r"""How messages of chains whose states are products move from step to step, in stages.

A state is a product of several latents, or of the latest values of one. From one step to the next each
stage multiplies by a table of some of the labels and sums those that nothing reads any more,

    x_{s+1}(after) = Σ x_s(before) a_s(table).

One latent takes a single stage, α_t(j) ∝ ℓ_t(j) Σ_i α_{t−1}(i) A_t(i, j). Independent chains take one
each, which is the product with A ⊗ B without A ⊗ B; a history of two is one stage of K³ products that
moves (z_{t−2}, z_{t−1}) to (z_{t−1}, z_t). Smoothing is in `pyro_em.posteriors.messages.smooth_moves`.

Source: Rabiner (1989), "A tutorial on hidden Markov models", section V.A; Ghahramani and Jordan
(1997), "Factorial hidden Markov models", appendix B, for stages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import torch
from torch import Tensor

Label = tuple[int, int]  # a latent of a step, by number, and how many steps before the present one


def in_order(labels: Sequence[Label] | set[Label]) -> tuple[Label, ...]:
    """Labels as the dimensions of messages and tables have them: by latent, older ones first."""
    return tuple(sorted(labels, key=lambda label: (label[0], -label[1])))


@dataclass(frozen=True)
class Stage:
    """A product with a table, and a sum.

    Attributes:
        before: Labels of the message that comes in.
        table: Labels of the table.
        after: Labels of the message that goes out.
        factors: Numbers of the factors that the table is made of.
    """

    before: tuple[Label, ...]
    table: tuple[Label, ...]
    after: tuple[Label, ...]
    factors: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Moves:
    """How messages go from one step to the next; `Moves.of` makes one.

    Attributes:
        sizes: How many values each latent of a step has.
        stages: One after the other.
    """

    sizes: tuple[int, ...]
    stages: tuple[Stage, ...]

    @classmethod
    def of(
        cls, sizes: Sequence[int], histories: Sequence[int], factors: Sequence[set[Label]]
    ) -> Moves:
        """The stages of some factors, each latent summed where that costs least.

        Args:
            sizes: How many values each latent has.
            histories: How many of its latest values the state holds, at least one each.
            factors: The labels that each factor reads.

        Example:
            >>> pair = Moves.of((2, 3), (1, 1), [{(0, 1), (0, 0)}, {(1, 1), (1, 0)}])
            >>> [stage.table for stage in pair.stages]
            [((0, 1), (0, 0)), ((1, 1), (1, 0))]
        """
        state = {(c, lag + 1) for c, h in enumerate(histories) for lag in range(h)}
        goal = {(c, lag) for c, h in enumerate(histories) for lag in range(h)}
        left, stages = dict(enumerate(factors)), []

        def read(label: Label) -> set[Label]:
            return {label}.union(*(own for own in left.values() if label in own))

        def cost(label: Label) -> int:
            return math.prod(sizes[c] for c, _ in state | read(label))

        while leaving := in_order(state - goal):
            chosen = min(leaving, key=cost)
            taken = tuple(f for f, own in left.items() if chosen in own)
            table: set[Label] = set().union(*(left.pop(f) for f in taken))
            after = (state | table).intersection(goal.union(*left.values()))
            table |= state - after  # what no factor reads is free, both where it goes
            if not after - goal:  # and where it comes from
                table, after = table | (goal - after), goal
            stages.append(Stage(in_order(state), in_order(table), in_order(after), taken))
            state = after
        return cls(tuple(sizes), tuple(stages))

    def shape(self, labels: Sequence[Label]) -> tuple[int, ...]:
        """How many values some labels have."""
        return tuple(self.sizes[c] for c, _ in labels)

    @property
    def state(self) -> tuple[Label, ...]:
        """The labels of the state."""
        return self.stages[-1].after

    @cached_property
    def P(self) -> int:
        """How many values the state has."""
        return math.prod(self.shape(self.state))

    @cached_property
    def cells(self) -> int:
        """Products of one move."""
        return sum(math.prod(self.shape(in_order({*s.before, *s.table}))) for s in self.stages)

    @cached_property
    def places(self) -> tuple[tuple[Label, ...], Tensor, Tensor]:
        """All labels of a move, and which states of both its ends each of their values is of."""
        labels = in_order(
            {*self.stages[0].before, *self.state}.union(*(s.table for s in self.stages))
        )
        # `torch.unravel_index` would import sympy.
        values = [torch.arange(size) for size in self.shape(labels)]
        index = dict(zip(labels, torch.meshgrid(*values, indexing="ij"), strict=True))

        def flat(own: Sequence[Label]) -> Tensor:
            out = torch.zeros(self.shape(labels), dtype=torch.long)
            for label in own:
                out = out * self.sizes[label[0]] + index[label]
            return out.reshape(-1)

        return labels, flat(self.stages[0].before), flat(self.state)

    @cached_property
    def runs(self) -> _Runs:
        """The stages as compiled loops take them."""
        return _Runs.of(self)


@dataclass(frozen=True, eq=False)
class _Runs:
    """Stages as lists of runs; see `pyro_em.posteriors.messages.numba_moves`."""

    runs: np.ndarray
    begins: np.ndarray
    kinds: np.ndarray
    inner: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, moves: Moves) -> _Runs:
        found: list[np.ndarray] = []
        kinds, inner = [], []
        for stage in moves.stages:
            along = stage.after[-1]
            is_last = all(
                along not in own or along == own[-1] for own in (stage.before, stage.table)
            )
            outer = list(in_order({*stage.before, *stage.table}))
            if is_last:  # else runs of length one
                outer.remove(along)
            index = [range(moves.sizes[c]) for c, _ in outer]
            places = np.array(list(product(*index)), dtype=np.int64).reshape(-1, len(outer))

            def flat(
                own: Sequence[Label], outer: Sequence[Label] = outer, places: np.ndarray = places
            ) -> np.ndarray:
                out = np.zeros(len(places), dtype=np.int64)
                for label in own:
                    here = places[:, outer.index(label)] if label in outer else 0
                    out = out * moves.sizes[label[0]] + here
                return out

            found.append(np.stack([flat(stage.after), flat(stage.table), flat(stage.before)]))
            is_moved = is_last and along in stage.before
            kinds.append(0 if not is_moved else 2 if along in stage.table else 1)
            inner.append(moves.sizes[along[0]] if is_last else 1)
        begins = np.cumsum([0, *(f.shape[1] for f in found)])
        sizes = [stage.before for stage in moves.stages] + [moves.state]
        return cls(
            np.ascontiguousarray(np.concatenate(found, 1)),
            begins.astype(np.int64),
            np.array(kinds, dtype=np.int64),
            np.array(inner, dtype=np.int64),
            np.array([math.prod(moves.shape(labels)) for labels in sizes], dtype=np.int64),
        )
