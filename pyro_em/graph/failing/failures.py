"""What to say when a model raises: from torch's and Pyro's words to the place and the remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_em.errors import DataError, Finding, sites_in_words
from pyro_em.graph.failing.blame import CodeLine, place_of
from pyro_em.graph.failing.failing_index import of_index
from pyro_em.graph.failing.failing_values import of_branch, of_number, of_scale, of_validation
from pyro_em.graph.failing.failing_words import (
    CONVERTED_NAN,
    NAN_CONVERTED,
    OF_COORDINATES,
    place_in_words,
)
from pyro_em.tracing.capture import NoTensor
from pyro_em.tracing.runs import is_of_validation

MANY_STEPS = "write a chain as: for t in pyro.markov(range(T)): ..."

MANY_ROWS = "put independent latents into a pyro.plate"

TREES = "write a tree with nested `with pyro.markov():` scopes"

_LONG = 400  # characters of a foreign message that are shown


def on_failure(
    error: Exception,
    latents: Mapping[str, str],
    *,
    enumerated: bool,
    values: Mapping[str, Tensor] | None = None,
) -> Finding:
    """A finding for an exception that a model raised.

    Args:
        error: The exception.
        latents: Names and distributions of the latents that had been sampled.
        enumerated: Whether the latents had all their values at once.
        values: The tensors that the model was given or drew, by name in words.
    """
    if isinstance(error, NoTensor):
        return _no_tensor(error)
    place, text = place_of(error), _own_words(error)
    known = values or {}
    if any(f"index {n} is out of" in text for n in CONVERTED_NAN):
        return Finding(
            "model",
            f"running it plainly fails with {type(error).__name__}: {text}{place_in_words(place)}",
            NAN_CONVERTED,
            (
                "an index is input of a density, which is never filled: drop the rows that hold NaN",
                "make it a site of its own with obs_mask: what is missing is then a latent",
            ),
            DataError,
        )
    found = (
        of_index(error, text, place, latents, known)
        or of_branch(text, place, latents, known)
        or of_number(text, place, latents, known)
    )
    if found is not None:
        return found
    if any(words in text for words in ("the same dtype", "expected scalar type")):
        return of_dtypes(text, place, known)
    if needs_more_dimensions(error):
        return too_many_dimensions(list(latents))
    if text.startswith("Expected scale > 0"):
        return of_scale(error, place)
    at = place_in_words(place)
    if text.startswith("shape mismatch") and ".mask(" in at:
        return Finding(
            "model",
            f"a mask does not fit the distribution that it masks: {text}{at}",
            "a mask below .to_event has one entry per element of an event, one above it has one per "
            "event",
            (
                "a mask of whole rows goes outside: .to_event(1).mask(rows)",
                "a mask of cells has the shape of the data, or broadcasts to it: "
                ".mask(cells).to_event(1)",
            ),
        )
    if text.startswith("Invalid obs_mask shape"):
        return Finding("model", f"an obs_mask does not fit its site: {text}{at}", *OF_COORDINATES)
    if enumerated:
        return Finding(
            sites_in_words(list(latents)),
            f"the model fails when its latents are enumerated: {type(error).__name__}: {text}{at}",
            "an enumerated value has extra dimensions on the left, one per latent",
            (
                "index with the latent from the left, ... for the rest: Vindex(A)[..., z, :]",
                "do not reshape, concatenate or loop over a latent's value",
            ),
        )
    if "unexpected keyword argument" in text or "positional argument" in text:
        return Finding(
            "model",
            f"it cannot be called with these arguments: {text}{at}",
            "arguments that are no keyword of the method go to the model",
            ("compare them with the model's signature",),
        )
    if is_of_validation(error):
        checked = of_validation(error, place)
        if checked is not None:
            return checked
    return Finding(
        "model",
        f"running it plainly fails with {type(error).__name__}: {text}{at}",
        "the model itself raises, inside this library as outside",
        _remedies(text),
    )


def of_dtypes(text: str, place: CodeLine | None, values: Mapping[str, Tensor]) -> Finding:
    """A product of float32 with float64, say: parameters of one kind, data of the other."""
    own = [f"{where} is {str(t.dtype).removeprefix('torch.')}" for where, t in values.items()]
    return Finding(
        "model",
        f"tensors of two kinds of numbers are multiplied: {text}{place_in_words(place)}",
        "torch multiplies matrices of one dtype; data and parameters have to have the same"
        + (f": {', '.join(own[:6])}" if own else ""),
        (
            "make the parameters as the data are, in the model: pyro.param('b', x.new_zeros(2))",
            "pass data as the parameters are: x.float() of a tensor, x.astype('float32') of an array",
        ),
    )


def needs_more_dimensions(error: Exception) -> bool:
    """Whether an operation needed more dimensions than torch has."""
    return "64 dim" in str(error) or "too many dimensions" in str(error).lower()


def is_about_numbers(error: Exception) -> bool:
    """Whether an exception may come from NaN or infinite numbers."""
    text = str(error)
    return (
        isinstance(error, torch.linalg.LinAlgError)
        or is_of_validation(error)
        or any(w in text.lower() for w in ("nan", "non-finite", "singular", "positive-definite"))
    )


def _own_words(error: Exception) -> str:
    """An exception's text without Pyro's table of shapes, and not longer than a reader reads."""
    text = str(error).partition("\nTrace Shapes:")[0].rstrip()
    return text if len(text) <= _LONG else text[: _LONG - 1].rstrip() + "…"


def _remedies(text: str) -> tuple[str, ...]:
    if "Shape mismatch inside plate" in text or "must match the size" in text:
        return (
            "make the plate's size that of the data's dimension",
            "use .to_event(1) if a dimension holds the features of one observation",
        )
    if "not implemented for 'Half'" in text or "not implemented for 'BFloat16'" in text:
        return ("use float32 or float64 for data and parameters: x.float()",)
    if "Multiple sample sites named" in text:
        return ("give each site a name of its own; in a loop f'z_{t}'",)
    if "floating point" in text and "require gradients" in text:
        return ("give parameters a floating point value: pyro.param(name, x.float())",)
    return ()


def _no_tensor(error: NoTensor) -> Finding:
    value, kind = error.value, type(error.value).__name__
    where = f"parameter '{error.name}'"
    if isinstance(value, Tensor):
        form, fix = "sparse", "pass value.to_dense()"
        if value.is_complex():
            form = "complex"
            fix = "use a parameter for the real part and one for the imaginary part"
        elif value.is_quantized:
            form, fix = "quantised", "pass value.dequantize()"
        what = f"its initial value is a {form} tensor."
        return Finding(where, what, "parameters are dense tensors of real numbers", (fix,))
    return Finding(
        where,
        f"its initial value is of type {kind}, not a tensor.",
        "pyro.param takes a tensor, or a function that returns one",
        (f"pyro.param('{error.name}', torch.as_tensor(value, dtype=torch.get_default_dtype()))",),
    )


def too_many_dimensions(latents: list[str], loop: str | None = None, chain: bool = True) -> Finding:
    """More enumerated sites than torch has dimensions.

    Args:
        latents: The sites.
        loop: A loop or a sequential plate that holds them, as its code may be written.
        chain: Whether latents depend on each other.
    """
    rows = (
        f"replace the loop by a vectorised plate, `with {loop}:`, one site for all rows"
        if loop
        else MANY_ROWS
    )
    fixes = (MANY_STEPS, TREES, rows) if chain else (rows, MANY_STEPS, TREES)
    return Finding(
        sites_in_words(latents),
        f"{len(latents)} enumerated sites need more dimensions than torch's 64.",
        "outside pyro.markov every enumerated site keeps its dimension for good",
        fixes,
        latents=tuple(latents),
    )


def changing_sites(names: Sequence[str], random_plates: Sequence[str]) -> Finding:
    """A finding for a model whose sites differ from run to run.

    Args:
        names: The sites that differ, where known.
        random_plates: Plates that draw a random subsample.
    """
    which = ": " + ", ".join(f"'{n}'" for n in names[:4]) if names else ""
    if random_plates:
        plates = ", ".join(f"'{p}'" for p in random_plates)
        return Finding(
            f"plate {plates}",
            f"it draws a random subsample, and the model's sites differ from draw to draw{which}.",
            "the sums are laid out once for all draws",
            (
                "give every draw the same sites: pad to one length, and mask",
                "leave subsample_size out; for batches use fit(..., batch_size=)",
            ),
        )
    return Finding(
        "model",
        f"its sites differ from run to run{which}.",
        "an exact posterior needs the same sites whatever the latents' values are",
        ("use torch.where or indexing instead of Python branches on random values",),
    )
