"""The partition function of a Markov random field, by the same contraction as an evidence.

    Z = Σ_x Π_cliques ψ(x_clique),   written with ``pyro.factor(name, log ψ)``.

Sites declare the variables; under counting measure their own densities do not enter.

Source: Koller and Friedman (2009), "Probabilistic Graphical Models", chapter 9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor

from pyro_em.errors import UsageError, message, raise_findings
from pyro_em.graph.findings.examination import examine
from pyro_em.graph.trace import trace_graph
from pyro_em.plan.cost import budget_problems, contraction_from_structure
from pyro_em.posteriors.contraction import contract, evidence
from pyro_em.posteriors.enumeration import contraction_of, scales_of
from pyro_em.tracing.turns import alone


@alone("log_partition")
@torch.enable_grad()
def log_partition(
    field: Callable[..., Any],
    *args: Any,
    base: Literal["counting", "model"] = "counting",
    max_enumeration: int = 2**27,
    **kwargs: Any,
) -> Tensor:
    """log Z of a field written with ``pyro.factor``, differentiable in its parameters.

    It may be called inside a model, where −N log Z is the factor that makes N rows of the field a
    distribution: ``pyro.factor("normaliser", -N * log_partition(field, base="model"))``.

    Args:
        field: A Pyro function whose discrete sites declare variables and whose ``pyro.factor``
            terms are log potentials.
        *args: Its arguments.
        base: ``"counting"``: only potentials count; ``"model"``: the sites' own densities multiply
            them, as they do in a model's evidence.
        max_enumeration: Cells of the largest table that the sum may need.
        **kwargs: Its keyword arguments.

    Returns:
        log Z in nats, in float64. # ()

    Raises:
        PyroEMError: If the sum is past the budget, or a variable cannot be enumerated.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def colds():
        ...     coin = dist.Categorical(torch.ones(2))
        ...     you, coworker = pyro.sample("you", coin), pyro.sample("coworker", coin)
        ...     table = torch.tensor([[2.0, 1.0], [1.0, 10.0]]).log()
        ...     pyro.factor("contact", table[you, coworker])
        >>> round(float(log_partition(colds).exp()), 3)
        14.0
    """
    if base not in ("counting", "model"):
        raise UsageError(
            message(
                "log_partition",
                f"base={base!r} is not known.",
                fixes=["use 'counting' or 'model'"],
            )
        )
    # Sites of the field are no sites of a model around it; its parameters are.
    with poutine.block(hide_types=["sample", "observe"]):
        structure, problems = examine(field, args, kwargs, first_look=False)
        if not problems:
            cost = contraction_from_structure(structure)
            problems = budget_problems(structure, cost, max_enumeration)
        if problems:
            raise_findings(problems)
        graph = trace_graph(field, args, kwargs, structure, with_bindings=False, attached=True)
    flat = []
    for group in graph.groups:
        table = group.log_density().to(torch.float64)
        if base == "counting" and group.distribution != "Unit":
            table = torch.zeros_like(table)
        flat.extend(table.unbind(0))
    return evidence(contract(contraction_of(graph), flat, scales=scales_of(graph)))
