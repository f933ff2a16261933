"""Whether the numbers of a run can be used: arguments inside their constraints, data inside supports.

Steps of equal form are looked at together: what is not seen to be sound then is looked at by itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_em.distributions import are_inside, bases_of, depends_on_tensors, satisfies
from pyro_em.families.family import BUILT_IN
from pyro_em.families.registry import family_of
from pyro_em.graph.factors import FactorGraph
from pyro_em.graph.findings.value_checks import data_problems, weight_problems
from pyro_em.graph.forms import FEW, in_forms, in_parts, unrepeated
from pyro_em.graph.structure import Structure
from pyro_em.tracing.sites import Role

Site = Mapping[str, Any]


def are_possible(
    sites: Mapping[str, Site], structure: Structure, forms: Mapping[str, Hashable | None]
) -> bool:
    """Whether nothing can be found fault with in observed values, weights and arguments.

    Args:
        sites: The sites of an enumerated run.
        structure: The skeleton.
        forms: Of the sites.
    """
    shown = structure.as_run
    kinds: dict[str, Hashable | None] = {
        name: None if forms.get(name) is None else (forms[name], info.role)
        for name, info in shown.sites.items()
        if name not in shown.passing
    }
    for names in in_forms(kinds):
        is_data = shown.sites[names[0]].role is Role.DATA
        alike = [sites[n] for n in names]
        if len(alike) >= FEW and _are_surely_possible(alike, is_data):
            continue
        if not all(_is_possible(n, sites[n], is_data) for n in names):
            return False
    return True


def finds_all(graph: FactorGraph, structure: Structure) -> bool:
    """Whether `are_possible` finds all that Pyro's validation finds at the sites of such a run.

    Args:
        graph: The factor graph of the run.
        structure: The skeleton.
    """
    return not structure.barren and all(
        group.family is not None
        and group.family is BUILT_IN.get(group.family.distribution)
        and group.family.distribution not in _CHECKING_MORE
        for group in graph.groups
    )


# Their constructors check what none of the constraints of their arguments says.
_CHECKING_MORE = (dist.Geometric, dist.Uniform)


def _is_possible(name: str, site: Site, is_data: bool) -> bool:
    if is_data and data_problems(name, site):
        return False
    if weight_problems(name, site) or not are_inside(site["fn"]):
        return False
    scale = site["scale"]
    return not isinstance(scale, Tensor) or bool((scale > 0).all())


def _are_surely_possible(alike: Sequence[Site], is_data: bool) -> bool:
    """Whether sites of one form, which have no mask and no scale, are seen to be possible together."""
    fns = bases_of([site["fn"] for site in alike])
    first = fns[0]
    if family_of(first) is None or any(isinstance(p, Distribution) for p in vars(first).values()):
        return False  # what it declares may be another for each of them
    for name, constraint in first.arg_constraints.items():
        if not isinstance(vars(first).get(name), Tensor) or constraints.is_dependent(constraint):
            continue
        if depends_on_tensors(constraint):
            return False
        stacks = _stacks([vars(fn)[name] for fn in fns], constraint.event_dim)
        if not all(satisfies(constraint, s) for s in stacks):
            return False
    if not is_data:
        return True
    support = alike[0]["fn"].support
    return not depends_on_tensors(support) and all(
        bool(torch.isfinite(s).all()) and bool(support.check(s).all())
        for s in _stacks([site["value"] for site in alike], support.event_dim)
    )


def _stacks(tensors: Sequence[Tensor], event_dim: int) -> list[Tensor]:
    """Tensors of one form, a bounded number of cells at once. # (some of them, *shape)"""
    tensors = unrepeated(tensors, event_dim)
    return [torch.stack(tensors[part]) for part in in_parts(len(tensors), tensors[0].numel())]
