"""From a finished run to the `EMResult` that a user holds."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import DegenerateError, UsageError, message, warn
from pyro_em.fitting.batches.epochs import bound_of
from pyro_em.fitting.batches.stochastic_run import StochasticRun
from pyro_em.fitting.over_parts import (
    evidence_of,
    free_parameters_of,
    read_anywhere,
    standard_errors_of_parts,
    without_information,
)
from pyro_em.fitting.results.boundaries import boundary_notes, loadings_at_zero
from pyro_em.fitting.results.criteria import (
    count_free,
    counted,
    estimated_locally,
    free_parameters,
    local_estimates,
    num_rows,
)
from pyro_em.fitting.results.ends import End
from pyro_em.fitting.results.history import EMStatus, History, Params
from pyro_em.fitting.results.identified import undetermined
from pyro_em.fitting.results.information import StaticInformation, loadings_of
from pyro_em.fitting.results.labels import forms_in, forms_of
from pyro_em.fitting.results.result import EMResult
from pyro_em.fitting.results.standard_errors import StandardErrors, standard_errors
from pyro_em.fitting.steps.em_on_sums import SumsPoint
from pyro_em.fitting.steps.guarded import Guarded
from pyro_em.fitting.steps.parted import Parted
from pyro_em.fitting.steps.point import PartsPoint
from pyro_em.fitting.steps.run import EMRun, Settings
from pyro_em.fitting.steps.stopping import rate_of_convergence
from pyro_em.graph.factors import Group, is_incomplete
from pyro_em.plan.part import Part
from pyro_em.plan.plan import Plan
from pyro_em.plan.program import Program
from pyro_em.plan.unobserved import with_unobserved
from pyro_em.portable import Given
from pyro_em.posteriors.answers.later_faces import LaterFaces
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.posteriors.gaussians.gaussian import GaussianBlock
from pyro_em.posteriors.strategies import Hard
from pyro_em.reduction.reduction import Whole
from pyro_em.tracing.parameters import parameters_at, snapshot, values_of
from pyro_em.tracing.sites import Role
from pyro_em.tracing.turns import alone
from pyro_em.variational.batches import Batches
from pyro_em.variational.bound import Variational
from pyro_em.variational.drawn import DrawnPosterior, dependences_of
from pyro_em.variational.trainer import Trainer

_SLOW = 0.9


logger = logging.getLogger("pyro_em")


def build_result(
    em: Guarded,
    run: EMRun,
    runs: Sequence[EMRun],
    settings: Settings,
    init: Any,
    seed: int | None,
    total_steps: int,
    later: LaterFaces | None = None,
) -> EMResult:
    """Collect a run into a result; everything is at the returned parameters.

    Args:
        em: The map, whose program's parameters are those of ``run``.
        run: The best run.
        runs: All of them.
        settings: What all starts shared.
        init: The start that the user asked for.
        seed: The user's seed.
        total_steps: Steps of all calls of ``fit`` so far.
        later: Moments of Gaussian latents that no observation depends on.
    """
    assert run.last is not None
    last, program, data = run.last, em.program, em.data
    if isinstance(last, (SumsPoint, PartsPoint)):
        log_evidence, bound, log_prior = last.log_evidence, last.objective, last.log_prior
        posterior = cache(lambda: with_unobserved(last.q, later))
    else:
        exact = last.q if last.q.exact else program.posterior(last.evaluation)
        q = last.q if isinstance(program.strategy, Hard) else exact
        assert exact.log_evidence is not None and q.bound is not None
        log_evidence, bound, log_prior = exact.log_evidence, q.bound, exact.log_prior
        posterior = cache(lambda: with_unobserved(q, later))
    # Of data in parts, one part tells what is told of the model.
    over_all = _here if data is None else data.over.from_first
    status = run.status
    text = run.message or status.value
    broken = status in (EMStatus.DEGENERATE, EMStatus.UNBOUNDED)
    stuck = "" if broken else over_all(lambda: loadings_at_zero(program))
    if stuck and status in (EMStatus.CONVERGED, EMStatus.ROUNDING):
        status = EMStatus.SYMMETRIC
    text = stuck or text
    if stuck or broken:
        warn(text)
    _warn_of_massless(program, run)
    rows = num_rows(program) if data is None else data.over.sum(lambda p: num_rows(p.program))
    if settings.bar.starts > 1:
        start = f"best of {sum(not r.is_replaced for r in runs)} starts: {run.name}"
    else:
        start = run.name
    local = estimated_locally(program)
    apart = undetermined(program, None if data is None or data.is_known else data.over)
    parts = Whole(Part(program)) if data is None else data.over
    notes = boundary_notes(parts, program, log_evidence)
    read = None if data is None else read_anywhere(data, run.initial_values)
    values = Params(
        {name: v.clone() for name, v in run.values(program).items()}, _point_sites(program)
    )
    unconstrained = run.parameters
    num_steps = len(run.entering)
    ends = tuple(_end(r) for r in runs)
    rate = rate_of_convergence([*run.entering, bound])
    logger.info("fit: %s log evidence %.6f", run.status.name, log_evidence)
    return EMResult(
        params=values,
        log_evidence=log_evidence,
        elbo=bound,
        history=History(tuple(run.entering), tuple(run.after)),
        converged=status in (EMStatus.CONVERGED, EMStatus.ROUNDING),
        status=status,
        message=text,
        num_steps=num_steps,
        total_steps=total_steps,
        seconds=time.perf_counter() - settings.begin,
        plan=_noting(
            _with_advice(program.plan(), settings, num_steps, rate),
            [*notes, *(found.note for found in apart)],
        ),
        rate=rate,
        starts=tuple(e.objective for r, e in zip(runs, ends, strict=True) if not r.is_replaced),
        ends=ends,
        num_rows=rows,
        counted=counted(program.structure, rows),
        _free=_later_where_data_tell_nothing(
            program,
            lambda: free_parameters(
                program, run.initial_values, without=local, apart=apart, read=read
            ),
        ),
        num_local_estimates=local_estimates(program, run.initial_values, local) if local else 0,
        start=start,
        seed=seed,
        dtype=program.graph.dtype,
        _standard_errors=(
            (lambda: _observed_information(program, unconstrained))
            if data is None
            else (lambda: _information_of_parts(data, unconstrained))
        ),
        log_prior=log_prior,
        _posterior=posterior,
        _forms=cache(lambda: forms_in(program.graph)),
        _posterior_at=None if data is not None else (lambda at: _posterior_at(program, at)),
        is_parted=data is not None,
        _information=None if data else _information_of(program, unconstrained),
    )


def _later_where_data_tell_nothing(program: Program, count: Callable[[], int]) -> Callable[[], int]:
    """A count of parameters: made when it is asked for, if data that are others by then do not matter.

    Args:
        program: The model with its data.
        count: Counts.
    """
    may_wait = program.compiled and all(
        all(map(_is_read_everywhere, group.nested.groups))
        if isinstance(group.nested, GaussianBlock)
        else _is_read_everywhere(group)
        for group in program.graph.groups
    )
    return cache(count) if may_wait else Given(count())


def _is_read_everywhere(group: Group) -> bool:
    """Whether a group reads the same elements of parameters whatever the data are."""
    return (
        group.family is not None
        and group.nested is None
        and group.mask is None
        and group.elements is None
        and group.value_binding is None
        and not is_incomplete(group)
        and all(b.how in ("constant", "selection") for b in group.bindings.values())
    )


def _here(make: Callable[[], Any]) -> Any:
    return make()


def _information_of(
    program: Program, unconstrained: Mapping[str, Tensor]
) -> StaticInformation | None:
    """What gives standard errors without the model, where there is such a thing."""
    if not program.compiled:
        return None
    without = without_information(program)
    return StaticInformation(
        program.graph, program.contraction, unconstrained, without, program.dependences
    )


def _end(run: EMRun) -> End:
    collapsed = run.status in (EMStatus.DEGENERATE, EMStatus.UNBOUNDED) or run.last is None
    return End(run.name, run.objective, run.status, len(run.entering), collapsed)


def _with_advice(plan: Plan, settings: Settings, steps: int, rate: float | None) -> Plan:
    """The plan, with a note where EM was slow and could have been accelerated."""
    if rate is None or rate < _SLOW or steps < 50 or settings.acceleration is not None:
        return plan
    if not plan.is_monotone or plan.gives_up:
        return plan
    note = (
        f"each step kept {rate:.1%} of the gain of the one before: fit(..., acceleration='auto') "
        "needs fewer steps."
    )
    return _noting(plan, [note])


def _noting(plan: Plan, notes: Sequence[str]) -> Plan:
    return replace(plan, notes=(*plan.notes, *notes)) if notes else plan


def _point_sites(program: Program) -> dict[str, str]:
    """For each point-estimated site the one parameter that holds its value."""
    return {
        site: group.value_binding.params[0]
        for group in program.graph.groups
        if group.role is Role.POINT and group.value_binding is not None
        for site in group.members
        if len(group.value_binding.params) == 1 and len(group.members) == 1
    }


def build_stochastic_result(
    trainer: Trainer,
    batches: Batches,
    run: StochasticRun,
    plan: Plan,
    seed: int | None,
    begin: float,
    total_steps: int,
) -> EMResult:
    """Collect a stochastic run; the bound is recomputed at the returned parameters.

    Args:
        trainer: The pair with its optimisers.
        batches: The data.
        run: The path.
        plan: The decisions.
        seed: The user's seed.
        begin: When the fit began.
        total_steps: Steps of all calls so far.
    """
    variational = trainer.variational
    parameters = variational.parameters
    try:
        bound = bound_of(trainer, batches, trainer.num_particles)
    except DegenerateError:
        bound = math.nan
    status = run.status
    if status is EMStatus.MAX_STEPS:
        status = EMStatus.STEPS_DONE
    first = next(iter(batches.epoch(shuffle=False)))
    args = batches.args if batches.loader is None else first.args
    drawn = DrawnPosterior(
        variational,
        args,
        batches.kwargs,
        snapshot(parameters),
        dependences=dependences_of(variational, args, batches.kwargs),
    )
    return EMResult(
        params=Params(values_of(parameters), variational.point_sites),
        log_evidence=None,
        elbo=bound,
        history=History(tuple(run.bounds), (), tuple(run.validation)),
        converged=True if status is EMStatus.STOPPED else None,
        status=status,
        message=run.message or status.value,
        num_steps=len(run.bounds),
        total_steps=total_steps,
        seconds=time.perf_counter() - begin,
        plan=plan,
        rate=None,
        starts=(bound,),
        num_rows=float(batches.total or _rows_of(variational)),
        counted=counted(variational.bare, batches.total or _rows_of(variational)),
        _free=Given(count_free(parameters, plan.updates, {}, {})),
        start="values in the model",
        seed=seed,
        dtype=torch.get_default_dtype(),
        _standard_errors=_no_standard_errors,
        _posterior=lambda: drawn,
        _forms=lambda: forms_of(parameters),
        bound_name=variational.bound_name,
    )


def _rows_of(variational: Variational) -> int:
    plate = variational.bare.data_plate
    return 1 if plate is None else variational.bare.plates[plate].full_size


def _no_standard_errors() -> StandardErrors:
    raise UsageError(
        message(
            "standard_errors",
            "the log evidence of this model is not known: a guide draws latents.",
            "observed information is the curvature of the exact evidence",
            ["see the guide's scales for posterior spread"],
        )
    )


def _warn_of_massless(program: Program, run: EMRun) -> None:
    """Warn of components without observations; rows of probabilities may well be unused."""
    assert run.last is not None
    by_component: dict[int, list[str]] = {}
    for name, events in run.last.massless.items():
        if not program.updates[name].is_row:
            for k in events:
                by_component.setdefault(k, []).append(name)
    for k, names in by_component.items():
        shown = ", ".join(f"'{n}'" for n in names)
        warn(
            message(
                f"component {k} of parameter{'s' * (len(names) > 1)} {shown}",
                "no observation had any weight in it at the last step; its value was kept.",
                "an empty component is not estimated by the data",
                [
                    "use fewer components",
                    "start elsewhere: fit(..., init='random', num_restarts=10, seed=0)",
                ],
            ),
        )


@alone("standard_errors")
def _observed_information(program: Program, unconstrained: Mapping[str, Tensor]) -> StandardErrors:
    """Standard errors at the parameters of a finished fit, wherever the store is now."""
    program.require_unchanged("standard_errors")
    with parameters_at(program.graph.parameters, unconstrained, unconstrained=True):
        return standard_errors(
            free_parameters_of(program), evidence_of(Part(program)), loadings_of(program.graph)
        )


@alone("posterior_at")
def _posterior_at(program: Program, params: Mapping[str, Tensor]) -> Posterior:
    """The exact E-step at other parameters than those of a finished fit."""
    program.require_unchanged("posterior_at")
    with parameters_at(program.graph.parameters, params):
        return program.posterior()


@alone("standard_errors")
def _information_of_parts(data: Parted, unconstrained: Mapping[str, Tensor]) -> StandardErrors:
    """The same of data in parts."""
    return standard_errors_of_parts(data, unconstrained)
