"""Latent rates, probabilities, simplexes and spreads whose posterior has their prior's form.

`conjugate` is the block: a latent and all sites that read it. `conjugate_solution` is the posterior by
its hyperparameters; `conjugate_cells` and `conjugate_elements` find which element reads which data.
`stacked_conjugates` solves latents that are alike together, `shared_conjugates` those outside the rows
of data that come in parts, `conjugate_slices` reads some rows at a time and `conjugate_totals` adds
them up. `conjugate_given` is what a user gives in a posterior's place.

May import: `gaussians` of this wing, and what is below the wing. To add a pair of prior and child, see
`pyro_em.families`; to add sums over many latents in few numbers, copy a class of `conjugate_totals`.
"""
