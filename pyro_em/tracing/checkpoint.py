"""Saving and loading fitted parameters, readable under ``torch.load(weights_only=True)``.

A file is a dict of tensors, numbers and strings with the version of its schema and a checksum of
all the rest: names, dtypes, shapes and bytes. Whatever reads differently from what was written is
refused.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import logging
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_em.errors import UsageError, message
from pyro_em.tracing.dependences import flat_bytes
from pyro_em.tracing.files import read_whole, write_whole
from pyro_em.tracing.parameters import TracedParameter, snapshot
from pyro_em.tracing.parameters import restore as write_back

VERSION = 2

FORMAT = f"pyro_em {VERSION}"

_OLDEST = 1  # that is still read; it has no checksum

_FIELDS = {"names": list, "unconstrained": dict, "constraints": dict, "total_steps": int}


logger = logging.getLogger("pyro_em")


def pack(parameters: Mapping[str, TracedParameter], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as plain tensors and strings, with the checksum of all.

    Raises:
        UsageError: If a parameter is not finite.
    """
    unconstrained = {n: t.cpu() for n, t in snapshot(parameters).items()}
    for name, p in parameters.items():
        bad = _non_finite(p, unconstrained[name])
        if bad:
            raise UsageError(
                message(
                    "save",
                    f"parameter '{name}' has {bad} that are not finite.",
                    "nothing could be done with such a file; nothing was written",
                    ["fit again from other values: em.reset()", "load the last good file"],
                )
            )
    state = {
        "format": FORMAT,
        "names": list(parameters),
        "unconstrained": unconstrained,
        "constraints": {n: repr(p.constraint) for n, p in parameters.items()},
        **extra,
    }
    return {**state, "checksum": checksum(state)}


def write(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write what `pack` made, whole or not at all, once it has been read back from memory.

    Raises:
        UsageError: If the state of an optimiser holds what no file of tensors can hold.
        FileError: If the file cannot be written.
    """
    content, problem = content_of(state)
    if problem:
        raise UsageError(
            message(
                "save",
                f"what the optimiser keeps cannot be saved: {problem}.",
                "a file holds tensors, numbers and strings, so that reading it runs no code; "
                "nothing was written",
                ["use an optimiser and schedulers of torch or Pyro whose state is such"],
            )
        )
    write_whole(path, content)


def content_of(state: Mapping[str, Any], *, reads_back: bool = True) -> tuple[bytes, str]:
    """The bytes of a file, and why they cannot serve, in words, or nothing.

    Args:
        state: What the file holds, with its checksum.
        reads_back: Whether the bytes are read once and compared.
    """
    content = io.BytesIO()
    try:
        torch.save(dict(state), content)
        if reads_back:
            content.seek(0)
            back = torch.load(content, map_location="cpu", weights_only=True)
            if checksum(back) != state["checksum"]:
                return b"", "it reads back as something else"
    except Exception as error:  # whatever the objects of an optimiser say
        return b"", str(error).partition("\n")[0]
    return content.getvalue(), ""


def checksum(state: Mapping[str, Any]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, whatever device and layout tensors have.

    Example:
        >>> checksum({"w": torch.eye(2)}) == checksum({"w": torch.eye(2).T})
        True
        >>> checksum({"w": torch.eye(2)}) == checksum({"w": torch.eye(2).double()})
        False
    """
    digest = hashlib.sha256()
    _feed(digest, {k: v for k, v in state.items() if k != "checksum"})
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    """Each value with its kind and its length, so that no two states read alike."""
    if isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)}:".encode())
        digest.update(flat_bytes(value.detach().cpu()).numpy().data)
    elif isinstance(value, Mapping):
        digest.update(f"dict {len(value)}:".encode())
        for key, item in value.items():
            _feed(digest, key)
            _feed(digest, item)
    elif isinstance(value, (list, tuple)):
        digest.update(f"list {len(value)}:".encode())
        for item in value:
            _feed(digest, item)
    else:
        text = repr(value).encode()
        digest.update(f"{type(value).__name__} {len(text)}:".encode() + text)


