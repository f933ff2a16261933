"""Other rows of the same data, read as a model that is known.

Where data come in parts, a first pass reads each part and finds it sound. In later passes the same
rows come again, so that the model does with them what it did: it is run once, and nothing is looked
for. Where the first pass has shown that all that changes from part to part is what sites observe, and
that this is an argument as it was given, the model is not even run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.gaussian_lines.kept_lines import without_data
from pyro_em.graph.structure import form_of
from pyro_em.plan.eligibility import Kernel
from pyro_em.plan.program import Program, later_kernel
from pyro_em.posteriors.continuous.gaussian_steps import for_updates
from pyro_em.tracing.dependences import Dependences
from pyro_em.tracing.parameters import versions_of
from pyro_em.tracing.sites import Role
from pyro_em.updates.update import at_other_rows

_MOST = 8  # forms of data that are remembered

_SMALL = 2**16  # numbers of a group, what it observes left out, that are remembered


@dataclass(frozen=True, eq=False)
class Known:
    """A program without its data.

    Attributes:
        program: All that is the same for other rows in equal number.
        groups: Its groups, without what they observe; None where more may change with the rows.
        places: By group the argument that it observes, and the shape in which it holds it.
        is_confirmed: Whether other rows have shown that nothing else changes.
    """

    program: Program
    groups: tuple[Group, ...] | None
    places: Mapping[int, tuple[int, torch.Size]]
    is_confirmed: bool = False

    @classmethod
    def of(cls, program: Program) -> Known | None:
        """What is known of a program; None where that holds its data.

        Args:
            program: A program that was confirmed on its data.
        """
        if program.structure.series is not None or program.structure.random_plates:
            return None
        if program.lines and not without_data(program.lines):
            return None
        graph = program.graph
        places = _places(program)
        groups = None if places is None else tuple(_emptied(g) for g in graph.groups)
        latents = {} if places is None else graph.latents
        bare = replace(
            program,
            args=(),
            kwargs={},
            graph=FactorGraph(graph.structure, latents, (), graph.parameters),
            on_sums=_no_kernel,
            dependences=Dependences(),
            rebuild=None,
        )
        return cls(bare, groups, places or {})

    def confirmed(self, program: Program) -> Known | None:
        """What is known once other rows were read; None where they read other elements of a latent.

        Args:
            program: The program on them.
        """
        if not _same(_read(self.program), _read(program)):
            return None
        if self.groups is None:
            return self
        places = _places(program)
        same = places == self.places and _same(
            (self.groups, self.program.graph.latents),
            (tuple(_emptied(g) for g in program.graph.groups), program.graph.latents),
        )
        groups = self.groups if same else None
        return replace(self, groups=groups, is_confirmed=same)

    def on(self, args: tuple, kwargs: dict[str, Any]) -> Program:
        """The program on other rows.

        Args:
            args: The model's positional arguments, of the form of those that it was read on.
            kwargs: Its keyword arguments.
        """
        given = replace(self.program, args=args, kwargs=kwargs)
        updates = given.updates
        if self.is_confirmed:
            graph = replace(given.graph, groups=self._filled(args, kwargs))
        else:
            with torch.inference_mode(False), torch.enable_grad():
                graph = given._trace(with_bindings=not given.look_only)
            updates = at_other_rows(updates, for_updates(graph))
        return replace(
            given,
            graph=graph,
            updates=updates,
            traced_at=versions_of(graph.parameters),
            on_sums=later_kernel(graph, updates),
            compiled=given.compiled and graph.is_static,
        )

    def _filled(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Group, ...]:
        assert self.groups is not None
        groups, leaves = list(self.groups), _leaves(args, kwargs)
        for g, (leaf, shape) in self.places.items():
            groups[g] = replace(groups[g], value=leaves[leaf].reshape(shape))
        return tuple(groups)


class OtherRows:
    """Reads parts of the same data, in the first pass whole, in later ones as what is known.

    Args:
        look: Reads a model on some rows, whatever they are.
    """

    def __init__(self, look: Callable[[tuple, dict[str, Any]], Program]) -> None:
        self.look = look
        self._is_known = False
        self._by_form: dict[Hashable, Known | None] = {}

    def program(self, args: tuple, kwargs: dict[str, Any]) -> Program:
        """The program on some rows.

        Args:
            args: The model's positional arguments.
            kwargs: Its keyword arguments.
        """
        form = form_of(args, kwargs)
        known = self._by_form.get(form)
        if self._is_known:
            return self.look(args, kwargs) if known is None else known.on(args, kwargs)
        found = self.look(args, kwargs)
        if form in self._by_form:
            self._by_form[form] = None if known is None else known.confirmed(found)
        elif len(self._by_form) < _MOST:
            self._by_form[form] = Known.of(found)
        return found

    def without_a_run(self, args: tuple, kwargs: dict[str, Any]) -> Program | None:
        """The program on some rows, where that takes no run of the model; else None.

        Args:
            args: The model's positional arguments.
            kwargs: Its keyword arguments.
        """
        known = self._by_form.get(form_of(args, kwargs)) if self._is_known else None
        return known.on(args, kwargs) if known is not None and known.is_confirmed else None

    def end_of_pass(self) -> None:
        """All parts were read."""
        self._is_known = True


def _leaves(args: tuple, kwargs: Mapping[str, Any]) -> list[Tensor]:
    return [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]


def _places(program: Program) -> dict[int, tuple[int, torch.Size]] | None:
    """Which argument each group observes; None where a group holds other numbers of the data."""
    graph = program.graph
    if not program.compiled or program.lines or graph.missing:
        return None
    leaves = _leaves(program.args, program.kwargs)
    out = {}
    for g, group in enumerate(graph.groups):
        scaled = any(isinstance(s, Tensor) for s in group.scales)
        others = (group.mask, group.elements, group.raw, group.belief, group.nested)
        if scaled or any(o is not None for o in others) or _size(_emptied(group)) > _SMALL:
            return None
        if not group.observed or group.role is Role.POINT:
            if group.value.numel() > _SMALL:
                return None
            continue
        leaf = next((i for i, leaf in enumerate(leaves) if _is_view(group.value, leaf)), None)
        if leaf is None:
            return None
        out[g] = (leaf, group.value.shape)
    return out


def _read(program: Program) -> Mapping[str, Any]:
    """Which elements of conjugate latents each site reads, and how."""
    return {} if program.conjugates is None else program.conjugates.reads


def _is_view(value: Tensor, leaf: Tensor) -> bool:
    """Whether a value is an argument, in another shape."""
    return (
        value.data_ptr() == leaf.data_ptr()
        and value.numel() == leaf.numel()
        and value.dtype == leaf.dtype
        and value.is_contiguous()
        and leaf.is_contiguous()
    )


def _emptied(group: Group) -> Group:
    """A group without what it observes."""
    is_data = group.observed and group.role is not Role.POINT
    return replace(group, value=group.value.new_empty(0)) if is_data else group


def _size(group: Group) -> int:
    tensors = [
        *group.arguments.values(),
        *(t for b in group.bindings.values() for t in vars(b).values() if isinstance(t, Tensor)),
    ]
    return sum(t.numel() for t in tensors)


def _same(a: Any, b: Any) -> bool:
    """Whether two values are of one kind and hold equal numbers."""
    if a is b:
        return True
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        return bool((a.detach() == b.detach()).all())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, Sequence) and isinstance(b, Sequence) and not isinstance(a, str):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if is_dataclass(a) and type(a) is type(b):
        return all(_same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return type(a) is type(b) and bool(a == b)


def _no_kernel() -> Kernel:
    raise AssertionError("a program without data has no kernel")
