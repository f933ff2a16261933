"""Networks in models/: against the joint table cell by cell, closed forms and scikit-learn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch

from models import bayesian_network, chain_network, logistic_conditional, relay_race
from pyro_em import DataError, ExactPosteriorEM
from tests.mains import run_main


def bernoulli(p: float, value: int) -> float:
    return p if value else 1 - p


@pytest.fixture
def run(monkeypatch, tmp_path: Path, capsys) -> Callable[..., str]:
    """Run a model's main and return what it printed; its figure must be there."""

    def call(module, *arguments: str) -> str:
        return run_main(module, monkeypatch, capsys, tmp_path, *arguments)

    return call


# ---------------------------------------------------------------- bayesian_network


def network_cells(params: dict[str, float | list[float]], row: np.ndarray) -> dict[tuple, float]:
    """p(z, x) of every completion of a row."""
    out = {}
    for z, *x in itertools.product((0, 1), repeat=6):
        if any(not math.isnan(v) and v != own for v, own in zip(row, x, strict=True)):
            continue
        p = bernoulli(params["p(z)"], z)
        for i in range(4):
            p *= bernoulli(params[f"p(x{i + 1})"][z], x[i])
        out[(z, *x)] = p * bernoulli(params["p(x5)"][x[3]], x[4])
    return out


def test_bayesian_network_is_the_sum_over_what_is_missing() -> None:
    x, _ = bayesian_network.load_data(60, missing=0.4)
    x[0] = torch.nan  # a row that says nothing
    em = ExactPosteriorEM(bayesian_network.model)
    result = em.fit(x, init=bayesian_network.initialize(x), max_steps=4, tol=0)
    params = {name: value.tolist() for name, value in result.params.items()}
    cells = [network_cells(params, row) for row in x.numpy()]
    evidence = sum(math.log(sum(c.values())) for c in cells)
    assert result.log_evidence == pytest.approx(evidence, abs=1e-9)
    imputed = bayesian_network.imputations(result, x)
    for n, c in enumerate(cells):
        total = sum(c.values())
        for i in range(5):
            share = sum(p for key, p in c.items() if key[i + 1] == 1) / total
            assert float(imputed[n, i]) == pytest.approx(share, abs=1e-10)
    # One more step by hand: expected counts over expected counts.
    em.step(x)
    joint = [{key: p / sum(c.values()) for key, p in c.items()} for c in cells]
    for a in (0, 1):
        parent = sum(p for c in joint for key, p in c.items() if key[4] == a)
        both = sum(p for c in joint for key, p in c.items() if key[4] == a and key[5] == 1)
        assert float(pyro.param("p(x5)").detach()[a]) == pytest.approx(both / parent, abs=1e-10)


def test_bayesian_network_without_holes_is_counting() -> None:
    """p(x5 | x4) has nothing hidden when no entry is missing."""
    x, complete = bayesian_network.load_data(300, missing=0.0)
    assert torch.equal(x, complete)
    result = ExactPosteriorEM(bayesian_network.model).fit(x, init=bayesian_network.initialize(x))
    for a in (0, 1):
        expected = complete[complete[:, 3] == a, 4].mean()
        assert float(result.params["p(x5)"][a]) == pytest.approx(float(expected), abs=1e-10)


def test_bayesian_network_reads_independence_off_the_graph() -> None:
    """What the graph separates is independent in the joint table, and the rest is not."""
    x, _ = bayesian_network.load_data(20)
    graph = ExactPosteriorEM(bayesian_network.model).plan(x).graph
    assert graph.markov_blanket("z") == {"x1", "x2", "x3", "x4"}
    assert graph.markov_blanket("x4") == {"z", "x5"}
    truth = {f"p({node})": t.tolist() for node, t in bayesian_network.TRUTH.items()}
    table = np.zeros((2,) * 6)
    for key, p in network_cells(truth, np.full(5, math.nan)).items():
        table[key] = p
    nodes = list(bayesian_network.PARENTS)
    for a, b in itertools.combinations(range(6), 2):
        others = [i for i in range(6) if i not in (a, b)]
        for given in [(), *((i,) for i in others)]:
            joint = table.sum(tuple(i for i in others if i not in given), keepdims=True)
            left, right = joint.sum(b, keepdims=True), joint.sum(a, keepdims=True)
            gap = np.abs(joint * joint.sum((a, b), keepdims=True) - left * right).max()
            names = [nodes[i] for i in given]
            assert graph.is_separated(nodes[a], nodes[b], names) == (gap < 1e-12)


