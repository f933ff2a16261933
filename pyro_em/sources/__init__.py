"""Data larger than memory: chunks of a model's arguments, read one after the other, pass after pass.

`chunks` holds the public class and `source` what it reads from; a kind of data is a file with a
`Source`: `arrays`, `iterables`, `loaders`, `parquet`. `ahead` reads the next chunk while one is used,
`given` turns arrays and tables of users into tensors.

May import: the ground. The wing knows of no model. To add another kind of data, copy `arrays` and
choose it in `chunks`.
"""
