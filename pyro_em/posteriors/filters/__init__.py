"""Kalman's filter, smoother and draws for chains of Gaussian states, in numbers alone.

`state_space` says what a chain is and what its E-step gives; `kalman` chooses who computes it:
`kalman_compiled` by the loops of `numba_kalman` (`numba_kalman_filter`, `numba_kalman_backward`,
`numba_kalman_onward`, `numba_kalman_small`; `numba_fours` has instructions for four numbers at a time)
on the arrays of `kalman_groups`, `kalman_steps` by numpy on factors of covariances (with
`kalman_arrays` and `kalman_recursions`), or `kalman_moments`, which is differentiable. Chains whose
steps are alike numpy smooths in closed form: `kalman_alike` (with `alike_lengths`, `alike_arrays`,
`alike_steady`, `alike_means`, `riccati` and `constant_scans`). `condensed` makes many numbers observed
at a step as many as a state has.

May import: nothing else of this wing, and what is below the wing. To add a way to compute, copy
`kalman_moments` and choose it in `kalman`; `tests/posteriors/test_kalman.py` holds all ways against a
dense joint.
"""
