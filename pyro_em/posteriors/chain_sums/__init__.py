"""EM steps of Gaussian chains on sums over steps, without a look at single sites.

`state_steps` is the kernel and the file to read first. `state_sites` holds once what is alike at all
steps (`state_joined` joins sites that are the same), `state_arguments` and `state_flat` are their
arguments as functions of one vector of parameters, and `state_matrices` makes the matrices of a chain
of it. In the M-step `state_sums` adds second moments up, `state_regression` solves coefficients,
`state_spreads` spreads, and `state_moments` what the first steps show; `compiled_m_step` does the same
by the loops of `numba_sums` and `numba_m_step` (`numba_loops` says how they are compiled) where all is
clearly determined, and `numba_whitening` whitens data. What follows from no datum `kept_kernels` keeps
for the next fit of the same form.

May import: `states`, `filters`, `gaussians` and `continuous` of this wing, and what is below the wing.
To add a parameter's closed form, copy one of `state_spreads`; `tests/posteriors/test_chain_sums.py`
holds steps against those on single sites.
"""