def test_bayesian_network_runs(run) -> None:
    said = run(bayesian_network, "-N", "300")
    assert "z: x1, x2, x3, x4" in said
    assert "x1 and x2: dependent" in said
    assert "x1 and x2 given z: independent" in said


# ---------------------------------------------------------------- relay_race


def race_table(T: float, tables: dict[str, np.ndarray]) -> np.ndarray:
    """p(R1..R4, H1..H3, P1..P4, T) on all 165,888 cells, axes in that order."""
    skill, fumble = tables["skill"], tables["fumble"]
    handoff = np.stack([1 - fumble, fumble], -1)
    seconds = np.array([10.0, 11.0, 12.0, 13.0])
    total = sum(np.meshgrid(*[seconds] * 4, indexing="ij"))
    density = np.exp(-0.5 * ((T - total) / 0.2) ** 2) / (0.2 * math.sqrt(2 * math.pi))
    return np.einsum(
        "a,b,c,d,abe,bcf,cdg,ah,bei,cfj,dgk,hijk->abcdefghijk",
        skill, skill, skill, skill, handoff, handoff, handoff,
        tables["first"], tables["later"], tables["later"], tables["later"], density,
    )  # fmt: skip


@pytest.mark.parametrize("T", [43.0, 47.9])
def test_relay_race_against_the_joint_table(T: float) -> None:
    tables = relay_race.load_data()
    for table in (tables["skill"], tables["first"], tables["later"]):
        torch.testing.assert_close(table.sum(-1), torch.ones_like(table.sum(-1)))
    joint = race_table(T, {name: t.numpy() for name, t in tables.items()})
    assert joint.size == 165_888
    em = ExactPosteriorEM(relay_race.model)
    posterior = em.posterior(torch.tensor([T]), tables)
    assert posterior.log_evidence == pytest.approx(math.log(joint.sum()), abs=1e-10)
    joint /= joint.sum()
    sites = [f"R{i}" for i in range(1, 5)] + [f"H{i}" for i in range(1, 4)]
    sites += [f"P{i}" for i in range(1, 5)]
    for axis, site in enumerate(sites):
        expected = joint.sum(tuple(i for i in range(11) if i != axis))
        np.testing.assert_allclose(posterior.probs(site)[0].numpy(), expected, atol=1e-12)
    mode = posterior.mode()
    best = joint[tuple(int(mode[site]) for site in sites)]
    assert best == pytest.approx(joint.max(), rel=1e-9)
    plan = em.plan(torch.tensor([T]), tables)
    assert plan.cells < joint.size / 100


def test_relay_race_explains_away() -> None:
    """Told of the fumble, runner 2 is blamed less for leg 2; against the table."""
    tables = relay_race.load_data()
    joint = race_table(48.0, {name: t.numpy() for name, t in tables.items()})
    T, slow = torch.tensor([48.0]), []
    slices = [joint, joint[..., 3, :, :], joint[:, :, :, :, 1][..., 3, :, :]]
    for table, known in zip(slices, relay_race.QUERIES.values(), strict=True):
        probability = relay_race.skills(T, tables, known)[0]
        for i in range(4):
            expected = table.sum(tuple(a for a in range(table.ndim) if a != i))
            expected /= expected.sum()
            np.testing.assert_allclose(probability[i].numpy(), expected, atol=1e-12)
        slow.append(float(probability[1, 0]))
    assert slow[1] > slow[2] > slow[0]


