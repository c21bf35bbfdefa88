"""
Any corpus to texts: files, folders and globs, a dataset of the Hugging Face Hub, or Python's standard library.

A source becomes a sequence of tasks, each small enough for one worker. The same source always gives the same tasks, so
a run that continues an earlier one can skip the tasks that are done. Heavy packages are imported only where they are
used, because every worker imports this file.
"""

import functools
import glob
import hashlib
import itertools
import os
import platform
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from support.common import UserError, lfs_message, one_line, warn
from support.texts import BINARY, SUFFIXES, check_column, encoding_error, file_texts, list_names, open_file, text_format

MANIFEST_NAME = re.compile(r"manifest(_node\d+)?\.json")  # written by fineweb.py beside its shards; never a document
METADATA_NAME = re.compile(r"(dataset_infos?|dataset_dict|state)\.json|cache-.*\.arrow")  # by `datasets`; neither
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")  # name or org/name, then an optional :config
TASK_CHARACTERS = 2**20  # a worker tokenizes this many in about 40 ms, and they need little memory
ROW_GROUP_BYTES = 2**25  # a row group with at most this much text is one task; a larger one is split
EARLY_CHECK = 10_000  # after this many rows, a source whose rows mostly have no text fails before its end


class RowGroup(NamedTuple):
    """A part of a parquet file. The worker reads it, so only its tokens pass between processes."""

    path: str
    column: str
    index: int
    rows_before: int


Task = list[str] | RowGroup  # the documents that a worker tokenizes at a time


class Tally:
    """The column that holds the texts, and counts of rows and files: all, and those skipped because they have none."""

    def __init__(self, column: str = "text"):
        self.column, self.total, self.skipped, self.first = column, Counter(), Counter(), {}

    def add(self, kind: str, total: int, skipped: int, example: str = "") -> None:
        """Count some rows or files; `kind` is "row" or "file". Raises UserError if most rows of many have no text."""
        self.total[kind] += total
        self.skipped[kind] += skipped
        if skipped:
            self.first.setdefault(kind, example)
            if self.total["row"] >= EARLY_CHECK:
                self.check()

    def check(self) -> None:
        """Raise UserError if more than half of the rows or of the files have no text."""
        for kind, fix in (("row", "name the column of the texts with --text_column"), ("file", "check --source")):
            skipped, total = self.skipped[kind], self.total[kind]
            if 2 * skipped > total:
                others = f", like {skipped:,} of the {total:,} {kind}s" if total > 1 else ""
                raise UserError(f"{self.first[kind]}{others}: {fix}")

    def report(self) -> None:
        """Print a warning about what was skipped, with the first example."""
        for kind, example in self.first.items():
            warn(f"skipped {self.skipped[kind]:,} of {self.total[kind]:,} {kind}s ({example})")


# --- sources to tasks -------------------------------------------------------------------------------------------------


def open_source(source: str, pinned: str | None, tally: Tally | None = None) -> tuple[Iterator[Task], str]:
    """Return a source's tasks, which are read when they are asked for, and its revision, which identifies its content.

    `pinned` is the revision in an earlier run's manifest. A Hub dataset is read at that revision. The tally counts what
    the tasks skip. Raises UserError at once if the source does not exist, and later if a document cannot be read.
    """
    cached_parquet.cache_clear()  # a file may have changed since an earlier run in this process opened it
    tally = tally or Tally()
    if source == "stdlib":
        return batched(stdlib_texts()), f"python {platform.python_version()}"
    name, _, config = source.partition(":")
    try:
        # A name with a suffix means a file, even if there is none: asking the Hub would blame the network for a typo.
        if Path(source).exists() or not HUB_NAME.fullmatch(source) or re.search(r"\.[a-zA-Z]\w*$", name):
            files = source_files(source)
            sizes = "".join(f"{path.name} {path.stat().st_size}\n" for path in files)
            return file_tasks(map(str, files), tally), hashlib.sha256(os.fsencode(sizes)).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): check --source") from error
    revision = pinned or hub_dataset(name).sha
    return hub_tasks(name, config or None, revision, tally), revision


