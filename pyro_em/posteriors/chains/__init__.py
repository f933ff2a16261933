"""Blocks of discrete chains: their evidence and their sums, by the messages of `messages`.

`chain` is the kernel of homogeneous chains, whose graph `chain_shape` recognises; `step_chain` that of
chains whose states are products or whose moves change, with the groups that read two states in
`step_couples`. Both are a `sequence_block`: the groups that read the state of one step are in
`step_groups`, or in `symbols` where a chain shows nothing else, the sequences each by itself in
`per_sequence`, and their weights in `chain_weights`.

May import: `messages`, `block`, `quick` and `contracted` of this wing, and what is below the wing. To
add a kernel, copy `step_chain` and enter it in the list of `pyro_em.plan.eligibility`.
"""
