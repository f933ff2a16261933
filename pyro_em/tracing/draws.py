"""Runs that draw: a model paired with its guide, and predictions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample

from pyro_em.distributions import unwrap
from pyro_em.tracing.densities import add_log_probs
from pyro_em.tracing.handlers import DrawMissing, DrawObserved, GiveValues, SampleTrace
from pyro_em.tracing.runs import Model
from pyro_em.tracing.sites import Role, factors_in, roles_in
from pyro_em.tracing.whole import LeftWhole


@dataclass(frozen=True, eq=False)
class Drawn:
    """One draw of a model paired with its guide.

    Attributes:
        sites: Everything that was traced, by name.
        roles: What each site with a density stands for; a latent that nobody gave a value has none.
    """

    sites: Mapping[str, dict[str, Any]]
    roles: Mapping[str, Role]

    def log_probs(self, role: Role) -> dict[str, torch.Tensor]:
        """The log densities of the sites of one role, over their batches, scaled and masked."""
        return {n: self.sites[n]["log_prob"] for n, own in self.roles.items() if own is role}


def drawn_run(
    model: Model, args: tuple, kwargs: dict[str, Any], unneeded: Collection[str] = ()
) -> Drawn:
    """Run a model paired with its guide once, drawing on; parameters stay attached.

    Every site with a role gets ``log_prob`` over its batch, scaled and masked, those in
    ``unneeded`` excepted.
    """
    with LeftWhole(), pyro.validation_enabled(False), SampleTrace() as tracer:
        model(*args, **kwargs)
    sites = dict(tracer.trace.nodes)
    roles = {n: role for n, role in roles_in(sites).items() if role is not Role.LATENT}
    add_log_probs(tracer.trace, roles.keys() - set(unneeded))
    return Drawn(sites, roles)


def sites_of(model: Model, args: tuple, kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sites of one run, without densities and without gradients."""
    with LeftWhole(), torch.no_grad(), pyro.validation_enabled(False), poutine.trace() as tracer:
        model(*args, **kwargs)
    return factors_in(tracer.trace.nodes)


def predicted_run(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    values: Mapping[str, torch.Tensor],
    keep_observed: bool,
) -> dict[str, dict[str, Any]]:
    """The sites of one run with latents at given values and observed sites drawn anew.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        values: Values of latents.
        keep_observed: Whether observed sites keep their values.
    """
    with (
        LeftWhole(),
        torch.no_grad(),
        pyro.validation_enabled(False),
        poutine.trace() as tracer,
        DrawObserved(not keep_observed),
        DrawMissing(keep_observed),
        GiveValues(values, dict.fromkeys(values, Role.SAMPLED), {}),
    ):
        model(*args, **kwargs)
    return {
        n: s
        for n, s in tracer.trace.nodes.items()
        if s["type"] == "sample"
        and not site_is_subsample(s)
        and type(unwrap(s["fn"])[0]).__name__ != "Unit"
    }
