"""EM as a map, iterated: one description of a step, and one loop.

* A call: `fit` reads what the user passed into a `call`, which `exact_fit`, `stochastic_fit` or
  `online_fit` takes; `stepping` and `partial` are steps for callers that loop by themselves, `session`
  is what lasts between calls, `preconditions` say what cannot be fitted.
* EM: `em_map` says what a step is, by running the model or on sums over data (`em_on_sums`), at a
  `point`; `guarded` is where one hands over to the other, `verified_steps` holds both against the
  model. `loop` iterates until `stopping` says so, `cycles` extrapolate along it by one of the
  `schemes`. `starts` is one start from its first parameters (`beginnings`) to its end, `restarts` are
  all of them.
* Batches: `epochs` of a stochastic fit, `online` steps on sums that are kept from batch to batch.
* Data in parts: `chunked` and `chunk_by_chunk`, `within_budget`, processes of a group (`joining`,
  `shards`); `parted` is what the parts have in common, `by_parts` takes its steps.
* Files: `checkpoints` open what `keeper`, `online_keeper` and `stochastic_keeper` write; `resuming`
  and `fingerprints` say where a fit stands and which one it is; `keeping` saves fitted parameters.
* What users hold: `report` turns a finished run into a `result`, with its `history`, `summary`,
  `criteria`, `standard_errors`, `intervals` and what is out of the ordinary (`boundaries`,
  `identified`).

May import: `pyro_em.plan` and what is below it. To add an acceleration, copy a class of `schemes`.
"""
