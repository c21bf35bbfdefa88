"""What every program here needs: user errors, exit codes, flags, device and precision, atomic writes, the lock."""

import errno
import io
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import field, fields
from functools import lru_cache
from pathlib import Path

from filelock import FileLock, Timeout


class UserError(ValueError):
    """A mistake that the user can fix. Each line of the message names a flag or file, what is wrong and the fix."""


def one_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type's name if it has no message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def quoted(path: str | Path) -> str:
    """Return a path for a printed command: relative to the working directory if it is below it, quoted if necessary."""
    try:
        relative = os.path.relpath(path)
    except ValueError:  # another drive of Windows
        relative = ".."
    return shlex.quote(os.path.abspath(path) if relative.startswith("..") else relative)


def warn(message: str) -> None:
    """Print a line on stderr about something that the program continues without."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def lfs_message(path: str | Path) -> str:
    """Return a line if a file, or a file of a model folder, is only git-lfs's pointer to it. Otherwise return ""."""
    suffixes = (".safetensors", ".bin", ".pt", ".json", ".txt", ".model")
    files = sorted(file for file in Path(path).iterdir() if file.suffix in suffixes) if os.path.isdir(path) else [path]
    for file in files:
        with suppress(OSError), open(file, "rb") as opened:
            if opened.read(24) == b"version https://git-lfs.":
                folder = shlex.quote(str(Path(file).absolute().parent))
                return f"{file} is a git-lfs pointer, not the file itself: run `git -C {folder} lfs pull`"
    return ""


class TolerantStream:
    """A text stream that never fails: it replaces characters that it cannot encode, and drops text after an error.

    A run must outlive its terminal (EIO) and the program that reads its output, such as `head` (EPIPE).
    A line is written as a whole, because print() writes its end separately and other threads also print.
    """

    def __init__(self, stream):
        self.stream, self.own = stream, threading.local()  # each thread has its own unwritten text

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.own.unwritten = getattr(self.own, "unwritten", "") + text
        if text.endswith("\n"):
            self._write()
        return len(text)

    def flush(self):
        self._write()
        self._try(self.stream.flush)

    def _write(self):
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        text, self.own.unwritten = getattr(self.own, "unwritten", ""), ""
        self._try(self.stream.write, text.encode(encoding, "replace").decode(encoding))

    def _try(self, function, *values):
        try:
            function(*values)
        except (OSError, ValueError):  # ValueError: the stream is closed
            with suppress(OSError, ValueError):  # a notebook's stream has no descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # or Python would fail as it exits


