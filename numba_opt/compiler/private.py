"""Files that nobody but this user can have written.

Compiled code is run, and unpickling it runs code as well. So a file is read only if it and its folder belong
to this user, and nobody else can write either; and nobody else could have put another folder in its place.
What is asked about is what has been opened, not what bears the name a moment later.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Windows has none of these; there a user's folders are the user's alone unless somebody changes that.
HAS_OWNERS = hasattr(os, "geteuid")


def _flags(*names: str) -> int:
    return sum(getattr(os, name, 0) for name in names)


FOLDER = _flags("O_RDONLY", "O_DIRECTORY", "O_CLOEXEC")
# Links are not followed, and nothing waits for somebody to write into what lies there.
FILE = _flags("O_RDONLY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY")
NEW = _flags("O_WRONLY", "O_CREAT", "O_EXCL", "O_NOFOLLOW", "O_CLOEXEC", "O_BINARY")


class DistrustedError(OSError):
    """Somebody else may have written this."""


def read(path: Path) -> bytes:
    """The content of a file.

    Raises
    ------
    OSError
        It is not there, or somebody else may have written it.
    """
    with _opened(path.parent) as folder, open(_open(path, FILE, folder), "rb") as file:
        status = os.fstat(file.fileno())
        fault = _fault(status, path) if stat.S_ISREG(status.st_mode) else f"{path} is no file"
        if fault:
            raise DistrustedError(fault)
        return file.read()


def write(path: Path, content: bytes) -> None:
    """Make a file, whole or not at all, that only this user can read and write.

    Raises
    ------
    OSError
        It cannot be made, or its folder is not this user's alone.
    """
    make(path.parent)
    with _opened(path.parent) as folder:
        unfinished = path.with_suffix(f".{secrets.token_hex(8)}.tmp")
        try:
            with open(_open(unfinished, NEW, folder), "wb") as file:
                if HAS_OWNERS:
                    os.fchmod(file.fileno(), 0o600)
                file.write(content)
            if folder is None:
                unfinished.replace(path)
            else:
                os.replace(unfinished.name, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink()
            raise


def make(folder: Path) -> None:
    """Have a folder. What is made for it is this user's alone, whatever the umask."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        try:
            path.mkdir(0o700)
        except FileExistsError:  # somebody has just made it
            continue
        if path.lstat().st_mode & 0o700 != 0o700:
            path.chmod(0o700)


def distrusted(folder: Path) -> str:
    """Return why files of a folder are neither read nor written; an empty text if they are."""
    try:
        with _opened(folder):
            return ""
    except DistrustedError as error:
        return str(error)
    except OSError:  # it is not there, or no folder, which is another matter
        return _misplaced(folder)


@contextmanager
def _opened(folder: Path) -> Iterator[int | None]:
    """A folder, opened, that nobody but this user can write to."""
    if not HAS_OWNERS:
        yield None
        return
    found = os.open(folder, FOLDER)
    try:
        fault = _fault(os.fstat(found), folder) or _misplaced(folder)
        if fault:
            raise DistrustedError(fault)
        yield found
    finally:
        os.close(found)


def _open(path: Path, flags: int, folder: int | None) -> int:
    """A file in a folder that has been opened."""
    return os.open(path, flags, 0o600) if folder is None else os.open(path.name, flags, 0o600, dir_fd=folder)


def _fault(status: os.stat_result, path: Path) -> str:
    """Return a text that says who else may write to a path; empty if nobody may."""
    if not HAS_OWNERS:
        return ""
    if status.st_uid != os.geteuid():
        return f"{path} belongs to user {status.st_uid}, and this is user {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {path} (mode {stat.S_IMODE(status.st_mode):o})"
    return ""


def _misplaced(folder: Path) -> str:
    """Return a text that says who else may put another folder in the place of this one; empty if nobody may.

    That would have to be a folder of this user's too. So it is enough to look as far as the first folder
    above that is this user's alone: what is in there, nobody else has named.
    """
    if not HAS_OWNERS:
        return ""
    folder = folder.absolute()
    for place in (folder, Path(os.path.realpath(folder))):
        for parent in place.parents:
            try:
                status = parent.stat()
            except OSError:
                continue
            if not _fault(status, parent):
                break
            if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
                mode = stat.S_IMODE(status.st_mode)
                return f"everybody may write to {parent} (mode {mode:o}), and it has no sticky bit"
    if folder.is_symlink() and folder.lstat().st_uid != os.geteuid():
        return f"{folder} is a link of user {folder.lstat().st_uid}, and this is user {os.geteuid()}"
    return ""
