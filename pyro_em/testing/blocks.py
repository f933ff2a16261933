"""The conformance suite of blocks of latents: exact against the joint table, cell by cell.

The joint table is made by running the model with every assignment of its latents in an outermost plate,
with Pyro's own densities; nothing of the block or of the contraction takes part in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_em.densities.tying import collapsed
from pyro_em.em import ExactPosteriorEM
from pyro_em.errors import Finding, Handover
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.plan.program import Program
from pyro_em.posteriors.block import Block, Component
from pyro_em.posteriors.quick import SumsBlock
from pyro_em.tracing.parameters import parameters_at, values_of
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.statistics import Expectation, group_statistics

_LIMIT = 20_000

_TOGETHER = 2_000  # assignments of one run


@dataclass(frozen=True, eq=False)
class Joint:
    """The joint table of a small model.

    Attributes:
        log_evidence: In nats.
        cells: Posterior probabilities of the cells of every group. # (members, *sizes)
        table: The log evidence of each element of the plates that were asked for. # (*plates,)
    """

    log_evidence: float
    cells: list[Tensor]
    table: Tensor


def check_block(
    block: type[Block],
    model: Callable[..., Any],
    *args: Any,
    guide: Any = None,
    states: int = 2,
    seed: int = 0,
    rtol: float | None = None,
    **kwargs: Any,
) -> None:
    """Test a block of latents on a model, in a param store scope of its own.

    Checked at the model's own parameters and at random ones near them: the log evidence, the sums over
    the data (by name, or by the M-step that they lead to), their weighing, chunks where the block has
    any, and that the gradient of the table of log evidence is the score of the joint table.

    Args:
        block: The class.
        model: A Pyro model whose latents are all summed, with at most 20,000 assignments.
        *args: Its arguments.
        guide: ``"map"`` where the model has point estimates.
        states: How many parameter values are tried.
        seed: Seed of the moved parameters.
        rtol: Relative tolerance; by default 1e-9 in float64 and 1e-4 in float32.
        **kwargs: Its keyword arguments.

    Raises:
        AssertionError: With the check that failed.

    Example:
        >>> import pyro.distributions as dist
        >>> from torch.distributions import constraints
        >>> from pyro_em.posteriors.mixtures.mixture import Mixture
        >>> def model(x):
        ...     w = pyro.param("w", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
        ...     with pyro.plate("n", len(x)):
        ...         z = pyro.sample("z", dist.Categorical(w))
        ...         pyro.sample("x", dist.Normal(torch.tensor([-1.0, 1.0])[z], 1.0), obs=x)
        >>> check_block(Mixture, model, torch.tensor([-1.2, 0.3, 0.9]))
    """
    with pyro.get_param_store().scope():
        program = ExactPosteriorEM(model, guide)._ready(args, kwargs)
        assert isinstance(program, Program), "a guide draws latents of this model"
        assert program.compiled, "the model cannot be recomputed from its parameters"
        coarse = program.graph.eps > 1e-12
        tolerance = rtol or (1e-4 if coarse else 1e-9)
        generator = torch.Generator().manual_seed(seed)
        for state in range(states):
            moved = _moved(program, generator) if state else {}
            with parameters_at(program.graph.parameters, moved, unconstrained=True):
                _check_at(block, program, tolerance)


def _moved(program: Program, generator: torch.Generator) -> dict[str, Tensor]:
    """Unconstrained parameters a little away from where they are."""
    out = {}
    for name, p in program.graph.parameters.items():
        u = p.unconstrained.detach()
        noise = torch.randn(u.shape, generator=generator, dtype=torch.float64, device="cpu")
        out[name] = u + 0.2 * noise.to(u)
    return out


def _check_at(block: type[Block], program: Program, rtol: float) -> None:
    graph, values = program.graph, values_of(program.graph.parameters)
    component = Component(collapsed(graph), program.updates, values, tuple(graph.latents))
    found = block.match(component)
    assert not isinstance(found, Finding), f"the block does not match: {found}"
    joint = joint_table(program, found.dims)
    scale = max(1.0, abs(joint.log_evidence))

    def near(a: float, b: float) -> bool:
        return abs(a - b) <= rtol * max(scale, abs(b))

    expectation = found.expect(values)
    got = expectation.log_evidence
    assert near(got, joint.log_evidence), (
        f"log evidence {got!r}, the joint table has {joint.log_evidence!r}"
    )
    table = found.table(values)
    assert table.shape == tuple(graph.dim_size(d) for d in found.dims), (
        f"table has shape {tuple(table.shape)}, its dimensions are {found.dims}"
    )
    assert near(float(table.sum()), joint.log_evidence), "the table does not sum to the evidence"
    off = float((table - joint.table).abs().max())
    assert off <= rtol * scale, f"a cell of the table is off by {off:.3g}"
    if isinstance(found, SumsBlock):
        _check_m_step(found, program, joint, expectation, rtol)
        _check_chunks(found, values, expectation, rtol)
    else:
        _check_sums(component.graph, values, joint, expectation, rtol)
    _check_weights(found, values, table, rtol)
    weights = 0.5 + torch.arange(table.numel()).reshape(table.shape).to(table) % 3
    cells = [
        c * _over(weights, found.dims, g) for c, g in zip(joint.cells, graph.groups, strict=True)
    ]
    weighted = replace(joint, cells=cells)
    _check_sums(component.graph, values, weighted, found.expect(values, weights), rtol)


def _over(weights: Tensor, dims: Sequence[str], group: Group) -> Tensor:
    """Weights of a table's cells, laid out over the cells of a group. # (*sizes or 1s)"""
    plates = group.dims[0][: group.n_plates]
    if not set(dims) <= set(plates):  # a prior outside, which nothing weighs
        return weights.new_ones(())
    laid_out = weights.permute([list(dims).index(p) for p in plates if p in dims])
    own = iter(laid_out.shape)
    sizes = [next(own) if p in dims else 1 for p in plates]
    return laid_out.reshape([*sizes, *(1,) * (len(group.sizes) - len(plates))])


def _check_sums(
    graph: FactorGraph, values: Mapping[str, Tensor], joint: Joint, got: Expectation, rtol: float
) -> None:
    """Sums by name against those of the joint table."""
    for g, group in enumerate(graph.groups):
        if group.family is None or _priors(replace(graph, groups=(group,))):
            continue
        assert g in got.sums, f"the sums of '{group.members[0]}' are missing"
        arguments = {n: a.detach() for n, a in group.evaluate_arguments(values).items()}
        counts = joint.cells[g] if group.mask is None else joint.cells[g] * group.mask
        expected = group_statistics(group, counts, arguments)
        for name, total in expected.items():
            size = float(total.abs().max().clamp(min=1.0)) if total.numel() else 1.0
            off = float((got.sums[g][name] - total).abs().max()) if total.numel() else 0.0
            assert off <= 10 * rtol * size, f"'{name}' of '{group.members[0]}' is off by {off:.3g}"


def _check_m_step(
    block: SumsBlock, program: Program, joint: Joint, expectation: Expectation, rtol: float
) -> None:
    """Parameters after the M-step, against an M-step from the cells of the joint table."""
    theta = block.theta
    values = values_of(program.graph.parameters)
    try:
        after, _ = theta.m_step(theta.enter(values), expectation)
    except Handover:
        raise AssertionError(
            "the M-step hands over: use data that leave no component empty"
        ) from None
    got = theta.values(after)
    counts = [
        cells if group.mask is None else cells * group.mask
        for group, cells in zip(program.graph.groups, joint.cells, strict=True)
    ]
    with parameters_at(program.graph.parameters, values):
        program.m_step(counts, program.evaluate())
        expected = values_of(program.graph.parameters)
    for name, value in expected.items():
        off = float((got[name] - value).abs().max())
        size = float(value.abs().max().clamp(min=1.0))
        assert off <= 100 * rtol * size, f"the M-step of '{name}' is off by {off:.3g}"


def _check_chunks(
    block: SumsBlock, values: Mapping[str, Tensor], whole: Expectation, rtol: float
) -> None:
    if not hasattr(block, "chunk"):
        return
    before, block.chunk = block.chunk, 2
    parts = block.expect(values)
    block.chunk = before
    _same(parts, whole, rtol, "in chunks of two rows")


def _check_weights(block: Block, values: Mapping[str, Tensor], table: Tensor, rtol: float) -> None:
    """Cells that weigh twice, or half of which weigh nothing, count so."""
    whole = block.expect(values, torch.ones_like(table))
    _same(block.expect(values, torch.full_like(table, 2.0)), 2.0 * whole, rtol, "weighing twice")
    some = torch.arange(table.numel()).reshape(table.shape) % 2 == 0
    first = block.expect(values, some.to(table))
    rest = block.expect(values, (~some).to(table))
    _same(first + rest, whole, rtol, "in two halves")
    for i, cell in enumerate(table.reshape(-1).tolist()):
        alone = torch.zeros_like(table)
        alone.view(-1)[i] = 1.0
        off = abs(block.expect(values, alone).log_evidence - cell)
        assert off <= rtol * max(1.0, abs(cell)), f"cell {i} of the table alone is off by {off:.3g}"


def _same(a: Expectation, b: Expectation, rtol: float, how: str) -> None:
    off = abs(a.log_evidence - b.log_evidence)
    assert off <= rtol * max(1.0, abs(b.log_evidence)), f"log evidence {how} is off by {off:.3g}"
    for key, named in b.sums.items():
        for name, total in named.items():
            off = float((a.sums[key][name] - total).abs().max()) if total.numel() else 0.0
            size = float(total.abs().max().clamp(min=1.0)) if total.numel() else 1.0
            assert off <= 10 * rtol * size, f"'{name}' of {key} {how} is off by {off:.3g}"


def joint_table(program: Program, plates: Sequence[str] = ()) -> Joint:
    """The joint table of a model at its current parameters, by runs with many assignments each.

    Args:
        program: A model with its data.
        plates: Plates of all sites, whose elements share no latent: they are told apart.
    """
    graph = program.graph
    assignments = _assignments(graph)
    depth = _depth(program)
    runs: list[Tensor] = []
    for begin in range(0, len(next(iter(assignments.values()))), _TOGETHER):
        some = {name: index[begin : begin + _TOGETHER] for name, index in assignments.items()}
        runs.append(_log_joint(program, some, plates, depth))
    log_p = torch.cat(runs)
    each = log_p.reshape(len(log_p), -1).sum(1)
    total = torch.logsumexp(each, 0)
    probabilities = (each - total).exp()
    cells = [torch.zeros(len(g.members), *g.sizes, dtype=torch.float64) for g in graph.groups]
    for g, group in enumerate(graph.groups):
        for i in range(len(group.members)):
            index = _cells_at(graph, group, i, assignments)
            if not index:
                cells[g][i] += 1.0
                continue
            p = probabilities.reshape(-1, *(1,) * (index[0].dim() - 1))
            cells[g][i].index_put_(index, p.expand_as(index[0]), accumulate=True)
    # Every assignment of an element's own latents comes with all those of the other elements.
    own = math.prod(
        v.size ** math.prod(graph.dim_size(p) for p in v.plates if p not in plates)
        for v in graph.latents.values()
    )
    table = log_p.logsumexp(0) - math.log(len(log_p) / own)
    return Joint(float(total), cells, table)


def _priors(graph: FactorGraph) -> list[str]:
    """Point-estimated sites, whose density is no part of the log evidence."""
    return [
        name
        for group in graph.groups
        for name, dims in zip(group.members, group.dims, strict=True)
        if group.role is Role.POINT and not any(d in graph.latents for d in dims)
    ]


def _depth(program: Program) -> int:
    """How many batch dimensions the model's sites have."""
    with torch.no_grad(), pyro.validation_enabled(False), torch.random.fork_rng(devices=[]):
        trace = poutine.trace(program.model).get_trace(*program.args, **program.kwargs)
    sites = [s for s in trace.nodes.values() if s["type"] == "sample"]
    plates = [-f.dim for s in sites for f in s["cond_indep_stack"] if f.vectorized]
    shapes = [len(s["fn"].batch_shape) for s in sites if hasattr(s["fn"], "batch_shape")]
    return max([*plates, *shapes], default=0)


def _log_joint(
    program: Program, assignments: Mapping[str, Tensor], plates: Sequence[str], depth: int
) -> Tensor:
    """The log joint of some assignments, summed over all plates but some. # (n, *plates)"""
    graph = program.graph
    n = len(next(iter(assignments.values())))
    data = {
        name: graph.latents[name].support[_laid_out(graph, name, index, depth)]
        for name, index in assignments.items()
    }

    def model() -> None:
        with pyro.plate("_assignments", n, dim=-depth - 1):
            program.model(*program.args, **program.kwargs)

    with torch.no_grad(), pyro.validation_enabled(False):
        trace = poutine.trace(poutine.condition(model, data=data)).get_trace()
        trace.compute_log_prob()
    total = torch.zeros(n, *(1,) * len(plates), dtype=torch.float64)
    priors = {*_priors(graph), "_assignments"}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or name in priors:
            continue
        at = {f.name: depth + 1 + f.dim for f in site["cond_indep_stack"] if f.vectorized}
        log_p = site["log_prob"].double()
        log_p = log_p.reshape(*(1,) * (depth + 1 - log_p.dim()), *log_p.shape)
        kept = [0, *(at[p] for p in plates if p in at)]
        log_p = log_p.movedim(kept, list(range(len(kept))))
        log_p = log_p.reshape(*log_p.shape[: len(kept)], -1).sum(-1)
        own = iter(log_p.shape[1:])
        total = total + log_p.reshape(-1, *(next(own) if p in at else 1 for p in plates))
    return total


def _assignments(graph: FactorGraph) -> dict[str, Tensor]:
    """For each latent its value's number in every assignment. # (n, *plates)"""
    shapes = {n: [graph.dim_size(p) for p in v.plates] for n, v in graph.latents.items()}
    ranges: list[Tensor] = []
    for name, shape in shapes.items():
        ranges += [torch.arange(graph.latents[name].size)] * math.prod(shape)
    count = math.prod(len(r) for r in ranges)
    assert count <= _LIMIT, f"{count:,} assignments are too many: use fewer data"
    cells = torch.cartesian_prod(*ranges).reshape(count, len(ranges))
    parts = cells.split([math.prod(shape) for shape in shapes.values()], 1)
    return {n: p.reshape(count, *s) for (n, s), p in zip(shapes.items(), parts, strict=True)}


def _laid_out(graph: FactorGraph, name: str, index: Tensor, depth: int) -> Tensor:
    """Numbers of values in the batch shape of their site, assignments outermost. # (n, ...)"""
    batch = graph.latents[name].batch_dims
    own = [1 if d is None else graph.dim_size(d) for d in batch]
    return index.reshape(len(index), *(1,) * (depth - len(own)), *own)


def _cells_at(
    graph: FactorGraph, group: Group, i: int, assignments: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    """Where assignments are in the table of a factor: indices of all its plates' elements.

    Returns:
        One for each dimension of the factor. # (n, *plates)
    """
    dims = group.dims[i]
    plates = [d for d in dims if d not in graph.latents]
    sizes = [graph.dim_size(p) for p in plates]
    grid = torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij") if plates else ()
    n = len(next(iter(assignments.values())))
    index = [g.expand(n, *sizes) for g in grid]
    for d in dims[len(plates) :]:
        own = graph.latents[d].plates
        value = assignments[d]
        if own:
            value = value[(slice(None), *(grid[plates.index(p)] for p in own))]
        index.append(value.reshape(n, *(sizes if own else [1] * len(sizes))).expand(n, *sizes))
    return tuple(index)
