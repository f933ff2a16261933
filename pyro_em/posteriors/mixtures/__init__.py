"""Blocks of latents of the rows of a plate: mixtures, with one latent or several for each row.

`mixture` is the kernel and the file to read first. `rows` recognises such a graph and counts rows that
are equal (`equal_rows`), `row_factors` holds the factors that rows read, `labels` what is seen of their
latents, `responsibilities` the posterior of the cells, and `per_row` the evidence of each row by
itself; `few_rows` is the E-step of few rows in as few operations, and `kept_mixtures` keeps what was
decided for later data. With several latents in a row `product_states` makes them one state, which
`product_rows` sums. Where a known group of each row chooses parameters, `row_groups` finds the groups,
and `grouped_rows` is the kernel.

May import: `block`, `quick` and `contraction` of this wing, and what is below the wing. To add a kernel
of rows, copy `product_rows` and enter it in the list of `pyro_em.plan.eligibility`.
"""
