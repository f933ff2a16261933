"""From an enumerated run of a model to its factor graph."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any

import torch
from torch import Tensor

from pyro_em.distributions import is_outside
from pyro_em.errors import DegenerateError, Finding, ModelError, PyroEMError, raise_findings
from pyro_em.graph.bindings.named_leaves import NamedLeaves
from pyro_em.graph.bindings.shared_distributions import SharedDistributions
from pyro_em.graph.bindings.signatures import KeptSelections, Recurring
from pyro_em.graph.clamps import with_clamps
from pyro_em.graph.computed_arguments import with_computed
from pyro_em.graph.diagonals import with_diagonals
from pyro_em.graph.enumerated import more_than_torch_has, run_enumerated
from pyro_em.graph.factors import FIXED_SIZE, FactorGraph, Latent
from pyro_em.graph.failing.failures import changing_sites
from pyro_em.graph.findings.another_model import require_same
from pyro_em.graph.findings.side_effects import refused_clearing
from pyro_em.graph.forms import FEW, forms_of
from pyro_em.graph.layout import FactorLayout
from pyro_em.graph.many_rows.alike_rows import with_parameters_once
from pyro_em.graph.many_rows.by_rows import Sites, by_rows
from pyro_em.graph.many_rows.slices import Slices, on_rows_of
from pyro_em.graph.stacking import Batch, Factor, stacked
from pyro_em.graph.structure import Structure
from pyro_em.graph.unrecorded import outside_support
from pyro_em.graph.vectorised_loops.unrolled import unrolled_graph
from pyro_em.tracing.freed import return_freed_memory
from pyro_em.tracing.given import Given
from pyro_em.tracing.loops import NotVectorized, vectorizing
from pyro_em.tracing.missing import missing_of
from pyro_em.tracing.operations import OperationLog
from pyro_em.tracing.runs import Begin, Model, Run
from pyro_em.tracing.sites import Role, factors_in, mask_tensor


def trace_graph(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    structure: Structure,
    *,
    limit: int | None = None,
    values: Mapping[str, Tensor] | None = None,
    random_seed: int | None = None,
    with_bindings: bool = True,
    keep_random_state: bool = True,
    attached: bool = False,
    looked: Mapping[str, Mapping[str, Any]] | None = None,
    log: OperationLog | None = None,
    detached: bool = False,
    only: Collection[str] | None = None,
    runs: list[Run] | None = None,
    kept: KeptSelections | None = None,
    begin: Begin | None = None,
    may_part: bool = True,
    few: float | None = None,
) -> FactorGraph:
    """Run the model with its latents enumerated and bring every factor into the compact layout.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: What `examine` found.
        limit: Stop when an operation inside the model makes more cells.
        values: Constrained parameter values to trace at; the current ones by default.
        random_seed: Trace from another random state.
        with_bindings: Whether to read off how parameters reach the arguments.
        keep_random_state: Whether the global random state is restored after the run.
        attached: Whether densities stay attached to the unconstrained parameters.
        looked: The sites of a plain run from the same random state, which this one has to agree
            with; None where that is known.
        log: Notes what the run does, and what it reads beside the parameters; needs a limit.
        detached: Whether only the numbers of arguments and densities are of interest.
        only: Sites whose factors are asked for; others may be left out. All by default.
        runs: Where the run itself is noted; of loops over indices it is that of their template.
        kept: How earlier runs read off which elements of parameters arguments are.
        begin: How parameters get their first values in the run; None where they have values.
        may_part: Whether large data may be read some rows at a time.
        few: From how many sites of one form on these are laid out together, if from fewer or more.

    Raises:
        ModelError: If the model cannot run with its latents enumerated, reads a latent outside its
            ``pyro.markov`` scope, or is another model when they are enumerated.
        NotVectorized: If a loop cannot be run over index tensors when it is first looked at.
    """
    if isinstance(model, Given):
        model = on_rows_of(model, structure)

    def at_some_rows(others: Mapping[str, Tensor]) -> FactorGraph:
        own, part = args, structure
        slices = Slices.of(args, kwargs, structure) if may_part else None
        if slices is not None:
            own, part = slices.at(slice(0, min(slices.most, 64)))
        return trace_graph(
            model,
            own,
            kwargs,
            part,
            values=others,
            with_bindings=False,
            may_part=False,
            few=inf,  # each site by itself: what makes its arguments is not mixed with others
        )

    how: dict[str, Any] = {
        "limit": limit,
        "values": values,
        "random_seed": random_seed,
        "with_bindings": with_bindings,
        "keep_random_state": keep_random_state,
        "attached": attached,
        "looked": looked,
        "log": log,
        "detached": detached,
        "kept": kept,
        "begin": begin,
    }
    # Latents that have values are read with what they reach.
    is_read = with_bindings and not (attached or detached or isinstance(model, Given))
    steps = structure.series
    if steps is not None:
        try:
            with vectorizing(steps.series()):
                pieces, latents, run = _traced(
                    model, args, kwargs, steps.template, few=inf, parts=steps.seen, **how
                )
            if runs is not None:
                runs.append(run)
            factors = [p for p in pieces if isinstance(p, Factor)]
            graph = unrolled_graph(structure, factors, latents, run.parameters)
            graph = with_diagonals(replace(graph, missing=missing_of(run.sites)))
            return with_computed(graph, at_some_rows) if is_read else graph
        except (NotVectorized, PyroEMError):
            if looked is not None:  # at the first look, which then is made at the loop itself
                raise
            structure = replace(structure, series=None)
    # Where parameters get their values is a run on all rows.
    if may_part and not attached and only is None and runs is None and begin is None:
        sliced = _in_slices(model, args, kwargs, structure, how)
        if sliced is not None:
            return sliced
    pieces, latents, run = _traced(model, args, kwargs, structure, few=few or FEW, only=only, **how)
    if runs is not None:
        runs.append(run)
    batches = [p for p in pieces if isinstance(p, Batch)]
    factors = _count_where_needed([p for p in pieces if isinstance(p, Factor)], structure)
    order = {name: i for i, name in enumerate(structure.sites)}
    groups = tuple(map(with_parameters_once, stacked([*batches, *factors], order)))
    graph = FactorGraph(structure, latents, groups, run.parameters, missing_of(run.sites))
    graph = with_diagonals(graph)
    return with_computed(graph, at_some_rows) if is_read else graph


def _in_slices(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    structure: Structure,
    how: Mapping[str, Any],
) -> FactorGraph | None:
    """The graph of large data, read some rows at a time; None where the model is run on all rows."""
    slices = Slices.of(args, kwargs, structure)
    if slices is None:
        return None
    return_freed_memory(a for a in args if isinstance(a, Tensor))
    # Who looks at an E-step only does not need how parameters reach arguments, but it says in few
    # numbers what a table says in many.
    is_look = not (how["with_bindings"] or how["detached"])
    silent = {**how, "log": None, "with_bindings": how["with_bindings"] or is_look}

    def read(own: tuple, part: Structure, plain: Sites | None) -> FactorGraph:
        return trace_graph(model, own, kwargs, part, may_part=False, **{**silent, "looked": plain})

    def numbers(own: tuple, part: Structure, values: Mapping[str, Tensor]) -> FactorGraph:
        elsewhere = {"values": values, "random_seed": 19, "with_bindings": False, "detached": True}
        again = {**silent, "looked": None, "kept": None, **elsewhere}
        return trace_graph(model, own, kwargs, part, may_part=False, **again)

    graph = by_rows(
        model,
        kwargs,
        slices,
        how["looked"],
        read,
        numbers,
        bound=silent["with_bindings"],
        given_only=is_look,
    )
    if graph is not None and how["log"] is not None:
        own, part = slices.at(slices.first)
        trace_graph(model, own, kwargs, part, may_part=False, **{**how, "looked": None})
    return graph


@torch.enable_grad()
def _traced(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    structure: Structure,
    *,
    limit: int | None,
    values: Mapping[str, Tensor] | None,
    random_seed: int | None,
    with_bindings: bool,
    keep_random_state: bool,
    attached: bool,
    looked: Mapping[str, Mapping[str, Any]] | None,
    log: OperationLog | None,
    detached: bool,
    kept: KeptSelections | None,
    begin: Begin | None,
    few: float,
    parts: Mapping[int, tuple[int, Tensor]] | None = None,
    only: Collection[str] | None = None,
) -> tuple[list[Factor | Batch], dict[str, Latent], Run]:
    """The factor of every site that counts, and the latents; see `trace_graph`.

    From ``few`` sites of one form on these are laid out together.
    """
    run = noted_run(
        model,
        args,
        kwargs,
        structure,
        log,
        is_bound=with_bindings,
        limit=limit,
        values=values,
        random_seed=random_seed,
        keep_random_state=keep_random_state,
        attached=attached,
        begin=begin,
    )
    sites = {n: s for n, s in run.sites.items() if n in structure.sites}
    if list(sites) != list(structure.sites):
        raise_findings([changing_sites([], structure.random_plates)])
    if any(s["value"].dim() > 64 or len(s["fn"].batch_shape) > 64 for s in sites.values()):
        raise_findings([more_than_torch_has(structure)])
    forms = forms_of(sites)
    if log is not None:
        log.forms = forms
    _require_sizes(sites, structure, forms)
    as_run, clamped = (sites, forms), structure.clamped
    if clamped:
        sites = with_clamps(sites, clamped)
        forms = forms_of(sites)
    leaves: NamedLeaves | None = None
    if with_bindings:
        leaves = NamedLeaves({name: p.leaf for name, p in run.parameters.items()})
    bindings = None if leaves is None else Recurring(leaves, kept)
    layout = FactorLayout(sites, structure, bindings, detached)
    counted = [n for n in structure.sites if n not in structure.passing]
    problems = _out_of_scope(layout, counted)
    if problems:
        raise_findings(problems)
    if looked is not None:
        require_same(model, args, kwargs, as_run[0], structure, looked, as_run[1], parts)
    if values is None:  # not at a trial point
        _require_inside(sites, structure)
    if only is not None and not layout.is_masked:
        counted = [n for n in counted if n in only]
    return *layout.pieces_and_latents(counted, forms, leaves, few), run


def _out_of_scope(layout: FactorLayout, names: Sequence[str]) -> list[Finding]:
    """Every latent that a site reads outside the latent's markov scope."""
    found = []
    for name in names:
        site = layout.sites[name]
        visible = site["infer"].get("_dim_to_id", {}).values()
        for latent in layout.structure.sites[name].scope:
            if layout.id_of[latent] not in visible and layout.size_of[latent] != 1:
                found.append(_outside(layout, name, latent, set(visible)))
    return found


