"""Chunks that are read anew in each pass give the digits of chunks that are kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_em import Chunks, ExactPosteriorEM
from pyro_em.fitting.parts import chunked
from tests.fitting.test_chunks import _CASES, _fit, mixture

pytestmark = pytest.mark.slow

# Two forms of chunks: several of five rows, and one of four.
ROWS = 5

CASES = (
    "mixture",
    "two latents",
    "regressions",
    "factors",
    "weights",
    "holes",
    "priors",
    "by group",
)


@pytest.mark.parametrize("case", CASES)
def test_digits_are_those_of_chunks_that_are_kept(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, data, _ = _CASES[case]
    kept = _fit(case, Chunks(*data, rows=ROWS), steps=2)
    monkeypatch.setattr(chunked, "_KEPT_BYTES", 0)
    anew = _fit(case, Chunks(*data, rows=ROWS), steps=2)
    bounds = [(*r.history, *r.history.after_m_step, r.log_evidence) for r in (anew, kept)]
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-14)
    torch.testing.assert_close(anew.params, kept.params, rtol=1e-13, atol=1e-14)


def runs_of(model: Any, *data: Tensor, steps: int = 4) -> int:
    """How often a fit to chunks runs a model on chunks of the common form, after a first fit."""
    runs = 0

    def counted(*args: Tensor) -> None:
        nonlocal runs
        runs += len(args[0]) == ROWS
        model(*args)

    pyro.clear_param_store()
    em = ExactPosteriorEM(counted)
    em.fit(Chunks(*data, rows=ROWS), max_steps=1, tol=0.0, progress=False)
    before, runs = runs, 0
    em.fit(Chunks(*data, rows=ROWS), max_steps=steps, tol=0.0, progress=False)
    assert before
    return runs


def with_covariate(x: Tensor, c: Tensor) -> None:
    m, b = pyro.param("m", torch.tensor([-1.0, 1.3])), pyro.param("b", torch.tensor(0.1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5)).long()
        pyro.sample("x", dist.Normal(m[z] + b * c, 1.0), obs=x)


def of_logarithms(x: Tensor) -> None:
    m = pyro.param("m", torch.tensor([-1.0, 1.3]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5)).long()
        pyro.sample("x", dist.Normal(m[z], 1.0), obs=x.abs().log())


def with_its_own_offset(x: Tensor) -> None:
    m = pyro.param("m", torch.tensor([-1.0, 1.3]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5)).long()
        pyro.sample("x", dist.Normal(m[z] + x.abs(), 1.0), obs=x)


def test_a_model_that_observes_its_arguments_is_not_run_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunked, "_KEPT_BYTES", 0)
    x, c = torch.randn(22), torch.randn(22)
    assert runs_of(mixture, x, steps=2) == runs_of(mixture, x, steps=9)
    for model, data in (
        (with_covariate, (x, c)),
        (of_logarithms, (x,)),
        (with_its_own_offset, (x,)),
    ):
        # Four chunks of the form in each of seven passes more.
        assert runs_of(model, *data, steps=9) == runs_of(model, *data, steps=2) + 4 * 7


_PEAKS = """
import sys, numpy as np, pyro, torch
import pyro.distributions as dist
from pathlib import Path
from pyro_em import Chunks, ExactPosteriorEM

def model(x):
    m = pyro.param("m", lambda: x[:2].clone())
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5)).long()
        pyro.sample("x", dist.Normal(m[z], 1.0).to_event(1), obs=x)

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(l for l in lines if l.startswith("VmHWM")).split()[1])

def above(path):
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    pyro.clear_param_store()
    data = Chunks(np.load(path, mmap_mode="r"), rows=20_000)
    ExactPosteriorEM(model).fit(data, max_steps=2, tol=0, progress=False)
    return peak() - before

torch.set_num_threads(1)
above(sys.argv[1])
# What the first passes of a process ask of the system is not asked again.
print(*(min(above(path) for _ in range(3)) for path in sys.argv[1:]))
"""


def test_a_fit_takes_no_more_memory_where_there_are_more_rows(tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("memory is read from /proc")
    paths = []
    for rows in (300_000, 900_000):  # 10 MB and 29 MB: more than is kept
        paths.append(str(tmp_path / f"{rows}.npy"))
        np.save(paths[-1], np.random.default_rng(0).standard_normal((rows, 8), dtype=np.float32))
    command = [sys.executable, "-c", _PEAKS, *paths]
    said = subprocess.run(command, check=True, capture_output=True, timeout=100).stdout
    few, many = map(int, said.split())
    assert few < 5e7 and many < few + 2e7, (few, many)


def test_a_bar_tells_rows_per_second_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chunked, "_KEPT_BYTES", 0)
    pyro.clear_param_store()
    chunks = Chunks(torch.randn(22), rows=ROWS)
    ExactPosteriorEM(mixture).fit(chunks, max_steps=2, tol=0.0, progress=True)
    said = capsys.readouterr().err
    assert "/22.0 [" in said and " rows/s]" in said and "EM:" in said
    ExactPosteriorEM(mixture).fit(chunks, max_steps=1, tol=0.0, progress=False)
    assert "rows" not in capsys.readouterr().err
