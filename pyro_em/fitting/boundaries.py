"""What is out of the ordinary where a fit with Gaussian latents ends, in sentences for its notes.

Loadings at zero are a stationary point of EM; a variance of latents may have its maximum at zero; the
noise of one observed coordinate may vanish (a Heywood case), which EM approaches ever more slowly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pyro_em.errors import DegenerateError
from pyro_em.graph.binding import Binding
from pyro_em.graph.factors import Group
from pyro_em.plan.program import Program
from pyro_em.posteriors.exact import log_evidence_of
from pyro_em.posteriors.gaussian import GaussianBlock
from pyro_em.tracing.parameters import values_of
from pyro_em.tracing.sites import Role
from pyro_em.updates.gaussian_rows import is_matrix

_UNIQUENESS = 0.005  # of a coordinate's variance: below, its noise has vanished
_SINGULAR = 1e-6  # of the largest eigenvalue of a covariance
_FEW = 16  # variances of which each is tried at zero


@torch.no_grad()
def loadings_at_zero(program: Program) -> str:
    """Which loadings are at a stationary point of EM, in a sentence; empty where none are.

    Args:
        program: The model with its data, its parameters where a fit ended.
    """
    values = values_of(program.graph.parameters)
    return " ".join(n for block in _blocks(program) for n in _loadings_at_zero(block, values))


@torch.no_grad()
def boundary_notes(program: Program, log_evidence: float | None) -> list[str]:
    """Notes on variances and noises at the parameters where a fit ended.

    Args:
        program: The model with its data.
        log_evidence: At these parameters, in nats; None where the program has not all data, and
            nothing is tried.
    """
    values = values_of(program.graph.parameters)
    out: dict[str, None] = {}
    tried: set[tuple[str, int]] = set()
    for block in _blocks(program):
        for site in block.groups:
            if site.role is Role.GAUSSIAN:
                found = _variances_at_zero(program, site, values, log_evidence, tried)
                out |= dict.fromkeys(found)
            else:
                out |= dict.fromkeys(_noises_at_zero(site, values))
    return list(out)


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
    program: Program,
    site: Group,
    values: Mapping[str, Tensor],
    now: float | None,
    tried: set[tuple[str, int]],
) -> Iterator[str]:
    """Elements of parameters that a latent's variance is, and that may as well be zero; each once."""
    name = site.members[0]
    for argument, binding in site.bindings.items():
        if argument in site.lines or not binding.params:
            continue
        if is_matrix(site):
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
            continue
        if now is None:
            continue
        for parameter, elements in _read(binding):
            value = values[parameter]
            for i in elements[:_FEW]:
                if (parameter, i) in tried:
                    continue
                tried.add((parameter, i))
                trial = value.clone()
                trial.view(-1)[i] = 0
                if bool(_is_as_high(program, {**values, parameter: trial}, now)):
                    place = f"[{i}]" if value.numel() > 1 else ""
                    yield (
                        f"'{parameter}'{place}: the evidence is as high where the variance of '{name}' "
                        "is zero, its boundary: the data show no spread of it."
                    )


def _is_as_high(program: Program, values: Mapping[str, Tensor], now: float) -> bool:
    try:
        at = program.evaluate(values)
        there = log_evidence_of(at.graph, program.contraction, at.tables)
    except DegenerateError:  # no noise below it, or a prior that excludes the boundary
        return False
    return there >= now - 1e-10 * max(1.0, abs(now))


def _read(binding: Binding) -> Iterator[tuple[str, list[int]]]:
    """The elements of parameters that stand as they are in an argument."""
    for part in binding.selections:
        if not part.maps:
            yield part.param, part.index[part.index >= 0].unique().tolist()


def _noises_at_zero(site: Group, values: Mapping[str, Tensor]) -> Iterator[str]:
    """Noises of single coordinates that are next to nothing of their variance."""
    if is_matrix(site) or site.event_dims != 1 or site.value.shape[:-1].numel() < 3:
        return
    binding = site.bindings["scale"]
    rows = site.value.double().flatten(0, -2)
    variance = (rows - rows.mean(0)).square().mean(0)  # a tenth of the time of torch.var
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
