"""Normal equations of which data determine a part, against numpy's least squares of least change."""

from __future__ import annotations

import numpy as np
import torch

from pyro_em.updates.regressions.idle import Idle
from pyro_em.updates.regressions.pseudo_inverse import pseudo_solve, solve_each


def _systems() -> tuple[torch.Tensor, torch.Tensor]:
    """Systems of four columns in other units, with three, two, four and three directions determined."""
    g = torch.Generator().manual_seed(3)
    units = torch.tensor([1.0, 1e-3, 50.0, 2.0]).double()
    rows = [torch.randn(n, 4, generator=g).double() * units for n in (3, 2, 7, 3)]
    gram = torch.stack([X.mT @ X for X in rows])
    moment = torch.stack([X.mT @ torch.randn(len(X), generator=g).double() for X in rows])
    return gram, moment


def test_each_system_moves_along_what_its_own_data_determine() -> None:
    gram, moment = _systems()
    found = solve_each(gram, moment, still=True)
    for A, b, x in zip(gram.numpy(), moment.numpy(), found.numpy(), strict=True):
        unit = 1 / np.sqrt(np.diag(A))
        values, vectors = np.linalg.eigh(unit[:, None] * A * unit)
        free = unit[:, None] * vectors[:, values < 1e-12 * values[-1]]
        np.testing.assert_allclose(A @ x, b, rtol=1e-7, atol=1e-9 * np.abs(b).max())
        if free.shape[1]:
            assert np.abs(np.linalg.qr(free)[0].T @ x).max() < 1e-9 * np.abs(x).max()


def test_blocks_are_solved_as_if_they_stood_alone() -> None:
    gram, moment = _systems()
    whole = pseudo_solve(torch.block_diag(*gram), moment.reshape(-1), still=True)
    torch.testing.assert_close(
        whole.reshape(4, 4), solve_each(gram, moment, still=True), rtol=1e-6, atol=1e-9
    )


def test_rounding_of_zero_is_not_taken_for_a_curvature() -> None:
    gram, moment = torch.eye(3).double(), torch.tensor([1.0, 2.0, 3.0]).double()
    idle = torch.tensor([1.0, 1.0, 1.0]).double() / 3**0.5
    gram = gram - (1 - 1e-14) * torch.outer(idle, idle)  # what long sums leave of zero
    asked = []

    def is_idle(direction: torch.Tensor) -> bool:
        asked.append(direction / direction.norm())
        return bool(asked[-1].dot(idle).abs() > 1 - 1e-9)

    taken = pseudo_solve(gram, moment, still=True)
    found = pseudo_solve(gram, moment, still=True, is_idle=is_idle)
    assert float(taken.abs().max()) > 1e13 and len(asked) == 1
    torch.testing.assert_close(found, torch.tensor([-1.0, 0.0, 1.0]).double())


def test_directions_that_were_found_idle_are_not_asked_again() -> None:
    J, asked = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]).double(), []

    def moves(v: torch.Tensor) -> tuple[float, float]:
        asked.append(v)
        return float((J @ v).abs().max()), float((J.abs() @ v.abs()).max())

    idle = Idle(moves)
    both = [torch.tensor(v).double() for v in ([1.0, -1.0, 0.0, 0.0], [1.0, -1.0, 5.0, 0.0])]
    assert all(idle(v) for v in both) and len(asked) == 2
    assert idle(both[0] - 3 * both[1]) and len(asked) == 2
    assert not idle(torch.tensor([1.0, -1.0, 0.0, 1e-6]).double()) and len(asked) == 3
