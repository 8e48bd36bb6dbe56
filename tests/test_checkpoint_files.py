"""Checkpoints as files: whole or not at all, where they belong, and nothing left behind."""

from __future__ import annotations

import errno
import itertools
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from numba_opt import Trainer
from numba_opt.io import files, tensor_file
from numba_opt.io.checkpoint import CheckpointError

from . import scripts
from .test_checkpoint import posix_only, python, small
from .test_trainer import snapshot, unchanged


@pytest.fixture
def trainer():
    return small()


def left(folder):
    """Names of the unfinished files in a folder."""
    return {path.name for path in folder.iterdir() if files.UNFINISHED.fullmatch(path.name)}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def numbered(path):
    """Which of the checkpoints of `save_forever` a file holds, all of whose arrays must agree."""
    trainer = Trainer([np.zeros(3000), np.zeros(5)], "nag")
    trainer.load(path)
    values = {float(x) for w in trainer.params.values() for x in w}
    assert len(values) == 1
    number = values.pop()
    assert trainer.skipped_steps == number
    return number


def save_forever(path, pipe):
    """Checkpoints 1, 2, 3, ...; each number goes into the pipe when `save` has returned."""
    params = [np.zeros(3000), np.zeros(5)]
    trainer = Trainer(params, "nag")
    for number in itertools.count(1):
        for array in params:
            array[...] = number
        trainer.skipped_steps = number
        trainer.save(path)
        os.write(pipe, number.to_bytes(4, "little"))


