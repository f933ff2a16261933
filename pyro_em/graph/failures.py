"""What to say when a model raises: from torch's and Pyro's words to the place and the remedy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from pyro_em.errors import DataError, Finding, sites_in_words
from pyro_em.graph.blame import Place, local_of_raiser, place_of, same_tensor
from pyro_em.tracing.parameters import NoTensor
from pyro_em.tracing.runs import is_of_validation

MANY_STEPS = "write a chain as: for t in pyro.markov(range(T)): ..."


MANY_ROWS = "put independent latents into a pyro.plate"


TREES = "write a tree with nested `with pyro.markov():` scopes"


_FLOAT_COUNTS = ("Bernoulli", "Binomial", "BetaBinomial", "Poisson", "Geometric")


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
    found = (
        _of_index(error, text, place, latents, known)
        or _of_branch(text, place, latents, known)
        or _of_number(text, place, latents, known)
    )
    if found is not None:
        return found
    if needs_more_dimensions(error):
        return too_many_dimensions(list(latents))
    if text.startswith("Expected scale > 0"):
        return _of_scale(error, place)
    at = _at(place)
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
        checked = _of_validation(error, place)
        if checked is not None:
            return checked
    return Finding(
        "model",
        f"running it plainly fails with {type(error).__name__}: {text}{at}",
        "the model itself raises, inside this library as outside",
        _remedies(text),
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


def _at(place: Place | None) -> str:
    return "" if place is None else f" ({place})"


def _remedies(text: str) -> tuple[str, ...]:
    if "Shape mismatch inside plate" in text or "must match the size" in text:
        return (
            "make the plate's size that of the data's dimension",
            "use .to_event(1) if a dimension holds the features of one observation",
        )
    if "not implemented for 'Half'" in text or "not implemented for 'BFloat16'" in text:
        return ("use float32 or float64 for data and parameters: x.float()",)
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


def _of_index(
    error: Exception,
    text: str,
    place: Place | None,
    latents: Mapping[str, str],
    values: Mapping[str, Tensor],
) -> Finding | None:
    if isinstance(error, KeyError) and error.args and isinstance(error.args[0], Tensor):
        return _key(error.args[0], place, latents, values)
    if "is out of bounds for dimension" in text:
        return _beyond(text, place, latents, values)
    of_floats = (
        "tensors used as indices" in text
        or "arrays used as indices must be of integer" in text
        or ("indices" in text and "scalar types: Long, Int" in text)
        or "one_hot is only applicable to index tensor" in text
        or ("for index" in text and "int64" in text)
    )
    of_one = "only integer tensors" in text or "cannot be interpreted as an integer" in text
    if not of_floats and not of_one:
        return None
    container = None if place is None else place.container
    takes_tensors = isinstance(container, (Tensor, numpy.ndarray))
    if of_floats or takes_tensors:
        return _floats(place, latents, values)
    if "cannot be interpreted as an integer" in text and "'Tensor'" not in text:
        return None
    return _one_integer(place, container, latents, values)


def _indices(place: Place | None) -> dict[str, Tensor]:
    return {} if place is None else place.indices


def _floats(
    place: Place | None, latents: Mapping[str, str], values: Mapping[str, Tensor]
) -> Finding:
    """Floating point numbers as an index of a tensor."""
    used = {w: t for w, t in _indices(place).items() if t.is_floating_point()}
    at, why = _at(place), "torch indexes with integers only"
    hot = [n for n, d in latents.items() if d.startswith("OneHotCategorical")]
    for words, tensor in used.items():
        where = _name_of(tensor, values)
        own = where.partition("'")[2][:-1]
        if own in hot:
            return _one_hot([own], at)
        if own in latents:
            break
        if where.startswith("site "):
            what = f"its observed values are {_dtype(tensor)} and are used as an index{at}."
        else:
            where = where or f"variable '{words}'"
            what = f"its values are {_dtype(tensor)} and are used as an index{at}."
        return Finding(
            where,
            what,
            why,
            (
                f"index with {words}.long()",
                "pass whole numbers as integers: codes.long() before the fit",
            ),
        )
    named = [w for w in used if w] if used else []
    own_floats = [
        n
        for n, d in latents.items()
        if d in _FLOAT_COUNTS and (not used or any(_is_site(n, t, values) for t in used.values()))
    ] or [n for n, d in latents.items() if d in _FLOAT_COUNTS]
    if own_floats:
        return Finding(
            sites_in_words(own_floats),
            "its value is used as an index, but Bernoulli and Binomial values are floats"
            f"{at or ''}.",
            why,
            (f"index with {named[0] if len(named) == 1 else 'z'}.long()",),
        )
    if hot:
        return _one_hot(hot, at)
    return Finding(
        "model",
        f"a tensor of floating point numbers is used as an index{at}.",
        why,
        ("index with integers: codes.long()",),
    )


def _one_hot(names: list[str], at: str) -> Finding:
    return Finding(
        sites_in_words(names),
        f"its value is used as an index, but it is a vector of zeros and a one{at}.",
        "torch indexes with integers only",
        (
            "use dist.Categorical, and index with its value",
            "index with z.argmax(-1)",
        ),
    )


def _one_integer(
    place: Place | None,
    container: Any,
    latents: Mapping[str, str],
    values: Mapping[str, Tensor],
) -> Finding:
    """A tensor where Python takes one integer: an item of a list, a range."""
    used, at = _indices(place), _at(place)
    where = _where(used, latents, values)
    text = "" if place is None else place.text
    words = next(iter(used), "z")
    if isinstance(container, torch.nn.ModuleList):
        return Finding(
            where,
            f"its value is used as an index of a ModuleList{at}.",
            "the list takes one integer, and a latent's value is a tensor of all of them",
            (
                "run all networks, and choose among their outputs: "
                f"Vindex(torch.stack([net(x) for net in nets], -1))[..., torch.arange(N), {words}]",
            ),
        )
    if text.lstrip().startswith("range(") and container is None:
        return Finding(
            where,
            f"its value is used as the length of a loop{at}.",
            "range takes one integer, and a latent's value is a tensor of all of them",
            (
                f"loop over all steps, and mask those beyond it: poutine.mask(mask=step < {words})",
                "tabulate what the loop computes, and index the table with the value",
            ),
        )
    kind = type(container).__name__ if isinstance(container, (list, tuple)) else "list"
    return Finding(
        where,
        f"its value is used as an index of a Python {kind}{at}.",
        f"a {kind} takes one integer, an enumerated value is a tensor of all of them",
        (f"make the {kind} a tensor: torch.stack([a, b])[{words}]",),
    )


def _key(
    key: Tensor, place: Place | None, latents: Mapping[str, str], values: Mapping[str, Tensor]
) -> Finding:
    """A tensor as the key of a dict."""
    used = _indices(place) or {"z": key}
    words = next(iter(used))
    shown = "tensor" if not key.numel() else f"tensor of shape {tuple(key.shape)}"
    return Finding(
        _where(used, latents, values),
        f"its value is used as the key of a dict{_at(place)}.",
        f"a dict finds one key, and the value is a {shown}; two tensors are never the same key",
        (
            "make the dict a tensor, in the order of the values: "
            f"torch.stack([table[0], table[1]])[{words}] (torch.tensor([...]) for numbers)",
        ),
    )


def _beyond(
    text: str, place: Place | None, latents: Mapping[str, str], values: Mapping[str, Tensor]
) -> Finding | None:
    """An index that is larger than the tensor."""
    said = re.search(r"index (-?\d+) is out of bounds for dimension (\d+) with size (\d+)", text)
    if place is None or said is None:
        return None
    index, dim, size = (int(n) for n in said.groups())
    at = _at(place)
    for words, tensor in _indices(place).items():
        if tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = int(tensor.min()), int(tensor.max())
        if not low <= index <= high:
            continue
        of_latent = words in latents and not _name_of(tensor, values)
        where = (
            f"site '{words}'" if of_latent else _name_of(tensor, values) or f"variable '{words}'"
        )
        why = "indices begin at 0 and end below the size"
        if where.startswith("site ") and where.partition("'")[2][:-1] in latents:
            return Finding(
                where,
                f"its value {index} is beyond what it indexes: dimension {dim} has size {size}{at}.",
                why,
                (
                    "give the indexed parameter as many entries as the latent has values",
                    "give the latent's prior as many probabilities as the parameter has entries",
                ),
            )
        shift = (f"begin the codes at 0: {words} - 1",) if low >= 1 else ()
        return Finding(
            where,
            f"its values run from {low} to {high}, and dimension {dim} of what they index has size "
            f"{size}{at}.",
            why,
            (*shift, "give the indexed tensor an entry for each code"),
            DataError,
        )
    return None


def _of_branch(
    text: str, place: Place | None, latents: Mapping[str, str], values: Mapping[str, Tensor]
) -> Finding | None:
    if "Boolean value of Tensor" not in text and "is ambiguous" not in text:
        return None
    used = {} if place is None else place.arguments
    at = _at(place)
    if not latents or _are_given(used, latents, values):
        return Finding(
            _where(used, {}, values),
            f"the model branches on a tensor of many values{at}.",
            "a tensor of many values has no single answer",
            ("say what is meant: .any() or .all()", "choose per element: torch.where"),
        )
    return Finding(
        _where(used, latents, values),
        f"the model branches on a random value (`if z:`){at}.",
        "a latent's value is a tensor of many values, so that a branch has no single answer",
        (
            "index a parameter: p[z.long()], or torch.stack([b, a])[z.long()] (closed form)",
            "use torch.where(z.bool(), a, b) (a gradient update)",
        ),
    )


def _of_number(
    text: str, place: Place | None, latents: Mapping[str, str], values: Mapping[str, Tensor]
) -> Finding | None:
    if "converted to Scalar" not in text and "converted to Python scalars" not in text:
        return None
    used = {} if place is None else place.arguments
    at = _at(place)
    if not latents or _are_given(used, latents, values):
        return Finding(
            _where(used, {}, values),
            f"the model turns a tensor of many values into one Python number{at}.",
            ".item(), int() and float() take a tensor with one value",
            ("keep it a tensor", "say which number is meant: .sum(), .max(), x[0]"),
        )
    return Finding(
        _where(used, latents, values),
        f"the model turns a random value into a Python number (.item(), int(), float()){at}.",
        "a latent's value is a tensor of many values",
        ("keep it a tensor and index or broadcast with it",),
    )


def _of_scale(error: Exception, place: Place | None) -> Finding:
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
        f"{many} {kind}{_at(place)}.",
        "a scale counts observations: Pyro needs scale > 0, and what does not count is masked",
        (
            "leave rows of weight zero out by mask(w > 0): with poutine.mask(mask=w > 0), "
            "poutine.scale(scale=torch.where(w > 0, w, torch.ones_like(w))): ...",
            "drop those rows from the data",
        ),
    )


def _of_validation(error: Exception, place: Place | None) -> Finding | None:
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
        f"{_at(place)}",
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


def _dtype(tensor: Tensor) -> str:
    return f"floats ({str(tensor.dtype).removeprefix('torch.')})"


def _name_of(tensor: Tensor, values: Mapping[str, Tensor]) -> str:
    """A tensor's name in words, a site's before an argument's; empty where it has none."""
    names = [where for where, value in values.items() if same_tensor(tensor, value)]
    return next((n for n in names if n.startswith("site ")), names[0] if names else "")


def _is_site(name: str, tensor: Tensor, values: Mapping[str, Tensor]) -> bool:
    value = values.get(f"site '{name}'")
    return value is not None and same_tensor(tensor, value)


def _where(
    used: Mapping[str, Tensor], latents: Mapping[str, str], values: Mapping[str, Tensor]
) -> str:
    """The latents that an expression reads; the tensors that it reads otherwise."""
    names = [n for t in used.values() if (n := _name_of(t, values))]
    sites = [n for n in names if n.startswith("site ")]
    if sites or (names and not latents):
        return (sites or names)[0]
    return sites_in_words(list(latents))


def _are_given(
    used: Mapping[str, Tensor], latents: Mapping[str, str], values: Mapping[str, Tensor]
) -> bool:
    """Whether all tensors that an expression reads are the user's own, none a latent's value."""
    names = [_name_of(t, values) for t in used.values()]
    own = {f"site '{n}'" for n in latents}
    return bool(names) and all(n and n not in own for n in names)


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
