"""
Documents to token shards, the data that train_gpt2.py reads. This file owns the encodings and the shard format.

    python fineweb.py                                                 # FineWeb-Edu, 10 billion GPT-2 tokens, 20 GB
    python fineweb.py --max_tokens 500_000_000                        # the first 5 shards of it
    python fineweb.py --source "corpus/*.jsonl" --out_dir my_data --shard_tokens 1_000_000
    python fineweb.py --source stdlib --encoding bytes --out_dir tiny --shard_tokens 500_000      # needs no network

<|endoftext|> and a document, <|endoftext|> and the next: one stream of uint16 tokens, cut every --shard_tokens tokens
into edufineweb_val_000000.npy, edufineweb_train_000001.npy and so on, 1-D arrays as np.save writes them. The
manifest.json beside them says their encoding, source, lengths and hashes, and whether the run finished.
"""

import functools
import glob
import gzip
import hashlib
import itertools
import json
import os
import platform
import re
import shlex
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

DATA_DIR = Path(__file__).resolve().parent / "edu_fineweb10B"
END_OF_TEXT = "<|endoftext|>"
MANIFEST = "manifest.json"
SHARD_NAME = re.compile(r"[^.].*_(train|val)(_\d+)?\.(npy|bin)$")  # ours, llm.c's and modded-nanogpt's
BIN_MAGIC, BIN_VERSION, BIN_HEADER = 20240520, 1, 1024  # of a .bin shard; the header's bytes
SUFFIXES = (".parquet", ".jsonl", ".json", ".txt")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")  # name or org/name, :config
DOCUMENTS_PER_TASK = 32  # some 50,000 tokens: 10 ms of a worker's time, and little to hold in memory


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
        mend = "connect to the network once, or set TIKTOKEN_CACHE_DIR to a folder that has it"
        raise DataError(f"cannot download GPT-2's vocabulary ({type(error).__name__}): {mend}") from error


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
        raise DataError(f"{data_dir} is unfinished: run {again}")
    if listed is None:
        for path in found:
            open_shard(path)  # raises unless it is a whole one
    else:
        for path in found:
            if path.name not in listed:
                raise DataError(f"{path} is not in {data_dir / MANIFEST}: move it elsewhere")
        for path, tokens in ((data_dir / name, entry["tokens"]) for name, entry in listed.items()):
            if path not in found or open_shard(path).size != tokens:
                state = f"does not hold its {tokens:,} tokens" if path in found else "is missing"
                raise DataError(f"{path} {state}: delete {data_dir} and run {again}")
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
    """Return a folder's manifest; where there is none, one that says GPT-2 tokens and whose `shards` is None.

    Raises DataError if it is damaged.
    """
    path = Path(data_dir, MANIFEST)
    if not path.exists():
        return {"encoding": "gpt2", "vocab_size": 50257, "finished": True, "shards": None}
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not {"encoding", "vocab_size", "finished", "shards"} <= manifest.keys():
        raise DataError(f"{path} is damaged: delete {data_dir} and run fineweb.py again")
    return manifest


def prepare_command(settings: dict, out_dir: Path) -> str:
    """Return the command line that writes a folder with a manifest's settings."""
    values = settings | {"out_dir": out_dir}
    flags = [flag for flag in ("source", "out_dir", "encoding", "shard_tokens", "max_tokens") if values.get(flag)]
    return " ".join(["python fineweb.py", *(f"--{flag} {shlex.quote(str(values[flag]))}" for flag in flags)])


# --- sources of documents ---------------------------------------------------------------------------------------------


def open_source(source: str, pinned: str | None) -> tuple[Iterator[str], str]:
    """Return a source's documents, read as they are asked for, and its revision, by which a changed source is known.

    `pinned` is the revision in the manifest of an earlier run, which a Hub dataset keeps to. Raises DataError: now if
    there is no such source, later if a document cannot be read.
    """
    if source == "stdlib":
        return stdlib_texts(), f"python {platform.python_version()}"
    name, _, config = source.partition(":")
    if Path(source).exists() or not HUB_NAME.fullmatch(source) or re.search(r"\.[a-zA-Z]\w*$", name):
        files = source_files(source)
        sizes = "".join(f"{path.name} {path.stat().st_size}\n" for path in files)
        texts = itertools.chain.from_iterable(checked(file_texts(path), path) for path in files)
        return texts, hashlib.sha256(sizes.encode()).hexdigest()[:16]
    from huggingface_hub import HfApi

    try:
        revision = pinned or HfApi().dataset_info(name, timeout=30).sha
    except Exception as error:  # the hub's, its HTTP library's (which has changed names) or the system's
        reason = f"is no file here, and the Hugging Face Hub gave no such dataset ({first_line(error)})"
        raise DataError(f"{source} {reason}: check --source and the network") from error
    return checked(hub_texts(name, config or None, revision), source), revision


