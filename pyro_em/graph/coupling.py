"""Elements of a plate that read each other: ``z.roll(1, -1)``, ``cumsum``, a mean over the plate.

Enumeration gives a latent one element for its whole plate, so that such a coupling vanishes and the
evidence is wrong in silence (in Pyro too). Here it is found by its definition, with plain runs: move
the latents at part of the plate, and nothing that belongs to another element may move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pyro_em.distributions import element_mask, has_finite_support, is_outside, unwrap
from pyro_em.errors import Finding
from pyro_em.families.registry import Given, given_by_all, stated_arguments
from pyro_em.graph.checks import read_from_outside
from pyro_em.tracing.feasible import without_masked_nonsense
from pyro_em.tracing.randomness import seeded
from pyro_em.tracing.sites import mask_tensor
from pyro_em.tracing.support import density_anywhere

_MANY_SITES = 1500  # sites in all runs together up to which every pair of elements is told apart


_FEW, _MOST = 3, 10  # halves of a plate that are moved
_DRAWS = 64  # values of a latent that is read as a number, until something moves

_ON, _OFF = torch.tensor(True), torch.tensor(False)

Sites = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Coupling:
    """Elements of a plate that read each other's latents.

    Attributes:
        latent: The latent that is read.
        plate: The plate whose elements read each other.
        site: The site that reads it.
        part: What of the site: an argument of its distribution, its value, mask or scale; empty
            where the site is outside the plate, and reads all elements or any.
    """

    latent: str
    plate: str
    site: str
    part: str

    @property
    def reason(self) -> str:
        """Why there is no exact sum over the latent, in a few words."""
        who = f"(site '{self.site}')" if self.part else f"in site '{self.site}'"
        how = "read each other's" if self.part else "meet outside it,"
        return f"elements of plate '{self.plate}' {how} {who}: no exact sum"

    def problem(self) -> Finding:
        """The finding in words."""
        if not self.part:
            return read_from_outside(self.site, self.latent, self.plate)
        z = self.latent
        return Finding(
            f"site '{self.site}'",
            f"its {self.part} reads latent '{z}' of other elements of plate '{self.plate}' (a shift, "
            "a sort, a sum or a product along the plate).",
            "an enumerated latent has one element for its whole plate, so that the coupling would "
            "vanish and the evidence would be wrong in silence; the elements are one joint "
            "latent, with K to the power of the plate's size values",
            (
                f"write the elements of '{z}' as a loop: for t in pyro.markov(range(N)): ..., with a "
                "site per element that reads the one before",
                f"give a guide that draws '{z}': ExactPosteriorEM(model, guide)",
                f"let each element read '{z}' of its own element only, or sample one '{z}' outside "
                f"plate '{self.plate}' if all share it",
            ),
            latents=(z,),
        )


def couplings(
    run: Callable[[Mapping[str, Tensor]], Sites],
    unobserved: Sites,
    suspects: frozenset[str],
    scopes: Mapping[str, frozenset[str]],
) -> list[Coupling]:
    """Find the sites at which elements of a plate read each other's latents.

    Args:
        run: Runs the model with all latents at given values, always from the same random state.
        unobserved: All latents as a plain run traced them.
        suspects: Those whose elements may be read by others.
        scopes: For each site with a density that counts, the latents that reach it.

    Returns:
        One finding per site and plate.
    """
    held = {n: s["value"].detach() for n, s in unobserved.items()}
    plates: dict[str, dict[str, int]] = {}
    sizes: dict[str, int] = {}
    for name in suspects:
        for frame in unobserved[name]["cond_indep_stack"]:
            if frame.dim is not None and frame.size > 1:
                plates.setdefault(frame.name, {})[name] = frame.dim
                sizes[frame.name] = frame.size
    generator = torch.Generator().manual_seed(11)
    levels = {n: _Levels(unobserved[n], generator) for n in suspects}
    found: list[Coupling] = []
    for plate in sorted(plates):
        members, size = plates[plate], sizes[plate]
        state = {**held, **{n: levels[n].at(0) for n in members}}
        before = run(state)
        told: set[str] = set()
        for i, part in enumerate(_parts_of_plate(size, len(scopes), generator)):
            moved_to = {
                n: _put(state[n], levels[n].next(i // 2), part, dim, unobserved[n]["fn"].event_dim)
                for n, dim in members.items()
            }
            after = run({**state, **moved_to})
            for name, what in _moved_elsewhere(before, after, scopes, plate, part):
                if name in told:
                    continue
                told.add(name)
                if any(True for _ in _moved_elsewhere(before, run(state), [name], plate)):
                    continue  # it differs from run to run by itself
                for latent in [n for n in members if n in scopes[name]] or list(members):
                    alone = run({**state, latent: moved_to[latent]})
                    if any(True for _ in _moved_elsewhere(before, alone, [name], plate, part)):
                        break
                found.append(Coupling(latent, plate, name, what))
            state, before = {**state, **moved_to}, after
    return found


def moved_by(
    run: Callable[[Mapping[str, Tensor]], Sites],
    unobserved: Sites,
    latent: str,
    names: Iterable[str],
) -> tuple[frozenset[str], frozenset[str]]:
    """Sites that differ when one latent takes other values and all other latents keep theirs.

    Args:
        run: Runs the model with all latents at given values, always from the same random state.
        unobserved: All latents as a plain run traced them.
        latent: The latent that moves.
        names: The sites that are looked at.

    Returns:
        Those that differ, and those that are there for some of its values only.
    """
    held = {n: s["value"].detach() for n, s in unobserved.items()}
    levels = _Levels(unobserved[latent], torch.Generator().manual_seed(11))
    others = [n for n in names if n != latent]
    before, found, passing = run(held), set[str](), set[str]()
    for i in range(_DRAWS):
        if found and i >= _FEW:
            break  # a branch may need many draws to be seen at all
        after = run({**held, latent: levels.next(i).to(held[latent].dtype)})
        passing |= before.keys() ^ after.keys()
        for name in others:
            if name not in before or name not in after:
                continue
            if any(
                x.shape != y.shape or differs(x, y, event_dim) is not None
                for _, x, y, event_dim in parts_of_both(before[name], after[name])
            ):
                found.add(name)
    return frozenset(found), frozenset(passing)


class _Levels:
    """Values for a latent to take at many elements at once: the ends of its support, and draws."""

    def __init__(self, site: Mapping[str, Any], generator: torch.Generator) -> None:
        self.fn, self.value, self.generator = site["fn"], site["value"].detach(), generator
        total = getattr(unwrap(self.fn)[0], "total_count", None)
        varies = isinstance(total, Tensor) and total.numel() > 1
        self.support: Tensor | None = None
        if has_finite_support(self.fn) and not varies:
            support = self.fn.enumerate_support(expand=False).detach()
            self.support = support.reshape(len(support), *self.fn.event_shape)

    def next(self, i: int) -> Tensor:
        """The last value, a draw, the first one, a draw, and on through the support."""
        if i % 2 == 1:
            return self.drawn()
        return self.at(-1 if i == 0 else i // 2 - 1)

    def at(self, k: int) -> Tensor:
        """One value of the support everywhere, or a draw."""
        if self.support is None:
            return self.drawn()
        return self.support[k % len(self.support)].expand(self.fn.shape())

    def drawn(self) -> Tensor:
        """A value per element: anyone of the support, or a draw from its distribution."""
        if self.support is None:
            with (
                torch.no_grad(),
                seeded(int(torch.randint(2**31, (), generator=self.generator))),
            ):
                return self.fn.sample()
        n = len(self.support)
        index = torch.randint(n, tuple(self.fn.batch_shape), generator=self.generator)
        return self.support[index.to(self.support.device)]


def _parts_of_plate(size: int, n_sites: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Halves of a plate, each followed by its complement: one moves, the other must not.

    Halves are the binary digits of shuffled numbers, so that with enough of them any two elements
    are apart in one half at least.
    """
    digits = max(1, (size - 1).bit_length())
    enough = max(_FEW, min(_MOST, _MANY_SITES // max(n_sites, 1)))
    number = torch.randperm(size, generator=generator)
    for i in range(max(4, min(digits, enough))):
        half = (number >> (i % digits)) & 1 == 1
        yield half
        yield ~half


def _put(old: Tensor, new: Tensor, part: Tensor, dim: int, event_dim: int) -> Tensor:
    """``new`` at the elements in ``part`` of a plate, ``old`` elsewhere."""
    along = part.to(old.device).reshape(-1, *(1,) * (-dim - 1 + event_dim))
    return torch.where(along, new.to(old.dtype), old)


def _moved_elsewhere(
    before: Sites,
    after: Sites,
    names: Iterable[str],
    plate: str,
    part: Tensor | None = None,
) -> Iterator[tuple[str, str]]:
    """Sites in a plate, and what of them differs at elements outside ``part``."""
    for name in names:
        a, b = before.get(name), after.get(name)
        dims = [f.dim for f in a["cond_indep_stack"] if f.name == plate] if a else []
        if a is None or b is None or not dims or dims[0] is None:
            continue
        for what, x, y, event_dim in parts_of_both(a, b):
            if x.shape != y.shape:
                continue
            moved = differs(x, y, event_dim)
            if moved is None:
                continue
            counts = counted_cells(a)
            moved = moved if counts is None else moved & counts.to(moved.device)
            if part is not None and moved.dim() >= -dims[0] and moved.shape[dims[0]] > 1:
                others = (~part).nonzero().reshape(-1).to(moved.device)
                moved = moved.index_select(dims[0], others)
            if bool(moved.any()):
                yield name, what
                break


def counted_cells(site: Mapping[str, Any]) -> Tensor | None:
    """Where an observed site counts: what is masked may be anything. None where all of it does."""
    mask = mask_tensor(site) if site["is_observed"] else None
    return mask if isinstance(mask, Tensor) else None


def parts_of(site: Mapping[str, Any]) -> list[tuple[str, Tensor, int]]:
    """What the density of a site is made of: (name, tensor, its rightmost event dimensions)."""
    return _parts(site, given_by_all([site["fn"]])[0])


def _parts(site: Mapping[str, Any], given: Given) -> list[tuple[str, Tensor, int]]:
    fn, value = site["fn"], site["value"]
    base, reinterpreted, wrapping, family, arguments = given
    is_masked = site["mask"] is not None or bool(wrapping)
    mask = element_mask(fn, site["mask"]) if is_masked else None
    stated = None if family is not None else stated_arguments(base)
    out: list[tuple[str, Tensor, int]] = []
    if family is not None:
        for name, tensor in arguments.items():
            event_dim = reinterpreted + family.argument_dims.get(name, 0)
            out.append((f"argument '{name}'", tensor, event_dim))
    elif stated is not None:
        for name, (tensor, event_dim) in stated.items():
            out.append((f"argument '{name}'", tensor, reinterpreted + event_dim))
    else:
        # What is masked need not be a value at all.
        shown = value
        if site["is_observed"] and mask is not None and isinstance(value, Tensor):
            shown = without_masked_nonsense(fn, value, mask)
        outside = site["is_observed"] and is_outside(fn, shown)
        log_p = density_anywhere(fn, shown) if outside else fn.log_prob(shown)
        counts = mask_tensor(site)
        if isinstance(counts, Tensor):
            log_p = torch.where(counts, log_p, 0.0)
        out.append(("log density", log_p, 0))
    if site["is_observed"] and isinstance(value, Tensor):
        out.append(("value", value, fn.event_dim))
    # A number of Python may follow from a latent's value, too: mask=bool(z.any()).
    if isinstance(mask, Tensor):
        out.append(("mask", mask, reinterpreted))
    else:
        out.append(("mask", _OFF if mask is False else _ON, 0))
    scale = site["scale"]
    if not isinstance(scale, Tensor):
        scale = _number(float(scale), torch.get_default_dtype())
    return [*out, ("scale", scale, 0)]


@lru_cache(maxsize=16)
def _number(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor, the same one for whoever asks: what is equal is seen at once."""
    return torch.tensor(value, dtype=dtype)


def parts_of_both(
    a: Mapping[str, Any], b: Mapping[str, Any]
) -> list[tuple[str, Tensor, Tensor, int]]:
    """What the densities of two sites are made of, side by side; see `parts_of`."""
    of_a, of_b = given_by_all([a["fn"], b["fn"]])
    sides = zip(_parts(a, of_a), _parts(b, of_b), strict=False)
    return [(what, x, y, event_dim) for (what, x, event_dim), (_, y, _) in sides]


def differs(a: Tensor, b: Tensor, event_dim: int) -> Tensor | None:
    """Where two tensors differ by more than rounding, per element of the batch; None if nowhere."""
    if a is b or (a.data_ptr() == b.data_ptr() and a.stride() == b.stride()):
        return None
    if torch.equal(a, b):  # one operation where most are the same
        return None
    if a.is_floating_point():
        tolerance = (64 * torch.finfo(a.dtype).eps) ** 0.75
        # Sums that cancel are as exact as what they sum.
        size = float(torch.nan_to_num(a.detach(), 0.0, 0.0, 0.0).abs().max()) if a.numel() else 0.0
        off = ~torch.isclose(a, b, rtol=tolerance, atol=tolerance * max(size, 1.0), equal_nan=True)
    else:
        off = a != b
    if not bool(off.any()):
        return None
    event = min(event_dim, off.dim())
    return off.flatten(off.dim() - event).any(-1) if event else off
