"""Markov loops whose body runs a few times whatever their length.

    0, …, h − 1, arange(0, T − h), arange(1, T − h + 1), …, arange(h, T)

are the indices of a loop of T steps and history h: integers for the first steps, then index tensors.
At the last one every value that the body carries along is that of the step before, element by
element; the runs between only make these values, and what they observe does not count.

Outside this library's own looks at a model the loop is an ordinary ``pyro.markov`` over integers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from pyro.ops.provenance import get_provenance
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.markov_messenger import MarkovMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_em.arguments import whole
from pyro_em.errors import UsageError, message
from pyro_em.tracing.each_step import REDUCING, SHAPING, reduced, shaped
from pyro_em.tracing.provenance import Tagged
from pyro_em.tracing.sites import is_latent

ALIGNED, EVENTS, PLAIN = "aligned", "events", "plain"

_FEW = 61  # steps of a long loop whose looks go by values

EARLIER = "<earlier>"  # the tag of what comes from steps before those that a step may read

_series: ContextVar[Series | None] = ContextVar("series", default=None)


class NotVectorized(BaseException):
    """A body that no index tensor can serve; says why. No `Exception`: a model might catch those."""


@dataclass(frozen=True)
class Place:
    """Where in a loop a site was met.

    Attributes:
        loop: The loop's name.
        first: The step, where it was an integer; else None.
        shift: Of an index tensor arange(shift, …); else None.
        before: The name up to the index; of an integer step the whole name.
        after: The name after it.
    """

    loop: str
    first: int | None
    shift: int | None
    before: str
    after: str = ""

    def at(self, t: int) -> str:
        """The site's name at a step."""
        return f"{self.before}{t}{self.after}"


@dataclass(eq=False)
class Loop:
    """One loop as a run met it.

    Attributes:
        name: As given; the name of its plate.
        size: Its steps.
        history: How many steps back its body reads.
        dim: The dimension of its steps, from the right.
        plates: Sizes of the plates of its first steps, by dimension.
        events: The most event dimensions that a site of its first steps has.
        shift: Of the run that is made now; None at an integer.
        step: The integer of the run that is made now.
        is_done: Whether its last run came to an end.
        chosen: The later steps that are looked at, counted from the first of them; None for all.
    """

    name: str
    size: int
    history: int
    dim: int = 0
    plates: dict[int, int] = field(default_factory=dict)
    events: int = 0
    shift: int | None = None
    step: int = 0
    is_done: bool = False
    chosen: Tensor | None = None

    @property
    def rest(self) -> int:
        """How many steps the index tensors have."""
        return self.size - self.history if self.chosen is None else len(self.chosen)

    def steps(self) -> Tensor:
        """The later steps that index tensors have, counted from the first of them."""
        return torch.arange(self.rest) if self.chosen is None else self.chosen

    def place(self, t: int) -> int:
        """Where a later step is in index tensors."""
        if self.chosen is None:
            return t - self.history
        return int(torch.searchsorted(self.chosen, t - self.history))

    @property
    def form(self) -> tuple[int, int, int]:
        """What must be the same in every run."""
        return self.size, self.history, self.dim


