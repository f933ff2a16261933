"""Gaussian latents whose spreads are all multiples of one conjugate latent, solved with it.

`scaled` is the block and `scaled_chain` the same of a chain; `scaled_components` finds which latents
are so, with a proof, and `scaled_gaussian` answers what is asked of them: Student-t marginals.

May import: `conjugates`, `gaussians` and `states` of this wing, and what is below the wing. To add
another block with a common scale, copy `scaled_chain`.
"""
