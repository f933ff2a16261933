"""How Gaussian latents enter the means of sites: loc = b(θ) + Σ C(θ) h, read from runs of the model.

`lines` is the value and `read_lines` reads it: `means` of sites with latents at random values,
`jacobians` in each latent, `collected` where one row reads many latents of a series. `lines_by_rows`
reads large data from a few rows and holds the lines to all of them. `predictions` compares what lines
give with what a run has. `drawn_lines` reads at one draw of the other latents, `kept_lines` asks
whether lines that were read on other data still hold, and `culprits` says which latents keep a model
from being linear.

May import: `bindings`, `layout` and what it needs of this wing. To read another form, copy `collected`.
"""
