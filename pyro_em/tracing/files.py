"""Whole files or none: bytes are written beside the old file and then take its place at once.

A process that is killed, a disk that is full or an interrupt leaves the old file as it was. What
the operating system refuses is told in a sentence.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

from pyro_em.errors import FileError, message

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


class MissingFile(FileError, FileNotFoundError):
    """There is no such file or folder."""


def at_home(path: str | os.PathLike[str]) -> Path:
    """A path in which ``~`` at the beginning stands for the user's home folder, as in a shell.

    Args:
        path: A file or folder.

    Example:
        >>> at_home("~/fit.pt") == Path.home() / "fit.pt"
        True
        >>> at_home("a~/fit.pt").parts
        ('a~', 'fit.pt')
    """
    return Path(os.path.expanduser(path))


def write_whole(path: str | Path, content: bytes) -> None:
    """Put ``content`` into a file, synced to the disk; the old file stays until it is complete.

    A link is followed, an existing file keeps its permissions, and no folder is made.

    Args:
        path: The file.
        content: All of it.

    Raises:
        FileError: If there is no such folder, it cannot be written, or the disk is full.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder, "x"), b"all of it")
        ...     [p.name for p in Path(folder).iterdir()]
        ['x']
    """
    target = Path(os.path.realpath(at_home(path)))
    _check_target(path, target)
    # Not named after the file, whose name may be as long as a name can be.
    temporary = target.with_name(f".pyro_em-{secrets.token_hex(6)}.tmp")
    try:
        try:
            _write_new(temporary, content, _mode(target))
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise _refusal(path, target, error) from error
    _sync_folder(target.parent)


def check_writable(path: str | Path) -> None:
    """Refuse a file that can be seen to be one that `write_whole` cannot write.

    Raises:
        FileError: As `write_whole`.
    """
    target = Path(os.path.realpath(at_home(path)))
    _check_target(path, target)
    if not os.access(target.parent, os.W_OK):
        raise _refusal(path, target, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def read_whole(path: str | Path) -> bytes:
    """All bytes of a file.

    Raises:
        FileError: If there is no such file, or it cannot be read.
    """
    try:
        return at_home(path).read_bytes()
    except FileNotFoundError as error:
        raise MissingFile(
            message(f"file '{path}'", "it does not exist.", fixes=["check the path"])
        ) from error
    except OSError as error:
        what = (
            "it is a folder" if at_home(path).is_dir() else f"it cannot be read: {error.strerror}"
        )
        raise FileError(
            message(f"file '{path}'", f"{what}.", fixes=["give a file that save wrote"])
        ) from error


def _check_target(path: str | Path, target: Path) -> None:
    if target.is_dir():
        raise FileError(
            message(
                f"file '{path}'",
                "it is a folder.",
                "parameters are saved in one file",
                ["give the file a name: em.save(folder / 'fit.pt')"],
            )
        )
    if target.exists() and not target.is_file():
        raise FileError(
            message(
                f"file '{path}'",
                "it is a device or a pipe.",
                "a complete new file takes the place of the old one, which would remove it",
                ["give an ordinary file"],
            )
        )
    if target.exists() and not os.access(target, os.W_OK):
        raise FileError(
            message(
                f"file '{path}'",
                "it is write-protected.",
                "the file that was there is unchanged",
                ["save to another file", "change its permissions"],
            )
        )
    if not target.parent.exists():
        raise MissingFile(
            message(
                f"file '{path}'",
                f"its folder '{target.parent}' does not exist.",
                "save makes no folders",
                ["make it first: Path(...).mkdir(parents=True)", "check the path"],
            )
        )
    if not target.parent.is_dir():
        raise FileError(
            message(
                f"file '{path}'",
                f"'{target.parent}' is no folder.",
                fixes=["give a file in a folder"],
            )
        )


def _mode(target: Path) -> int | None:
    """The permissions of the file that is there, if one is."""
    try:
        return stat.S_IMODE(target.stat().st_mode)
    except OSError:
        return None


def _write_new(path: Path, content: bytes, mode: int | None) -> None:
    binary = getattr(os, "O_BINARY", 0)  # Windows
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | binary, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if mode is not None:
        with contextlib.suppress(OSError):  # a file system without permissions
            path.chmod(mode)


def _sync_folder(folder: Path) -> None:
    """Make the new name last; not every system and file system can do it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _refusal(path: str | Path, target: Path, error: OSError) -> FileError:
    kept = "the file that was there is unchanged" if target.exists() else "no file was written"
    if error.errno in _FULL:
        what = f"there is no room for it ({error.strerror})."
        fixes = ["free some space, or raise the quota", "save to another disk"]
    elif error.errno in _FORBIDDEN:
        what = f"its folder '{target.parent}' cannot be written ({error.strerror})."
        fixes = ["save to a folder of yours", "change the permissions of the folder"]
    else:
        what = f"it cannot be written ({error.strerror or error})."
        fixes = ["save to another folder"]
    return FileError(message(f"file '{path}'", what, kept, fixes))
