"""Linear-Gaussian components against the dense joint Gaussian of all their sites."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_em.posteriors.gaussians.gaussian_layout import BlockLayout
from pyro_em.posteriors.gaussians.linear_gaussian import GaussianSolution, solve
from pyro_em.posteriors.gaussians.site_forms import SiteForm, Term
from pyro_em.posteriors.gaussians.site_rows import SiteNumbers
from pyro_em.posteriors.gaussians.square_root import square_root
from pyro_em.updates.expectations.linear_moments import shifted, summed

LOG_TWO_PI = float(np.log(2 * np.pi))


@dataclass(frozen=True, eq=False)
class Dense:
    """The posterior of one cell by conditioning the joint Gaussian of everything.

    Attributes:
        log_evidence: Of all observed rows.
        mean: Of all coordinates of all sites, site by site, row by row.
        covariance: The same.
        block_evidence: Of the observed rows of each block.
        first: Where each site's coordinates begin.
    """

    log_evidence: float
    mean: np.ndarray
    covariance: np.ndarray
    block_evidence: np.ndarray
    first: list[int]


def dense(layout: BlockLayout, numbers: list[SiteNumbers], cell: int) -> Dense:
    forms = layout.sites
    first = [0]
    for form in forms:
        first.append(first[-1] + form.rows * form.width)
    size = first[-1]
    offset, A, L = np.zeros(size), np.zeros((size, size)), np.zeros((size, size))
    value, counts = np.zeros(size), np.zeros(size)
    correction = np.zeros(size)  # what weights other than 0 and 1 add to a log density
    block = np.full(size, -1)

    def at(x: Tensor, rows: int) -> np.ndarray:
        x = x.detach().double()
        x = x[cell if x.shape[0] > 1 else 0]
        return x.expand(rows, *x.shape[1:]).numpy()

    for s, (form, n) in enumerate(zip(forms, numbers, strict=True)):
        rows, D = form.rows, form.width
        offsets = np.broadcast_to(at(n.offset, rows), (rows, D))
        spreads = at(n.spread, rows)
        for r in range(rows):
            here = slice(first[s] + r * D, first[s] + (r + 1) * D)
            offset[here] = offsets[r]
            L[here, here] = spreads[r] if n.is_matrix else np.diag(spreads[r])
            block[here] = int(layout.block_of_row[s][r])
            for term, C in zip(form.terms, n.coefficients, strict=True):
                e, q = int(term.elements[r]), forms[term.latent].width
                if e >= 0:
                    parent = first[term.latent] + e * q
                    A[here, parent : parent + q] += at(C, rows)[r]
            if n.value is not None:
                w = np.ones(D)
                if n.weight is not None:
                    w = np.broadcast_to(n.weight.double().numpy(), (rows, D))[r]
                counts[here], value[here] = w, np.where(w > 0, n.value.double().numpy()[r], 0.0)
                positive = np.where(w > 0, w, 1.0)
                deviations = np.abs(np.diag(L[here, here]))
                correction[here] = (w - 1) * (-0.5 * LOG_TWO_PI - np.log(deviations))
                correction[here] -= 0.5 * np.log(positive)
                L[here, here] /= np.sqrt(positive)[:, None]
    through = np.linalg.inv(np.eye(size) - A)
    mean, half = through @ offset, through @ L
    covariance = half @ half.T

    def evidence(which: np.ndarray) -> float:
        if not len(which):
            return 0.0
        S = covariance[np.ix_(which, which)]
        r = value[which] - mean[which]
        quadratic = r @ np.linalg.solve(S, r)
        out = -0.5 * (quadratic + np.linalg.slogdet(S)[1] + len(which) * LOG_TWO_PI)
        return float(out + correction[which].sum())

    seen = np.flatnonzero(counts > 0)
    gain = (
        np.linalg.solve(covariance[np.ix_(seen, seen)], covariance[seen]).T
        if len(seen)
        else np.zeros((size, 0))
    )
    return Dense(
        evidence(seen),
        mean + gain @ (value[seen] - mean[seen]),
        covariance - gain @ covariance[seen],
        np.array([evidence(seen[block[seen] == b]) for b in range(layout.blocks)]),
        first,
    )


def random_program(seed: int) -> tuple[BlockLayout, list[SiteNumbers]]:
    """Random latents, reads, cells, masks, weights and spreads; some variances are zero."""
    g = np.random.default_rng(seed)
    cells = int(g.choice([1, 3]))
    forms: list[SiteForm] = []
    numbers: list[SiteNumbers] = []

    def lead(rows: int) -> tuple[int, int]:
        return int(g.choice([1, cells])), int(g.choice([1, rows]))

    def normal(*shape: int) -> Tensor:
        return torch.as_tensor(g.normal(size=shape))

    kinds = ["latent"] + ["latent"] * int(g.integers(0, 4)) + ["observed"] * int(g.integers(1, 4))
    kinds[1:] = list(g.permutation(kinds[1:]))
    for s, kind in enumerate(kinds):
        is_latent = kind == "latent"
        rows = int(g.integers(1, 5 if is_latent else 9))
        D = int(g.integers(1, 4))
        latents = [i for i, form in enumerate(forms) if form.is_latent]
        terms, coefficients = [], []
        for _ in range(int(g.integers(0 if is_latent else 1, 4)) if latents else 0):
            t = int(g.choice(latents))
            low = -1 if g.random() < 0.4 else 0
            if g.random() < 0.1:
                low = -1 - forms[t].rows
            elements = np.maximum(g.integers(low, forms[t].rows, size=rows), -1)
            terms.append(Term(t, torch.as_tensor(elements)))
            coefficients.append(normal(*lead(rows), D, forms[t].width))
        forms.append(SiteForm(f"s{s}", rows, D, is_latent, tuple(terms)))
        is_matrix = bool(g.random() < 0.4)
        if is_matrix:
            spread = 0.5 * normal(*lead(rows), D, D).tril()
            diagonal = spread.diagonal(dim1=-2, dim2=-1)
            diagonal.copy_(diagonal.abs() + 0.3)
        else:
            spread = normal(*lead(rows), D).abs() + 0.2
        if is_latent and g.random() < 0.3:
            spread = spread * torch.as_tensor(g.random(spread.shape[:2]) < 0.5).reshape(
                *spread.shape[:2], *[1] * (spread.dim() - 2)
            )
        value, weight = None, None
        if not is_latent:
            value = 2 * normal(rows, D)
            if g.random() < 0.6:
                of_entries = 1 if is_matrix else int(g.choice([1, D]))
                weight = torch.as_tensor(g.random((int(g.choice([1, rows])), of_entries)) < 0.7)
                weight = weight.double()
                if g.random() < 0.3:
                    weight = weight * torch.as_tensor(g.random(weight.shape) * 3)
                value = torch.where(weight > 0, value, torch.nan)
        numbers.append(
            SiteNumbers(
                value, normal(*lead(rows), D), spread, tuple(coefficients), is_matrix, weight
            )
        )
    return BlockLayout.of(forms), numbers


def read_of(layout: BlockLayout, s: int, r: int, first: list[int], own: bool) -> list[int]:
    """The coordinates that a row reads; −1 for missing ones."""
    out = []
    for term in layout.sites[s].terms:
        q, e = layout.sites[term.latent].width, int(term.elements[r])
        out += [first[term.latent] + e * q + k if e >= 0 else -1 for k in range(q)]
    if own:
        D = layout.sites[s].width
        out += [first[s] + r * D + k for k in range(D)]
    return out


def close(found: Tensor | np.ndarray, right: np.ndarray, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(np.asarray(found), right, rtol=tolerance, atol=tolerance)


def crossed_program(levels: tuple[int, int] = (30, 12)) -> tuple[BlockLayout, list[SiteNumbers]]:
    """Rows that read an element of each of two latents: one block, whose latents read no other."""
    g = torch.Generator().manual_seed(0)
    rows = 150
    index = [torch.randint(0, n, (rows,), generator=g) for n in levels]
    latents = [SiteForm(f"u{k}", n, 1, is_latent=True) for k, n in enumerate(levels)]
    data = SiteForm("x", rows, 1, False, tuple(Term(k, i) for k, i in enumerate(index)))
    spread = torch.rand(2, levels[0], 1, generator=g).double()
    spread[:, 3] = 0.0  # an element that has the mean of its prior
    weight = torch.randint(0, 3, (rows, 1), generator=g).double()
    C = torch.randn(1, rows, 1, 2, generator=g).double()
    return BlockLayout.of([*latents, data]), [
        SiteNumbers(None, torch.randn(1, levels[0], 1, generator=g).double(), spread),
        SiteNumbers(None, torch.zeros(1, 1, 1).double(), torch.full((1, 1, 1), 0.7).double()),
        SiteNumbers(
            torch.randn(rows, 1, generator=g).double(),
            torch.full((1, 1, 1), 0.3).double(),
            torch.full((2, 1, 1), 0.5).double(),
            (C[..., :1], C[..., 1:]),
            weight=weight,
        ),
    ]


def program_of(seed: int) -> tuple[BlockLayout, list[SiteNumbers]]:
    return crossed_program() if seed < 0 else random_program(seed)


SEEDS = range(150)


@pytest.mark.parametrize("seed", [-1, *SEEDS])
def test_a_random_program_has_the_evidence_and_moments_of_the_dense_joint(seed: int) -> None:
    layout, numbers = program_of(seed)
    solution = solve(layout, numbers)
    assert not solution.degenerate
    latents = [s for s, form in enumerate(layout.sites) if form.is_latent]
    g = np.random.default_rng(abs(seed))
    for cell in range(solution.cells):
        right = dense(layout, numbers, cell)
        total = solution.log_evidence[cell].sum() + solution.constant[cell]
        assert total.item() == pytest.approx(right.log_evidence, rel=1e-9, abs=1e-9)
        close(solution.log_evidence[cell], right.block_evidence)
        by_rows = sum(
            solution.constant_rows(s)[cell].sum().item() for s in range(len(layout.sites))
        )
        assert by_rows == pytest.approx(solution.constant[cell].item(), rel=1e-12, abs=1e-12)
        for a in latents:
            form = layout.sites[a]
            begin, end = right.first[a], right.first[a + 1]
            close(solution.mean(a)[cell], right.mean[begin:end].reshape(form.rows, form.width))
            b = int(g.choice(latents))
            other = layout.sites[b]
            ea = torch.arange(form.rows).repeat_interleave(other.rows)
            eb = torch.arange(other.rows).repeat(form.rows)
            found = solution.covariance_of(a, ea, b, eb)[cell]
            found = found.reshape(form.rows, other.rows, form.width, other.width).transpose(1, 2)
            found = found.reshape(form.rows * form.width, other.rows * other.width)
            close(found, right.covariance[begin:end, right.first[b] : right.first[b + 1]])


@pytest.mark.parametrize("seed", [-1, *SEEDS[::3]])
def test_the_moments_of_what_rows_read_are_those_of_the_dense_joint(seed: int) -> None:
    layout, numbers = program_of(seed)
    solution = solve(layout, numbers)
    cell = solution.cells - 1
    right = dense(layout, numbers, cell)
    g = np.random.default_rng(abs(seed))
    for s, (form, n) in enumerate(zip(layout.sites, numbers, strict=True)):
        D = form.width
        mean, covariance = solution.moments(s)
        full = solution.linear_moments(s)
        diagonal = solution.linear_moments(s, diagonal=True)
        residual, second = solution.residual_moments(s)
        Q = full.phi_phi.shape[-1] - 1
        delta = g.normal(size=(D, Q + 1))
        moved = shifted(full, torch.as_tensor(delta))
        moved_diagonal = shifted(diagonal, torch.as_tensor(delta))
        for r in range(form.rows):
            read = read_of(layout, s, r, right.first, own=form.is_latent)
            there = np.array(read) >= 0
            take = np.maximum(read, 0).astype(int)
            m = np.where(there, right.mean[take], 0.0)
            V = right.covariance[np.ix_(take, take)] * np.outer(there, there)
            close(mean[cell, r], m)
            close(covariance[cell, r], V.reshape(len(read), len(read)))

            # The residual is linear in what is read: r = base + G u, and φ = (u, 1).
            def at(x: Tensor, r: int = r, rows: int = form.rows) -> np.ndarray:
                x = x[cell if x.shape[0] > 1 else 0]
                return x.expand(rows, *x.shape[1:])[r].numpy()

            C = [at(c) for c in n.coefficients]
            G = -np.concatenate([*C, np.zeros((D, 0))], 1)
            base = -at(n.offset)
            counted = np.ones(D)
            if form.is_latent:
                G = np.concatenate([G, np.eye(D)], 1)
            else:
                value = n.value[r].numpy()
                if n.weight is not None:
                    counted = (n.weight.expand(form.rows, D)[r].numpy() > 0).astype(float)
                base = np.where(counted > 0, base + value, 0.0)
                G = G * counted[:, None]
            F = np.concatenate([np.eye(len(read))[:Q], np.zeros((1, len(read)))])
            phi = np.concatenate([m[:Q], [1.0]])
            rbar = base + G @ m
            close(residual[cell, r], rbar)
            close(second[cell, r], G @ V @ G.T + np.outer(rbar, rbar))
            close(full.phi_phi[cell, r], F @ V @ F.T + np.outer(phi, phi))
            close(full.r_phi[cell, r], G @ V @ F.T + np.outer(rbar, phi))
            new = G - delta @ F
            new_mean = rbar - delta @ phi
            expected = new @ V @ new.T + np.outer(new_mean, new_mean)
            close(moved[cell, r], expected)
            close(moved_diagonal[cell, r], np.diag(expected))
            close(diagonal.r_r[cell, r], np.diag(G @ V @ G.T + np.outer(rbar, rbar)))


def random_intercepts(groups: list[int], q: int = 1) -> tuple[BlockLayout, Tensor]:
    """One latent per group, of width q, and data that read their own group's."""
    index = torch.repeat_interleave(torch.arange(len(groups)), torch.as_tensor(groups))
    group = SiteForm("group", len(groups), q, is_latent=True)
    data = SiteForm("data", len(index), 1, False, (Term(0, index),))
    return BlockLayout.of([group, data]), index


