"""Blocks of Gaussian latents that follow each other, solved by `filters`.

`gaussian_chain` is the block. `state_form` finds which state each latent belongs to; `state_building`
makes a chain of a loop's sites and `state_series` of sites over indices, with `steps_of_plates` for
plates that read a step each. `state_layout` (kept by `kept_layouts`) says where numbers lie,
`state_numbers` makes the matrices, and `state_solution` answers what E-step and M-step ask.

May import: `gaussians` and `filters` of this wing, and what is below the wing. To recognise another
form of chain, copy `state_series`; `tests/posteriors/test_gaussian_chains.py` holds it against a dense
joint.
"""