def source_files(source: str) -> list[Path]:
    """Return the files of a path, a glob or a folder with its subfolders, sorted by name; hidden ones are left out.

    Raises UserError if there is no file, or if one is of another format or only git-lfs's pointer, and OSError.
    """
    path = Path(os.path.expanduser(source))
    # ** may find a file several times
    found = {path} if path.exists() else {Path(match) for match in glob.glob(str(path), recursive=True)}
    found = set(itertools.chain.from_iterable(folder_files(match) if match.is_dir() else [match] for match in found))
    names = (MANIFEST_NAME, METADATA_NAME)
    files = sorted(file for file in found if file == path or not any(name.fullmatch(file.name) for name in names))
    if not files:
        raise UserError(f"{source}: no such file, or no {', '.join(SUFFIXES)} file in it: check --source")
    for file in files:
        if text_format(file) not in SUFFIXES:
            raise UserError(f"{file} is none of {', '.join(SUFFIXES)}, with or without .gz or .zst: check --source")
        if not stat.S_ISREG(file.stat().st_mode):
            raise UserError(f"{file} is not a regular file: save its contents in one, and check --source")
        if message := lfs_message(file):
            raise UserError(message)
    return files


def folder_files(folder: Path) -> Iterator[Path]:
    """Yield a folder's files in our formats. Links are followed, but no folder is read twice. Raises OSError."""

    def on_error(error: OSError):
        if error.filename == str(folder):
            raise error
        warn(f"{error.filename} is skipped, because it cannot be read ({error.strerror})")

    read, starts = set(), [str(folder)]
    while starts:  # links come last, so that a folder keeps its own name
        for parent, folders, files in os.walk(starts.pop(0), onerror=on_error):
            is_new = os.path.realpath(parent) not in read
            folders[:] = [name for name in sorted(folders) if is_new and not name.startswith(".")]
            starts += [os.path.join(parent, name) for name in folders if os.path.islink(os.path.join(parent, name))]
            read.add(os.path.realpath(parent))
            for path in (Path(parent, name) for name in files if is_new and not name.startswith(".")):
                if path.is_file() and text_format(path) in SUFFIXES:
                    yield path
                elif text_format(path) in SUFFIXES:
                    warn(f"{path} is skipped, because it is not a file, or a link to none")


def hub_dataset(name: str, **options):
    """Return the Hub's description of a dataset: its files, and `sha`, the revision to pin. Raises UserError."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, timeout=30, **options)
    except Exception as error:  # from the Hub's library, from its HTTP library or from the system
        reason = f"is neither a file here nor a dataset on the Hugging Face Hub ({one_line(error)})"
        raise UserError(f"{name} {reason}: check the name and the network") from error


def hub_tasks(name: str, config: str | None, revision: str, tally: Tally) -> Iterator[Task]:
    """Yield the tasks of a Hub dataset's split "train". They are streamed: the disk keeps nothing. Raises UserError."""
    from datasets import load_dataset, load_dataset_builder

    # `datasets` only says which files belong to a config. Our workers read them, and skip what is already done.
    try:
        files = load_dataset_builder(name, config, revision=revision).config.data_files["train"]
    except Exception as error:
        reason = f"has no split `train` to stream ({one_line(error)})"
        raise UserError(f"{name}:{config or ''} {reason}: check --source and the network") from error
    if all(text_format(file) in SUFFIXES for file in files):
        yield from file_tasks(files, tally)
    else:
        rows = load_dataset(name, config, split="train", streaming=True, revision=revision)
        yield from batched(require_texts((row.get(tally.column, row) for row in rows), name, tally))
        tally.check()


def file_tasks(paths: Iterable[str], tally: Tally) -> Iterator[Task]:
    """Yield the tasks of files, local or on the Hub (hf://…), in the order of the paths. Raises UserError."""
    for is_parquet, group in itertools.groupby(paths, key=lambda path: text_format(path) == ".parquet"):
        if is_parquet:
            yield from itertools.chain.from_iterable(count_file(parquet_tasks, path, tally) for path in group)
        else:
            yield from batched(itertools.chain.from_iterable(count_file(read_file, path, tally) for path in group))
    tally.check()


def count_file(read: Callable[[str, Tally], Iterator], path: str, tally: Tally) -> Iterator:
    """Yield what `read` yields for a file, and count the file, which is skipped if it has no rows."""
    before = tally.total["row"]
    if not os.path.exists(path) or os.path.getsize(path):  # a path on the Hub does not exist here
        yield from read(path, tally)
    tally.add("file", 1, int(tally.total["row"] == before), f"{path} is empty")


