"""Closed forms on batches: maximisers of running averages of their sums over data.

A parameter whose factors hold only summed or drawn latents keeps its closed form where the data come
in batches. With ŝ the expected sums of a batch and ρ the step size,

    s ← (1 − ρ) s + ρ ŝ,   θ ← argmax_θ of the expected log joint with the sums s,

where ρ is the user's, or (t + 1)^−0.6 at step t.

Source: Cappé and Moulines (2009), "Online EM algorithm for latent data models".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.graph.bindings.autograd import known_below
from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.continuous.gaussian_steps import for_updates, in_m_step, tables_of
from pyro_em.posteriors.enumeration import contraction_of
from pyro_em.posteriors.exact import exact_posterior
from pyro_em.tracing.handlers import GuideSites, ScalePlates
from pyro_em.tracing.randomness import same_random_state
from pyro_em.updates.decisions.decision import decide_updates
from pyro_em.updates.expectations.statistics import Expectation
from pyro_em.updates.m_step import MStepState, m_step
from pyro_em.updates.update import ClosedForm, Fixed, ParameterUpdate, Update
from pyro_em.variational.bound import Variational
from pyro_em.variational.drawing import detached, drawn_graph
from pyro_em.variational.pair import Laid


@dataclass(eq=False)
class RunningAverages:
    """The averages of all parameters that keep their closed form on batches.

    Attributes:
        saved_name: From a parameter's name here to its name in a file.
        by_name: Averages of numerators and denominators by the parameter's name in a file.
    """

    saved_name: Callable[[str], str] = str
    by_name: dict[str, Expectation] = field(default_factory=dict)

    def m_step(
        self,
        variational: Variational,
        asked: Mapping[str, Update],
        step: int,
        args: tuple,
        kwargs: dict[str, Any],
        factors: Mapping[str, float] | None,
        over_all: Callable[[Callable[[], list[Tensor]]], list[Tensor]] | None = None,
    ) -> None:
        """Take in the sums of a batch, and set the parameters to the maximisers.

        Args:
            variational: The pair of model and guide.
            asked: The user's updates by parameter name.
            step: Complete steps so far.
            args: The batch: the model's positional arguments.
            kwargs: Its keyword arguments.
            factors: Per plate what multiplies its sites.
            over_all: The mean over all processes of what makes this one's numerators and
                denominators, where there are others.

        Raises:
            UsageError: If a parameter has no closed form on batches.
        """
        names = {n for n, u in asked.items() if isinstance(u, ClosedForm)}
        if not names:
            return
        laid = variational.laid(args, kwargs)
        if not self.by_name:
            _refuse_means(laid, names, args, kwargs)
        with ScalePlates(factors or {}):
            graph, _ = drawn_graph(laid, args, kwargs, factors=factors, bindings=True)
        updates = _granted(for_updates(graph), names, asked)
        with torch.no_grad():
            arguments = [detached(g.arguments) for g in graph.groups]
            tables, solved = tables_of(graph, arguments, [g.value for g in graph.groups])
            q = exact_posterior(graph, contraction_of(graph), [t.detach() for t in tables])
            own, weights, arguments = in_m_step(graph, q.counts, arguments, solved)
        # A component that no row of the batch belongs to is empty, not one of 1e-40 rows.
        counts = [torch.where(c < 1e-10, 0.0, c) for c in weights]

        def blend(name: str, n: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
            """Numerators and denominators live on the parameter: batches may differ in rows."""
            update = updates[name].update
            step_size = update.step_size if isinstance(update, ClosedForm) else None
            rho = step_size or (step + 1) ** -0.6
            saved = self.saved_name(name)
            if over_all is not None:
                own = [n, d]
                n, d = over_all(lambda: own)
            average = _sums(n, d)
            if saved in self.by_name:
                old = _sums(*(s.to(n) for s in _pair(self.by_name[saved])))
                average = old + rho * (average + -1.0 * old)
            self.by_name[saved] = average
            n, d = _pair(average)
            return n.clone(), d.clone()

        m_step(own, updates, counts, arguments, _no_gradient, MStepState(), blend)

    def state(self) -> dict[str, list[Tensor]]:
        """Numerators and denominators by the parameter's name in a file."""
        return {name: list(_pair(sums)) for name, sums in self.by_name.items()}

    def restore(self, state: Mapping[str, Sequence[Tensor]]) -> None:
        """Continue with the averages of a saved fit."""
        self.by_name = {name: _sums(n, d) for name, (n, d) in state.items()}


def _refuse_means(laid: Laid, names: Collection[str], args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuse a closed form of what reaches a mean that reads integrated latents.

    Raises:
        UsageError: With the parameter and the site.
    """
    if laid.references is None:
        return
    with torch.enable_grad(), same_random_state():
        graph, _ = drawn_graph(laid, args, kwargs)
    places = {n: p.unconstrained for n, p in graph.parameters.items() if n in names}
    for site in (s for g in graph.groups if g.nested is not None for s in g.nested.groups):
        # Of what reads a Gaussian latent the mean alone; of what is integrated with another all.
        own = site.lines if site.lines and not laid.kernels else tuple(site.arguments)
        for found in (known_below(site.arguments[a], places) for a in own):
            if found:
                raise UsageError(
                    message(
                        f"updates['{found[0]}']",
                        f"a closed form was asked for, but it is in the mean of site "
                        f"'{site.members[0]}', which depends on Gaussian latents.",
                        "they are integrated under each draw, and all in such a mean is solved "
                        "together where nothing is drawn",
                        ["leave it out: the parameter is then trained by gradient"],
                    )
                )


def _granted(
    graph: FactorGraph, names: Collection[str], asked: Mapping[str, Update]
) -> dict[str, ParameterUpdate]:
    """The closed forms that were asked for; all other parameters stay as they are."""
    decided = decide_updates(graph, {n: asked[n] for n in names if n in graph.parameters})
    out = {}
    for name, update in decided.items():
        if name not in names:
            out[name] = ParameterUpdate(name, Fixed(), "trained on the drawn bound")
        elif not isinstance(update.update, ClosedForm) or update.needs_data:
            raise UsageError(
                message(
                    f"updates['{name}']",
                    f"a closed form was asked for, but {_in_users_words(update.reason)}.",
                    "on batches it needs additive statistics of summed or drawn latents",
                    ["leave it out: the parameter is then trained by gradient"],
                )
            )
        else:
            out[name] = update
    return out


def _sums(n: Tensor, d: Tensor) -> Expectation:
    """The numerator and the denominator of one closed form as sums over data."""
    return Expectation(math.nan, {"closed form": {"numerator": n, "denominator": d}})


def _pair(sums: Expectation) -> tuple[Tensor, Tensor]:
    """The numerator and the denominator again."""
    values = sums.sums["closed form"]
    return values["numerator"], values["denominator"]


def _in_users_words(reason: str) -> str:
    """The reason against a wish without the wish, and guide sites as the user called them."""
    return (
        reason.partition("was asked for, but ")[2].replace(f"'{GuideSites.prefix}", "guide site '")
        or reason
    )


def _no_gradient(values: Mapping[str, Tensor], groups: Sequence[int]) -> Mapping[int, Tensor]:
    raise AssertionError("closed forms need no gradient")
