"""Stochastic steps that processes of a group make together, each on rows of its own.

With n_r of N rows on rank r, the loss of its rows standing for all, as that of a batch does,

    L_r = −(N / n_r · Σ_rows terms + terms outside the rows),   L = Σ_r (n_r / N) L_r,

is that of all rows, in which what is outside them counts once; so are the gradients. All ranks then
make the same step. What is drawn outside the rows is the same on all ranks, the rows' own draws differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_em.graph.structure import Structure
from pyro_em.portable import StaysHere
from pyro_em.reduction.reduction import Reduction
from pyro_em.reduction.trees import mapped
from pyro_em.tracing.randomness import random_state, seed_generators, set_random_state

T = TypeVar("T")


@dataclass(eq=False)
class Sharing(StaysHere):
    """How a process steps together with the others of its group.

    Attributes:
        over: Sums over all processes.
        rows: Rows of this process.
        total: Rows of all processes.
        plate: The plate whose elements are parted.
        seed: Of all draws of this fit, the same on all ranks.
        rank: The number of this process.
        draws: How often it has drawn so far.
    """

    over: Reduction[Any]
    rows: int
    total: int
    plate: str
    seed: int
    rank: int
    _known: set[str] = field(default_factory=set, init=False)  # parameters that began alike
    draws: int = field(default=0, init=False)

    @property
    def weight(self) -> float:
        """The share of this process's rows in all rows."""
        return self.rows / self.total

    def factors(self, structure: Structure) -> Mapping[str, float]:
        """What multiplies the plates of a batch of this process's rows so that it stands for all."""
        return {self.plate: self.total / structure.plates[self.plate].size}

    def know(self, names: Iterable[str]) -> None:
        """Parameters whose values are the same on all ranks."""
        self._known.update(names)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draws outside the rows that are the same on all ranks, and others of this rank's own.

        Model and guide have to be looked at before: a look compares runs at one random state.
        """
        self.draws += 1
        seed_generators(_seed(self.seed, self.draws, self.rank + 1))
        with _EqualDraws(self.plate, _seed(self.seed, self.draws, 0)):
            yield

    def gradients(
        self, make: Callable[[], tuple[float, dict[str, Tensor]]], baselines: dict[str, float]
    ) -> tuple[float, dict[str, Tensor]]:
        """The loss of all rows, and parameters with its gradient.

        Args:
            make: The loss of this rank's rows standing for all, and all parameters that it read,
                with its gradient.
            baselines: Averages that go on with the draws of all ranks.
        """
        read: dict[str, Tensor] = {}

        def weighted(_: Any) -> dict[str, Any]:
            loss, tensors = make()
            read.update(tensors)
            names = sorted(tensors)
            return {
                "loss": self.weight * loss,
                "gradients": {n: self.weight * _gradient(tensors[n]) for n in names},
                "moved": {n: tensors[n].grad is not None for n in names},
                "baselines": {n: self.weight * baselines[n] for n in sorted(baselines)},
            }

        total = self.over.sum(weighted)
        self._begin_alike(read)
        for name, p in read.items():
            p.grad = total["gradients"][name].to(p) if total["moved"][name] else None
        baselines.update(total["baselines"])
        return total["loss"], read

    def _begin_alike(self, read: Mapping[str, Tensor]) -> None:
        """Give parameters that were made in this step the values of rank 0."""
        new = [n for n in sorted(read) if n not in self._known]
        if not new:
            return
        values = self.over.from_first(lambda: {n: read[n].detach() for n in new})
        with torch.no_grad():
            for name, value in values.items():
                read[name].copy_(value)
        self.know(new)

    def mean(self, make: Callable[[], T]) -> T:
        """The mean over all rows of a value, or a tree of values, that each rank makes of its own."""
        return self.over.sum(lambda _: mapped(make(), lambda leaf: self.weight * leaf))

    def any(self, holds: Callable[[], bool]) -> bool:
        """Whether something holds on any rank."""
        return any(self.over.gathered(holds))  # processes without rows have a say, too


class _EqualDraws(Messenger):
    """Draw sites outside a plate from a random state of their own.

    Args:
        plate: The plate.
        seed: The random state.
    """

    def __init__(self, plate: str, seed: int) -> None:
        super().__init__()
        self.plate = plate
        own = random_state()
        seed_generators(seed)
        self.state = random_state()
        set_random_state(own)

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] or msg["value"] is not None or msg["done"]:
            return
        if any(frame.name == self.plate for frame in msg["cond_indep_stack"]):
            return
        own = random_state()
        set_random_state(self.state)
        try:
            msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])
            self.state = random_state()
        finally:
            set_random_state(own)


def _gradient(p: Tensor) -> Tensor:
    if p.grad is None:
        return torch.zeros_like(p)
    return p.grad.to_dense() if p.grad.is_sparse else p.grad


def _seed(*parts: int) -> int:
    """A seed for each of several draws, which no other has."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
