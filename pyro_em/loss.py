"""TraceExact_ELBO: the same bound as a loss for ``pyro.infer.SVI`` or a torch optimiser.

Where every latent has an exact posterior the bound is tight at q(z) = p(z | x; θ), so that
−ELBO = −log p(x; θ): gradient ascent on it is direct maximisation of the evidence, with
∇ log p(x; θ) = E_{p(z | x)}[∇ log p(x, z; θ)] (Fisher's identity). Other latents take their values
from the guide, and what remains is summed exactly under each draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro.infer.elbo import ELBO
from torch import Tensor

from pyro_em.errors import UsageError, message, raise_findings, warn
from pyro_em.graph.conjugate_children.conjugate_record import NotConjugate
from pyro_em.graph.factors import FactorGraph
from pyro_em.graph.gaussian_lines.lines import NotLinear
from pyro_em.graph.structure import form_of
from pyro_em.graph.trace import trace_graph
from pyro_em.plan.planner import Planner
from pyro_em.plan.program import Program
from pyro_em.plan.request import Request
from pyro_em.plan.wishes import check_draws, check_limits
from pyro_em.posteriors.continuous.gaussian_components import NotSeparate
from pyro_em.posteriors.contraction import contract, evidence
from pyro_em.posteriors.enumeration import contraction_of, e_step, scales_of
from pyro_em.tracing.garbage import fewer_collections
from pyro_em.tracing.given import AtReferences, references_in, without_values
from pyro_em.tracing.randomness import random_state
from pyro_em.tracing.runs import Run
from pyro_em.tracing.sites import Role
from pyro_em.tracing.stored import is_stored
from pyro_em.tracing.turns import alone
from pyro_em.variational.bound import Variational
from pyro_em.variational.integrating import AttachedRun, integrated_run, not_here
from pyro_em.variational.laying import look_at_given


class TraceExact_ELBO(ELBO):
    """−ELBO with every latent that has an exact posterior solved, and the guide for the rest.

    Discrete latents are summed, Gaussian ones whose children are linear in them integrated.

    Unlike ``TraceEnum_ELBO`` it needs no annotation of the model and loses no posterior mass in its
    gradients, however far prior and likelihood are apart. Guide sites of latents that are summed
    stay unused. ``TraceExact_ELBO()(model, guide)`` is an ``nn.Module`` whose value is the loss, for
    plain torch optimisers.

    Args:
        num_particles: Draws from the guide per loss.
        max_plate_nesting: Number of plate dimensions; found by looking where left out.
        max_enumeration: Cells of the largest tensor that an enumeration may need.
        strategy: ``"exact"``, or ``"guide"`` to take the guide for everything that it covers, or a
            dict from latents or globs to these.

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
        self,
        num_particles: int = 1,
        *,
        max_plate_nesting: int | None = None,
        max_enumeration: int = 2**27,
        strategy: str | Mapping[str, str] = "exact",
    ) -> None:
        check_draws(num_particles, "TraceExact_ELBO")
        check_limits("TraceExact_ELBO", max_plate_nesting, max_enumeration)
        wishes = list(strategy.values()) if isinstance(strategy, Mapping) else [strategy]
        if any(wish not in ("exact", "guide") for wish in wishes):
            raise UsageError(
                message(
                    "TraceExact_ELBO",
                    f"strategy={strategy!r} is no loss.",
                    fixes=[
                        "use 'exact' or 'guide', or a dict from latents to these",
                        "ExactPosteriorEM has other E-steps",
                    ],
                )
            )
        super().__init__(num_particles=num_particles)
        self.nesting = max_plate_nesting
        self.max_enumeration = max_enumeration
        self.strategy = strategy
        self._last: tuple[Any, Any, Any, Program | Variational] | None = None
        self._baselines: dict[str, float] = {}

    def _get_trace(self, *args: Any) -> Any:
        """Part of Pyro's interface for sampled bounds; this one has terms of its own."""
        raise NotImplementedError("TraceExact_ELBO keeps no pair of traces")

    @alone("TraceExact_ELBO")
    @torch.enable_grad()
    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """−ELBO in nats, attached to the unconstrained parameters.

        Raises:
            PyroEMError: If a latent has no route, or the bound is not finite.
        """
        model_read = self._look(model, guide, args, kwargs)
        if isinstance(model_read, Variational):
            return model_read.loss(args, kwargs, self.num_particles, baselines=self._baselines)
        graph = _attached_graph(model_read, args, kwargs)
        tables = [group.log_density().to(torch.float64) for group in graph.groups]
        flat = [part for table in tables for part in table.unbind(0)]
        plan = contraction_of(graph)
        loss = -evidence(contract(plan, flat, scales=scales_of(graph)))
        if not bool(torch.isfinite(loss)):
            e_step(graph, plan, [t.detach() for t in tables])  # says why
        return loss

    def _look(
        self, model: Callable[..., Any], guide: Any, args: tuple, kwargs: dict[str, Any]
    ) -> Program | Variational:
        """Routes for arguments of this form; found once while model and guide are the same."""
        form = form_of(args, kwargs)
        if self._last is not None:
            known_model, known_guide, known_form, model_read = self._last
            same = known_model is model and known_guide is guide and known_form == form
            read = (
                model_read.graph.parameters
                if isinstance(model_read, Program)
                else model_read.parameters
            )
            if same and is_stored(read):
                return model_read
        request = Request(model, guide, None, self.strategy, {}, self.nesting, self.max_enumeration)
        planner = Planner(request)
        model_read = planner.look(args, kwargs, look_only=True)
        for note in planner.known.leaving:
            warn(note)
        if isinstance(model_read, Program) and model_read.lines:
            model_read = _step_by_step(model_read, args, kwargs)
        self._last, self._baselines = (model, guide, form, model_read), {}
        return model_read

    @alone("TraceExact_ELBO")
    def loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """−ELBO in nats."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs).detach())

    @alone("TraceExact_ELBO")
    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """−ELBO in nats; adds its gradient to the unconstrained parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())


