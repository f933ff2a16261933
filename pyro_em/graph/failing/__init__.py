"""What to say where a model raises: from torch's and Pyro's words to the place and the remedy.

`failures` is the file to read first. `blame` finds where in a user's code it happened, and which
tensors it is about; `failing_index` and `failing_values` know the usual mistakes, and `failing_words`
names tensors by sites and arguments.

May import: the ground. To explain another mistake, copy a function of `failing_values`.
"""