def test_relay_race_runs(run) -> None:
    said = run(relay_race)
    assert "11 hidden nodes has 165,888 cells" in said
    assert "Given H1, H2, P2, R1, R3, runner 2 depends on nothing" in said


# ---------------------------------------------------------------- logistic_conditional


@pytest.mark.parametrize("inputs", ["factorised", "chain"])
def test_logistic_conditional_is_the_sum_over_missing_inputs(inputs: str) -> None:
    x, _, y = logistic_conditional.load_data(40)
    x[0, 1:4] = torch.nan  # holes in any column
    em = ExactPosteriorEM(logistic_conditional.model)
    result = em.fit(x, y, "logistic", inputs, max_steps=2, tol=0)
    w = result.params["w"].tolist()
    evidence, imputed = 0.0, []
    for row, label in zip(x.tolist(), y.tolist(), strict=True):
        total, ones = 0.0, 0.0
        for cell in itertools.product((0, 1), repeat=5):
            if any(not math.isnan(v) and v != own for v, own in zip(row, cell, strict=True)):
                continue
            p = 1.0
            for i in range(5):
                table = result.params[f"p{i + 1}"]
                own = table[cell[i - 1]] if inputs == "chain" and i else table
                p *= bernoulli(float(own), cell[i])
            score = w[0] + sum(a * b for a, b in zip(w[1:], cell, strict=True))
            p *= bernoulli(1 / (1 + math.exp(-score)), int(label))
            total += p
            ones += p * cell[0]
        evidence += math.log(total)
        imputed.append(ones / total)
    assert result.log_evidence == pytest.approx(evidence, abs=1e-9)
    np.testing.assert_allclose(result.posterior.probs("x1")[:, 1].numpy(), imputed, atol=1e-10)


def test_logistic_conditional_is_logistic_regression_when_nothing_is_missing() -> None:
    from sklearn.linear_model import LogisticRegression

    _, complete, y = logistic_conditional.load_data(400, seed=3)
    result = logistic_conditional.fit(complete, y, tol=1e-10)
    peer = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000)
    peer.fit(complete.numpy(), y.numpy())
    expected = [*peer.intercept_, *peer.coef_[0]]
    np.testing.assert_allclose(result.params["w"].numpy(), expected, atol=1e-4)
    # Wald standard errors: the inverse of Xᵀ diag(p (1 − p)) X.
    X = np.column_stack([np.ones(len(y)), complete.numpy()])
    p = peer.predict_proba(complete.numpy())[:, 1]
    wald = np.sqrt(np.diag(np.linalg.inv(X.T @ (X * (p * (1 - p))[:, None]))))
    np.testing.assert_allclose(result.standard_errors()["w"].numpy(), wald, rtol=1e-3)


def test_logistic_conditional_table_is_counting_when_nothing_is_missing() -> None:
    _, complete, y = logistic_conditional.load_data(400)
    result = logistic_conditional.fit(complete, y, "table", "factorised")
    assert result.num_free_parameters == len(complete.unique(dim=0)) + 5 == 31 + 5
    for cell in ((0, 0, 0, 0, 0), (1, 1, 1, 1, 1)):
        own = (complete == torch.tensor(cell)).all(-1)
        assert float(result.params["table"][cell]) == pytest.approx(float(y[own].mean()))


def test_logistic_conditional_runs(run) -> None:
    said = run(logistic_conditional, "-N", "150")
    rows = [line.split() for line in said.splitlines()]
    numbers = {
        tuple(r[:2]): int(r[2]) for r in rows if len(r) == 5 and r[0] in ("table", "logistic")
    }
    x, _, _ = logistic_conditional.load_data(150)
    cells = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 5)
    fits = ((x.unsqueeze(1) == cells) | x.unsqueeze(1).isnan()).all(-1).any(0)
    read = int(fits.sum())  # cells of the table that no row can be in say nothing
    assert 25 < read < 32
    assert numbers == {
        ("table", "factorised"): read + 5,
        ("table", "chain"): read + 9,
        ("logistic", "factorised"): 6 + 5,
        ("logistic", "chain"): 6 + 9,
    }
    for kind, number in numbers.items():
        unread = 32 - read if kind[0] == "table" else 0
        assert logistic_conditional.count(*kind) == number + unread


