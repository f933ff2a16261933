"""What a user asks of ``fit``: its keywords as one value, checked; each refusal is a sentence."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from pyro_em.arguments import check_path, limit, number, seed_of, shown, truth, whole
from pyro_em.errors import UsageError, message
from pyro_em.posteriors.starts.assignments import Start


@dataclass(frozen=True, eq=False)
class FitWishes:
    """The keywords of ``fit``, as checked; see there for what they mean.

    Those from ``batch_size`` to ``schedule`` belong to stochastic fits.
    """

    max_steps: int = 1000
    tol: float = 1e-3
    num_restarts: int = 1
    init: Start = None
    seed: int | None = None
    progress: bool | None = None
    callbacks: tuple[Callable[..., Any], ...] = ()
    acceleration: str | None = None
    batch_size: int | None = None
    num_epochs: int | None = None
    num_data: int | None = None
    validation: Any = None
    schedule: Any = None
    process_group: Any = None
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_every: int | None = None
    resume: bool = True
    on_checkpoint_error: str = "warn"
    online: Any = None

    def passed(self) -> list[str]:
        """Names of the keywords that are not at their defaults."""
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        return [n for n, (value, default) in values.items() if not _is_default(value, default)]

    def stochastic(self) -> list[str]:
        """Names of the keywords that were given and belong to stochastic fits."""
        own = () if self.online is None else ("num_epochs", "validation")  # of online EM, too
        return [n for n in _STOCHASTIC if n not in own and getattr(self, n) is not None]


ACCELERATIONS = ("auto", "quasi-newton", "squarem")

_STOCHASTIC = ("batch_size", "num_epochs", "num_data", "validation", "schedule")


def _is_default(value: Any, default: Any) -> bool:
    if default is None:
        return value is None
    return bool(value == default)  # a number, or a tuple of functions


FIT_KEYWORDS = tuple(f.name for f in fields(FitWishes))


def fit_wishes(**given: Any) -> FitWishes:
    """What a user passed to ``fit``, checked as far as no model is needed.

    Args:
        **given: The keywords by name.

    Raises:
        UsageError: With the argument's name.
    """
    w = FitWishes(**given)
    max_steps, tol, num_restarts, num_epochs, batch_size, seed = fit_numbers(
        w.max_steps, w.tol, w.num_restarts, w.num_epochs, w.batch_size, w.seed
    )
    check_init(w.init)
    if w.progress is not None:
        truth("fit", "progress", w.progress)
    callbacks = as_callbacks(w.callbacks)
    check_fit(max_steps, tol, num_restarts, w.acceleration, num_epochs)
    every = check_checkpoint(w)
    return replace(
        w,
        checkpoint_every=every,
        max_steps=max_steps,
        tol=tol,
        num_restarts=num_restarts,
        num_epochs=num_epochs,
        batch_size=batch_size,
        seed=seed,
        callbacks=callbacks,
    )


def check_acceleration(acceleration: str | None, exact_map: bool) -> None:
    """Refuse to extrapolate along steps that are not those of exact EM."""
    if acceleration is not None and not exact_map:
        raise UsageError(
            message(
                "fit",
                f"acceleration={acceleration!r} needs exact EM steps.",
                "it extrapolates along the map θ → EM(θ), and a strategy other than 'exact', an update "
                "by an optimiser, or a guide that draws, is not that map",
                ["leave acceleration out", "use strategy='exact' and no torch optimiser"],
            )
        )


def fit_numbers(
    max_steps: Any, tol: Any, num_restarts: Any, num_epochs: Any, batch_size: Any, seed: Any
) -> tuple[int, float, int, int | None, int | None, int | None]:
    """The numbers of a fit as Python's own; what is no number is refused.

    Raises:
        UsageError: With the argument's name.
    """
    return (
        limit("fit", "max_steps", max_steps),
        number("fit", "tol", tol),
        whole("fit", "num_restarts", num_restarts, None),
        None if num_epochs is None else whole("fit", "num_epochs", num_epochs, None),
        None if batch_size is None else whole("fit", "batch_size", batch_size, None),
        seed_of("fit", seed),
    )


def check_init(init: Any) -> None:
    """Refuse what can be no start: labels without the name of their latent."""
    named = isinstance(init, Mapping) and all(isinstance(k, str) for k in init)
    if init is None or isinstance(init, str) or named:
        return
    raise UsageError(
        message(
            "init",
            f"{shown(init)} is not understood.",
            "labels and probabilities belong to a latent by its name",
            [
                "pass {site: labels or probabilities}: init={'z': labels}",
                "use None, 'random', 'kmeans' or 'random points'",
            ],
        )
    )


def as_callbacks(callbacks: Any) -> tuple[Callable[..., Any], ...]:
    """One function, several or none, as a tuple.

    Raises:
        UsageError: If something cannot be called.
    """
    if callable(callbacks) or callbacks is None:
        return () if callbacks is None else (callbacks,)
    several = tuple(callbacks) if isinstance(callbacks, Iterable) else (callbacks,)
    if all(callable(c) for c in several):
        return several
    raise UsageError(
        message(
            "fit",
            "callbacks holds something that cannot be called.",
            fixes=["pass a list of functions of one EMStep: callbacks=[watch]"],
        )
    )


def check_fit(
    max_steps: int,
    tol: float,
    num_restarts: int,
    acceleration: str | None,
    num_epochs: int | None,
) -> None:
    """Refuse numbers that mean nothing."""
    if acceleration is not None and acceleration not in ACCELERATIONS:
        raise UsageError(
            message(
                "fit",
                f"acceleration={acceleration!r} is not available.",
                fixes=["use 'auto', 'quasi-newton' or 'squarem', or leave it out"],
            )
        )
    if max_steps < 0 or tol < 0 or num_restarts < 1 or math.isnan(tol):
        raise UsageError(
            message(
                "fit",
                f"max_steps={max_steps}, tol={tol}, num_restarts={num_restarts}.",
                "max_steps and tol cannot be negative, num_restarts is at least one",
            )
        )
    if num_epochs is not None and num_epochs < 1:
        raise UsageError(
            message(
                "fit",
                f"num_epochs={num_epochs} would change nothing.",
                fixes=["pass at least 1, or leave it out and set max_steps"],
            )
        )


def check_checkpoint(w: FitWishes) -> int | None:
    """The number of steps from one checkpoint to the next, where the user gave one.

    Raises:
        UsageError: If an option of checkpoints is not understood, or there is no file for it.
    """
    truth("fit", "resume", w.resume)
    if w.on_checkpoint_error not in ("warn", "raise"):
        raise UsageError(
            message(
                "fit",
                f"on_checkpoint_error={shown(w.on_checkpoint_error)} is not understood.",
                "a checkpoint that cannot be written is said in a warning, or ends the fit",
                ["use 'warn' or 'raise'"],
            )
        )
    if w.checkpoint is not None:
        check_path("fit", w.checkpoint)
    elif w.checkpoint_every is not None:
        raise UsageError(
            message(
                "fit",
                f"checkpoint_every={shown(w.checkpoint_every)} was given without checkpoint.",
                "nothing says which file is to be written",
                ["name it: fit(..., checkpoint='run.pt')"],
            )
        )
    if w.checkpoint_every is None:
        return None
    return whole("fit", "checkpoint_every", w.checkpoint_every)


def refuse_stochastic_keywords(wishes: FitWishes, has_guide: bool = False) -> None:
    """An exact fit uses all data at every step.

    Args:
        wishes: The keywords of the fit.
        has_guide: Whether there is a guide that could draw the latents.
    """
    names = wishes.stochastic()
    if names:
        raise UsageError(
            message(
                "fit",
                f"{', '.join(names)}: an exact fit uses all data at every step.",
                "these arguments belong to stochastic objectives, where a guide draws latents",
                [
                    "leave them out",
                    *(["let the guide draw the latents: strategy='guide'"] if has_guide else []),
                    "for batches on the exact evidence: "
                    "SVI(model, guide, optim, loss=TraceExact_ELBO())",
                ],
            )
        )


def refuse_exact_keywords(init: Any, num_restarts: int, acceleration: str | None) -> None:
    """A stochastic fit starts where the guide and the model are, and has no EM steps."""
    check_acceleration(acceleration, False)
    given = (["init"] if init is not None else []) + (["num_restarts"] if num_restarts > 1 else [])
    if given:
        raise UsageError(
            message(
                "fit",
                f"{', '.join(given)}: a stochastic fit starts at the present parameters.",
                "these arguments make starts for exact EM",
                ["leave them out", "set initial values in model and guide, or torch.manual_seed"],
            )
        )
