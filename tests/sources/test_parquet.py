"""Columns of Parquet files, against the tables that were written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyro_em import Chunks, DataError, FileError, UsageError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def written(folder: Path, name: str, columns: dict[str, Any], row_group: int = 4) -> Path:
    pq.write_table(pa.table(columns), folder / name, row_group_size=row_group)
    return folder / name


def columns(rows: int, seed: int) -> dict[str, Any]:
    r = np.random.default_rng(seed)
    return {
        "a": r.normal(size=rows).astype(np.float32),
        "b": r.normal(size=rows).astype(np.float32),
        "n": r.integers(0, 2**16, rows).astype(np.uint16),
        "seen": r.random(rows) < 0.5,
        "text": [f"row {i}" for i in range(rows)],
    }


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "a.parquet", columns(3, 0))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Chunks.parquet("~/a.parquet", ["a"]).total == 3


def test_chunks_go_across_row_groups_and_files(tmp_path: Path) -> None:
    tables = [columns(rows, rows) for rows in (11, 3, 9)]
    paths = [written(tmp_path, f"{i}.parquet", t) for i, t in enumerate(tables)]
    whole = {k: np.concatenate([t[k] for t in tables]) for k in ("a", "b", "n", "seen")}
    for given in (paths, tmp_path, [tmp_path]):
        chunks = Chunks.parquet(given, [["a", "b"], "n", "seen", ["b"]], rows=5)
        assert chunks.total == 23 and [c.begin for c in chunks.read()] == [0, 5, 10, 15, 20]
        read = [torch.cat(a).numpy() for a in zip(*(c.args for c in chunks.read()), strict=True)]
        assert [str(a.dtype) for a in read] == ["float32", "int32", "bool", "float32"]
        assert np.array_equal(read[0], np.stack([whole["a"], whole["b"]], 1))
        assert np.array_equal(read[1], whole["n"]) and np.array_equal(read[2], whole["seen"])
        assert np.array_equal(read[3], whole["b"][:, None])
    assert "float32 (2,), int32 ()" in repr(chunks)
    one = Chunks.parquet(str(paths[0]), "a")
    assert next(one.read()).args[0].shape == (11,)
    in_memory = Chunks(*(torch.from_numpy(a.copy()) for a in read), rows=5)
    assert chunks.form() == in_memory.form()


def test_nulls_are_nan_where_there_is_one(tmp_path: Path) -> None:
    data = {"x": pa.array([1.0, None, 3.0]), "n": pa.array([1, 2, None]), "m": [1, 2, 3]}
    path = written(tmp_path, "x.parquet", data, row_group=2)
    x = next(Chunks.parquet(path, ["x"]).read()).args[0]
    assert torch.isnan(x).tolist() == [False, True, False] and x[2] == 3
    # Beside a floating-point column integers are floating-point, and may be missing.
    beside = next(Chunks.parquet(path, [["x", "n"]]).read()).args[0]
    assert torch.isnan(beside).tolist() == [[False, False], [True, False], [False, True]]
    with pytest.raises(DataError, match=r"chunk 2, file .*column 'n' has a null in row 2"):
        list(Chunks.parquet(path, ["m", "n"], rows=2).read())


def test_lists_of_one_length_and_decimals_are_numbers(tmp_path: Path) -> None:
    pairs = pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], pa.list_(pa.float32(), 2))
    price = pa.array([1, 2, 3], pa.decimal128(8, 2))
    path = written(tmp_path, "x.parquet", {"pairs": pairs, "price": price}, row_group=2)
    first, last = Chunks.parquet(path, ["pairs", "price"], rows=2).read()
    assert first.args[0].tolist() == [[1, 2], [3, 4]] and last.args[0].tolist() == [[5, 6]]
    assert first.args[1].dtype == torch.float64 and first.args[1].tolist() == [1, 2]
    with pytest.raises(DataError, match="column 'pairs' holds lists"):
        Chunks.parquet(path, [["pairs", "price"]])


def test_what_is_no_column_of_numbers_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "x.parquet", columns(3, 0))
    with pytest.raises(UsageError, match=r"no column 'c'.\n.*its columns are 'a', 'b'"):
        Chunks.parquet(path, ["c"])
    with pytest.raises(DataError, match="column 'text' holds string"):
        Chunks.parquet(path, ["text"])
    for bad in (None, [], [3], [["a", 3]], [[]]):
        with pytest.raises(UsageError, match="neither a column's name nor a list"):
            Chunks.parquet(path, bad)
    with pytest.raises(FileError, match="cannot be read"):
        Chunks.parquet(tmp_path / "other.parquet", ["a"])
    (tmp_path / "not.parquet").write_bytes(b"12345678901234567890")
    with pytest.raises(FileError, match="cannot be read as a Parquet file"):
        Chunks.parquet(tmp_path / "not.parquet", ["a"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="holds no file"):
        Chunks.parquet(tmp_path / "empty", ["a"])
    with pytest.raises(UsageError, match="neither a path nor a list"):
        Chunks.parquet(3, ["a"])
    with pytest.raises(DataError, match="there are no rows"):
        Chunks.parquet(written(tmp_path, "none.parquet", columns(0, 0)), ["a"])


_PEAK = """
import sys
from pyro_em import Chunks

def resident():
    return int(open('/proc/self/statm').read().split()[1]) * 4096

def peak(path):
    chunks = Chunks.parquet(path, [['a', 'b']], rows=20_000)
    return max(resident() for chunk in chunks.read())

small, large = map(peak, sys.argv[1:])
print(large - small)
"""


@pytest.mark.slow
def test_one_large_row_group_is_read_in_parts(tmp_path: Path) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("memory is read from /proc")
    command = [sys.executable, "-c", _PEAK]
    for rows in (100_000, 3_000_000):  # the larger one has 48 MB in one row group
        values = np.random.default_rng(0).normal(size=rows)
        data = {"a": values, "b": values}
        command.append(str(written(tmp_path, f"{rows}.parquet", data, row_group=rows)))
    more = int(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    assert more < 1.5e7, more
