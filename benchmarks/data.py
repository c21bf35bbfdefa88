"""
How fast documents become shards: fineweb.py and build-nanogpt's fineweb.py, whole programs from parquet files to
shards on disk, beside what tiktoken alone reaches on texts that lie in memory. All in one run, taking turns.

    python benchmarks/data.py --source ../shared/data/fineweb --peer ../build-nanogpt

--source is a folder of parquet files with a column `text`; its rows are repeated up to --megabytes of text. --peer is a
checkout of github.com/karpathy/build-nanogpt: its script runs as it is, with a `datasets.load_dataset` that opens the
same files (converted to Arrow before, which is not counted) and an `os.cpu_count` from which it takes its processes.
Both must give the same tokens. Writes benchmarks/results/data.json and data.md.
"""

import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
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
import tyro

ROOT = Path(__file__).resolve().parent.parent
SHARD_TOKENS = 5_000_000
PEER_DATASETS = """
import importlib, os, sys
os.cpu_count = lambda: 2 * int(os.environ["PROCESSES"])  # of which it takes half
sys.path.remove(os.path.dirname(__file__))
del sys.modules["datasets"]
datasets = importlib.import_module("datasets")
load = datasets.load_dataset
datasets.load_dataset = lambda *args, **kwargs: load(
    "parquet", data_dir=os.environ["CORPUS"], split="train", cache_dir=os.environ["CACHE"])
"""


