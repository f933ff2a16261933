"""Names by glob: which sites a pattern means, in order of time, and what they hold, stacked.

A name that exists is itself, whatever characters it has. Everything else is a pattern of
`fnmatch` (``*``, ``?``, ``[seq]``), case matters. Numbers in names are compared as numbers, so that
``z_2`` comes before ``z_10``, whatever the order in which a model makes its sites.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase, translate

import torch
from torch import Tensor

from pyro_em.errors import UnknownNameError, UsageError, message

_DIGITS = re.compile(r"(\d+)")

_LISTED = 6  # names of one numbering that a message lists; of more the first and the last


def is_match(name: str, pattern: str) -> bool:
    """Whether a pattern is this name, or matches it.

    Example:
        >>> is_match("z_1", "z_*"), is_match("z[1]", "z[1]"), is_match("y", "z_*")
        (True, True, False)
    """
    return name == pattern or fnmatchcase(name, pattern)


def is_glob(pattern: str) -> bool:
    """Whether a name that does not exist can be meant as a pattern."""
    return any(c in pattern for c in "*?[")


def natural(name: str) -> list[str | int]:
    """A key that sorts numbers in names as numbers.

    Example:
        >>> sorted(["z_10", "z_2", "y"], key=natural)
        ['y', 'z_2', 'z_10']
    """
    parts: list[str | int] = list(_DIGITS.split(name))
    parts[1::2] = [int(p) for p in parts[1::2]]
    return parts


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """All names that a pattern matches, in natural order.

    Example:
        >>> matching("z_*", ["z_10", "x_2", "z_2"])
        ['z_2', 'z_10']
    """
    match = re.compile(translate(pattern)).match
    return sorted((n for n in names if match(n)), key=natural)


def meant(pattern: str, names: Collection[str]) -> list[str]:
    """The name itself where it exists, else all that it matches as a glob, in natural order.

    Example:
        >>> meant("w[0]", ["w[0]", "w0"]), meant("w*", ["w1", "w0"])
        (['w[0]'], ['w0', 'w1'])
    """
    return [pattern] if pattern in names else matching(pattern, names)


def listed(names: Collection[str]) -> str:
    """Names in a message; of many that differ in numbers only, the first and the last.

    Example:
        >>> listed(["a", "b"])
        "'a', 'b'"
        >>> listed([f"z_{t}" for t in range(1000)])
        "'z_0', …, 'z_999' (1,000 names)"
        >>> listed([])
        'none'
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_DIGITS.sub("#", name), []).append(name)
    words = []
    for members in alike.values():
        if len(members) <= _LISTED:
            words += [f"'{n}'" for n in members]
        else:
            first, last = min(members, key=natural), max(members, key=natural)
            words.append(f"'{first}', …, '{last}' ({len(members):,} names)")
    if len(words) > 20:
        words = [*words[:19], f"… ({len(names):,} names)"]
    return ", ".join(words) or "none"


def unknown(pattern: str, names: Collection[str], what: str) -> UnknownNameError:
    """The error of a name or pattern that means nothing.

    Args:
        pattern: As it was given.
        names: What there is.
        what: What these are, in the plural.
    """
    literal = pattern.replace("[", "[[]")
    if not is_glob(pattern):
        found, fixes = "there is no such name", ["ask for one of them"]
    elif "[" in pattern and matching(literal, names):
        found = "it matches nothing: in a glob, brackets list characters"
        fixes = [f"write '{literal}' for brackets that belong to the names"]
    else:
        found, fixes = "it matches nothing", ["ask for one of them, or for a glob such as 'z_*'"]
    return UnknownNameError(
        message(f"'{pattern}'", f"{found}; the {what} are: {listed(names)}.", fixes=fixes)
    )


def require_alike(where: str, shapes: Iterable[tuple[str, Sequence[int]]]) -> None:
    """Refuse to stack what has no common shape.

    Args:
        where: What was asked for.
        shapes: Each name with its shape.

    Raises:
        UsageError: Naming the first that differs from the one before it.
    """
    before: tuple[str, tuple[int, ...]] | None = None
    for name, shape in shapes:
        if before is not None and tuple(shape) != before[1]:
            raise UsageError(
                message(
                    where,
                    f"'{name}' has shape {tuple(shape)}, '{before[0]}' before it {before[1]}.",
                    "what a glob stacks has one shape",
                    ["ask for each by its name", "ask for those of one shape with a narrower glob"],
                )
            )
        before = (name, tuple(shape))


def stacked_answers(where: str, names: Sequence[str], answer: Callable[[str], Tensor]) -> Tensor:
    """The answers for several names along a new first dimension.

    Args:
        where: What was asked for.
        names: At least one.
        answer: Gives the tensor of a name.

    Returns:
        # (T, *shape)

    Raises:
        UsageError: If two answers differ in shape; names the first that differs.
    """
    answers = [answer(n) for n in names]
    require_alike(where, zip(names, (a.shape for a in answers), strict=True))
    return torch.stack(answers)


class Values(dict[str, Tensor]):
    """Values by site, an ordinary dict, of which a glob takes many at once.

    ``values["z_*"]`` is ``torch.stack([values["z_0"], values["z_1"], …])`` in order of time, with
    time first, # (T, *shape of one); for draws # (T, n, *plates, *event). Membership, length and
    iteration know names only.

    Args:
        values: By name.
        observed: Observed steps that would be missing among those that a glob stacks.

    Example:
        >>> Values({"z_0": torch.tensor(1), "z_1": torch.tensor(2)})["z_*"]
        tensor([1, 2])
    """

    def __init__(self, values: Mapping[str, Tensor], observed: Iterable[str] = ()) -> None:
        super().__init__(values)
        self.observed = tuple(observed)

    def __missing__(self, name: str) -> Tensor:
        if not isinstance(name, str):
            raise KeyError(name)
        names = matching(name, self)
        if not names:
            raise unknown(name, self, "names")
        refuse_gaps(name, self.observed)
        return stacked_answers(f"'{name}'", names, super().__getitem__)

    def get(self, name: str, default: object = None) -> object:  # type: ignore[override]
        """The value of a name, those of a glob stacked, or the default where there is none."""
        try:
            return self[name]
        except KeyError:
            return default

    def copy(self) -> Values:
        """A shallow copy."""
        return Values(self, self.observed)


def refuse_gaps(pattern: str, observed: Iterable[str]) -> None:
    """Refuse a glob of steps of which some are observed and would be left out without a word.

    Args:
        pattern: The glob.
        observed: Observed sites that are numbered as latents are.

    Raises:
        UsageError: Naming the first of them that the glob matches.
    """
    missing = next(iter(matching(pattern, observed)), None)
    if missing is not None:
        raise UsageError(
            message(
                f"'{pattern}'",
                f"it matches '{missing}' as well, which is observed and is no latent.",
                "the rows would not be in line with the steps",
                [
                    "ask for a run of steps with a narrower glob, or for each by its name",
                    "give what is observed with obs_mask=, so that every step is a latent",
                ],
            )
        )
