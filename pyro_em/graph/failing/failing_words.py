"""Words for what a failing expression has read: tensors by the names of sites and arguments."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pyro_em.errors import sites_in_words
from pyro_em.graph.failing.blame import CodeLine, same_tensor

# What NaN becomes where it is made an integer: x.long(), x.int().
CONVERTED_NAN = (-(2**63), -(2**31))

NAN_CONVERTED = (
    "NaN became this integer (.long(), .int()): a missing value is no longer known as one"
)


# Why, and what to do, where a mask of coordinates is given as one of events.
OF_COORDINATES = (
    "an obs_mask or a poutine.mask has one entry per event; coordinates of an event have masks of "
    "their own",
    (
        "let NaN say what is missing: ExactPosteriorEM(model, missing='nan'), obs=x",
        "mask below the event: fn.mask(seen).to_event(1), obs=torch.where(seen, x, 0.0)",
        "put the coordinates into a pyro.plate of their own, and leave .to_event out",
    ),
)


def place_in_words(place: CodeLine | None) -> str:
    """Where it was, in brackets; empty where that is unknown."""
    return "" if place is None else f" ({place})"


def dtype_in_words(tensor: Tensor) -> str:
    """The kind of numbers of a tensor of floats."""
    return f"floats ({str(tensor.dtype).removeprefix('torch.')})"


def name_of_tensor(tensor: Tensor, values: Mapping[str, Tensor]) -> str:
    """A tensor's name in words, a site's before an argument's; empty where it has none."""
    names = [where for where, value in values.items() if same_tensor(tensor, value)]
    return next((n for n in names if n.startswith("site ")), names[0] if names else "")


def is_site(name: str, tensor: Tensor, values: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is the value of a site."""
    value = values.get(f"site '{name}'")
    return value is not None and same_tensor(tensor, value)


def where_it_is(
    used: Mapping[str, Tensor], latents: Mapping[str, str], values: Mapping[str, Tensor]
) -> str:
    """The latents that an expression reads; the tensors that it reads otherwise."""
    names = [n for t in used.values() if (n := name_of_tensor(t, values))]
    sites = [n for n in names if n.startswith("site ")]
    if sites or (names and not latents):
        return (sites or names)[0]
    return sites_in_words(list(latents))


def are_given(
    used: Mapping[str, Tensor], latents: Mapping[str, str], values: Mapping[str, Tensor]
) -> bool:
    """Whether all tensors that an expression reads are the user's own, none a latent's value."""
    names = [name_of_tensor(t, values) for t in used.values()]
    own = {f"site '{n}'" for n in latents}
    return bool(names) and all(n and n not in own for n in names)
