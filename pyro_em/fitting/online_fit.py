"""A fit with an M-step after each chunk, from its map to its result."""

from __future__ import annotations

from dataclasses import replace

from pyro_em.fitting.call import Call
from pyro_em.fitting.guarded import Guarded
from pyro_em.fitting.online import checked_online, online_run
from pyro_em.fitting.preconditions import refuse_a_guide
from pyro_em.fitting.report import build_result
from pyro_em.fitting.result import EMResult
from pyro_em.fitting.run import Settings

_EPOCHS = 10


def fit_online(call: Call, em: Guarded, settings: Settings) -> EMResult:
    """Online EM from the parameters in the param store.

    Args:
        call: The call, whose data are chunks.
        em: The map.
        settings: What a fit of exact steps would be given.

    Raises:
        UsageError: If the sums of this model cannot be put together.
    """
    session, wishes, rest = call.session, call.wishes, call.args[1:]
    held_out = wishes.validation
    other = tuple(held_out) if isinstance(held_out, (tuple, list)) else (held_out,)

    def evidence() -> float:
        found = session.planner.look((*other, *rest), call.kwargs, look_only=True)
        return refuse_a_guide(found, "validation").log_evidence()

    assert em.data is not None
    before = session.total_steps
    run, validation = online_run(
        em,
        em.data,
        checked_online(wishes.online),
        wishes.num_epochs or _EPOCHS,
        wishes.callbacks,
        None if held_out is None else evidence,
        call.begin,
    )
    settings.bar.close()
    session.total_steps = before + run.num_steps
    session.last_data.note(call.args, call.kwargs)
    result = build_result(em, run, [run], settings, None, wishes.seed, session.total_steps)
    history = replace(result.history, validation=tuple(validation))
    return replace(result, history=history, plan=replace(result.plan, exact=False))
