"""Log densities of drawn sites, bit for bit those of the distributions."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyro_em.tracing.densities import _of_independent_bits, add_log_probs


def image(logits: Tensor, event: int) -> dist.Distribution:
    return dist.Bernoulli(logits=logits).to_event(event)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2), st.integers(1, 3), st.sampled_from([None, 2.5]), st.booleans())
def test_images_have_pyros_density(batch: int, event: int, scale: float | None, part: bool) -> None:
    """Value and gradient, with scales, masks, and logits that are broadcast."""
    shape = (3, 2)[:batch] + (4, 5, 2)[:event]
    bits = (torch.rand(shape) < 0.5).float()
    mask = torch.rand(shape[:batch]) < 0.5 if part else None
    found = []
    for quick in (True, False):
        torch.manual_seed(0)
        logits = (4 * torch.randn(shape[-event:] if batch == 1 else shape)).requires_grad_()
        fn = image(logits, event)
        site = {"type": "sample", "fn": fn, "value": bits, "scale": scale or 1.0, "mask": mask}
        site |= {"args": (), "kwargs": {}, "name": "x", "infer": {}, "is_observed": True}
        trace = pyro.poutine.Trace()
        trace.add_node("x", **site)
        with pyro.validation_enabled(False):
            assert (_of_independent_bits(fn, bits) is None) == (event == 0)
            if quick:
                add_log_probs(trace, ["x"])
            else:
                trace.compute_log_prob()
        value = trace.nodes["x"]["log_prob"]
        value.sum().backward()
        found.append((value.detach(), trace.nodes["x"]["unscaled_log_prob"], logits.grad))
    for mine, pyros in zip(*found, strict=True):
        assert torch.equal(mine, pyros)


@pytest.mark.parametrize("validate", [True, False])
def test_only_plain_images_without_validation_go_that_way(validate: bool) -> None:
    logits, bits = torch.zeros(3, 4), torch.ones(3, 4)
    with pyro.validation_enabled(validate):
        assert (_of_independent_bits(image(logits, 1), bits) is None) == validate
        if validate:  # what is no bit is still refused
            trace = pyro.poutine.trace(
                lambda: pyro.sample("x", image(logits, 1), obs=bits + 0.5)
            ).get_trace()
            with pytest.raises(ValueError, match="site 'x'"):
                add_log_probs(trace, ["x"])
    with pyro.validation_enabled(False):
        assert _of_independent_bits(dist.Bernoulli(logits=logits), bits) is None
        probs = dist.Bernoulli(probs=torch.full((3, 4), 0.5)).to_event(1)
        assert _of_independent_bits(probs, bits) is None
        assert _of_independent_bits(dist.Normal(logits, 1.0).to_event(1), bits) is None
