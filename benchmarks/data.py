"""
Measure how fast documents become shards: fineweb.py, build-nanogpt's fineweb.py, and the limit that tiktoken sets.

    python benchmarks/data.py --source ../shared/data/fineweb --peer ../build-nanogpt

Both programs run as a whole, from parquet files to shards on disk. The limit is what tiktoken reaches on texts in
memory. All alternate. --source is a folder of parquet files with a column `text`; its rows are repeated until there are
--megabytes of text. --peer is a checkout of github.com/karpathy/build-nanogpt. Its script runs unchanged, but with a
`datasets.load_dataset` that opens the same files (converted to Arrow before, which is not timed), and an `os.cpu_count`
that determines its number of processes. Both programs must write the same tokens. Writes data.md and .json: see
measure.py.
"""

import functools
import hashlib
import multiprocessing
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tiktoken
from measure import ROOT, describe, make_parser, parse_flags, require_checkouts, run_main, write_report

from support.common import UserError

# takes the place of the package `datasets` in build-nanogpt's process
PEER_DATASETS = """
import importlib, os, sys
os.cpu_count = lambda: 2 * int(os.environ["PROCESSES"])  # it uses half of them
sys.path.remove(os.path.dirname(__file__))
del sys.modules["datasets"]
datasets = importlib.import_module("datasets")
load = datasets.load_dataset
datasets.load_dataset = lambda *args, **kwargs: load(
    "parquet", data_dir=os.environ["CORPUS"], split="train", cache_dir=os.environ["CACHE"])
"""
COLUMNS = {
    "program": ("program", ""), "processes that tokenize": ("processes", ""), "tokens/s": ("tokens_per_second", ",.0f"),
    "share of tiktoken's limit": ("share", ".0%"), "peak memory, MB": ("megabytes", ",.0f"),
}  # fmt: skip


def make_corpus(source: Path, folder: Path, megabytes: int) -> None:
    """Write parquet files with at least this much text, in row groups of 1,000 rows like FineWeb-Edu's.

    Raises UserError if the source has no parquet files.
    """
    if not (paths := sorted(source.glob("*.parquet"))):
        raise UserError(f"--source {source} has no parquet files: give a folder of them, with a column `text`")
    table = pa.concat_tables([pa.parquet.read_table(path, columns=["text"]) for path in paths])
    times = -(-megabytes * 10**6 // table.nbytes)
    folder.mkdir()
    for i in range(times):
        pa.parquet.write_table(table, folder / f"{i:03d}.parquet", row_group_size=1000, compression="zstd")


def resident_bytes(root: int) -> int:
    """Return the resident memory of a process and its descendants. Each process counts the pages that it shares."""
    parents, resident = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended
            continue
        process = int(stat.parent.name)
        parents[process], resident[process] = int(fields[1]), int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    tree, size = {root}, 0
    while len(tree) > size:
        size = len(tree)
        tree |= {process for process, parent in parents.items() if parent in tree}
    return sum(resident.get(process, 0) for process in tree)


def run_watched(command: list, folder: Path, environment: dict) -> tuple[float, int]:
    """Run a command. Return its seconds, and the peak of the memory of all its processes together, in bytes."""
    start, peak = time.perf_counter(), 0
    log = folder / "log.txt"
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*map(str, command)], cwd=folder, env={**os.environ, **environment}, stdout=output, stderr=output
        )
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid))
            time.sleep(0.05)
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"error: {shlex.join(map(str, command))} failed: {log.read_text()[-2000:]}")
    return seconds, peak


def encode_alone(corpus: Path, barrier, results) -> None:
    """Encode all texts with encode_to_numpy, at the same time as the other processes. Put the tokens per second."""
    encoding = tiktoken.get_encoding("gpt2")
    texts = pa.parquet.read_table(next(corpus.glob("*.parquet")))["text"].to_pylist() * 2
    barrier.wait()
    start = time.perf_counter()
    tokens = sum(1 + encoding.encode_to_numpy(text, disallowed_special=()).size for text in texts)
    results.put(tokens / (time.perf_counter() - start))


