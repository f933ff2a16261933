"""Chains of random forms over index tensors against the same chains as loops."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from torch import Tensor

from pyro_em import ExactPosteriorEM
from tests.graph.vectorized_models import LOOPS, Loop, data, real, simplex

FORMS = st.fixed_dictionaries(
    {
        "size": st.integers(1, 6),
        "rows": st.integers(1, 4),
        "states": st.integers(1, 3),
        "history": st.integers(0, 2),
        "steps_last": st.booleans(),
        "by_index": st.booleans(),
        "tones": st.integers(0, 3),
        "moving": st.booleans(),
        "start": st.booleans(),
        "before": st.booleans(),
        "inside": st.booleans(),
        "level": st.sampled_from(["none", "season", "trend", "rows", "rows and steps"]),
        "mask": st.sampled_from(["none", "lengths", "seen", "below"]),
    }
)


def chain(loop: Loop, x: Tensor, form: dict[str, Any]) -> None:
    size, rows, K, h, tones = (form[n] for n in ("size", "rows", "states", "history", "tones"))
    A = simplex("A", *(size,) * form["moving"], *(K,) * (h + 1))
    pi, mu = simplex("pi", K), real("mu", K, *(tones,) * bool(tones))
    seen = (torch.arange(size)[:, None] * 3 + torch.arange(rows)) % 4 != 1
    lengths = (torch.arange(rows) * 2 + 1) % (size + 1)
    season, of_rows = data(3, seed=2), data(rows, seed=4)
    past: list[Any] = [torch.tensor(0)] * h

    def beside(value: Tensor) -> Tensor:
        return value.unsqueeze(-1) if tones else value

    def read(t: Any) -> Tensor:
        if not form["steps_last"]:
            return x[t]
        return x[torch.arange(rows), t] if form["by_index"] else x[:, t]

    def step(t: Any) -> None:
        nonlocal past
        index = ((t,) if form["moving"] else ()) + tuple(past)
        probs = pi if form["start"] and t == 0 else A[index] if index else A
        with ExitStack() as around:
            if form["mask"] == "lengths":
                around.enter_context(poutine.mask(mask=beside(t < lengths)))
            z = pyro.sample(f"z_{t}", dist.Categorical(probs))
            past = [*past[1:], z] if h else []
            level: Any = {
                "none": lambda: 0.0,
                "season": lambda: season[t % 3],
                "trend": lambda: 0.1 * t,
                "rows": lambda: beside(of_rows),
                "rows and steps": lambda: beside(seen[t] * 0.5),
            }[form["level"]]()
            if form["before"]:
                level = level + (x[:, t - 1] if form["steps_last"] else x[t - 1])
            if form["mask"] == "seen":
                around.enter_context(poutine.mask(mask=beside(seen[t])))
            k: Any = ()
            if tones:
                k = (around.enter_context(tone),)
            fn = dist.Normal(mu[(z, *k)] + level, 1.0)
            if form["mask"] == "below":
                fn = fn.mask(beside(seen[t]))
            pyro.sample(f"x_{t}", fn, obs=read(t))

    tone = pyro.plate("tones", max(tones, 1), dim=-1)
    plate = pyro.plate("rows", rows, dim=-2 if tones else -1)
    if form["inside"]:
        for t in loop("time", size, history=h):
            with plate:
                step(t)
    else:
        with plate:
            for t in loop("time", size, history=h):
                step(t)


@settings(max_examples=8, deadline=None)
@given(form=FORMS, seed=st.integers(0, 99))
def test_any_form_is_the_same_as_a_loop(form: dict[str, Any], seed: int) -> None:
    shape = [form["size"], form["rows"]][:: -1 if form["steps_last"] else 1]
    x = data(*shape, *([form["tones"]] if form["tones"] else []), seed=seed)
    found = []
    for loop in LOOPS.values():
        pyro.clear_param_store()
        em = ExactPosteriorEM(lambda x, loop=loop: chain(loop, x, form))
        q = em.posterior(x)
        loss = em.step(x)
        params = {n: v.detach().clone() for n, v in pyro.get_param_store().items()}
        found.append((q, loss, params))
    (ours, loss, params), (theirs, loss_of_loop, params_of_loop) = found
    assert ours.log_evidence == pytest.approx(theirs.log_evidence, rel=1e-9, abs=1e-9)
    assert loss == pytest.approx(loss_of_loop, rel=1e-9, abs=1e-9)
    assert list(ours.graph.latents) == list(theirs.graph.latents)
    for z in theirs.graph.latents:
        torch.testing.assert_close(ours.probs(z), theirs.probs(z), rtol=1e-8, atol=1e-10)
    for name, value in params_of_loop.items():
        torch.testing.assert_close(params[name], value, rtol=1e-7, atol=1e-9)
