"""Running a model: everything that touches Pyro's or torch's internals lives here.

* A run: `runs` makes it, plainly, with tagged latents (`provenance`, `mixing`, `tagged`), or with
  latents enumerated; `handlers` and `lean` change what a run does, `allocation`, `sparing`, `tables`
  and `prototypes` (a run of an autoguide) what it may spend, `stored` is what it leaves in the param
  store, `sites` what was traced.
* Parameters: `capture` hands them out, `parameters` reads and writes their values, `memory` is whose
  they are, `scopes` keep those of several starts apart, `checkpoint`, `encoding` and `files` keep them
  in files.
* What a run depends on: `names`, `dependences` (whether anything was changed since), `operations` and
  `calls` with `constructed` (whether another run does the same), `tape` (what is done to some tensors,
  done again at others).
* Densities of what was traced: `densities`, and for images `bits`, by one compiled loop (`numba_bits`)
  where there are many.
* Draws: `draws` of a model paired with its guide and of predictions, `many_draws` of many by one run.
* Models made of the user's: `given` (some latents have values), `missing` (NaN is missing),
  `long_format` (rows below the elements that they read), `vectorized` loops with `loops`, `per_step`,
  `each_step` and `step_places`.

May import: `pyro_em.errors`, `pyro_em.distributions`. To add a handler, copy a class in `handlers`;
whatever private name of Pyro or torch it needs is tested in ``tests/tracing/test_pyro_internals.py``.
"""
