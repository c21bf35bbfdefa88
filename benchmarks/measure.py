"""
What the benchmarks share: common flags, real tokens, child processes that are timed, and reports.

Each benchmark prints a table and writes it to OUT_DIR/NAME.md, with all its numbers in OUT_DIR/NAME.json and for some a
figure in OUT_DIR/NAME.png. The default of --out_dir is benchmarks/out/, which git ignores, so that a trial run never
replaces a published result. The published results are in benchmarks/results/. To replace one, commit all changes, stop
other programs on the machine, and run the benchmark with --out_dir benchmarks/results.

Importing this file also makes the project's modules importable. Each benchmark imports it before them.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

# Python finds modules in a script's own folder. The project's modules are in the folder above it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fineweb
from support.common import UserError, exit_on_error, pick_device
from support.hardware import peak_flops
from train_gpt2 import PRESETS

ROOT = Path(__file__).resolve().parent.parent


class Shape(NamedTuple):
    """What a training benchmark does by default."""

    micro_batch: int  # sequences
    seq_len: int  # tokens of a sequence
    encoding: str
    most_tokens: int  # of a shard; a run that needs more reads it several times


SHAPES = {"gpt2": Shape(4, 1024, "gpt2", 1_400_000), "demo": Shape(16, 128, "bytes", 5_000_000)}


# --- flags ------------------------------------------------------------------------------------------------------------


def make_parser(description, repetitions=None):
    """Return an argparse parser with the flags that all benchmarks have.

    repetitions: the default of --repetitions. None: there is no such flag, because nothing is timed.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if repetitions:
        parser.add_argument("--repetitions", type=int, default=repetitions, help="runs of each program, alternating")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "benchmarks" / "out", help="folder for the report")
    parser.add_argument("--name", help="name of the report's files, without suffix")
    return parser


def parse_flags(parser, name):
    """Parse and check the flags of make_parser. name: of the report's files, unless --name gives another."""
    args = parser.parse_args()
    if getattr(args, "repetitions", 1) < 1:
        parser.error(f"--repetitions {args.repetitions}: give 1 or more")
    args.name, args.out_dir = args.name or name, args.out_dir.resolve()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    return args


def require_checkouts(parser, **scripts):
    """End the program if a folder that a flag names does not contain its script. scripts: {flag: (folder, script)}."""
    for flag, (folder, script) in scripts.items():
        if folder and not (folder / script).exists():
            parser.error(f"--{flag} {folder} has no {script}: give the folder of a checkout")