def killed(path, prepare=lambda: None, patience=None):
    """Let a fork save until it is killed, or kills itself; which number it reported last."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            signal.alarm(60)  # in case nobody does
            prepare()
            save_forever(path, writing)
        finally:
            os._exit(1)
    os.close(writing)
    if patience is not None:
        time.sleep(patience)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    with open(reading, "rb") as pipe:
        return int.from_bytes(pipe.read()[-4:], "little")


def kill_at(module, name, call):
    """Kill this process before, or after, the n-th call of a function."""
    plain = getattr(module, name)
    left = iter(range(abs(call) - 1, -1, -1))

    def deadly(*args, **kwargs):
        last = next(left) == 0
        if last and call > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = plain(*args, **kwargs)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, deadly)


def kill_saves(folder):
    """In a process of its own, without threads, which may fork."""
    folder = Path(folder)
    path = folder / "it"
    other = Trainer([np.zeros(3)], "nag")
    rng = random.Random(1)

    def check(allowed):
        """The checkpoint is one of those, and the next save in that folder leaves nothing else."""
        assert numbered(path) in allowed
        assert set(names(folder)) - left(folder) <= {"it", "other"}
        other.save(folder / "other")
        assert names(folder) == ["it", "other"]

    Trainer([np.zeros(3000), np.zeros(5)], "nag").save(path)
    for _ in range(40):  # at any moment
        before = numbered(path)
        reported = killed(path, patience=rng.random() * 0.03)
        check({reported, reported + 1} if reported else {before, 1})
    places = [(files, "put"), (os, "fsync"), (os, "fchmod"), (os, "replace"), (os, "open")]
    seen = 0
    for (module, name), call in itertools.product(places, (1, -1, 2, -2)):  # and at every one that counts
        before = numbered(path)
        reported = killed(path, prepare=lambda m=module, n=name, c=call: kill_at(m, n, c))
        seen += len(left(folder))
        check({reported, reported + 1} if reported else {before, 1})
    assert seen, "no kill came while a file was written"


@posix_only
def test_killed_while_saving(tmp_path):
    python("kill_saves", tmp_path, module=__name__)


def fill_disk(folder):
    """Files of this process end at some size, as if the disk were full."""
    import resource

    path = Path(folder) / "it"
    params = [np.zeros(3000), np.zeros(5)]
    trainer = Trainer(params, "nag")
    trainer.save(path)
    for limit in (0, 100, 5000, 40_000):
        for array in params:
            array += 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=re.escape(str(path)) + "'$") as caught:
            trainer.save(path)
        assert caught.value.errno == errno.EFBIG
        assert numbered(path) == 0
        assert names(path.parent) == ["it"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    trainer.skipped_steps = 4
    trainer.save(path)
    assert numbered(path) == 4


@posix_only
def test_disk_full(tmp_path):
    python("fill_disk", tmp_path, module=__name__)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_saving_fails(function, trainer, tmp_path, monkeypatch):
    trainer.save(tmp_path / "it")
    content = (tmp_path / "it").read_bytes()
    trainer.step()

    def fail(*args):
        raise OSError(errno.EACCES, "no", ".a-temporary-name")

    monkeypatch.setattr(os, function, fail)
    unchanged(trainer, lambda: trainer.save(tmp_path / "it"), PermissionError, f"no: '{tmp_path}/it'$")
    monkeypatch.undo()
    assert names(tmp_path) == ["it"]
    assert (tmp_path / "it").read_bytes() == content
    trainer.save(tmp_path / "it")
    assert (tmp_path / "it").read_bytes() != content
    assert names(tmp_path) == ["it"]


def test_saving_where_there_is_no_folder(trainer, tmp_path):
    path = tmp_path / "nowhere" / "it"
    with pytest.raises(FileNotFoundError, match=re.escape(f"'{path}'") + "$"):
        trainer.save(path)
    assert names(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_saving_into_a_folder_that_cannot_be_written(trainer, tmp_path):
    trainer.save(tmp_path / "it")
    content = (tmp_path / "it").read_bytes()
    trainer.step()
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match=re.escape(f"'{tmp_path}/it'") + "$"):
            trainer.save(tmp_path / "it")
    finally:
        tmp_path.chmod(0o700)
    assert (tmp_path / "it").read_bytes() == content


def test_paths_of_every_kind(trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("it", Path("it"), str(tmp_path / "ü 1.safetensors"), tmp_path / "it"):
        trainer.save(path)
        trainer.load(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["it", "ü 1.safetensors"]


@posix_only
def test_permissions_are_those_of_any_new_file(trainer, tmp_path):
    (tmp_path / "other").touch()
    trainer.save(tmp_path / "it")
    assert oct((tmp_path / "it").stat().st_mode) == oct((tmp_path / "other").stat().st_mode)


def test_loading_while_somebody_saves(trainer, tmp_path, monkeypatch):
    """A file is replaced as a whole, so whoever opened it goes on with the old one."""
    path = tmp_path / "it"
    trainer.save(path)
    old = snapshot(trainer)
    plain = files.fill

    def fill(*args):
        found = plain(*args)
        trainer.save(path)
        return found

    reader = Trainer({"w": np.zeros(2), "b": np.zeros(3, "f4")}, "nag")
    trainer.step()
    monkeypatch.setattr(files, "fill", fill)
    reader.load(path)
    assert snapshot(reader) == old != snapshot(trainer)


def test_saving_from_two_threads(tmp_path):
    """One file, two trainers: it is the one's or the other's."""
    trainers = [Trainer([np.full(2000, value)], "nag") for value in (1.0, 2.0)]
    contents = [snapshot(trainer) for trainer in trainers]
    save = lambda trainer: [trainer.save(tmp_path / "it") for _ in range(20)]  # noqa: E731
    workers = [threading.Thread(target=save, args=(trainer,)) for trainer in trainers]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = Trainer([np.zeros(2000)], "nag")
    found.load(tmp_path / "it")
    assert snapshot(found) in contents
    assert names(tmp_path) == ["it"]


def test_arrays_that_change_while_they_are_saved(tmp_path, monkeypatch):
    """What another thread writes meanwhile is in the file or not, but the file can be read."""
    array = np.zeros(3 * tensor_file.PIECE // 8)
    trainer = Trainer([array], "nag", momentum=0)
    plain = files.put

    def put(*args):
        plain(*args)
        array[...] += 1

    monkeypatch.setattr(files, "put", put)
    trainer.save(tmp_path / "it")
    monkeypatch.undo()
    trainer.load(tmp_path / "it")
    assert set(array) <= {0, 1, 2}


# ---------------------------------------------------------------- what was there


@posix_only
@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444, 0o640], ids=oct)
def test_mode_is_kept(mode, trainer, tmp_path):
    trainer.save(tmp_path / "it")
    (tmp_path / "it").chmod(mode)
    trainer.step()
    trainer.save(tmp_path / "it")
    assert oct(stat.S_IMODE((tmp_path / "it").stat().st_mode)) == oct(mode)
    assert names(tmp_path) == ["it"]
    if os.access(tmp_path / "it", os.R_OK):
        trainer.load(tmp_path / "it")


@posix_only
def test_owner_and_group_are_kept_or_nobody_else_may_read(trainer, tmp_path, monkeypatch):
    path = tmp_path / "it"
    trainer.save(path)
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 12345, 23456)
        trainer.save(path)
        found = path.stat()
        assert (found.st_uid, found.st_gid, oct(stat.S_IMODE(found.st_mode))) == (12345, 23456, "0o640")
    plain = os.stat

    def stat_of_others(path, **kwargs):
        found = plain(path, **kwargs)
        return os.stat_result((*found[:4], 12345, 23456, *found[6:])) if Path(path).name == "it" else found

    def refuse(*args):
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(os, "stat", stat_of_others)
    monkeypatch.setattr(os, "fchown", refuse)
    trainer.save(path)
    monkeypatch.undo()
    assert oct(stat.S_IMODE(path.stat().st_mode)) == "0o600"


@posix_only
def test_a_new_file_is_not_readable_before_it_has_its_mode(trainer, tmp_path, monkeypatch):
    path = tmp_path / "it"
    trainer.save(path)
    path.chmod(0o600)
    modes, plain = set(), files.put

    def put(file, content):
        modes.add(stat.S_IMODE(os.fstat(file.fileno()).st_mode))
        plain(file, content)

    monkeypatch.setattr(files, "put", put)
    trainer.save(path)
    assert modes == {0o600}


def test_links_are_followed(trainer, tmp_path):
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link"
    link.symlink_to("folder/it")
    for _ in range(2):  # a file that is not there, and one that is
        trainer.save(link)
        assert link.is_symlink()
        assert names(tmp_path / "folder") == ["it"]
        assert names(tmp_path) == ["folder", "link"]
        trainer.load(link)
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    for call in (trainer.save, trainer.load):
        unchanged(trainer, lambda call=call: call(loop), OSError, re.escape(f"'{loop}'"))


@posix_only
def test_what_is_no_file_is_left_alone(trainer, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("fifo")
    controller, terminal = os.openpty()
    device = Path(os.ttyname(terminal))
    address = Path(f"/tmp/numba_opt-{os.getpid()}.socket")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(address))
        try:
            for path, kind in [
                (tmp_path / "fifo", "a FIFO"),
                (tmp_path / "link", "a FIFO"),
                (tmp_path / "folder", "a folder"),
                (address, "a socket"),
                (device, "a device"),
            ]:
                before = os.lstat(path).st_ino
                match = f"it is {kind}; expected a regular file: '{path}'"
                for call in (trainer.save, trainer.load):
                    unchanged(trainer, lambda p=path, call=call: call(p), OSError, re.escape(match))
                assert os.lstat(path).st_ino == before
        finally:
            address.unlink()
            os.close(controller)
            os.close(terminal)
    assert names(tmp_path) == ["fifo", "folder", "link"]


def test_names_as_long_as_the_file_system_allows(trainer, tmp_path):
    longest = os.pathconf(tmp_path, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    for length in (245, longest):
        trainer.save(tmp_path / ("x" * length))
        trainer.load(tmp_path / ("x" * length))
    path = tmp_path / ("x" * (longest + 1))
    with pytest.raises(OSError, match=r"x'$"):
        trainer.save(path)
    assert len(names(tmp_path)) == len({245, longest})


# ---------------------------------------------------------------- what killed processes leave


HOLD = """
import os, sys, time
import numpy as np
from numba_opt import Trainer
from numba_opt.io import files

