"""Where in a user's code an exception was raised, and which of the user's tensors it is about.

A message that names a line and a value needs no debugger. Only names are looked up, nothing of the
user's code is run again.
"""

from __future__ import annotations

import ast
import linecache
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any

import numpy
import pyro
import torch
from torch import Tensor

from pyro_em import errors
from pyro_em.tracing.sites import signature_of, users

_NOT_THE_USERS = (
    *(str(Path(str(m.__file__)).parent) for m in (torch, pyro, numpy, errors)),
    sysconfig.get_paths()["stdlib"],
    "<frozen",
)


@dataclass(frozen=True, eq=False)
class CodeLine:
    """The innermost line of the user's code that an exception went through.

    Attributes:
        file: The file's name without its folder.
        line: The line's number.
        text: The expression that failed; empty where the source is not known.
        frame: The frame, whose variables the expression reads.
    """

    file: str
    line: int
    text: str
    frame: FrameType

    def __str__(self) -> str:
        shown = " ".join(self.text.split())
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return f"{self.file}, line {self.line}" + (f": {shown}" if shown else "")

    @property
    def expression(self) -> ast.expr | None:
        """The expression that failed, parsed."""
        try:
            return ast.parse(self.text.strip(), mode="eval").body
        except (SyntaxError, ValueError):
            return None

    def value_of(self, node: ast.AST) -> Any:
        """What a name, an attribute or an item stands for; None where running code would tell."""
        match node:
            case ast.Name(id=name):
                scope = self.frame.f_locals
                return scope[name] if name in scope else self.frame.f_globals.get(name)
            case ast.Attribute(value=owner, attr=name):
                return getattr(self.value_of(owner), "__dict__", {}).get(name)
            case ast.Subscript(value=owner, slice=ast.Constant(value=key)):
                held = self.value_of(owner)
                if isinstance(held, dict):
                    return held.get(key)
                if isinstance(held, (list, tuple)) and isinstance(key, int) and key < len(held):
                    return held[key]
        return None

    def tensors_in(self, node: ast.AST | None) -> dict[str, Tensor]:
        """The tensors that an expression reads by name, under the words of the code."""
        if node is None:
            return {}
        value = self.value_of(node)
        if value is not None:
            value = getattr(value, "_t", value)  # without its tags
            return {ast.unparse(node): value} if isinstance(value, Tensor) else {}
        if isinstance(node, ast.Call):
            return {}  # what a call returns is not known
        found: dict[str, Tensor] = {}
        for child in ast.iter_child_nodes(node):
            found.update(self.tensors_in(child))
        return found

    @property
    def container(self) -> Any:
        """What is indexed, where the expression is an item of something with a name."""
        node = self.expression
        return self.value_of(node.value) if isinstance(node, ast.Subscript) else None

    @property
    def indices(self) -> dict[str, Tensor]:
        """The tensors that index, under the words of the code; of a call, its index argument."""
        node = self.expression
        if isinstance(node, ast.Subscript):
            return self.tensors_in(node.slice)
        found = list(self.arguments.items())
        if not found:
            return {}
        first = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("embedding")
        return dict([found[0 if first else -1]])

    @property
    def arguments(self) -> dict[str, Tensor]:
        """The tensors that an expression reads; of a call, those that it is given."""
        node = self.expression
        if not isinstance(node, ast.Call):
            return self.tensors_in(node)
        found: dict[str, Tensor] = {}
        owner = getattr(node.func, "value", None)  # x of x.item()
        for part in (owner, *node.args, *(k.value for k in node.keywords)):
            found.update(self.tensors_in(part))
        return found


def place_of(error: BaseException) -> CodeLine | None:
    """Where in the user's code an exception was raised; None where it was not."""
    while error.__cause__ is not None:
        error = error.__cause__
    found: TracebackType | None = None
    at = error.__traceback__
    while at is not None:
        if not at.tb_frame.f_code.co_filename.startswith(_NOT_THE_USERS):
            found = at
        at = at.tb_next
    if found is None:
        return None
    code = found.tb_frame.f_code
    text = _segment(code, found.tb_lasti, found.tb_frame)
    return CodeLine(_named(code.co_filename), found.tb_lineno, text, found.tb_frame)


