"""What is given to ``pyro.sample`` in place of one of Pyro's distributions, said by the site's name.

Pyro takes any callable there and fails later: at a plate, at a shape that the object lacks, or when
its density is asked for.
"""

from __future__ import annotations

import types
from typing import Any

import pyro.distributions as dist
import torch

from pyro_em.errors import Finding, raise_findings


def require_distribution(site: str, fn: Any) -> None:
    """Refuse what is given at a site in place of a distribution; the indices of a plate are none.

    Raises:
        ModelError: If it is none of Pyro's.
    """
    if not isinstance(fn, dist.Distribution):
        raise_findings([_finding(site, fn)])


def _finding(site: str, fn: Any) -> Finding:
    what, why, fixes = _in_words(fn)
    return Finding(f"site '{site}'", f"it is given {what}.", why, fixes)


def _in_words(fn: Any) -> tuple[str, str, tuple[str, ...]]:
    """What something is, why it is no distribution of Pyro's, and what to write instead."""
    kind = type(fn)
    if isinstance(fn, torch.distributions.Distribution):
        name = kind.__name__
        if kind.__module__.startswith("torch.distributions") and hasattr(dist, name):
            return (
                f"torch.distributions.{name}, which is no distribution of Pyro's",
                _LACKS,
                (f"import pyro.distributions as dist, and write dist.{name}(...)",),
            )
        return (
            f"a {name}, which is no distribution of Pyro's",
            _LACKS,
            (f"derive it from Pyro's base class: class {name}(dist.TorchDistribution): ...",),
        )
    if isinstance(fn, type) and issubclass(fn, torch.distributions.Distribution):
        return (
            f"the class {fn.__name__}, not a distribution",
            "a site needs a distribution with its arguments",
            (f"give it its arguments: dist.{fn.__name__}(...)",),
        )
    if isinstance(fn, (types.FunctionType, types.MethodType)):
        return (
            "a function, not a distribution",
            "what a function draws has no density",
            (_WRITTEN, _FIXED),
        )
    return (
        "None" if fn is None else f"an object of type {kind.__name__}",
        "that is no distribution",
        (_WRITTEN, _FIXED),
    )


_LACKS = "it cannot be expanded by plates, masked or enumerated"

_WRITTEN = "pass a distribution, as in pyro.sample(name, dist.Normal(loc, scale))"

_FIXED = "where the value is known, write pyro.deterministic(name, value)"
