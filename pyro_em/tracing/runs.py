"""Running a model under handlers, to see what it is.

Three kinds of run, in the order in which a model is looked at:

* a *plain* run: nothing enumerated, validation on; it initialises parameters and shows shapes;
* a *provenance* run: every latent's value carries its name, so that each site's distribution tells
  which latents reach it;
* an *enumerated* run: discrete latents take all their values along dimensions of their own, and
  every read of a parameter yields one leaf of the autograd graph.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger

from pyro_em.distributions import has_finite_support
from pyro_em.errors import PyroEMError
from pyro_em.tracing.allocation import NumbersNeeded, Overspent, Shadows
from pyro_em.tracing.capture import ParameterCapture
from pyro_em.tracing.freed import return_freed_memory
from pyro_em.tracing.handlers import KeepValues
from pyro_em.tracing.lean import AtLarge, EnumTrace, LeanTrace, Met, TaggingTrace, WatchingTrace
from pyro_em.tracing.memory import settle
from pyro_em.tracing.mixing import Mixing
from pyro_em.tracing.operations import OperationLog, size_guard
from pyro_em.tracing.parameters import TracedParameter, alive
from pyro_em.tracing.provenance import scopes_of
from pyro_em.tracing.randomness import (
    random_state,
    same_random_state,
    seed_generators,
    set_random_state,
)
from pyro_em.tracing.sites import factors_in, latents_in
from pyro_em.tracing.sparing import DrawNothing, SpendLittle, validate_nothing
from pyro_em.tracing.stored import (
    forget_all_but,
    holds_shadows,
    in_own_memory,
    store_as_it_is,
    was_cleared,
)
from pyro_em.tracing.tables import Tables
from pyro_em.tracing.tagged import TaggedDistributions
from pyro_em.tracing.whole import LeftWhole

Model = Callable[..., Any]


_PLAIN_BYTES = 2**26  # what a plain run may allocate in all before it runs with shadows

_DRAWING: AbstractContextManager[None] = nullcontext()  # all latents, large ones too


class RunFailed(Exception):
    """A model raised; holds what it did until then.

    Attributes:
        error: What the model raised.
        run: The sites and parameters so far.
        empty_plates: Plates of size zero.
    """

    def __init__(self, error: Exception, run: Run, empty_plates: tuple[str, ...]) -> None:
        super().__init__(str(error))
        self.error, self.run, self.empty_plates = error, run, empty_plates


@dataclass(frozen=True, eq=False)
class Run:
    """The sites and the parameters of one run of a model.

    Attributes:
        sites: Everything that was traced, by name.
        parameters: What the model read.
        scopes: Per site the other sites that reach it, from a provenance run.
        suspects: Latents whose plates' elements it may have mixed, from a provenance run.
        read: Sites whose values were turned into numbers of Python, which carry no tags.
        joined: Latents outside plates whose values it may take together once they are enumerated, from
            a provenance run.
        changed_masks: Sites whose mask was written after them.
        shadows: Where large latents have no numbers, so that no argument was validated.
        unfinished: The parameter at whose initial value the run broke off.
        cleared: Whether the run has emptied the param store of what was in it.
    """

    sites: dict[str, dict[str, Any]]
    parameters: dict[str, TracedParameter]
    scopes: dict[str, frozenset[str]] = field(default_factory=dict)
    changed_masks: tuple[str, ...] = ()
    shadows: Shadows | None = None
    unfinished: TracedParameter | None = None
    suspects: frozenset[str] = frozenset()
    read: frozenset[str] = frozenset()
    joined: frozenset[str] = frozenset()
    cleared: bool = False


@dataclass(frozen=True)
class Begin:
    """An enumerated run in which parameters get their first values, as in Pyro's first run.

    Latents are drawn before they are enumerated, so that the random state goes on as it would there.

    Attributes:
        keep_random_state: Whether the random state is restored after the run.
    """

    keep_random_state: bool


def is_being_traced() -> bool:
    """Whether a handler around this call records every sample site: a model is being run."""
    for handler in reversed(_PYRO_STACK):
        if isinstance(handler, BlockMessenger):
            return False
        if isinstance(handler, TraceMessenger) and not handler.param_only:
            return True
    return False


def without_state(optim: Any) -> Any:
    """A ``pyro.optim`` object as it was made: optimisers of parameters hold weak references."""
    if not isinstance(optim, pyro.optim.PyroOptim):
        return optim
    fresh = copy.copy(optim)
    fresh.optim_objs, fresh.grad_clip, fresh._state_waiting_to_be_consumed = {}, {}, {}
    return fresh


def plain_run(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    keep_random_state: bool,
    sparing: bool = False,
    tables: bool = True,
) -> Run:
    """Run a model once as Pyro would, with validation on; parameters are initialised.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        keep_random_state: Whether the global random state is restored.
        sparing: Whether a run that allocates much is broken off and done again with shadows in
            place of large latents; their arguments then have to be validated elsewhere.
        tables: Whether tables that it makes of many rows may then be shadows too.

    Raises:
        RunFailed: If the model raises.
        NumbersNeeded: If the model raises with shadows.
    """
    with same_random_state(keep_random_state):
        if not sparing:
            return _plain_run(model, args, kwargs)
        begin, known = random_state(), frozenset(pyro.get_param_store()._params)
        found = _tables_of(args, kwargs) if tables else None
        try:
            return _plain_run(model, args, kwargs, SpendLittle(_PLAIN_BYTES, found))
        except Overspent:
            set_random_state(begin)
            forget_all_but(known)  # the next run draws their starts from the same state
            return_freed_memory(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        return _run_with_shadows(model, args, kwargs, found)


def _tables_of(args: tuple, kwargs: Mapping[str, Any]) -> Tables | None:
    return Tables.beside((*args, *kwargs.values()), validate_nothing)


def first_run_again(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    keep_random_state: bool,
    shadowed: bool,
    validated: bool,
    begin: tuple[Any, Any] | None = None,
) -> Run:
    """Run a model of a form that was seen, so that its parameters begin as in its first plain run.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        keep_random_state: Whether the global random state is restored.
        shadowed: Whether the first run had shadows in place of large latents.
        validated: Whether distributions validate their arguments.
        begin: The present random state, where the caller has it.

    Returns:
        The run, without its sites where these have shadows.

    Raises:
        RunFailed: If the model raises; the random state and the parameters are as before.
        NumbersNeeded: If the model raises with shadows, or would need them now; likewise.
    """
    begin = random_state() if begin is None else begin
    known = frozenset(pyro.get_param_store()._params)
    with same_random_state(keep_random_state):
        try:
            if shadowed:
                return _without_sites(
                    _run_with_shadows(model, args, kwargs, _tables_of(args, kwargs))
                )
            return _plain_run(model, args, kwargs, SpendLittle(_PLAIN_BYTES), validated=validated)
        except BaseException as error:
            forget_all_but(known)
            set_random_state(begin)
            if isinstance(error, Overspent):
                raise NumbersNeeded from None
            raise


def _run_with_shadows(
    model: Model, args: tuple, kwargs: dict[str, Any], tables: Tables | None
) -> Run:
    """A run with shadows of large latents, and of tables; where these have to have numbers, without."""
    known, begin = frozenset(pyro.get_param_store()._params), random_state()
    shadows = Shadows(tables=tables)
    try:
        with shadows:
            run = _plain_run(model, args, kwargs, nullcontext(DrawNothing(shadows)))
        if holds_shadows():
            raise NumbersNeeded
    except BaseException as error:
        forget_all_but(known)
        if not isinstance(error, NumbersNeeded) or not shadows.has_tables:
            raise
    else:
        return replace(run, shadows=shadows)
    shadows.let_go()
    set_random_state(begin)
    return _run_with_shadows(model, args, kwargs, None)


def _without_sites(run: Run) -> Run:
    shadows, run = run.shadows, replace(run, sites={}, shadows=None)
    if shadows is not None:
        shadows.let_go()
    return run


def _plain_run(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    sparing: AbstractContextManager[AtLarge | None] = _DRAWING,
    validated: bool = True,
) -> Run:
    capture = ParameterCapture(look_at_initial_shape=True)
    tracer = WatchingTrace(capture)
    begun = store_as_it_is()
    with (
        LeftWhole(),
        torch.enable_grad(),
        pyro.validation_enabled(validated),
        sparing as tracer.at_large,
    ):
        try:
            tracer.follow(model, args, kwargs)
        except PyroEMError:
            raise  # the model calls this library, which has said what is wrong
        except Exception as error:
            broken = capture.unfinished()
            run = Run(dict(tracer.trace.nodes), capture.parameters, unfinished=broken)
            raise RunFailed(error, run, tuple(tracer.empty)) from error
    parameters = in_own_memory(alive(capture.parameters), capture.given)
    cleared = was_cleared(begun)
    return Run(dict(tracer.trace.nodes), parameters, {}, tracer.changed_masks(), cleared=cleared)


def provenance_run(
    model: Model, args: tuple, kwargs: dict[str, Any], plain: Run, *, drawn: bool = False
) -> Run:
    """Run a model with tagged values; ``scopes`` says which other sites reach each site.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        plain: A plain run, whose latent values are used again.
        drawn: Whether continuous latents are drawn too: their elements may be mixed as well.

    Raises:
        NumbersNeeded: If the plain run has shadows and the model raises with them.
    """
    capture = ParameterCapture()
    latents = latents_in(plain.sites)
    begun = store_as_it_is()
    in_plates = {n: sizes for n, s in latents.items() if (sizes := _plate_sizes(s))}
    mixing = Mixing(
        {n: sizes for n, sizes in in_plates.items() if drawn or not is_smooth(latents[n]["fn"])}
    )
    tracer = TaggingTrace({n: s["value"] for n, s in latents.items()}, capture)
    with (
        LeftWhole(random_state=True),
        plain.shadows or nullcontext(),
        torch.no_grad(),
        pyro.validation_enabled(False),
        TaggedDistributions(mixing).made_here(),
    ):
        tracer.follow(model, args, kwargs)
    sites = dict(tracer.trace.nodes)
    return Run(
        sites,
        capture.parameters,
        scopes_of(factors_in(sites)),
        suspects=frozenset(mixing.suspects),
        read=frozenset(mixing.read),
        joined=frozenset(mixing.joined),
        cleared=was_cleared(begun),
    )


def _plate_sizes(site: Mapping[str, Any]) -> frozenset[int]:
    """The sizes of a site's vectorised plates that have several elements."""
    frames = [f for f in site["cond_indep_stack"] if f.dim is not None]
    return frozenset(f.size for f in frames if f.size > 1)


