"""Sums over real processes: right, the same on all ranks, and ended on all where one of them fails."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pyro_em.errors import DataError, GroupError, Handover, PyroEMError, UsageError
from pyro_em.reduction.over_group import OverGroup
from pyro_em.reduction.over_parts import OverParts
from pyro_em.reduction.reduction import Whole
from pyro_em.reduction.trees import SAME
from tests.ranks import on_ranks

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Sums:
    """A value with what is no sum."""

    mean: Tensor
    many: int
    name: str = field(default="", metadata=SAME)


def caught(call: Any, *args: Any) -> tuple[str, str, list[str]]:
    """Class, text and notes of what a call raises."""
    try:
        call(*args)
    except BaseException as error:
        return type(error).__name__, str(error), list(getattr(error, "__notes__", []))
    return "", "", []


def tree(part: int) -> dict[str, Any]:
    values = torch.linspace(0.1, 0.7, 7) * (part + 1)
    return {
        "double": values,
        "single": values.float().reshape(7, 1),
        "whole": torch.tensor([2**40 + part, part]),
        "bool": torch.tensor([part == 1, False]),
        "sums": Sums(values[:2], part, "kept"),
        "number": 0.1 * part,
        "count": 2**50 + part,
        "holds": part > 0,
        "none": None,
    }


def sums_and_others() -> dict[str, Any]:
    over: OverGroup[int] = OverGroup(Whole(dist.get_rank()), dist.group.WORLD)
    out: dict[str, Any] = {"sum": over.sum(tree)}
    before = over.counts
    out["again"] = over.sum(lambda part: tree(part + 1))
    out["collectives"] = over.counts.collectives - before.collectives
    out["bytes"] = over.counts.bytes - before.bytes
    out["max"] = over.max(lambda part: {"a": torch.tensor([part, -part]), "b": -0.5 - part})
    out["any"] = [over.any(lambda part: part == 1), over.any(lambda part: part == 7)]
    out["first"] = over.from_first(lambda: {"rank": dist.get_rank(), "x": torch.tensor(-0.0)})
    chunks: OverGroup[int] = over.with_parts(OverParts(lambda: iter([dist.get_rank(), 5])))
    out["chunks"] = chunks.sum(lambda part: {"x": part, "y": torch.tensor(part * 1.0)})
    out["nan"] = over.max(lambda part: torch.tensor([float("nan") if part else 1.0, part]))
    out["seconds"] = over.counts.seconds
    return out


@pytest.mark.parametrize("size", [2, 4])
def test_sums_of_all_processes(size: int) -> None:
    outs = on_ranks(size, sums_and_others)
    parts = [tree(r) for r in range(size)]
    for out in outs:
        total = out["sum"]
        for name in ("double", "single", "whole"):
            assert total[name].dtype == parts[0][name].dtype
            assert total[name].shape == parts[0][name].shape
            wanted = sum(p[name].double() for p in parts)
            assert torch.allclose(total[name].double(), wanted, rtol=1e-7)
            assert torch.equal(total[name], outs[0]["sum"][name])  # bit by bit on all ranks
        assert torch.equal(total["whole"][0], torch.tensor(size * 2**40 + sum(range(size))))
        assert total["bool"].tolist() == [True, False] and total["bool"].dtype == torch.bool
        assert total["sums"].many == sum(range(size)) and total["sums"].name == "kept"
        assert total["count"] == size * 2**50 + sum(range(size)) and total["none"] is None
        assert type(total["count"]) is int and total["holds"] == size - 1
        assert total["number"] == pytest.approx(sum(0.1 * r for r in range(size)), rel=1e-15)
        times = sum(range(2, size + 2))
        assert torch.allclose(out["again"]["double"], times * tree(0)["double"])
        assert out["collectives"] == 1 and out["bytes"] == 8 * (2 + 7 + 7 + 2 + 2 + 3 + 3)
        assert out["max"]["a"].tolist() == [size - 1, 0] and out["max"]["b"] == -0.5
        assert out["any"] == [True, False]
        assert out["first"]["rank"] == 0 and str(out["first"]["x"].item()) == "-0.0"
        assert out["chunks"]["x"] == sum(range(size)) + 5 * size == float(out["chunks"]["y"])
        assert out["nan"][0].isnan() and out["nan"][1] == size - 1
        assert out["seconds"] > 0


def empty_ranks() -> dict[str, Any]:
    rank = dist.get_rank()
    inner = None if rank in (0, 2) else Whole(rank)
    over: OverGroup[int] = OverGroup(inner, dist.group.WORLD)
    out: dict[str, Any] = {"sum": [over.sum(tree) for _ in range(2)]}
    out["max"] = over.max(lambda part: torch.tensor(-1.0 - part))
    out["any"] = over.any(lambda part: True)
    out["first"] = over.from_first(lambda: rank)
    shown = over.with_parts(Whole(7 if rank == 2 else rank), is_empty=rank == 2)
    out["shown"] = shown.sum(lambda part: {"x": part})["x"]
    out["shown any"] = shown.any(lambda part: part == 7)
    nobody: OverGroup[int] = over.with_parts(None)
    out["nobody"] = caught(nobody.sum, tree)
    out["after"] = over.sum(lambda part: 1)
    return out


def test_ranks_without_rows_take_part_with_zeros() -> None:
    for out in on_ranks(4, empty_ranks):
        for total in out["sum"]:
            assert torch.allclose(total["double"], 6 * tree(0)["double"])
            assert total["sums"].many == 4 and total["sums"].name == "kept"
            assert total["count"] == 2**51 + 4 and total["single"].shape == (7, 1)
        assert out["max"] == -2.0 and out["any"] and out["first"] == 0
        assert out["shown"] == 0 + 1 + 3 and not out["shown any"]
        assert out["nobody"][0] == "GroupError" and "no process has data" in out["nobody"][1]
        assert out["after"] == 2


def failing() -> dict[str, Any]:
    rank = dist.get_rank()
    over: OverGroup[int] = OverGroup(Whole(rank), dist.group.WORLD, place=f"rows from {10 * rank}")

    def fail(error: BaseException, at: int = 1) -> Any:
        def of(part: int) -> float:
            if part == at:
                raise error
            return 1.0

        return of

    out: dict[str, Any] = {}
    out["first"] = caught(over.sum, fail(DataError("site 'x': 1 of 10 values is NaN.")))
    out["ok"] = over.sum(float)
    out["known"] = caught(over.sum, fail(DataError("site 'x': 1 of 10 values is NaN.")))
    out["foreign"] = caught(over.max, fail(KeyError("mu")))
    try:
        over.any(fail(ZeroDivisionError("by zero")))
    except ZeroDivisionError as error:
        out["is"] = isinstance(error, PyroEMError) == (rank != 1)
    out["handover"] = caught(over.sum, fail(Handover("the pivot is zero")))
    out["interrupt"] = caught(over.sum, fail(KeyboardInterrupt()))
    out["first value"] = caught(over.from_first, lambda: fail(UsageError("no start"), 0)(rank))
    out["form"] = caught(over.sum, lambda part: torch.zeros(2 + part // 1))
    out["leaves"] = caught(over.sum, lambda part: [1.0] * (1 + part))
    out["large"] = caught(over.sum, lambda part: 2**53 - 5)
    out["calls"] = caught(over.sum if rank else over.max, lambda part: 1.0)
    over.agree({"plan": "ab", "argument 'x'": "c"})
    out["differ"] = caught(over.agree, {"plan": "ab", "argument 'w'": str(rank)})

    def between(error: BaseException) -> None:
        with over.together():
            over.sum(float)
            if rank == 1:
                raise error
            over.sum(lambda part: [1.0, 2.0])

    out["between"] = caught(between, RuntimeError("M-step"))
    out["left"] = caught(between, GeneratorExit())
    with over.together():
        out["end"] = over.sum(float)

    def signalled() -> None:
        with over.together():
            if rank == 1:
                signal.raise_signal(signal.SIGINT)
            out["went on"] = True
            over.sum(float)
            over.sum(float)

    out["signalled"] = caught(signalled)

    def at_the_end() -> None:
        with over.together():
            over.sum(float)
            if rank == 1:
                signal.raise_signal(signal.SIGINT)

    out["after the last"] = caught(at_the_end)
    out["finally"] = over.sum(float)
    return out


def test_what_one_rank_raises_is_raised_on_all() -> None:
    size = 2
    outs = on_ranks(size, failing)
    for rank, out in enumerate(outs):
        at = "rank 1 of 2, rows from 10: "
        for name in ("first", "known"):
            kind, text, notes = out[name]
            assert kind == "DataError"
            assert text == ("" if rank == 1 else at) + "site 'x': 1 of 10 values is NaN."
            assert notes == (["This was on rank 1 of 2, rows from 10."] if rank == 1 else [])
        assert out["ok"] == 1.0 and out["end"] == 1.0 and out["finally"] == 1.0 and out["is"]
        assert out["foreign"][:2] == ("KeyError", "'mu'" if rank else at + "KeyError: 'mu'")
        assert out["handover"][:2] == ("Handover", "the pivot is zero")
        assert out["interrupt"][0] == out["signalled"][0] == "KeyboardInterrupt"
        assert out["went on"] and out["after the last"][0] == ("KeyboardInterrupt" if rank else "")
        assert out["first value"][0] == "UsageError" and "no start" in out["first value"][1]
        assert out["form"][0] == "GroupError"
        assert "value 1 is float64 (2,) on rank 0 and float64 (3,) on rank 1" in out["form"][1]
        assert "1 values on rank 0 and 2 on rank 1" in out["leaves"][1]
        assert out["large"][0] == "UsageError" and "2**53" in out["large"][1]
        assert "rank 0 in a maximum; rank 1 in a sum" in out["calls"][1]
        assert out["differ"][0] == "UsageError"
        assert "argument 'w' differs: rank 1 has another than rank 0" in out["differ"][1]
        assert out["between"][0] == "RuntimeError" and "M-step" in out["between"][1]
        assert out["left"][0] == ("GeneratorExit" if rank else "GroupError")


def killed(at: int) -> Any:
    rank = dist.get_rank()
    over: OverGroup[int] = OverGroup(Whole(rank), dist.group.WORLD)

    def of(part: int) -> float:
        if part == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0

    for _ in range(at):
        over.sum(float)
    started = time.monotonic()
    return caught(over.sum, of), time.monotonic() - started


def late() -> Any:
    rank = dist.get_rank()
    over: OverGroup[int] = OverGroup(Whole(rank), dist.group.WORLD)
    over.sum(float)
    if rank == 1:
        time.sleep(1.6)
        return None

    def inside() -> None:
        with over.together():
            over.sum(float)

    return caught(inside)


@pytest.mark.parametrize("at", [0, 2])
def test_a_killed_process_ends_the_others(at: int) -> None:
    outs = on_ranks(4, killed, at, timeout=4.0)
    assert outs[1] is None
    for rank in (0, 2, 3):
        (kind, text, _), seconds = outs[rank]
        assert "a sum over processes: another process of the group did not answer" in text
        assert "--max-restarts" in text and kind == "NotAnswering" and seconds < 10


def test_a_process_that_comes_too_late_ends_the_others_by_the_time_out() -> None:
    kind, text, _ = on_ranks(2, late, timeout=1.0)[0]
    assert kind == "NotAnswering" and "did not answer" in text


def waiting() -> Any:
    over: OverGroup[int] = OverGroup(Whole(dist.get_rank()), dist.group.WORLD, timed=True)
    over.sum(float)

    def of(part: int) -> float:
        time.sleep(0.3 * part)
        return 1.0

    over.sum(of)
    return over.counts


def test_the_wait_for_slower_processes_is_counted_apart() -> None:
    first, second = on_ranks(2, waiting)
    assert first.waiting > 0.25 and second.waiting < 0.2 and first.seconds < 0.2
    assert first.exchanges == 2 and first.bytes == second.bytes


def test_no_group_is_told() -> None:
    with pytest.raises(GroupError, match="init_process_group"):
        OverGroup(Whole(1), None)
