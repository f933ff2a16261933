"""Public data used by several tests."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent


def faithful() -> Tensor:
    with open(ROOT / "models" / "data" / "old_faithful.csv") as file:
        rows = list(csv.reader(file))[1:]
    return torch.tensor([[float(v) for v in row] for row in rows])


def iris() -> Tensor:
    from sklearn.datasets import load_iris

    return torch.tensor(load_iris().data, dtype=torch.get_default_dtype())


def patterns(text: str) -> Tensor:
    rows = []
    for item in text.split():
        pattern, count = item.split(":")
        rows += [[float(c) for c in pattern]] * int(count)
    return torch.tensor(rows)


CARCINOMA = (
    "0000000:34 0000100:2 0100000:6 0100001:1 0100100:4 0100101:5 1000000:2 1010101:1 1100000:2 "
    "1100001:1 1100100:2 1100101:7 1100111:1 1101001:1 1101101:2 1101111:3 1110101:13 1110111:5 "
    "1111101:10 1111111:16"
)
VALUES = (
    "0000:20 0001:2 0010:9 0011:2 0100:6 0101:1 0110:4 0111:1 1000:38 1001:7 1010:24 1011:6 "
    "1100:25 1101:6 1110:23 1111:42"
)
_EARTHQUAKES = (
    "13 14 8 10 16 26 32 27 18 32 36 24 22 23 22 18 25 21 21 14 8 11 14 23 18 17 19 20 22 19 13 26 "
    "13 14 22 24 21 22 26 21 23 24 27 41 31 27 35 26 28 36 39 21 17 22 17 19 15 34 10 15 22 18 15 "
    "20 15 22 19 16 30 27 29 23 20 16 21 21 25 16 18 15 18 14 10 15 8 15 6 11 8 7 18 16 13 12 13 20 "
    "15 16 12 18 15 16 13 15 16 11 11"
)
EARTHQUAKES = torch.tensor([float(v) for v in _EARTHQUAKES.split()])
LONDON_COUNTS = torch.tensor([162.0, 267, 271, 185, 111, 61, 27, 8, 3, 1])
