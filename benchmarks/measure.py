"""
What peers.py and ladder.py share: their flags, real tokens, child processes that are timed, and reports.

    python benchmarks/measure.py        what this machine can do: its name, and the rate of large matrix products
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fineweb
from support.common import pick_device
from support.runlog import peak_flops
from train_gpt2 import PRESETS

ROOT = Path(__file__).resolve().parent.parent
# rows, tokens of a row, encoding, and the most tokens that a run reads before it begins anew
SHAPES = {"gpt2": (4, 1024, "gpt2", 1_400_000), "demo": (16, 128, "bytes", 5_000_000)}


def parse_flags(parser, name):
    """Add the flags that both programs have, and parse and check all. name: of the files, unless --name says more."""
    data = Path(os.environ.get("GPT2_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--preset", choices=SHAPES, default="gpt2")
    parser.add_argument("--source", help=f"text, as fineweb.py takes it (gpt2: {data}/fineweb; demo: stdlib)")
    parser.add_argument("--micro_batch", type=int, help="rows of a micro-batch (gpt2: 4; demo: 16)")
    parser.add_argument("--seq_len", type=int, help="tokens of a row (gpt2: 1024; demo: 128)")
    parser.add_argument("--steps", type=int, default=20, help="updates of a run; the first and the last are not timed")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each, taking turns")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--name", help="of the files to write (program, device and preset)")
    args = parser.parse_args()
    args.model_config, args.config = PRESETS[args.preset]
    micro_batch, seq_len, args.encoding, args.most_tokens = SHAPES[args.preset]
    args.source = args.source or ("stdlib" if args.preset == "demo" else str(data / "fineweb"))
    args.micro_batch, args.seq_len = args.micro_batch or micro_batch, args.seq_len or seq_len
    args.device, args.out_dir = pick_device("auto"), args.out_dir.resolve()
    args.name = args.name or f"{name}_{args.device}_{'124m' if args.preset == 'gpt2' else args.preset}"
    if min(args.micro_batch, args.seq_len, args.repetitions) < 1:
        parser.error("--micro_batch, --seq_len and --repetitions must be above 0")
    if args.seq_len > args.model_config.block_size:
        parser.error(f"--seq_len {args.seq_len} is more than the model reads: give {args.model_config.block_size}")
    if args.steps < 3:
        parser.error(f"--steps {args.steps}: give 3 or more, for the first and the last are not timed")
    return args


def make_shards(folder, args, batches):
    """Write two shards of real text, to validate and to train on, each of a whole number of micro-batches and a token.

    So build-nanogpt's loader, which drops what is left of a shard, and ours, which does not, read the same rows in
    every epoch. batches: micro-batches that a run reads, of which there are fewer where the text is short.
    """
    batch = args.micro_batch * args.seq_len
    tokens = batch * max(1, min(batches, args.most_tokens // batch)) + 1
    flags = ["--source", args.source, "--encoding", args.encoding, "--out_dir", folder]
    flags += ["--shard_tokens", tokens, "--max_tokens", 2 * tokens]
    done = subprocess.run([sys.executable, ROOT / "fineweb.py", *map(str, flags)])
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    if fineweb.read_manifest(folder)["tokens"] < 2 * tokens:
        print(f"error: --source {args.source} has less than {2 * tokens:,} tokens: name more text", file=sys.stderr)
        sys.exit(2)


class Line(NamedTuple):
    """A line of a child's output, and what there was when it came."""

    text: str
    seconds: float  # since the start
    peak_bytes: int  # most resident memory so far, 0 where the system does not say


def resident_peak(process):
    """The most memory that a process has held, in bytes; 0 if it has ended, or outside of Linux."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def run_child(command, folder):
    """Run a command in a folder: (its lines of output, seconds, peak bytes of the largest of its processes).

    Linux hands the parent's peak on as the least that a child can have, so whoever calls this stays small. The folder
    of compiled code is new and empty: each run compiles what a first run has to, but for the compiler's headers.
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
    """The steps that count: not the first and the last, nor those that build-nanogpt evaluates and samples in."""
    return [ms for step, ms in enumerate(milliseconds[:-1]) if step % 250]


def spread(values):
    """Median, p10 and p90."""
    return dict(zip(("median", "p10", "p90"), np.percentile(values, [50, 10, 90]).tolist()))


def matmul_rate(device, dtype):
    """FLOP/s of the fastest of twenty large matrix products."""
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


def limits():
    """What this machine is and can do: found out in a process of its own, which holds no memory afterwards."""
    device = pick_device("auto")
    torch.compile(lambda x: x + 1)(torch.zeros(16, device=device))  # leaves the headers, precompiled, to all later runs
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif info.exists():
        models = [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    rates = {str(dtype): matmul_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    machine = f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.system()}"
    return {"machine": machine, "matmul_flops": rates, "datasheet_flops": peak_flops(torch.device(device))}


def revision(folder):
    """The commit of a checkout, and whether it has been changed since."""
    command = ["git", "-C", folder, "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def describe(args):
    """What a result needs to be judged and repeated: command, machine, versions, revision, shape; all as text."""
    found = json.loads(subprocess.run([sys.executable, __file__], capture_output=True, check=True, text=True).stdout)
    peak, origin = found["datasheet_flops"], "its datasheet"
    if not peak:
        peak, origin = max((rate, dtype) for dtype, rate in found["matmul_flops"].items())
        origin = f"the fastest {origin} product of matrices, measured before"
    c = args.model_config
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": found["machine"] + f", load average {os.getloadavg()[0]:.2f} before",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}",
        "revision": revision(ROOT),
        "model": f"{args.preset}: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} channels, {c.vocab_size:,} ids",
        "text": args.source,
        "peak": f"{peak / 1e12:.2f} TFLOP/s, {origin}",
    }
    return peak, about


def write_report(args, title, about, rows, columns, figure):
    """Print a table, and write NAME.json, NAME.md and NAME.png.

    about: facts for the head. columns: {head: (key of a row, its format)}; what a row lacks is n/a.
    """
    args.out_dir.mkdir(parents=True, exist_ok=True)
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = (format(row[key], form) if row.get(key) is not None else "n/a" for key, form in columns.values())
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    (args.out_dir / f"{args.name}.md").write_text(text)
    (args.out_dir / f"{args.name}.json").write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")
    figure.savefig(args.out_dir / f"{args.name}.png", dpi=120)


if __name__ == "__main__":
    print(json.dumps(limits()))
