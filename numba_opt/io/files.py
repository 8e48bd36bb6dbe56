"""Files that appear whole or not at all, and reading that nobody who shortens the file can kill.

A new file is written beside the one that it replaces, under a short name of its own, and holds a lock
(`flock`) for as long as it is written. A process that is killed leaves the file and loses the lock, so the
next save into the folder knows what to remove, whatever process numbers have been given out again since.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import os
import platform
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # on Windows, where nothing is removed
    fcntl = None  # type: ignore[assignment]

__all__ = ["fill", "opened", "put", "write"]

UNFINISHED = re.compile(r"\.numba_opt-([0-9a-f]{8})-[0-9a-f]{16}\.tmp")  # the machine, and a random number
DAY = 24 * 60 * 60

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def write(path: str | os.PathLike[str], content: Callable[[io.FileIO], None]) -> None:
    """Let `content` write a file, which then takes the place of what was there; a link is followed.

    Owner, group and mode stay those of the file that was there, as far as this process may set them.

    Raises
    ------
    OSError
        It names `path`, and what was there is as it was.
    """
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    with _naming(path):
        before = _found(target, path)
        fresh = _created(folder, 0o666 if before is None else 0o600)
        name = str(fresh.name)
        try:
            with fresh:
                _clean(folder, fresh)
                content(fresh)
                if before is not None:
                    _adopt(fresh.fileno(), before)
                os.fsync(fresh.fileno())
                if os.name == "nt":  # where an open file keeps its name
                    fresh.close()
                os.replace(name, target)
        finally:
            with suppress(OSError):  # it is not there any more if all went well
                os.unlink(name)
        _synchronize(folder)


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[io.FileIO]:
    """A regular file for reading, in whose errors `path` is named."""
    with _naming(path):
        _found(os.fspath(path), path)  # to open a FIFO would wait for somebody who writes
        with io.FileIO(path, "rb") as file:
            yield file


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let the system's errors name the path that was asked for."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # somebody else's, such as a signal handler's TimeoutError
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _found(target: str, path: str | os.PathLike[str]) -> os.stat_result | None:
    """Return the status of a file, None if there is none; refuse anything that is not a regular file."""
    try:
        found = os.stat(target)
    except FileNotFoundError:
        return None
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        code = errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL
        raise OSError(code, f"it is {KINDS.get(kind, 'something else')}; expected a regular file", str(path))
    return found


def _created(folder: str, mode: int) -> io.FileIO:
    """A new file, locked where the file system can."""
    for _ in range(10):
        name = os.path.join(folder, f".numba_opt-{_machine()}-{secrets.token_hex(8)}.tmp")
        file = io.FileIO(name, "xb", opener=partial(os.open, mode=mode))
        locked = _locked(file.fileno(), exclusive=True)
        # whoever was cleaning up may have come before the lock
        with suppress(FileNotFoundError):
            if locked is not False and os.path.samestat(os.fstat(file.fileno()), os.stat(name)):
                return file
        file.close()
        with suppress(FileNotFoundError):
            os.unlink(name)
    raise OSError(errno.EBUSY, "somebody else locks each file that is made there")


def _locked(file: int, exclusive: bool) -> bool | None:
    """Lock an open file if nobody else has; None where that cannot be done."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _clean(folder: str, fresh: io.FileIO) -> None:
    """Remove unfinished files of processes that are dead.

    Only a lock says so. Some network file systems do not show locks to other machines, so what
    another machine writes has to be a day old, too, by the clock of the file system.
    """
    name = str(fresh.name)
    with _left(name) as left:
        if left:
            return  # this process lives, so locks mean nothing here
    now = os.fstat(fresh.fileno()).st_mtime
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = UNFINISHED.fullmatch(entry.name)
            if not found or entry.path == name:
                continue
            with suppress(OSError):
                written = entry.stat(follow_symlinks=False).st_mtime
                if found[1] != _machine() and now - written < DAY:
                    continue
                with _left(entry.path) as left:
                    if left:
                        os.unlink(entry.path)


@contextmanager
def _left(name: str) -> Iterator[bool]:
    """Tell whether nobody writes an unfinished file any more; nobody begins to within this context."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        file = io.FileIO(name, "rb", opener=lambda path, mode: os.open(path, mode | flags))
    except OSError:
        yield False
        return
    with file:
        regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        yield regular and _locked(file.fileno(), exclusive=False) is True


@functools.cache
def _machine() -> str:
    """Return what tells apart the machines that may write into a folder: a containers' host counts as one."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        identity = platform.node()
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def _adopt(file: int, before: os.stat_result) -> None:
    """Give a new file the owner, the group and the mode of the one that it replaces, as far as possible."""
    if not hasattr(os, "fchown"):
        return
    mode, now = before.st_mode & 0o777, os.fstat(file)
    if (now.st_uid, now.st_gid) != (before.st_uid, before.st_gid):
        try:
            os.fchown(file, before.st_uid, before.st_gid)
        except OSError:
            try:
                os.fchown(file, -1, before.st_gid)
            except OSError:
                mode &= 0o707 | (mode & 0o007) << 3  # another group may do what others may
    with suppress(OSError):  # file systems that know no modes
        os.fchmod(file, mode)


def _synchronize(folder: str) -> None:
    """Have a folder's new name on the disk, too, where that can be asked for."""
    if os.name != "posix":
        return
    try:
        file = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(file)


def fill(buffer: memoryview, file: io.FileIO) -> int:
    """Read into a buffer as far as the file goes; return how many bytes that were."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # the system reads at most 2 GiB at a time
        if not count:
            break
        done += count
    return done


def put(file: Any, content: bytes) -> None:
    """Write to a file, which may take less than all at a time."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]
