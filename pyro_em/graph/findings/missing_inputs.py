"""With ``missing="nan"``: NaN in what densities read as input, which is never filled.

A value that is observed may be missing, since its distribution says what it could have been. A
covariate, a lagged value, an exposure or a weight has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_em.distributions import element_mask, unwrap
from pyro_em.errors import DataError, Finding
from pyro_em.tracing.handlers import SampleMessenger
from pyro_em.tracing.lean import nothing
from pyro_em.tracing.missing import LAGGED
from pyro_em.tracing.runs import Model
from pyro_em.tracing.sites import is_factor
from pyro_em.tracing.whole import LeftWhole


def input_problems(site: Mapping[str, Any]) -> list[Finding]:
    """NaN in the arguments and in the scale of a site, where it counts.

    Args:
        site: The site, before or after its run.
    """
    name, fn = site["name"], site["fn"]
    if not isinstance(fn, Distribution):
        return []
    held = [(f"argument '{a}'", t, True) for a, t in _arguments(unwrap(fn)[0])]
    held.append(("poutine.scale", site["scale"], False))
    out = []
    for what, tensor, is_argument in held:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.is_meta:
            continue
        plain = getattr(tensor, "_t", tensor).detach()
        # Where the sum is a number so are all, and no tensor of their size is made.
        if not bool(torch.isnan(plain.sum())):
            continue
        bad = torch.isnan(plain)
        if not bool(bad.any()) or (is_argument and not _counts(site, bad)):
            continue
        count = int(bad.sum())
        first = tuple(int(i) for i in bad.nonzero()[0])
        shown = f", the first at index {first}" if first else ""
        out.append(
            Finding(
                f"site '{name.removesuffix('_observed')}', {what}",
                f"{count} of {bad.numel()} numbers {'is' if count == 1 else 'are'} NaN{shown}.",
                "missing='nan' integrates over values that are observed; what a density reads as input "
                "(covariates, lagged values, exposures, weights) has no distribution to do so, and is "
                "never filled",
                (
                    "give what is missing a distribution: pyro.sample('covariate', ..., obs=x)",
                    *((LAGGED,) if what == "argument 'loc'" else ()),
                    "impute it before, or drop the rows that hold it",
                ),
                DataError,
                row=_row_of(site, what, tensor, first),
            )
        )
    return out


def _row_of(
    site: Mapping[str, Any], what: str, tensor: Tensor, index: tuple[int, ...]
) -> int | None:
    """The element of the outermost vectorised plate that an entry of an argument is in."""
    frame = next((f for f in site["cond_indep_stack"] if f.dim is not None), None)
    if frame is None:
        return None
    base, reinterpreted, _ = unwrap(site["fn"])
    constraint = getattr(base, "arg_constraints", {}).get(what.partition("'")[2][:-1])
    of_event = getattr(constraint, "event_dim", 0) + (
        0 if what == "poutine.scale" else reinterpreted
    )
    place = tensor.dim() - of_event + frame.dim
    return index[place] if place >= 0 and tensor.shape[place] == frame.size else None


def _arguments(fn: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that an unwrapped distribution was given, by name."""
    declared = getattr(fn, "arg_constraints", {})
    for name, value in vars(fn).items():
        if isinstance(value, Tensor) and name in declared:
            yield name, value
        elif isinstance(value, Distribution):
            yield from _arguments(unwrap(value)[0])


def _counts(site: Mapping[str, Any], bad: Tensor) -> bool:
    """Whether an argument that is NaN is read where the site is not masked."""
    mask = element_mask(site["fn"], site["mask"])
    if mask is False:
        return False
    if not isinstance(mask, Tensor):
        return True
    extra = bad.dim() - mask.dim()
    try:
        rows = bad.flatten(-extra).any(-1) if extra > 0 else bad
        return bool((rows & mask).any())
    except RuntimeError:
        return True


class _NoteInputs(SampleMessenger):
    """Collect findings about inputs before anything is drawn from them."""

    _postprocess_message = nothing

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[Finding] = []

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if is_factor(msg):
            self.problems += input_problems(msg)


def inputs_that_failed(model: Model, args: tuple, kwargs: dict[str, Any]) -> list[Finding]:
    """The sites that read NaN in a model that raised for it; distributions check nothing here."""
    notes = _NoteInputs()
    try:
        with (
            LeftWhole(random_state=True),
            torch.no_grad(),
            pyro.validation_enabled(False),
            notes,
        ):
            model(*args, **kwargs)
    except Exception:  # it raised before
        pass
    return notes.problems
