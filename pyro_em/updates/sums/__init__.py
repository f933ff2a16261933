"""Sums over the rows of a model, for M-steps on parts of the data and on batches.

`data_sums` are what an M-step asks of one part of the data. `summable` says which groups of a graph add
up in sums of one size (`differing` where rows differ), `model_sums` are these and `running_sums` the
M-step from them; `summed_objective` and `parted_objective` are expected log densities over parts, and
`newton_on_sums` climbs them for densities in linear form (`parted_problem` where each part has cells of
its own). `climb_on_sums` climbs what has no closed form.

May import: `decisions`, `expectations` and the solvers of this wing. To add up another kind of group,
copy a case of `model_sums`.
"""
