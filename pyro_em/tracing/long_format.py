"""Sites of a long table, laid out under the plate whose latents they read by an index.

    with pyro.plate("subjects", S):
        z = pyro.sample("z", dist.Categorical(weights))
    with pyro.plate("rows", N):
        pyro.sample("y", dist.Normal(mu[z[subject]], sd), obs=y)

Every row reads one element of ``z``, so that the sum over all of its values is one for each subject:

    log p(y) = Σ_s log Σ_k p(z_s = k) Π_{n: subject_n = s} p(y_n | k).

Under this module's handlers the rows of a subject lie below it, in a plate of their own that is as long
as the longest subject's, with the places that are left over masked. The model runs as it is written: an
index into an enumerated latent goes to the dimension of its plate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_em.distributions import unwrap
from pyro_em.tracing.handlers import SampleMessenger
from pyro_em.tracing.runs import Model

_MOST, _FEW = 64, 2**20  # places for each row, and places that are few in any case


@dataclass(frozen=True)
class Read:
    """How a site reads latents of another plate.

    Attributes:
        latents: The latents, all by one index.
        plate: Their plate.
        rows: The site's own plate.
    """

    latents: tuple[str, ...]
    plate: str
    rows: str


@dataclass(frozen=True, eq=False)
class LongFormat:
    """A model whose sites of a long table lie under the plates of the latents that they read.

    Attributes:
        users_model: The user's model.
        reads: Per site what it reads.
        depth: The dimension of the rows of one element, from the right.
    """

    users_model: Model
    reads: Mapping[str, Read]
    depth: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        indices = Indices({n for r in self.reads.values() for n in r.latents})
        with indices, Noting(indices), LaidOut(self, indices):
            return self.users_model(*args, **kwargs)


def as_written(model: Model) -> Model:
    """The model whose long tables are as the user wrote them."""
    return model.users_model if isinstance(model, LongFormat) else model


class Indices(TorchFunctionMode):
    """Note by which indices latents are read; an enumerated latent is indexed along its plate.

    Args:
        latents: Names of the latents, each of one plate, the rightmost dimension.
    """

    def __init__(self, latents: set[str]) -> None:
        super().__init__()
        self.latents = latents
        self.found: dict[str, list[Tensor]] = {}
        self._values: dict[int, tuple[str, int, Tensor]] = {}

    def begin(self, name: str, value: Tensor, size: int) -> None:
        """From now on indices into this value are those of a latent."""
        self._values[id(value)] = name, size, value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__getitem__ or id(args[0]) not in self._values:
            return func(*args, **(kwargs or {}))
        name, size, value = self._values[id(args[0])]
        index = args[1]
        if isinstance(index, tuple):
            index = index[-1] if len(index) == 1 or index[:-1] == (Ellipsis,) else None
        if not isinstance(index, Tensor) or index.dim() != 1 or index.is_floating_point():
            return func(*args, **(kwargs or {}))
        self.found.setdefault(name, []).append(index)
        if value.dim() == 1:
            return func(*args, **(kwargs or {}))
        return value.expand(*value.shape[:-1], size)[(..., index)]

    def of(self, read: Read, size: int) -> Tensor | None:
        """The index by which all rows of a plate read latents; None where there is no single one.

        Args:
            read: Which latents.
            size: How many rows there are.
        """
        each = [[i for i in self.found.get(n, ()) if len(i) == size] for n in read.latents]
        own = [i for indices in each for i in indices]
        if not all(each) or own[0].dtype is torch.bool or bool((own[0] < 0).any()):
            return None
        same = all(i is own[0] or torch.equal(i, own[0]) for i in own)
        return own[0] if same else None


class Noting(SampleMessenger):
    """Tell which tensors are the values of latents."""

    def __init__(self, indices: Indices) -> None:
        super().__init__()
        self.indices = indices

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.indices.latents:
            sizes = [f.size for f in msg["cond_indep_stack"] if f.dim == -1]
            self.indices.begin(msg["name"], msg["value"], sizes[0])


class LaidOut(SampleMessenger):
    """Lay the sites of a long table out under the elements that their rows read."""

    def __init__(self, model: LongFormat, indices: Indices) -> None:
        super().__init__()
        self.model, self.indices = model, indices
        self._frames: dict[str, CondIndepStackFrame] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        for frame in msg["cond_indep_stack"]:
            self._frames.setdefault(frame.name, frame)
        read = self.model.reads.get(msg["name"])
        if read is None or read.plate not in self._frames:
            return
        rows, outer = self._frames[read.rows], self._frames[read.plate]
        index = self.indices.of(read, rows.size)
        if index is None or not len(index) or not isinstance(msg["value"], Tensor):
            return
        if _size(index, outer.size) > _MOST * len(index) + _FEW:
            return
        layout = Layout.of(index, outer.size, self.model.depth)
        fn = msg["fn"]
        try:
            msg["fn"] = layout.distribution(fn)
        except NotLaidOut:
            return  # the site stays as it is, and is refused
        own = CondIndepStackFrame(
            f"{rows.name} of {outer.name}", self.model.depth, len(layout.rows), 0
        )
        kept = [f for f in msg["cond_indep_stack"] if f.name != rows.name]
        msg["cond_indep_stack"] = (*kept, outer, own)
        msg["value"] = layout.gathered(
            msg["value"].expand(*fn.batch_shape[-1:], *fn.event_shape), fn.event_dim
        )
        mask = msg["mask"]
        if isinstance(mask, Tensor):
            mask = layout.gathered(mask.expand(torch.broadcast_shapes(mask.shape, index.shape)), 0)
        msg["mask"] = layout.there if mask is None else layout.there & mask
        if isinstance(msg["scale"], Tensor) and msg["scale"].dim():
            msg["scale"] = layout.gathered(msg["scale"].expand(fn.batch_shape[-1:]), 0)


def _size(index: Tensor, size: int) -> int:
    """How many places a layout has: the longest element's rows, for each element."""
    return int(torch.bincount(index, minlength=size).max()) * size