def _non_finite(p: TracedParameter, unconstrained: Tensor) -> str:
    """How many numbers of a parameter are not finite, in words; a simplex zero is no such number.

    Its unconstrained value is minus infinity, its constrained value is not.
    """
    if not unconstrained.is_floating_point():
        return ""
    there = unconstrained.to(p.unconstrained)  # as it would be read: 1e300 is no float32
    with torch.no_grad():
        value = transform_to(p.constraint)(there)
    bad = int((~torch.isfinite(value)).sum()) or int(torch.isnan(there).sum())
    return f"{bad} of {value.numel()} numbers" if bad else ""


def modules_of(one: Any) -> list[torch.nn.Module]:
    """Modules that a model or guide holds: itself, its arguments, its closure, what it names.

    Their buffers (statistics of a BatchNorm, the standardisation of an amortised guide) are no
    parameters, but a fitted model is another one without them.
    """
    if isinstance(one, torch.nn.Module):
        return [one]
    if isinstance(one, functools.partial):
        inside = [one.func, *one.args, *one.keywords.values()]
        return [m for part in inside for m in modules_of(part)]
    if inspect.ismethod(one):
        owner = one.__self__
        if isinstance(owner, torch.nn.Module):
            return [owner]
        return [v for v in vars(owner).values() if isinstance(v, torch.nn.Module)]
    if inspect.isfunction(one):
        held = inspect.getclosurevars(one)
        named = [*held.nonlocals.values(), *held.globals.values()]
        return [v for v in named if isinstance(v, torch.nn.Module)]
    return []


def buffers_of(roots: Sequence[Any]) -> dict[str, torch.Tensor]:
    """All buffers of some models and guides, by position and name."""
    return {
        f"{r}.{m}.{name}": buffer
        for r, root in enumerate(roots)
        for m, module in enumerate(modules_of(root))
        for name, buffer in module.named_buffers()
    }


def copied_buffers(roots: Sequence[Any]) -> dict[str, torch.Tensor]:
    """All buffers of some models and guides, as a file holds them."""
    return {n: b.detach().cpu().clone() for n, b in buffers_of(roots).items()}


def restore_buffers(state: Mapping[str, Any], roots: Sequence[Any]) -> None:
    """Write saved buffers in place, where there are buffers of the same name and shape."""
    saved = state.get("buffers", {})
    for name, buffer in buffers_of(roots).items():
        if name in saved and saved[name].shape == buffer.shape:
            buffer.copy_(saved[name])


def read(path: str | Path) -> dict[str, Any]:
    """Read a file that ``save`` wrote, with this version of the library or an earlier one.

    Raises:
        UsageError: If it is damaged, of a newer version or something else.
        FileError: If there is no such file, or it cannot be read.
    """
    content = read_whole(path)
    if not content:
        raise _unreadable(
            path, "it is empty (0 bytes).", "writing it was broken off, or never begun"
        )
    if content[:4] != _ZIP and not _looks_like_ours(content):
        raise _not_ours(path, "it is no torch file")
    damage = damage_of(content)
    if damage:
        raise _damaged(path, damage)
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a reader of other people's bytes may raise
        if _looks_like_ours(content):
            raise _damaged(path, "it cannot be read") from error
        raise _not_ours(path, "it holds other objects than tensors and numbers") from error
    _check_version(path, state)
    for name, kind in _FIELDS.items():
        if not isinstance(state.get(name), kind):
            raise _damaged(path, f"its field '{name}' is missing")
    if state["format"] != FORMAT:
        logger.info("load: '%s' is of an earlier version, without a checksum", path)
    elif state.get("checksum") != checksum(state):
        raise _damaged(path, "its content does not agree with its checksum")
    if {*state["names"]} != {*state["unconstrained"]} or {*state["names"]} != {
        *state["constraints"]
    }:
        raise _damaged(path, "its names do not agree with its parameters")
    return state


_ZIP = b"PK\x03\x04"

