"""Why indexing failed: floats, one integer, a key, an index beyond the end."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from pyro_em.errors import DataError, Finding, sites_in_words
from pyro_em.graph.failing.blame import CodeLine
from pyro_em.graph.failing.failing_words import (
    dtype_in_words,
    is_site,
    name_of_tensor,
    place_in_words,
    where_it_is,
)

_FLOAT_COUNTS = ("Bernoulli", "Binomial", "BetaBinomial", "Poisson", "Geometric")


def of_index(
    error: Exception,
    text: str,
    place: CodeLine | None,
    latents: Mapping[str, str],
    values: Mapping[str, Tensor],
) -> Finding | None:
    """What to say of an error of indexing; None where the error is another one."""
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


def _indices(place: CodeLine | None) -> dict[str, Tensor]:
    return {} if place is None else place.indices


def _floats(
    place: CodeLine | None, latents: Mapping[str, str], values: Mapping[str, Tensor]
) -> Finding:
    """Floating point numbers as an index of a tensor."""
    used = {w: t for w, t in _indices(place).items() if t.is_floating_point()}
    at, why = place_in_words(place), "torch indexes with integers only"
    hot = [n for n, d in latents.items() if d.startswith("OneHotCategorical")]
    for words, tensor in used.items():
        where = name_of_tensor(tensor, values)
        own = where.partition("'")[2][:-1]
        if own in hot:
            return _one_hot([own], at)
        if own in latents:
            break
        if where.startswith("site "):
            what = f"its observed values are {dtype_in_words(tensor)} and are used as an index{at}."
        else:
            where = where or f"variable '{words}'"
            what = f"its values are {dtype_in_words(tensor)} and are used as an index{at}."
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
        if d in _FLOAT_COUNTS and (not used or any(is_site(n, t, values) for t in used.values()))
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
    place: CodeLine | None,
    container: Any,
    latents: Mapping[str, str],
    values: Mapping[str, Tensor],
) -> Finding:
    """A tensor where Python takes one integer: an item of a list, a range."""
    used, at = _indices(place), place_in_words(place)
    where = where_it_is(used, latents, values)
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
    key: Tensor, place: CodeLine | None, latents: Mapping[str, str], values: Mapping[str, Tensor]
) -> Finding:
    """A tensor as the key of a dict."""
    used = _indices(place) or {"z": key}
    words = next(iter(used))
    shown = "tensor" if not key.numel() else f"tensor of shape {tuple(key.shape)}"
    return Finding(
        where_it_is(used, latents, values),
        f"its value is used as the key of a dict{place_in_words(place)}.",
        f"a dict finds one key, and the value is a {shown}; two tensors are never the same key",
        (
            "make the dict a tensor, in the order of the values: "
            f"torch.stack([table[0], table[1]])[{words}] (torch.tensor([...]) for numbers)",
        ),
    )


def _beyond(
    text: str, place: CodeLine | None, latents: Mapping[str, str], values: Mapping[str, Tensor]
) -> Finding | None:
    """An index that is larger than the tensor."""
    said = re.search(r"index (-?\d+) is out of bounds for dimension (\d+) with size (\d+)", text)
    if place is None or said is None:
        return None
    index, dim, size = (int(n) for n in said.groups())
    at = place_in_words(place)
    for words, tensor in _indices(place).items():
        if tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = int(tensor.min()), int(tensor.max())
        if not low <= index <= high:
            continue
        of_latent = words in latents and not name_of_tensor(tensor, values)
        where = (
            f"site '{words}'"
            if of_latent
            else name_of_tensor(tensor, values) or f"variable '{words}'"
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
