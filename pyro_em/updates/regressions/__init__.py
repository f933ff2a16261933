"""Coefficients: least squares, generalised linear models, and loadings of Gaussian latents.

`least_squares` solves for means that are affine in parameters (`designs`; several responses:
`vector_lines`; with Gaussian latents `gaussian_lines`, `separate_lines`, and on sums `line_sums` with
`line_bindings`), by `pseudo_inverse` where data do not determine all. `coefficients` of linear
`predictors` are climbed by `newton` on a `curved` function (on sums: `curves`), along all directions
but `idle` ones, together with a dispersion where groups are `dispersed` or `mixed`.
`coefficient_priors` are priors of either; `expansion` and `shift` make EM with Gaussian latents
quicker.

May import: `update`, `expectations` and `closed_forms` of this wing. To add a link or a family with a
dispersion, see `pyro_em.densities`; to add another regression, copy `coefficients`.
"""
