"""Parameters without a closed form: gradient steps on the expected log joint, and optimisers.

`gradient` climbs by `lbfgs`, whose loss is a `kept_loss` from `replays` of densities rather than runs
of the model, and leaves bounds where the slope vanishes (`saturated`). `optimizers` are those of
stochastic steps.

May import: `update` and `unbounded` of this wing. To take another optimiser, see `optimizers`.
"""
