"""What users ask of a posterior: marginals, moments, joints, draws, filters, predictions.

`posterior` is the class that users hold and `protocol` what every posterior answers. It asks, for each
kind of latent, `discrete_faces`, `gaussian_faces` (one latent: `gaussian_site`; many steps:
`site_runs`; what nothing depends on: `later_faces`) and `conjugate_faces`, and `series_faces` for
series of steps. `names` finds latents by name and glob (as tables: `stacks`), `observed_in_part` those
that a mask observes, and `refusals` words what a latent cannot answer. Discrete latents: `crossed`
plates, `chain_paths` for draws, `row_faces` for many rows, `product` and `regrouped` for posteriors
laid out otherwise. What was known at a step: `data_steps`, `so_far`, `state_filter`. Predictions of
data: `predicted_sites`, `gaussian_predictions` with `normal_mixtures`, and `one_step` for
`prediction_errors`.

May import: all blocks of this wing, and what is below the wing. To add a question, copy a method of the
kind of latent that it is about and give `posterior` a method of the same name.
"""
