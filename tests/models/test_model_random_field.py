"""``models/random_field.py`` against textbooks' numbers, brute force and proportional fitting."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from models import random_field as rf
from pyro_em import EMResult, ExactPosteriorEM, Gradient, PyroEMWarning, log_partition
from tests.mains import run_main

STATES = torch.tensor(list(itertools.product((0, 1), repeat=4)))


def table_of(potentials: rf.Potentials) -> Tensor:
    """Π ψ over all states, an axis per variable, written without Pyro."""
    nodes = rf.names(potentials)
    out = torch.ones((2,) * len(nodes), dtype=torch.float64)
    for state in itertools.product((0, 1), repeat=len(nodes)):
        value = dict(zip(nodes, state, strict=True))
        out[state] = torch.stack([t[value[a], value[b]] for (a, b), t in potentials.items()]).prod()
    return out


def proportional_fitting(x: Tensor, sweeps: int = 2000) -> np.ndarray:
    """The field's maximum likelihood fit: match the pairs' marginals in turn. # (2, 2, 2, 2)"""
    observed = np.zeros((2, 2, 2, 2))
    np.add.at(observed, tuple(x.T.numpy()), 1 / len(x))
    p = np.full((2, 2, 2, 2), 1 / 16)
    for _ in range(sweeps):
        for i in range(4):
            rest = tuple(k for k in range(4) if k not in (i, (i + 1) % 4))
            p = p * observed.sum(rest, keepdims=True) / p.sum(rest, keepdims=True)
    return p


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    """Rows and what is known of them."""
    return rf.load_data()


@pytest.fixture(scope="module")
def full(data: tuple[Tensor, Tensor]) -> EMResult:
    """The fit to all answers."""
    return rf.fit(data[0], tol=1e-10)


@pytest.fixture(scope="module")
def partial(data: tuple[Tensor, Tensor]) -> EMResult:
    """The fit to the answers that are known; its maximum is not far from what they are drawn of."""
    with pyro.get_param_store().scope():
        for name, value in rf.coordinates(rf.STUDENTS).items():
            pyro.param(name, value)
        em = ExactPosteriorEM(rf.model, updates={"[hJ]": Gradient(steps=3)})
        return em.fit(*rf.distinct(*data), progress=False, tol=1e-5)


def test_colds_are_the_textbook_s() -> None:
    """Z = 130, 9/130 for you and 17/130 for the others, with 0 = sick."""
    assert float(log_partition(rf.field, rf.COLDS).exp()) == pytest.approx(130, rel=1e-12)
    q = ExactPosteriorEM(rf.field).posterior(rf.COLDS)
    assert float(q.probs("you")[rf.SICK]) == pytest.approx(9 / 130, rel=1e-6)
    assert float(q.probs("coworker")[rf.SICK]) == pytest.approx(17 / 130, rel=1e-6)
    assert float(q.probs("roommate")[rf.SICK]) == pytest.approx(17 / 130, rel=1e-6)


def test_the_misconception_is_the_textbook_s() -> None:
    """Z = 7,201,840, and the marginals and pairs of the table of sixteen products."""
    assert float(log_partition(rf.field, rf.MISCONCEPTION).exp()) == pytest.approx(7201840)
    table = table_of(rf.MISCONCEPTION) / 7201840
    assert float(table.sum()) == pytest.approx(1.0)
    q = ExactPosteriorEM(rf.field).posterior(rf.MISCONCEPTION)
    for i, name in enumerate(rf.names(rf.MISCONCEPTION)):
        expected = table.sum([k for k in range(4) if k != i])
        torch.testing.assert_close(q.probs(name).double(), expected)
    pair = q.joint("Alice", "Bob").double()
    torch.testing.assert_close(pair, table.sum((2, 3)))
    assert float(pair[0, 1]) == pytest.approx(0.69, abs=0.005)  # Koller and Friedman


def test_independence_is_that_of_the_loop() -> None:
    """Opposite students are independent given both neighbours; less does not do."""
    graph = ExactPosteriorEM(rf.field).plan(rf.MISCONCEPTION).graph
    assert graph.is_separated("Alice", "Charles", ["Bob", "Debbie"])
    assert graph.is_separated("Bob", "Debbie", ["Alice", "Charles"])
    assert not graph.is_separated("Alice", "Charles", ["Bob"])
    assert not graph.is_separated("Alice", "Charles")
    assert graph.markov_blanket("Alice") == {"Bob", "Debbie"}
    p = table_of(rf.MISCONCEPTION)  # A, B, C, D
    given = p / p.sum((0, 2), keepdim=True)
    product = given.sum(0, keepdim=True) * given.sum(2, keepdim=True)
    torch.testing.assert_close(given, product)