def make_corpus(source: Path, folder: Path, megabytes: int) -> None:
    """Write parquet files of 1,000 rows a group, as FineWeb-Edu's are, with at least so much text."""
    tables = [pa.parquet.read_table(path, columns=["text"]) for path in sorted(source.glob("*.parquet"))]
    table = pa.concat_tables(tables)
    times = -(-megabytes * 10**6 // table.nbytes)
    folder.mkdir()
    for i in range(times):
        pa.parquet.write_table(table, folder / f"{i:03d}.parquet", row_group_size=1000, compression="zstd")


def resident_bytes(root: int) -> int:
    """Return the resident memory of a process and all below it, shared pages counted in each."""
    parents, resident = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        process = int(stat.parent.name)
        parents[process], resident[process] = int(fields[1]), int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    tree, size = {root}, 0
    while len(tree) > size:
        size = len(tree)
        tree |= {process for process, parent in parents.items() if parent in tree}
    return sum(resident.get(process, 0) for process in tree)


def measure(command: list, folder: Path, environment: dict) -> tuple[float, int]:
    """Run a command; return its seconds from start to end, and the most memory that was seen, in bytes."""
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
    """Encode every text with encode_to_numpy, and nothing else, at the same time as the others."""
    encoding = tiktoken.get_encoding("gpt2")
    texts = pa.parquet.read_table(next(corpus.glob("*.parquet")))["text"].to_pylist() * 2
    barrier.wait()
    start = time.perf_counter()
    tokens = sum(1 + encoding.encode_to_numpy(text, disallowed_special=()).size for text in texts)
    results.put(tokens / (time.perf_counter() - start))


def run_limit(folder: Path, corpus: Path, processes: int) -> dict:
    """Return what tiktoken reaches in so many processes at once."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    workers = [context.Process(target=encode_alone, args=(corpus, barrier, results)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    rate = sum(results.get() for _ in workers)
    for worker in workers:
        worker.join()
    return {"tokens_per_second": rate}


def run_ours(folder: Path, corpus: Path, processes: int) -> dict:
    flags = ["--source", corpus, "--out_dir", folder / "out", "--shard_tokens", SHARD_TOKENS, "--workers", processes]
    seconds, peak = measure([sys.executable, ROOT / "fineweb.py", *flags], folder, {})
    return totals(folder / "out", seconds, peak)


def run_peer(folder: Path, corpus: Path, processes: int) -> dict:
    environment = {"PROCESSES": str(processes), "CORPUS": str(corpus), "CACHE": str(folder / "cache")}
    shutil.rmtree(folder / "edu_fineweb10B", ignore_errors=True)
    seconds, peak = measure([sys.executable, folder / "fineweb.py"], folder, environment)
    return totals(folder / "edu_fineweb10B", seconds, peak)


def totals(out: Path, seconds: float, peak: int) -> dict:
    """Return the figures of a run, and remove its shards."""
    shards = sorted(out.glob("*.npy"), key=lambda path: path.name[-10:])
    stream = np.concatenate([np.load(shard) for shard in shards])  # (tokens,) uint16
    shutil.rmtree(out)
    digest = hashlib.sha256(stream).hexdigest()
    rate = stream.size / seconds
    return {"tokens_per_second": rate, "seconds": seconds, "peak_bytes": peak, "tokens": stream.size, "sha256": digest}


def write_report(rows: list[dict], about: dict) -> None:
    results = ROOT / "benchmarks" / "results"
    (results / "data.json").write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")
    lines = ["# Documents to shards", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    lines += ["", "| program | processes that tokenize | tokens/s | share of tiktoken's limit | peak memory |"]
    lines += ["|---|---|---|---|---|"]
    limits = {row["processes"]: row["tokens_per_second"] for row in rows if row["program"] == "tiktoken alone"}
    for row in rows:
        share = row["tokens_per_second"] / limits[row["processes"]]
        memory = f"{row['peak_bytes'] / 1e6:,.0f} MB" if "peak_bytes" in row else ""
        rate = f"{row['tokens_per_second'] / 1e6:.2f} M"
        lines.append(f"| {row['program']} | {row['processes']} | {rate} | {share:.0%} | {memory} |")
    text = "\n".join(lines) + "\n"
    (results / "data.md").write_text(text)
    print(text)


def main(source: Path, peer: Path, repetitions: int = 5, megabytes: int = 300) -> None:
    """Measure, and write benchmarks/results/data.json and data.md.

    Args:
        source: folder of parquet files
        peer: a checkout of build-nanogpt
        repetitions: of each program and number of processes, in turn; the median counts
        megabytes: of text
    """
    programs = {"tiktoken alone": run_limit, "build-nanogpt": run_peer, "fineweb.py": run_ours}
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, corpus = Path(temporary), Path(temporary, "corpus")
        make_corpus(source, corpus, megabytes)
        shutil.copy(peer / "fineweb.py", folder)
        (folder / "datasets.py").write_text(PEER_DATASETS)
        run_peer(folder, corpus, 1)  # makes its Arrow files
        for _ in range(repetitions):
            for processes in (1, 2):
                for name, program in programs.items():
                    figures.setdefault((name, processes), []).append(program(folder, corpus, processes))
                    print(name, processes, figures[name, processes][-1], flush=True)
    outputs = {(run["tokens"], run["sha256"]) for runs in figures.values() for run in runs if "sha256" in run}
    assert len(outputs) == 1, f"not the same tokens: {outputs}"
    rows = []
    for (name, processes), runs in figures.items():
        row = {"program": name, "processes": processes, "runs": runs}
        rows.append(row | {"tokens_per_second": statistics.median(run["tokens_per_second"] for run in runs)})
        if "peak_bytes" in runs[0]:
            rows[-1]["peak_bytes"] = max(run["peak_bytes"] for run in runs)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("tiktoken", "numpy", "pyarrow", "datasets")]
    cpu = next((line for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": f"{cpu.partition(': ')[2].strip()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": f"Python {platform.python_version()}, {', '.join(versions)}",
        "corpus": f"{outputs.pop()[0]:,} tokens, {megabytes} MB of text, zstd parquet in row groups of 1,000",
        "repetitions": f"{repetitions}, taking turns; medians, and the highest memory seen",
    }
    write_report(rows, about)


if __name__ == "__main__":
    tyro.cli(main)
