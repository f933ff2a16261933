"""Loops over index tensors: read by a few of their steps, laid out for all.

`series` goes from what a loop showed to the steps that it stands for, `stepwise` holds index tensors
against integers, `latent_series` are the latents of loops as one mapping, and `unrolled` makes the
factors of all steps from those of a template.

May import: `structure`, `factors`, `stacking` and what they need of this wing. To lay out another form
of loop, begin at `unrolled`.
"""
