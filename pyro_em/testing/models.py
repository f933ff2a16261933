"""Conformance suites for users' own families and models.

Both raise ``AssertionError`` with a sentence that names what failed; both need nothing but torch
and Pyro, so that they run in any test framework.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pyro
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor

from pyro_em.em import ExactPosteriorEM
from pyro_em.plan.program import Program
from pyro_em.tracing.parameters import restore, snapshot
from pyro_em.tracing.turns import alone
from pyro_em.updates.expectations.statistics import expected_log_joint
from pyro_em.updates.update import ClosedForm


@alone("check_model")
def check_model(
    model: Callable[..., Any],
    *args: Any,
    steps: int = 10,
    seed: int = 0,
    rtol: float | None = None,
    **kwargs: Any,
) -> None:
    """Test that the library treats a model exactly, in a param store scope of its own.

    Checked are: the evidence against Pyro's own enumeration (where probabilities have no exact
    zeros); posteriors that sum to one; ELBO = evidence at the posterior and below it for other q;
    monotone evidence over some steps; the same path where the model is run again at each of them;
    updates that no small move of a parameter improves.

    Args:
        model: A Pyro model with an exact posterior.
        *args: Its arguments.
        steps: Number of EM steps to run.
        seed: Seed of the other q.
        rtol: Relative tolerance of evidences; by default 1e-9 in float64, 1e-5 in float32.
        **kwargs: Its keyword arguments.

    Raises:
        AssertionError: With the check that failed.

    Example:
        >>> import pyro.distributions as dist
        >>> from torch.distributions import constraints
        >>> def model(x):
        ...     w = pyro.param("w", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
        ...     with pyro.plate("n", len(x)):
        ...         z = pyro.sample("z", dist.Categorical(w))
        ...         pyro.sample("x", dist.Normal(torch.tensor([-1.0, 1.0])[z], 1.0), obs=x)
        >>> check_model(model, torch.tensor([-1.2, 0.3, 0.9]))
    """
    with pyro.get_param_store().scope():
        em = ExactPosteriorEM(model)
        program = em._look(args, kwargs)
        assert isinstance(program, Program)
        if rtol is None:
            rtol = 1e-9 if program.graph.dtype == torch.float64 else 1e-5
        q = program.posterior()
        _check_against_pyro(model, args, kwargs, em, q.log_evidence, rtol)
        terms = em.elbo(*args, **kwargs)
        assert terms.log_evidence is not None and terms.gap is not None
        size = max(1.0, abs(terms.log_evidence))
        assert abs(terms.gap) <= rtol * size, f"the bound misses the evidence by {terms.gap:.3g}"
        for name in program.graph.latents:
            p = q.probs(name)
            off = float((p.sum(-1) - 1).abs().max())
            assert off < 1e-5, f"the posterior of '{name}' sums to one only within {off:.3g}"
        _check_other_q(em, args, kwargs, q, seed, rtol * size)
        if not program.graph.parameters or not any(g.observed for g in program.graph.groups):
            return
        start = snapshot(program.graph.parameters)
        result = em.fit(*args, max_steps=steps, tol=0, progress=False, **kwargs)
        path = [*result.history, result.log_evidence]
        falls = [b - a for a, b in pairwise(path)]
        assert min(falls, default=0.0) >= -rtol * size, f"the evidence fell by {-min(falls):.3g}"
        _check_stationary(program, args, kwargs, em)
        restore(program.graph.parameters, start)
        _check_rerun(em, args, kwargs, path, steps, rtol * size, result.plan.iterations)


def _check_against_pyro(
    model: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    em: ExactPosteriorEM,
    log_evidence: float | None,
    rtol: float,
) -> None:
    assert em._session.program is not None and log_evidence is not None
    tables = [g.log_density() for g in em._session.program.graph.groups]
    if any(bool((t == -torch.inf).any()) for t in tables):
        return  # Pyro clamps log 0; the documented difference
    structure = em._session.program.structure
    if structure.barren:
        return  # Pyro samples what integrates to one
    scales = [s for g in em._session.program.graph.groups for s in g.scale]
    if any(isinstance(s, Tensor) for s in scales):
        return  # Pyro enumerates under scalar scales only
    nesting = em._session.program.structure.max_plate_nesting
    elbo = TraceEnum_ELBO(max_plate_nesting=nesting)
    enumerated = config_enumerate(model, "parallel")
    # Without validation: NaN is no error where a mask hides it.
    with torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
        theirs = -float(elbo.loss(enumerated, lambda *a, **k: None, *args, **kwargs))
    assert abs(theirs - log_evidence) <= max(rtol, 1e-9) * max(1.0, abs(theirs)) * 10, (
        f"the log evidence is {log_evidence:.9g}, Pyro's enumeration gives {theirs:.9g}"
    )


def _check_other_q(
    em: ExactPosteriorEM,
    args: tuple,
    kwargs: dict[str, Any],
    q: Any,
    seed: int,
    slack: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    other = {}
    for name in q.graph.latents:
        p = q.probs(name).double().cpu()
        noise = torch.rand(p.shape, generator=generator, dtype=torch.float64)
        mixed = p * (0.5 + noise)
        other[name] = mixed / mixed.sum(-1, keepdim=True)
    if not other:
        return
    bound = em.elbo(*args, q=other, **kwargs)
    assert bound.gap is not None
    assert bound.gap >= -slack, f"a bound exceeds the evidence by {-bound.gap:.3g}"


def _check_stationary(
    program: Any, args: tuple, kwargs: dict[str, Any], em: ExactPosteriorEM
) -> None:
    """After an M-step no small move of one parameter raises the expected log joint."""
    evaluation = program.evaluate()
    q = program.posterior(evaluation)
    program.m_step(q.counts, evaluation)
    reached = program.evaluate()
    best = expected_log_joint(q.counts, reached.tables)
    if not math.isfinite(best):
        return  # a probability of zero meets a count that is only nearly zero
    generator = torch.Generator().manual_seed(1)
    for name, p in program.graph.parameters.items():
        update = program.updates[name].update
        if not isinstance(update, ClosedForm) or update.floor:
            continue
        saved = p.unconstrained.detach().clone()
        for _ in range(3):
            noise = torch.randn(saved.shape, generator=generator, dtype=torch.float64).to(saved)
            with torch.no_grad():
                p.unconstrained.copy_(saved + 1e-4 * noise)
            moved = expected_log_joint(q.counts, program.evaluate().tables)
            with torch.no_grad():
                p.unconstrained.copy_(saved)
            # One block given the others: a later block may move its optimum a little (ECM).
            assert moved <= best + 1e-6 * max(1.0, abs(best)), (
                f"moving parameter '{name}' raises the expected log joint from {best:.9g} "
                f"to {moved:.9g}: its update is no maximiser"
            )


def _check_rerun(
    em: ExactPosteriorEM,
    args: tuple,
    kwargs: dict[str, Any],
    path: list[float],
    steps: int,
    slack: float,
    iterations: str,
) -> None:
    found = em._look(args, kwargs)
    assert isinstance(found, Program)
    program = replace(found, compiled=False)
    rerun = []
    for _ in range(steps):
        evaluation = program.evaluate()
        program = program.following(evaluation)
        q = program.posterior(evaluation)
        rerun.append(q.log_evidence)
        program.m_step(q.counts, evaluation)
    for i, (a, b) in enumerate(zip(path, rerun, strict=False)):
        assert b is not None and abs(a - b) <= 10 * slack, (
            f"at step {i} the evidence is {a:.9g} by {iterations}; by contraction, where the model is "
            f"run again at each step, it is {b:.9g}"
        )
