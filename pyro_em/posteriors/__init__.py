"""Blocks of latents: their exact posterior, their log evidence and their sums over data.

`contraction` eliminates the latents of any plated factor graph and is the oracle of the special
blocks: `mixture` (one latent per row, in chunks of `rows`) and `chain` (forward and backward messages).
`independent` sets them side by side where components of latents share no factor; `arrangement` asks
which serves which.
`gaussian` solves linear-Gaussian latents: of sites that are like `site_forms`, `gaussian_layout`
says where their numbers lie, `block_factors` makes the matrices of `site_rows`, and
`linear_gaussian` is the solution; `gaussian_components` puts them into a graph, `collapsed` and
`factor_rows` take their steps on sums. `gaussian_chain` is the block of those that follow each
other: `state_form` finds which state each belongs to, `state_building` and `state_series` stack
alike steps, `state_numbers` makes the matrices, `kalman` solves.
`posterior` is what users hold; `discrete_faces`,
`gaussian_faces` and `series_faces` answer.

May import: `pyro_em.densities` and what is below it. To add a block, copy `mixture`, keep the protocol
of `block`, add it to the list in `pyro_em.plan.eligibility`, and let `pyro_em.testing.check_block`
judge it.
"""
