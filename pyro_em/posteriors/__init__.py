"""Blocks of latents: their exact posterior, their log evidence and their sums over data.

`block` is the protocol; `contraction` eliminates the latents of any plated factor graph, and is the
oracle of all others. `arrangement` finds which block serves which component of latents, `independent`
sets these side by side. The files by subject, each beginning with the one to read first:

* all blocks: `block`, `quick`, `elimination`, `contracted`, `contraction`, `enumeration`, `exact`,
  `independent`, `at_values` (steps on sums at parameter values);
* rows, a latent or several for each: `mixture`, `rows`, `row_factors`, `responsibilities`, `per_row`,
  `product_rows`, `product_states`;
* chains of discrete states: `chain` (homogeneous), `forward_backward`, `step_chain` (states that are
  products, or moves that change), `step_shape`, `moves`, `smooth_moves`, `viterbi`, `varying`,
  `sequence_block`; `numba_…` are their compiled loops;
* Gaussian latents: `gaussian`, `gaussian_components` (from a graph), `site_forms`, `gaussian_layout`,
  `block_factors`, `linear_gaussian` (the solution), `gaussian_steps` (in E-steps and M-steps); on sums
  over rows `collapsed` and `factor_rows`;
* Gaussian latents that follow each other: `gaussian_chain`, `state_form` (which state each belongs
  to), `state_building` and `state_series` (alike steps, stacked), `state_numbers`, `kalman` with one
  file for each way to compute it, `state_solution`; on sums over steps `state_steps` and its
  `state_…`;
* conjugate latents: `conjugate`, `conjugate_components` (from a graph), `conjugate_solution`,
  `stacked_conjugates`, `shared_conjugates` (outside the rows of parts); on sums over rows
  `conjugate_rows`; `scaled…`, where they are the scale of Gaussian ones;
* what users ask: `posterior`, `protocol`, `discrete_faces`, `gaussian_faces`, `conjugate_faces`,
  `series_faces`, `names`, `sampling`, `data_steps`, `so_far`, `predicted_sites`, `prediction_errors`;
* where fits begin, and other E-steps: `assignments`, `clusters`, `vectors`, `strategies`.

May import: `pyro_em.densities` and what is below it. To add a block, copy `mixture`, keep the protocol
of `block`, add it to the list in `pyro_em.plan.eligibility`, and let `pyro_em.testing.check_block`
judge it.
"""