def test_sums_of_moments_are_those_of_the_rows() -> None:
    layout, numbers = random_program(5)
    g = torch.Generator().manual_seed(0)
    solution = solve(layout, numbers)
    for s, form in enumerate(layout.sites):
        rows = solution.linear_moments(s, diagonal=True)
        by_row = torch.rand(solution.cells, form.rows, generator=g).double()
        total = summed(rows, by_row)
        close(total.phi_phi, (by_row[..., None, None] * rows.phi_phi).sum(1).numpy())
        close(total.r_r, (by_row[..., None] * rows.r_r).sum(1).numpy())
        close(total.r_phi, (by_row[..., None, None] * rows.r_phi).sum(1).numpy())
        by_entry = torch.rand(1, form.rows, form.width, generator=g).double()
        entries = summed(rows, by_entry)
        delta = torch.randn(1, *rows.r_phi.shape[-2:], generator=g).double()
        moved = (by_entry * shifted(rows, delta.unsqueeze(1))).sum(1)
        close(shifted(entries, delta), moved.numpy())
        close(
            shifted(total, delta),
            (by_row[..., None] * shifted(rows, delta[:, None])).sum(1).numpy(),
        )
        with pytest.raises(ValueError, match="diagonal"):
            summed(solution.linear_moments(s), by_entry)


