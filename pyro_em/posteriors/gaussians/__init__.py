"""Gaussian latents and all sites that they connect, solved together.

`gaussian` is the block: one group of the graph stands for the latents and their sites, which
`gaussian_sites` takes from a traced group and `site_forms` describes. `block_search` finds which
unknowns belong together and `gaussian_layout` where their numbers lie; `site_rows`, `flat_reads`,
`block_factors` and `square_root` make the matrices that `linear_gaussian` solves, on `coordinates` that
may be missing. Large blocks that fall apart without a few latents are solved piece by piece:
`leaf_search` finds the pieces, `leaf_layout` lays them out (`block_places`, `block_laying`),
`leaf_factors` eliminates them, and `joint_factor` is the factor of all unknowns. `own_rows` tells
whether each of many rows has latents of its own, and `row_slices` takes such a block some rows at a
time. `integrated` is what is known of latents afterwards;
`gaussian_product` is what a user gives in its place.

May import: nothing else of this wing, and what is below the wing. To add another way to solve, copy
`linear_gaussian` and keep what `integrated` asks; `tests/posteriors/test_linear_gaussian.py` holds it
against a dense joint.
"""
