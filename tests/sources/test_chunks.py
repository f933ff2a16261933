"""Chunks of arrays and of iterables: what is read, how far ahead, and what is refused."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from pyro_em import Chunks, DataError, FileError, UsageError


def together(chunks: Chunks, i: int = 0) -> torch.Tensor:
    return torch.cat([chunk.args[i] for chunk in chunks.read()])


def test_arrays_are_read_row_by_row_as_copies(tmp_path: Path) -> None:
    mapped = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (7, 2))
    mapped[:] = np.arange(14).reshape(7, 2)
    wide = torch.arange(28.0, dtype=torch.bfloat16).reshape(7, 4)[:, ::2].requires_grad_()
    is_seen, counts = np.arange(7) % 2 == 0, np.arange(7, dtype=">u2")
    chunks = Chunks(mapped, wide, is_seen, counts, rows=3)
    assert chunks.total == 7 and [(c.begin, c.rows) for c in chunks.read()] == [
        (0, 3),
        (3, 3),
        (6, 1),
    ]
    kinds = [a.dtype for a in next(chunks.read()).args]
    assert kinds == [torch.float32, torch.bfloat16, torch.bool, torch.int32]
    for i, array in enumerate([mapped, wide.detach().float(), is_seen, counts.astype(int)]):
        assert np.array_equal(together(chunks, i).float().numpy(), np.asarray(array))
    for chunk in chunks.read():  # nothing of it is the user's
        for a in chunk.args:
            assert not a.requires_grad
            a.zero_()
    assert float(mapped.sum()) == 91 and bool(is_seen[0]) and float(wide[6, 1].detach()) == 26


def test_missing_entries_and_tables_become_numbers() -> None:
    pandas = pytest.importorskip("pandas")
    masked = np.ma.masked_array([1.0, 2.0, 3.0], [False, True, False])
    table = pandas.DataFrame({"a": [1, 2, 3], "b": [0.5, 1.5, 2.5]}, index=[2, 1, 0])
    (first, last) = Chunks(masked, table, table["a"], rows=2).read()
    assert torch.isnan(first.args[0]).tolist() == [False, True]
    assert first.args[1].tolist() == [[1.0, 0.5], [2.0, 1.5]] and last.args[2].tolist() == [3]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ((torch.zeros(3), np.zeros((4, 2))), "argument 2 has 4 rows, argument 1 has 3"),
        ((torch.zeros(3), 5), "argument 2, 5, has no rows"),
        ((torch.zeros(3), torch.tensor(5.0)), "argument 2, .* has no rows"),
        ((torch.zeros(3), [1.0, 2.0, 3.0]), r"argument 2, \[1.0, 2.0, 3.0\], has no rows"),
        ((torch.tensor(1.0),), "argument 1, .* has no rows"),
        ((np.array(["a", "b"]),), "argument 1: it holds texts"),
        ((np.array([None, 1]),), "argument 1: it holds Python objects"),
        ((np.zeros(2, "M8[D]"),), "argument 1: it holds dates"),
        ((np.zeros(2, [("a", "f4")]),), "argument 1: it holds records"),
        ((torch.zeros(3).to_sparse(),), "argument 1: it holds a tensor that is sparse_coo"),
        ((torch.zeros(3, device="meta"),), "argument 1: it holds a tensor that is meta"),
        ((torch.zeros(0, 2),), "there are no rows"),
        (([],), "there are no rows"),
        ((), "no data were given"),
        ((iter([torch.zeros(3)]),), "is an iterator.\n.*once only"),
        (((torch.zeros(3) for _ in range(2)),), "is an iterator"),
        ((lambda: None,), "neither arrays nor an iterable"),
        (("data.csv",), "is a path or a text"),
        (({"x": torch.zeros(3)},), "is a mapping"),
        ((TensorDataset(torch.zeros(3)),), "gives one row at a time"),
        ((Chunks(torch.zeros(3)),), "the data are Chunks already"),
    ],
)
def test_what_cannot_be_read_again_and_again_is_refused(data: Any, says: str) -> None:
    with pytest.raises((UsageError, DataError), match=says):
        Chunks(*data)


def test_what_only_rows_show_is_refused_with_their_chunk() -> None:
    masked = np.ma.masked_array([1, 2, 3], [False, False, True])
    with pytest.raises(DataError, match="chunk 2, argument 1, rows from 2 on: entries are masked"):
        list(Chunks(masked, rows=2).read())
    with pytest.raises(DataError, match="chunk 2, argument 1, rows from 1 on: it holds integers"):
        list(Chunks(np.array([1, 2**63], dtype=np.uint64), rows=1).read())
    with pytest.raises(DataError, match="chunk 2: it holds no array with rows"):
        list(Chunks([torch.zeros(2), (3.0, "b")]).read())
    with pytest.raises(DataError, match="chunk 2: its arguments are float32 of 1 dimensions"):
        list(Chunks([torch.zeros(2), np.zeros(2, np.float32)]).read())
    with pytest.raises(UsageError, match="rows=3 was given together with an iterable"):
        Chunks([torch.zeros(2)], rows=3)
    with pytest.raises(UsageError, match="rows=0"):
        Chunks(torch.zeros(2), rows=0)


def test_items_are_arguments() -> None:
    x, y = torch.arange(6.0).reshape(3, 2), np.arange(3)
    one = Chunks([x, x[:0], y.reshape(3, 1) * 1.0])  # no rows: left out
    assert [(c.begin, c.rows, len(c.args)) for c in one.read()] == [(0, 3, 1), (3, 3, 1)]
    several = Chunks([(x, y, 2, {"n": y}), [x, y, 2, {"n": y}]])
    assert several.total == 6
    for chunk in several.read():
        x_own, y_own, two, inside = chunk.args
        assert torch.equal(x_own, x) and x_own.data_ptr() != x.data_ptr()
        assert y_own.tolist() == [0, 1, 2] and two == 2 and inside["n"].tolist() == [0, 1, 2]
    by_name = Chunks([{"x": x, "y": y}])
    assert next(by_name.read()).args[0]["y"].tolist() == [0, 1, 2] and by_name.total == 3


def test_a_loader_may_shuffle_but_not_draw_other_rows() -> None:
    x = torch.arange(10.0)
    data = TensorDataset(x, x.long())
    chunks = Chunks(DataLoader(data, batch_size=4, shuffle=True))
    assert chunks.total == 10
    passes = [together(chunks) for _ in range(4)]
    assert all(torch.equal(p.sort().values, x) for p in passes)
    assert not all(torch.equal(p, passes[0]) for p in passes)
    assert Chunks(DataLoader(data, batch_size=4, drop_last=True)).total == 8
    assert len({Chunks(DataLoader(data, batch_size=3, shuffle=True)).form() for _ in range(3)}) == 1
    for loader in (
        DataLoader(data, batch_size=4, shuffle=True, drop_last=True),
        DataLoader(data, batch_size=4, sampler=RandomSampler(data, replacement=True)),
        DataLoader(data, batch_size=4, sampler=RandomSampler(data, num_samples=5)),
    ):
        with pytest.raises(UsageError, match="does not give each row once"):
            Chunks(loader)


def test_random_numbers_of_a_loader_are_drawn_in_one_order() -> None:
    loader = DataLoader(TensorDataset(torch.arange(50.0)), batch_size=5, shuffle=True)
    chunks = Chunks(loader)
    found = []
    for _ in range(3):
        torch.manual_seed(0)
        drawn = [torch.cat([c.args[0], torch.rand(2)]) for c in chunks.read()]
        found.append(torch.cat([*drawn, torch.rand(1)]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


class Files:
    """Chunks that are made as they are asked for; a failure on the way."""

    def __init__(self, fails_at: int | None = None, error: Exception | None = None) -> None:
        self.fails_at, self.error = fails_at, error
        self.made: list[int] = []
        self.ended = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        try:
            for i in range(6):
                if i == self.fails_at and self.error is not None:
                    raise self.error
                self.made.append(i)
                yield torch.full((2,), float(i))
        finally:
            self.ended += 1


def alive() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("pyro_em-chunks")]


def test_one_chunk_is_read_ahead_and_no_more() -> None:
    files = Files()
    chunks = Chunks(files)
    assert chunks.total is None and "not counted" in repr(chunks)
    reading = chunks.read()
    assert files.made == [] and not alive()
    for i, chunk in enumerate(reading):
        assert chunk.begin == 2 * i and chunk.args[0].tolist() == [i, i]
        until = time.monotonic() + 10
        while len(files.made) < min(i + 2, 6) and time.monotonic() < until:
            time.sleep(0.001)
        assert len(files.made) == min(i + 2, 6)
    assert chunks.total == 12 and not alive() and files.ended == 1
    assert [c.begin for c in chunks.read()] == [0, 2, 4, 6, 8, 10]


def test_the_thread_ends_with_whoever_stops_early() -> None:
    files = Files()
    reading = Chunks(files).read()
    next(reading)
    reading.close()
    assert not alive() and files.ended == 1 and len(files.made) <= 2
    with pytest.raises(KeyboardInterrupt):
        for _ in (reading := Chunks(files).read()):
            raise KeyboardInterrupt
    reading.close()
    assert not alive()


@pytest.mark.parametrize(
    ("error", "kind"), [(ValueError("odd line"), DataError), (OSError("no disk"), FileError)]
)
def test_an_error_is_raised_at_its_chunk(error: Exception, kind: type[Exception]) -> None:
    seen = []
    with pytest.raises(kind, match=f"chunk 4, rows from 6 on: .*{error}") as raised:
        for chunk in Chunks(Files(3, error)).read():
            seen.append(chunk.begin)
    assert seen == [0, 2, 4] and raised.value.__cause__ is error and not alive()


def test_passes_that_differ_in_their_rows_are_refused() -> None:
    class Once:
        def __init__(self) -> None:
            self.left = iter([torch.zeros(2)])

        def __iter__(self) -> Iterator[torch.Tensor]:
            return self.left

    once = Chunks(Once())
    assert len(list(once.read())) == 1
    with pytest.raises(DataError, match="there are no rows"):
        list(once.read())
    items = [torch.zeros(2), torch.zeros(3)]
    chunks = Chunks(items)
    list(chunks.read())
    items.pop()
    with pytest.raises(DataError, match="this pass had 2 rows, the one before 5"):
        list(chunks.read())


class Rows(Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> Any:
        return {"x": torch.full((2,), float(i))}


def test_a_loader_of_mappings_is_one_argument() -> None:
    (first, last) = Chunks(DataLoader(Rows(), batch_size=2)).read()
    assert first.args[0]["x"].tolist() == [[0, 0], [1, 1]] and last.rows == 1


def test_forms_tell_other_data_and_other_splits() -> None:
    x, y = torch.randn(20, 3), torch.arange(20)
    form = Chunks(x, y, rows=6).form()
    assert (form.rows, form.chunks, form.arguments) == (20, 4, ("float64 (3,)", "int64 ()"))
    assert form == Chunks(x.numpy().copy(), y.clone(), rows=6).form()
    other = Chunks(x, y, rows=7).form()
    assert other.checksum == form.checksum and other.splits != form.splits
    changed = x.clone()
    changed[17, 2] += 1e-12
    for data in ((changed, y), (x, y.flip(0)), (x[:19], y[:19]), (x.flip(0), y.flip(0))):
        assert Chunks(*data, rows=6).form().checksum != form.checksum
    odd = Chunks([(x, torch.zeros(4, 2), torch.tensor(1.0), torch.zeros(20, 0), 3, "a")])
    same = Chunks([(x, torch.zeros(4, 2), torch.tensor(1.0), torch.zeros(20, 0), 4, "a")])
    assert odd.form() == odd.form() != same.form()


_FRESH_PROCESS = """
import sys, numpy as np
from pyro_em import Chunks

