"""A glob of latents is answered as its names are, one after the other, and as hmmlearn does."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_em import DrawnPosterior, ExactPosteriorEM, UsageError, vectorized_markov
from tests.posteriors.test_joints import brute_joint

A = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]], dtype=torch.float64)
PI = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MU = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
T = 12  # so that the order of names is not the order of time
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(T, generator=GENERATOR, dtype=torch.float64) + 0.5
XS = torch.randn(4, T, generator=GENERATOR, dtype=torch.float64) + 0.5


def chain(x: Tensor) -> None:
    p = PI
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(p))
        pyro.sample(f"x_{t}", dist.Normal(MU[z], 0.8), obs=x[t])
        p = A[z]


def many(x: Tensor, dim: int = -1) -> None:
    """Chains in a plate, whose length is masked from the second on."""
    lengths = torch.tensor([T, T - 1, 5, 2]).reshape(-1, *(1,) * (-dim - 1))
    x = x.reshape(4, *(1,) * (-dim - 1), T)
    with pyro.plate("sequences", 4, dim=dim):
        p = PI
        for t in pyro.markov(range(x.shape[-1])):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(p))
                pyro.sample(f"x_{t}", dist.Normal(MU[z], 0.8), obs=x[..., t])
                p = A[z]


def backwards(x: Tensor) -> None:
    """Names that count down while the model goes on."""
    p = PI
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{len(x) - 1 - t}", dist.Categorical(p))
        pyro.sample(f"x_{t}", dist.Normal(MU[z], 0.8), obs=x[t])
        p = A[z]


def second_order(x: Tensor) -> None:
    z: list[Tensor] = []
    for t in pyro.markov(range(len(x)), history=2):
        p = PI if t == 0 else A[z[-1]] if t == 1 else 0.5 * A[z[-1]] + 0.5 * A[z[-2]]
        z.append(pyro.sample(f"z_{t}", dist.Categorical(p)))
        pyro.sample(f"x_{t}", dist.Normal(MU[z[-1]], 0.8), obs=x[t])


def weighted(x: Tensor) -> None:
    with poutine.scale(scale=2.5):
        chain(x)


def seen_in_part(x: Tensor) -> None:
    p = PI
    for t in pyro.markov(range(len(x))):
        seen = torch.tensor(t in (3, 10))
        z = pyro.sample(f"z_{t}", dist.Categorical(p), obs=torch.tensor(1), obs_mask=seen)
        pyro.sample(f"x_{t}", dist.Normal(MU[z], 0.8), obs=x[t])
        p = A[z]


def apart(x: Tensor) -> None:
    for t in range(3):
        z = pyro.sample(f"z_{t}", dist.Categorical(PI))
        pyro.sample(f"x_{t}", dist.Normal(MU[z], 0.8), obs=x[t])


MODELS = {
    "chain": (chain, (X,)),
    "plate": (many, (XS,)),
    "plate at dim -2": (many, (XS, -2)),
    "backwards": (backwards, (X,)),
    "second order": (second_order, (X,)),
    "weighted": (weighted, (X,)),
    "observed in part": (seen_in_part, (X,)),
    "no chain": (apart, (X,)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_glob_is_its_names_in_order_of_time(name: str) -> None:
    model, args = MODELS[name]
    q = ExactPosteriorEM(model).posterior(*args)
    steps = [f"z_{t}" for t in range(3 if model is apart else T)]
    each = torch.stack([q.probs(n) for n in steps])
    torch.testing.assert_close(q.probs("z_*"), each, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(q.stacked(steps[::-1]), each.flip(0), rtol=1e-12, atol=1e-14)
    pairs = torch.stack([q.joint(a, b) for a, b in itertools.pairwise(steps)])
    torch.testing.assert_close(q.joint("z_*"), pairs, rtol=1e-12, atol=1e-14)
    if name != "plate at dim -2":  # there the joint leaves out dimensions of size one
        torch.testing.assert_close(pairs.sum(-1), each[:-1])
    mode, draws = q.mode(), q.sample(5, seed=1)
    assert torch.equal(mode["z_*"], torch.stack([mode[n] for n in steps]))
    assert torch.equal(q.assignments("z_*"), each.argmax(-1))
    assert torch.equal(draws["z_*"], torch.stack([draws[n] for n in steps]))
    assert mode["z_*"].shape == each.shape[:-1]
    assert draws["z_*"].shape == (len(steps), 5, *each.shape[1:-1])


def test_probs_of_a_plate_keep_its_place() -> None:
    assert ExactPosteriorEM(many).posterior(XS, -2).probs("z_*").shape == (T, 4, 1, 3)
    assert ExactPosteriorEM(many).posterior(XS, -2).joint("z_*").shape == (T - 1, 4, 3, 3)


def test_marginals_and_path_are_those_of_hmmlearn() -> None:
    hmm = pytest.importorskip("hmmlearn.hmm")
    peer = hmm.GaussianHMM(3, "spherical")
    peer.startprob_, peer.transmat_ = PI.numpy(), A.numpy()
    peer.means_, peer.covars_ = MU.numpy()[:, None], np.full(3, 0.64)
    q = ExactPosteriorEM(chain).posterior(X)
    x = X.numpy()[:, None]
    np.testing.assert_allclose(q.probs("z_*"), peer.predict_proba(x), rtol=0, atol=1e-10)
    np.testing.assert_array_equal(q.mode()["z_*"], peer.predict(x))
    np.testing.assert_array_equal(q.assignments("z_*"), peer.decode(x, algorithm="map")[1])
    with pytest.raises(UsageError, match="they are one series, or one row"):
        _ = q.evidence_per_row


def test_the_evidence_of_each_sequence_is_that_of_hmmlearn() -> None:
    hmm = pytest.importorskip("hmmlearn.hmm")
    peer = hmm.GaussianHMM(3, "spherical")
    peer.startprob_, peer.transmat_ = PI.numpy(), A.numpy()
    peer.means_, peer.covars_ = MU.numpy()[:, None], np.full(3, 0.64)
    q = ExactPosteriorEM(many).posterior(XS)
    scores = [peer.score(x[:n, None].numpy()) for x, n in zip(XS, (T, T - 1, 5, 2), strict=True)]
    np.testing.assert_allclose(q.evidence_per_row, scores, rtol=1e-10)
    assert float(q.evidence_per_row.sum()) == pytest.approx(q.log_evidence)


def test_assignments_differ_from_a_mode_that_must_be_possible() -> None:
    """Each of the first two states is likely by itself; together they are impossible."""
    table = torch.tensor([[0.0, 0.35, 0.05], [0.3, 0.0, 0.0], [0.3, 0.0, 0.0]])

    def model() -> None:
        a = pyro.sample("a", dist.Categorical(table.sum(1)))
        b = pyro.sample("b", dist.Categorical(table[a] / table[a].sum()))
        pyro.sample("x", dist.Normal(0.0 * (a + b), 1.0), obs=torch.tensor(0.0))

    q = ExactPosteriorEM(model).posterior()
    assert (q.assignments("a"), q.assignments("b")) == (0, 0)
    assert (q.mode()["a"], q.mode()["b"]) == (0, 1)


def test_joint_of_neighbours_is_a_sum_over_all_paths() -> None:
    def short() -> None:
        p = PI
        for t, name in enumerate(("a", "b", "c")):
            z = pyro.sample(name, dist.Categorical(p))
            pyro.sample(f"x_{t}", dist.Normal(MU[z], 0.8), obs=X[t])
            p = A[z]

    q = ExactPosteriorEM(short).posterior()
    expected = [brute_joint(short, "a", "b"), brute_joint(short, "b", "c")]
    torch.testing.assert_close(q.joint("[abc]"), torch.stack(expected), rtol=1e-9, atol=1e-12)


def two_chains(x: Tensor) -> None:
    y = z = None
    for t in pyro.markov(range(len(x))):
        y = pyro.sample(f"y_{t}", dist.Categorical(PI if y is None else A[y]))
        z = pyro.sample(f"z_{t}", dist.Bernoulli(0.3 + 0.0 * y)).long()
        pyro.sample(f"x_{t}", dist.Normal(MU[y] + z, 0.8), obs=x[t])


def test_two_globs_are_pairs_and_one_name_goes_with_each() -> None:
    q = ExactPosteriorEM(two_chains).posterior(X[:4])
    both = torch.stack([q.joint(f"y_{t}", f"z_{t}") for t in range(4)])
    torch.testing.assert_close(q.joint("y_*", "z_*"), both)
    first = torch.stack([q.joint("y_0", f"z_{t}") for t in range(4)])
    torch.testing.assert_close(q.joint("y_0", "z_*"), first)
    torch.testing.assert_close(q.joint("z_*", "y_0"), first.mT)
    with pytest.raises(UsageError, match=r"4 and 2 latents are no pairs"):
        q.joint("y_*", "z_[01]")
    with pytest.raises(UsageError, match=r"this is one name"):
        q.joint("y_0")
    assert q.joint("y_?")[0].shape == (3, 3)


def test_a_chain_of_one_step_has_no_neighbours() -> None:
    q = ExactPosteriorEM(many).posterior(XS[:, :1].expand(4, T), -1)
    assert q.joint("z_0*").shape == (0, 4, 3, 3)
    assert q.probs("z_0*").shape == (1, 4, 3)


def test_steps_of_different_shape_are_refused_by_the_first() -> None:
    q = ExactPosteriorEM(two_chains).posterior(X[:3])
    with pytest.raises(UsageError, match=r"'z_0' has shape \(2,\), 'y_2' before it \(3,\)"):
        q.probs("[yz]_*")
    with pytest.raises(UsageError, match=r"'y_2, z_0' has shape \(3, 2\), 'y_1, y_2' before"):
        q.joint("[yz]_*")

    def ragged() -> None:
        z = pyro.sample("z_0", dist.Categorical(PI))
        with pyro.plate("n", 4):
            w = pyro.sample("z_1", dist.Categorical(A[z]))
            pyro.sample("x", dist.Normal(MU[w], 1.0), obs=X[:4])

    q = ExactPosteriorEM(ragged).posterior()
    for values in (q.mode(), q.sample(2)):
        with pytest.raises(UsageError, match=r"'z_1' has shape .*, 'z_0' before it"):
            values["z_*"]
    with pytest.raises(UsageError, match=r"'z_1' has shape \(4, 3\), 'z_0' before it \(3,\)"):
        q.probs("z_*")


def test_a_glob_that_matches_nothing_says_what_there_is() -> None:
    q = ExactPosteriorEM(chain).posterior(X)
    known = r"the summed latents are: 'z_0', …, 'z_11' \(12 names\)"
    for ask in (q.probs, q.joint, lambda n: q.joint("z_0", n)):
        with pytest.raises(UsageError, match=r"'y_\*': it matches nothing; " + known):
            ask("y_*")
    with pytest.raises(UsageError, match=r"those are: 'z_0', …, 'z_11' \(12 names\)"):
        q.probs("q")
    with pytest.raises(KeyError, match=r"'y_\*': it matches nothing"):
        q.mode()["y_*"]
    with pytest.raises(UsageError, match=r"'q': there is no such name"):
        q.mode()["q"]


def bracketed(names: tuple[str, ...]) -> None:
    for name, x in zip(names, X, strict=False):
        z = pyro.sample(name, dist.Categorical(PI))
        pyro.sample(f"x of {name}", dist.Normal(MU[z], 0.8), obs=x)


def test_a_name_with_brackets_or_a_star_is_itself() -> None:
    q = ExactPosteriorEM(bracketed).posterior(("z[0]", "z0", "z*"))
    for values in (q.mode(), q.sample(2)):
        assert values["z[0]"].dim() == values["z*"].dim() == values["z0"].dim()
        assert values["z?"].shape == (2, *values["z0"].shape)
    assert q.probs("z[0]").shape == q.probs("z*").shape == (3,)
    torch.testing.assert_close(q.probs("z?"), torch.stack([q.probs("z0"), q.probs("z*")]))
    with pytest.raises(UsageError, match=r"brackets list characters(.|\n)*write 'z\[\[\]\*\]'"):
        ExactPosteriorEM(bracketed).posterior(("z[0]", "z[1]")).probs("z[*]")


def test_a_step_that_is_observed_is_not_left_out_in_silence() -> None:
    def model(x: Tensor) -> None:
        p = PI
        for t in pyro.markov(range(len(x))):
            seen = torch.tensor(2) if t == 3 else None
            z = pyro.sample(f"z_{t}", dist.Categorical(p), obs=seen)
            pyro.sample(f"x_{t}", dist.Normal(MU[z], 0.8), obs=x[t])
            p = A[z]

    q = ExactPosteriorEM(model).posterior(X)
    for ask in (q.probs, q.joint, q.mode().__getitem__, q.sample(2).__getitem__):
        with pytest.raises(
            UsageError, match=r"'z_\*': it matches 'z_3' as well, which is observed"
        ):
            ask("z_*")
    assert q.probs("z_[0-2]").shape == (3, 3)


def test_what_comes_back_is_a_dict() -> None:
    q = ExactPosteriorEM(chain).posterior(X)
    mode = q.mode()
    assert isinstance(mode, dict) and list(mode) == [f"z_{t}" for t in range(T)]
    assert "z_*" not in mode and len(mode) == T
    assert mode.get("z_*") is not None and mode.get("y_*", 7) == 7 and mode.get("q") is None
    assert {**mode} == dict(mode) == mode and type({**mode}) is dict
    for other in (pickle.loads(pickle.dumps(mode)), copy.deepcopy(mode), mode.copy(), mode | {}):
        assert other == mode
    assert torch.equal(pickle.loads(pickle.dumps(mode))["z_*"], mode["z_*"])
    assert all(v.untyped_storage().nbytes() == v.element_size() for v in mode.values())
    mode["z_3"] = torch.tensor(7)  # what was put there counts
    assert int(mode["z_*"][3]) == 7
    mode["z_*"] = torch.tensor(1)
    assert mode["z_*"].dim() == 0


def test_a_pickled_posterior_takes_globs() -> None:
    q = ExactPosteriorEM(chain).posterior(X)
    before = q.probs("z_*"), q.joint("z_*")
    for copied in (pickle.loads(pickle.dumps(q)), copy.deepcopy(q)):
        assert not vars(copied.graph).get("remembered")
        assert torch.equal(copied.probs("z_*"), before[0])
        assert torch.equal(copied.joint("z_*"), before[1])


def test_predictive_takes_globs() -> None:
    draws = ExactPosteriorEM(chain).predictive(X, num_samples=3, seed=0)
    assert draws["x_*"].shape == draws["z_*"].shape == (T, 3)
    assert torch.equal(draws["x_*"][10], draws["x_10"])


def fitted(x: Tensor) -> None:
    mu = pyro.param("mu", MU.clone())
    p = PI
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(p))
        pyro.sample(f"x_{t}", dist.Normal(mu[z], 0.8), obs=x[t])
        p = A[z]


def test_probabilities_and_labels_are_given_by_glob() -> None:
    em = ExactPosteriorEM(fitted)
    q = em.posterior(X)
    probs, path = q.probs("z_*"), q.mode()["z_*"]
    names = {f"z_{t}": p for t, p in enumerate(probs)}
    assert float(em.elbo(X, q={"z_*": probs})) == float(em.elbo(X, q=names))
    mixed = {"z_10": probs[0], "z_*": probs}
    expected = {**names, "z_10": probs[0]}
    assert float(em.elbo(X, q=mixed)) == float(em.elbo(X, q=expected))
    em.m_step({"z_*": probs}, X)
    torch.testing.assert_close(pyro.param("mu").detach(), (probs.T @ X) / probs.sum(0))
    result = em.fit(X, init={"z_*": path}, max_steps=0, progress=False)
    hot = torch.nn.functional.one_hot(path, 3).double()
    torch.testing.assert_close(result.params["mu"], (hot.T @ X) / hot.sum(0))
    with pytest.raises(UsageError, match=r"its shape is \(11, 3\), and it matches 12 latents"):
        em.elbo(X, q={"z_*": probs[1:]})
    with pytest.raises(UsageError, match=r"probabilities are missing for 'z_0', …, 'z_11'"):
        em.elbo(X, q={})
    with pytest.raises(UsageError, match="no summed latent"):
        em.fit(X, init={"y_*": path})


def test_parameters_take_globs() -> None:
    def model(x: Tensor) -> None:
        for k in range(11):
            mu = pyro.param(f"mu_{k}", torch.full((2,), float(k), dtype=x.dtype))
            pyro.sample(f"x_{k}", dist.Normal(mu, 1.0).to_event(1), obs=x[:2] + 0.1 * k)

    params = ExactPosteriorEM(model).fit(X, progress=False).params
    torch.testing.assert_close(params["mu_*"], X[:2] + 0.1 * torch.arange(11.0).unsqueeze(-1))
    with pytest.raises(KeyError, match=r"'nu_\*'; the model has: 'mu_0', …, 'mu_10' \(11 names\)"):
        params["nu_*"]


def drawn(x: Tensor) -> None:
    level = pyro.sample("level", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
    p = PI
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(p))
        pyro.sample(f"x_{t}", dist.Normal(level + MU[z], 0.8), obs=x[t])
        p = A[z]


def test_sums_under_draws_of_a_guide_take_globs() -> None:
    q = ExactPosteriorEM(drawn, AutoNormal, strategy="guide").posterior(X[:4])
    assert isinstance(q, DrawnPosterior)
    probs = q.probs("z_*", num_particles=2)
    torch.testing.assert_close(probs.sum(-1), torch.ones(4, dtype=X.dtype))
    assert q.sample(2, seed=0)["z_*"].shape == (4, 2)
    assert q.mode()["z_*"].shape == (4,)
    with pytest.raises(UsageError, match=r"'y\*': it matches nothing"):
        q.probs("y*")
    pyro.set_rng_seed(3)
    together = q.stacked(["z_2", "z_1"], num_particles=1)
    pyro.set_rng_seed(3)
    torch.testing.assert_close(together[1], q.probs("z_1", num_particles=1))


def heights(x: Tensor) -> None:
    for t in range(len(x)):
        h = pyro.sample(f"h_{t}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x_{t}", dist.Normal(h, 1.0), obs=x[t])


def heights_guide(x: Tensor) -> None:
    for t in range(len(x)):
        pyro.sample(f"h_{t}", dist.Normal(float(t), 1.0))


def test_means_of_a_guide_take_globs() -> None:
    q = ExactPosteriorEM(heights, heights_guide, strategy="guide").posterior(X)
    assert q.mean("h_*").tolist() == [float(t) for t in range(T)]
    assert q.mode()["h_*"].tolist() == [float(t) for t in range(T)]
    with pytest.raises(UsageError, match="no latent of this kind"):
        q.probs("h_*")


def states(x: Tensor) -> None:
    for t in range(len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(PI))
        pyro.sample(f"x_{t}", dist.Normal(MU[z], 1.0), obs=x[t])


def states_guide(x: Tensor) -> None:
    z = torch.tensor(0)
    for t in range(len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))


def test_a_guide_that_draws_states_takes_globs() -> None:
    q = ExactPosteriorEM(states, states_guide, strategy="guide").posterior(X[:3])
    assert isinstance(q, DrawnPosterior)
    pyro.set_rng_seed(0)
    probs = q.probs("z_*", num_particles=400)
    expected, each = A[0], []
    for _ in range(3):
        each.append(expected)
        expected = expected @ A
    torch.testing.assert_close(probs, torch.stack(each), rtol=0, atol=0.06)
    assert q.assignments("z_*", num_particles=50).tolist() == torch.stack(each).argmax(-1).tolist()


def in_steps(loop: Callable[..., Iterable], x: Tensor, rows: int) -> None:
    p = PI
    with pyro.plate("sequences", rows) if rows else nullcontext():
        for t in loop("time", x.shape[-1]):
            z = pyro.sample(f"z_{t}", dist.Categorical(p))
            pyro.sample(f"x_{t}", dist.Normal(MU[z], 0.8), obs=x[..., t])
            p = A[z]


@pytest.mark.parametrize("rows", [0, 4])
def test_vectorised_loops_answer_as_loops_do(rows: int) -> None:
    x = XS if rows else X
    plain = ExactPosteriorEM(in_steps).posterior(lambda _, T: pyro.markov(range(T)), x, rows)
    q = ExactPosteriorEM(in_steps).posterior(vectorized_markov, x, rows)
    for ask in (lambda q: q.probs("z_*"), lambda q: q.joint("z_*"), lambda q: q.probs("z_1?")):
        torch.testing.assert_close(ask(q), ask(plain), rtol=1e-11, atol=1e-13)
    backwards = [f"z_{t}" for t in reversed(range(T))]
    torch.testing.assert_close(q.stacked(backwards), q.probs("z_*").flip(0))
    torch.testing.assert_close(q.joint("z_10", "z_11"), q.joint("z_*")[10])
    assert torch.equal(q.mode()["z_*"], plain.mode()["z_*"])
    assert list(q.mode()) == list(plain.mode())
    assert q.sample(2, seed=0)["z_*"].shape == plain.sample(2, seed=0)["z_*"].shape
    with pytest.raises(
        UsageError, match=r"'y_\*': it matches nothing; .*'z_0', …, 'z_11' \(12 names"
    ):
        q.probs("y_*")


class Counting(torch.overrides.TorchFunctionMode):
    """Counts operations."""

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_what_was_asked_before_costs_no_loop_over_steps() -> None:
    counts = []
    for steps in (5, T):
        q = ExactPosteriorEM(chain).posterior(X[:steps])
        q.probs("z_*"), q.joint("z_*")
        with Counting() as counting:
            q.probs("z_*"), q.joint("z_*")
        counts.append(counting.calls)
    assert counts[0] == counts[1]
