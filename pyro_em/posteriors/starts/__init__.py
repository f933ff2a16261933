"""Where a fit begins: assignments of the latents, from which an M-step makes parameters.

`assignments` draws or guesses them; `vectors` finds the observed vectors of a latent's rows, and
`clusters` puts these into clusters.

May import: `elimination`, `enumeration` and `answers` of this wing, and what is below the wing. To add
a way to begin, copy one of `assignments`.
"""
