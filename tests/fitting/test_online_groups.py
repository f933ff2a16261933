"""Online EM on several processes: their chunks of one number are one batch."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch
import torch.distributed as torch_dist
from torch import Tensor

from pyro_em import Chunks, ExactPosteriorEM, StepSize
from tests.fitting.group_models import (
    EXACT,
    GUIDES,
    are_equal,
    largest_difference,
    numbers_of,
    shard_of,
    table,
)
from tests.ranks import on_ranks

pytestmark = pytest.mark.slow

SIZES, ROWS = [9, 15], 5  # two batches of both, one of the second process alone
FITS: list[tuple[str, Any]] = [
    ("mixture", StepSize(0.6)),
    ("mixture", "incremental"),
    ("lines", StepSize(0.6)),
]


def fit(name: str, x: Any, online: Any, **how: Any) -> dict[str, Any]:
    pyro.clear_param_store()
    em = ExactPosteriorEM(EXACT[name], GUIDES.get(name))
    return numbers_of(em.fit(x, online=online, num_epochs=2, progress=False, **how))


def each_on_shards(path: str) -> dict[str, Any]:
    own = shard_of(table(), SIZES)
    together = {"process_group": torch_dist.group.WORLD}
    out: dict[str, Any] = {
        f"{name} {i}": fit(name, Chunks(own, rows=ROWS), online, **together)
        for i, (name, online) in enumerate(FITS)
    }
    chunks, name = Chunks(own, rows=ROWS), "mixture"

    def kill(step: Any) -> None:
        if step.index == 4:
            raise ValueError("killed")

    kept = {"checkpoint": path, "checkpoint_every": 1, **together}
    with pytest.raises(ValueError, match="killed"):
        fit(name, chunks, StepSize(0.6), callbacks=[kill], **kept)
    out["resumed"] = fit(name, chunks, StepSize(0.6), callbacks=[lambda step: None], **kept)
    started = {"init": "random", "seed": 1}
    out["started"] = fit("chain", chunks, StepSize(0.6), **started, **together)
    return out


def batches(x: Tensor) -> list[Tensor]:
    first, second = (shard.split(ROWS) for shard in x.split(SIZES))
    return [torch.cat([*first[i : i + 1], *second[i : i + 1]]) for i in range(3)]


def test_chunks_of_one_number_are_one_batch(tmp_path: Any) -> None:
    outs = on_ranks(2, each_on_shards, str(tmp_path / "run.pt"))
    for name in outs[0]:
        assert are_equal(outs[0][name], outs[1][name]), name
    for i, (name, online) in enumerate(FITS):
        one, out = fit(name, Chunks(batches(table())), online), outs[0][f"{name} {i}"]
        assert largest_difference(out, one) < 1e-11, name
        assert out["path"] == pytest.approx(one["path"], rel=1e-11)
    assert are_equal(outs[0]["resumed"], outs[0]["mixture 0"])
