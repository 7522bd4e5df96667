"""Files that are either complete or as they were before."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DataError, TrainingError, UserError

if TYPE_CHECKING:
    from .distributed import World

log = logging.getLogger("heteroakd_fast.train")

# What systems say of a file system that cannot lock, such as some of clusters.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}
# The first letter of a file's mode, as `ls -l` shows it.
_KINDS = {"d": "a directory", "p": "a FIFO", "s": "a socket", "c": "a device", "b": "a device"}


def cache_folder() -> Path:
    """Where fetched files are kept; HETEROAKD_CACHE overrides it."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HETEROAKD_CACHE") or f"{base}/heteroakd_fast").expanduser()


def check_regular(path: Path, error: type[UserError] = DataError) -> None:
    """Refuse what is no file with content of its own: opening a FIFO would wait for its writer.

    Raises:
        UserError: of the type asked for.
    """
    if kind := _KINDS.get(stat.filemode(path.stat().st_mode)[0]):
        raise error(f"{path}: got {kind}, expected a regular file")


def write_atomically(
    path: Path, chunks: Iterable[bytes | memoryview], keep_as: Path | None = None
) -> None:
    """Write `path` beside, flush it to the disk, and rename; what was there becomes `keep_as`.

    On any failure, a full disk included, the temporary file is removed and nothing else changed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two processes that prepare the same cached file apart.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            os.replace(path, keep_as)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


def write_file(path: Path, content: bytes) -> None:
    """Write a file as `write_atomically` does.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_atomically(path, (content,))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written in a folder that only one process writes."""
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    # Without it a power cut may undo the renames. Not every system can open a folder.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path, what: str, world: World | None = None) -> Iterator[None]:
    """Make a folder, if it is not there, and keep it for one run or experiment alone; one that
    wrote nothing leaves neither the folder nor the lock behind."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    made: list[Path] = []

    def acquire() -> None:
        made.extend(path for path in (folder, *folder.parents) if not path.exists())
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # Held by the process, not by the file: what a killed run leaves locks nothing.
            lock.acquire(timeout=0)
        except Timeout:
            raise TrainingError(
                f"{folder}: another {what} is using this folder; wait for it or take another --run"
            ) from None
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise
            Path(lock.lock_file).unlink(missing_ok=True)
            text = "%s: its file system has no locks (%s); let no other %s use it meanwhile"
            log.warning(text, folder, error, what)

    try:
        if world is None:
            acquire()
        else:
            world.on_main(acquire)
        yield
    finally:
        if lock.is_locked:
            # Before the release: afterwards it may be the lock of the next run.
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
        for path in made:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()