def source_files(source: str) -> list[Path]:
    """Return the files of a path, a glob or a folder (all that is below it, unless hidden), sorted by name."""
    path = Path(source).expanduser()
    if path.is_dir():
        below = [file for file in path.rglob("*") if file.is_file() and text_format(file) in SUFFIXES]
        files = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    else:
        files = [path] if path.exists() else [Path(match) for match in glob.glob(str(path), recursive=True)]
    if not files:
        raise DataError(f"{source}: no such file, or no {', '.join(SUFFIXES)} file in it: check --source")
    for file in files:
        if text_format(file) not in SUFFIXES or file.stat().st_size == 0:
            state = "is empty" if text_format(file) in SUFFIXES else f"is none of {', '.join(SUFFIXES)}, or such a .gz"
            raise DataError(f"{file} {state}: check --source")
    return sorted(files)


def text_format(path: Path) -> str:
    """Return ".txt" for a.txt and a.txt.gz alike."""
    return Path(path.name.removesuffix(".gz")).suffix


def file_texts(path: Path) -> Iterator[str | None]:
    """Yield the `text` of each row of a file, None for a row without; the whole of a .txt file."""
    # Not through `datasets`: its JSON reader makes a date of the text "2024-01-01", and stops at a lone surrogate.
    if text_format(path) == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if "text" not in columns:
                raise DataError(f"{path} has no column `text` (it has {', '.join(columns)}): check --source")
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                yield from batch.column(0).to_pylist()
        return
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
        if text_format(path) == ".txt":
            yield file.read()
            return
        is_array = text_format(path) == ".json" and file.read(1) == "["  # else, and in .jsonl, a line is a row
        file.seek(0)
        for row in json.load(file) if is_array else (json.loads(line) for line in file if not line.isspace()):
            yield row.get("text") if isinstance(row, dict) else None


def hub_texts(name: str, config: str | None, revision: str) -> Iterator[str | None]:
    """Yield the `text` of each row of a Hub dataset, streamed: nothing is kept on disk."""
    from datasets import load_dataset

    for row in load_dataset(name, config, split="train", streaming=True, revision=revision):
        yield row.get("text")


def checked(texts: Iterable[str | None], origin: str | Path) -> Iterator[str]:
    """Yield the texts; a row without one, or a failure to read, becomes a DataError that names the origin."""
    row = 0
    try:
        for row, text in enumerate(texts, start=1):
            if not isinstance(text, str):
                raise DataError(f"{origin}: row {row} has no string named `text`: check --source")
            yield text
    except DataError:
        raise
    except Exception as error:  # the hub, HTTP, arrow, gzip and json each have errors of their own
        raise DataError(f"{origin} cannot be read after row {row} ({first_line(error)}): check --source") from error


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


# --- writing shards ---------------------------------------------------------------------------------------------------


def encode_texts(texts: list[str], encoding_name: str) -> np.ndarray:
    """Return the tokens of all texts, each preceded by <|endoftext|>, as one (n,) uint16 array."""
    encoding = get_encoding(encoding_name)  # built once in each process
    parts = []
    for text in texts:
        try:
            tokens = encoding.encode_to_numpy(text, disallowed_special=())  # encode_ordinary, faster by a quarter
        except UnicodeEncodeError:  # a lone surrogate, for which encode_ordinary puts U+FFFD
            tokens = encoding.encode_ordinary(text)
        parts += [[encoding.eot_token], tokens]
    return np.concatenate(parts).astype(np.uint16)


def encode_all(texts: Iterator[str], encoding_name: str, workers: int) -> Iterator[np.ndarray]:
    """Yield the tokens of all texts, in order, as (n,) uint16 arrays."""
    tasks = iter(lambda: list(itertools.islice(texts, DOCUMENTS_PER_TASK)), [])
    if workers <= 1:
        yield from (encode_texts(task, encoding_name) for task in tasks)
        return
    with ProcessPoolExecutor(workers) as pool:
        in_flight = deque()  # not pool.map, which would read the whole source into memory at once
        for task in tasks:
            in_flight.append(pool.submit(encode_texts, task, encoding_name))
            if len(in_flight) == 4 * workers:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()


