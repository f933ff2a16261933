"""What figures of latents take: tensors, or a posterior with the name or glob of what to draw."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pyro_em.arguments import shown
from pyro_em.errors import UsageError, message
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.posteriors.answers.protocol import AnyPosterior
from pyro_em.posteriors.answers.refusals import refuse_gaussian


def probs_of(where: str, source: Tensor | AnyPosterior, site: str | None) -> Tensor:
    """Probabilities as they are given, or of a site of a posterior.

    Args:
        where: The function that asks.
        source: Probabilities, or a posterior.
        site: The latent, or a glob of latents.

    Raises:
        UsageError: If the source is neither, or the site is not named.
    """
    if isinstance(source, Tensor):
        return source
    if not isinstance(source, AnyPosterior):
        raise _no_source(where, source, "probabilities", "posterior.probs('z_*')")
    return source.probs(_named(where, site))


def states_of(
    where: str, source: Tensor | Mapping[str, Tensor] | AnyPosterior, site: str | None
) -> Tensor:
    """States as they are given, of a site of a mapping, or of a posterior's mode.

    Args:
        where: The function that asks.
        source: States, values by site, or a posterior.
        site: The latent, or a glob of latents.

    Raises:
        UsageError: If the source is none of these, or the site is not named.
    """
    if isinstance(source, Tensor):
        return source
    if isinstance(source, Posterior):
        refuse_gaussian(source.graph, where, site)
    if isinstance(source, AnyPosterior):
        return source.mode()[_named(where, site)]
    if isinstance(source, Mapping):
        return source[_named(where, site)]
    raise _no_source(where, source, "states", "posterior.mode()['z_*']")


def require_shape(where: str, name: str, tensor: Tensor, dims: str) -> None:
    """Refuse a tensor of another number of dimensions.

    Args:
        where: The function that asks.
        name: The argument.
        tensor: What it is.
        dims: Its dimensions in words, separated by commas.

    Raises:
        UsageError: If there are more or fewer.
    """
    if tensor.dim() != len(dims.split(", ")):
        raise UsageError(
            message(
                where,
                f"{name} has shape {tuple(tensor.shape)}, not ({dims}).",
                "one sequence or one set of rows is drawn",
                [f"choose an element of its plates: {name}[:, 0] is the first of a chain's"],
            )
        )


def _named(where: str, site: str | None) -> str:
    if site is None:
        raise UsageError(
            message(
                where,
                "a posterior does not say which of its latents is to be drawn.",
                fixes=["name it: site='z'", "name all steps of a chain by glob: site='z_*'"],
            )
        )
    return site


def _no_source(where: str, source: object, what: str, call: str) -> UsageError:
    return UsageError(
        message(
            where, f"{shown(source)} is neither {what} nor a posterior.", fixes=[f"pass {call}"]
        )
    )