def run_limit(folder: Path, corpus: Path, processes: int) -> dict:
    """Return the tokens per second of tiktoken alone in this many processes."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    workers = [context.Process(target=encode_alone, args=(corpus, barrier, results)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    rate = sum(results.get() for _ in workers)
    for worker in workers:
        worker.join()
    return {"tokens_per_second": rate}


def run_ours(folder: Path, corpus: Path, processes: int, shard_tokens: int) -> dict:
    """Run fineweb.py with this many workers. Return its figures."""
    flags = ["--source", corpus, "--out_dir", folder / "out", "--shard_tokens", shard_tokens, "--workers", processes]
    seconds, peak = run_watched([sys.executable, ROOT / "fineweb.py", *flags], folder, {})
    return totals(folder / "out", seconds, peak)


def run_peer(folder: Path, corpus: Path, processes: int) -> dict:
    """Run build-nanogpt's fineweb.py with this many processes. Return its figures."""
    environment = {"PROCESSES": str(processes), "CORPUS": str(corpus), "CACHE": str(folder / "cache")}
    shutil.rmtree(folder / "edu_fineweb10B", ignore_errors=True)
    seconds, peak = run_watched([sys.executable, folder / "fineweb.py"], folder, environment)
    return totals(folder / "edu_fineweb10B", seconds, peak)


def totals(out: Path, seconds: float, peak: int) -> dict:
    """Return the figures of a run, and delete its shards."""
    shards = sorted(out.glob("*.npy"), key=lambda path: path.name[-10:])
    stream = np.concatenate([np.load(shard) for shard in shards])  # (tokens,) uint16
    shutil.rmtree(out)
    digest = hashlib.sha256(stream).hexdigest()
    rate = stream.size / seconds
    return {"tokens_per_second": rate, "seconds": seconds, "peak_bytes": peak, "tokens": stream.size, "sha256": digest}


def run_all(args):
    """Return {(program, processes): figures of each run}. Raises UserError if the programs write different tokens."""
    ours = functools.partial(run_ours, shard_tokens=args.shard_tokens)
    programs = {"tiktoken alone": run_limit, "build-nanogpt": run_peer, "fineweb.py": ours}
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, corpus = Path(temporary), Path(temporary, "corpus")
        make_corpus(args.source, corpus, args.megabytes)
        shutil.copy(args.peer / "fineweb.py", folder)
        (folder / "datasets.py").write_text(PEER_DATASETS)
        run_peer(folder, corpus, 1)  # creates its Arrow files
        for _ in range(args.repetitions):
            for processes in args.processes:
                for name, program in programs.items():
                    figures.setdefault((name, processes), []).append(program(folder, corpus, processes))
                    rate = figures[name, processes][-1]["tokens_per_second"]
                    print(f"{name}, {processes} processes: {rate:,.0f} tokens/s", file=sys.stderr, flush=True)
    outputs = {(run["tokens"], run["sha256"]) for runs in figures.values() for run in runs if "sha256" in run}
    if len(outputs) > 1:
        raise UserError(f"--peer {args.peer} writes other tokens than fineweb.py: {outputs}")
    return figures


def summarize(figures):
    """Return a row for each program and number of processes."""
    rows, limits = [], {}
    for (name, processes), runs in figures.items():
        row = {"program": name, "processes": processes}
        row["tokens_per_second"] = statistics.median(run["tokens_per_second"] for run in runs)
        row["share"] = row["tokens_per_second"] / limits.setdefault(processes, row["tokens_per_second"])
        if "peak_bytes" in runs[0]:
            row["megabytes"] = max(run["peak_bytes"] for run in runs) / 1e6
        rows.append(row | {"runs": runs})
    return rows


def main():
    parser = make_parser(__doc__, repetitions=5)
    parser.add_argument("--source", type=Path, required=True, help="a folder of parquet files")
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of build-nanogpt")
    parser.add_argument("--megabytes", type=int, default=300, help="of text")
    parser.add_argument("--shard_tokens", type=int, default=5_000_000, help="tokens of a shard of fineweb.py")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes that tokenize")
    args = parse_flags(parser, "data")
    require_checkouts(parser, peer=(args.peer, "fineweb.py"))
    about = describe(("tiktoken", "numpy", "pyarrow", "datasets"))
    rows = summarize(run_all(args))
    tokens = rows[-1]["runs"][0]["tokens"]
    about |= {
        "corpus": f"{tokens:,} tokens, {args.megabytes} MB of text, zstd parquet in row groups of 1,000",
        "runs": f"{args.repetitions}, alternating; medians, and the highest memory",
    }
    write_report(args, "From documents to shards", about, rows, COLUMNS)


if __name__ == "__main__":
    run_main(main)
