"""A model run with its latents enumerated, and what is said where that fails."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyro_em.errors import Finding, ModelError, PyroEMError, as_error, message
from pyro_em.graph.failing.blame import given_tensors
from pyro_em.graph.failing.failures import needs_more_dimensions, on_failure, too_many_dimensions
from pyro_em.graph.many_rows.slices import Slices
from pyro_em.graph.structure import Structure
from pyro_em.tracing.allocation import is_shadow
from pyro_em.tracing.loops import vectorizing
from pyro_em.tracing.operations import OutputTooLarge
from pyro_em.tracing.runs import Model, Run, enumerated_run, is_of_shadows, is_of_validation
from pyro_em.tracing.sites import tensors_of


def check_arguments(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    structure: Structure,
    limit: int,
    *,
    may_part: bool = True,
) -> None:
    """Let every distribution check its arguments, for all values of the latents.

    This is a run of its own: a check reads arguments that are derived lazily, and a graph follows
    those that the user gave.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: What `examine` found, ``unchecked``.
        limit: Stop when an operation inside the model makes more cells.
        may_part: Whether large data may be looked at some rows at a time.

    Raises:
        ModelError: If an argument is outside its constraint, or the model cannot be enumerated.
    """
    slices = Slices.of(args, kwargs, structure) if may_part else None
    if slices is not None:
        try:
            for rows in slices:
                own, part = slices.at(rows)
                check_arguments(model, own, kwargs, part, limit, may_part=False)
            return
        except (PyroEMError, RuntimeError, ValueError, IndexError):
            pass  # what is wrong is said of all rows
    try:
        run = run_enumerated(model, args, kwargs, structure, limit=limit, validated=True)
        sites = [run.sites[n] for n in structure.as_run.sites if n in run.sites]
        shadowed = any(is_shadow(t) for s in sites for t in tensors_of(s["fn"]))
    except ModelError as error:
        shadowed = is_of_shadows(error.__cause__)
        if not shadowed:
            raise
    if shadowed:
        raise ModelError(
            message(
                "model",
                "it keeps a tensor that it made of a latent's value from one run to the next.",
                "a latent has other values in every run, and large data are first looked at with "
                "no values at all",
                ["make the tensor anew in every run", "make it outside the model"],
            )
        )


def run_enumerated(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    structure: Structure,
    *,
    limit: int | None,
    **how: Any,
) -> Run:
    """Run a model with its latents enumerated, and with its loops over index tensors if they can.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: What `examine` found.
        limit: Stop when an operation inside the model makes more cells.
        **how: Further keywords of the run.

    Raises:
        ModelError: If it fails.
    """
    if structure.series is not None:
        with vectorizing(structure.series.series()):
            return run_enumerated(model, args, kwargs, structure.as_run, limit=limit, **how)
    try:
        return enumerated_run(
            model,
            args,
            kwargs,
            latents=frozenset(structure.latents),
            max_plate_nesting=structure.max_plate_nesting,
            kept=structure.kept_values,
            clamped=frozenset(structure.clamped),
            limit=limit,
            **how,
        )
    except OutputTooLarge as error:
        found = Finding(
            "model",
            f"with its latents enumerated, one operation makes {error.cells:,} cells; the "
            f"budget is max_enumeration={limit:,}.",
            "a value inside the model combines too many latents",
            ("raise max_enumeration", "let each factor depend on fewer latents"),
            latents=tuple(structure.latents),
        )
        raise as_error([found]) from None
    except Exception as error:
        if needs_more_dimensions(error):
            raise as_error([more_than_torch_has(structure)]) from error
        latents = {n: structure.sites[n].distribution for n in structure.latents}
        # An argument outside its constraint is outside without enumeration too.
        checked = bool(how.get("validated")) and is_of_validation(error)
        given = given_tensors(model, args, kwargs)
        found = on_failure(error, latents, enumerated=not checked, values=given)
        if not checked:  # it runs with one value of each latent, and not with all of them
            found = replace(found, latents=tuple(structure.latents))
        raise as_error([found]) from error


def more_than_torch_has(structure: Structure) -> Finding:
    """Too many latents; whether they are rows or the steps of a chain decides what to do."""
    latents = set(structure.latents)
    chained = any(len(latents.intersection(structure.sites[n].scope)) > 1 for n in latents)
    loops = [p for n in structure.latents for p in structure.sites[n].nested]
    loop = next((p for p in loops if p in structure.sequential), None)
    plate = None if loop is None else f'pyro.plate("{loop}", {structure.sequential[loop]})'
    return too_many_dimensions(list(structure.latents), plate, chained)