def is_smooth(fn: Any) -> bool:
    """Whether draws are followed by gradients: neither summed nor scored."""
    return not has_finite_support(fn) and bool(getattr(fn, "has_rsample", False))


def held_run(
    model: Model, args: tuple, kwargs: dict[str, Any], values: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, Any]]:
    """The sites of one run with latents held at given values; the random state is restored.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        values: Values of all its latents, and of the sites of its guide.
    """
    with (
        LeftWhole(random_state=True),
        torch.no_grad(),
        pyro.validation_enabled(False),
        LeanTrace() as tracer,
        KeepValues(values, of_guide=True),
    ):
        model(*args, **kwargs)
    return factors_in(tracer.trace.nodes)


def enumerated_run(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    latents: frozenset[str],
    max_plate_nesting: int,
    kept: Mapping[str, torch.Tensor],
    values: Mapping[str, torch.Tensor] | None = None,
    limit: int | None = None,
    random_seed: int | None = None,
    keep_random_state: bool = True,
    attached: bool = False,
    validated: bool = False,
    log: OperationLog | None = None,
    begin: Begin | None = None,
    met: Met | None = None,
    clamped: frozenset[str] = frozenset(),
) -> Run:
    """Run a model with ``latents`` enumerated to the left of ``max_plate_nesting`` dimensions.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        latents: Names of the sites to enumerate.
        max_plate_nesting: Number of dimensions that belong to plates.
        kept: Values of unobserved sites that are not enumerated.
        values: Constrained parameter values to use instead of the current ones.
        limit: Raise `OutputTooLarge` when one operation's output has more cells.
        random_seed: Start this run from another random state.
        keep_random_state: Whether the global random state is restored.
        attached: Whether parameters stay attached to their unconstrained leaves.
        validated: Whether distributions check their arguments.
        log: Notes what the run does, and what it reads; with a limit only.
        begin: How parameters get their first values in it; None where they have values.
        met: Called with each site once it is traced, which it may change.
        clamped: Sites with ``obs_mask`` whose value is that of their unobserved part in all rows.
    """
    begins = begin is not None
    capture = ParameterCapture(values, begins, hand_out=not attached, log=log, begins=begins)
    tracer = EnumTrace(-1 - max_plate_nesting, latents, kept, capture, clamped)
    tracer.met, tracer.aside = met, capture.aside
    tracer.made = None if log is None else log.make
    if begin is not None:
        tracer.draws, keep_random_state = tracer.aside, begin.keep_random_state
    before = store_as_it_is() if begins else None
    with (
        LeftWhole(keep_random_state),
        torch.enable_grad(),
        pyro.validation_enabled(False),
        dist.validation_enabled(validated),
    ):
        if random_seed is not None:
            seed_generators(random_seed)
        with _within(limit, log):
            tracer.follow(model, args, kwargs)
    settle([p.unconstrained for p in capture.parameters.values()])
    cleared = before is not None and was_cleared(before)
    return Run(dict(tracer.trace.nodes), capture.parameters, cleared=cleared)


def _within(limit: int | None, log: OperationLog | None) -> AbstractContextManager[Any]:
    """A block whose operations are held to a limit, and noted where somebody reads them."""
    if limit is None:
        return nullcontext()
    return size_guard(limit) if log is None else log.noting(limit)


def is_of_validation(error: Exception) -> bool:
    """Whether a distribution raised because an argument is outside its constraint."""
    return isinstance(error, ValueError) and str(error).startswith("Expected parameter ")


def is_of_shadows(error: BaseException | None) -> bool:
    """Whether an operation raised because it met a tensor without numbers."""
    return isinstance(error, RuntimeError) and re.search(r"\bmeta\b", str(error)) is not None