@dataclass(eq=False)
class Series:
    """The loops of a model's runs, while they run over index tensors.

    Attributes:
        way: `ALIGNED`: an index has the meaning that an integer would have at each step, and steps
            are the leftmost dimension; `EVENTS`: the same, and the last dimensions of what it looks
            up are those of an event, even where they may be a plate's; `PLAIN`: it is a tensor of
            one dimension like any other, and steps are where the model says.
        few: Whether part of the steps of a long loop will do.
        is_known: Whether it is known what carries values on: no other site is shown that does not
            count.
        steps: Integers to run over instead, by loop.
        disturbed: Whether the body runs once more, over steps out of order, before the runs that
            carry values on, and all that it computes is tagged: what counts must not notice.
        loops: By name.
        places: Of the sites inside, by name.
        by_numbers: Whether sizes did not tell how something is laid out: numbers have to.
        is_hopeless: Whether the body decides something for all steps at once, so that no way of
            reading indices serves.
    """

    way: str = ALIGNED
    few: bool = False
    is_known: bool = False
    steps: Mapping[str, tuple[int, ...]] | None = None
    disturbed: bool = False
    loops: dict[str, Loop] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    by_numbers: bool = False
    is_hopeless: bool = False
    _run: Any = None
    _met: set[str] = field(default_factory=set)

    @property
    def was_met(self) -> set[str]:
        """Names of the loops that the last run has begun."""
        return self._met

    def enter(self, name: str, size: int, history: int) -> Loop:
        """A loop begins."""
        run = next((m for m in _PYRO_STACK if isinstance(m, TraceMessenger)), None)
        if run is not self._run or run is None:
            self._run, self._met = run, set()
        if name in self._met:
            raise NotVectorized(f"two loops are called '{name}'")
        self._met.add(name)
        loop = Loop(name, size, history)
        if self.few and loop.rest > 4 * _FEW:
            ends, third = loop.rest - 1, _FEW // 3
            inner = torch.linspace(third, ends - third, _FEW - 2 * third).long()
            first = torch.arange(third)
            loop.chosen = torch.cat([first, inner, ends - first.flip(0)])
        return loop

    @property
    def is_cut(self) -> bool:
        """Whether part of the steps of any loop was looked at."""
        return any(loop.chosen is not None for loop in self.loops.values())

    def leave(self, loop: Loop) -> None:
        """A loop ends."""
        loop.is_done = True
        known = self.loops.setdefault(loop.name, loop)
        if known.form != loop.form:
            raise NotVectorized(f"loop '{loop.name}' differs from run to run")

    def require_ends(self) -> None:
        """Refuse a loop that was left before its end."""
        left = [n for n in self._met if n not in self.loops]
        if left:
            raise NotVectorized(f"loop '{left[0]}' was left before its end")


