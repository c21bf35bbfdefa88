"""
Any corpus to texts: files, folders and globs, a dataset of the Hugging Face Hub, or Python's standard library.

A source becomes a sequence of tasks, each small enough for one worker. The same source always gives the same tasks, so
a run that continues an earlier one can skip the tasks that are done. Heavy packages are imported only where they are
used, because every worker imports this file.
"""

import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from support.common import UserError, one_line

SUFFIXES = (".parquet", ".jsonl", ".json", ".txt")  # .gz may follow
MANIFEST_NAME = re.compile(r"manifest(_node\d+)?\.json")  # written by fineweb.py beside its shards; never a document
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")  # name or org/name, then an optional :config
TASK_CHARACTERS = 2**20  # a worker tokenizes this many in about 40 ms, and they need little memory
ROW_GROUP_BYTES = 2**25  # a row group with at most this much text is one task; a larger one is split


class RowGroup(NamedTuple):
    """A part of a parquet file. The worker reads it, so only its tokens pass between processes."""

    path: str
    index: int
    rows_before: int


Task = list[str] | RowGroup  # the documents that a worker tokenizes at a time


# --- sources to tasks -------------------------------------------------------------------------------------------------


def open_source(source: str, pinned: str | None) -> tuple[Iterator[Task], str]:
    """Return a source's tasks, which are read when they are asked for, and its revision, which identifies its content.

    `pinned` is the revision in an earlier run's manifest. A Hub dataset is read at that revision.
    Raises UserError at once if the source does not exist, and later if a document cannot be read.
    """
    cached_parquet.cache_clear()  # a file may have changed since an earlier run in this process opened it
    if source == "stdlib":
        return batched(stdlib_texts()), f"python {platform.python_version()}"
    name, _, config = source.partition(":")
    # A name with a suffix means a file, even if there is none: asking the Hub would blame the network for a typo.
    if Path(source).exists() or not HUB_NAME.fullmatch(source) or re.search(r"\.[a-zA-Z]\w*$", name):
        try:
            files = source_files(source)
            sizes = "".join(f"{path.name} {path.stat().st_size}\n" for path in files)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror}): check --source") from error
        return file_tasks(map(str, files)), hashlib.sha256(sizes.encode()).hexdigest()[:16]
    revision = pinned or hub_dataset(name).sha
    return hub_tasks(name, config or None, revision), revision


def source_files(source: str) -> list[Path]:
    """Return the files of a path, a glob or a folder with its subfolders, sorted by name; hidden ones are left out.

    Raises UserError if there is no file or if one is empty or of another format, and OSError.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and text_format(file) in SUFFIXES]
        found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    elif path.exists():
        found = [path]
    else:
        found = {Path(match) for match in glob.glob(str(path), recursive=True)}  # ** may find a file several times
    files = sorted(file for file in found if file == path or not MANIFEST_NAME.fullmatch(file.name))
    if not files:
        raise UserError(f"{source}: no such file, or no {', '.join(SUFFIXES)} file in it: check --source")
    for file in files:
        if text_format(file) not in SUFFIXES:
            raise UserError(f"{file} is none of {', '.join(SUFFIXES)}, with or without .gz: check --source")
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty: check --source")
    return files


def text_format(path: str | Path) -> str:
    """Return the suffix without .gz: ".txt" for both a.txt and a.txt.gz."""
    return Path(str(path).removesuffix(".gz")).suffix


def hub_dataset(name: str, **options):
    """Return the Hub's description of a dataset: its files, and `sha`, the revision to pin. Raises UserError."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, timeout=30, **options)
    except Exception as error:  # from the Hub's library, from its HTTP library or from the system
        reason = f"is neither a file here nor a dataset on the Hugging Face Hub ({one_line(error)})"
        raise UserError(f"{name} {reason}: check the name and the network") from error


def hub_tasks(name: str, config: str | None, revision: str) -> Iterator[Task]:
    """Yield the tasks of a Hub dataset's split "train". They are streamed: the disk keeps nothing. Raises UserError."""
    from datasets import load_dataset, load_dataset_builder

    # `datasets` only says which files belong to a config. Our workers read them, and skip what is already done.
    try:
        files = load_dataset_builder(name, config, revision=revision).config.data_files["train"]
    except Exception as error:
        reason = f"has no split `train` to stream ({one_line(error)})"
        raise UserError(f"{name}:{config or ''} {reason}: check --source and the network") from error
    if all(text_format(file) in SUFFIXES for file in files):
        yield from file_tasks(files)
    else:
        rows = load_dataset(name, config, split="train", streaming=True, revision=revision)
        yield from batched(require_texts((row.get("text") for row in rows), name))


