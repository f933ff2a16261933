"""Large Gaussian blocks whose leaves are eliminated first, against dense joints and dense blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM
from pyro_em.posteriors.gaussians import block_factors, gaussian_layout, leaf_factors, leaf_search
from pyro_em.posteriors.gaussians.gaussian_layout import BlockLayout
from pyro_em.posteriors.gaussians.linear_gaussian import solve
from pyro_em.posteriors.gaussians.site_forms import SiteForm, Term
from pyro_em.posteriors.gaussians.site_rows import SiteNumbers
from tests.posteriors.test_linear_gaussian import (
    close,
    crossed_program,
    dense,
    exact_evidence,
    random_program,
)
from tests.posteriors.test_linear_gaussian import (
    test_a_random_program_has_the_evidence_and_moments_of_the_dense_joint as check_moments,
)
from tests.posteriors.test_linear_gaussian import (
    test_the_moments_of_what_rows_read_are_those_of_the_dense_joint as check_reads,
)

ONE = torch.ones(1, 1, 1).double()


def with_core(layout: BlockLayout, core: Iterable[int]) -> BlockLayout:
    """The same sites, some latents and all that these read eliminated last."""
    last = set(core)
    for s in reversed(range(len(layout.sites))):
        if s in last:
            last |= {term.latent for term in layout.sites[s].terms}
    return BlockLayout.of(layout.sites, core=last)


def program(seed: int) -> tuple[BlockLayout, list[SiteNumbers]]:
    """A random program with a random core, or crossed effects."""
    layout, numbers = crossed_program() if seed < 0 else random_program(seed)
    latents = [s for s, form in enumerate(layout.sites) if form.is_latent]
    g = np.random.default_rng(seed + 1000)
    core = g.choice(latents, int(g.integers(1, max(2, len(latents)))), replace=False)
    return with_core(layout, core.tolist()), numbers


# Leaves of one and of many sizes, some of them around the core; cores of one and of many blocks.
SEEDS = [-1, 7, 19, 46, 51, 82, 106, 138]


@pytest.mark.parametrize("way", ["plain", "from rows", "whole core", "in places"])
def test_random_programs_with_leaves_are_the_dense_joint(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "from rows":
        monkeypatch.setattr(block_factors, "_LOSS", -1.0)
    if way == "whole core":
        monkeypatch.setattr(leaf_factors, "_is_dense", lambda x: x.matrix_of_core is not None)
    if way == "in places":
        monkeypatch.setattr(leaf_factors, "_is_dense", lambda x: False)
        monkeypatch.setattr(leaf_factors, "_AT_ONCE", 1)
    monkeypatch.setattr("tests.posteriors.test_linear_gaussian.program_of", program)
    for seed in SEEDS if way == "plain" else SEEDS[::4]:
        assert program(seed)[0].leaves
        check_moments(seed)
        check_reads(seed)


def weights_beside_groups(
    core: list[int], noise: Tensor | None = None, spread: Tensor = ONE
) -> tuple[BlockLayout, list[SiteNumbers]]:
    """Weights that all rows read, between two terms of groups; rows of two numbers count unequally."""
    g = torch.Generator().manual_seed(1)
    rows, own = 70, torch.randint(0, 6, (2, 70), generator=g)
    forms = [SiteForm("b", 1, 2, True), SiteForm("u", 6, 1, True)]
    C = [torch.randn(1, rows, 2, q, generator=g).double() for q in (1, 2, 1)]
    C[2] = C[2] * (own[1] == own[0])[:, None, None]
    second = torch.where(own[1] == own[0], own[1], -1)
    terms = Term(1, own[0]), Term(0, torch.zeros(rows, dtype=torch.long)), Term(1, second)
    layout = BlockLayout.of([*forms, SiteForm("x", rows, 2, False, terms)], core=core)
    value = torch.randn(rows, 2, generator=g).double()
    noise = (
        torch.tensor([0.5, 0.9]).double().reshape(2, 1, 1).expand(2, 1, 2)
        if noise is None
        else noise
    )
    weight = torch.randint(0, 3, (rows, 1), generator=g).double()
    numbers = [
        SiteNumbers(None, 0.3 * ONE.expand(1, 1, 2), spread.expand(1, 1, 2)),
        SiteNumbers(None, 0 * ONE, 0.7 * spread),
        SiteNumbers(value, 0 * ONE.expand(1, 1, 2), noise, tuple(C), weight=weight),
    ]
    return layout, numbers


@pytest.mark.parametrize("core", [[], [0], [1]])
def test_what_all_rows_read_alike_is_the_dense_joint(
    core: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, _ = found = weights_beside_groups(core)
    assert layout.reads[2].common == (False, True, True, False)
    assert bool(layout.leaves) == bool(core)
    monkeypatch.setattr("tests.posteriors.test_linear_gaussian.program_of", lambda seed: found)
    check_moments(0)
    check_reads(0)

    def moments(noise: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        solution = solve(*weights_beside_groups(core, noise.expand(1, 1, 2), spread))
        return solution.log_evidence.sum(), solution.linear_moments(2).phi_phi.sum(1)

    inputs = [(x * ONE).clone().requires_grad_() for x in (0.5, 0.8)]
    assert torch.autograd.gradcheck(moments, inputs)


def test_what_is_eliminated_first() -> None:
    g = np.random.default_rng(0)

    def term(latent: int, elements: int) -> Term:
        return Term(latent, torch.as_tensor(g.integers(0, elements, 3000)))

    # Groups beside weights with priors; one group has no row, and is a block of its own.
    rows = term(1, 400)
    rows.elements[rows.elements == 7] = 8
    weights = SiteForm("b", 1, 3, True), SiteForm("u", 400, 2, True)
    both = Term(0, torch.zeros(3000, dtype=torch.long)), rows
    layout = BlockLayout.of([*weights, SiteForm("x", 3000, 1, False, both)])
    assert (layout.blocks, layout.largest, layout.core) == (2, 3 + 399 * 2, 3)
    assert sum(leaf.count for leaf in layout.leaves) == 400
    assert layout.matrix_size < 400 * 2 * (2 + 3) + 9 + 100
    # Crossed effects: the smaller plate is left, whichever comes first.
    for sizes in ((300, 40), (40, 300)):
        latents = [SiteForm(f"u{k}", n, 1, True) for k, n in enumerate(sizes)]
        data = SiteForm("x", 3000, 1, False, tuple(term(k, n) for k, n in enumerate(sizes)))
        assert BlockLayout.of([*latents, data]).core == 40
    # Pupils in classes, whose effects are around those of their classes, crossed with items.
    own = Term(1, torch.as_tensor(np.arange(600) // 20))
    items, classes, pupils = (
        SiteForm("items", 15, 1, True),
        SiteForm("classes", 30, 1, True),
        SiteForm("pupils", 600, 1, True, (own,)),
    )
    data = SiteForm("x", 3000, 1, False, (term(2, 600), term(0, 15)))
    assert BlockLayout.of([items, classes, pupils, data]).core == 15 + 30
    # A row that reads two of one plate: nothing falls apart.
    data = SiteForm("x", 3000, 1, False, (term(0, 300), term(0, 300)))
    assert not BlockLayout.of([SiteForm("skill", 300, 1, True), data]).leaves


@pytest.mark.parametrize("from_rows", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_gradients_go_through_leaves_twice(
    nested: bool, from_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if from_rows:
        monkeypatch.setattr(block_factors, "_LOSS", -1.0)
    layout, numbers = crossed_program((4, 2))
    if nested:  # the second latent is around the first
        sites = list(layout.sites)
        sites[1] = replace(sites[1], terms=(Term(0, torch.tensor([0, 2])),))
        layout = BlockLayout.of(sites)
    layout = with_core(layout, [0])

    def found(spread: Tensor, inner: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        first, _, data = numbers
        C = (0.7 * ONE.unsqueeze(-1),) if nested else ()
        rows = SiteNumbers(data.value, data.offset, noise, data.coefficients, weight=data.weight)
        own = SiteNumbers(None, first.offset, spread), SiteNumbers(None, 0 * ONE, inner, C)
        solution = solve(layout, [*own, rows])
        every = torch.arange(4)
        covariance = solution.covariance_of(0, every, 1, every % 2)
        return solution.log_evidence.sum(), covariance, solution.residual_moments(1)[1]

    inputs = [(x * ONE).clone().requires_grad_() for x in (0.5, 0.8, 0.6)]
    assert torch.autograd.gradcheck(found, inputs)
    assert torch.autograd.gradgradcheck(lambda *a: found(*a)[0], inputs, atol=1e-4)


@pytest.mark.parametrize(("noise", "prior"), [(1e-4, 100.0), (1e-6, 100.0)])
@pytest.mark.parametrize("nested", [False, True])
def test_precise_data_that_confound_leaves_and_core_keep_the_digits(
    noise: float, prior: float, nested: bool
) -> None:
    g = np.random.default_rng(0)
    index = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    y = 1e6 + prior * g.normal() + prior * g.normal(size=3)[index] + noise * g.normal(size=8)
    A = np.zeros((8, 4))
    A[:, 0] = A[np.arange(8), 1 + index] = prior
    x, C, zero = torch.as_tensor(y).reshape(8, 1), ONE[..., None], torch.zeros_like(index)
    reads, own = ((Term(0, zero[:3]),), (Term(1, index),))
    if not nested:
        reads, own = (), (Term(0, zero), Term(1, index))
    forms = [SiteForm("common", 1, 1, True), SiteForm("group", 3, 1, True, reads)]
    layout = BlockLayout.of([*forms, SiteForm("x", 8, 1, False, own)], core=[0])
    solution = solve(
        layout,
        [
            SiteNumbers(None, 1e6 * ONE if nested else 0 * ONE, prior * ONE),
            SiteNumbers(None, 0 * ONE, prior * ONE, (C,) * len(reads)),
            SiteNumbers(x, 0 * ONE if nested else 1e6 * ONE, noise * ONE, (C,) * len(own)),
        ],
    )
    right = exact_evidence(y.tolist(), A.tolist(), noise)
    assert solution.log_evidence.item() == pytest.approx(right, abs=1e-9)
    variance = solution.covariance_of(0, zero[:1], 0, zero[:1]).item()
    assert variance == pytest.approx(prior**2 / 4, rel=1e-6)


def test_draws_of_leaves_and_core_have_their_moments() -> None:
    layout, numbers = program(next(s for s in SEEDS[1:] if len(program(s)[0].leaves) > 1))
    solution = solve(layout, numbers)
    n, latents = 20_000, [s for s, form in enumerate(layout.sites) if form.is_latent]
    draws = solution.sample(n, torch.Generator().manual_seed(4))
    right = dense(layout, numbers, 0)
    keep = np.concatenate([np.arange(right.first[s], right.first[s + 1]) for s in latents])
    h = torch.cat([d[:, 0].flatten(1) for d in draws], 1).numpy()
    covariance = right.covariance[np.ix_(keep, keep)]
    variance = np.maximum(np.diag(covariance), 0)
    assert (np.abs(h.mean(0) - right.mean[keep]) <= 5 * np.sqrt(variance / n) + 1e-9).all()
    error = 7.5 * np.sqrt(np.outer(variance, variance) / n) + 1e-9
    assert (np.abs(np.cov(h.T) - covariance) <= error).all()


def mixed(y: Tensor, x: Tensor, pupil: Tensor, item: Tensor) -> None:
    """Pupils with slopes, crossed with items, beside weights with priors."""
    spread = pyro.param("spread", torch.ones(()).to(y), constraint=constraints.positive)
    tau = pyro.param("tau", 0.3 * torch.eye(2).to(y), constraint=constraints.positive_definite)
    noise = pyro.param("noise", torch.ones(()).to(y), constraint=constraints.positive)
    m = pyro.param("m", torch.zeros(()).to(y))
    w = pyro.sample("w", dist.Normal(torch.zeros(2).to(y), 10.0).to_event(1))
    with pyro.plate("pupils", 40):
        u = pyro.sample("u", dist.MultivariateNormal(torch.zeros(2).to(y), tau))
    with pyro.plate("items", 12):
        v = pyro.sample("v", dist.Normal(m, spread))
    with pyro.plate("rows", len(y)):
        loc = x @ w + u[pupil, 0] + u[pupil, 1] * x[:, 0] + v[item]
        pyro.sample("y", dist.Normal(loc, noise), obs=y)


def pupils_and_items(rows: int = 240) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    pupil, item = (torch.randint(0, n, (rows,), generator=g) for n in (40, 12))
    pupil[pupil == 3] = 4  # one pupil has no row
    x = torch.randn(rows, 2, generator=g).double()
    u, v = torch.randn(40, 2, generator=g).double(), torch.randn(12, generator=g).double()
    y = (
        1.0
        + u[pupil, 0]
        + 0.5 * u[pupil, 1] * x[:, 0]
        + v[item]
        + x @ torch.tensor([1.0, -2.0]).double()
    )
    return y + 0.5 * torch.randn(rows, generator=g).double(), x, pupil, item


def test_a_fit_with_leaves_is_that_of_the_dense_block(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pupils_and_items()
    found = []
    for way in ("leaves", "dense"):
        if way == "dense":
            monkeypatch.setattr(gaussian_layout, "core_of", lambda *a: frozenset())
        pyro.clear_param_store()
        em = ExactPosteriorEM(mixed)
        result = em.fit(*data, max_steps=5, tol=0)
        q = em.posterior(*data)
        own = [q.mean("u"), q.mean("v"), q.covariance("u"), q.covariance("w"), q.covariance("v")]
        errors = result.standard_errors()
        found.append((result, own, errors, str(em.plan(*data))))
    (a, means, errors, plan), (b, dense_means, dense_errors, _) = found
    assert "all but 14 eliminated side by side" in plan
    np.testing.assert_allclose(a.history, b.history, rtol=1e-10)
    for name in a.params:
        close(a.params[name], np.asarray(b.params[name]))
        close(errors[name], np.asarray(dense_errors[name]), 1e-6)
    for one, other in zip(means, dense_means, strict=True):
        close(one, np.asarray(other))


def test_float32_data_are_fitted_as_in_float64() -> None:
    data = pupils_and_items()
    pyro.clear_param_store()
    right = ExactPosteriorEM(mixed).fit(*data, max_steps=4, tol=0)
    pyro.clear_param_store()
    single = [d.float() if d.is_floating_point() else d for d in data]
    found = ExactPosteriorEM(mixed).fit(*single, max_steps=4, tol=0)
    assert found.log_evidence == pytest.approx(right.log_evidence, rel=1e-5)


def test_what_the_rows_of_many_groups_determine_counts() -> None:
    """In whatever order rows come, some that are looked at tell the groups' spread from the data's."""
    g = torch.Generator().manual_seed(0)
    group = torch.arange(900) % 300
    y = torch.randn(300, generator=g)[group] + torch.randn(900, generator=g)

    def model(y: Tensor) -> None:
        spread = pyro.param("spread", torch.tensor(1.0), constraint=constraints.positive)
        noise = pyro.param("noise", torch.tensor(1.0), constraint=constraints.positive)
        m = pyro.sample("m", dist.Normal(0.0, 10.0))
        with pyro.plate("groups", 300):
            u = pyro.sample("u", dist.Normal(0.0, spread))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(m + u[group], noise), obs=y)

    pyro.clear_param_store()
    result = ExactPosteriorEM(model).fit(y, max_steps=1)
    assert not any("determine" in note for note in result.plan.notes)
    assert result.num_free_parameters == 2


def test_penicillin_has_the_published_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 plates crossed with 6 samples: Davies and Goldsmith (1972), section 6.6.

    By maximum likelihood as the tests of MixedModels.jl have it: deviance 332.18834867, and spreads.
    """
    rows = (
        "272326232321 272326232321 252125242420 262325232320 252226222320 242225232219 "
        "242023212219 262226242421 242124222220 242124232219 262326242421 252226242420 "
        "262426242522 262326232320 262325242422 252225232320 252124232320 252224232319 "
        "242123212119 262326242421 252124222218 252225222220 242124222419 242124222118"
    )
    y = torch.tensor([int(row[i : i + 2]) for row in rows.split() for i in range(0, 12, 2)])
    y, plate, sample = y.double(), torch.arange(144) // 6, torch.arange(144) % 6
    start = {"m": 22.97222222, "a": 0.8455645948, "b": 1.7706477793, "s": 0.3024263988**0.5}

    def model(y: Tensor) -> None:
        at = {k: torch.tensor(v).double() for k, v in start.items()}
        m = pyro.param("m", at["m"])
        a, b, s = (pyro.param(k, at[k], constraint=constraints.positive) for k in "abs")
        with pyro.plate("plates", 24):
            u = pyro.sample("u", dist.Normal(torch.zeros(()).double(), a))
        with pyro.plate("samples", 6):
            v = pyro.sample("v", dist.Normal(torch.zeros(()).double(), b))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(m + u[plate] + v[sample], s), obs=y)

    monkeypatch.setattr(leaf_search, "_FEW", 8)
    pyro.clear_param_store()
    em = ExactPosteriorEM(model)
    result = em.fit(y, max_steps=1, tol=0)
    assert "all but 6 eliminated side by side" in str(result.plan)
    assert result.history[0] == pytest.approx(-332.18834867 / 2, abs=1e-7)
    assert result.log_evidence - result.history[0] < 1e-7  # that is the maximum
    assert em.posterior(y).mean("u")[0].item() == pytest.approx(0.8044, abs=1e-4)
    assert float(result.standard_errors()["m"]) == pytest.approx(0.744596, rel=1e-4)


@pytest.mark.parametrize("levels", [60, 4100])
def test_two_large_crossed_plates_are_said_before_a_step_is_paid(levels: int) -> None:
    """What is left is a matrix without zeros of the smaller plate, however few data there are."""

    def model(y: Tensor, a: Tensor, b: Tensor) -> None:
        spread = pyro.param("spread", torch.tensor(1.0).double(), constraint=constraints.positive)
        with pyro.plate("first", levels):
            u = pyro.sample("u", dist.Normal(0.0, spread))
        with pyro.plate("second", levels):
            v = pyro.sample("v", dist.Normal(0.0, spread))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(u[a] + v[b], 1.0), obs=y)

    source = torch.Generator().manual_seed(0)
    a, b = torch.randint(levels, (2, 5 * levels), generator=source)
    notes = ExactPosteriorEM(model).plan((a % 7).double(), a, b).notes
    if levels < 4000:
        assert not notes
    else:
        said = r"sites 'u', 'v': 4,0\d\d unknowns are one matrix without zeros: .* 3 GiB"
        assert len(notes) == 1 and re.match(said, notes[0])
