"""Handlers of the first runs of a model, which must not spend much on large latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_em.distributions import has_finite_support
from pyro_em.tracing.allocation import Overspent, Shadows, spending_at_most
from pyro_em.tracing.handlers import SampleMessenger
from pyro_em.tracing.lean import nothing
from pyro_em.tracing.sites import is_latent

_LARGE = 256  # elements; smaller latents are always drawn


class DrawNothing(SampleMessenger):
    """Give large latents that can be enumerated a shadow instead of a draw."""

    _postprocess_message = nothing

    def __init__(self, shadows: Shadows) -> None:
        super().__init__()
        self.shadows = shadows

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not _is_large(msg):
            return
        fn = msg["fn"]
        shape = fn.shape()
        msg["value"] = self.shadows.instead_of(fn.enumerate_support(expand=False), shape)
        dist.enable_validation(False)  # a shadow satisfies no constraint; the caller restores


def _is_large(msg: Mapping[str, Any]) -> bool:
    """Whether a message asks for a draw of many values that could be enumerated instead."""
    if msg["done"] or msg["value"] is not None or not is_latent(msg):
        return False
    fn = msg["fn"]
    return has_finite_support(fn) and fn.shape().numel() >= _LARGE


class SpendLittle(SampleMessenger):
    """Break a run off once what it does with large latents has allocated much.

    Operations are watched from the first such latent on. What a model computes before it costs the
    same with shadows, and most models have none.

    Args:
        limit: In bytes.

    Raises:
        Overspent: From the midst of the run.
    """

    _postprocess_message = nothing

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self._modes = torch._C._len_torch_dispatch_stack()
        self._watch: TorchDispatchMode | None = None

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if self._watch is not None or not _is_large(msg):
            return
        if torch._C._len_torch_dispatch_stack() != self._modes:
            raise Overspent  # inside a mode of the model's own, which would be left before ours
        self._watch = spending_at_most(self.limit)
        self._watch.__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        if self._watch is not None:
            self._watch.__exit__(*exception)
