"""What was known of a series at each step: filters, prediction errors and globs of Gaussian latents.

The oracles are a Kalman filter in numpy, that of Pyro's GaussianHMM, and sums over all discrete paths.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions.constraints import positive, simplex

from pyro_em import ExactPosteriorEM, Hard, UsageError, vectorized_markov
from pyro_em.errors import UnknownNameError

T = 6


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(torch.float32)


def series(*shape: int, seed: int = 0) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=shape)).cumsum(0)


class Kalman:
    """h_t = F h_{t-1} + N(0, Q), y_t = H h_t + N(0, R), with what is known before and after y_t."""

    def __init__(self, y, F, Q, H, R, m, P) -> None:
        self.means, self.covariances, self.errors, self.log_evidence = [], [], [], 0.0
        for t, value in enumerate(np.asarray(y)):
            if t:
                m, P = F @ m, F @ P @ F.T + Q
            seen = ~np.isnan(value)
            error = np.full(len(value), np.nan)
            if seen.any():
                own, noise = H[seen], R[np.ix_(seen, seen)]
                f, v = own @ P @ own.T + noise, (value - H @ m)[seen]
                gain = P @ own.T @ np.linalg.inv(f)
                error[seen] = v / np.sqrt(np.diag(f))
                self.log_evidence -= 0.5 * (
                    v @ np.linalg.solve(f, v) + np.log(np.linalg.det(2 * math.pi * f))
                )
                m, P = m + gain @ v, P - gain @ own @ P
            self.means.append(m)
            self.covariances.append(P)
            self.errors.append(error)


def local_level(y: Tensor, scale: float = 0.7) -> None:
    h = torch.tensor(0.0)
    for t in pyro.markov(range(len(y))):
        h = pyro.sample(f"h_{t}", dist.Normal(h, 2.0 if t == 0 else scale))
        pyro.sample(f"y_{t}", dist.Normal(h, 0.5), obs=y[t])


def test_a_local_level_is_filtered_as_by_kalman() -> None:
    y = series(12)
    y[4] = math.nan
    one = np.eye(1)
    right = Kalman(y[:, None], one, 0.49 * one, one, 0.25 * one, np.zeros(1), 4 * one)
    q = ExactPosteriorEM(local_level, missing="nan").posterior(y)
    assert q.log_evidence == pytest.approx(right.log_evidence, abs=1e-10)
    found = q.filtered("h_*")
    assert found.mean.numpy() == pytest.approx(np.ravel(right.means), abs=1e-12)
    assert found.variance.numpy() == pytest.approx(np.ravel(right.covariances), abs=1e-12)
    assert q.filtered("h_10").mean.item() == pytest.approx(right.means[10].item(), abs=1e-12)
    errors = q.prediction_errors("y_*").numpy()
    assert errors == pytest.approx(np.ravel(right.errors), abs=1e-12, nan_ok=True)
    assert np.isnan(errors[4]) and not np.isnan(errors[5])
    assert q.prediction_errors("y_10").item() == pytest.approx(errors[10], abs=1e-14)


def test_level_and_slope_of_a_trend_are_filtered_each_by_its_number() -> None:
    """The slope of a step enters the next level: data of that step tell of it, and do not count."""
    y = series(T, 2)
    y[2, 1] = math.nan

    def model() -> None:
        level = slope = torch.zeros(())
        for t in pyro.markov(range(T)):
            level = pyro.sample(f"level_{t}", dist.Normal(level + slope, 0.3 if t else 2.0))
            pyro.sample(
                f"y_{t}", dist.Normal(level * torch.tensor([1.0, -0.5]), 0.4).to_event(1), obs=y[t]
            )
            slope = pyro.sample(f"slope_{t}", dist.Normal(slope, 0.2 if t else 1.0))

    F = np.array([[1.0, 1.0], [0.0, 1.0]])
    H, start = np.array([[1.0, 0.0], [-0.5, 0.0]]), np.diag([4.0, 1.0])
    Q, R = np.diag([0.09, 0.04]), 0.16 * np.eye(2)
    right = Kalman(y, F, Q, H, R, np.zeros(2), start)
    q = ExactPosteriorEM(model, missing="nan").posterior()
    assert q.log_evidence == pytest.approx(right.log_evidence, abs=1e-10)
    for i, name in enumerate(("level_*", "slope_*")):
        found = q.filtered(name)
        assert found.mean.numpy() == pytest.approx(np.array(right.means)[:, i], abs=1e-11)
        variances = np.array(right.covariances)[:, i, i]
        assert found.variance.numpy() == pytest.approx(variances, abs=1e-11)
    errors = q.prediction_errors("y_*").numpy()
    assert errors == pytest.approx(np.array(right.errors), abs=1e-11, nan_ok=True)


def test_latents_of_a_step_that_read_each_other_are_filtered_together() -> None:
    """Three of them one after the other, of two series with gaps of their own."""
    T = 9
    y = series(T, 2)
    y[3, 0] = y[4, 1] = y[5, 1] = math.nan

    def model() -> None:
        a = b = c = torch.zeros(2)
        with pyro.plate("series", 2):
            for t in pyro.markov(range(T)):
                a = pyro.sample(f"a_{t}", dist.Normal(0.9 * a, 0.5))
                b = pyro.sample(f"b_{t}", dist.Normal(0.5 * b + a, 0.3))
                c = pyro.sample(f"c_{t}", dist.Normal(c + b, 0.2))
                pyro.sample(f"y_{t}", dist.Normal(c - 0.5 * a, 0.7), obs=y[t])

    q = ExactPosteriorEM(model, missing="nan").posterior()
    now = np.linalg.inv(np.array([[1.0, 0, 0], [-1, 1, 0], [0, -1, 1]]))
    F, G = now @ np.diag([0.9, 0.5, 1.0]), now @ np.diag([0.5, 0.3, 0.2])
    H, R = np.array([[-0.5, 0.0, 1.0]]), 0.49 * np.eye(1)
    for b in range(2):
        right = Kalman(y[:, b, None], F, G @ G.T, H, R, np.zeros(3), G @ G.T)
        for i, name in enumerate(("a_*", "b_*", "c_*")):
            found = q.filtered(name)
            means = np.array(right.means)[:, i]
            assert found.mean[:, b].numpy() == pytest.approx(means, abs=1e-11)
            variances = np.array(right.covariances)[:, i, i]
            assert found.variance[:, b].numpy() == pytest.approx(variances, abs=1e-11)
        errors = q.prediction_errors("y_*")[:, b].numpy()
        assert errors == pytest.approx(np.ravel(right.errors), abs=1e-11, nan_ok=True)


def test_vectors_in_a_plate_are_filtered_as_by_pyro() -> None:
    """Several series, one shorter than the other, with correlated noises."""
    B, D = 2, 2
    g = np.random.default_rng(1)
    A = torch.tensor(0.4 * g.normal(size=(D, D)))
    L, M = (torch.tensor(np.tril(g.normal(size=(D, D))) + 2 * np.eye(D)) for _ in range(2))
    W = torch.tensor(g.normal(size=(D, D)))
    y = series(T, B, D)
    there = torch.arange(T)[:, None] < torch.tensor([T, 4])

    def model() -> None:
        h = torch.zeros(D)
        with pyro.plate("series", B):
            for t in pyro.markov(range(T)):
                h = pyro.sample(f"h_{t}", dist.MultivariateNormal(h @ A.T, scale_tril=L))
                noisy = dist.MultivariateNormal(h @ W.T, scale_tril=M)
                pyro.sample(f"y_{t}", noisy.mask(there[t]), obs=y[t])

    q = ExactPosteriorEM(model).posterior()
    found = q.filtered("h_*")
    assert found.batch_shape == (T, B) and found.event_shape == (D,)
    peer = dist.GaussianHMM(
        dist.MultivariateNormal(torch.zeros(D), torch.eye(D) * 1e-30),
        A.T,
        dist.MultivariateNormal(torch.zeros(D), scale_tril=L),
        W.T,
        dist.MultivariateNormal(torch.zeros(D), scale_tril=M),
        duration=None,
    )
    for b, length in enumerate((T, 4)):
        for t in range(length):
            right = peer.filter(y[: t + 1, b])
            assert (found.mean[t, b] - right.loc).abs().max() < 1e-9
            assert (found.covariance_matrix[t, b] - right.covariance_matrix).abs().max() < 1e-9
    assert torch.allclose(found.mean[4, 1], A @ found.mean[3, 1], atol=1e-12)
    smoothed = q.marginal("h_*")
    assert torch.equal(smoothed.mean, q.mean("h_*"))
    assert torch.allclose(smoothed.covariance_matrix, q.covariance("h_*"), atol=1e-12)
    between = q.covariance("h_*", lag=1)
    assert between.shape == (T - 1, B, D, D)
    pairs = [q.covariance(f"h_{t}", f"h_{t + 1}") for t in range(T - 1)]
    assert torch.equal(between, torch.stack(pairs))
    assert torch.equal(q.covariance("h_*", lag=0), q.covariance("h_*"))
    assert torch.equal(q.covariance("h_*", "h_0")[2], q.covariance("h_2", "h_0"))
    assert q.prediction_errors("y_*").shape == (T, B, D)
    assert q.prediction_errors("y_*")[4:, 1].isnan().all()
    assert q.sample(3)["h_*"].shape == (T, 3, B, D)


def test_rows_of_a_plate_come_at_the_latest_step_that_they_read() -> None:
    y, x = series(8), series(8, seed=3)
    at = torch.tensor([0, 2, 1, 3, 3, 0, 2, 1])

    def model() -> None:
        h, steps = torch.tensor(0.0), []
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        for t in pyro.markov(range(4)):
            h = pyro.sample(f"h_{t}", dist.Normal(h, 1.0))
            steps.append(h)
        with pyro.plate("rows", 8):
            mean = torch.stack(steps, -1)[..., at] + slope * x
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    q = ExactPosteriorEM(model).posterior()
    found, errors = q.filtered("h_*"), q.prediction_errors("y")
    C = torch.zeros(4, 4).tril(0) + torch.ones(4, 4).tril()
    design = torch.cat([C[at], x[:, None]], 1)  # of the noises and the slope
    for t in range(4):
        rows = at <= t
        precision = torch.eye(5) + design[rows].T @ design[rows] / 0.25
        mean = torch.linalg.solve(precision, design[rows].T @ y[rows] / 0.25)
        h = torch.cat([C[t], torch.zeros(1)])
        assert found.mean[t] == pytest.approx(float(h @ mean), abs=1e-11)
        assert found.variance[t] == pytest.approx(float(h @ precision.inverse() @ h), abs=1e-11)
        past = at < t
        precision = torch.eye(5) + design[past].T @ design[past] / 0.25
        mean = torch.linalg.solve(precision, design[past].T @ y[past] / 0.25)
        for r in (at == t).nonzero().flatten().tolist():
            spread = float(design[r] @ precision.inverse() @ design[r] + 0.25) ** 0.5
            right = (y[r] - design[r] @ mean) / spread
            assert errors[r] == pytest.approx(float(right), abs=1e-11)


def test_a_class_of_each_series_is_learned_as_data_come() -> None:
    """A mixture of two local levels: its weights are those given the data so far."""
    y = series(4, 3)
    scales = torch.tensor([0.2, 1.5])

    def model() -> None:
        with pyro.plate("series", 3):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.6, 0.4])))
            h = torch.zeros(3)
            for t in pyro.markov(range(4)):
                h = pyro.sample(f"h_{t}", dist.Normal(h, scales[z]))
                pyro.sample(f"y_{t}", dist.Normal(h, 0.5), obs=y[t])

    q = ExactPosteriorEM(model).posterior()
    found, errors = q.filtered("h_*"), q.prediction_errors("y_*")
    for b in range(3):
        one = np.eye(1)
        for t in range(4):
            runs, before = (
                [
                    Kalman(x, one, s**2 * one, one, 0.25 * one, np.zeros(1), s**2 * one)
                    for s in scales.tolist()
                ]
                for x in (y[: t + 1, b, None], y[:t, b, None])
            )
            w = np.array([0.6, 0.4]) * np.exp([r.log_evidence for r in runs])
            w /= w.sum()
            means = np.array([r.means[t].item() for r in runs])
            spread = np.array([r.covariances[t].item() for r in runs])
            mean = w @ means
            assert found.mean[t, b].item() == pytest.approx(mean, abs=1e-11)
            assert found.variance[t, b].item() == pytest.approx(
                w @ (spread + (means - mean) ** 2), abs=1e-11
            )
            w = np.array([0.6, 0.4]) * np.exp([r.log_evidence for r in before])
            w /= w.sum()
            m = np.array([r.means[t - 1].item() if t else 0.0 for r in before])
            P = np.array([r.covariances[t - 1].item() if t else 0.0 for r in before])
            F = P + scales.numpy() ** 2 + 0.25
            sd = math.sqrt(w @ (F + (m - w @ m) ** 2))
            assert errors[t, b].item() == pytest.approx((float(y[t, b]) - w @ m) / sd, abs=1e-11)


def paths(log_p, K: int, length: int) -> tuple[np.ndarray, float]:
    """Probabilities of the last state, summed over all paths of a log joint."""
    table = np.zeros(K)
    for path in itertools.product(range(K), repeat=length):
        table[path[-1]] += math.exp(log_p(path))
    return table / table.sum(), math.log(table.sum())


def hmm(y: Tensor, order: int = 1, apart: bool = False) -> None:
    """A chain of some order; its data along with it, or apart from it and numbered from one."""
    A = torch.tensor([[[0.9, 0.1], [0.3, 0.7]], [[0.5, 0.5], [0.2, 0.8]]])
    locs = torch.tensor([-1.0, 1.0])
    with pyro.plate("series", y.shape[1]):
        z = before = torch.tensor(0)
        all_z = []
        steps = range(len(y))
        for t in steps if apart else pyro.markov(steps, history=order):
            before, z = (
                z,
                pyro.sample(f"z_{t}", dist.Categorical(A[before if order == 2 else 0, z])),
            )
            all_z.append(z)
            if not apart:
                pyro.sample(f"y_{t}", dist.Normal(locs[z], 1.0), obs=y[t])
        for t, z in enumerate(all_z if apart else []):
            pyro.sample(f"y_{t + 1}", dist.Normal(locs[z], 1.0), obs=y[t])


@pytest.mark.parametrize(("order", "apart"), [(1, False), (1, True), (2, False)])
def test_states_are_filtered_as_by_a_sum_over_paths(order: int, apart: bool) -> None:
    y = series(4, 2)
    y[2, 0] = math.nan
    em = ExactPosteriorEM(hmm, missing="nan")
    q = em.posterior(y, order, apart)
    found, errors = q.filtered("z_*"), q.prediction_errors("y_*")
    assert found.shape == (4, 2, 2) and errors.shape == (4, 2)
    locs = np.array([-1.0, 1.0])
    A = np.array([[[0.9, 0.1], [0.3, 0.7]], [[0.5, 0.5], [0.2, 0.8]]])
    for b, t in itertools.product(range(2), range(4)):

        def log_p(path, b=b, seen=4) -> float:
            total, z, before = 0.0, 0, 0
            for s, k in enumerate(path):
                total += math.log(A[before if order == 2 else 0, z, k])
                value = float(y[s, b])
                if not math.isnan(value) and s < seen:
                    total -= 0.5 * (value - locs[k]) ** 2
                before, z = z, k
            return total

        assert found[t, b].numpy() == pytest.approx(paths(log_p, 2, t + 1)[0], abs=1e-12)
        known = paths(lambda path, b=b, t=t: log_p(path, b, seen=t), 2, t + 1)[0]
        mean = known @ locs
        error = (float(y[t, b]) - mean) / math.sqrt(1 + known @ (locs - mean) ** 2)
        assert errors[t, b].item() == pytest.approx(error, abs=1e-12, nan_ok=True)
    assert torch.equal(em.posterior(y, order, apart).filtered("z_2"), found[2])


def test_errors_of_counts_are_those_of_mixtures_at_the_fitted_parameters() -> None:
    counts = torch.tensor([0.0, 1.0, 7.0, 9.0, 8.0, 1.0])

    def model(x: Tensor, letters: bool = False) -> None:
        A = pyro.param("A", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=simplex)
        rate = pyro.param("rate", torch.tensor([1.0, 6.0]), constraint=positive)
        z = torch.tensor(0)
        for t in vectorized_markov("time", len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            emitted = dist.Categorical(A[z]) if letters else dist.Poisson(rate[z])
            pyro.sample(f"x_{t}", emitted, obs=x[t])

    q = (result := ExactPosteriorEM(model).fit(counts, max_steps=3, tol=0)).posterior
    A, rate = result.params["A"], result.params["rate"]
    known = torch.cat([A[:1], q.filtered("z_*")[:-1] @ A])
    mean = known @ rate
    spread = (known * (rate + (rate - mean.unsqueeze(-1)) ** 2)).sum(-1).sqrt()
    torch.testing.assert_close(q.prediction_errors("x_*"), (counts - mean) / spread)
    with pytest.raises(UsageError, match="Categorical has no mean and variance"):
        ExactPosteriorEM(model).posterior(counts.clamp(max=1), True).prediction_errors("x_*")


def test_observed_states_count_from_their_step_on() -> None:
    """Labels of some steps with ``obs_mask``: a label tells nothing of earlier filtered states."""
    x, label = series(4), torch.tensor([0, 1, 1, 0])
    given = torch.tensor([False, False, True, False])
    A, locs = torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([-1.0, 1.0])

    def model(n: int = 4) -> None:
        z = torch.tensor(0)
        for t in pyro.markov(range(n)):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]), obs=label[t], obs_mask=given[t])
            pyro.sample(f"x_{t}", dist.Normal(locs[z], 1.0), obs=x[t])

    em = ExactPosteriorEM(model)
    found = em.posterior().filtered("z_*")
    assert found[2].tolist() == [0.0, 1.0]
    for t in (0, 1, 3):
        right = em.posterior(t + 1).probs(f"z_{t}")
        assert torch.allclose(found[t], right, atol=1e-12)


def test_regimes_and_levels_of_a_switching_series() -> None:
    y, scales = series(3), torch.tensor([0.1, 2.0])
    A = torch.tensor([[0.8, 0.2], [0.4, 0.6]])

    def model() -> None:
        z, h = torch.tensor(0), torch.tensor(0.0)
        for t in pyro.markov(range(3), history=3):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            h = pyro.sample(f"h_{t}", dist.Normal(h, scales[z]))
            pyro.sample(f"y_{t}", dist.Normal(h, 0.5), obs=y[t])

    q = ExactPosteriorEM(model).posterior()
    states = q.filtered("z_*")
    for t in range(3):

        def log_p(path) -> float:
            total, m, P, z = 0.0, 0.0, 0.0, 0
            for s, k in enumerate(path):
                total += math.log(A[z, k])
                P, z = P + float(scales[k]) ** 2, k
                F, v = P + 0.25, float(y[s]) - m
                total -= 0.5 * (v * v / F + math.log(2 * math.pi * F))
                m, P = m + P / F * v, P - P * P / F
            return total

        assert states[t].numpy() == pytest.approx(paths(log_p, 2, t + 1)[0], abs=1e-11)
    assert q.filtered("h_*").mean[2].item() == pytest.approx(q.mean("h_2").item(), abs=1e-12)


def test_globs_are_in_order_of_time_and_refuse_gaps() -> None:
    y = series(12)
    q = ExactPosteriorEM(local_level).posterior(y)
    found = q.marginal("h_*")
    assert found.mean.tolist() == [q.mean(f"h_{t}").item() for t in range(12)]
    assert q.filtered("h_1?").mean.tolist() == q.filtered("h_*").mean[10:].tolist()
    with pytest.raises(UsageError, match="no two of them lie so far apart"):
        q.covariance("h_*", lag=12)
    with pytest.raises(UsageError, match="between the steps of one series"):
        q.covariance("h_0", lag=1)
    with pytest.raises(UnknownNameError):
        q.filtered("g_*")
    with pytest.raises(UnknownNameError):
        q.prediction_errors("g_*")


def test_what_is_filtered_must_be_the_posterior_of_data() -> None:
    y = series(4, 2)
    with pytest.raises(UsageError, match="not the posterior of the data"):
        ExactPosteriorEM(hmm, strategy=Hard()).posterior(y).filtered("z_*")


def test_latents_after_the_last_datum_are_predicted() -> None:
    y = series(3)

    def model() -> None:
        h = torch.tensor(0.0)
        for t in pyro.markov(range(5)):
            h = pyro.sample(f"h_{t}", dist.Normal(0.5 * h, 1.0))
            if t < 3:
                pyro.sample(f"y_{t}", dist.Normal(h, 0.5), obs=y[t])

    q = ExactPosteriorEM(model).posterior()
    found = q.filtered("h_*")
    last = found.mean[2].item()
    assert found.mean[3:].tolist() == pytest.approx([0.5 * last, 0.25 * last], abs=1e-12)
    assert found.variance[3].item() == pytest.approx(0.25 * found.variance[2].item() + 1, abs=1e-12)


def coupled(y: Tensor) -> None:
    """Data that read two states, and the datum before."""
    z = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        before, z = (
            z,
            pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.9, 0.1], [0.2, 0.8]])[z])),
        )
        last = y[t - 1] if t else 0.0
        mean = torch.tensor([0.0, 2.0])[z] + torch.tensor([0.5, -0.5])[before] * last
        pyro.sample(f"y_{t}", dist.Normal(mean, 1.0), obs=y[t])


def factorial(y: Tensor) -> None:
    """Two chains of states below one series."""
    A, z, w = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor(0), torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        w = pyro.sample(f"w_{t}", dist.Categorical(A[w]))
        pyro.sample(f"y_{t}", dist.Normal(2.0 * z - w, 1.0), obs=y[t])


def autoregression(y: Tensor) -> None:
    """A latent that reads two steps back, and a constant that all data read."""
    past = [torch.tensor(0.0), torch.tensor(0.0)]
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    for t in pyro.markov(range(len(y)), history=2):
        past.append(pyro.sample(f"h_{t}", dist.Normal(0.5 * past[-1] - 0.3 * past[-2], 1.0)))
        pyro.sample(f"y_{t}", dist.Normal(past[-1] + b, 0.5), obs=y[t])


@pytest.mark.parametrize(
    ("model", "names"), [(coupled, "z"), (factorial, "zw"), (autoregression, "h")]
)
def test_what_is_filtered_is_the_posterior_of_a_shorter_series(model, names: str) -> None:
    y = series(4)
    em = ExactPosteriorEM(model)
    q = em.posterior(y)
    for name in names:
        found = q.filtered(f"{name}_*")
        for t in range(4):
            right = em.posterior(y[: t + 1])
            if isinstance(found, Tensor):
                assert torch.allclose(found[t], right.probs(f"{name}_{t}"), atol=1e-12)
            else:
                assert torch.allclose(found.mean[t], right.mean(f"{name}_{t}"), atol=1e-12)
                spread = right.covariance(f"{name}_{t}")
                assert torch.allclose(found.variance[t], spread, atol=1e-12)