def put(*args):
    print("writing", flush=True)
    sys.stdin.read()

if sys.argv[2:] == ["slow"]:
    files.put = put
Trainer([np.zeros(3)], "nag").save(sys.argv[1])
"""


def unfinished(folder, machine=None, age=0.0, token="0123456789abcdef"):
    """A file as a killed save leaves it."""
    path = folder / f".numba_opt-{machine or files._machine()}-{token}.tmp"
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age,) * 2)
    return path


@posix_only
def test_what_others_are_writing_stays(trainer, tmp_path):
    """Another process's save goes on however old its file looks, until that process is dead."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "theirs"), "slow"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=scripts.environment()
    ) as other:
        try:
            assert other.stdout.readline() == b"writing\n"
            (theirs,) = left(tmp_path)
            os.utime(tmp_path / theirs, (0, 0))
            trainer.save(tmp_path / "it")
            trainer.save(tmp_path / "theirs")
            assert names(tmp_path) == sorted([theirs, "it", "theirs"])
        finally:
            other.kill()
            other.wait()
    trainer.save(tmp_path / "it")
    assert names(tmp_path) == ["it", "theirs"]


@posix_only
def test_only_what_is_certainly_left_is_removed(trainer, tmp_path):
    mine, old = unfinished(tmp_path), unfinished(tmp_path, "0" * 8, age=2 * files.DAY)
    kept = [unfinished(tmp_path, "0" * 8, token="f" * 16)]  # another machine may be writing it
    kept += [tmp_path / name for name in (".numba_opt-mine.tmp", "it.tmp", f"x{mine.name}", f"{mine.name}x")]
    for path in kept:
        path.touch()
    (tmp_path / "aim").touch()
    link, fifo, folder = (tmp_path / f".numba_opt-{files._machine()}-{d * 16}.tmp" for d in "abc")
    link.symlink_to("aim")
    os.mkfifo(fifo)
    folder.mkdir()
    trainer.save(tmp_path / "it")
    assert not mine.exists()
    assert not old.exists()
    assert set(names(tmp_path)) == {p.name for p in (*kept, link, fifo, folder)} | {"aim", "it"}


