"""Markov loops whose body runs a few times whatever their length.

    0, …, h − 1, arange(0, T − h), arange(1, T − h + 1), …, arange(h, T)

are the indices of a loop of T steps and history h: integers for the first steps, then index tensors.
At the last one every value that the body carries along is that of the step before, element by
element; the runs between only make these values, and what they observe does not count.

Outside this library's own looks at a model the loop is an ordinary ``pyro.markov`` over integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro
import torch
from pyro.ops.provenance import get_provenance
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.markov_messenger import MarkovMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_em.arguments import whole
from pyro_em.distributions import unwrap
from pyro_em.errors import UsageError, message
from pyro_em.tracing.loops import (
    EARLIER,
    PLAIN,
    Loop,
    NotVectorized,
    Place,
    Series,
    current_series,
)
from pyro_em.tracing.per_step import Index, PerStep, device_of, placed
from pyro_em.tracing.provenance import Tagged
from pyro_em.tracing.sites import is_latent


class vectorized_markov:
    """A Markov chain whose loop body runs 2·history + 1 times whatever its length.

    It takes the place of ``pyro.markov(range(size), history=history)``. When `ExactPosteriorEM`
    looks at a model, the body runs with the integers 0, …, history − 1 and then with index tensors
    arange(i, size − history + i), i = 0, …, history; in the last of these runs a value that is
    carried along (``z_prev = z``) is that of the step before, at every step at once. An index
    tensor means what an integer means at each step: ``x[t]``, ``A[t, z_prev]``, ``t < lengths``,
    ``t == 0``, f"z_{t}", ``(t < lengths).unsqueeze(-1)``. Anywhere
    else (a call of the model, ``Predictive``, ``SVI``), and where ``size <= history``, it is an
    ordinary ``pyro.markov`` loop over integers. Sites are known as those of the
    loop: ``z_0``, ``z_1``, …

    A body that needs an integer (``int(t)``, ``if t > 3``, a list's index), or decides something by
    the numbers of a step (``if x[t].max() > c``), is read as a loop, and a note on the plan says
    why. Decide by what goes into a site, not by what ``pyro.sample`` returns for an observed one:
    that is noticed where it matters at one of some sixty steps, which are held against integers.

    Args:
        name: A name of its own among the loops of the model.
        size: The number of steps T.
        dim: The dimension of the steps, negative, for a body that lays out index tensors itself;
            left of all plates where None.
        history: How many steps back the body reads.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from torch.distributions import constraints
        >>> from pyro_em import ExactPosteriorEM, vectorized_markov
        >>> def model(x):
        ...     A = pyro.param(
        ...         "A", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex)
        ...     rate = pyro.param("rate", torch.tensor([1.0, 6.0]), constraint=constraints.positive)
        ...     z = 0
        ...     for t in vectorized_markov("time", len(x)):
        ...         z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        ...         pyro.sample(f"x_{t}", dist.Poisson(rate[z]), obs=x[t])
        >>> pyro.clear_param_store()
        >>> q = ExactPosteriorEM(model).posterior(torch.tensor([0.0, 1.0, 7.0, 8.0, 1.0]))
        >>> q.probs("z_3").round(decimals=3)
        tensor([0., 1.])
        >>> pyro.clear_param_store()

    Source: the meaning is that of ``pyro.contrib.funsor.vectorized_markov``.
    """

    def __init__(self, name: str, size: int, dim: int | None = None, history: int = 1) -> None:
        if not isinstance(name, str) or not name:
            raise UsageError(message("vectorized_markov", f"name={name!r} is no name."))
        size = whole("vectorized_markov", "size", size, None)
        history = whole("vectorized_markov", "history", history, None)
        if size < 0 or history < 0:
            raise UsageError(
                message(
                    "vectorized_markov",
                    f"size={size} and history={history} are numbers of steps.",
                    fixes=["pass numbers of at least zero"],
                )
            )
        if dim is not None and whole("vectorized_markov", "dim", dim, None) >= 0:
            raise UsageError(
                message(
                    "vectorized_markov",
                    f"dim={dim} counts from the left.",
                    "dimensions of plates count from the right",
                    ["pass -1, -2, …, or leave it out"],
                )
            )
        self.name, self.size, self.dim, self.history = name, size, dim, history

    def __iter__(self) -> Iterator[Any]:
        series = current_series.get()
        if series is not None and series.steps is not None:
            if self.name not in series.steps:
                raise NotVectorized(f"loop '{self.name}' is not in every run")
            within = _Within(series, self.name)
            with within:
                for within.now in series.steps[self.name]:
                    yield within.now
        elif series is None or self.size <= self.history or self.history == 0:
            yield from pyro.markov(range(self.size), history=self.history)
        else:
            yield from self._over_indices(series)

    def _over_indices(self, series: Series) -> Iterator[Any]:
        loop = series.enter(self.name, self.size, self.history)
        with _Inside(series, loop):
            for t in range(self.history):
                loop.step, loop.shift = t, None
                yield t
            used = max((-d for d in loop.plates), default=0)
            loop.dim = -1 - used
            if series.way == PLAIN and self.dim is not None:
                loop.dim = self.dim
            for shift in range(-1 if series.disturbed else 0, self.history + 1):
                loop.shift = shift
                steps = loop.steps() + max(shift, 0)
                if shift < 0:
                    generator = torch.Generator().manual_seed(17)
                    order = torch.randperm(loop.rest, generator=generator)
                    steps = Tagged(steps[order], frozenset({EARLIER}))
                yield Index.of(steps, series, loop, _token(loop))
        series.leave(loop)


class _Within(Messenger):
    """Notes at which step of a loop over chosen integers each site is met."""

    def __init__(self, series: Series, name: str) -> None:
        super().__init__()
        self.series, self.name, self.now = series, name, 0

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not site_is_subsample(msg):
            self.series.places[msg["name"]] = Place(self.name, self.now, None, msg["name"])


class _Inside(Messenger):
    """What the body of a loop samples: its place, its dimension of steps, and whether it counts."""

    def __init__(self, series: Series, loop: Loop) -> None:
        super().__init__()
        self.series, self.loop = series, loop
        if any(isinstance(m, _Inside | MarkovMessenger) for m in _PYRO_STACK):
            raise NotVectorized(f"loop '{loop.name}' is inside another one")

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        if self.loop.shift is not None and _token(self.loop) in msg["name"]:
            raise NotVectorized("every step has a parameter of its own")

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if site_is_subsample(msg):
            return
        loop, name = self.loop, msg["name"]
        if loop.shift is None:
            return
        if any(f.name == loop.name for f in msg["cond_indep_stack"]):
            raise NotVectorized(f"a plate is called '{loop.name}' as well")
        before, token, after = name.partition(_token(loop))
        if not token or _token(loop) in after:
            raise NotVectorized(f"the name of site '{name}' does not show its step once")
        place = Place(loop.name, None, loop.shift, before, after)
        self.series.places[name] = place
        msg["value"] = placed(msg["value"])
        device = device_of((msg["value"], *vars(msg["fn"]).values()))
        for part in ("mask", "scale"):
            msg[part] = placed(msg[part], device=device)
        _place_arguments(msg["fn"])
        frame = CondIndepStackFrame(loop.name, loop.dim, loop.rest, 0)
        msg["cond_indep_stack"] = (frame, *msg["cond_indep_stack"])
        BroadcastMessenger._pyro_sample(msg)  # type: ignore[arg-type]
        if self.series.is_known and loop.shift < loop.history and not _has_latents(msg):
            msg["stop"] = True  # its value is carried on, and nothing else of it is of use

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        """Only now do all plates around the site show, also those around the loop."""
        if site_is_subsample(msg):
            return
        loop = self.loop
        frames = [f for f in msg["cond_indep_stack"] if f.name != loop.name]
        if any(f.dim is None for f in frames):
            raise NotVectorized(f"site '{msg['name']}' is in a plate that is a loop")
        if loop.shift is not None:
            if loop.shift < 0 and isinstance(msg["value"], Tensor):
                value = msg["value"]
                tags = get_provenance(value) | {EARLIER}
                msg["value"] = Tagged(getattr(value, "_t", value), tags)
            if any(f.dim == loop.dim or f.size != loop.plates.get(f.dim) for f in frames):
                raise NotVectorized(
                    f"the plates of site '{msg['name']}' are not those of the first steps"
                )
            return
        self.series.places[msg["name"]] = Place(loop.name, loop.step, None, msg["name"])
        event = msg["fn"].event_shape
        loop.events = max(loop.events, len(event))
        sizes = (*(f.size for f in frames), *event)
        self.series.by_numbers |= loop.rest > 1 and loop.rest in sizes
        for frame in frames:
            loop.plates[frame.dim] = frame.size


def _has_latents(msg: Any) -> bool:
    """Whether a site is a latent, or a mixture, of which a component may be made one."""
    return is_latent(msg) or type(unwrap(msg["fn"])[0]).__name__ == "MixtureSameFamily"


def _token(loop: Loop) -> str:
    return f"<{loop.name}+{loop.shift}>"


def _place_arguments(fn: Any) -> None:
    """Plain tensors in place of those that know their steps."""
    for name, value in vars(fn).items():
        if isinstance(value, PerStep):
            setattr(fn, name, placed(value))
        elif isinstance(value, torch.distributions.Distribution):
            _place_arguments(value)
