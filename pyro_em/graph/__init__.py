"""From the runs of a model to its factor graph.

`examination` finds the `structure` of a model (plates, latents, observed sites) with the findings of
`checks` and `value_checks`; `failures` says what to do where the model raises; `trace` brings an
enumerated run into the compact layout of `layout`, as the groups of `factors`; `autograd` reads from
the gradient graph how parameters reach each argument (`binding`), `read_lines` how Gaussian latents
enter means (`lines`). `parting` takes a graph apart.

May import: `pyro_em.tracing`, `pyro_em.families` and the ground. To add a finding about models or data,
copy a function of `checks`; to recognise another way in which a parameter reaches an argument, see
`autograd`.
"""
