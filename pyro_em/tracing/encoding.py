"""Values of tensors as what a file of tensors can hold, bit for bit, and back.

A file that ``torch.load(weights_only=True)`` reads has dicts, lists, tuples, tensors, numbers, texts.
Records of this library (frozen dataclasses of tensors, arrays and numbers) become dicts that name their
class; nothing in a file can name another one. What a record keeps only so as not to compute it twice is
a field with the metadata `DERIVED`, and is left out.

Strides are kept, since sums along another order of memory may round differently.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

DERIVED: Mapping[str, bool] = {"derived": True}


_RECORD, _ARRAY, _PLACED = "record of", "array", "on device"


_PLAIN = (bool, int, float, str, bytes, type(None))

_OWN = "pyro_em."


# Records that went to another file of their wing, by the wing and the file that earlier versions name.
_MOVED: Mapping[tuple[str, str], str] = {
    ("updates", "running_sums"): "model_sums",
    ("posteriors", "collapsed"): "at_values",
    ("posteriors", "conjugate_rows"): "at_values",
}


class NotPlain(TypeError):
    """A value that no file of tensors can hold."""


def encoded(value: Any) -> Any:
    """A value as dicts, lists, tuples, tensors, numbers and texts; nothing is copied that need not be.

    Args:
        value: A tensor, an array, a number, a text, None, a container or a record of such.

    Raises:
        NotPlain: If there is something else in it.

    Example:
        >>> encoded({"x": (1, None)})
        {'x': (1, None)}
    """
    if isinstance(value, Tensor):
        return _encoded_tensor(value)
    if isinstance(value, np.ndarray):
        return {_ARRAY: _as_tensor(value)}
    if isinstance(value, np.generic):
        return {_ARRAY: _as_tensor(np.asarray(value)), "scalar": True}
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Mapping):
        return {_key(k): encoded(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(encoded(v) for v in value)
    if dataclasses.is_dataclass(value) and type(value).__module__.startswith(_OWN):
        return _encoded_record(value)
    raise NotPlain(f"a {type(value).__name__}")


def decoded(state: Any) -> Any:
    """The value that `encoded` made a state of.

    Raises:
        NotPlain: If the state names a class that this version of the library does not have.

    Example:
        >>> decoded(encoded([np.arange(2.0), torch.ones(1)]))
        [array([0., 1.]), tensor([1.])]
    """
    if isinstance(state, dict):
        if _RECORD in state:
            return _decoded_record(state)
        if _ARRAY in state:
            array = state[_ARRAY].numpy()
            return array[()] if state.get("scalar") else array
        if _PLACED in state:
            return state["tensor"].to(state[_PLACED])
        return {k: decoded(v) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(decoded(v) for v in state)
    return state


def _key(key: Any) -> Any:
    if type(key) not in _PLAIN or key in (_RECORD, _ARRAY, _PLACED):
        raise NotPlain(f"the key {key!r}")
    return key


def _encoded_tensor(t: Tensor) -> Any:
    if t.layout is not torch.strided or t.is_quantized or t.is_meta:
        raise NotPlain(f"a tensor of layout {t.layout}")
    t = t.detach()
    # A small view of a large piece of memory would take all of that into the file.
    if t.untyped_storage().nbytes() > 2 * t.numel() * t.element_size() + 1024:
        t = t.clone()
    if t.device.type != "cpu":
        return {_PLACED: str(t.device), "tensor": t.cpu()}
    return t


def _as_tensor(a: np.ndarray[Any, Any]) -> Tensor:
    try:
        can_share = a.flags.writeable and all(s >= 0 for s in a.strides)
        return torch.from_numpy(a if can_share else a.copy(order="K"))
    except TypeError as error:  # of texts or objects
        raise NotPlain(f"an array of {a.dtype}") from error


def _encoded_record(value: Any) -> dict[str, Any]:
    cls = type(value)
    fields = {
        f.name: encoded(getattr(value, f.name))
        for f in dataclasses.fields(value)
        if f.init and f.metadata != DERIVED
    }
    return {_RECORD: f"{cls.__module__}:{cls.__qualname__}", "fields": fields}


def _decoded_record(state: Mapping[str, Any]) -> Any:
    module, _, name = str(state[_RECORD]).partition(":")
    # Never imported for a file: what a fit computes with is there before it is read.
    found = (getattr(sys.modules.get(place), name, None) for place in _places(module))
    cls: Any = next((c for c in found if c is not None), None)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise NotPlain(f"a record of {state[_RECORD]}, which this version does not have")
    derived = {f.name for f in dataclasses.fields(cls) if f.metadata == DERIVED}
    fields = {k: v for k, v in state["fields"].items() if k not in derived}
    if not fields.keys() <= {f.name for f in dataclasses.fields(cls)}:
        raise NotPlain(f"a record of {state[_RECORD]} with fields of another version")
    return cls(**{k: decoded(v) for k, v in fields.items()})


def _places(module: str) -> Iterator[str]:
    """The modules in which a record may be that a file says was in this one.

    Modules keep their wing and their name; the folder of the wing in which they stand may change.
    """
    if not module.startswith(_OWN):
        return
    yield module
    wing, _, inside = module.removeprefix(_OWN).partition(".")
    name = inside.rpartition(".")[2]
    for now in (name, _MOVED.get((wing, name), name)):
        begins, ends = f"{_OWN}{wing}.", f".{now}"
        yield from (m for m in list(sys.modules) if m.startswith(begins) and m.endswith(ends))