_OURS = (b"pyro_em ", b"unconstrained", b"constraints", b"total_steps")


def _looks_like_ours(content: bytes) -> bool:
    """Whether bytes hold most words that every file of ours holds, in front of its numbers."""
    return b"\0" in content and sum(word in content for word in _OURS) >= len(_OURS) - 1


def damage_of(content: bytes) -> str:
    """What is wrong with a torch file as a zip archive, whose parts have checksums of their own."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return "" if archive.testzip() is None else "a part of it is not what was written"
    except Exception:  # damaged tables of contents raise errors of every kind
        return "it is cut off, or its table of contents cannot be read"


def _check_version(path: str | Path, state: Any) -> None:
    found = state.get("format") if isinstance(state, dict) else None
    matched = re.fullmatch(r"pyro_em (\d+)", found) if isinstance(found, str) else None
    if matched is None:
        raise _not_ours(path, "it is a torch file of another kind")
    version = int(matched[1])
    if version > VERSION:
        raise _unreadable(
            path,
            f"it was written by a newer version of pyro_em, in format {version}.",
            f"this version reads formats {_OLDEST} to {VERSION}",
            ["install a newer version: pip install -U pyro-em"],
        )
    if version < _OLDEST:
        raise _unreadable(
            path,
            f"it was written by an older version of pyro_em, in format {version}.",
            f"this version reads formats {_OLDEST} to {VERSION}",
            ["load it with the version that wrote it, and save it with one in between"],
        )


def _damaged(path: str | Path, why: str) -> UsageError:
    return _unreadable(
        path, "it is damaged, or was changed after ExactPosteriorEM.save wrote it.", why
    )


def _not_ours(path: str | Path, why: str) -> UsageError:
    return _unreadable(
        path,
        "it was not written by ExactPosteriorEM.save.",
        why,
        [
            "load a param store with pyro.get_param_store().load(path)",
            "load a module with module.load_state_dict(torch.load(path))",
        ],
    )


def _unreadable(path: str | Path, what: str, why: str, fixes: Sequence[str] = ()) -> UsageError:
    nothing = f"{why}; nothing was loaded"
    return UsageError(
        message(f"file '{path}'", what, nothing, fixes or ["load another copy of it"])
    )


def restore(state: Mapping[str, Any], parameters: Mapping[str, TracedParameter]) -> None:
    """Write saved parameters in place.

    Raises:
        UsageError: If the file belongs to another model (names the first difference), or a number
            in it is not finite.
    """
    difference = first_difference(state, parameters)
    if difference:
        raise UsageError(
            message(
                "load",
                f"the file belongs to another model: {difference}.",
                "nothing was loaded",
                ["build the model as it was when the file was saved"],
            )
        )
    for name, p in parameters.items():
        bad = _non_finite(p, state["unconstrained"][name])
        if bad:
            raise UsageError(
                message(
                    "load",
                    f"parameter '{name}' has {bad} in the file that are not finite here.",
                    f"it is {p.unconstrained.dtype} in this model; nothing was loaded",
                    [
                        "load another file",
                        "work in float64: torch.set_default_dtype(torch.float64)",
                    ],
                )
            )
    write_back(parameters, state["unconstrained"])


def first_difference(state: Mapping[str, Any], parameters: Mapping[str, TracedParameter]) -> str:
    """What first distinguishes a file's model from this one; empty if nothing does."""
    for name in state["names"]:
        if name not in parameters:
            return f"it has parameter '{name}', which this model lacks"
    for name, p in parameters.items():
        if name not in state["names"]:
            return f"it lacks parameter '{name}'"
        saved = tuple(state["unconstrained"][name].shape)
        if saved != tuple(p.unconstrained.shape):
            return (
                f"parameter '{name}' has shape {saved} there and "
                f"{tuple(p.unconstrained.shape)} here"
            )
        if state["constraints"][name] != repr(p.constraint):
            return (
                f"parameter '{name}' is constrained to {state['constraints'][name]} there and to "
                f"{p.constraint!r} here"
            )
    return ""
