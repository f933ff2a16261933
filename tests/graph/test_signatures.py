"""Bindings that recur: what is taken over from an earlier step is what would have been read off."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_em.graph.bindings import signatures
from pyro_em.graph.bindings.autograd import bind
from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.bindings.signatures import KeptSelections, Recurring, outline, signature
from pyro_em.graph.bindings.useful import Useful
from pyro_em.graph.forms import equal_to_first

Argument = Callable[[Tensor], Tensor]

FORWARD, BACKWARD = torch.tensor([0, 1, 2, 3]), torch.tensor([3, 2, 1, 0])
C1, C2, C4 = torch.ones(1), torch.ones(2), torch.ones(4)

# Pairs of arguments of one shape. All elements of the parameter are equal, so that values tell
# nothing; only the first of each pair and its repetition are the same function.
PAIRS: dict[str, tuple[Argument, Argument]] = {
    "index": (lambda t: t[FORWARD], lambda t: t[BACKWARD]),
    "a slice": (lambda t: t[:2], lambda t: t[1:3]),
    "select": (lambda t: t.reshape(2, 2)[0], lambda t: t.reshape(2, 2)[1]),
    "transposed": (lambda t: t.reshape(2, 2).T, lambda t: t.reshape(2, 2) + 0),
    "outer": (lambda t: t.reshape(4, 1).expand(4, 4), lambda t: t.reshape(1, 4).expand(4, 4)),
    "broadcast by an operation": (
        lambda t: t.reshape(4, 1) * torch.ones(4, 4),
        lambda t: t.reshape(1, 4) * torch.ones(4, 4),
    ),
    "stack": (
        lambda t: torch.stack([t, torch.ones(4)]),
        lambda t: torch.stack([torch.ones(4), t]),
    ),
    "cat": (lambda t: torch.cat([C2, t, C1]), lambda t: torch.cat([C1, t, C2])),
    "a factor": (
        lambda t: t * torch.tensor([1.0, 1, 2, 2]),
        lambda t: t * torch.tensor([1.0, 2, 1, 2]),
    ),
    "exp": (lambda t: t[FORWARD].exp(), lambda t: t[BACKWARD].exp()),
    "normalised": (
        lambda t: t.reshape(2, 2) / t.reshape(2, 2).sum(-1, keepdim=True),
        lambda t: t.reshape(2, 2).T / t.reshape(2, 2).T.sum(-1, keepdim=True),
    ),
    "an offset": (lambda t: t[FORWARD] - C4 * 0, lambda t: t[FORWARD] - C4),
}


def same(a: Binding, b: Binding) -> bool:
    parts = zip(a.selections, b.selections, strict=True)
    return (
        (a.how, a.params, a.reason, a.normalise) == (b.how, b.params, b.reason, b.normalise)
        and torch.equal(a.constant, b.constant)
        and all(s.param == r.param and torch.equal(s.index, r.index) for s, r in parts)
    )


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are taken to have one binding where many are compared at once."""
    one, two = outline(a, {}), outline(b, {})
    if one is None or two is None or one[0] != two[0] or a.shape != b.shape:
        return False
    pairs = [*zip(one[1], two[1], strict=True), (a.detach(), b.detach())]
    return all(bool(equal_to_first(pair)[1]) for pair in pairs)


@pytest.mark.parametrize("name", PAIRS)
def test_outlines_tell_functions_of_the_same_values_apart(name: str) -> None:
    theta = torch.ones(4).requires_grad_()
    first, second = PAIRS[name]
    assert not alike(first(theta), second(theta))
    assert not alike(second(theta), first(theta))
    for make in PAIRS[name]:
        assert alike(make(theta), make(theta)) == (outline(make(theta), {}) is not None)


def test_what_is_computed_from_a_hidden_constant_is_compared() -> None:
    theta = torch.ones(4).requires_grad_()
    c = torch.tensor([0.0, 1.0, 2.0, 3.0])
    up = (theta - c).exp().sum(0, keepdim=True)
    down = (theta - c.flip(0)).exp().sum(0, keepdim=True)
    again = (theta - c).exp().sum(0, keepdim=True)
    assert torch.allclose(up, down)
    assert alike(up, again)
    assert not alike((theta - c).exp()[:1] * 1, (theta - c - 1).exp()[:1] * 1)
    outlines = outline(up, {}), outline(down, {})
    assert outlines[0] is not None and outlines[1] is not None
    saved = [torch.cat([t.reshape(-1) for t in o[1]]) for o in outlines]  # type: ignore[index]
    assert not torch.equal(*saved)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_another_function_with_the_same_values_is_read_anew(name: str, affine: bool) -> None:
    theta = torch.ones(4).requires_grad_()
    bindings = Recurring({"theta": theta})
    useful = Useful(affine=affine, normalised="probs" if name == "normalised" else "")

    def fresh(argument: Tensor) -> Binding:
        return bind(argument, {"theta": theta}, useful)

    for make in PAIRS[name] * 2:
        argument = make(theta)
        found = bindings.bind(argument, lambda t: t, (), useful)
        expected = fresh(argument)
        assert same(found, expected)
        if expected.jacobians is not None:
            assert found.jacobians is not None
            assert torch.equal(found.jacobians["theta"].dense, expected.jacobians["theta"].dense)


