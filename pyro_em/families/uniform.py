"""Uniform: its bounds are the outermost data that it may have produced.

The density is 1 / (high − low) on [low, high), so that the likelihood rises until each bound meets the
outermost datum with a positive weight. In a mixture a component has weight only for the data within its
bounds: steps of EM move bounds inwards, to the outermost of these data, and never outwards.
"""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

from pyro_em.families.family import Arguments, Family, Rule, Statistics
from pyro_em.families.forms import Kind


def _no_statistics(value: Tensor, arguments: Arguments) -> Statistics:
    return {}


def _weighted_data(stats: Statistics, arguments: Arguments) -> tuple[Tensor, Tensor]:
    """The data and their weights."""
    return stats["event"], stats["weight"]


FAMILIES = (
    Family(
        dist.Uniform,
        _no_statistics,
        {"low": Rule(Kind.LOWER_END, _weighted_data), "high": Rule(Kind.UPPER_END, _weighted_data)},
        additive=False,
    ),
)
