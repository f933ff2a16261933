"""What the first runs of a model do at large latents, on which they must not spend much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_em.distributions import has_finite_support
from pyro_em.tracing.allocation import Overspent, Shadows, spending_at_most
from pyro_em.tracing.sites import is_latent
from pyro_em.tracing.tables import Tables


class DrawNothing:
    """Gives large latents that can be enumerated a shadow instead of a draw."""

    def __init__(self, shadows: Shadows) -> None:
        self.shadows = shadows

    def __call__(self, msg: dict[str, Any]) -> None:
        """Look at a site that asks for a draw of many numbers."""
        if not _could_be_enumerated(msg):
            return
        fn = msg["fn"]
        shape = fn.shape()
        msg["value"] = self.shadows.instead_of(fn.enumerate_support(expand=False), shape)
        validate_nothing()


def validate_nothing() -> None:
    """Let distributions take shadows, which satisfy no constraint; whoever runs a model restores."""
    dist.enable_validation(False)


def _could_be_enumerated(msg: Mapping[str, Any]) -> bool:
    return is_latent(msg) and has_finite_support(msg["fn"])


class SpendLittle:
    """Breaks a run off once what it does with large latents has allocated much.

    Operations are watched from the first such latent on. What a model computes before it costs the
    same with shadows, and most models have none. Beside many rows all of them are watched.

    Args:
        limit: In bytes.
        tables: Tables beside many rows, which stop a run before they are made.

    Raises:
        Overspent: From the midst of the run.
    """

    def __init__(self, limit: int, tables: Tables | None = None) -> None:
        self.limit, self.tables = limit, tables
        self._modes = torch._C._len_torch_dispatch_stack()
        self._watch: TorchDispatchMode | None = None

    def __enter__(self) -> SpendLittle:
        if self.tables is not None:
            self._begin()
        return self

    def __call__(self, msg: dict[str, Any]) -> None:
        """Look at a site that asks for a draw of many numbers."""
        if self._watch is not None or not _could_be_enumerated(msg):
            return
        if torch._C._len_torch_dispatch_stack() != self._modes:
            raise Overspent  # inside a mode of the model's own, which would be left before ours
        self._begin()

    def _begin(self) -> None:
        self._watch = spending_at_most(self.limit, self.tables)
        self._watch.__enter__()

    def __exit__(self, *exception: Any) -> None:
        if self._watch is not None:
            self._watch.__exit__(*exception)