def _outside(layout: FactorLayout, name: str, latent: str, shown: set[int]) -> Finding:
    """The finding on a latent that a site reads outside its markov scope."""
    if layout.sites[name]["infer"].get("_markov_scope") is None:
        fixes: tuple[str, ...] = (
            f"move site '{name}' into the loop, beside '{latent}'",
            "replace pyro.markov(range(T), history=...) by range(T) if T is small",
        )
    else:
        fixes = (
            "raise history= of the pyro.markov that holds them to the number of steps "
            f"between them: pyro.markov(range(T), history={_lag(layout, latent, shown)})",
            f"read '{latent}' only in steps within its history",
        )
    return Finding(
        f"site '{name}'",
        f"it uses latent '{latent}' outside that latent's pyro.markov scope.",
        "the latent's dimension is reused by then, and Pyro would compute a wrong density in silence",
        fixes,
        latents=(latent,),
    )


def _lag(layout: FactorLayout, latent: str, shown: set[int]) -> int:
    """Steps between a latent and the latest one of its kind that is visible."""

    def stem(name: str) -> str:
        return re.sub(r"\d+", "#", name)

    kind = [n for n in layout.structure.latents if stem(n) == stem(latent)]
    visible = [i for i, n in enumerate(kind) if layout.id_of[n] in shown]
    return max(2, max(visible, default=0) - kind.index(latent))