def test_blocks_of_many_sizes_are_padded_exactly() -> None:
    """Each group holds as many children as its number: blocks of 2 … 41 unknowns."""
    sizes = list(range(1, 41))
    parent = torch.repeat_interleave(torch.arange(40), torch.as_tensor(sizes))
    n = len(parent)
    layout = BlockLayout.of(
        [
            SiteForm("group", 41, 1, True),  # nobody reads the last one
            SiteForm("child", n, 1, True, (Term(0, parent),)),
            SiteForm("data", n, 1, False, (Term(1, torch.arange(n)),)),
        ]
    )
    assert layout.blocks == 41
    assert layout.largest == 41
    assert len(layout.buckets) < 20
    assert any(bucket.count * bucket.size > len(bucket.order.unique()) for bucket in layout.buckets)
    g = torch.Generator().manual_seed(1)

    def one(x: float) -> Tensor:
        return torch.full((1, 1, 1), x).double()

    C = torch.randn(1, n, 1, 1, generator=g).double()
    numbers = [
        SiteNumbers(None, one(0.4), one(1.3)),
        SiteNumbers(None, one(0.1), one(0.7), (C,)),
        SiteNumbers(
            torch.randn(n, 1, generator=g).double(), one(0.2), one(0.5), (one(2.0)[..., None],)
        ),
    ]
    solution = solve(layout, numbers)
    right = dense(layout, numbers, 0)
    close(solution.log_evidence[0], right.block_evidence)
    close(solution.mean(1)[0, :, 0], right.mean[41 : 41 + n])
    variance = solution.covariance_of(1, torch.arange(n), 1, torch.arange(n))[0, :, 0, 0]
    close(variance, np.diag(right.covariance)[41 : 41 + n])
    unread = int(layout.block_of_element(0)[40])
    assert solution.log_evidence[0, unread] == 0
    assert solution.mean(0)[0, 40, 0].item() == pytest.approx(0.4)
    # The evidence is E[log p(x, h)] + entropy: log p(x, h) by the moments.
    right_entropy = 0.5 * (1 + LOG_TWO_PI) + np.log(1.3)
    assert solution.entropy()[0, unread].item() == pytest.approx(right_entropy)
    covariance = right.covariance[: 41 + n, : 41 + n]
    whole = 0.5 * (np.linalg.slogdet(covariance)[1] + (41 + n) * (1 + LOG_TWO_PI))
    assert solution.entropy().sum().item() == pytest.approx(whole, rel=1e-9)


