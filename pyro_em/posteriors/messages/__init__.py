"""Messages along the steps of discrete chains: functions from tensors to tensors.

`steps` chooses the way for a chain of any kind and is the one to read first. `forward_backward`
smooths homogeneous chains, `varying` those whose transitions change from step to step, `forward`
filters, and `viterbi` finds the most probable path. Where a state is a product of several latents,
`step_shape` says what it holds, `moves` how messages go from step to step, `smooth_moves` smooths,
`log_stages` does so in logarithms, and `product_steps` goes through tables of all cells. The files
`numba_chain`, `numba_filter`, `numba_moves` and `numba_paths` are the compiled loops of these.

May import: `contraction` and `elimination` of this wing, and what is below the wing. To add a way to
smooth, copy `varying` and choose it in `steps`; `tests/posteriors/test_steps.py` holds all ways against
tables of whole chains.
"""
