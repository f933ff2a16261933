"""What two cheap runs of a model say before anything is enumerated: its structure, and all findings.

`examination` is the file to read first: `first_run` runs the model with the `initial` parameters,
`site_findings` goes through the sites one after the other, with `value_checks` of numbers, `possible`
ones and `readable` and `missing_inputs` for data; sites of one form are told once (`alike`). Latents
that need no guide are found by `marginals`, who reads whom beyond tags by `held_latents`, what a model
does beside its sites by `side_effects`, and `agreement` holds enumerated runs against plain ones, for
`another_model` to refuse what differs.
A run that is over is `folded`.

May import: `failing`, `structure` and what it needs of this wing, and the ground. To add a finding
about numbers, copy a function of `value_checks`.
"""
