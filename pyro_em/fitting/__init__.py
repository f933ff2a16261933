"""EM as a map, iterated: one description of a step, and one loop.

The files of this folder are calls: `fit` reads what the user passed into a `call`, which `exact_fit`,
`stochastic_fit` or `online_fit` takes (with a checkpoint: `kept_fit`, `kept_training`); `stepping` and
`partial` are steps for callers that loop by themselves. `session` is what lasts between calls, and
`keeping` what outlives a fit; `preconditions` say what cannot be fitted, `from_arrays` takes arrays and
tables, `origins` and `places` say where a fit begins and stands, `forgetting` warns where it changes
data. `report` turns a finished run into what users hold, also for data in parts (`over_parts`). Each
folder has one subject:

* EM itself: `steps`; with batches: `batches`; with data in parts: `parts`;
* what users hold: `results`; what is written while a fit goes on: `checkpoint`.

May import: `pyro_em.plan` and what is below it. To add an acceleration, copy a class of `schemes` in
`steps`.
"""
