"""What to say when a model raises: from torch's and Pyro's words to the place and the remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pyro_em._errors import Problem

TOO_MANY_DIMENSIONS = (
    "write a chain as: for t in pyro.markov(range(T)): ...",
    "write a tree with nested `with pyro.markov():` scopes",
    "put independent latents into a pyro.plate",
)


def sites_in_words(names: list[str]) -> str:
    """``site 'z'`` or ``sites 'a', 'b', …`` for a message's beginning."""
    shown = ", ".join(f"'{n}'" for n in names[:5]) + (", …" if len(names) > 5 else "")
    if not names:
        return "model"
    return f"site {shown}" if len(names) == 1 else f"sites {shown}"


def on_failure(error: Exception, latents: Mapping[str, str], *, enumerated: bool) -> Problem:
    """A finding for an exception that a model raised.

    Args:
        error: The exception.
        latents: Names and distributions of the latents that had been sampled.
        enumerated: Whether the latents had all their values at once.
    """
    text = str(error)
    where = sites_in_words(list(latents))
    floats = [n for n, d in latents.items() if d in ("Bernoulli", "Binomial", "BetaBinomial")]
    if "tensors used as indices" in text or "only integer tensors" in text:
        if floats:
            return Problem(
                sites_in_words(floats),
                "its value is used as an index, but Bernoulli and Binomial values are floats.",
                "torch indexes with integers only",
                ("index with z.long()",),
            )
        return Problem(
            where,
            "its value is used as an index of a Python list.",
            "a list takes one integer, an enumerated value is a tensor of all of them",
            ("make the list a tensor: torch.stack([a, b])[z]",),
        )
    if "Boolean value of Tensor" in text or "is ambiguous" in text:
        return Problem(
            where,
            "the model branches on a random value (`if z:`).",
            "a latent's value is a tensor of many values, so that a branch has no single answer",
            (
                "index a parameter: p[z.long()], or torch.stack([b, a])[z.long()] (closed form)",
                "use torch.where(z.bool(), a, b) (a gradient update)",
            ),
        )
    if "converted to Scalar" in text or "converted to Python scalars" in text:
        return Problem(
            where,
            "the model turns a random value into a Python number (.item(), int(), float()).",
            "a latent's value is a tensor of many values",
            ("keep it a tensor and index or broadcast with it",),
        )
    if "64 dim" in text or "too many dimensions" in text.lower():
        return too_many_dimensions(list(latents))
    if enumerated:
        return Problem(
            where,
            f"the model fails when its latents are enumerated: {type(error).__name__}: {text}",
            "an enumerated value has extra dimensions on the left, one per latent",
            (
                "index with the latent from the left, ... for the rest: Vindex(A)[..., z, :]",
                "do not reshape, concatenate or loop over a latent's value",
            ),
        )
    if "unexpected keyword argument" in text or "positional argument" in text:
        return Problem(
            "model",
            f"it cannot be called with these arguments: {text}",
            "arguments that are no keyword of the method go to the model",
            ("compare them with the model's signature",),
        )
    fixes: tuple[str, ...] = ()
    if "Shape mismatch inside plate" in text or "must match the size" in text:
        fixes = (
            "make the plate's size that of the data's dimension",
            "use .to_event(1) if a dimension holds the features of one observation",
        )
    elif "floating point" in text and "require gradients" in text:
        fixes = ("give parameters a floating point value: pyro.param(name, x.float())",)
    return Problem(
        "model",
        f"running it plainly fails with {type(error).__name__}: {text}",
        "the model itself raises, inside this library as outside",
        fixes,
    )


def too_many_dimensions(latents: list[str]) -> Problem:
    """More enumerated sites than torch has dimensions."""
    return Problem(
        sites_in_words(latents),
        f"{len(latents)} enumerated sites need more dimensions than torch's 64.",
        "outside pyro.markov every enumerated site keeps its dimension for good",
        TOO_MANY_DIMENSIONS,
        latents=tuple(latents),
    )


def changing_sites(names: Sequence[str], random_plates: Sequence[str]) -> Problem:
    """A finding for a model whose sites differ from run to run.

    Args:
        names: The sites that differ, where known.
        random_plates: Plates that draw a random subsample.
    """
    which = ": " + ", ".join(f"'{n}'" for n in names[:4]) if names else ""
    if random_plates:
        plates = ", ".join(f"'{p}'" for p in random_plates)
        return Problem(
            f"plate {plates}",
            f"it draws a random subsample, and the model's sites differ from draw to draw{which}.",
            "the sums are laid out once for all draws",
            (
                "give every draw the same sites: pad to one length, and mask",
                "leave subsample_size out; for batches use fit(..., batch_size=)",
            ),
        )
    return Problem(
        "model",
        f"its sites differ from run to run{which}.",
        "an exact posterior needs the same sites whatever the latents' values are",
        ("use torch.where or indexing instead of Python branches on random values",),
    )
