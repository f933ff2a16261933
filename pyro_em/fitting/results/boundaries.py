"""What is out of the ordinary where a fit ends, in sentences for its notes.

Loadings at zero are a stationary point of EM; a variance of latents may have its maximum at zero; the
noise of one observed coordinate may vanish (a Heywood case), which EM approaches ever more slowly.
Counts that vary no more than a Poisson's or a Binomial's leave a wider distribution no dispersion.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.errors import DataError, DegenerateError
from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.factors import Group
from pyro_em.plan.part import Part, plate_of_rows
from pyro_em.plan.program import Program
from pyro_em.posteriors.conjugates.shared_conjugates import shared_blocks
from pyro_em.posteriors.gaussians.gaussian import GaussianBlock
from pyro_em.reduction.reduction import Reduction
from pyro_em.tracing.parameters import values_of
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.gaussian_rows import is_matrix

_UNIQUENESS = 0.005  # of a coordinate's variance: below, its noise has vanished
_SINGULAR = 1e-6  # of the largest eigenvalue of a covariance
_RUN_OFF = 1e8  # of a shape, beyond which a distribution is its limit to eight digits
_ROWS = 2**16  # whose values are added up at once
_FEW = 16  # variances of which each is tried at zero


@torch.no_grad()
def loadings_at_zero(program: Program) -> str:
    """Which loadings are at a stationary point of EM, in a sentence; empty where none are.

    Args:
        program: The model with its data, its parameters where a fit ended.
    """
    blocks = list(_blocks(program))
    values = values_of(program.graph.parameters) if blocks else {}
    return " ".join(n for block in blocks for n in _loadings_at_zero(block, values))


@torch.no_grad()
def boundary_notes(over: Reduction[Part], lead: Program, log_evidence: float) -> list[str]:
    """Notes on variances and noises at the parameters where a fit ended.

    Args:
        over: The data, or their parts.
        lead: The model with all of the data, or with the part at hand.
        log_evidence: Of all data at these parameters, in nats.
    """
    has_blocks = next(_blocks(lead), None) is not None
    values = values_of(lead.graph.parameters) if has_blocks else {}
    trials, noises = list[Trial](), list[str]()
    if has_blocks:
        trials, noises = over.from_first(lambda: (_trials(lead, values), _noises(lead)))
    if trials and not over.is_whole:
        plate = plate_of_rows(lead.structure)
        if plate is not None and shared_blocks(lead.graph, plate):
            trials = []  # their evidence is no sum over parts
    seen = _Seen(torch.zeros(0, dtype=torch.float64), {})
    if trials or noises:
        seen = over.sum(lambda part: _seen(part, values, trials, noises))
    least = log_evidence - 1e-10 * max(1.0, abs(log_evidence))
    high = {t for t, there in zip(trials, seen.evidence.tolist(), strict=True) if there >= least}

    def told() -> list[str]:
        out: dict[str, None] = {}
        for block in _blocks(lead):
            for site in block.groups:
                name = site.members[0]
                if site.role is Role.GAUSSIAN:
                    found = _variances_at_zero(site, values, [t for t in high if t.latent == name])
                else:
                    found = _noises_at_zero(site, values, seen.spreads.get(name))
                out |= dict.fromkeys(found)
        for group in lead.graph.groups if lead.compiled else ():
            out |= dict.fromkeys(_at_its_limit(group, lead))
        return list(out)

    notes: list[str] = over.from_first(told)
    return notes


@dataclass(frozen=True, order=True)
class Trial:
    """An element of a parameter that a latent's variance is, to be tried at zero.

    Attributes:
        parameter: The parameter.
        element: Its flat index.
        latent: The latent.
    """

    parameter: str
    element: int
    latent: str


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a part of the data says; it adds up.

    Attributes:
        evidence: Its log evidence at each trial, in nats. # (trials,)
        spreads: By site the rows, Σ (x − c) and Σ (x − c)² of each coordinate. # (D,) each
    """

    evidence: Tensor
    spreads: Mapping[str, tuple[Tensor, Tensor, Tensor]]