def test_dropping_rows_biases_the_weight_of_x5() -> None:
    """What the model file says: whole rows miss w5, EM does not."""
    x, complete, y = logistic_conditional.load_data()
    whole = ~torch.isnan(x).any(-1)
    fits = [logistic_conditional.fit(*d) for d in ((complete, y), (x, y), (x[whole], y[whole]))]
    full, em, dropped = (float(f.params["w"][5]) for f in fits)
    error = float(fits[0].standard_errors()["w"][5])
    assert abs(em - full) < error
    assert full - dropped > 3 * error


# ---------------------------------------------------------------- chain_network


def transitions(x: torch.Tensor, m: int) -> np.ndarray:
    counts = np.zeros((3, 3))
    np.add.at(counts, (x[:, m - 2].numpy(), x[:, m - 1].numpy()), 1)
    return counts


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("shared", [False, True])
def test_chain_network_is_the_mode_by_hand(shared: bool, alpha: float) -> None:
    x = chain_network.load_data(40)
    em, result = chain_network.fit(x, shared, alpha)
    first = np.bincount(x[:, 0].numpy(), minlength=3) + alpha - 1
    np.testing.assert_allclose(result.params["mu"].numpy(), first / first.sum(), atol=1e-12)
    counts = {f"A{m}": transitions(x, m) for m in range(2, 7)}
    if shared:
        counts = {"A": sum(counts.values())}
    evidence = float((np.log(result.params["mu"].numpy()) * (first - alpha + 1)).sum())
    for name, n in counts.items():
        mode = (n + alpha - 1) / (n + alpha - 1).sum(-1, keepdims=True)
        np.testing.assert_allclose(result.params[name].numpy(), mode, atol=1e-12)
        evidence += float((n * np.log(mode)).sum())
    assert result.log_evidence == pytest.approx(evidence, abs=1e-9)
    number = 2 + (1 if shared else 5) * 6  # K − 1 + K (K − 1), or (M − 1) times the last
    assert result.num_free_parameters == number == chain_network.count(shared)
    assert em.plan(x, shared, alpha).updates["AutoDelta.mu"].reason.endswith("Dirichlet")


def test_chain_network_draws_ancestrally() -> None:
    """Shares of states in many draws are μ Aᵐ, and transitions have the rows of A."""
    x = chain_network.load_data(20_000)
    p, A = chain_network.TRUTH["mu"].numpy(), chain_network.TRUTH["A"].numpy()
    for m in range(6):
        np.testing.assert_allclose(np.bincount(x[:, m]) / len(x), p, atol=0.015)
        p = p @ A
    n = sum(transitions(x, m) for m in range(2, 7))
    np.testing.assert_allclose(n / n.sum(-1, keepdims=True), A, atol=0.01)
    assert torch.equal(x, chain_network.load_data(20_000))


def test_without_a_prior_new_data_can_be_impossible() -> None:
    em, result = chain_network.fit(chain_network.load_data(40), False, 1.0)
    assert min(float(result.params[f"A{m}"].min()) for m in range(2, 7)) == 0
    with pytest.raises(DataError, match="impossible"):
        em.posterior(chain_network.load_data(1000, seed=1), False, 1.0)


def test_chain_network_runs(run) -> None:
    said = run(chain_network)
    assert "By formula: 32 per node, 8 shared, 728 for the joint." in said
    assert "impossible" in said
    shared, own = (float(v.split()[0]) for v in said.split("error: ")[1].split(", ")[:2])
    assert shared < own
