"""What every program here needs: errors for the user, exit codes, the device, atomic writes and the folder lock."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


class UserError(ValueError):
    """A mistake that the user can fix. Each line of the message names a flag or file, what is wrong and the fix."""


def one_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type's name if it has no message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the program with `error: …` lines on stderr and exit code 2 for a user error, with 130 for Ctrl-C."""
    try:
        yield
    except (UserError, OSError) as error:
        print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def pick_device(name: str) -> str:
    """Return the device that a --device flag names; auto is cuda, else mps, else cpu. Raises UserError."""
    import torch  # takes seconds, and fineweb.py and its workers do not need it

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, here in available.items() if here)
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not available.get(kind) or (index and not (index.isdigit() and int(index) < count)):
        found = ", ".join(device for device, here in available.items() if here)
        raise UserError(f"--device {name} is not available here: give auto or one of {found}")
    return name


@contextmanager
def atomic_write(path: Path, fix: str) -> Iterator[io.BufferedWriter]:
    """Open a new binary file that gets its name only when it is complete and on the disk.

    Raises UserError, which ends with `fix`, if the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
        flush_to_disk(partial)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): {fix}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Make the contents of a file, or the names in a folder, survive a power failure."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot flush folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_file(path: Path) -> FileLock:
    """Lock a file until this process ends or releases the lock; the folder is created. Raises UserError if it is held.

    The operating system releases the lock of a process that is killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(path).acquire(timeout=0).lock
    except Timeout:
        raise UserError(
            f"another run is writing to {path.parent}: wait for it to end, or give another --out_dir "
            f"(if no other run exists, delete {path})"
        ) from None
