"""A fit of exact steps, from a call that has been read to its result."""

from __future__ import annotations

from dataclasses import replace

from pyro_em.errors import UsageError, message
from pyro_em.fitting.call import Call
from pyro_em.fitting.kept_fit import KeptFit
from pyro_em.fitting.online_fit import fit_online
from pyro_em.fitting.parts.chunked import chunked, chunks_in
from pyro_em.fitting.report import build_result
from pyro_em.fitting.results.result import EMResult
from pyro_em.fitting.steps.guarded import Guarded
from pyro_em.fitting.steps.parted import Parted
from pyro_em.fitting.steps.progress import Bar
from pyro_em.fitting.steps.restarts import run_starts
from pyro_em.fitting.steps.run import Settings, best_of
from pyro_em.fitting.steps.search import Search
from pyro_em.plan.fit_wishes import check_acceleration, refuse_stochastic_keywords
from pyro_em.plan.program import Program
from pyro_em.plan.unobserved import unobserved
from pyro_em.tracing.randomness import same_random_state
from pyro_em.variational.batches import is_loader


def fit_exactly(call: Call, program: Program) -> EMResult:
    """Run EM from all starts, and return the best.

    Args:
        call: The call.
        program: The model with its data, or with the part of them that is at hand.

    Raises:
        PyroEMError: If the data or the keywords are not those of an exact fit.
    """
    data = None
    if call.together is not None:
        joined, shards = call.together.joined, call.together.shards
        data = joined.parted(shards, call.session, program, call.args, call.kwargs)
        call = replace(call, wishes=joined.watched(call.wishes))
    kept = None
    if call.checkpoint is not None and call.wishes.online is None:
        kept = KeptFit.of(
            call.checkpoint, program, call.session, call.wishes, call.origin, call.begin
        )
    # What is resumed has the random state of the first process.
    is_resumed = call.checkpoint is not None and call.checkpoint.saved is not None
    with same_random_state(call.together is not None and is_resumed):
        return _fit(call, program, data, kept)


def _fit(call: Call, program: Program, data: Parted | None, kept: KeptFit | None) -> EMResult:
    session, wishes = call.session, call.wishes
    refuse_stochastic_keywords(wishes, session.request.guide is not None)
    if wishes.acceleration is not None:
        check_acceleration(wishes.acceleration, program.is_monotone and program.strategy is None)
    if call.args and is_loader(call.args[0]):
        raise UsageError(
            message(
                "fit",
                "a DataLoader was given.",
                "an exact fit uses all data at every step",
                ["pass the data themselves: em.fit(data)"],
            )
        )
    before = session.total_steps
    bar = Bar(wishes.progress, wishes.max_steps, wishes.num_restarts, program.objective_name)
    keeper = None if kept is None else kept.keeper
    settings = Settings(
        wishes.max_steps,
        wishes.tol,
        wishes.callbacks,
        bar,
        call.begin,
        wishes.acceleration,
        keeper=keeper,
    )
    chunks = chunks_in(call.args)
    if chunks is not None and data is None:
        rest = call.args[1:]
        # Where the order of batches matters, it is the source's in each pass.
        keeps = wishes.online is None or chunks.is_ordered
        is_online = wishes.online is not None
        data = chunked(
            session, program, chunks, rest, call.kwargs, wishes.progress, keeps, is_online
        )
    lead = program if data is None else data.lead
    em = Guarded(lead, session.m_step_state, data, remembers=kept is not None)
    if kept is not None:
        kept.take_up(em)
    if wishes.online is not None:
        return fit_online(call, em, settings, program)
    search = Search.seeded(wishes.seed) if keeper is None else keeper.search
    runs = run_starts(em, settings, wishes.init, wishes.num_restarts, search)
    if keeper is not None:
        keeper.finish(em)
    best = best_of(runs)  # whose parameters are in the store
    session.total_steps = before + best.num_steps
    session.last_data.note(call.args, call.kwargs)
    later = None if data else unobserved(em.program, session.request.max_enumeration)
    return build_result(
        em, best, runs, settings, wishes.init, wishes.seed, session.total_steps, later
    )
