"""A fit with an M-step after each batch, from its map to its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pyro_em.errors import UsageError, message
from pyro_em.fitting.batches.online import OnlineRun, Standing, Watcher
from pyro_em.fitting.batches.online_keeper import OnlineKeeper
from pyro_em.fitting.batches.online_steps import steps_of
from pyro_em.fitting.batches.online_sums import StepSize, checked_online, sums_of
from pyro_em.fitting.call import Call
from pyro_em.fitting.checkpoint.checkpoints import origin_state
from pyro_em.fitting.parts.chunked import chunks_in
from pyro_em.fitting.places import order_is_drawn
from pyro_em.fitting.preconditions import refuse_a_guide
from pyro_em.fitting.report import build_result
from pyro_em.fitting.results.result import EMResult
from pyro_em.fitting.steps.beginnings import Beginning, name_of_start
from pyro_em.fitting.steps.guarded import Guarded
from pyro_em.fitting.steps.progress import Bar
from pyro_em.fitting.steps.restarts import run_starts
from pyro_em.fitting.steps.run import EMRun, Settings, best_of
from pyro_em.fitting.steps.search import Search
from pyro_em.plan.program import Program
from pyro_em.tracing.encoding import decoded, encoded
from pyro_em.tracing.parameters import restore, snapshot, values_of
from pyro_em.updates.m_step import apply_floors

_EPOCHS = 10
_STEPS_OF_A_START = 40  # on the first chunk


def fit_online(call: Call, em: Guarded, settings: Settings, first: Program) -> EMResult:
    """Online EM from the parameters in the param store.

    Args:
        call: The call, whose data are chunks.
        em: The map.
        settings: What a fit of exact steps would be given.
        first: The model with the first chunk.

    Raises:
        UsageError: If the sums of this model cannot be put together.
    """
    session, wishes = call.session, call.wishes
    data, online, chunks = em.data, checked_online(wishes.online), chunks_in(call.args)
    assert data is not None and chunks is not None
    if not isinstance(online, StepSize) and order_is_drawn(chunks.source):
        raise UsageError(
            message(
                "online",
                "online='incremental' was given together with a loader that shuffles.",
                "the sums of a chunk are replaced when the same rows come again",
                ["use online=StepSize(0.6)", "leave shuffle=True out"],
            )
        )
    settings.bar.close()
    saved = None if call.checkpoint is None else call.checkpoint.saved
    if saved is not None and not chunks.is_ordered:  # sums in another order round otherwise
        data = data.knowing(decoded(saved["all_data"]))
    block = None if data.is_known or em.quick is None else em.program.kernel.adding
    program = em.program
    parameters = program.graph.parameters
    # Refused before anything is written.
    steps = steps_of(data.part, block, em.state, data.over, data.all_data.rows)
    origin = snapshot(parameters)
    name = "values in the model"
    if saved is None:
        name = _begin(call, em, first)
        apply_floors(program.graph, program.updates)
    steps.begin()
    run = EMRun(snapshot(parameters), name=name)
    run.initial_values = values_of(parameters)
    fit = OnlineRun(
        steps,
        data,
        run,
        Standing(sums_of(online, data.all_data.rows)),
        wishes.num_epochs or _EPOCHS,
        wishes.callbacks,
        _evidence(call),
        call.begin,
    )
    watcher, keeper = Watcher(), None
    before = session.total_steps
    if call.checkpoint is not None:
        constant = {
            "origin": encoded(origin),
            "origins": origin_state(call.origin),
            "total_before": before,
        }
        checkpoint = call.checkpoint
        watcher = keeper = OnlineKeeper(
            checkpoint.file,
            lambda: checkpoint.fingerprint(None),
            constant,
            em,
            fit,
            chunks.source,
            call.begin,
        )
        if saved is not None:
            keeper.take_up(saved)
    fit.go(watcher)
    if keeper is not None:
        keeper.finish()
    fit.publish()
    run.record(program, em.e_step())
    session.total_steps = before + run.num_steps
    session.last_data.note(call.args, call.kwargs)
    result = build_result(em, run, [run], settings, wishes.init, wishes.seed, session.total_steps)
    history = replace(result.history, validation=tuple(fit.standing.validation))
    return replace(result, history=history, plan=replace(result.plan, exact=False))


def _begin(call: Call, em: Guarded, first: Program) -> str:
    """Write the parameters where the fit begins, found on the first chunk; returns how, in words."""
    wishes, data = call.wishes, em.data
    assert data is not None
    if wishes.init is None and wishes.num_restarts == 1:
        return "values in the model"
    search = Search.seeded(wishes.seed)
    names = []

    def write() -> None:
        own = Guarded(first, em.state)
        if wishes.num_restarts == 1:
            Beginning(own, search.generator).write(wishes.init)
            names.append(name_of_start(wishes.init))
            return
        bar = Bar(False, _STEPS_OF_A_START, 1, first.objective_name)
        few = Settings(_STEPS_OF_A_START, wishes.tol, (), bar, call.begin)
        best = best_of(run_starts(own, few, wishes.init, wishes.num_restarts, search))
        restore(first.graph.parameters, best.parameters)
        names.append(f"best of {wishes.num_restarts} starts on the first chunk: {best.name}")

    data.begin(write, search.generator)
    found: str = data.over.from_first(lambda: names[-1])
    return found


def _evidence(call: Call) -> Callable[[], float] | None:
    """The log evidence of held-out data at the parameters in the store; None where there are none."""
    held_out, rest, planner = call.wishes.validation, call.args[1:], call.session.planner
    if held_out is None:
        return None
    other = tuple(held_out) if isinstance(held_out, (tuple, list)) else (held_out,)

    def evidence() -> float:
        found = planner.look((*other, *rest), call.kwargs, look_only=True)
        return refuse_a_guide(found, "validation").log_evidence()

    return evidence
