r"""TraceExact_ELBO: the exact evidence as a loss for ``pyro.infer.SVI``.

Where every latent has an exact posterior the bound is tight at q(z) = p(z | x; θ), so that
−ELBO = −log p(x; θ): gradient ascent on it is direct maximisation of the evidence, with
∇ log p(x; θ) = E_{p(z | x)}[∇ log p(x, z; θ)] (Fisher's identity).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.elbo import ELBO
from torch import Tensor
from torch.distributions import transform_to

from pyro_em.contraction import contract, evidence
from pyro_em.graph import trace_graph
from pyro_em.posterior import e_step, scales_of
from pyro_em.program import build_program


class TraceExact_ELBO(ELBO):
    """The exact −log p(x; θ) of a model whose latents can all be enumerated.

    Unlike ``TraceEnum_ELBO`` it needs no annotation of the model and loses no posterior mass in its
    gradients, however far prior and likelihood are apart. A guide is accepted, as ``SVI`` asks for
    one, and not run: every latent has an exact posterior, or the model is refused.

    Args:
        max_plate_nesting: Number of plate dimensions; found by looking where left out.
        max_enumeration: Cells of the largest tensor that an enumeration may need.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> def model(x):
        ...     mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
        ...     with pyro.plate("n", len(x)):
        ...         z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
        ...         pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)
        >>> pyro.clear_param_store()
        >>> svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.1}), TraceExact_ELBO())
        >>> x = torch.tensor([-2.0, 2.0, 2.5])
        >>> losses = [svi.step(x) for _ in range(50)]
        >>> losses[-1] < losses[0]
        True
        >>> pyro.clear_param_store()
    """

    def __init__(
        self, *, max_plate_nesting: int | None = None, max_enumeration: int = 2**27
    ) -> None:
        super().__init__()
        self.nesting = max_plate_nesting
        self.max_enumeration = max_enumeration

    def _get_trace(self, *args: Any) -> Any:
        """Part of Pyro's interface for sampled bounds; nothing is sampled here."""
        raise NotImplementedError("TraceExact_ELBO draws no traces")

    @torch.enable_grad()
    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """−log p(x; θ) in nats, attached to the unconstrained parameters.

        Raises:
            PyroEMError: If the model cannot be treated exactly.
        """
        program = build_program(
            model,
            args,
            kwargs,
            requested={},
            max_plate_nesting=self.nesting,
            max_enumeration=self.max_enumeration,
            look_only=True,
        )
        values = {
            name: transform_to(p.constraint)(p.unconstrained)
            for name, p in program.graph.parameters.items()
        }
        graph = trace_graph(
            model, args, kwargs, program.structure, values=values, with_bindings=False
        )
        tables = [group.log_density().to(torch.float64) for group in graph.groups]
        flat = [part for table in tables for part in table.unbind(0)]
        loss = -evidence(contract(program.contraction, flat, scales=scales_of(graph)))
        if not bool(torch.isfinite(loss)):
            e_step(graph, program.contraction, [t.detach() for t in tables])  # says why
        return loss

    def loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """−log p(x; θ) in nats."""
        return float(self.differentiable_loss(model, guide, *args, **kwargs).detach())

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """−log p(x; θ) in nats; adds its gradient to the unconstrained parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())
