"""How conjugate latents enter the sites that read them, from runs of a model at values of these.

`conjugate_record` is what was found and `conjugate_reads` finds it, in a `conjugate_model`: latents as
they are, `shares` (a probability or one minus it) and `powers` times a factor. `conjugate_checks` holds
it against numbers; `conjugates_by_rows` reads some rows at a time.

May import: `bindings`, `layout`, `many_rows` and what they need of this wing. To read another function
of a latent, copy `shares`.
"""