def _seen(
    part: Part, values: Mapping[str, Tensor], trials: Sequence[Trial], noises: Sequence[str]
) -> _Seen:
    found = [_evidence_at(part, values, t) for t in trials]
    sites = [s for block in _blocks(part.program) for s in block.groups if s.members[0] in noises]
    spreads = {s.members[0]: _spread(part.program, s) for s in sites}
    return _Seen(torch.tensor(found, dtype=torch.float64), spreads)


def _evidence_at(part: Part, values: Mapping[str, Tensor], trial: Trial) -> float:
    """The log evidence of a part where a variance is zero, in nats; −∞ where there is none."""
    at = values[trial.parameter].clone()
    at.view(-1)[trial.element] = 0
    try:
        return part.log_evidence_at({**values, trial.parameter: at})
    except (DegenerateError, DataError):
        # There is no noise below it, a prior excludes it, or another density that reads it ends there.
        return -math.inf


def _spread(program: Program, site: Group) -> tuple[Tensor, Tensor, Tensor]:
    """The number of rows, Σ (x − c) and Σ (x − c)² of each coordinate of a site. # (D,) each"""
    rows = site.value.flatten(0, -2)
    all_data = program.graph.all_data
    known = None if all_data is None else all_data.centres.get(site.members[0])
    parts = rows.split(_ROWS)
    centre = sum(p.double().sum(0) for p in parts) / len(rows) if known is None else known.mean
    centred = (p.double() - centre for p in parts)
    first, second = zip(*((c.sum(0), c.square().sum(0)) for c in centred), strict=True)
    total, squares = torch.stack(first).sum(0), torch.stack(second).sum(0)
    return torch.full_like(total, len(rows)), total, squares


def _noises(program: Program) -> list[str]:
    """Sites whose coordinates have noises of their own."""
    return [
        site.members[0]
        for block in _blocks(program)
        for site in block.groups
        if site.role is not Role.GAUSSIAN and _has_noises(site)
    ]


def _has_noises(site: Group) -> bool:
    if is_matrix(site) or site.event_dims != 1:
        return False
    return bool(site.bindings["scale"].params)


def _trials(program: Program, values: Mapping[str, Tensor]) -> list[Trial]:
    """The variances that are tried at zero, each once."""
    out: dict[tuple[str, int], Trial] = {}
    for block in _blocks(program):
        for site in block.groups:
            if site.role is not Role.GAUSSIAN or is_matrix(site):
                continue
            for argument, binding in site.bindings.items():
                if argument in site.lines:
                    continue
                for parameter, elements in _read(binding):
                    for i in elements[:_FEW]:
                        out.setdefault((parameter, i), Trial(parameter, i, site.members[0]))
    return list(out.values())


def _blocks(program: Program) -> Iterator[GaussianBlock]:
    if program.compiled:
        for group in program.graph.groups:
            if isinstance(group.nested, GaussianBlock):
                yield group.nested


def _loadings_at_zero(block: GaussianBlock, values: Mapping[str, Tensor]) -> Iterator[str]:
    """Coordinates of a latent that nothing reads because their loadings are zero."""
    read: dict[str, Tensor] = {}
    names: dict[str, list[str]] = {}
    for site, line in zip(block.groups, block.lines, strict=True):
        coefficients = [a for a in site.lines if a != "loc"]
        for argument, one in zip(coefficients, line.reads, strict=True):
            binding = site.bindings[argument]
            used = (binding.evaluate(values) != 0).flatten(0, -2).any(0)
            read[one.latent] = read[one.latent] | used if one.latent in read else used
            names.setdefault(one.latent, []).extend(binding.params)
    for latent, used in read.items():
        if bool(used.all()) or not names[latent]:
            continue
        shown = " and ".join(f"'{n}'" for n in dict.fromkeys(names[latent]))
        part = "" if not bool(used.any()) else f" for {int((~used).sum())} of its coordinates"
        yield (
            f"{shown}: the loadings of '{latent}' are zero{part}, a stationary point that EM cannot "
            "leave: start elsewhere (init='random', or random numbers in pyro.param)."
        )


