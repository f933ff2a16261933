"""Fits whose steps see a batch of the data: stochastic ones, and EM on running sums.

`epochs` are those of a stochastic fit, a `stochastic_run` kept by `stochastic_keeper`. `online` makes
an M-step after each batch (`online_steps`) on sums that stand for all rows (`online_sums`), kept by
`online_keeper`.

May import: `steps`, `checkpoint` and `places` of this wing, and what is below the wing. To weigh
batches in another way, copy a class of `online_sums`.
"""