@contextmanager
def vectorizing(series: Series | None) -> Iterator[None]:
    """A block in which loops run over index tensors, as ``series`` says; over integers where None."""
    token = _series.set(series)
    try:
        yield
    finally:
        _series.reset(token)


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

    A body that needs an integer (``int(t)``, ``if t > 3``, a list's index) is read as a loop, and a
    note on the plan says why.

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
        series = _series.get()
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
        device = _device_of((msg["value"], *vars(msg["fn"]).values()))
        for part in ("mask", "scale"):
            msg[part] = placed(msg[part], device=device)
        _place_arguments(msg["fn"])
        frame = CondIndepStackFrame(loop.name, loop.dim, loop.rest, 0)
        msg["cond_indep_stack"] = (frame, *msg["cond_indep_stack"])
        BroadcastMessenger._pyro_sample(msg)  # type: ignore[arg-type]
        if self.series.is_known and loop.shift < loop.history and not is_latent(msg):
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


def _token(loop: Loop) -> str:
    return f"<{loop.name}+{loop.shift}>"


def _place_arguments(fn: Any) -> None:
    """Plain tensors in place of those that know their steps."""
    for name, value in vars(fn).items():
        if isinstance(value, PerStep):
            setattr(fn, name, placed(value))
        elif isinstance(value, torch.distributions.Distribution):
            _place_arguments(value)


# ---------------------------------------------------------------- tensors that know their steps


def _words(names: str) -> frozenset[str]:
    return frozenset(names.split())


_SHOWN = _words("size dim ndimension numel __len__ stride is_floating_point get_device")


# A body that lays an index out itself takes it for a tensor of one dimension.
_LAID_OUT = _words("unsqueeze reshape view expand flatten squeeze tolist numpy")


_BY_ELEMENT = _words("""
    add sub rsub mul div true_divide floor_divide remainder fmod pow neg abs exp log sqrt sin cos
    tanh sigmoid eq ne lt le gt ge float double long int to clamp minimum maximum floor ceil round
    logical_and logical_or logical_not square where bool bitwise_and bitwise_or bitwise_not
    isnan isfinite isinf nan_to_num log1p expm1 rsqrt sign
    __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __floordiv__ __mod__
    __pow__ __rpow__ __neg__ __abs__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __or__
    __invert__ __rfloordiv__ __rmod__
    """)


# Of whole numbers they are whole numbers, or truth values.
_WHOLE = _words("""
    add radd sub rsub mul rmul floordiv floor_divide rfloordiv mod rmod remainder fmod pow neg abs eq
    ne lt le gt ge long int clamp minimum maximum logical_and logical_or logical_not square where
    bool and or invert bitwise_and bitwise_or bitwise_not floor ceil round to
    """)


# What mixes the steps with other dimensions, or goes through them.
_MOVES_STEPS = _words("""
    nonzero argwhere unique flatten ravel masked_select __iter__ unbind split chunk tolist
    """)


_NUMBERS = _words("item __int__ __float__ __index__ __complex__")


class PerStep(Tensor):
    """A tensor per step. It is laid out beside plates where it meets other tensors.

    Attributes:
        raw: Steps first. # (steps, *shape of one step)
        series: How indices are read.
        loop: Whose steps.
        is_number: Whether it is made of steps and numbers of Python alone, which leave the dtype
            of a tensor as it is.
    """

    raw: Tensor
    series: Series
    loop: Loop
    is_number: bool

    @classmethod
    def of(cls, raw: Tensor, series: Series, loop: Loop, is_number: bool = False) -> Tensor:
        """A tensor per step, from one whose first dimension is that of steps."""
        shown = _laid_out(raw, series, loop)
        out = getattr(shown, "_t", shown).as_subclass(PerStep)
        out.raw, out.series, out.loop, out.is_number = raw, series, loop, is_number
        return out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation with the meaning that it has at each step."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        own = _first((*args, *kwargs.values()))
        assert own is not None
        if _series.get() is None:  # kept by the model, and looked at when no loop runs
            return _as_plain(func, args, kwargs, own)
        if name == "__get__":
            shown = own.raw if isinstance(own, Index) else placed(own)
            out = func(shown)
            return (
                out if not isinstance(out, Tensor) or isinstance(own, Index) else func(placed(own))
            )
        if name in _NUMBERS:
            raise NotVectorized("the body makes a number of Python of its index")
        if name == "__bool__":
            return _decided(own)
        if name in _SHOWN:
            return func(own.raw if isinstance(own, Index) else placed(own), *args[1:], **kwargs)
        if name == "__getitem__" and own.series.way != PLAIN:
            return _looked_up(args[0], args[1], own.series, own.loop)
        if isinstance(own, Index) and (own.series.way == PLAIN or name in _LAID_OUT):
            return _as_plain(func, args, kwargs, own)
        if args and args[0] is own and own.series.way != PLAIN:
            if name == "unbind" and not any(args[1:]) and not kwargs and own.raw.dim() > 1:
                return tuple(PerStep.of(r, own.series, own.loop) for r in own.raw.unbind(1))
            raw = _at_each_step(func, name, own, args[1:], kwargs)
            if raw is not None:
                return PerStep.of(raw, own.series, own.loop)
        if name in _BY_ELEMENT and all(_is_per_step(a, own) for a in (*args, *kwargs.values())):
            return _by_element(func, args, kwargs, own)
        given = (*args, *kwargs.values())
        dtype = _dtype_of(given) or torch.get_default_dtype()
        events = _events_beside(given, own) if name in _BY_ELEMENT else None
        how = dtype, events, _device_of(given)
        out = func(*_mapped(args, *how), **{k: _mapped(a, *how) for k, a in kwargs.items()})
        if own.series.way != PLAIN and _is_of_all_steps(name, out, own.loop):
            own.series.is_hopeless = True
            raise NotVectorized(
                f"the body calls '{name}' on what one step reads: index tensors hold all steps"
            )
        return out


class Index(PerStep):
    """The steps themselves, or whole numbers made of them: of one dimension, and with a short name."""

    token: str | None

    @classmethod
    def of(  # type: ignore[override]
        cls, raw: Tensor, series: Series, loop: Loop, token: str | None = None
    ) -> Index:
        """An index tensor. # (steps,)"""
        out = getattr(raw, "_t", raw).as_subclass(Index)
        out.raw, out.series, out.loop, out.token = raw, series, loop, token
        out.is_number = True
        return out

    def __format__(self, spec: str) -> str:
        if spec == "":
            return str(self)
        if _series.get() is None:
            return format(self.raw, spec)
        raise NotVectorized("the name of a site gives its step in a format of its own")

    def __str__(self) -> str:
        if _series.get() is None:
            return str(self.raw)
        if self.token is None or self.series.loops.get(self.loop.name, self.loop) is None:
            raise NotVectorized("a name is made of a number that is computed from the step")
        return self.token

    __repr__ = __str__

    def __hash__(self) -> int:
        if _series.get() is not None:
            raise NotVectorized("the body looks its index up in a dict or set")
        return id(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.raw.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.raw.clone()


def _first(values: Any) -> PerStep | None:
    """The first tensor per step among the arguments of an operation."""
    for v in values:
        if isinstance(v, PerStep):
            return v
        if isinstance(v, (tuple, list)):
            found = _first(v)
            if found is not None:
                return found
        elif isinstance(v, slice) and _first((v.start, v.stop, v.step)) is not None:
            raise NotVectorized("the body takes a slice that ends at its index")
    return None


def _is_of_all_steps(name: str, out: Any, loop: Loop) -> bool:
    """Whether a result is one for all steps, which a body could branch on."""
    if name in _MOVES_STEPS:
        return True
    if isinstance(out, (tuple, list)):
        return any(_is_of_all_steps(name, o, loop) for o in out)
    if isinstance(out, Tensor):
        places = out.shape[
            : max(0, out.dim() + loop.dim + 1)
        ]  # further left by dimensions of events
        has_steps = any(n in (1, loop.rest) for n in places)
        return not (has_steps or name.startswith("_"))
    shows = name.startswith(("is_", "_is_")) and name != "is_nonzero"
    return isinstance(out, (int, float, np.ndarray)) and not shows


def _at_each_step(
    func: Any, name: str, own: PerStep, how: Sequence[Any], by_name: dict[str, Any]
) -> Tensor | None:
    """An operation that counts the dimensions of one step; None for any other."""
    if name in SHAPING and not by_name:
        out = shaped(name, own.raw, how, -own.loop.dim)
        if out is None and name in ("view", "reshape") and own.loop.rest not in _flat(how):
            own.series.is_hopeless = True
            raise NotVectorized("the body gives what a step reads another shape")
        return out
    return reduced(func, own.raw, how, by_name) if name in REDUCING else None


def _flat(how: Sequence[Any]) -> Sequence[Any]:
    return how[0] if len(how) == 1 and isinstance(how[0], (tuple, list)) else how


def _is_per_step(value: Any, own: PerStep) -> bool:
    """Whether a value is one per step, or the same at all of them.

    A plain tensor has no dimension of steps where it has too few dimensions for it.
    """
    if isinstance(value, Tensor) and not isinstance(value, PerStep):
        return own.series.way != PLAIN and value.dim() < -own.loop.dim
    return value is None or isinstance(value, (PerStep, int, float, bool, torch.dtype))


def _by_element(func: Any, args: Any, kwargs: Any, own: PerStep) -> Any:
    given = (*args, *kwargs.values())
    most = max(
        v.raw.dim() if isinstance(v, PerStep) else v.dim() + 1
        for v in given
        if isinstance(v, Tensor)
    )

    def plain(v: Any) -> Any:
        if not isinstance(v, PerStep):
            return v
        raw = v.raw.reshape(v.raw.shape[0], *(1,) * (most - v.raw.dim()), *v.raw.shape[1:])
        if not v.is_number:
            return raw
        if numbers:  # of Python: in double precision until they meet a tensor
            return raw.to(torch.float64) if raw.dtype == torch.int64 and real else raw
        raw = _of_dtype(raw, dtype)
        return raw if device is None else raw.to(device)

    numbers = all(isinstance(v, PerStep) and v.is_number for v in given if isinstance(v, Tensor))
    real = func.__name__.strip("_") not in _WHOLE or any(isinstance(v, float) for v in given)
    dtype, device = _dtype_of(given) or torch.get_default_dtype(), _device_of(given)
    out = func(*map(plain, args), **{k: plain(v) for k, v in kwargs.items()})
    if numbers and out.dim() == 1 and not out.is_floating_point():
        return Index.of(out, own.series, own.loop)
    return PerStep.of(out, own.series, own.loop, numbers)


def _as_plain(func: Any, args: Any, kwargs: Any, own: PerStep) -> Any:
    """An operation on the index as a tensor like any other."""

    def plain(v: Any) -> Any:
        if isinstance(v, Index):
            return v.raw
        if isinstance(v, PerStep):
            return placed(v)
        if isinstance(v, (tuple, list)):
            return type(v)(map(plain, v))
        return v

    out = func(*map(plain, args), **{k: plain(v) for k, v in kwargs.items()})
    name = getattr(func, "__name__", "")
    whole_numbers = isinstance(out, Tensor) and out.shape == own.raw.shape
    if whole_numbers and name in _BY_ELEMENT and all(_is_per_step(a, own) for a in args):
        return Index.of(out, own.series, own.loop)
    return out


def _mapped(value: Any, *how: Any) -> Any:
    """Arguments with plain tensors in them."""
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(v, *how) for v in value)
    return placed(value, *how)


def placed(
    value: Any,
    dtype: torch.dtype | None = None,
    events: int | None = None,
    device: torch.device | None = None,
) -> Any:
    """A tensor per step as a plain one, laid out beside the plates; anything else as it is.

    Args:
        value: Anything.
        dtype: Of real numbers that were numbers of Python at each step; the default one if None.
        events: How many dimensions of an event there are to the right of the plates; told by the
            sizes of plates if None.
        device: Where to put it, other than in the processor's memory.
    """
    if not isinstance(value, PerStep):
        return value
    raw = value.raw if device is None else value.raw.to(device)
    if isinstance(value, Index) and value.series.way == PLAIN:
        return raw
    if value.is_number:
        raw = _of_dtype(raw, dtype or torch.get_default_dtype())
    if events is not None and value.series.way != PLAIN:
        right = max(-1 - value.loop.dim + events, raw.dim() - 1)
        return raw.reshape(raw.shape[0], *(1,) * (right - raw.dim() + 1), *raw.shape[1:])
    return _laid_out(raw, value.series, value.loop)


def _device_of(values: Any) -> torch.device | None:
    """The device of the first tensor that has one of its own; None for the processor's memory."""
    for v in values:
        if isinstance(v, Tensor):
            device = v.raw.device if isinstance(v, PerStep) else v.device
            if device.type not in ("cpu", "meta"):
                return device
        elif isinstance(v, (tuple, list)):
            found = _device_of(v)
            if found is not None:
                return found
    return None


def _events_beside(values: Any, own: PerStep) -> int | None:
    """How many dimensions of an event the plain tensors have that an operation meets."""
    loop, series = own.loop, own.series
    tensors = [v for v in values if isinstance(v, Tensor) and not isinstance(v, PerStep)]
    shapes = [tuple(t.shape) for t in tensors if t.dim()]
    if not shapes:
        return None
    sizes = [loop.plates.get(-1 - d, 1) for d in range(-1 - loop.dim)]
    per_step = [v for v in values if isinstance(v, PerStep)]
    found = max(_own_events(v.raw, series, loop) for v in per_step)
    for shape in shapes:
        fitting = [e for e in range(len(shape) + 1) if _fits(shape, e, sizes, loop.rest)]
        wanted = [e for e in fitting if e == loop.events] if series.way == EVENTS else []
        found = max(found, (wanted or fitting)[0])
        if loop.events and len(fitting) > 1 and math.prod(shape) > 1:
            series.by_numbers = True
    return found


def _fits(shape: tuple[int, ...], events: int, plates: list[int], steps: int) -> bool:
    """Whether what is left of so many dimensions of an event may be plates, and then steps."""
    batch = shape[: len(shape) - events][::-1]
    return all(n in (1, size) for n, size in zip(batch, [*plates, steps], strict=False))


def _of_dtype(raw: Tensor, dtype: torch.dtype) -> Tensor:
    return raw.to(dtype) if raw.is_floating_point() and raw.dtype != dtype else raw


def _dtype_of(values: Any) -> torch.dtype | None:
    """The dtype of the first tensor of real numbers among the arguments of an operation."""
    for v in values:
        if isinstance(v, Tensor):
            number = isinstance(v, PerStep) and v.is_number
            if not number and v.is_floating_point():
                return v.dtype
        elif isinstance(v, (tuple, list)):
            found = _dtype_of(v)
            if found is not None:
                return found
    return None


def _laid_out(raw: Tensor, series: Series, loop: Loop) -> Tensor:
    """Steps where their dimension is: plates that one step lacks are of size one."""
    right = -1 - loop.dim + _own_events(raw, series, loop)
    ones = (1,) * (right - raw.dim() + 1)
    return raw.reshape(raw.shape[0], *ones, *raw.shape[1:]) if ones else raw


def _own_events(raw: Tensor, series: Series, loop: Loop) -> int:
    """How many of one step's dimensions belong to an event, as the sizes of plates tell."""
    right, shape = -1 - loop.dim, tuple(raw.shape[1:])
    least = max(0, len(shape) - right)
    if series.way == EVENTS:
        least = max(least, min(loop.events, len(shape)))
    if loop.events and any(n > 1 and n in loop.plates.values() for n in shape):
        series.by_numbers = True  # a plate's, or an event's
    for events in range(least, len(shape) + 1):
        batch = shape[: len(shape) - events]
        sizes = [loop.plates.get(d - len(batch), 1) for d in range(len(batch))]
        if all(n in (1, size) for n, size in zip(batch, sizes, strict=True)):
            break
    return events


def _looked_up(target: Any, index: Any, series: Series, loop: Loop) -> Any:
    """``target[index]`` at each step."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(p, (list, bool)) for p in parts):
        raise NotVectorized("the body indexes with a list")
    tensors = [p for p in parts if isinstance(p, Tensor) and not isinstance(p, PerStep) and p.dim()]
    steps = [i for i, p in enumerate(parts) if isinstance(p, PerStep)]
    if isinstance(target, Index):
        return target.raw[_mapped(index)]
    if isinstance(target, PerStep):
        raw = target.raw
        if not tensors and not steps:
            return PerStep.of(raw[(slice(None), *parts)], series, loop)
        at = _laid_out(torch.arange(len(raw), device=raw.device), series, loop)
        return raw[(at, *map(placed, parts))]
    if any(parts[i].raw.dim() != 1 or parts[i].raw.dtype == torch.bool for i in steps):
        return target[_mapped(index)]
    if tensors:
        return _looked_up_together(target, parts, series, loop)
    if len(steps) > 1:
        if steps != list(range(len(steps))):
            raise NotVectorized("the body indexes with its index in several places")
        return PerStep.of(
            target[tuple(p.raw if isinstance(p, PerStep) else p for p in parts)], series, loop
        )
    (k,) = steps
    at = _to(parts[k].raw, target)
    if k == 0:
        looked = target[(at, *parts[1:])] if len(parts) > 1 else target[at]
        return PerStep.of(looked, series, loop)
    if Ellipsis in parts:
        i = next(i for i, p in enumerate(parts) if p is Ellipsis)
        own = sum(p is not None and p is not Ellipsis for p in parts)
        parts[i : i + 1] = [slice(None)] * (target.dim() - own)
        k = next(i for i, p in enumerate(parts) if isinstance(p, PerStep))
    parts[k] = slice(None)
    dim = sum(p is None or isinstance(p, slice) for p in parts[:k])
    looked = target[tuple(parts)][(*(slice(None),) * dim, at)]
    return PerStep.of(looked.movedim(dim, 0), series, loop)


def _looked_up_together(target: Tensor, parts: list[Any], series: Series, loop: Loop) -> Any:
    """``target[parts]`` at each step, where indices per step stand beside tensors."""
    at = [i for i, p in enumerate(parts) if isinstance(p, Tensor)]
    known = all(isinstance(parts[i], PerStep) or parts[i].dim() < -loop.dim for i in at)
    whole_numbers = all(parts[i].dtype != torch.bool for i in at)
    if series.way == PLAIN or not known or not whole_numbers or at[-1] - at[0] >= len(at):
        return target[tuple(_to(placed(p), target) for p in parts)]
    most = max(parts[i].dim() for i in at if not isinstance(parts[i], PerStep))
    most = max([most, *(p.raw.dim() - 1 for p in parts if isinstance(p, PerStep))])

    def beside(p: Any) -> Any:
        if not isinstance(p, PerStep):
            return _to(p, target)
        steps, *own = p.raw.shape
        return _to(p.raw.reshape(steps, *(1,) * (most - len(own)), *own), target)

    dim = sum(p is None or isinstance(p, slice) for p in parts[: at[0]])
    if Ellipsis in parts[: at[0]]:
        dim += target.dim() - sum(p is not None and p is not Ellipsis for p in parts)
    return PerStep.of(target[tuple(map(beside, parts))].movedim(dim, 0), series, loop)


def _to(value: Any, target: Tensor) -> Any:
    """An index on the device of what it looks up."""
    if isinstance(value, Tensor) and not value.is_meta and value.device != target.device:
        return value.to(target.device)
    return value


def _decided(condition: PerStep) -> bool:
    """``if`` on a condition of the steps: what all of them say, or the last where none counts."""
    said = getattr(condition.raw, "_t", condition.raw).reshape(-1) != 0
    if _series.get() is None:
        return bool(said)
    first = bool(said[0])
    if bool((said == first).all()):
        return first
    if condition.loop.shift is not None and condition.loop.shift < condition.loop.history:
        return bool(said[-1])
    condition.series.is_hopeless = True
    raise NotVectorized("the body branches on its index, and not all steps go the same way")
