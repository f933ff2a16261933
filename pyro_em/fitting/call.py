"""One call of ``fit`` once the model has been read: what was asked, and what is known by then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyro_em.fitting.checkpoint.checkpoints import Checkpoint
from pyro_em.fitting.origins import Origin
from pyro_em.fitting.parts.joining import Joined
from pyro_em.fitting.parts.shards import Shards
from pyro_em.fitting.session import Session
from pyro_em.plan.fit_wishes import FitWishes


@dataclass(frozen=True, eq=False)
class Together:
    """Several processes that make the same call.

    Attributes:
        joined: What they have agreed about.
        shards: The rows of each.
    """

    joined: Joined
    shards: Shards


@dataclass(frozen=True, eq=False)
class Call:
    """A call of ``fit``.

    Attributes:
        session: What is known of the model; counts the steps.
        wishes: The keywords, as they are for this process.
        args: The model's positional arguments, or a loader or chunks of them.
        kwargs: Its keyword arguments.
        begin: When the fit began, in seconds; the time before it was resumed included.
        origin: The parameters with which it began.
        checkpoint: The checkpoint, which has been held against the call; None where there is none.
        together: The other processes; None where there are none.
    """

    session: Session
    wishes: FitWishes
    args: tuple
    kwargs: dict[str, Any]
    begin: float
    origin: Origin
    checkpoint: Checkpoint | None = None
    together: Together | None = None
