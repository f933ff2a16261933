"""Why a value could not be used: a branch, a Python number, a scale, a constraint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import Finding
from pyro_em.graph.failing.blame import CodeLine, local_of_raiser
from pyro_em.graph.failing.failing_words import are_given, place_in_words, where_it_is


@dataclass(frozen=True)
class _Complaint:
    """What to say of a tensor of many values where one value is wanted."""

    what: str
    why: str
    fixes: tuple[str, ...]


_BRANCH_ON_A_TENSOR = _Complaint(
    "the model branches on a tensor of many values",
    "a tensor of many values has no single answer",
    ("say what is meant: .any() or .all()", "choose per element: torch.where"),
)
_BRANCH_ON_A_LATENT = _Complaint(
    "the model branches on a random value (`if z:`)",
    "a latent's value is a tensor of many values, so that a branch has no single answer",
    (
        "index a parameter: p[z.long()], or torch.stack([b, a])[z.long()] (closed form)",
        "use torch.where(z.bool(), a, b) (a gradient update)",
    ),
)
_NUMBER_OF_A_TENSOR = _Complaint(
    "the model turns a tensor of many values into one Python number",
    ".item(), int() and float() take a tensor with one value",
    ("keep it a tensor", "say which number is meant: .sum(), .max(), x[0]"),
)
_NUMBER_OF_A_LATENT = _Complaint(
    "the model turns a random value into a Python number (.item(), int(), float())",
    "a latent's value is a tensor of many values",
    ("keep it a tensor and index or broadcast with it",),
)


def of_branch(
    text: str, place: CodeLine | None, latents: Mapping[str, str], values: Mapping[str, Tensor]
) -> Finding | None:
    """What to say of ``if`` on a tensor; None where the error is another one."""
    if "Boolean value of Tensor" not in text and "is ambiguous" not in text:
        return None
    return _of_one_value(_BRANCH_ON_A_TENSOR, _BRANCH_ON_A_LATENT, place, latents, values)


def of_number(
    text: str, place: CodeLine | None, latents: Mapping[str, str], values: Mapping[str, Tensor]
) -> Finding | None:
    """What to say of a tensor as a Python number; None where the error is another one."""
    if "converted to Scalar" not in text and "converted to Python scalars" not in text:
        return None
    return _of_one_value(_NUMBER_OF_A_TENSOR, _NUMBER_OF_A_LATENT, place, latents, values)


def _of_one_value(
    of_tensor: _Complaint,
    of_latent: _Complaint,
    place: CodeLine | None,
    latents: Mapping[str, str],
    values: Mapping[str, Tensor],
) -> Finding:
    """The complaint that fits what was used: a latent, or a tensor that the user gave."""
    used = {} if place is None else place.arguments
    is_given = not latents or are_given(used, latents, values)
    complaint = of_tensor if is_given else of_latent
    return Finding(
        where_it_is(used, {} if is_given else latents, values),
        f"{complaint.what}{place_in_words(place)}.",
        complaint.why,
        complaint.fixes,
    )


def of_scale(error: Exception, place: CodeLine | None) -> Finding:
    """What to say of a scale that is not positive."""
    held = local_of_raiser(error, "scale")
    scale = torch.as_tensor(held["scale"]) if held is not None else torch.zeros(())
    bad = ~(scale > 0)
    count, total = int(bad.sum()), scale.numel()
    zero = bool((scale[bad] == 0).all())
    kind = "zero" if zero else "NaN" if bool(scale[bad].isnan().all()) else "not positive"
    many = (
        f"{count} of its {total} numbers {'is' if count == 1 else 'are'}"
        if scale.dim()
        else "it is"
    )
    return Finding(
        "poutine.scale",
        f"{many} {kind}{place_in_words(place)}.",
        "a scale counts observations: Pyro needs scale > 0, and what does not count is masked",
        (
            "leave rows of weight zero out by mask(w > 0): with poutine.mask(mask=w > 0), "
            "poutine.scale(scale=torch.where(w > 0, w, torch.ones_like(w))): ...",
            "drop those rows from the data",
        ),
    )


def of_validation(error: Exception, place: CodeLine | None) -> Finding | None:
    """An argument outside its constraint, without the numbers that are inside."""
    held = local_of_raiser(error, "param", "constraint", "value", "self")
    if held is None or not isinstance(held["value"], Tensor):
        return None
    value, constraint = held["value"].detach(), held["constraint"]
    outside = ~constraint.check(value)
    count, total = int(outside.sum()), outside.numel()
    if not count:
        return None
    first = tuple(int(i) for i in outside.nonzero()[0]) if outside.dim() else ()
    shown = " ".join(str(value[first]).removeprefix("tensor").strip("()").split())
    shown = shown.partition(", grad_fn")[0].partition(", dtype")[0]
    many = "" if total == 1 else f"{count} of {total}, the first at index {first}: "
    said = str(error).split("\n")[0].removesuffix(":")
    fixes = ["look at what it is computed from"]
    if bool(value[outside].isnan().any()):
        fixes.insert(0, "look for NaN in the data, for a logarithm or a square root of a negative")
    elif str(constraint).startswith(("GreaterThan", "Positive", "Interval", "Simplex", "Lower")):
        fixes.insert(
            0, f"give parameters a constraint: pyro.param(..., constraint={_named(constraint)})"
        )
    return Finding(
        "model",
        f"running it plainly fails with {type(error).__name__}: {said}: {many}{shown[:120]}"
        f"{place_in_words(place)}",
        "the model itself raises, inside this library as outside",
        tuple(fixes),
    )


def _named(constraint: Any) -> str:
    name = str(constraint)
    if name.startswith("GreaterThan"):
        return "constraints.positive"
    if name.startswith("Interval"):
        return "constraints.unit_interval"
    if name.startswith("Simplex"):
        return "constraints.simplex"
    if name.startswith("PositiveDefinite"):
        return "constraints.positive_definite"
    return "constraints.lower_cholesky"