@contextmanager
def tolerant_output() -> Iterator[None]:
    """Make sys.stdout and sys.stderr streams that never fail, for the time of a `with` block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(TolerantStream, before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the program with `error: …` lines on stderr and exit code 2 for a user error, with 130 for Ctrl-C."""
    try:
        yield
    except (UserError, OSError) as error:
        print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr, flush=True)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:  # RuntimeError: torch's, for a CPU and for a GPU
        if isinstance(error, RuntimeError) and not re.search("allocate memory|out of memory", str(error)):
            raise
        fix = "give smaller numbers of samples, of tokens or of the model's size"
        print(f"error: out of memory ({one_line(error)}): {fix}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def flag(default, resume="fixed", above=None, at_least=None, at_most=None):
    """Return a dataclass field for a flag. `above`, `at_least` and `at_most` bound its number. `resume` says whether a
    resumed run may change it: "free", "named" (only if --override names it) or "fixed" (it shapes tensors or data).
    """
    bounds = {"above": above, "at_least": at_least, "at_most": at_most}
    return field(default=default, metadata={"resume": resume, **bounds})


def cli(function, arguments: list[str] | None = None, **options):
    """Call a function with the flags that tyro makes of its parameters, and return its result. For --version, print one
    line instead and exit.

    arguments: those of the program by default. options: of tyro.cli.
    """
    import tyro  # takes a while, and a script that is imported does not need it

    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        import torch  # only torch itself knows its build, such as +cu130; its package may be called just 2.13.0

        print(f"revision {git_revision()}, Python {platform.python_version()}, torch {torch.__version__}")
        sys.exit()
    return tyro.cli(function, args=arguments, use_underscores=True, **options)


def git_revision() -> str:
    """Return the git revision of this project, with "-dirty" if files are changed, or "unknown" without git."""
    root = Path(__file__).resolve().parent.parent
    git = ["git", "--no-optional-locks", "-C", root, "describe", "--always", "--dirty"]
    if not (root / ".git").exists():
        return "unknown"  # git would describe another project, in whose folder this one lies
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def given_flags(arguments: list[str]) -> set[str]:
    """Return the names of the flags on a command line: n_layer for --n_layer 2 and for --n-layer=2."""
    return {text[2:].partition("=")[0].replace("-", "_") for text in arguments if text.startswith("--")}


def range_errors(config) -> list[str]:
    """Return a line for each number of a dataclass of flags that is out of its bounds."""
    errors = []
    for f in fields(config):
        value = getattr(config, f.name)
        above, at_least, at_most = f.metadata["above"], f.metadata["at_least"], f.metadata["at_most"]
        if not isinstance(value, (int, float)) or (above, at_least, at_most) == (None, None, None):
            continue
        if above is not None and not value > above:
            errors.append(f"--{f.name} is {value}: it must be above {above}")
        elif at_least is not None and not value >= at_least:
            errors.append(f"--{f.name} is {value}: it must be {at_least} or more")
        elif at_most is not None and not value <= at_most:
            errors.append(f"--{f.name} is {value}: it must be at most {at_most}")
        elif value == math.inf:
            errors.append(f"--{f.name} is inf: it must be finite")
        elif isinstance(value, int) and value >= 2**63:
            errors.append(f"--{f.name} is {value}: it must be below 2**63")
    return errors


def pick_device(name: str) -> str:
    """Return the device that a --device flag names; auto is cuda, else mps, else cpu. Raises UserError."""
    import torch  # takes seconds, and fineweb.py and its workers do not need it

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, here in available.items() if here)
    try:
        if not available.get(name.partition(":")[0]):
            raise RuntimeError("torch does not find it")
        if os.environ.get("WORLD_SIZE", "1") == "1":  # several processes would all occupy the first GPU
            torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = ", ".join(device for device, here in available.items() if here)
        raise UserError(f"--device {name} cannot be used ({one_line(error)}): give auto or one of {found}") from error
    return name


def pick_dtype(name: str, device_type: str):
    """Return the torch.dtype that a --dtype flag names; auto: bfloat16 if the hardware has it, float16 on older GPUs,
    else float32.
    """
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device_type == "mps":
        return torch.bfloat16
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 does not have it
    return torch.bfloat16 if any(capabilities.get(k) for k in ("avx512_bf16", "amx_bf16", "bf16")) else torch.float32


def can_compile(choice: str, device, warns: bool) -> bool:
    """Return whether to use torch.compile: --compile on or auto, and it works here. auto excludes mps.

    The test compiles one line. Prints a warning, if `warns`, when it fails.
    """
    import torch

    if choice == "off" or (choice == "auto" and device.type == "mps"):
        return False
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(16, device=device))
        return True
    except Exception as error:  # Inductor, Triton and the compilers that they call raise errors of their own
        if warns:
            warn(f"torch.compile does not work here ({one_line(error)}): training continues without it, slower")
        return False


@lru_cache  # outside of a model, so that a copy of the model is a copy
def compiled(function):
    """Return a function compiled by torch as one graph, for tensors of fixed shapes."""
    import torch

    return torch.compile(function, dynamic=False, fullgraph=True)


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
    is_folder = path.is_dir()
    if is_folder and os.name != "posix":
        return  # Windows cannot flush folders
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise  # some network file systems cannot flush folders
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, whose folder is created. Raises UserError if another process holds it.

    The operating system releases the lock of a process that is killed. A file system without locks gets a warning.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another run is writing to {path.parent}: wait for it to end, or give another --out_dir "
            f"(if no other run exists, delete {path})"
        ) from None
    except (OSError, NotImplementedError) as error:
        without_locks = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
        if isinstance(error, OSError) and error.errno not in without_locks:
            raise
        warn(f"{path.parent} is on a file system without locks: do not start a second run into it")
    try:
        yield
    finally:
        lock.release()