def test_coordinates_determine_the_field() -> None:
    """The field of its coordinates has the same probabilities."""
    at = rf.coordinates(rf.STUDENTS)
    ours, again = table_of(rf.STUDENTS), table_of(rf.pairwise(at["h"], at["J"]))
    torch.testing.assert_close(again / again.sum(), ours / ours.sum())


def test_rows_are_drawn_from_the_field(data: tuple[Tensor, Tensor]) -> None:
    """Every state's share within five standard errors of its probability; a third is hidden."""
    x, known = data
    p = table_of(rf.STUDENTS)
    p = p / p.sum()
    share = torch.bincount((x * torch.tensor([8, 4, 2, 1])).sum(1), minlength=16) / len(x)
    error = (p.reshape(-1) * (1 - p.reshape(-1)) / len(x)).sqrt()
    assert bool(((share - p.reshape(-1)).abs() < 5 * error).all())
    assert float(known.double().mean()) == pytest.approx(2 / 3, abs=5 * (2 / 9 / 4000) ** 0.5)


def test_the_full_fit_is_that_of_proportional_fitting(
    data: tuple[Tensor, Tensor], full: EMResult
) -> None:
    """Probabilities and log-likelihood."""
    x, _ = data
    ours = table_of(rf.pairwise(full.params["h"], full.params["J"])).detach()
    ipf = proportional_fitting(x)
    np.testing.assert_allclose((ours / ours.sum()).numpy(), ipf, atol=1e-6)
    expected = float(np.log(ipf[tuple(x.T.numpy())]).sum())
    assert full.log_evidence == pytest.approx(expected, abs=1e-6)


def brute_force(h: Tensor, J: Tensor, x: Tensor, known: Tensor) -> Tensor:
    """Σ_n log p(what is known of row n), over all sixteen states."""
    score = STATES.double() @ h
    score = score + (STATES * STATES.roll(-1, dims=1)).double() @ J
    fits = ((x[:, None] == STATES) | ~known[:, None]).all(-1)
    masked = torch.where(fits, score.log_softmax(0), -torch.inf)
    return masked.logsumexp(-1).sum()


def test_the_partial_fit_is_a_maximum(data: tuple[Tensor, Tensor], partial: EMResult) -> None:
    """Evidence, zero gradient and standard errors of the brute-force likelihood."""
    h, J = (partial.params[n].detach().double().requires_grad_() for n in ("h", "J"))
    value = brute_force(h, J, *data)
    assert partial.log_evidence == pytest.approx(value.item(), abs=1e-6)
    for gradient in torch.autograd.grad(value, (h, J)):
        assert float(gradient.abs().max()) < 0.05  # its curvature is about 10
    assert (np.diff(list(partial.history)) > -1e-8).all()
    at = torch.cat([h, J]).detach()
    hessian = torch.autograd.functional.hessian(lambda v: brute_force(v[:4], v[4:], *data), at)
    expected = torch.linalg.inv(-hessian).diagonal().sqrt()
    errors = partial.standard_errors()
    torch.testing.assert_close(torch.cat([errors["h"], errors["J"]]), expected, rtol=1e-4, atol=0)


def test_potentials_are_found_again(full: EMResult, partial: EMResult) -> None:
    """Within four standard errors of the truth; hidden answers widen them."""
    truth = rf.coordinates(rf.STUDENTS)
    for result in (full, partial):
        errors = result.standard_errors()
        for name in ("h", "J"):
            z = (result.params[name] - truth[name]) / errors[name]
            assert float(z.abs().max()) < 4
    assert bool((partial.standard_errors()["J"] > full.standard_errors()["J"]).all())


def test_a_mask_that_hides_nothing_is_no_symmetric_start() -> None:
    """obs_mask all True is data observed in full: no warning."""

    def model(x: Tensor, known: Tensor) -> None:
        p = pyro.param("p", torch.tensor([0.3, 0.6]), constraint=dist.constraints.unit_interval)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5), obs=x, obs_mask=known)
            pyro.sample("y", dist.Bernoulli(p[z.long()]), obs=x)

    x = torch.tensor([0.0, 1.0, 1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", PyroEMWarning)
        ExactPosteriorEM(model).fit(x, torch.ones(3, dtype=torch.bool), progress=False)


@pytest.mark.slow
def test_main_prints_what_it_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On fewer rows, and with fewer answers hidden; also that the figure is written."""
    printed = run_main(rf, monkeypatch, capsys, tmp_path, "-N", "300", "--hidden", "0.1")
    assert "Z = 130" in printed and "P(you sick) = 9/130" in printed
    assert "P(coworker sick) = 17/130" in printed
    assert "Z = 7,201,840" in printed and "= 0.6945" in printed
    assert "Alice is independent of Charles given Bob and Debbie." in printed
    assert "Alice is not independent of Charles given Bob." in printed
    assert "(p = 8, N = 300" in printed
