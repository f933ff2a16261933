"""Forward messages against all paths of short chains, compiled and step by step."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyro_em.posteriors.messages import forward as module
from pyro_em.posteriors.messages.forward import forward


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("of_each", [False, True])
def test_messages_sum_over_all_paths(
    compiled: bool, of_each: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled:
        pytest.importorskip("numba")
    monkeypatch.setattr(module, "compiles", lambda *_: compiled)
    g = torch.Generator().manual_seed(3)
    T, B, K = 5, 2, 3
    log_l = 400 * torch.randn(T, B, K, generator=g, dtype=torch.float64)  # beyond any scaling
    log_l[2, 0, 1] = -torch.inf
    A = torch.rand(T - 1 if of_each else 1, B, K, K, generator=g, dtype=torch.float64)
    A[..., 0, 2] = 0.0
    log_A = (A / A.sum(-1, keepdim=True)).log().expand(T - 1, B, K, K)
    log_p, log_c = forward(log_l, log_A)
    for b, t in itertools.product(range(B), range(T)):
        ends: list[list[torch.Tensor]] = [[] for _ in range(K)]
        for path in itertools.product(range(K), repeat=t + 1):
            own = sum(log_l[s, b, z] for s, z in enumerate(path))
            own = own + sum(log_A[s, b, path[s], path[s + 1]] for s in range(t))
            ends[path[-1]].append(torch.as_tensor(own))
        joint = torch.stack([torch.stack(e).logsumexp(0) for e in ends])
        torch.testing.assert_close(log_c[: t + 1, b].sum(), joint.logsumexp(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(log_p[t, b], joint.log_softmax(0), rtol=1e-9, atol=1e-9)