@contextmanager
def atomic_write(path: Path):
    """Open a new file that bears its name only once it is whole and on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_manifest(out_dir: Path, manifest: dict) -> None:
    with atomic_write(out_dir / MANIFEST) as file:
        file.write((json.dumps(manifest, indent=2) + "\n").encode())


def write_shard(out_dir: Path, manifest: dict, tokens: np.ndarray) -> None:
    """Write the next shard, and enter it in the manifest."""
    index = len(manifest["shards"])
    name = f"edufineweb_{'train' if index else 'val'}_{index:06d}.npy"
    with atomic_write(out_dir / name) as file:
        np.save(file, tokens)
        file.seek(0)
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
        manifest["shards"][name] = {"tokens": tokens.size, "sha256": digest.hexdigest()}
        write_manifest(out_dir, manifest)  # entered before it appears: a restart knows each file that is its own
    if not sys.stderr.isatty():  # where no progress bar is drawn
        print(f"{name}  {tokens.size:,} tokens", flush=True)


def write_shards(arrays: Iterable[np.ndarray], out_dir: Path, manifest: dict) -> None:
    """Cut the stream of tokens into shards, and fill in the manifest. Raises DataError if none is left for training."""
    eot = get_encoding(manifest["encoding"]).eot_token
    shard_tokens, max_tokens = manifest["shard_tokens"], manifest["max_tokens"] or sys.maxsize
    shard, filled = np.empty(shard_tokens, dtype=np.uint16), 0
    # disable=None: draws only on a terminal
    with tqdm(total=manifest["max_tokens"], unit="tok", unit_scale=True, disable=None) as progress:
        for tokens in arrays:
            tokens = tokens[: max_tokens - manifest["tokens"]]
            manifest["tokens"] += tokens.size
            manifest["documents"] += int(np.count_nonzero(tokens == eot))  # no text encodes to it
            progress.update(tokens.size)
            while tokens.size:
                if filled == shard_tokens:  # written only now that more follows, so that some is left for training
                    write_shard(out_dir, manifest, shard)
                    filled = 0
                taken = min(tokens.size, shard_tokens - filled)
                shard[filled : filled + taken] = tokens[:taken]
                filled, tokens = filled + taken, tokens[taken:]
            if manifest["tokens"] == max_tokens:
                break
    if not manifest["shards"]:
        reason = f"{manifest['source']} has {filled:,} tokens, which all go into the first shard, for validation"
        raise DataError(f"{reason}: lower --shard_tokens, to {filled // 20 + 1} say")
    write_shard(out_dir, manifest, shard[:filled])


def is_complete(out_dir: Path, settings: dict, before: dict) -> bool:
    """Return whether a folder holds the finished result; if not, clear it of an unfinished run with the same settings.

    `before` is the manifest that it has. Raises DataError if anything else is there.
    """
    listed, mend = before["shards"] or {}, "name another --out_dir, or delete this one"
    for path in list_shards(out_dir):
        if path.name not in listed:
            raise DataError(f"{path} is already there, and not of this run: {mend}")
    differing = [f"{key} {before.get(key)}" for key, value in settings.items() if before.get(key) != value]
    if listed and differing:
        raise DataError(f"{out_dir} holds shards of other settings ({', '.join(differing)}): {mend}")
    if listed and before["finished"]:
        find_shards(out_dir, "train")  # raises unless they are whole
        return True
    for name in listed:
        (out_dir / name).unlink(missing_ok=True)
    return False


def prepare(
    source: str = "HuggingFaceFW/fineweb-edu:sample-10BT",
    out_dir: Path = DATA_DIR,
    encoding: str = "gpt2",
    shard_tokens: int = 100_000_000,
    max_tokens: int | None = None,
    workers: int | None = None,
) -> dict:
    """Tokenize documents into shards for train_gpt2.py; a folder that already holds the result is left as it is.

    Args:
        source: a Hugging Face dataset (name or name:config); or a .parquet, .jsonl, .json or .txt file, or a folder or
            glob of them, of rows with a `text` (a .txt is one document); or stdlib, Python's own library
        out_dir: the folder to write
        encoding: gpt2, or bytes, which needs no download
        shard_tokens: tokens in a shard, of which the first is for validation
        max_tokens: stop after this many
        workers: processes that tokenize, by default one a core

    Returns: the manifest. Raises: DataError.
    """
    start, out_dir = time.time(), Path(out_dir)
    vocab_size = get_encoding(encoding).n_vocab
    if shard_tokens < 1:
        raise DataError(f"--shard_tokens {shard_tokens}: give at least 1")
    if max_tokens is not None and max_tokens <= shard_tokens:
        mend = f"give more than --shard_tokens {shard_tokens}, or lower that"
        raise DataError(f"--max_tokens {max_tokens} fill no more than the validation shard: {mend}")
    if workers is not None and workers < 1:
        raise DataError(f"--workers {workers}: give at least 1")
    before = read_manifest(out_dir)
    texts, revision = open_source(source, before.get("revision") if before.get("source") == source else None)
    settings = {"encoding": encoding, "vocab_size": vocab_size, "source": source, "revision": revision}
    settings |= {"shard_tokens": shard_tokens, "max_tokens": max_tokens}
    if is_complete(out_dir, settings, before):
        print(f"{out_dir} is complete: {before['tokens']:,} tokens in {len(before['shards'])} shards")
        return before

    manifest = settings | {"documents": 0, "tokens": 0, "shards": {}, "finished": False}
    out_dir.mkdir(parents=True, exist_ok=True)
    write_manifest(out_dir, manifest)
    workers = min(os.cpu_count(), 61) if workers is None else workers  # 61: Windows waits for no more
    write_shards(encode_all(texts, encoding, workers), out_dir, manifest)
    manifest["finished"] = True
    write_manifest(out_dir, manifest)
    counts = f"{manifest['tokens']:,} tokens, {manifest['documents']:,} documents, {len(manifest['shards'])} shards"
    print(f"{counts} in {out_dir}, in {time.time() - start:.1f} s")
    return manifest


def main() -> None:
    import tyro

    try:
        tyro.cli(prepare, use_underscores=True)
    except (DataError, OSError) as error:
        mend = ": check --out_dir" if isinstance(error, OSError) else ""  # of a source it would be a DataError
        print(f"error: {error}{mend}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