def _variances_at_zero(
    site: Group, values: Mapping[str, Tensor], high: Sequence[Trial]
) -> Iterator[str]:
    """Elements of parameters that a latent's variance is, and that may as well be zero."""
    name = site.members[0]
    for argument, binding in site.bindings.items():
        if argument in site.lines or not binding.params or not is_matrix(site):
            continue
        matrix = binding.evaluate(values).double()
        if argument == "scale_tril":
            matrix = matrix @ matrix.mT
        eigenvalues = torch.linalg.eigvalsh(matrix)
        if bool((eigenvalues[..., 0] < _SINGULAR * eigenvalues[..., -1]).any()):
            shown = " and ".join(f"'{p}'" for p in binding.params)
            yield (
                f"{shown}: the covariance of '{name}' is singular, at the boundary of what it may "
                "be: some combination of its coordinates has no variance."
            )
    for trial in sorted(high):
        place = f"[{trial.element}]" if values[trial.parameter].numel() > 1 else ""
        yield (
            f"'{trial.parameter}'{place}: the evidence is as high where the variance of '{name}' "
            "is zero, its boundary: the data show no spread of it."
        )


def _at_its_limit(site: Group, program: Program) -> Iterator[str]:
    """Arguments of counts that have run off together."""
    form = None if site.family is None else site.family.natural
    arguments, limit = ((), "") if form is None else form.limit
    bindings = [site.bindings[a] for a in arguments if a in site.bindings]
    if not any(b.params for b in bindings):
        return
    values = values_of(program.graph.parameters)
    numbers = torch.broadcast_tensors(*(b.evaluate(values) for b in bindings))
    beyond = torch.stack(list(numbers)).amin(0) > _RUN_OFF
    if not bool(beyond.any()):
        return
    names: list[str] = []
    for binding in bindings:
        for part in binding.selections:
            own = part.index.expand(beyond.shape)[beyond] if binding.how == "selection" else None
            if own is None or values[part.param].numel() == 1:
                names.append(f"'{part.param}'")
            else:
                names += [f"'{part.param}'[{i}]" for i in own[own >= 0].unique().tolist()]
    shown = " and ".join(dict.fromkeys(names))
    yield (
        f"{shown}: the {site.distribution} of '{site.members[0]}' has run off to its limit, a {limit}, "
        f"than whose the data vary no more: a {limit} is as likely."
    )


def _read(binding: Binding) -> Iterator[tuple[str, list[int]]]:
    """The elements of parameters that stand as they are in an argument."""
    for part in binding.selections:
        if not part.maps:
            yield part.param, part.index[part.index >= 0].unique().tolist()


def _noises_at_zero(
    site: Group, values: Mapping[str, Tensor], spread: tuple[Tensor, Tensor, Tensor] | None
) -> Iterator[str]:
    """Noises of single coordinates that are next to nothing of their variance."""
    if spread is None or not _has_noises(site) or float(spread[0].amax()) < 3:
        return
    binding = site.bindings["scale"]
    variance = spread[2] / spread[0] - (spread[1] / spread[0]).square()
    for part in binding.selections:
        index = part.index.expand(*part.index.shape[:-1], len(variance)).reshape(-1, len(variance))
        value = values[part.param]
        if value.numel() == 1 or not bool((index == index[:1]).all()) or part.maps:
            continue
        noise = binding.evaluate(values).double().expand(*binding.constant.shape)
        noise = noise.expand(*noise.shape[:-1], len(variance)).reshape(-1, len(variance))[0]
        for d in (noise.square() < _UNIQUENESS * variance).nonzero().reshape(-1).tolist():
            yield (
                f"'{part.param}'[{int(index[0, d])}]: the noise of coordinate {d} of "
                f"'{site.members[0]}' vanishes (a Heywood case), and EM comes nearer ever more "
                f"slowly; a floor stops it: updates={{'{part.param}': ClosedForm(floor=…)}}."
            )
