"""The starts of one fit: which have been run, and where those that another process left go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_em.fitting.steps.run import EMRun


@dataclass(eq=False)
class Search:
    """Where a fit of several starts stands.

    Attributes:
        generator: Source of the starts' random choices.
        drawn: Its state where the next start begins.
        runs: Runs that went to the end, the first start first.
        waiting: Short runs.
        stage: Complete rounds of short runs.
        done: Short runs of the present round that are done.
        is_short: Whether short runs are under way.
        limits: How many steps the short runs of each round make.
        at_candidates: The generator's state before the short runs.
        left: Runs to the end that another process left, in their order.
        left_short: The short run that it left.
    """

    generator: torch.Generator
    drawn: Tensor = field(init=False)
    runs: list[EMRun] = field(default_factory=list)
    waiting: list[EMRun] = field(default_factory=list)
    stage: int = 0
    done: int = 0
    is_short: bool = False
    limits: tuple[int, ...] = ()
    at_candidates: Tensor | None = None
    left: list[Mapping[str, Any]] = field(default_factory=list)
    left_short: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.drawn = self.generator.get_state()

    @classmethod
    def seeded(cls, seed: int | None) -> Search:
        """One that has not begun; from torch's global random state where there is no seed."""
        number = int(torch.randint(2**31, ())) if seed is None else seed
        return cls(torch.Generator().manual_seed(number))

    def begin_candidates(self, limits: tuple[int, ...]) -> None:
        """Short runs begin, or go on; from the beginning where they now have other limits."""
        if self.at_candidates is not None and limits != self.limits:
            self.generator.set_state(self.at_candidates)
            self.at_candidates, self.left_short = None, None
            self.waiting, self.stage, self.done = [], 0, 0
            del self.left[:]
        if self.at_candidates is None:
            self.at_candidates = self.generator.get_state()
        self.limits = limits