def parse_training_flags(parser, name):
    """Add the flags of the training benchmarks (peers.py, ladder.py), then parse and check all flags."""
    data = Path(os.environ.get("GPT2_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--preset", choices=SHAPES, default="gpt2")
    parser.add_argument("--source", help="text, as fineweb.py takes it (gpt2: $GPT2_DATA/fineweb; demo: stdlib)")
    parser.add_argument("--micro_batch", type=int, help="sequences of a micro-batch (gpt2: 4; demo: 16)")
    parser.add_argument("--seq_len", type=int, help="tokens of a sequence (gpt2: 1024; demo: 128)")
    parser.add_argument("--steps", type=int, default=20, help="updates of a run; the first and the last are not timed")
    args = parse_flags(parser, name)
    args.model_config, args.config = PRESETS[args.preset]
    shape = SHAPES[args.preset]
    args.source = args.source or ("stdlib" if args.preset == "demo" else os.path.relpath(data / "fineweb"))
    args.micro_batch, args.seq_len = args.micro_batch or shape.micro_batch, args.seq_len or shape.seq_len
    args.device = pick_device("auto")
    if args.name == name:
        args.name = f"{name}_{args.device}_{'124m' if args.preset == 'gpt2' else args.preset}"
    if min(args.micro_batch, args.seq_len) < 1:
        parser.error("--micro_batch and --seq_len must be 1 or more")
    if args.seq_len > args.model_config.block_size:
        parser.error(f"--seq_len {args.seq_len} is more than the model can read: give {args.model_config.block_size}")
    if args.steps < 3:
        parser.error(f"--steps {args.steps}: give 3 or more, because the first and the last are not timed")
    return args


def run_main(main):
    """Run a benchmark's main function. A user error ends it with one line on stderr and exit code 2."""
    with exit_on_error():
        main()


# --- tokens and child processes ---------------------------------------------------------------------------------------


def make_shards(folder, args, batches):
    """Write two shards of real text, one for validation and one for training, each of whole micro-batches and a token.

    build-nanogpt's loader drops the end of a shard and ours does not. With these shards, both read the same sequences
    in every epoch. batches: the micro-batches that a run reads. A shorter text gives shards with fewer of them.
    Raises UserError if there is too little text.
    """
    batch, shape = args.micro_batch * args.seq_len, SHAPES[args.preset]
    tokens = batch * max(1, min(batches, shape.most_tokens // batch)) + 1
    flags = ["--source", args.source, "--encoding", shape.encoding, "--out_dir", folder]
    flags += ["--shard_tokens", tokens, "--max_tokens", 2 * tokens]
    done = subprocess.run([sys.executable, ROOT / "fineweb.py", *map(str, flags)])
    if done.returncode:
        sys.exit(done.returncode)  # it has printed why
    if fineweb.read_manifest(folder)["tokens"] < 2 * tokens:
        raise UserError(f"--source {args.source} has less than {2 * tokens:,} tokens: give more text")


class Line(NamedTuple):
    """A line of a child's output, and the state of the child when it came."""

    text: str
    seconds: float  # since the start
    peak_bytes: int  # the most resident memory so far, 0 if the system does not tell


def resident_peak(process):
    """Return the most memory that a process has held, in bytes; 0 if it has ended, or on systems other than Linux."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def run_child(command, folder):
    """Run a command in a folder. Return its lines of output, its seconds, and the peak bytes of its largest process.

    The cache of compiled code is a new folder, so that each run compiles what a first run must compile (except the
    compiler's headers). On Linux a child's peak is at least its parent's, so the calling process must stay small.
    """
    command = [*map(str, command)]
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_CACHE_DIR": cache},
        )  # fmt: skip
        lines = [Line(text, time.perf_counter() - start, resident_peak(process.pid)) for text in process.stdout]
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"error: {shlex.join(command)} failed: {''.join(line.text for line in lines)[-2000:]}")
    return lines, seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def timed(milliseconds):
    """Return the steps that count: not the first, not the last, and not those in which build-nanogpt evaluates."""
    return [ms for step, ms in enumerate(milliseconds[:-1]) if step % 250]


def spread(values):
    """Return {"median", "p10", "p90"}."""
    return dict(zip(("median", "p10", "p90"), np.percentile(values, [50, 10, 90]).tolist()))


# --- what a result needs to be judged and repeated --------------------------------------------------------------------


def machine_name():
    """Return the name of the GPU or CPU, the cores and the threads."""
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    elif info.exists():
        models = [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.system()}"


def matmul_rate(device, dtype):
    """Return the FLOP/s of the fastest of twenty large matrix products."""
    n, products = (8192, 10) if device == "cuda" else (2048, 1)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(products):
            c = a @ b
        c[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 * products / min(seconds)


def measure_machine():
    """Return what describe_training needs to know about the machine: plain values."""
    device = pick_device("auto")
    torch.compile(lambda x: x + 1)(torch.zeros(16, device=device))  # precompiles the headers for all later runs
    rates = {str(dtype): matmul_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    return {"machine": machine_name(), "matmul_flops": rates, "datasheet_flops": peak_flops(torch.device(device))}


def revision(folder):
    """Return the commit of a checkout, with -dirty if its files have changed since."""
    command = ["git", "-C", folder, "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def package_version(name):
    """Return a package's name and version. torch's own version also names its build, such as +cpu or +cu130."""
    return f"{name} {torch.__version__ if name == 'torch' else version(name)}"


def describe(packages=("torch", "numpy"), machine=None):
    """Return the head of a report: command, machine, versions of the packages, and revision, all as text."""
    return {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "machine": f"{machine or machine_name()}, load average {os.getloadavg()[0]:.2f} before",
        "versions": ", ".join([f"Python {platform.python_version()}", *map(package_version, packages)]),
        "revision": revision(ROOT),
    }


def describe_training(args):
    """Return the peak FLOP/s of the machine, and the head of the report of a training benchmark."""
    # in a process of its own, which holds no memory afterwards
    found = json.loads(subprocess.run([sys.executable, __file__], capture_output=True, check=True, text=True).stdout)
    peak, origin = found["datasheet_flops"], "from its data sheet"
    if not peak:
        peak, dtype = max((rate, dtype) for dtype, rate in found["matmul_flops"].items())
        origin = f"of the fastest {dtype} matrix product, measured before the runs"
    c = args.model_config
    model = f"{args.preset}: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} channels, {c.vocab_size:,} ids"
    about = describe(machine=found["machine"]) | {"model": model, "text": args.source}
    return peak, about | {"peak": f"{peak / 1e12:.2f} TFLOP/s, {origin}"}


# --- the report -------------------------------------------------------------------------------------------------------


def markdown(title, about, rows, columns):
    """Return a report as text: the title, the facts in `about` as a list, and the rows as a table."""
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = (format(row[key], form) if row.get(key) is not None else "n/a" for key, form in columns.values())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def compact_json(about, lists):
    """Return {**about, **lists} as JSON with one line per fact, and per element of a list."""
    parts = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in about.items()]
    for key, rows in lists.items():
        lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)
        parts.append(f"{json.dumps(key)}: [\n  {lines}\n]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write_report(args, title, about, rows, columns, figure=None, lists=None):
    """Print a table, and write NAME.md, NAME.json and, if there is a figure, NAME.png.

    about: {name: fact} for the head. columns: {heading: (key of a row, its format)}; a value that a row lacks is n/a.
    lists: {name: list} that only the JSON contains.
    """
    text = markdown(title, about, rows, columns)
    print(text)
    (args.out_dir / f"{args.name}.md").write_text(text)
    (args.out_dir / f"{args.name}.json").write_text(compact_json(about, (lists or {}) | {"rows": rows}))
    if figure:
        figure.savefig(args.out_dir / f"{args.name}.png", dpi=120)


if __name__ == "__main__":
    print(json.dumps(measure_machine()))
