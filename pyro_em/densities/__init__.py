"""Factors as rows: log densities of many data and their sums, as a few matrix products.

A group of factors is evaluated in one of four ways, the first that fits:

    linear      simplex rows, probabilities and rates of all groups as one vector (`natural`)
    Gaussian    components by products over features of the data (`gaussian`, `components`)
    regression  a Normal whose mean is affine in covariates (`regression`)
    others      the family's own density and statistics

Gaussian rows with missing entries go by their patterns (`incomplete`), or feature by feature
(`masked`). A conjugate prior on a point estimate is a constant that the sums gain (`priors`).

May import: `pyro_em.updates` and what is below it. To add a way of evaluating rows, copy `regression`
and keep the protocols of `density`.
"""
