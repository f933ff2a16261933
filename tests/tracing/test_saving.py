"""Files of fitted parameters: whole or not written, read as they were written or refused."""

from __future__ import annotations

import errno
import io
import os
import pickle
import re
import resource
import signal
import stat
import time
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, FileError, PyroEMError, UsageError
from pyro_em.posteriors.chain_sums.state_steps import AtTheta
from pyro_em.tracing import checkpoint as saving
from pyro_em.tracing.encoding import NotPlain, decoded, encoded
from pyro_em.updates.sums.model_sums import ModelSums, PlainSums

X = torch.tensor([-1.3, 0.2, 0.4, 1.9, 2.2], dtype=torch.float64)


def mixture(x):
    w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def wide(x):
    """A file of some megabytes, which takes a while to write."""
    loc = pyro.param("loc", torch.zeros(400_000))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc[0], 1.0), obs=x)


def in_store() -> dict[str, torch.Tensor]:
    return {n: v.detach().clone() for n, v in pyro.get_param_store().items()}


def agrees(values: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(values[n], v) for n, v in in_store().items())


@pytest.fixture
def fitted(tmp_path: Path) -> tuple[ExactPosteriorEM, Path]:
    em = ExactPosteriorEM(mixture)
    em.fit(X, max_steps=3, tol=0, progress=False)
    em.save(tmp_path / "fit.pt")
    return em, tmp_path / "fit.pt"


# ------------------------------------------------------------------ writing