@dataclass(frozen=True, eq=False)
class Layout:
    """Which row of a long table lies where below the element that it reads.

    Attributes:
        rows: The number of the row at each place; another one where none is. # (M, S)
        there: Where there is one. # (M, *1s, S), M in the dimension ``depth``
        depth: The dimension of the rows of one element, from the right.

    Example:
        >>> layout = Layout.of(torch.tensor([1, 0, 1]), 2, -2)
        >>> layout.gathered(torch.tensor([5.0, 6.0, 7.0]), 0) * layout.there
        tensor([[6., 5.],
                [0., 7.]])
    """

    rows: Tensor
    there: Tensor
    depth: int

    @classmethod
    def of(cls, index: Tensor, size: int, depth: int) -> Layout:
        """The layout of rows that read these elements.

        Args:
            index: The element that each row reads. # (N,)
            size: How many elements there are.
            depth: See the attribute.
        """
        counts = torch.bincount(index, minlength=size)
        order = torch.argsort(index, stable=True)
        begins = torch.cumsum(counts, 0) - counts
        place = torch.arange(len(index), device=index.device) - begins[index[order]]
        # Places that are left over hold the first row of their element, where it has any.
        first = order[begins.clamp(max=max(len(order) - 1, 0))]
        rows = first.repeat(int(counts.max()), 1)
        rows[place, index[order]] = order
        there = torch.arange(len(rows), device=index.device).unsqueeze(-1) < counts
        ones = (1,) * (-depth - 2)
        return cls(rows, there.reshape(len(rows), *ones, size), depth)

    def gathered(self, t: Tensor, event_dim: int) -> Tensor:
        """A tensor over the rows, laid out. # (*batch, N, *event) to (*batch, M, *1s, S, *event)"""
        event = t.shape[t.dim() - event_dim :]
        batch = t.shape[: t.dim() - event_dim]
        lead = batch[: max(len(batch) + self.depth, 0)]
        flat = t.reshape(*lead, batch[-1], *event)
        found = flat.index_select(len(lead), self.rows.reshape(-1))
        ones = (1,) * (-self.depth - 2)
        return found.reshape(*lead, len(self.rows), *ones, self.rows.shape[1], *event)

    def distribution(self, fn: Any) -> Any:
        """A distribution over the rows, laid out.

        Raises:
            NotLaidOut: If it is no record of tensors.
        """
        base, reinterpreted, masks = unwrap(fn)
        shape = (*fn.batch_shape, *fn.event_shape[:reinterpreted])
        arguments = {}
        for name, constraint in base.arg_constraints.items():
            if name not in base.__dict__:
                continue
            value = base.__dict__[name]
            if not isinstance(value, Tensor):
                arguments[name] = value
                continue
            own = constraint.event_dim
            whole = value.expand(*shape, *value.shape[value.dim() - own :])
            arguments[name] = self.gathered(whole, reinterpreted + own)
        if not arguments:
            raise NotLaidOut(type(base).__name__)
        try:
            found = type(base)(**arguments, validate_args=False)
        except (TypeError, ValueError) as error:  # it is made from something else
            raise NotLaidOut(type(base).__name__) from error
        if any(inside != reinterpreted for _, inside in masks):
            raise NotLaidOut("a mask of rows")
        for mask, _ in masks:
            if isinstance(mask, Tensor):
                whole = mask.expand(torch.broadcast_shapes(mask.shape, shape))
                mask = self.gathered(whole, reinterpreted)
            found = found.mask(mask)
        return found.to_event(reinterpreted) if reinterpreted else found


class NotLaidOut(Exception):
    """A distribution that holds more than tensors of its rows."""