@pytest.mark.parametrize("values", ["equal", "other"])
@pytest.mark.parametrize("name", PAIRS)
def test_what_an_earlier_run_selected_is_what_a_later_one_selects(name: str, values: str) -> None:
    kept = KeptSelections()
    normalised = "probs" if name == "normalised" else ""
    generator = torch.Generator().manual_seed(0)
    for run in range(4):
        theta = torch.ones(4)
        if values == "other":
            theta = torch.rand(4, generator=generator) + 0.5
        theta.requires_grad_()
        bindings = Recurring({"theta": theta}, kept)
        for make in PAIRS[name][:: -1 if run % 2 else 1]:
            argument = make(theta)
            found = bindings.bind(argument, lambda t: t, (), Useful(normalised=normalised))
            expected = bind(argument, {"theta": theta}, Useful(normalised=normalised))
            assert same(found, expected)
            assert torch.equal(found.constant, argument.detach())


def test_a_selection_of_an_earlier_run_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, kept = [], KeptSelections()

    def counted(*args: object, **kwargs: object) -> Binding:
        calls.append(1)
        return bind(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(signatures, "bind", counted)
    for run in range(3):
        theta = (torch.arange(4.0) + run).requires_grad_()
        Recurring({"theta": theta}, kept).bind(theta[BACKWARD], lambda t: t, ())
    assert len(calls) == 1
    # A number that no node shows changes the value: what was selected is not the argument.
    theta = torch.arange(4.0).requires_grad_()
    argument = theta[BACKWARD]
    argument.data += 1.0
    assert Recurring({"theta": theta}, kept).bind(argument, lambda t: t, ()).how == "opaque"


def test_selections_of_few_forms_are_kept() -> None:
    kept, theta = KeptSelections(), torch.ones(200).requires_grad_()
    for i in range(100):
        Recurring({"theta": theta}, kept).bind(theta[i : i + 3], lambda t: t, ())
    assert len(kept.known) == signatures._MOST


def test_a_recurring_form_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: object, **kwargs: object) -> Binding:
        calls.append(1)
        return bind(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(signatures, "bind", counted)
    A = torch.eye(4).requires_grad_()
    bindings = Recurring({"A": A})
    for _ in range(5):
        rows = A[torch.arange(4).reshape(4, 1)]
        bindings.bind(
            rows / rows.sum(-1, keepdim=True), lambda t: t, (), Useful(normalised="probs")
        )
    assert len(calls) == 1


def test_two_parameters_of_one_shape_are_told_apart() -> None:
    a, b = torch.ones(4).requires_grad_(), torch.ones(4).requires_grad_()
    bindings = Recurring({"a": a, "b": b})
    for t, name in ((a, "a"), (b, "b"), (a, "a")):
        assert bindings.bind(t[FORWARD], lambda t: t, ()).params == (name,)


def test_what_a_node_hides_has_no_signature() -> None:
    theta = torch.ones(4).requires_grad_()

    class Hiding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, t: Tensor, k: int) -> Tensor:
            return t.roll(k)

        @staticmethod
        def backward(ctx: object, g: Tensor) -> tuple[Tensor, None]:
            return g, None

    assert signature(Hiding.apply(theta, 1)) is None
    assert signature(torch.cat([theta, C1])) is None
    assert signature(theta.detach()) is None
    assert signature(theta[torch.zeros(5000, dtype=torch.long)]) is None  # too much to compare
    assert signature(theta[FORWARD]) is not None


def test_nodes_show_their_output_shapes() -> None:
    node = torch.ones(4).requires_grad_().reshape(2, 2).grad_fn
    assert [tuple(m.shape) for m in node._input_metadata] == [(2, 2)]  # type: ignore[union-attr]


def test_what_a_selection_remembers_is_not_copied() -> None:
    theta = torch.arange(4.0).requires_grad_()
    (selection,) = bind(theta[FORWARD], {"theta": theta}).selections
    assert selection.is_whole and selection.is_in_order and selection.alone is selection.alone
    selection.remembered["something"] = object()
    twin = pickle.loads(pickle.dumps(selection))
    assert torch.equal(twin.index, selection.index) and not twin.remembered
    assert not bind(theta[BACKWARD], {"theta": theta}).selections[0].is_in_order
