"""What a fit returns, and what describes it.

`result` is what users hold (in words: `result_in_words`), with its `history` and the `ends` of its
starts. `summary` is its `table` (a pandas `frame` where that is installed), with `labels`, `intervals`
and `standard_errors` from the `information` (`derivatives`, `free_directions`; draws: `asymptotic`).
`criteria` count parameters and rows for `information_criteria` (`possible` says which values the
weights of discrete latents allow); what is out of the ordinary is said by `boundaries` and
`identified`. `inference_data` is the same for ArviZ.

May import: nothing else of this wing, and what is below the wing. To add a criterion, copy one of
`information_criteria`.
"""
