"""EM steps, and the loop that iterates them.

`em_map` says what a step is, by running the model or on sums over data (`em_on_sums`; `by_parts` and
`parted` where data come in parts), at a `point`; `guarded` is where the quick one hands over to the
sound one, and `verified_steps` holds both against the model. `loop` makes a `run` until `stopping` says
so; `cycles` extrapolate along it by one of the `schemes`, in `coordinates`. `starts` is one start from
its first parameters (`beginnings`, `symmetric` where nothing tells components apart) to its end,
`restarts` are all of them by a `search`, and `resuming` goes on where a run stood. `progress` shows it.

May import: `results`, `preconditions` and `places` of this wing, and what is below the wing. To add an
acceleration, copy a class of `schemes`.
"""