def test_a_variance_of_zero_leaves_its_mean() -> None:
    layout, _ = random_intercepts([2, 1, 3])
    x = torch.randn(6, 1, generator=torch.Generator().manual_seed(2)).double()
    zero, one = torch.zeros(1, 1, 1).double(), torch.ones(1, 1, 1).double()
    numbers = [SiteNumbers(None, one, zero), SiteNumbers(x, zero, one, (one[..., None],))]
    solution = solve(layout, numbers)
    log_density = torch.distributions.Normal(1.0, 1.0).log_prob(x).sum()
    assert solution.log_evidence.sum().item() == pytest.approx(log_density.item(), rel=1e-14)
    assert (solution.mean(0) == 1).all()
    assert (solution.moments(0)[1] == 0).all()
    assert (solution.entropy() == -torch.inf).all()


def test_no_spread_of_data_is_named_and_missing_data_leak_nothing() -> None:
    layout, _ = random_intercepts([2, 1])
    one = torch.ones(1, 1, 1).double()
    x = torch.tensor([[1.0], [torch.nan], [3.0]])
    weight = torch.tensor([[1.0], [0.0], [1.0]])
    spread = torch.tensor([1.0, 0.0, 1.0]).reshape(1, 3, 1)
    latent = SiteNumbers(None, one, one)

    def of(spread: Tensor, weight: Tensor | None) -> GaussianSolution:
        return solve(
            layout, [latent, SiteNumbers(x, 0 * one, spread, (one[..., None],), False, weight)]
        )

    assert of(spread, None).degenerate
    solution = of(spread, weight)
    assert not solution.degenerate
    # One datum per group: N(x; 1, √2).
    right = torch.distributions.Normal(1.0, 2**0.5).log_prob(torch.tensor([1.0, 3.0]))
    close(solution.log_evidence[0], right.numpy(), 1e-6)
    assert solution.residual_moments(1)[0][0, 1, 0] == 0
    assert solution.linear_moments(1).r_phi.isfinite().all()


