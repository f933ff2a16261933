"""Candidates: the models that a function makes for each combination of its keywords."""

from __future__ import annotations

import difflib
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from pyro_em.arguments import shown
from pyro_em.em import ExactPosteriorEM
from pyro_em.errors import UsageError, message
from pyro_em.portable import StaysHere
from pyro_em.tracing.randomness import seeded

Key: TypeAlias = tuple[Any, ...]
"""The values of the keywords that vary, in their order."""

_HOW = "write def build(K): def model(x): ...; return model"


@dataclass(frozen=True, eq=False)
class Grid(StaysHere):
    """All combinations of some keywords' values.

    Attributes:
        build: Makes a model, or an `ExactPosteriorEM`, of keywords.
        names: The keywords that vary.
        values: Their values.
        fixed: Keywords with one value.
        seed: Of whatever ``build`` draws.
    """

    build: Callable[..., Any]
    names: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]
    fixed: Mapping[str, Any]
    seed: int

    @classmethod
    def of(cls, build: Any, keywords: Mapping[str, Any], seed: int) -> Grid:
        """The grid that a call of `select` asks for.

        Raises:
            UsageError: If ``build`` cannot be called with these keywords.
        """
        if not callable(build) or isinstance(build, ExactPosteriorEM):
            raise UsageError(
                message(
                    "select",
                    f"build is {shown(build)}, not a function that makes models.",
                    "each candidate is a model of its own, made by build(**keywords)",
                    [_HOW],
                )
            )
        several = {name: tuple(v) for name, v in keywords.items() if _are_several(v)}
        for name, values in several.items():
            if not values:
                raise UsageError(
                    message("select", f"{name} has no values.", "", [f"{name}=[2, 3]"])
                )
        if not several:
            raise UsageError(
                message(
                    "select",
                    "no keyword has several values.",
                    "there is nothing to choose among",
                    ["give several: K=range(1, 7), covariance=['full', 'diagonal']"],
                )
            )
        _check_keywords(build, keywords)
        fixed = {name: v for name, v in keywords.items() if name not in several}
        return cls(build, tuple(several), tuple(several.values()), fixed, seed)

    @property
    def keys(self) -> list[Key]:
        """All combinations, the last keyword fastest."""
        return list(itertools.product(*self.values))

    def made(self, key: Key) -> ExactPosteriorEM:
        """The model of one combination.

        Raises:
            UsageError: If ``build`` makes none.
        """
        keywords = {**self.fixed, **dict(zip(self.names, key, strict=True))}
        with seeded(self.seed):
            model = self.build(**keywords)
        if isinstance(model, ExactPosteriorEM):
            return model
        if not callable(model):
            call = ", ".join(f"{n}={shown(v)}" for n, v in keywords.items())
            what = "returned nothing" if model is None else f"returned {shown(model)}"
            raise UsageError(
                message(
                    "select",
                    f"build({call}) {what}.",
                    "it makes a model, a function of the data, or an ExactPosteriorEM",
                    [_HOW, "end build with: return model"],
                )
            )
        return ExactPosteriorEM(model)


def _are_several(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Tensor, Mapping))


def _check_keywords(build: Callable[..., Any], keywords: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(build).parameters
    except (TypeError, ValueError):
        return
    kinds = {p.kind for p in parameters.values()}
    known = [n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        for name in keywords:
            if name in known:
                continue
            near = [n for n in known if n.casefold() == name.casefold()]
            near = near or difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                message(
                    "select",
                    f"build has no keyword '{name}'"
                    + (f"; did you mean '{near[0]}'?" if near else "."),
                    "keywords that are not select's own go to build",
                    [f"build takes: {', '.join(known) or 'nothing'}"],
                )
            )
    needed = [
        n
        for n, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    left = [n for n in needed if n not in keywords]
    if left:
        raise UsageError(
            message(
                "select",
                f"build also takes '{left[0]}', which has no value.",
                "build makes the model from keywords; the data go to the model that it returns",
                [_HOW, f"give it: {left[0]}=..."],
            )
        )