def noted_run(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    structure: Structure,
    log: OperationLog | None,
    *,
    is_bound: bool = False,
    attached: bool = False,
    **how: Any,
) -> Run:
    """An enumerated run, with all that it does noted, its sites too.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: What `examine` found.
        log: Where the run is noted, if anywhere.
        is_bound: Whether it is read how parameters reach arguments.
        attached: Whether parameters stay attached to their unconstrained leaves.
        **how: Further keywords of the run.
    """
    # What is noted of a run depends on it: all runs of which something is noted are alike in this.
    is_shared = not attached and (is_bound or log is not None)
    met = SharedDistributions() if is_shared else None
    run = run_enumerated(model, args, kwargs, structure, log=log, attached=attached, met=met, **how)
    if run.cleared:
        raise refused_clearing("model")
    if log is not None:
        note_sites(log, run)
    return run


def note_sites(log: OperationLog, run: Run) -> None:
    """What sites hold, with or without any operation."""
    log.add_sites(factors_in(run.sites))


class Resized(ModelError):
    """A plate or a support has another size than when the model was looked at."""


def _require_sizes(
    sites: Mapping[str, dict[str, Any]],
    structure: Structure,
    forms: Mapping[str, Hashable | None],
) -> None:
    """Refuse a model whose plates or supports are of another size than when it was looked at."""
    seen: set[Hashable] = set()
    for name, site in sites.items():
        form = forms[name]
        if form is not None:
            key = (form, site["infer"].get("_enumerate_dim"), structure.sites[name].support_size)
            if key in seen:
                continue
            seen.add(key)
        for frame in site["cond_indep_stack"]:
            if frame.dim is None:
                continue
            known = structure.plates.get(frame.name)
            if known is None or known.size == frame.size:
                continue
            raise_findings(
                [
                    Finding(
                        f"plate '{frame.name}'",
                        f"it has size {frame.size} in this run of the model and had {known.size} "
                        "when it was first looked at.",
                        "its size changes with a parameter or from run to run; evidences of "
                        "different numbers of elements cannot be compared",
                        FIXED_SIZE,
                        Resized,
                    )
                ]
            )
        known_support = structure.sites[name].support_size
        if name in structure.latents and known_support is not None:
            dim = site["infer"]["_enumerate_dim"] - site["fn"].event_dim
            size = site["value"].shape[dim] if site["value"].dim() >= -dim else 1
            if size != known_support:
                raise_findings(
                    [
                        Finding(
                            f"site '{name}'",
                            f"it has {size} values in this run of the model and had "
                            f"{known_support} when it was first looked at.",
                            "the number of its values changes with a parameter or from run to run",
                            FIXED_SIZE,
                            Resized,
                        )
                    ]
                )