def _named(path: str) -> str:
    """A file as a user knows it: a cell of a notebook has a number for a name."""
    if Path(path).parent.name.startswith("ipykernel_"):
        return "notebook cell"
    return Path(path).name


def _segment(code: CodeType, instruction: int, frame: FrameType) -> str:
    """The source of one instruction's expression."""
    positions = list(code.co_positions())
    if instruction // 2 >= len(positions):
        return ""
    first, last, begin, end = positions[instruction // 2]
    if first is None or last is None or begin is None or end is None:
        return ""
    lines = [
        linecache.getline(code.co_filename, n, frame.f_globals).encode()
        for n in range(first, last + 1)
    ]
    if not all(lines):
        return ""
    lines[-1] = lines[-1][:end]
    lines[0] = lines[0][begin:]
    return b"".join(lines).decode(errors="replace")


def local_of_raiser(error: BaseException, *names: str) -> dict[str, Any] | None:
    """Variables of the innermost frame that has all of them, where an exception passed through."""
    while error.__cause__ is not None:
        error = error.__cause__
    found, at = None, error.__traceback__
    while at is not None:
        held = at.tb_frame.f_locals
        if all(n in held for n in names):
            found = {n: held[n] for n in names}
        at = at.tb_next
    return found


def given_tensors(
    model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any], *, arrays: bool = False
) -> dict[str, Tensor]:
    """The tensors that a model is given: its arguments, and the variables that it reads.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        arrays: Whether arrays of numpy count, as tensors that share their memory.

    Returns:
        Per name in words (``argument 'x'``) the tensor.
    """
    found = given_arguments(model, args, kwargs, arrays=arrays)
    for name, value in variables_of(model):
        for path, tensor in _tensors_below(value, arrays=arrays):
            found.setdefault(f"variable '{name}{path}'", tensor)
    return found


def given_arguments(
    model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any], *, arrays: bool = False
) -> dict[str, Tensor]:
    """The tensors among a model's arguments, by name in words; see `given_tensors`."""
    names = [p.name for p in signature_of(model) if p.kind is not p.VAR_POSITIONAL]
    names += [f"#{i + 1}" for i in range(len(names), len(args))]
    found: dict[str, Tensor] = {}
    for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
        for path, tensor in _tensors_below(value, arrays=arrays):
            found[f"argument '{name}{path}'"] = tensor
    return found


def variables_of(model: Any) -> Iterator[tuple[str, Any]]:
    """Global and enclosing variables that a function names."""
    model = users(model)
    function = getattr(model, "__func__", model)
    code = getattr(function, "__code__", None)
    if code is None:
        return
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for name in code.co_names:
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _tensors_below(
    value: Any, path: str = "", depth: int = 3, arrays: bool = False
) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif arrays and isinstance(value, numpy.ndarray):
        shared = _sharing(value)
        if shared is not None:
            yield path, shared
    elif depth and isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors_below(item, f"{path}[{key!r}]", depth - 1, arrays)
    elif depth and isinstance(value, (list, tuple)) and len(value) <= 64:
        for i, item in enumerate(value):
            yield from _tensors_below(item, f"{path}[{i}]", depth - 1, arrays)


def _sharing(array: numpy.ndarray) -> Tensor | None:
    """A tensor in an array's memory; None where torch has none for it, or nobody can write to it."""
    if not array.flags.writeable:
        return None
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError):  # words, dates; strides that run backwards
        return None


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are views of the same numbers, element for element."""
    a, b = getattr(a, "_t", a), getattr(b, "_t", b)
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return False
    if a.layout != torch.strided or a.is_meta or b.is_meta or not a.numel():
        return False
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()
