"""The figures hold what they were given; nothing global is changed."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, UsageError, compare, plotting
from pyro_em.graph.independence import ModelGraph


@pytest.fixture(autouse=True)
def nothing_global() -> Iterator[None]:
    matplotlib.use("Agg")
    before = dict(matplotlib.rcParams)
    yield
    pyplot.close("all")
    assert dict(matplotlib.rcParams) == before


def mixture(x: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("x", dist.Normal(mu[z], s), obs=x)


def data() -> Tensor:
    return torch.cat([torch.randn(40) - 2, torch.randn(60) + 2])


def test_evidence_draws_the_history_and_the_end() -> None:
    result = ExactPosteriorEM(mixture).fit(data(), progress=False)
    ax = plotting.evidence(result)
    (line,) = ax.get_lines()
    assert list(line.get_ydata()) == [*result.history, result.log_evidence]
    assert ax.get_ylabel() == "log evidence (nats)"
    assert ax.get_xlabel() == "step"
    assert plotting.evidence(result.history, ax, color="k") is ax
    assert len(ax.get_lines()[1].get_ydata()) == len(result.history)


def test_evidence_of_a_fit_with_a_guide_is_called_elbo() -> None:
    def model(x: Tensor) -> None:
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(h.tanh(), 1.0), obs=x)

    em = ExactPosteriorEM(model, pyro.infer.autoguide.AutoNormal)
    ax = plotting.evidence(em.fit(data(), max_steps=3, seed=0, progress=False))
    assert ax.get_ylabel() == "ELBO (nats)"


def test_ellipses_hold_their_share() -> None:
    """The 0.5 and 0.95 ellipses hold these shares of draws."""
    mean = torch.tensor([[1.0, -2.0]])
    Sigma = torch.tensor([[[2.0, 0.9], [0.9, 0.7]]])
    ax = plotting.ellipses(mean, Sigma)
    draws = np.random.default_rng(0).multivariate_normal(mean[0].numpy(), Sigma[0].numpy(), 20000)
    for patch, share in zip(ax.patches, (0.5, 0.95), strict=True):
        path, to = patch.get_path(), patch.get_patch_transform()
        inside = path.transformed(to).contains_points(draws).mean()
        assert inside == pytest.approx(share, abs=0.012)


def test_responsibilities_mix_the_colours() -> None:
    ax = plotting.responsibilities(torch.zeros(3, 2), torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5]]))
    first, second, mixed = ax.collections[0].get_facecolors()[:, :3]
    assert np.allclose(first, matplotlib.colors.to_rgb(plotting.PALETTE[0]))
    assert np.allclose(mixed, (first + second) / 2)


def test_state_sequence_colours_each_point_by_its_state() -> None:
    x, states = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0]), torch.tensor([0, 1, 0, 1, 2])
    means, years = torch.tensor([3.5, 1.0, 5.0]), torch.arange(1900, 1905)
    ax = plotting.state_sequence(x, states, times=years, means=means, labels=["a", "b", "c"])
    points = [c.get_offsets().data.tolist() for c in ax.collections]
    assert points[0] == [[1900, 3], [1902, 4]]
    assert points[2] == [[1904, 5]]
    assert [c.get_label() for c in ax.collections] == ["a", "b", "c"]
    assert list(ax.get_lines()[1].get_ydata()) == [3.5, 1.0, 3.5, 1.0, 5.0]
    with pytest.raises(UsageError, match=r"5 steps, 4 states, 5 times") as raised:
        plotting.state_sequence(x, states[:4])
    assert "state_sequence" in str(raised.value)


def test_state_probs_fill_the_height() -> None:
    probs = torch.tensor([[0.2, 0.8], [0.5, 0.5], [1.0, 0.0]])
    ax = plotting.state_probs(probs, times=[1.0, 2.0, 4.0])
    lower, upper = (c.get_paths()[0].vertices for c in ax.collections)
    assert [1.0, 0.2] in lower.round(12).tolist()
    assert [2.0, 0.5] in lower.tolist()
    assert upper[:, 1].max() == 1 and ax.get_xlim() == (1.0, 4.0)
    with pytest.raises(UsageError, match="3 steps, 2 times"):
        plotting.state_probs(probs, times=[1.0, 2.0])


def states_over_time(x: Tensor) -> None:
    A, mu = torch.tensor([[0.8, 0.2], [0.3, 0.7]]), torch.tensor([-1.0, 1.0])
    z = torch.tensor(0)
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])


def test_figures_of_latents_take_a_posterior_and_a_glob() -> None:
    x = torch.randn(11)
    q = ExactPosteriorEM(states_over_time).posterior(x)
    probs, path = q.probs("z_*"), q.mode()["z_*"]
    areas = [plotting.state_probs(probs), plotting.state_probs(q, site="z_*")]
    lower = [ax.collections[0].get_paths()[0].vertices for ax in areas]
    assert np.array_equal(lower[0], lower[1])
    for states, site in ((path, None), (q, "z_*"), (q.mode(), "z_*")):
        ax = plotting.state_sequence(x, states, site=site)
        drawn = [c.get_offsets().data.tolist() for c in ax.collections]
        assert [len(d) for d in drawn] == [int((path == k).sum()) for k in range(len(drawn))]
    plane = torch.randn(11, 2)
    both = plotting.responsibilities(plane, probs), plotting.responsibilities(plane, q, site="z_*")
    faces = [ax.collections[0].get_facecolors() for ax in both]
    assert np.array_equal(faces[0], faces[1])
    with pytest.raises(UsageError, match="does not say which of its latents"):
        plotting.state_probs(q)
    with pytest.raises(UsageError, match=r"probs has shape \(3, 2, 2\), not \(T, K\)"):
        plotting.state_probs(torch.full((3, 2, 2), 0.5))
    with pytest.raises(UsageError, match="neither states nor a posterior"):
        plotting.state_sequence(x, [1, 0])


@pytest.mark.slow
def test_comparison_is_what_its_plot_method_draws() -> None:
    result = compare(
        ExactPosteriorEM(mixture), data(), max_steps=20, svi_steps=6, seeds=(0,), progress=False
    )
    for axes in (plotting.comparison(result), result.plot()):
        labels = [t.get_text() for t in axes[0].get_legend().get_texts()]
        assert any("exact EM" in label for label in labels)
        assert axes[0].get_xlabel() == "steps" and axes[1].get_xlabel() == "wall-clock seconds"
        assert "nats per datum" in axes[0].get_ylabel()


def nested(x: Tensor, seen: Tensor) -> None:
    with pyro.plate("groups", x.shape[0], dim=-2):
        c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.3)))
        with pyro.plate("people", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Bernoulli(0.2 + 0.3 * c), obs=(x > 0).double(), obs_mask=seen)
            pyro.sample("a_long_name", dist.Normal(z, 1.0), obs=x)


def test_graph_has_every_edge_and_a_box_per_plate() -> None:
    x = torch.randn(3, 4)
    model = ExactPosteriorEM(nested).plan(x, x > 0.5).graph
    ax = plotting.graph(model)
    arrows = [p for p in ax.patches if isinstance(p, FancyArrowPatch)]
    boxes = [p for p in ax.patches if isinstance(p, FancyBboxPatch)]
    assert len(arrows) == len(model.edges) == 2
    plan = ExactPosteriorEM(nested).plan(x, x > 0.5)
    assert len(plotting.graph(plan).texts) == len(ax.texts)  # a plan has its graph
    outer, inner = sorted((b.get_bbox().extents for b in boxes), key=lambda b: b[0])
    assert (outer[:2] < inner[:2]).all() and (outer[2:] > inner[2:]).all()
    words = [t.get_text() for t in ax.texts]
    assert {"c", "z", "a_long_name", "groups", "people"} <= set(words)
    halves = [line for line in ax.get_lines() if line.get_fillstyle() == "left"]
    assert len(halves) == 1  # z, observed in part
    assert not [
        p for p in plotting.graph(model, plates=False).patches if isinstance(p, FancyBboxPatch)
    ]


def test_graph_takes_places_and_names() -> None:
    model = ModelGraph([("a", "b")])
    ax = plotting.graph(model, positions={"a": (0, 0), "b": (2, 3)}, labels={"a": "$A_1$"})
    assert [t.get_text() for t in ax.texts] == ["$A_1$", "b"]
    (low, high) = ax.get_xlim()
    assert low < 0 and high > 2
    with pytest.raises(UsageError, match=r"site 'b'.*no place") as raised:
        plotting.graph(model, positions={"a": (0, 0)})
    assert "leave positions out" in str(raised.value)


def test_a_plate_with_a_stranger_inside_is_named_beside_its_sites() -> None:
    model = ModelGraph()
    for name, plates in (("a", ("p",)), ("b", ()), ("c", ("p",))):
        model.add_node(name, plates=plates)
    model.add_edges_from([("a", "b"), ("b", "c")])
    ax = plotting.graph(model)
    assert not [p for p in ax.patches if isinstance(p, FancyBboxPatch)]
    assert [t.get_text() for t in ax.texts].count("[p]") == 2


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.delattr(matplotlib, "pyplot", raising=False)
    with pytest.raises(
        ImportError, match=r"figures need matplotlib: pip install 'pyro-em\[plot\]'"
    ):
        plotting.state_probs(torch.ones(3, 1))
