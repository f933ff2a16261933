"""A fit that processes of a group make together: what each of them has, and where they begin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from pyro_em.errors import UsageError, message
from pyro_em.fitting.parts import shards
from pyro_em.fitting.parts.chunked import Passes, chunks_in, noted
from pyro_em.fitting.parts.rows_alone import refuse_rows_that_see_others
from pyro_em.fitting.parts.shards import Shards
from pyro_em.fitting.preconditions import refuse_rows_of_a_guide
from pyro_em.fitting.session import Session
from pyro_em.fitting.steps.parted import Parted
from pyro_em.plan.fit_wishes import FitWishes
from pyro_em.plan.over_all import require_partable
from pyro_em.plan.part import Part
from pyro_em.plan.program import Program
from pyro_em.plan.request import Request
from pyro_em.reduction.over_group import OverGroup
from pyro_em.reduction.over_parts import OverParts
from pyro_em.reduction.reduction import Whole
from pyro_em.sources.loaders import is_loader, length_of, rows_of_pass
from pyro_em.variational.bound import Variational
from pyro_em.variational.sharing import Sharing
from pyro_em.variational.trainer import Trainer

_INIT = "init of "  # before the name of a site whose values the user gave

HOW = "on several processes"


@dataclass(frozen=True, eq=False)
class Joined:
    """A fit on several processes.

    Attributes:
        over: The group.
        request: What the user asked of the model.
        wishes: The keywords of the fit.
    """

    over: OverGroup[Any]
    request: Request
    wishes: FitWishes

    @classmethod
    def of(cls, wishes: FitWishes, request: Request) -> Joined:
        """A fit with the processes of the group that the user gave.

        Raises:
            GroupError: If there is no such group.
        """
        return cls(OverGroup(Whole(None), wishes.process_group), request, wishes)

    def own_wishes(self) -> FitWishes:
        """The keywords as they are for this process: one of them shows a bar, all start alike.

        Raises:
            UsageError: If processes pass different keywords.
        """
        w = self.wishes
        same = {
            name: repr(getattr(w, name))
            for name in _SAME
            if getattr(w, name) is None or isinstance(getattr(w, name), (int, float, str))
        }
        same["init"] = str(sorted(w.init) if isinstance(w.init, Mapping) else w.init)
        same["online"] = repr(w.online)
        same["checkpoint"] = "none" if w.checkpoint is None else "one"
        self.over.agree(
            {f"fit(..., {n}=)": v for n, v in same.items()},
            ("pass the same keywords on all processes",),
        )
        return w if self.over.rank == 0 else replace(w, progress=False)

    def arguments(
        self, w: FitWishes, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[FitWishes, tuple, dict[str, Any], bool]:
        """Keywords and arguments of this process, and whether it has rows; see `shards.arguments`."""
        kind = "rows"
        if args and is_loader(args[0]):
            kind = "a DataLoader"
        elif chunks_in(args) is not None:
            kind = "Chunks"
        self.over.agree(
            {"what the data come in": kind}, ("pass data of one kind on all processes",)
        )
        if kind == "Chunks":
            totals = self.over.gathered(lambda: args[0].total)
            if None not in totals:
                self.over.at_rows(sum(totals[: self.over.rank]))
        if kind != "rows":
            return w, args, kwargs, True
        given = dict(w.init) if isinstance(w.init, Mapping) else {}
        named = {**kwargs, **{f"{_INIT}{site}": value for site, value in given.items()}}
        args, named, has_rows = shards.arguments(self.over, self.request.model, args, named)
        if given:
            w = replace(w, init={site: named.pop(f"{_INIT}{site}") for site in given})
        return w, args, named, has_rows

    def shards(
        self, found: Program | Trainer, looked: tuple, given: tuple, kwargs: dict, has_rows: bool
    ) -> Shards:
        """What ranks have, once all of them have read the model; they go on with the same values.

        Args:
            found: What the model's reading found.
            looked: The model's positional arguments when it was read.
            given: The same, or a loader of them.
            kwargs: Its keyword arguments.
            has_rows: Whether this rank has rows of its own.

        Raises:
            UsageError: If ranks differ in what they have to have alike.
        """
        over, model = self.over, self.request.model
        if isinstance(found, Program):
            seen: Program | Variational = found
            parameters = found.graph.parameters
        else:
            seen, parameters = found.variational, found.variational.parameters
        plate, size = shards.outermost_plate(seen)
        chunks = chunks_in(given)
        items = 0 if chunks is None else len(looked) - len(given) + 1
        shards.agreed(over, model, looked, kwargs, size, items)
        over.agree(shards.plan_digest(seen), ("build the same model on all processes",))
        if given and is_loader(given[0]):
            size = _rows_in_loader(given[0])
        if chunks is not None:
            size = chunks.total or sum(chunk.rows for chunk in chunks.read())
        rows = tuple(over.gathered(lambda: size if has_rows else 0))
        out = Shards(over, plate, rows)
        over.at_rows(out.begin, out.place)
        if has_rows:
            shards.refuse_parameters_of_rows(
                out, model, self.request.guide, looked, kwargs, parameters
            )
        shards.share_parameters(out, parameters)
        return out

    def parted(
        self, shared: Shards, session: Session, program: Program, args: tuple, kwargs: dict
    ) -> Parted:
        """The rows of all processes as the parts of an exact fit.

        Args:
            shared: The rows of all ranks.
            session: Reads the model.
            program: The model with this rank's rows, or the first chunk of them.
            args: The model's positional arguments, the first of them perhaps in chunks.
            kwargs: Its keyword arguments.

        Raises:
            UsageError: If the model's rows are not independent.
        """
        is_first, chunks = self.over.rank == shared.first, chunks_in(args)
        over: OverGroup[Part]
        require_partable(program, HOW, adds=self.wishes.online is None)
        items = None if chunks is None else len(program.args) - len(args) + 1
        refuse_rows_that_see_others(session.planner, program, HOW, items)
        if chunks is None:
            part = Part(program, is_first, shared.begin, is_kept=True)
            over = self.over.with_parts(Whole(part), is_empty=shared.is_empty, first=shared.first)
            return Parted.of(over, part, HOW, is_at_hand=True)
        keeps = self.wishes.online is None or chunks.is_ordered
        passes = Passes(session, chunks, args[1:], kwargs, is_first, shared.begin, keeps=keeps)
        over = self.over.with_parts(OverParts(passes), first=shared.first)
        lead = Part(noted(program), is_first, shared.begin)
        data = Parted.of(over, lead, f"{HOW} in chunks")
        if data.is_quick:
            passes.all_data = data.all_data
        return data

    def sharing(self, shared: Shards, trainer: Trainer) -> Trainer:
        """Stochastic steps together with the other processes.

        Raises:
            UsageError: If the bound of all rows is no sum over the processes.
        """
        variational = trainer.variational
        if variational.weighted is not None and not variational.draws_are_local:
            raise UsageError(
                message(
                    "process_group",
                    "the importance-weighted bound weighs draws of all rows together.",
                    "it is no sum over processes",
                    ["fit in one process", "use the ELBO"],
                )
            )
        sharing = Sharing(
            self.over.with_parts(Whole(None), is_empty=shared.is_empty),
            shared.own,
            shared.total,
            shared.plate,
            self.over.from_first(lambda: _seed_of(self.wishes.seed)),
            self.over.rank,
        )
        sharing.know(variational.parameters)
        refuse_rows_of_a_guide(variational, None, None, others=True)
        return replace(trainer, sharing=sharing)

    def watched(self, w: FitWishes) -> FitWishes:
        """Keywords by which all ranks know that steps are watched, if one of them watches."""
        is_watched = any(self.over.gathered(lambda: bool(w.callbacks)))
        return replace(w, callbacks=w.callbacks or (_nothing,)) if is_watched else w

    def batches(self, w: FitWishes, shared: Shards, args: tuple) -> tuple[FitWishes, int | None]:
        """Keywords for batches that stand for the rows of all ranks, and the batches in an epoch.

        Args:
            w: The keywords of the fit.
            shared: The rows of all ranks.
            args: The model's positional arguments, or a loader of them.

        Raises:
            UsageError: If ranks would take different numbers of steps.
        """
        if w.num_data is not None:
            raise UsageError(
                message(
                    "fit",
                    f"num_data={w.num_data} was given together with process_group.",
                    "all rows are counted",
                    ["leave it out"],
                )
            )
        steps: int | None = None
        chunks = chunks_in(args)
        if chunks is not None:
            numbers = self.over.gathered(lambda: sum(1 for _ in chunks.read()))
            self.over.agree(
                {"the number of chunks": str(numbers[self.over.rank])},
                ("give all processes as many chunks: each is a batch",),
            )
        elif args and is_loader(args[0]):
            self.over.agree(
                {"the number of batches of the DataLoader": str(length_of(args[0]))},
                ("give all processes as many batches: DistributedSampler with one batch_size",),
            )
        elif w.batch_size is not None:
            own = -(-shared.own // w.batch_size)
            steps = self.over.max(lambda _: own)
            w = replace(w, batch_size=max(1, min(w.batch_size, shared.own)))
        return replace(w, num_data=shared.total), steps


_SAME = (
    *("max_steps", "tol", "num_restarts", "seed", "acceleration"),
    *("batch_size", "num_epochs", "num_data", "validation", "schedule"),
    *("checkpoint_every", "resume", "on_checkpoint_error"),
)


def _nothing(step: Any) -> None:
    """A callback where another rank has one."""


def _seed_of(seed: int | None) -> int:
    return int(torch.randint(2**31, ())) if seed is None else seed


def _rows_in_loader(loader: Any) -> int:
    rows = rows_of_pass(loader)
    if rows is None:
        raise UsageError(
            message(
                "fit",
                "the number of rows of the DataLoader is unknown.",
                "the rows of each process are weighed by their number",
                ["give it a dataset with a length and batch_size=, without a collate_fn"],
            )
        )
    return rows
