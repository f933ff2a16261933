"""Data that no density can read: without numbers, sparse, of inference mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import DataError, Finding, UsageError, raise_findings


def refuse_without_numbers(given: Mapping[str, Tensor]) -> None:
    """Refuse data without numbers, or in a form that densities cannot read.

    Raises:
        DataError: With the argument's name.
    """
    problems = []
    for where, value in given.items():
        what = fixes = ""
        if value.is_nested:
            what = "it is a nested tensor, whose rows have several lengths."
            fixes = "pad it: torch.nested.to_padded_tensor(x, nan), and mask what is padded"
        elif value.is_meta:
            what = "it is on the device 'meta', and has a shape but no numbers."
            fixes = "pass a tensor that holds the data, on the CPU or a GPU"
        elif value.is_quantized:
            what = "it is a quantised tensor."
            fixes = "pass x.dequantize()"
        if what:
            why = "a density is computed from numbers"
            problems.append(Finding(where, what, why, (fixes,), DataError))
    if problems:
        raise_findings(problems)


def refuse_sparse_values(factors: Mapping[str, Any]) -> None:
    """Refuse sparse observed values; sparse covariates are the model's own matter."""
    problems = [
        Finding(
            f"site '{name}'",
            f"its observed value is a sparse tensor ({value.layout}).",
            "Pyro's densities read dense tensors",
            ("pass x.to_dense()",),
            DataError,
        )
        for name, site in factors.items()
        if isinstance(value := site["value"], Tensor) and value.layout != torch.strided
    ]
    if problems:
        raise_findings(problems)


def refuse_inference_mode(args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuse tensors that cannot carry a gradient.

    Raises:
        UsageError: With the ways out.
    """
    inside = torch.is_inference_mode_enabled()
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    if inside or any(t.is_inference() for t in tensors):
        what = (
            "the call is inside torch.inference_mode()."
            if inside
            else "a tensor made inside torch.inference_mode() was passed."
        )
        raise UsageError(
            str(
                Finding(
                    "inference_mode",
                    what,
                    "the E-step is a gradient, and inference tensors cannot carry one",
                    ("use torch.no_grad() instead", "clone the tensor outside inference mode"),
                )
            )
        )
