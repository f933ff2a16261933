"""EM as a map, iterated: one description of a step, and one loop.

`em_map` says what an EM step is, by running the model or on sums over data (`em_on_sums`); `loop`
iterates it until `stopping` says so, `cycles` extrapolate along it by one of the `schemes`. `starts` is
one start from its first parameters to its end, `restarts` are all of them; `report` turns a finished
run into the `result.EMResult` that users hold. `epochs` are stochastic fits, `online` fits on sums that
are kept from batch to batch. `fit` and `stepping` are the methods of `ExactPosteriorEM` that move
parameters, `session` is its state.

May import: `pyro_em.plan` and what is below it. To add an acceleration, copy a class of `schemes`.
"""