def _step_by_step(program: Program, args: tuple, kwargs: dict[str, Any]) -> Program:
    """A program with Gaussian latents whose loops run over integers: each step has its gradients."""
    if program.structure.series is None:
        return program
    sites = program.structure.sites.values()
    names = frozenset(i.name for i in sites if i.role is Role.GAUSSIAN)
    kernels = {} if program.conjugates is None else program.conjugates.kernels
    units = {n: k.unit for n, k in kernels.items()}
    model = without_values(program.model)
    at = AtReferences(model, names, units)
    nesting = program.structure.max_plate_nesting
    structure, problems = look_at_given(at, args, kwargs, nesting)
    if problems:
        raise_findings(problems)
    given = at.references.on(model)
    return replace(program, model=given, structure=replace(structure, looked=None))


@fewer_collections()
def _attached_graph(program: Program, args: tuple, kwargs: dict[str, Any]) -> FactorGraph:
    """The factors of a model on some arguments, attached to its parameters."""
    runs: list[Run] = []
    state, structure = random_state(), program.structure
    graph = trace_graph(
        program.model,
        args,
        kwargs,
        structure,
        with_bindings=False,
        attached=True,
        keep_random_state=False,  # the next step draws another batch
        runs=runs,
    )
    if not program.lines and program.conjugates is None:
        return graph
    model, references = without_values(program.model), references_in(program.model)
    kernels = {} if program.conjugates is None else program.conjugates.kernels
    run = AttachedRun(runs[-1], model, references, structure, args, kwargs, state, (), kernels)
    try:
        return integrated_run(graph, run)
    except (NotLinear, NotSeparate, NotConjugate) as error:
        raise not_here(error, "on these data and at these parameters") from error