def read_file(path: str, tally: Tally) -> Iterator[str]:
    """Yield the texts of a file that is not parquet. Raises UserError."""
    return require_texts(file_texts(path, tally.column, TASK_CHARACTERS), path, tally)


def batched(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield the texts in lists of TASK_CHARACTERS characters or slightly more."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= TASK_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def parquet_tasks(path: str, tally: Tally) -> Iterator[Task]:
    """Yield one task per row group of a parquet file: a RowGroup, or several lists of texts if it is large.

    Raises UserError if the file cannot be read or has no such column of strings.
    """
    try:
        file = open_parquet(path)
    except Exception as error:
        raise unreadable(path, 0, error) from error
    check_column(path, file.schema_arrow, tally.column)
    # The metadata counts leaves, of which a nested column has several.
    leaf = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)].index(tally.column)
    rows = 0
    for index in range(file.num_row_groups):
        group = file.metadata.row_group(index)
        chunk = group.column(leaf)
        statistics = chunk.statistics
        if statistics and statistics.has_null_count and chunk.total_uncompressed_size <= ROW_GROUP_BYTES:
            example = f"{path}: a row after row {rows:,} has no string named `{tally.column}`"
            tally.add("row", group.num_rows, statistics.null_count, example)
            yield RowGroup(path, tally.column, index, rows)
        else:
            batches = file.iter_batches(batch_size=64, row_groups=[index], columns=[tally.column], use_threads=False)
            texts = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            texts = require_texts(texts, path, tally, rows)
            is_small = chunk.total_uncompressed_size <= ROW_GROUP_BYTES
            yield from [list(texts)] if is_small else batched(texts)
        rows += group.num_rows


# --- tasks to texts ---------------------------------------------------------------------------------------------------


def read_texts(task: Task) -> list[str]:
    """Return a task's documents. Raises UserError if one cannot be read."""
    if isinstance(task, list):
        return task
    try:
        group = cached_parquet(task.path).read_row_group(task.index, [task.column], use_threads=False)
        return [text for text in group.column(0).to_pylist() if text is not None]  # parquet_tasks counted the others
    except Exception as error:
        raise unreadable(task.path, task.rows_before, error) from error


def open_parquet(path: str):
    """Return a pyarrow ParquetFile, local or on the Hub."""
    import pyarrow.parquet

    file = open_file(path) if path.startswith("hf://") else path  # Arrow opens a local path without Python
    # With these options Arrow reads a row group piece by piece. By default it would hold all of it in memory.
    return pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**23)


cached_parquet = functools.lru_cache(maxsize=2)(open_parquet)  # a worker reads many row groups of the same file


def require_texts(texts: Iterable, origin: str, tally: Tally, rows_before: int = 0) -> Iterator[str]:
    """Yield the texts, and count and skip what is not a string. Raises UserError, which names the origin."""
    row = rows_before
    try:
        for row, text in enumerate(texts, start=rows_before + 1):
            if isinstance(text, str):
                tally.add("row", 1, 0)
                yield text
            else:
                keys = f" (it has {list_names(text)})" if isinstance(text, dict) else ""
                tally.add("row", 1, 1, f"{origin}: row {row} has no string named `{tally.column}`{keys}")
    except UserError:
        raise
    except Exception as error:  # the Hub, HTTP, Arrow, gzip, csv and json each raise their own errors
        raise unreadable(origin, row, error) from error


def unreadable(origin: str, row: int, error: Exception) -> UserError:
    """Return the error for a failed read. If the source is not a local file, trying again may help."""
    if isinstance(error, UnicodeDecodeError) and Path(origin).exists() and text_format(origin) not in BINARY:
        return encoding_error(origin, error)
    fix = "check --source" if Path(origin).exists() else "check the network and run the same command again to continue"
    return UserError(f"{origin} cannot be read after row {row} ({one_line(error)}): {fix}")


def stdlib_texts() -> Iterator[str]:
    """Yield the modules of Python's standard library without its tests: real text that everyone has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    # The hash shuffles the modules, in the same order everywhere.
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        with suppress(UnicodeDecodeError):
            yield (root / name).read_bytes().decode()
