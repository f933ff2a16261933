"""Tables that a model makes of many rows are looked at without numbers, which changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C
from torch.nn.functional import embedding, linear

from pyro_em import ExactPosteriorEM, PyroEMError
from pyro_em.graph.findings.examination import examine
from pyro_em.plan.kept import forget_readings
from pyro_em.tracing import runs, tables
from pyro_em.tracing.allocation import Shadows, is_shadow
from pyro_em.tracing.shadow_shapes import shadow_from
from pyro_em.tracing.tables import Tables

N, K, D = 150, 3, 2
GENERATOR = torch.Generator().manual_seed(2)
X = torch.randn(N, D, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(N, generator=GENERATOR, dtype=torch.float64) + X[:, 0]
V = torch.tensor([[0.5, -0.3], [0.1, 0.4], [-0.6, 0.0]]).double()
OF_ROWS = torch.randn(N, K, generator=GENERATOR, dtype=torch.float64)

Model = Callable[[Tensor, Tensor], None]
Gate = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def looking_for_tables(active: bool = True) -> Iterator[list[Tensor]]:
    """Data of these tests count as large, and tables beside them, which are listed, have no numbers."""
    met: list[Tensor] = []
    note = Tables.note

    def noted(self: Tables, out: Any, *how: Any) -> None:
        met.append(out.detach())
        note(self, out, *how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "_PLAIN_BYTES", 4000)
        patch.setattr("pyro_em.tracing.lean._LARGE", 1)
        patch.setattr(tables, "_MANY_ROWS", 100 if active else 10**9)
        patch.setattr(tables, "_LEAST", 1)
        patch.setattr(Tables, "note", noted)
        yield met


def gated(gate: Gate) -> Model:
    """A mixture of experts whose gate makes a table."""

    def model(x: Tensor, y: Tensor) -> None:
        v, w = pyro.param("v", V.clone()), pyro.param("w", 2 * V.flip(0))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=gate(x, v)))
            u = pyro.param("u", lambda: torch.rand(K).double() + 0.5, constraint=C.positive)
            pyro.sample("y", dist.Normal((x * w[z]).sum(-1), u[z]), obs=y)

    return model


def drawn(x: Tensor, v: Tensor) -> Tensor:
    """A start is drawn once the table has been made."""
    table = x @ v.T
    return table + pyro.param("t", lambda: torch.randn(K).double())


def by_table(x: Tensor, v: Tensor) -> Tensor:
    table = x @ v.detach().T
    return table * (2.0 if table.max() > 1 else 1.0)


def written(x: Tensor, v: Tensor) -> Tensor:
    table = x @ v.T
    table[:, 0] = 0.3
    return table


def out_of_place(x: Tensor, v: Tensor) -> Tensor:
    return torch.where(x[:, :1] == x.max(), torch.nan, x @ v.T)


GATES: dict[str, Gate] = {
    "a product": lambda x, v: x @ v.T,
    "a layer": lambda x, v: linear(x, v, v[:, 0]),
    "centred": lambda x, v: (x - x.mean(0)) @ v.T,
    "a centred table": lambda x, v: x @ v.T - (x @ v.T).mean(0),
    "a branch on the number of rows": lambda x, v: x @ v.T * (2.0 if len(x) > 120 else 1.0),
    "a branch on the largest number": lambda x, v: x @ v.T * (2.0 if x.max() > 2 else 1.0),
    "a branch on a table": by_table,
    "a constant of the number of rows": lambda x, v: x @ v.T * len(x) ** 0.1,
    "a table of the closure": lambda x, v: x @ v.T + OF_ROWS[: len(x)],
    "a start that is drawn": drawn,
    "written into": written,
    "not a number": out_of_place,
    "a deterministic site": lambda x, v: pyro.deterministic("table", x @ v.T, event_dim=1),
}


def table_observed(x: Tensor, y: Tensor) -> None:
    m = pyro.param("m", torch.cat([V, V], 1))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(K).double() / K))
        pyro.sample("x", dist.Normal(m[z], 1.0).to_event(1), obs=torch.cat([x, x], 1))


def start_of_a_table(x: Tensor, y: Tensor) -> None:
    m = pyro.param("m", (x @ V.T).mean(0))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(K).double() / K))
        pyro.sample("y", dist.Normal(m[z], 1.0), obs=y)


def rows_read_each_other(x: Tensor, y: Tensor) -> None:
    w = pyro.param("w", V.clone())
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(logits=x @ V.T))
        pyro.sample("y", dist.Normal((x * w[z.roll(1, -1)]).sum(-1), 1.0), obs=y)


def by_group(x: Tensor, y: Tensor) -> None:
    p = pyro.param("p", torch.rand(2, K).double().softmax(-1), constraint=C.simplex)
    w = pyro.param("w", V.clone())
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p[(x[:, 0] > 0).long()]))
        pyro.sample("y", dist.Normal((x * w[z]).sum(-1), 1.0), obs=y)


MODELS: dict[str, Model] = {
    **{name: gated(gate) for name, gate in GATES.items()},
    "a table that is observed": table_observed,
    "a start of a table": start_of_a_table,
    "rows that read each other": rows_read_each_other,
    "groups": by_group,
}


def _fitted(model: Model) -> tuple[Any, ...]:
    """All that a fit says, or what is said instead."""
    pyro.clear_param_store()
    forget_readings()
    pyro.set_rng_seed(4)
    try:
        result = ExactPosteriorEM(model).fit(X, Y, max_steps=1, tol=0)
    except PyroEMError as error:
        return type(error), str(error), torch.empty(0)
    values = {n: p.tolist() for n, p in result.params.items()}
    return str(result.plan), result.log_evidence, values, torch.get_rng_state()


@pytest.mark.filterwarnings("ignore::pyro_em.PyroEMWarning")
@pytest.mark.parametrize("name", MODELS)
def test_shadows_of_tables_change_nothing(name: str) -> None:
    with looking_for_tables(False) as none:
        *expected, state = _fitted(MODELS[name])
    with looking_for_tables() as met:
        *found, same = _fitted(MODELS[name])
    assert met and not none
    assert found == expected and torch.equal(same, state)


@pytest.mark.parametrize(
    ("name", "without"), [("a product", True), ("a layer", True), ("a branch on a table", False)]
)
def test_a_look_makes_no_table_unless_numbers_of_it_are_read(name: str, without: bool) -> None:
    with looking_for_tables():
        structure, _ = examine(MODELS[name], (X, Y), {}, sparing=True)
    assert is_shadow(structure.unobserved["z"]["fn"].logits) == without


# ---------------------------------------------------------------- what a model keeps


def keeping(kept: dict[str, Tensor], form: Callable[[Tensor], Tensor]) -> Model:
    """A model that computes its features once."""

    def gate(x: Tensor, v: Tensor) -> Tensor:
        if "features" not in kept:
            kept["features"] = form(torch.cat([x, x**2], 1).exp())
        return kept["features"] @ torch.cat([v, v], 1).T

    return gated(gate)


@pytest.mark.parametrize(
    "form",
    [
        lambda t: t,
        lambda t: (t - t.mean(0)).unsqueeze(1).squeeze(1),
        lambda t: torch.cat([t.T[:1].mul_(2).T, t], 1)[:, 1:],
    ],
    ids=["itself", "view", "written into"],
)
def test_features_that_a_model_keeps_have_numbers(form: Callable[[Tensor], Tensor]) -> None:
    kept: dict[str, Tensor] = {}
    with looking_for_tables(False):
        expected = _fitted(keeping({}, form))
    with looking_for_tables() as met:
        found = _fitted(keeping(kept, form))
    assert met and found[:3] == expected[:3]
    assert torch.equal(kept["features"], form(torch.cat([X, X**2], 1).exp()))


def test_tables_that_a_model_lists_have_numbers_and_gradients() -> None:
    seen: list[Tensor] = []

    def gate(x: Tensor, v: Tensor) -> Tensor:
        seen.append(x @ v.T)
        return seen[-1]

    with looking_for_tables() as met:
        examine(gated(gate), (X, Y), {}, sparing=True)
    assert met and not any(map(is_shadow, seen))
    assert torch.equal(seen[-1], X @ V.T) and seen[-2].requires_grad


def test_nothing_is_computed_for_what_nobody_keeps() -> None:
    computed: list[Any] = []
    with looking_for_tables() as met, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables._Note, "numbers", lambda note: computed.append(note))
        for name in ("a product", "a deterministic site", "groups"):
            examine(MODELS[name], (X, Y), {}, sparing=True)
    assert met and not computed


# ---------------------------------------------------------------- what is a table

MADE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a product": lambda x, i: x @ V.T,
    "a layer": lambda x, i: linear(x, V, V[:, 0]),
    "a look-up": lambda x, i: OF_ROWS[i],
    "an embedding": lambda x, i: embedding(i, OF_ROWS),
    "rows": lambda x, i: OF_ROWS.index_select(0, i),
    "broadcast": lambda x, i: x[:, :1] + V[:, 0],
    "of nothing": lambda x, i: torch.zeros(len(x), 3, dtype=torch.float64),
    "of a number": lambda x, i: torch.full((len(x), 4), 2),
    "joined": lambda x, i: torch.cat([x, x], 1),
}


@pytest.mark.parametrize("name", MADE)
def test_tables_are_laid_out_as_their_numbers_are(name: str) -> None:
    index = torch.arange(N) % 2
    expected = MADE[name](X, index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_MANY_ROWS", 100)
        patch.setattr(tables, "_LEAST", 1)
        shadows = Shadows(tables=Tables.beside([X, 3], lambda: None))
    with shadows:
        found = MADE[name](X, index)
        assert shadows.has_tables
        assert not is_shadow(X[:, 0] * 2) and not is_shadow(X.sum(0))  # of rows, and of all of them
    assert is_shadow(found) and found.dtype == expected.dtype
    assert (found.shape, found.stride()) == (expected.shape, expected.stride())


def test_few_rows_make_no_tables() -> None:
    assert Tables.beside([torch.zeros(1000, 3), "a", 2], lambda: None) is None
    assert Tables.beside([torch.zeros(100_000)], lambda: None) is not None


def test_another_layout_is_left_to_torch() -> None:
    aten = torch.ops.aten
    assert shadow_from(aten.zeros.default, [[3, 4]], {"layout": torch.sparse_coo}) is None
    with looking_for_tables(), Shadows(tables=Tables.beside([X], lambda: None)):
        assert not is_shadow(torch.rand(N, 8))  # which advances the random state