def resident():
    return int(open('/proc/self/statm').read().split()[1]) * 4096

for path in sys.argv[1:]:
    chunks = Chunks(np.load(path, mmap_mode='r'), rows=20_000)
    next(chunks.read())
    base, peak = resident(), 0
    for chunk in chunks.read():
        peak = max(peak, resident())
    print(peak - base)

given_up = chunks.read()
next(given_up)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_rows_and_no_thread_keeps_a_process(tmp_path: Path) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("memory is read from /proc")
    paths = []
    for rows in (100_000, 600_000):  # 6 MB and 38 MB in chunks of 1.3 MB
        paths.append(str(tmp_path / f"{rows}.npy"))
        np.save(paths[-1], np.zeros((rows, 16), dtype=np.float32))
    command = [sys.executable, "-c", _FRESH_PROCESS, *paths]
    said = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    peaks = [int(n) for n in said.split()]
    # Where the allocator is busy a few chunks more are resident; all rows would be 38 MB.
    assert len(peaks) == 2 and max(peaks) < 12e6, peaks


def test_files_of_columns_need_pyarrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pyarrow, which is not installed.*\n.*\n.*pip install"):
        Chunks.parquet(tmp_path / "x.parquet", ["a"])


def test_reading_starts_no_threads_of_its_own() -> None:
    before, seen = torch.get_num_threads(), []

    class Asks:
        def __iter__(self) -> Iterator[torch.Tensor]:
            for _ in range(2):
                seen.append(torch.get_num_threads())
                yield torch.zeros(2)

    torch.set_num_threads(3)
    try:
        list(Chunks(Asks()).read())
        assert seen == [1, 1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
