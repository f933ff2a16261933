"""Yields of dyestuff: six batches of five samples, and a second set made after them."""

from __future__ import annotations

import torch

# Davies (1949), in grams of standard colour; the second set is that of Box and Tiao (1973).
FIRST = torch.tensor(
    [
        [1545, 1440, 1440, 1520, 1580],
        [1540, 1555, 1490, 1560, 1495],
        [1595, 1550, 1605, 1510, 1560],
        [1445, 1440, 1595, 1465, 1545],
        [1595, 1630, 1515, 1635, 1625],
        [1520, 1455, 1450, 1480, 1445],
    ],
    dtype=torch.float64,
).reshape(-1)
SECOND = torch.tensor(
    [
        [7.298, 3.846, 2.434, 9.566, 7.990],
        [5.220, 6.556, 0.608, 11.788, -0.892],
        [0.110, 10.386, 13.434, 5.510, 8.166],
        [2.212, 4.852, 7.092, 9.288, 4.980],
        [0.282, 9.014, 4.458, 9.446, 7.198],
        [1.722, 4.782, 8.106, 0.758, 3.758],
    ],
    dtype=torch.float64,
).reshape(-1)
BATCH = torch.arange(6).repeat_interleave(5)