def exact_evidence(y: list[float], A: list[list[float]], noise: float) -> float:
    """log N(y; 1e6, A Aᵀ + noise²) in 60 digits, of the numbers as they are in float64."""
    with mpmath.workdps(60):
        n = len(y)
        A_ = mpmath.matrix(A)
        S = A_ * A_.T + mpmath.mpf(noise) ** 2 * mpmath.eye(n)
        r = mpmath.matrix([mpmath.mpf(v) - 1_000_000 for v in y])
        quadratic = (r.T * mpmath.lu_solve(S, r))[0]
        return float(-(quadratic + mpmath.log(mpmath.det(S)) + n * mpmath.log(2 * mpmath.pi)) / 2)


@pytest.mark.parametrize("noise", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("prior", [1.0, 100.0])
def test_little_noise_about_a_large_offset_keeps_the_digits(noise: float, prior: float) -> None:
    g = np.random.default_rng(3)
    index = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    slope = np.round(g.normal(size=8), 3)
    y = 1e6 + prior * g.normal(size=3)[index] + prior * g.normal(size=3)[index] * slope
    y = y + noise * g.normal(size=8)
    A = np.zeros((8, 6))
    A[np.arange(8), 2 * index] = prior
    A[np.arange(8), 2 * index + 1] = prior * slope
    right = exact_evidence(y.tolist(), A.tolist(), noise)
    layout, _ = random_intercepts([3, 2, 3], q=2)
    C = torch.as_tensor(np.stack([np.ones(8), slope], -1)).reshape(1, 8, 1, 2)
    one = torch.ones(1, 1, 1).double()
    centred = [
        SiteNumbers(None, torch.zeros(1, 1, 2), prior * torch.ones(1, 1, 2)),
        SiteNumbers(torch.as_tensor(y).reshape(8, 1), 1e6 * one, noise * one, (C,)),
    ]
    found = solve(layout, centred).log_evidence.sum().item()
    assert found == pytest.approx(right, abs=1e-6)
    # The same with the million in the latents' mean.
    in_mean = [
        SiteNumbers(None, torch.tensor([[[1e6, 0.0]]]), prior * torch.ones(1, 1, 2)),
        SiteNumbers(centred[1].value, 0 * one, noise * one, (C,)),
    ]
    found = solve(layout, in_mean).log_evidence.sum().item()
    assert found == pytest.approx(right, abs=1e-6)


@pytest.mark.parametrize(("noise", "prior"), [(1e-4, 1.0), (1e-4, 100.0), (1e-6, 100.0)])
@pytest.mark.parametrize("nested", [False, True])
def test_unknowns_that_precise_data_confound_keep_the_digits(
    noise: float, prior: float, nested: bool
) -> None:
    """Of a common mean and three groups' the data tell sums only: the rest is the prior's."""
    g = np.random.default_rng(0)
    index = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    y = 1e6 + prior * g.normal() + prior * g.normal(size=3)[index] + noise * g.normal(size=8)
    A = np.zeros((8, 4))
    A[:, 0] = A[np.arange(8), 1 + index] = prior
    right = exact_evidence(y.tolist(), A.tolist(), noise)
    x, one = torch.as_tensor(y).reshape(8, 1), torch.ones(1, 1, 1).double()
    C = one[..., None]
    zero = torch.zeros(8, dtype=torch.long)
    common, own = Term(0, zero), Term(1, index)
    first = SiteForm("common", 1, 1, True)
    if nested:
        group = SiteForm("group", 3, 1, True, (Term(0, zero[:3]),))
        layout = BlockLayout.of([first, group, SiteForm("x", 8, 1, False, (own,))])
        group_numbers = SiteNumbers(None, 0 * one, prior * one, (C,))
        data = SiteNumbers(x, 0 * one, noise * one, (C,))
        mean = 1e6 * one
    else:
        group = SiteForm("group", 3, 1, True)
        layout = BlockLayout.of([first, group, SiteForm("x", 8, 1, False, (common, own))])
        group_numbers = SiteNumbers(None, 0 * one, prior * one)
        data = SiteNumbers(x, 1e6 * one, noise * one, (C, C))
        mean = 0 * one
    solution = solve(layout, [SiteNumbers(None, mean, prior * one), group_numbers, data])
    assert solution.log_evidence.item() == pytest.approx(right, abs=1e-9)
    # Three groups' means tell the common one: prior² / (1 + 3) and the noise of the means.
    variance = solution.covariance_of(0, zero[:1], 0, zero[:1]).item()
    assert variance == pytest.approx(prior**2 / 4, rel=1e-6)


@pytest.mark.parametrize("seed", SEEDS[::5])
def test_factors_from_rows_are_those_of_the_matrices(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, numbers = random_program(seed)
    right = solve(layout, numbers)
    monkeypatch.setattr("pyro_em.posteriors.gaussians.block_factors._LOSS", -1.0)
    found = solve(layout, numbers)
    close(found.log_evidence, right.log_evidence.numpy())
    for s in range(len(layout.sites)):
        close(found.moments(s)[1], right.moments(s)[1].numpy())


@pytest.mark.parametrize("counts", [[0, 1, 2000, 7], [300, 0, 0, 40], [0, 0]])
@pytest.mark.parametrize("d", [1, 3, 12])
def test_square_roots_of_very_different_numbers_of_rows(counts: list[int], d: int) -> None:
    block = torch.repeat_interleave(torch.arange(len(counts)), torch.as_tensor(counts))
    g = torch.Generator().manual_seed(d)
    block = block[torch.randperm(len(block), generator=g)]
    rows = torch.randn(2, len(block), d, generator=g).double()
    found = square_root(rows, block, len(counts))
    assert (found.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert (found.triu(1) == 0).all()
    for b in range(len(counts)):
        mine = rows[:, block == b]
        close(found[:, b] @ found[:, b].mT, (torch.eye(d) + mine.mT @ mine).numpy(), 1e-12)


def test_draws_have_the_posterior_moments() -> None:
    layout, numbers = random_program(11)
    solution = solve(layout, numbers)
    n = 20_000
    draws = solution.sample(n, torch.Generator().manual_seed(4))
    latents = [s for s, form in enumerate(layout.sites) if form.is_latent]
    for cell in range(solution.cells):
        right = dense(layout, numbers, cell)
        keep = np.concatenate([np.arange(right.first[s], right.first[s + 1]) for s in latents])
        h = torch.cat([d[:, cell].flatten(1) for d in draws], 1).numpy()
        variance = np.diag(right.covariance)[keep]
        error = np.sqrt(np.maximum(variance, 0) / n)
        assert (np.abs(h.mean(0) - right.mean[keep]) <= 5 * error + 1e-9).all()
        covariance = right.covariance[np.ix_(keep, keep)]
        scale = np.sqrt(np.outer(variance, variance))
        assert (np.abs(np.cov(h.T) - covariance) <= 5 * scale / np.sqrt(n) * 1.5 + 1e-9).all()


@pytest.mark.parametrize("from_rows", [False, True])
def test_gradients_are_right_and_can_be_taken_twice(
    from_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if from_rows:
        monkeypatch.setattr("pyro_em.posteriors.gaussians.block_factors._LOSS", -1.0)
    layout, _ = random_intercepts([2, 3, 1], q=2)
    g = torch.Generator().manual_seed(6)
    x = torch.randn(6, 1, generator=g).double()
    C = torch.randn(1, 6, 1, 2, generator=g).double()
    loc = torch.tensor([[[0.3, -0.2]]]).double()
    factor = torch.tensor([[[[0.8, 0.0], [0.4, 0.6]]]]).double()

    def evidence(loc: Tensor, factor: Tensor, C: Tensor, offset: Tensor, noise: Tensor) -> Tensor:
        numbers = [
            SiteNumbers(None, loc, factor.tril(), (), True),
            SiteNumbers(x, offset, noise, (C,)),
        ]
        return solve(layout, numbers).log_evidence.sum()

    one = torch.ones(1, 1, 1).double()
    inputs = [t.clone().requires_grad_() for t in (loc, factor, C, 0.1 * one, 0.5 * one)]
    assert torch.autograd.gradcheck(evidence, inputs)
    assert torch.autograd.gradgradcheck(evidence, inputs, atol=1e-4)
    # Fisher's identity: the gradient is that of the expected log joint.
    solution = solve(
        layout,
        [SiteNumbers(None, loc, factor, (), True), SiteNumbers(x, 0.1 * one, 0.5 * one, (C,))],
    )
    (score,) = torch.autograd.grad(evidence(*inputs), inputs[3])
    assert score.item() == pytest.approx(solution.residual_moments(1)[0].sum().item() / 0.25)


def test_gradients_where_no_latent_reads_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_em.posteriors.gaussians.block_factors._LARGE", 1)
    layout, numbers = crossed_program((4, 2))

    def found(spread: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        first, second, data = numbers
        own = SiteNumbers(None, first.offset, spread)
        rows = SiteNumbers(data.value, data.offset, noise, data.coefficients, weight=data.weight)
        solution = solve(layout, [own, second, rows])
        assert all(f.scale is not None for f in solution._factor.dense)
        every = torch.arange(4)
        covariance = solution.covariance_of(0, every, 1, every % 2)
        return solution.log_evidence.sum(), covariance

    inputs = [(0.1 + numbers[k].spread[:1]).requires_grad_() for k in (0, 2)]
    assert torch.autograd.gradcheck(found, inputs)
    assert torch.autograd.gradgradcheck(lambda *a: found(*a)[0], inputs, atol=1e-4)


@pytest.mark.parametrize("rows", [0, None])
def test_without_data_the_posterior_is_the_prior(rows: int | None) -> None:
    parent = torch.tensor([0, 0, 1])
    forms = [SiteForm("a", 2, 1, True), SiteForm("b", 3, 2, True, (Term(0, parent),))]
    one = torch.ones(1, 1, 1).double()
    C = torch.tensor([[[[1.0], [2.0]]]])
    numbers = [SiteNumbers(None, one, one), SiteNumbers(None, 0 * one, one.expand(1, 1, 2), (C,))]
    if rows is not None:
        forms.append(SiteForm("x", 0, 1, False, (Term(0, parent[:0]),)))
        numbers.append(SiteNumbers(torch.zeros(0, 1), one, one, (one[..., None],)))
    layout = BlockLayout.of(forms)
    solution = solve(layout, numbers)
    right = dense(layout, numbers, 0)
    assert (solution.log_evidence == 0).all()
    close(solution.mean(1)[0].reshape(-1), right.mean[2:])
    close(solution.moments(1)[1][0, 2], right.covariance[np.ix_([1, 6, 7], [1, 6, 7])])
    if rows is not None:
        assert summed(solution.linear_moments(2, diagonal=True)).r_r.item() == 0


def test_solving_can_be_differentiated_at_a_zero_variance() -> None:
    layout, _ = random_intercepts([2, 3])
    one = torch.ones(1, 1, 1).double()
    x = torch.arange(5.0).reshape(5, 1)
    scale = (0 * one).requires_grad_()
    numbers = [SiteNumbers(None, one, scale), SiteNumbers(x, 0 * one, one, (one[..., None],))]
    (gradient,) = torch.autograd.grad(solve(layout, numbers).log_evidence.sum(), scale)
    assert gradient.item() == 0


def test_plain_em_of_random_intercepts_goes_the_published_way() -> None:
    """Dyestuff: the evidence entering each step from mean 1500, standard deviations of 50."""
    batches = [
        [1545, 1440, 1440, 1520, 1580],
        [1540, 1555, 1490, 1560, 1495],
        [1595, 1550, 1605, 1510, 1560],
        [1445, 1440, 1595, 1465, 1545],
        [1595, 1630, 1515, 1635, 1625],
        [1520, 1455, 1450, 1480, 1445],
    ]
    layout, _ = random_intercepts([5] * 6)
    x = torch.tensor(batches, dtype=torch.float64).reshape(30, 1)
    one = torch.ones(1, 1, 1).double()
    mean, between, within = 1500.0, 50.0, 50.0
    path = []
    for _ in range(300):
        numbers = [
            SiteNumbers(None, 0 * one, between * one),
            SiteNumbers(x, mean * one, within * one, (one[..., None],)),
        ]
        solution = solve(layout, numbers)
        path.append(solution.log_evidence.sum().item())
        of_data = summed(solution.linear_moments(1, diagonal=True))
        of_groups = summed(solution.linear_moments(0, diagonal=True))
        step = of_data.r_phi[0, 0, -1].item() / of_data.count.item()
        delta = torch.tensor([[[0.0, step]]]).double()
        mean += step
        within = (shifted(of_data, delta).item() / 30) ** 0.5
        between = (of_groups.r_r.item() / 6) ** 0.5
    assert path[:3] == pytest.approx([-164.704957900, -164.427148444, -164.203185646], abs=1e-9)
    assert min(b - a for a, b in pairwise(path)) > -1e-11
    assert path[-1] == pytest.approx(-163.663529941, abs=1e-8)
    assert mean == pytest.approx(1527.5, abs=1e-4)
    assert between**2 == pytest.approx(1388.333333, rel=1e-4)
    assert within**2 == pytest.approx(2451.25, rel=1e-4)


def test_large_sites_are_added_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, numbers = random_program(7)
    right = solve(layout, numbers).log_evidence
    monkeypatch.setattr("pyro_em.posteriors.gaussians.block_factors._MANY", 1)
    close(solve(layout, numbers).log_evidence, right.numpy(), 1e-13)


def test_what_does_not_fit_is_named() -> None:
    latent = SiteForm("h", 2, 1, is_latent=True)
    with pytest.raises(ValueError, match="'x' reads elements 0 … 2 of 'h', which has 2"):
        BlockLayout.of([latent, SiteForm("x", 2, 1, False, (Term(0, torch.tensor([0, 2])),))])
    with pytest.raises(ValueError, match="latents that come before it"):
        BlockLayout.of([SiteForm("x", 2, 1, False, (Term(1, torch.tensor([0, 1])),)), latent])
    layout, _ = random_intercepts([1, 1])
    one = torch.ones(1, 1, 1)
    with pytest.raises(ValueError, match="'group' must have a value if and only if"):
        solve(layout, [SiteNumbers(one[0], one, one), SiteNumbers(None, one, one)])
    with pytest.raises(ValueError, match="only observed sites can be weighted"):
        solve(layout, [SiteNumbers(None, one, one, weight=one[0])])


def test_a_hundred_thousand_rows_in_five_thousand_groups_take_little_time() -> None:
    g = torch.Generator().manual_seed(8)
    n, groups = 100_000, 5_000
    index = torch.randint(0, groups, (n,), generator=g)
    layout = BlockLayout.of(
        [SiteForm("u", groups, 2, True), SiteForm("x", n, 1, False, (Term(0, index),))]
    )
    one = torch.ones(1, 1, 1).double()
    C = torch.randn(1, n, 1, 2, generator=g).double()
    x = torch.randn(n, 1, generator=g).double()
    numbers = [
        SiteNumbers(None, torch.zeros(1, 1, 2), torch.ones(1, 1, 2)),
        SiteNumbers(x, 0 * one, one, (C,)),
    ]
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        solve(layout, numbers)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.2
