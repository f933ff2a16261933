"""A fit that processes of a group make together: what each of them has, and where they begin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from pyro_em.errors import UsageError, message
from pyro_em.fitting import shards
from pyro_em.fitting.parted import Parted
from pyro_em.fitting.preconditions import refuse_rows_of_a_guide
from pyro_em.fitting.shards import Shards
from pyro_em.plan.fit_wishes import FitWishes
from pyro_em.plan.part import Part
from pyro_em.plan.program import Program
from pyro_em.plan.request import Request
from pyro_em.reduction.over_group import OverGroup
from pyro_em.reduction.reduction import Whole
from pyro_em.sources.loaders import is_loader, length_of, rows_of_pass
from pyro_em.tracing.checkpoint import checksum
from pyro_em.variational.bound import Variational
from pyro_em.variational.sharing import Sharing
from pyro_em.variational.trainer import Trainer

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
        same["init"] = checksum({"init": w.init if isinstance(w.init, (str, dict)) else None})
        self.over.agree(
            {f"fit(..., {n}=)": v for n, v in same.items()},
            ("pass the same keywords on all processes",),
        )
        return w if self.over.rank == 0 else replace(w, progress=False)

    def arguments(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any], bool]:
        """The arguments of this process, and whether it has rows; see `shards.arguments`."""
        if args and is_loader(args[0]):
            self.over.agree({"whether data come in a DataLoader": "yes"})
            return args, kwargs, True
        self.over.agree({"whether data come in a DataLoader": "no"})
        return shards.arguments(self.over, self.request.model, args, kwargs)

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
        shards.agreed(over, model, looked, kwargs, size)
        over.agree(shards.plan_digest(seen), ("build the same model on all processes",))
        if given and is_loader(given[0]):
            size = _rows_in_loader(given[0])
        rows = tuple(over.gathered(lambda: size if has_rows else 0))
        out = Shards(over, plate, rows)
        over.place = out.place
        if has_rows:
            shards.refuse_parameters_of_rows(
                out, model, self.request.guide, looked, kwargs, parameters
            )
        shards.share_parameters(out, parameters)
        return out

    def parted(self, shared: Shards, program: Program) -> Parted:
        """The rows of all processes as the parts of an exact fit.

        Args:
            shared: The rows of all ranks.
            program: The model with this rank's rows.

        Raises:
            UsageError: If the model's rows are not independent.
        """
        part = Part(program, self.over.rank == shared.first, shared.begin, is_kept=True)
        over: OverGroup[Part] = self.over.with_parts(
            Whole(part), is_empty=shared.is_empty, first=shared.first
        )
        return Parted.of(over, part, HOW)

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
        if args and is_loader(args[0]):
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
