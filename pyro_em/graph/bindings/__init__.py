"""How parameters reach an argument of a distribution, so that steps need no run of the model.

A `binding` is the value; `autograd` finds it, by the nodes of the gradient graph (`nodes`, `reached`,
`named_leaves`): `selections` of elements (`by_row` holds what a known group of each row chooses),
`affine`, `log_affine` and `bilinear` arguments, `products` that make covariances, `composites` of
several parameters (each an `expression`). What is made of parameters alone by other operations is
`computed`: `graph/computed_arguments.py` finds it. `jacobian`, `factored`, `linearity` and
`sparse_lines` read derivatives with few vectors. `useful` says which bindings have an update;
`signatures` recalls those of one form, and `shared_distributions` has equal distributions held once.

May import: the ground, and `forms`, `compact` and `checks` of this wing. To recognise another way, copy
`bilinear` and enter it in `autograd`.
"""
