"""Continuous latents in EM: integrated before the E-step, with moments in the M-step.

`gaussian_components` and `conjugate_components` make of a traced graph one whose continuous latents are
integrated, block by block; `gaussian_steps` gives their evidence to the E-step and their moments to the
M-step. On sums over rows that are all alike: `collapsed` (Gaussian latents), `factor_rows` (factor
analysis) and `conjugate_rows`; on sums of tables of some rows at a time `table_rows`, whatever the
latents of a row are. `summed_theta` is the M-step that the last two share.

May import: `gaussians`, `states`, `conjugates`, `scales` and `at_values` of this wing, and what is
below the wing. To add steps on sums for another form, copy `factor_rows` and name it in
`pyro_em.plan.eligibility`.
"""
