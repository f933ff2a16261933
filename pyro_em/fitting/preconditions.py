"""What cannot be fitted, and why: no data or parameters, random subsamples, loaders, guides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyro.infer.autoguide import AutoGuide

from pyro_em.errors import UsageError, message
from pyro_em.graph.unregistered import Unregistered
from pyro_em.plan.program import Program
from pyro_em.sources.chunks import Chunks
from pyro_em.tracing.runs import is_being_traced
from pyro_em.tracing.sites import Role
from pyro_em.updates.update import LeastSquares, Newton, Update
from pyro_em.variational.amortized import AutoAmortizedCategorical, AutoAmortizedNormal
from pyro_em.variational.batches import Batches, is_loader, rows_in_batches
from pyro_em.variational.bound import Variational
from pyro_em.variational.trainer import Trainer


def refuse_unfittable(program: Program, has_guide: bool = False) -> None:
    """Refuse an exact fit that has nothing to learn from, nothing to learn, or not all data.

    Args:
        program: The model with its data.
        has_guide: Whether there is a guide that could draw the latents.

    Raises:
        UsageError: With the reason.
    """
    if not any(g.role is Role.DATA for g in program.graph.groups):
        raise UsageError(
            message(
                "ExactPosteriorEM",
                "the model has no observation.",
                "its evidence is constant, so that there is nothing to learn from",
                ["pass data to pyro.sample(..., obs=...)", "check that data is not None"],
            )
        )
    if not program.graph.parameters:
        raise UsageError(
            message(
                "ExactPosteriorEM",
                "the model has no parameters.",
                "EM maximises the evidence over parameters",
                [
                    *_networks(program.structure.unregistered),
                    "declare what is to be learned with pyro.param or PyroParam",
                    "call em.posterior(...) if only the latents are of interest",
                    *(["let a guide draw the latents: strategy='guide'"] if has_guide else []),
                ],
            )
        )
    if program.structure.random_plates:
        names = ", ".join(f"'{n}'" for n in program.structure.random_plates)
        raise UsageError(
            message(
                f"plate {names}",
                "it draws a random subsample.",
                "an exact step needs all data; its bound would change from step to step",
                ["leave subsample_size out"],
            )
        )


def _networks(unregistered: Sequence[Unregistered]) -> list[str]:
    """The remedy where a density depends on tensors that are not registered."""
    if not unregistered:
        return []
    name_of_parameter = next((u.name for u in unregistered if u.name), "")
    name = name_of_parameter.rpartition(".")[0] or "net"
    return [
        f"register the network that site '{unregistered[0].site}' depends on: "
        f"pyro.module('{name}', {name}) where the model begins, or make it a PyroModule"
    ]


def refuse_untrainable(variational: Variational, updates: Mapping[str, Update]) -> None:
    """Refuse stochastic steps without parameters, or with updates that need exact sums.

    Raises:
        UsageError: With the reason.
    """
    if not variational.parameters:
        raise UsageError(
            message(
                "ExactPosteriorEM",
                "neither the model nor the guide has parameters.",
                "there is nothing to fit",
                [
                    *_networks(variational.bare.unregistered),
                    "declare what is to be learned with pyro.param, or use an autoguide",
                ],
            )
        )
    for name, update in updates.items():
        if isinstance(update, (LeastSquares, Newton)):
            raise UsageError(
                message(
                    f"updates['{name}']",
                    f"{type(update).__name__} needs an exact fit; here the guide draws latents.",
                    fixes=["leave it out, or use ClosedForm(step_size=...)"],
                )
            )


def refuse_rows_of_a_guide(
    variational: Variational,
    batches: Batches | None,
    held_out: Batches | None,
    others: bool = False,
) -> None:
    """Refuse batches and held-out data where an autoguide has parameters for every row of the data.

    Args:
        variational: The pair of model and guide.
        batches: The data.
        held_out: Data that the bound is taken of, too.
        others: Whether other processes have other rows.

    Raises:
        UsageError: With the reason.
    """
    guide, bare, routing = variational.guide, variational.bare, variational.routing
    amortised = isinstance(guide, (AutoAmortizedNormal, AutoAmortizedCategorical))
    if amortised or not isinstance(guide, AutoGuide) or guide.create_plates is not None:
        return
    rows = None if batches is None else rows_in_batches(batches)
    # Sites that are left unused are drawn as well, with all others of the guide.
    unused = [n for n in routing.gaussian if n in routing.unused]
    for name in (*routing.drawn, *routing.points, *unused):
        info = bare.sites.get(name)
        if info is None:
            continue
        sizes = {bare.plates[p].size for p in info.plates if p in bare.plates}
        data_plate = next((p for p in info.plates if p in bare.data_plates), None)
        if rows is not None and rows in sizes:
            size, what = rows, "a batch"
            in_loader = batches is not None and batches.loader is not None
            leave = "pass the data themselves" if in_loader else "leave batch_size out"
        elif (held_out is not None or others) and data_plate is not None:
            size, what = bare.plates[data_plate].size, "other data"
            leave = "fit in one process" if others else "leave validation out"
            what = "another process" if others else what
        else:
            continue
        kind = type(guide).__name__
        aside = ""
        if name in unused:
            aside = (
                f"leave '{name}' out of the guide, which is not asked for it: "
                f"lambda model: {kind}(poutine.block(model, hide=['{name}']))"
            )
        raise UsageError(
            message(
                f"guide ({kind})",
                f"it has parameters of its own for each of the {size} rows of '{name}', so that "
                f"{what} does not fit it.",
                "its plates are those of the first call",
                [
                    *filter(None, [aside]),
                    "let a network serve all rows: AutoAmortizedNormal",
                    leave,
                    f"give it plates that draw batches: {kind}(model, create_plates=...)",
                ],
            )
        )


def refuse_inside_a_model() -> None:
    """Refuse to run a model inside another one whose sites are being recorded.

    Raises:
        UsageError: With the ways out.
    """
    if is_being_traced():
        raise UsageError(
            message(
                "ExactPosteriorEM",
                "it was called inside a model that is being run.",
                "its sites would be recorded as sites of the model around it",
                [
                    "call it before, and pass its result as an argument of the model",
                    "hide it from the model around it: with pyro.poutine.block(): ...",
                ],
            )
        )


def refuse_a_loader(args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Refuse a DataLoader, or Chunks, where the data of one call are wanted.

    Raises:
        UsageError: With the ways out.
    """
    if any(isinstance(a, Chunks) for a in (*args, *kwargs.values())):
        raise UsageError(
            message(
                "arguments",
                "Chunks were given.",
                "fit, score, elbo, evaluate_loss, posterior and predictive go through chunks, and take "
                "them as their first argument",
                ["pass arrays that fit into memory, for instance those of one chunk"],
            )
        )
    if any(is_loader(a) for a in (*args, *kwargs.values())):
        raise UsageError(
            message(
                "arguments",
                "a DataLoader was given.",
                "only fit goes through batches, and takes the loader as its first argument",
                ["pass one batch: next(iter(loader))", "pass the data themselves"],
            )
        )


_SUMMED = (
    "it works on a posterior that is summed",
    ["use step or fit", "use guide='map' for continuous latents"],
)


def refuse_a_guide(
    found: Program | Trainer | Variational,
    method: str,
    why_and_fixes: tuple[str, list[str]] = _SUMMED,
) -> Program:
    """The exact program; refuse a pair whose guide draws.

    Args:
        found: What the model is.
        method: What was called.
        why_and_fixes: Why it needs a posterior that is summed, and what to do instead.

    Raises:
        UsageError: If the guide draws latents.
    """
    if isinstance(found, Program):
        return found
    raise UsageError(
        message(
            method,
            "the guide draws latents of this model.",
            *why_and_fixes,
        )
    )