@posix_only
def test_without_locks_nothing_is_removed(trainer, tmp_path, monkeypatch):
    """Where the file system has no locks, and where locks keep nobody out."""

    def none(*args):
        raise OSError(errno.ENOLCK, "no locks available")

    path = unfinished(tmp_path)
    for flock in (none, lambda *args: None):
        monkeypatch.setattr(files.fcntl, "flock", flock)
        trainer.save(tmp_path / "it")
        trainer.load(tmp_path / "it")
        assert names(tmp_path) == [path.name, "it"]


@posix_only
def test_cleaned_up_before_it_was_locked(trainer, tmp_path, monkeypatch):
    """Somebody's cleaning comes between the making of a file and its lock; a new file is made."""
    plain, removed = files.fcntl.flock, []

    def flock(file, operation):
        if not removed:
            removed.extend(left(tmp_path))
            (tmp_path / removed[0]).unlink()
        plain(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    trainer.save(tmp_path / "it")
    assert removed
    assert names(tmp_path) == ["it"]
    trainer.load(tmp_path / "it")


# ---------------------------------------------------------------- reading


SHORTENED = """
import os, random, sys, threading, time
import numpy as np
from numba_opt import Trainer
from numba_opt.io.checkpoint import CheckpointError

path = sys.argv[1]
trainer = Trainer([np.ones(200_000)], "nag", momentum=0)
trainer.save(path)
with open(path, "rb") as file:
    content = file.read()

def shorten():
    rng = random.Random(0)
    while not ended:
        time.sleep(rng.random() * 0.002)
        os.truncate(path, rng.randrange(len(content)))

ended = []
thread = threading.Thread(target=shorten)
thread.start()
refused = 0
for _ in range(150):
    with open(path, "r+b") as file:
        file.write(content)
    try:
        trainer.load(path)
    except CheckpointError:
        refused += 1
    assert (trainer.params["0"] == 1).all()
ended.append(True)
thread.join()
print(refused)
"""


def test_shortened_while_it_is_read(tmp_path):
    """The process lives, whenever that happens."""
    scripts.result(SHORTENED, tmp_path / "it")


@pytest.mark.parametrize("call", range(3), ids=["length", "header", "arrays"])
def test_shortened_after_its_size_was_looked_at(call, trainer, tmp_path, monkeypatch):
    path, plain, calls = tmp_path / "it", files.fill, itertools.count()

    def fill(*args):
        if next(calls) == call:
            os.truncate(path, 4)
        return plain(*args)

    trainer.save(path)
    monkeypatch.setattr(files, "fill", fill)
    match = "it: not a whole safetensors file.*shorter"
    unchanged(trainer, lambda: trainer.load(path), CheckpointError, match)


def test_memory_of_saving_and_loading(tmp_path):
    """Loading takes one copy of the file, saving hardly anything beyond the arrays."""
    make = lambda: Trainer([np.ones(500_000), np.ones((1000, 500), "f4").T], "nag")  # noqa: E731
    trainer, other = make(), make()

    def peak(call):
        tracemalloc.start()
        try:
            call()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    saving = peak(lambda: trainer.save(tmp_path / "it"))
    size = (tmp_path / "it").stat().st_size
    assert size > 12_000_000 * 0.99
    assert saving < 4 * tensor_file.PIECE + 2_500_000  # the array that is not contiguous, in order
    assert peak(lambda: other.load(tmp_path / "it")) < size + 1_000_000
    assert snapshot(other) == snapshot(trainer)


def test_a_sparse_file_that_pretends_to_be_large(trainer, tmp_path):
    path = tmp_path / "it"
    trainer.save(path)
    os.truncate(path, 2**40)
    unchanged(trainer, lambda: trainer.load(path), CheckpointError, "bytes; expected")
