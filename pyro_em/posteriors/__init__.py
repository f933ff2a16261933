"""Blocks of latents: their exact posterior, their log evidence and their sums over data.

`block` is the protocol; `contraction` eliminates the latents of any plated factor graph, and is the
oracle of all others. The files of this folder serve every model; each folder has one subject, and says
in a few lines which of its files to read first:

* the blocks of any graph: `block`, `quick` (what kernels share), `elimination`, `contraction`,
  `contracted`, `enumeration`; `arrangement` finds which block serves which component of latents,
  `independent` sets these side by side, `at_values` are steps on sums at parameter values;
* discrete latents: `mixtures` (of rows), `chains`, and the `messages` that chains send;
* Gaussian latents: `gaussians`, and those that follow each other: `states`, solved by `filters`,
  learned by `chain_sums`;
* conjugate latents: `conjugates`; and Gaussian ones whose scale is one of these: `scales`;
* continuous latents of either kind in E-steps and M-steps: `continuous`;
* what users ask: `answers`; how such a posterior comes about: `exact`, `sampling`, of many rows
  `table_posterior`, their evidence alone `table_evidence`; other E-steps than the exact one:
  `strategies`; where fits begin: `starts`.

May import: `pyro_em.densities` and what is below it. To add a block, copy `mixtures`, keep the protocol
of `block`, add it to the list in `pyro_em.plan.eligibility`, and let `pyro_em.testing.check_block`
judge it.
"""
