"""Monte Carlo EM with a guide: how many draws it weights by importance, or why it can weight none."""

from __future__ import annotations

from pyro_em.errors import UsageError, message
from pyro_em.posteriors.strategies import EStepStrategy, MonteCarlo
from pyro_em.variational.pair import Routing


def draws_to_weight(e_step: EStepStrategy | None, routing: Routing) -> int | None:
    """Draws per step of Monte Carlo EM by importance; None for the ELBO.

    Raises:
        UsageError: If the E-step is one of sums, or the guide's draws have no gradient in it.
    """
    if e_step is None:
        return None
    names = ", ".join(f"'{n}'" for n in routing.drawn)
    if not isinstance(e_step, MonteCarlo):
        raise UsageError(
            message(
                f"strategy={e_step!r}",
                f"the guide draws {names}, and this E-step is one of sums.",
                "it has a meaning only where every latent is summed or a point estimate",
                ["use strategy='exact' or MonteCarlo(n)", "use guide='map' for these latents"],
            )
        )
    look = routing.guide
    assert look is not None
    rough = [n for n in routing.shown if not getattr(look.sites[n]["fn"], "has_rsample", False)]
    if rough:
        raise UsageError(
            message(
                f"strategy={e_step!r}",
                f"the guide's draw of '{rough[0]}' cannot be reparameterised.",
                "weights of such draws have no gradient in the guide",
                ["use strategy='exact' or 'guide'"],
            )
        )
    return e_step.num_samples
