"""Verification in a fit: whether a fresh trace of the model confirms what the steps computed with.

One follows the first M-step on the data, one the last step. Where an earlier reading of the same form
was confirmed, and nobody sees a step before the end, the first one waits for some steps: a fit that
ends before needs but one run of the model, at the parameters that it returns. A verification that
finds a difference takes back all steps since the one before.
"""

from __future__ import annotations

from pyro_em.fitting.results.history import EMStatus
from pyro_em.fitting.steps.guarded import Guarded, warn_disagreement
from pyro_em.fitting.steps.run import EMRun, Settings

# Steps before the first verification where an earlier reading of the model was confirmed.
LATER = 32


def may_verify_later(em: Guarded, settings: Settings) -> bool:
    """Whether nobody sees a step before the end, and the bindings were confirmed when first read."""
    if settings.callbacks or settings.keeper is not None or settings.acceleration is not None:
        return False
    return settings.verify and em.data is None and em.program.is_known


def is_confirmed(em: Guarded, run: EMRun, when: str) -> bool | None:
    """Hold a fresh trace against the steps since the last one; where it differs, take them back.

    Args:
        em: The map.
        run: Where it stands; its parameters are in the store.
        when: The beginning of what is said otherwise.

    Returns:
        Whether the steps stand; None where there was an interrupt.
    """
    program = em.program
    if not program.compiled or run.verified is None or run.num_steps <= run.verified_at:
        return True
    try:
        off = em.disagreements(run.values(program) if run.verifies_later else None)
    except KeyboardInterrupt:
        run.status = EMStatus.INTERRUPTED
        return None
    if not off:
        run.note_verified()
        return True
    warn_disagreement(program.kernel, off, when)
    em.distrust(off)
    run.go_back(em.program)
    at = em.sound.e_step(index=run.num_steps)
    run.record(em.program, at)
    return False
