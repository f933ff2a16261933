"""Posterior, path and filter of chains of product states, against one latent after the other."""

from __future__ import annotations

import pyro
import pytest
import torch

from pyro_em import ExactPosteriorEM
from pyro_em.posteriors.answers import discrete_faces, series_faces
from pyro_em.posteriors.enumeration import contraction_of, run_contraction
from pyro_em.posteriors.messages import forward_backward
from pyro_em.posteriors.messages.product_steps import product_steps
from pyro_em.posteriors.messages.steps import step_cells
from tests.graph.vectorized_models import LOOPS, data
from tests.posteriors.random_step_chains import RandomSteps
from tests.posteriors.test_step_chains import mixtures, two_chains


@pytest.mark.parametrize("seed", [1, 18, 49])
def test_against_one_latent_after_the_other(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells, evidence, mode and filter of random chains by the contraction, and by E-steps so far."""
    monkeypatch.setattr(forward_backward, "_FEW", 0)
    model = RandomSteps(seed)
    model.weighted = False
    q = ExactPosteriorEM(model).posterior(LOOPS["vectorised"])
    assert product_steps(q.graph) is not None
    found, expected = (
        step_cells(q.graph, q.tables),
        run_contraction(q.graph, contraction_of(q.graph), q.tables),
    )
    assert found is not None
    torch.testing.assert_close(found.log_evidence, expected.log_evidence, rtol=1e-12, atol=0)
    for ours, theirs in zip(found.cells, expected.cells, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    globs = [f"z{c}_*" for c in range(len(model.sizes))]
    mode, filtered = q.mode(), [q.filtered(glob) for glob in globs]
    monkeypatch.setattr(discrete_faces, "best_path", lambda *_: None)
    monkeypatch.setattr(series_faces, "_forward", lambda *_: None)
    for site, value in q.mode().items():
        assert torch.equal(mode[site], value)
    for glob, ours in zip(globs, filtered, strict=True):
        torch.testing.assert_close(ours, q.filtered(glob), rtol=1e-9, atol=1e-11)


def test_many_steps() -> None:
    """Many steps of two chains, and of mixtures: filter, mode and posterior by messages."""
    x = data(300, seed=3)
    for model, glob in ((two_chains, "w_*"), (mixtures, "m_*")):
        pyro.clear_param_store()
        q = ExactPosteriorEM(model).posterior(LOOPS["vectorised"], x)
        assert q.filtered(glob).shape == (300, 3)
        torch.testing.assert_close(q.filtered(glob)[-1], q.probs(glob)[-1])
        assert len(q.mode()) == 600