def test_a_tilde_is_the_home_folder(
    fitted: tuple[ExactPosteriorEM, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    em, _ = fitted
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    em.save("~/kept.pt")
    values = in_store()
    em.fit(X, max_steps=1, tol=0, progress=False, checkpoint="~/run.pt")
    em.load(Path("~/kept.pt"))
    assert agrees(values)
    assert sorted(p.name for p in home.iterdir()) == ["kept.pt", "run.pt"]
    assert not list(work.iterdir())


def test_a_killed_save_leaves_the_last_good_file(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    em = ExactPosteriorEM(wide)
    em.plan(X)
    em.save(path)
    for k in range(12):
        child = os.fork()
        if child == 0:
            while True:
                em.save(path)
        time.sleep(0.02 + 0.003 * k)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        em.load(path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_last_good_file(fitted, monkeypatch, call, number) -> None:
    em, path = fitted
    before = path.read_bytes()

    def full(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, full)
    words = "cannot be written" if number == errno.EIO else "there is no room for it"
    with pytest.raises(FileError, match=rf"(?s){words}.*is unchanged"):
        em.save(path)
    with pytest.raises(FileError, match=rf"(?s){words}.*no file was written"):
        em.save(path.with_name("new.pt"))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["fit.pt"]


def test_a_limit_on_file_sizes_leaves_the_last_good_file(fitted) -> None:
    """The operating system refuses in the middle of writing."""
    em, path = fitted
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(FileError, match="there is no room for it"):
            em.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["fit.pt"]


def test_an_interrupt_leaves_the_last_good_file(fitted, monkeypatch) -> None:
    em, path = fitted
    before = path.read_bytes()

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        em.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["fit.pt"]


def test_folders_that_cannot_take_a_file(fitted, monkeypatch) -> None:
    em, path = fitted
    with pytest.raises(FileError, match=r"(?s)'.*missing' does not exist.*makes no folders"):
        em.save(path.parent / "missing" / "fit.pt")
    assert not (path.parent / "missing").exists()
    with pytest.raises(FileNotFoundError):
        em.save(path.parent / "missing" / "fit.pt")
    with pytest.raises(FileError, match="it is a folder"):
        em.save(path.parent)
    with pytest.raises(FileError, match="is no folder"):
        em.save(path / "fit.pt")
    with pytest.raises(FileError, match="a device or a pipe"):
        em.save("/dev/null")
    opened = os.open

    def forbidden(name, flags, *args):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(name, flags, *args)

    monkeypatch.setattr(os, "open", forbidden)
    with pytest.raises(FileError, match="cannot be written"):
        em.save(path)
    monkeypatch.undo()
    em.load(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_without_permission(fitted) -> None:
    em, path = fitted
    path.parent.chmod(0o500)
    try:
        with pytest.raises(FileError, match=r"folder .* cannot be written"):
            em.save(path)
    finally:
        path.parent.chmod(0o700)


def test_links_and_permissions_stay(fitted) -> None:
    em, path = fitted
    link = path.with_name("latest.pt")
    link.symlink_to(path)
    path.chmod(0o640)
    em.step(X)
    em.save(link)
    assert link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o640
    values = in_store()
    em.load(path)
    assert agrees(values)


def test_numbers_that_are_not_finite_are_not_saved(fitted) -> None:
    em, path = fitted
    before = path.read_bytes()
    with torch.no_grad():
        pyro.param("loc").unconstrained()[1] = torch.nan
    with pytest.raises(UsageError, match=r"'loc' has 1 of 2 numbers that are not finite"):
        em.save(path)
    assert path.read_bytes() == before


class Odd(torch.optim.SGD):
    """An optimiser whose state no file of tensors can hold."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["me"] = type(self)
        return super().step(closure)


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    def model(x):
        h = pyro.sample("h", dist.Normal(pyro.param("a", torch.tensor(0.1)), 1.0))
        pyro.sample("x", dist.Normal(h, 1.0), obs=x.mean())

    def guide(x):
        pyro.sample("h", dist.Normal(pyro.param("m", torch.tensor(0.5)), 1.0))

    em = ExactPosteriorEM(model, guide, lambda p: Odd(p, lr=0.1), strategy="guide")
    em.plan(X)
    path = tmp_path / "fit.pt"
    em.save(path)
    before = path.read_bytes()
    em.step(X)
    with pytest.raises(UsageError, match="save: what the optimiser keeps cannot be saved"):
        em.save(path)
    assert path.read_bytes() == before


def test_a_structural_zero_is_a_number(tmp_path: Path) -> None:
    em = ExactPosteriorEM(mixture)
    pyro.param("w", torch.tensor([0.0, 1.0]), constraint=constraints.simplex)
    em.fit(X, max_steps=1, tol=0, progress=False)
    em.save(tmp_path / "fit.pt")
    values = in_store()
    em.reset()
    em.load(tmp_path / "fit.pt", X)
    assert agrees(values) and values["w"][0] == 0


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_file_saved_by_a_callback_knows_its_steps(tmp_path: Path, stochastic: bool) -> None:
    def guide(x):
        pyro.sample("h", dist.Normal(0.5, 1.0))

    def model(x):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        a = pyro.param("a", torch.tensor(0.1))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(a * h, 1.0), obs=x)

    em = (
        ExactPosteriorEM(model, guide, strategy="guide")
        if stochastic
        else ExactPosteriorEM(mixture)
    )
    em.step(X)

    def save(step):
        em.save(tmp_path / f"{step.index}.pt")

    result = em.fit(X, max_steps=3, tol=0, progress=False, callbacks=[save])
    assert result.total_steps == 4
    files = sorted(tmp_path.iterdir())
    assert [torch.load(f, weights_only=True)["total_steps"] for f in files] == [2, 3, 4]


# ------------------------------------------------------------------ reading


def test_every_flipped_bit_is_refused_or_changes_nothing(fitted) -> None:
    """Over the whole file: headers, names, numbers, table of contents."""
    _, path = fitted
    content = path.read_bytes()
    good, refused = saving.read(path), 0
    for i in range(0, 8 * len(content), 29):
        flipped = bytearray(content)
        flipped[i // 8] ^= 1 << (i % 8)
        path.write_bytes(flipped)
        try:
            state = saving.read(path)
        except UsageError as error:
            assert "damaged" in str(error)
            refused += 1
        else:
            assert saving.checksum(state) == saving.checksum(good), i
            pairs = zip(
                state["unconstrained"].values(), good["unconstrained"].values(), strict=True
            )
            assert all(torch.equal(a, b) for a, b in pairs), i
    assert refused > 200


def test_a_file_whose_parts_agree_with_a_changed_number(fitted) -> None:
    """What an archive's own checksums cannot see: it was written whole, with other content."""
    em, path = fitted
    state = torch.load(path, weights_only=True)
    state["unconstrained"]["loc"][0] += 1e-9
    torch.save(state, path)
    with pytest.raises(UsageError, match=r"(?s)damaged, or was changed.*its checksum"):
        em.load(path)


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.9, 0.999])
def test_a_file_that_is_cut_off(fitted, kept: float) -> None:
    em, path = fitted
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UsageError, match=r"(?s)damaged.*nothing was loaded"):
        em.load(path)


def torch_bytes(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


class Stranger:
    """Something that weights_only does not load."""


FOREIGN = {
    "empty": (b"", r"it is empty \(0 bytes\)"),
    "text": (b"mu: 1.0\n", "was not written by"),
    "a program": (Path(saving.__file__).read_bytes(), "was not written by"),
    "pickle": (pickle.dumps({"format": "pyro_em"}), "was not written by"),
    "tensor": (torch_bytes(torch.ones(2)), "(?s)was not written by.*torch file of another kind"),
    "state dict": (torch_bytes(torch.nn.Linear(2, 1).state_dict()), "was not written by"),
    "object": (torch_bytes(Stranger()), "(?s)was not written by.*other objects"),
    "format of another": (torch_bytes({"format": "other 1"}), "was not written by"),
    "newer": (torch_bytes({"format": "pyro_em 12"}), r"newer version of pyro_em, in format 12"),
    "older": (torch_bytes({"format": "pyro_em 0"}), r"older version of pyro_em, in format 0"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_files_are_told_apart(fitted, kind: str) -> None:
    em, path = fitted
    content, words = FOREIGN[kind]
    values = in_store()
    path.write_bytes(content)
    with pytest.raises(UsageError, match=words) as error:
        em.load(path)
    assert str(path) in str(error.value) and agrees(values)


def test_missing_files_and_folders(fitted) -> None:
    em, path = fitted
    with pytest.raises(FileNotFoundError, match="it does not exist") as error:
        em.load(path.with_name("other.pt"))
    assert isinstance(error.value, PyroEMError)
    with pytest.raises(FileError, match="it is a folder"):
        em.load(path.parent)


def first_format(**changes: object) -> dict[str, object]:
    """What the first version of the library wrote."""
    return {
        "format": "pyro_em 1",
        "names": ["w", "loc"],
        "unconstrained": {
            "w": torch.tensor([0.3, 0.7]).log(),
            "loc": torch.tensor([-0.5, 2.0]),
        },
        "constraints": {"w": "Simplex()", "loc": "Real()"},
        "total_steps": 7,
        "buffers": {},
        **changes,
    }


def test_records_that_files_name_by_an_earlier_module_are_read() -> None:
    sums = PlainSums({"weight": torch.tensor([3.0])}, {"loc": torch.ones(1)})
    fields = encoded(ModelSums({0: sums}, {0: 3.0}, {}))["fields"]
    for earlier in ("pyro_em.updates.running_sums", "pyro_em.updates.model_sums"):
        read = decoded({"record of": f"{earlier}:ModelSums", "fields": fields})
        assert isinstance(read, ModelSums) and isinstance(read.groups[0], PlainSums)
        assert read.groups[0].sums["weight"].item() == 3.0
    with pytest.raises(NotPlain, match="does not have"):
        decoded({"record of": "pyro_em.updates.running_sums:Other", "fields": {}})


def test_what_a_record_of_another_version_holds_besides_is_made_again_or_refused() -> None:
    """An E-step that was kept with its parameters is made again; another field stands for something."""
    old = {"record of": "pyro_em.posteriors.state_steps:Solved", "fields": {"space": 1}}
    fields = {"theta": encoded(np.arange(2.0)), "others": {}, "expectation": [old]}
    at = decoded({"record of": "pyro_em.posteriors.state_steps:AtTheta", "fields": fields})
    assert isinstance(at, AtTheta) and at.theta.tolist() == [0.0, 1.0] and at.expectation == []
    with pytest.raises(NotPlain, match="fields of another version"):
        decoded(old)


def test_a_file_of_the_first_version_loads(tmp_path: Path) -> None:
    torch.save(first_format(), tmp_path / "old.pt")
    em = ExactPosteriorEM(mixture)
    em.load(tmp_path / "old.pt", X)
    assert pyro.param("w").tolist() == pytest.approx([0.3, 0.7])
    assert pyro.param("loc").tolist() == [-0.5, 2.0]
    assert em.fit(X, max_steps=1, tol=0, progress=False).total_steps == 8
    content = bytearray((tmp_path / "old.pt").read_bytes())
    at = content.find(torch.tensor(2.0).numpy().tobytes())
    content[at + 6] ^= 1
    (tmp_path / "old.pt").write_bytes(content)
    with pytest.raises(UsageError, match="damaged"):
        em.load(tmp_path / "old.pt")


@pytest.mark.parametrize(
    "changes",
    [{"names": ["w"]}, {"unconstrained": {}}, {"total_steps": "many"}, {"constraints": None}],
)
def test_a_file_with_a_part_missing(tmp_path: Path, changes: dict[str, object]) -> None:
    torch.save(first_format(**changes), tmp_path / "old.pt")
    with pytest.raises(UsageError, match="damaged"):
        ExactPosteriorEM(mixture).load(tmp_path / "old.pt", X)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e200])
def test_numbers_that_are_not_finite_are_not_loaded(tmp_path: Path, value: float) -> None:
    loc = torch.tensor([0.0, value])
    unconstrained = {"w": torch.zeros(2), "loc": loc}
    torch.save(first_format(unconstrained=unconstrained), tmp_path / "old.pt")
    torch.set_default_dtype(torch.float32)
    em = ExactPosteriorEM(mixture)
    em.plan(X.float())
    values = in_store()
    with pytest.raises(UsageError, match=r"'loc' has 1 of 2 numbers in the file that are not"):
        em.load(tmp_path / "old.pt")
    assert agrees(values)


STATES: list[dict[str, object]] = [
    {"a": torch.zeros(2, dtype=torch.bfloat16), "b": [1, 2.5, None, (True, "x")]},
    {"a": torch.zeros((), dtype=torch.bool), "b": torch.zeros(0, 3)},
    {"a": torch.zeros(2, dtype=torch.complex64), "b": {"c": torch.tensor(torch.nan)}},
]


@pytest.mark.parametrize("state", STATES)
def test_the_checksum_survives_a_file(state: dict[str, object]) -> None:
    again = torch.load(io.BytesIO(torch_bytes(state)), weights_only=True)
    assert saving.checksum(again) == saving.checksum(state)
    assert re.fullmatch(r"[0-9a-f]{64}", saving.checksum(state))
    assert saving.checksum({**state, "d": 1}) != saving.checksum({**state, "d": True})
