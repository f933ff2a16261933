"""What an M-step knows of the data: expected sufficient statistics, as values.

`statistics` is the one sum over data, additive. In place of values of latents stand `beliefs`
(Gaussian: `gaussian_rows`, `linear_moments`, and `noiseless` coordinates) and `conjugate_beliefs`;
`scatter` brings sums from the cells of an argument onto the elements of a parameter.

May import: `pyro_em.graph` and what is below it. To let another latent have moments, copy
`conjugate_beliefs`.
"""
