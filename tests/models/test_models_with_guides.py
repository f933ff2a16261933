"""The models with guides run, and their bounds are what plain torch and Pyro's own SVI say."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from models import gmm, gmvae, vae
from pyro_em import ExactPosteriorEM
from tests.mains import run_main

pytestmark = pytest.mark.slow

SMALL = ["--epochs", "1", "--hidden", "8"]


@pytest.mark.parametrize(
    ("module", "options", "expected"),
    [
        (vae, [*SMALL, "--code", "2"], "effective sample size"),
        (vae, [*SMALL, "--code", "3"], "Pareto"),
        (gmvae, SMALL, "mutual information"),
        (gmvae, [*SMALL, "-K", "3", "--code", "2", "--closed-form"], "closed form, floor 0.01"),
        (gmm, ["--guide", "--steps", "20"], "KL(q ‖ posterior)"),
    ],
)
def test_main_runs(
    module: ModuleType,
    options: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    as_in_table = not {"--guide", "--closed-form"} & set(options)
    out = run_main(module, monkeypatch, capsys, tmp_path, *options, as_in_table=as_in_table)
    assert expected in out


def test_vae_is_no_worse_than_pyros_own_svi() -> None:
    x = vae.load_data()[0][:60]
    steps, differences, errors = 50, [], []
    for seed in range(4):
        bounds = []
        for ours in (True, False):
            pyro.clear_param_store()
            pair = vae.initialize(x, hidden=(32,), seed=seed)
            em = ExactPosteriorEM(
                pair.model, pair.guide, lambda params: torch.optim.Adam(params, lr=5e-3)
            )
            if ours:
                em.fit(x, max_steps=steps, seed=seed, progress=False)
            else:
                torch.manual_seed(seed)
                svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 5e-3}), Trace_ELBO())
                for _ in range(steps):
                    svi.step(x)
            torch.manual_seed(100 + seed)
            bounds.append(em.elbo(x, num_particles=100))
        differences.append(bounds[0].value - bounds[1].value)
        errors.append(sum(b.standard_error**2 for b in bounds))
    # Four seeds: what the paths differ by at random, and what the evaluation adds to it.
    gain = torch.tensor(differences)
    between = float(gain.std() / len(gain) ** 0.5)
    evaluation = sum(errors) ** 0.5 / len(errors)
    assert float(gain.mean()) >= -2 * (between**2 + evaluation**2) ** 0.5


def pair_at_random(x: Tensor) -> tuple[gmvae.GMVAE, dict[str, Tensor]]:
    """A GMVAE at parameters that are no special point."""
    pair = gmvae.initialize(x, K=3, code=2, hidden=(8,), seed=1)
    values = {
        "w": torch.tensor([0.2, 0.5, 0.3]),
        "mu": torch.tensor([[-1.0, 0.5], [0.3, 0.0], [2.0, -1.0]]),
        "s": torch.tensor([[0.5, 1.0], [0.8, 0.3], [1.5, 0.9]]),
    }
    return pair, values


def log_joint(pair: gmvae.GMVAE, values: dict[str, Tensor], x: Tensor, z: Tensor) -> Tensor:
    """log Σ_y p(x, y, z) in plain torch. # z: (..., N, D) -> (...)"""
    logits = pair.decoder(z)
    pixels = (x * logits - torch.nn.functional.softplus(logits)).sum(-1)
    normal = torch.distributions.Normal(values["mu"], values["s"])
    code = torch.logsumexp(values["w"].log() + normal.log_prob(z.unsqueeze(-2)).sum(-1), -1)
    return (pixels + code).sum(-1)


def test_gmvae_bound_at_a_fixed_code_is_the_sum_over_components() -> None:
    x = vae.load_data()[0][:20]
    pair, values = pair_at_random(x)
    z = torch.randn(len(x), 2)

    def at(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(z, event_dim=1))

    terms = ExactPosteriorEM(pair.model, at).elbo(x, params=values)
    assert terms.value == pytest.approx(float(log_joint(pair, values, x, z).detach()), abs=1e-9)


def test_gmvae_bound_is_that_of_plain_monte_carlo() -> None:
    x = vae.load_data()[0][:20]
    pair, values = pair_at_random(x)
    em = ExactPosteriorEM(pair.model, pair.guide)
    terms = em.elbo(x, params=values, num_particles=200)
    with torch.no_grad():
        loc, log_scale = pair.encoder(x).chunk(2, -1)
        q = torch.distributions.Normal(loc, log_scale.exp())
        z = q.sample((10_000,))
        draws = log_joint(pair, values, x, z) - q.log_prob(z).sum((-1, -2))
    error = float(draws.std()) / len(draws) ** 0.5
    assert terms.standard_error is not None
    tolerance = 3.5 * (error**2 + terms.standard_error**2) ** 0.5
    assert abs(terms.value - float(draws.mean())) < tolerance
    assert tolerance < 4.0  # nats, of about a thousand


def test_gmm_guide_and_its_gap() -> None:
    x = gmm.load_data()
    exact = ExactPosteriorEM(gmm.model)
    exact.fit(x, 2, init=gmm.initialize(x), progress=False)
    em = ExactPosteriorEM(gmm.model, gmm.guide, strategy="guide")
    before = em.elbo(x, 2)
    evidence = exact.posterior(x, 2).log_evidence
    assert evidence is not None and before.gap is not None
    assert before.log_evidence == pytest.approx(evidence, abs=1e-8)
    assert before.gap == pytest.approx(evidence - before.value, abs=1e-8)
    assert before.gap > 1  # a guide that knows nothing yet
    # The family holds the posterior, whose log odds are quadratic in x: the gap can close.
    em.fit(x, 2, max_steps=150, seed=0, progress=False)
    after = em.elbo(x, 2)
    assert after.gap is not None
    assert 0 <= after.gap < before.gap
    assert after.value + after.gap == pytest.approx(exact.posterior(x, 2).log_evidence, abs=1e-8)


def test_the_gmm_guide_can_be_the_posterior() -> None:
    x = gmm.load_data()
    exact = ExactPosteriorEM(gmm.model)
    exact.fit(x, 2, init=gmm.initialize(x), progress=False)
    log_odds = exact.posterior(x, 2).probs("z").log()
    scaled = (x - x.mean(0)) / x.std(0)
    i, j = torch.tril_indices(2, 2)
    features = torch.cat([torch.ones(len(x), 1), scaled, scaled[:, i] * scaled[:, j]], -1)
    odds = log_odds[:, 1] - log_odds[:, 0]
    B = torch.stack([torch.zeros(6), torch.linalg.lstsq(features, odds[:, None]).solution[:, 0]], 1)
    pyro.get_param_store()["B"] = B
    terms = ExactPosteriorEM(gmm.model, gmm.guide, strategy="guide").elbo(x, 2)
    assert terms.gap == pytest.approx(0.0, abs=1e-8)


def test_agreement_of_clusters_with_digits() -> None:
    digits = torch.arange(10).repeat(5)
    assert gmvae.agreement((digits + 3) % 10, digits) == (1.0, pytest.approx(1.0))
    accuracy, information = gmvae.agreement(torch.zeros(50, dtype=torch.long), digits)
    assert accuracy == pytest.approx(0.1)
    assert information == pytest.approx(0.0)
