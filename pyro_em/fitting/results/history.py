"""What a fit leaves of its way: why it ended, its bounds, its steps and its parameters by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyro_em.globs import listed, matching, stacked_answers
from pyro_em.portable import Copied, Portable, answered

if TYPE_CHECKING:
    from pyro_em.posteriors.answers.posterior import Posterior


class EMStatus(Enum):
    """Why a fit ended; each value is the sentence that a user reads."""

    CONVERGED = "The estimated remaining gain is below tol."
    ROUNDING = (
        "Two successive gains are within rounding of the objective: nothing more is gained from "
        "here (a maximum, or a saddle)."
    )
    MAX_STEPS = "The given number of steps was run."
    INTERRUPTED = "The fit was interrupted; the parameters are those of the last complete step."
    STOPPED = "A callback asked to stop."
    DEGENERATE = (
        "An update was degenerate and was rolled back; the parameters are good ones from before it."
    )
    UNBOUNDED = (
        "The objective rises without end along a parameter: there is no maximum, and its value is no "
        "estimate."
    )
    SYMMETRIC = (
        "The components are exchangeable at this point and cannot separate: "
        "start elsewhere (init='random')."
    )
    STEPS_DONE = "All steps of the stochastic fit were done; no rule of convergence was given."
    FELL = "The objective fell by more than rounding; the parameters before the fall were kept."


@dataclass(frozen=True)
class History(Sequence[float]):
    """The bound at the parameters *entering* each step; ``after_m_step`` holds the other half.

    In a stochastic fit it is the bound of each step's batch, scaled to all data; ``validation``
    holds (step, bound) after each epoch.

    Attributes:
        entering: In nats, one per step.
        after_m_step: ELBO(q, θ_new) after the M-step of each, in nats; empty in a stochastic fit. What
            is integrated in a block (Gaussian and conjugate latents) has its posterior at θ_new there
            where the step says so at no cost: the bound is then between ELBO(q, θ_new) and the next
            evidence. An extrapolated point that was not kept has no M-step, and its bound again.
        validation: Steps with the bound of the validation data, in nats.

    Example:
        >>> h = History((-10.0, -9.0), (-9.5, -8.9))
        >>> h[0], h.after_m_step[0], len(h)
        (-10.0, -9.5, 2)
    """

    entering: tuple[float, ...]
    after_m_step: tuple[float, ...] = ()
    validation: tuple[tuple[int, float], ...] = ()

    def __repr__(self) -> str:
        if not self.entering:
            return "History(no steps)"
        first, last = self.entering[0], self.entering[-1]
        return f"History({len(self.entering)} steps, from {first:.6f} to {last:.6f})"

    def __getitem__(self, i: Any) -> Any:
        return self.entering[i]

    def __len__(self) -> int:
        return len(self.entering)

    def __iter__(self) -> Iterator[float]:
        return iter(self.entering)


class Params(dict[str, Tensor]):
    """Constrained values by parameter name; a point-estimated site's own name works too.

    A glob stacks several of one shape along a new first dimension, in natural order.

    Example:
        >>> import torch
        >>> Params({"AutoDelta.rate": torch.tensor(2.0)}, {"rate": "AutoDelta.rate"})["rate"]
        tensor(2.)
    """

    def __init__(self, values: Mapping[str, Tensor], sites: Mapping[str, str] | None = None):
        super().__init__(values)
        self.sites = dict(sites or {})

    def __missing__(self, name: str) -> Tensor:
        if name in self.sites:
            return self[self.sites[name]]
        names = (*self, *self.sites)
        found = matching(name, names) if isinstance(name, str) else []
        if found:
            return stacked_answers(f"'{name}'", found, self.__getitem__)
        raise KeyError(f"no parameter is called {name!r}; the model has: {listed(names)}")


@dataclass(frozen=True, eq=False)
class EMStep(Portable):
    """One step of EM, as ``steps`` yields it and callbacks receive it.

    Attributes:
        index: 0 for the first.
        elbo: The bound at the parameters entering the step, after its E-step.
        log_evidence: log p(x; θ) where the E-step computed it.
        after_m_step: The bound ELBO(q, θ_new) after the M-step; None in a stochastic step.
        made_params: Gives the constrained parameters after the M-step.
        seconds: Since the loop began.
        e_step: Gives the q of this step's E-step; None in a stochastic step.
        validation: (step, bound) of the held-out data when it was last taken: after that many steps,
            at the end of an epoch; None before.
    """

    index: int
    elbo: float
    log_evidence: float | None
    after_m_step: float | None
    made_params: Callable[[], Mapping[str, Tensor]] = field(repr=False)
    seconds: float
    e_step: Callable[[], Posterior] | None = field(default=None, repr=False)
    validation: tuple[int, float] | None = None

    def _travelling(self) -> dict[str, Any]:
        e_step = None if self.e_step is None else answered(self.e_step)
        return {**vars(self), "e_step": e_step, "made_params": answered(self.made_params)}

    def _staying(self) -> dict[str, Any]:
        e_step = None if self.e_step is None else Copied(self.e_step)
        return {**vars(self), "e_step": e_step, "made_params": Copied(self.made_params)}

    @cached_property
    def params(self) -> Mapping[str, Tensor]:
        """Constrained parameters after the M-step, by name."""
        return self.made_params()

    @property
    def posterior(self) -> Posterior | None:
        """The q of this step's E-step, made when it is asked for; None in a stochastic step."""
        return None if self.e_step is None else self.e_step()
