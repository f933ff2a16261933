"""Factors as rows: log densities of many data and their sums, as a few matrix products.

A group of factors is evaluated in one of these ways, the first that fits (`layout`, `rules`):

    linear       simplex rows, probabilities and rates of all groups as one vector (`natural`,
                 `linear`), the features of rows as one product (`row_features`)
    regressions  arguments that are affine in covariates: Normals (`regression`, `vector_regression`),
                 predictors of other families (`predicted`), those with a dispersion (`dispersed`)
    medians      Laplace components, whose M-step reads the data in their order (`medians`)
    components   arguments that differ between components only: `gaussian` (its own M-step `components`,
                 of few numbers `small_components`), also with missing entries by
                 their patterns (`incomplete`) or feature by feature (`masked`), `counts` (out of trials
                 of each row `trials`), `student`,
                 `student_vectors`, `weibull`, other exponential families (`exponential`)
    others       the family's own density and statistics (`theta`)

`theta` holds the parameters of all of them, in the form in which an E-step reads them. A conjugate
prior on a point estimate is a constant that the sums gain (`priors`). `compiled` and `numba_rows` are
loops.

May import: `pyro_em.updates` and what is below it. To add a way of evaluating rows, copy `regression`
(an entry in `layout`) or `weibull` (an entry in `rules`), and keep the protocols of `density`.
"""