def file_tasks(paths: Iterable[str]) -> Iterator[Task]:
    """Yield the tasks of files, local or on the Hub (hf://…), in the order of the paths. Raises UserError."""
    for is_parquet, group in itertools.groupby(paths, key=lambda path: text_format(path) == ".parquet"):
        if is_parquet:
            yield from itertools.chain.from_iterable(map(parquet_tasks, group))
        else:
            yield from batched(itertools.chain.from_iterable(require_texts(file_texts(path), path) for path in group))


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


def parquet_tasks(path: str) -> Iterator[Task]:
    """Yield one task per row group of a parquet file: a RowGroup, or several lists of texts if it is large.

    Raises UserError if the file cannot be read or has no column `text` of strings.
    """
    try:
        file = open_parquet(path)
    except Exception as error:
        raise unreadable(path, 0, error) from error
    columns = file.schema_arrow.names
    if "text" not in columns:
        raise UserError(f"{path} has no column `text` (it has {', '.join(columns)}): check --source")
    # The metadata counts leaves: a nested column has several, and none of them has the column's own name.
    leaves = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)]
    if "text" not in leaves:
        kind = file.schema_arrow.field("text").type
        raise UserError(f"{path} has a column `text` of {kind}, not of strings: check --source")
    rows = 0
    for index in range(file.num_row_groups):
        group = file.metadata.row_group(index)
        if group.column(leaves.index("text")).total_uncompressed_size <= ROW_GROUP_BYTES:
            yield RowGroup(path, index, rows)
        else:
            batches = file.iter_batches(batch_size=64, row_groups=[index], columns=["text"], use_threads=False)
            texts = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            yield from batched(require_texts(texts, path, rows))
        rows += group.num_rows


# --- tasks to texts ---------------------------------------------------------------------------------------------------


def read_texts(task: Task) -> list[str]:
    """Return a task's documents. Raises UserError if one cannot be read."""
    if isinstance(task, list):
        return task
    return list(require_texts(row_group_texts(task), task.path, task.rows_before))


def row_group_texts(task: RowGroup) -> Iterator[str | None]:
    """Yield the column `text` of a row group. As this is a generator, its errors reach require_texts."""
    yield from cached_parquet(task.path).read_row_group(task.index, ["text"], use_threads=False).column(0).to_pylist()


def open_parquet(path: str):
    """Return a pyarrow ParquetFile, local or on the Hub."""
    import pyarrow.parquet

    file = open_file(path) if path.startswith("hf://") else path  # Arrow opens a local path without Python
    # With these options Arrow reads a row group piece by piece. By default it would hold all of it in memory.
    return pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**23)


cached_parquet = functools.lru_cache(maxsize=2)(open_parquet)  # a worker reads many row groups of the same file


def open_file(path: str) -> io.IOBase:
    """Open a file for reading bytes, local or on the Hub, whose library repeats requests that fail."""
    if not path.startswith("hf://"):
        return open(path, "rb")
    from huggingface_hub import HfFileSystem

    if text_format(path) == ".parquet":  # read in many places, so a cache would fetch more than is needed
        return HfFileSystem().open(path, cache_type="none")
    return HfFileSystem().open(path, block_size=2**24)


def file_texts(path: str) -> Iterator[str | None]:
    """Yield the `text` of each row of a .jsonl or .json file (None if it has none), or the whole of a .txt file."""
    # `datasets` is not used: its JSON reader turns the text "2024-01-01" into a date, and fails at a lone surrogate.
    with open_file(path) as raw, gzip.open(raw) if path.endswith(".gz") else raw as file:
        if text_format(path) == ".txt":
            yield file.read().decode()
            return
        # A .json file is one array, or has one row per line like .jsonl.
        is_array = text_format(path) == ".json" and file.read(256).lstrip()[:1] == b"["
        file.seek(0)
        for row in json.loads(file.read()) if is_array else (json.loads(line) for line in file if not line.isspace()):
            yield row.get("text") if isinstance(row, dict) else None


def require_texts(texts: Iterable[str | None], origin: str, rows_before: int = 0) -> Iterator[str]:
    """Yield the texts. Raises UserError, which names the origin, for a row without a text and for a failed read."""
    row = rows_before
    try:
        for row, text in enumerate(texts, start=rows_before + 1):
            if not isinstance(text, str):
                raise UserError(f"{origin}: row {row} has no string named `text`: check --source")
            yield text
    except UserError:
        raise
    except Exception as error:  # the Hub, HTTP, Arrow, gzip and json each raise their own errors
        raise unreadable(origin, row, error) from error


def unreadable(origin: str, row: int, error: Exception) -> UserError:
    """Return the error for a failed read. If the source is not a local file, trying again may help."""
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