def _require_inside(sites: Mapping[str, dict[str, Any]], structure: Structure) -> None:
    """A family's record is no density outside its support: Exponential(1) at -3 is e³."""
    for name, info in structure.sites.items():
        if info.role not in (Role.SAMPLED, Role.POINT):
            continue
        fn, value = sites[name]["fn"], sites[name]["value"]
        if mask_tensor(sites[name]) is not None or bool(torch.isnan(value).any()):
            continue
        if is_outside(fn, value):
            raise DegenerateError(
                outside_support(name, fn, "the guide's value is outside its support")
            )


def _count_where_needed(factors: Sequence[Factor], structure: Structure) -> list[Factor]:
    """Counts of a masked latent are dropped only where nothing that counts depends on it.

    A padded step of a chain, masked with all below it, sums to one and must not be counted. A
    masked latent above an observation that is not masked takes part in the evidence, and EM has to
    count it. The unobserved part of an ``obs_mask`` site is not read where it is masked.
    """
    unread = {f"{name}_unobserved" for name in structure.masked_pairs}
    if all(f.mask is None or f.info.observed for f in factors):
        return list(factors)
    children: dict[str, list[Factor]] = {}
    for f in factors:
        for latent in f.info.scope:
            if latent != f.info.name:
                children.setdefault(latent, []).append(f)
    # What is seen of a latent is a factor before it in the model's order.
    counted = {f.info.name: f for f in factors if f.info.observed}
    for f in reversed(factors):
        mask = f.mask
        if mask is not None and not f.info.observed and f.info.name not in unread:
            plates = f.info.plates
            for child in children.get(f.info.name, ()):
                below = counted[child.info.name].mask
                if below is None:
                    mask = torch.ones_like(mask)
                    break
                alive = below.reshape((*below.shape[: len(child.info.plates)], -1)).any(-1)
                beyond = [i for i, p in enumerate(child.info.plates) if p not in plates]
                for i in reversed(beyond):
                    alive = alive.any(i)
                mask = mask | alive.reshape(alive.shape + (1,) * (mask.dim() - alive.dim()))
        counted[f.info.name] = f if mask is f.mask else replace(f, mask=mask)
    return [counted[f.info.name] for f in factors]
