"""The sites of Gaussian chains as stacks, and where their numbers lie.

A stack holds sites that are alike at many levels.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_em.posteriors.gaussians.site_forms import SiteForm
from pyro_em.posteriors.states.state_form import Placed, StateForm


@dataclass(frozen=True, eq=False)
class Stack:
    """Sites that are alike but for their levels.

    Attributes:
        form: The first of them.
        members: How many there are.
        levels: Of each member. # (members,)
        starts: Where the numbers of each begin: in the state, or in the data of the level. # (members,)
        chain: The chain of each row. # (rows,)
        rank: The number of each row among those of its chain. # (rows,)
        rows: The row of each chain and rank; −1 where a chain has fewer. # (chains, K)
        reads: Places of what each row reads, terms beside each other: in the state before for a latent,
            in that of the level for an observed site. # (rows, Q)
        present: Whether a row reads it; None where every row reads every term. # (rows, Q)
    """

    form: SiteForm
    members: int
    levels: Tensor
    starts: Tensor
    chain: Tensor
    rank: Tensor
    rows: Tensor
    reads: Tensor
    present: Tensor | None

    @classmethod
    def of(cls, form: SiteForm, placed: Sequence[Placed], chains: int) -> Stack:
        """The stack of some sites.

        Args:
            form: The first of them.
            placed: Where each lies; they have one key.
            chains: How many chains there are.
        """
        one = placed[0]
        rows = np.full((chains, int(one.rank.max()) + 1), -1)
        rows[one.chain, one.rank] = np.arange(form.rows)
        empty = np.zeros((form.rows, 0), dtype=np.int64)
        reads = np.concatenate([empty, *one.reads], 1)
        present = [
            np.broadcast_to(p[:, None], r.shape)
            for p, r in zip(one.present, one.reads, strict=True)
        ]
        there = np.concatenate([empty.astype(bool), *present], 1)
        return cls(
            form,
            len(placed),
            torch.tensor([p.level for p in placed]),
            torch.tensor([p.start for p in placed]),
            torch.as_tensor(one.chain),
            torch.as_tensor(one.rank),
            torch.as_tensor(rows),
            torch.as_tensor(reads),
            None if there.all() else torch.as_tensor(there),
        )

    @property
    def own(self) -> Tensor:
        """Places of a row's own numbers from the start of its site's on. # (rows, D)"""
        width = self.form.width
        return self.rank.unsqueeze(-1) * width + torch.arange(width, device=self.rank.device)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether what all chains read lies at the same places, and none has fewer rows."""
        if bool((self.rows < 0).any()):
            return False
        by_chain = self.reads[self.rows]
        same = bool((by_chain == by_chain[:1]).all())
        if self.present is not None:
            there = self.present[self.rows]
            same = same and bool((there == there[:1]).all())
        return same

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "is_uniform"}


@dataclass(frozen=True, eq=False)
class Kinds:
    """The different levels, where levels with the same numbers count once.

    Attributes:
        of_level: The kind of each level. # (T,)
        count: How many there are.
        entries: For each stack where its numbers go: the kinds, the members that stand for all that are
            alike, and where these start. # (entries,) each
    """

    of_level: Tensor
    count: int
    entries: dict[int, tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class StateLayout:
    """Chains as stacks of sites.

    Attributes:
        form: The chains.
        stacks: In model order of their first members.
        device: Where places are needed.
    """

    form: StateForm
    stacks: tuple[Stack, ...]

    @property
    def blocks(self) -> int:
        """How many chains there are: their unknowns are solved apart."""
        return self.form.chains

    @property
    def largest(self) -> int:
        """Unknown numbers of one step."""
        return self.form.size

    @property
    def vector_size(self) -> int:
        """Numbers in all states."""
        return self.form.chains * self.form.steps * self.form.size

    @cached_property
    def sites(self) -> tuple[SiteForm, ...]:
        """The stacks as sites, a row for each row of a member."""
        return tuple(
            SiteForm(s.form.name, s.members * s.form.rows, s.form.width, s.form.is_latent)
            for s in self.stacks
        )

    @cached_property
    def block_of_row(self) -> tuple[Tensor, ...]:
        """For each stack the chain of each row. # (members · rows,) each"""
        return tuple(s.chain.repeat(s.members) for s in self.stacks)

    @cached_property
    def level_of_row(self) -> tuple[Tensor, ...]:
        """For each stack the level of each row. # (members · rows,) each"""
        return tuple(s.levels.repeat_interleave(s.form.rows) for s in self.stacks)

    def block_of_element(self, latent: int) -> Tensor:
        """The chain of each element of a latent. # (members · rows,)"""
        return self.block_of_row[latent]

    @cached_property
    def block_sizes(self) -> Tensor:
        """Unknown numbers of each chain. # (chains,)"""
        out = torch.zeros(self.form.chains, dtype=torch.long)
        for s in self.stacks:
            if s.form.is_latent:
                out += s.members * s.form.width * torch.bincount(s.chain, minlength=len(out))
        return out

    def kinds(self, varying: Sequence[bool], latents: bool) -> Kinds:
        """The different levels of the latents, or of what is observed.

        Args:
            varying: Whether the numbers of a stack differ between its members.
            latents: Which of the two.
        """
        key = (tuple(varying), latents)
        if key not in self.remembered:
            self.remembered[key] = self._kinds(varying, latents)
        return self.remembered[key]

    @cached_property
    def remembered(self) -> dict[Any, Kinds]:
        """What was found, for the next who asks; copies begin without."""
        return {}

    @cached_property
    def indices(self) -> dict[Any, Any]:
        """Where the numbers of stacks go in tensors, for the next E-step; copies begin without."""
        return {}

    @cached_property
    def kernels(self) -> dict[Any, Any]:
        """What steps on sums were decided to be, for the next fit; copies begin without."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {"form": self.form, "stacks": self.stacks}

    def _kinds(self, varying: Sequence[bool], latents: bool) -> Kinds:
        own = [s for s, stack in enumerate(self.stacks) if stack.form.is_latent == latents]
        if own and not any(varying[s] for s in own):
            found = self._alike(own)
            if found is not None:
                return found
        at: list[list[tuple[int, int, int, int]]] = [[] for _ in range(self.form.steps)]
        for s, m, level, start in self._members(latents):
            at[level].append((s, start, m if varying[s] else -1, m))
        known: dict[Hashable, int] = {}
        of_level, entries = [], dict[int, list[tuple[int, int, int]]]()
        for here in at:
            key = tuple(entry[:3] for entry in here)
            if key not in known:
                known[key] = len(known)
                for s, start, _, m in here:
                    entries.setdefault(s, []).append((known[key], m, start))
            of_level.append(known[key])
        columns = {s: torch.tensor(e).unbind(-1) for s, e in entries.items()}
        return Kinds(
            torch.tensor(of_level), len(known), {s: (a, b, c) for s, (a, b, c) in columns.items()}
        )

    def _alike(self, own: Sequence[int]) -> Kinds | None:
        """The kinds of levels of stacks whose members are alike; None where a level has two of one."""
        places = np.full((self.form.steps, len(own)), -1)
        members = np.zeros_like(places)
        for column, s in enumerate(own):
            levels = self.stacks[s].levels.numpy()
            if len(np.unique(levels)) < len(levels):
                return None
            places[levels, column] = self.stacks[s].starts.numpy()
            members[levels, column] = np.arange(len(levels))
        # The kinds in the order of their first levels.
        _, first, which = np.unique(places, axis=0, return_index=True, return_inverse=True)
        order = np.argsort(first)
        number = np.empty_like(order)
        number[order] = np.arange(len(order))
        entries = {}
        for column, s in enumerate(own):
            start, member = (x[first[order], column] for x in (places, members))
            there = np.flatnonzero(start >= 0)
            columns = there, member[there], start[there]
            a, b, c = (torch.from_numpy(x) for x in columns)
            entries[s] = (a, b, c)
        of_level = torch.from_numpy(number[which.reshape(-1)])
        return Kinds(of_level, len(order), entries)

    def _members(self, latents: bool) -> Iterator[tuple[int, int, int, int]]:
        for s, stack in enumerate(self.stacks):
            if stack.form.is_latent == latents:
                pairs = zip(stack.levels.tolist(), stack.starts.tolist(), strict=True)
                yield from ((s, m, level, start) for m, (level, start) in enumerate(pairs))
