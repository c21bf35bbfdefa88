"""
Measure the lecture's ladder of speed, from float32 to the command with its default flags.

Each rung adds one change to the one before it. It runs in a process of its own, on the same real tokens, from the same
seed. The report also shows the lecture's figures, which are for B=16, T=1024 on an A100.

    python benchmarks/ladder.py --micro_batch 16                       # a GPU, the lecture's shape
    python benchmarks/ladder.py --micro_batch 4 --seq_len 256          # a CPU
    python benchmarks/ladder.py --profile                              # also profile the last rung

All rungs except the last compute the loss from all logits at once, as the lecture does. The vocabulary has 50,257
columns until it is padded. Until clipping is added, AdamW is the variant that torch chooses: a loop on a CPU, foreach
on a GPU. Writes ladder_DEVICE_124m.md, .json and .png: see measure.py. --profile also writes a table of the most
expensive kernels and, for chrome://tracing, trace_*.json.gz.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import (
    ROOT,
    describe_training,
    make_parser,
    make_shards,
    parse_training_flags,
    run_child,
    run_main,
    spread,
    timed,
    write_report,
)

from train_gpt2 import (
    GPT,
    DataLoaderLite,
    GPTConfig,
    Runtime,
    configure_optimizers,
    get_lr,
    setup_runtime,
    train_step,
    wrap_model,
)

FP32, TF32, BF16, COMPILED, FLASH, PADDED, CLIPPED, DEFAULT = range(8)
RUNGS = {  # name: the lecture's milliseconds of a step
    "float32, explicit attention": 1000,
    "TF32": 333,
    "bfloat16 autocast": 300,
    "torch.compile": 130,
    "flash attention": 96,
    "padded vocabulary": 93,
    "clipping, fused AdamW": 90,
    "the command by default": None,
}
COLUMNS = {
    "rung": ("rung", ""), "step, ms": ("median", ".1f"), "p10": ("p10", ".1f"), "p90": ("p90", ".1f"),
    "tok/s": ("tokens_per_second", ",.0f"), "gain": ("gain", ".2f"), "speedup": ("speedup", ".2f"),
    "lecture, A100: ms": ("lecture_ms", ""), "its gain": ("lecture_gain", ".2f"),
    "its speedup": ("lecture_speedup", ".2f"), "first step, s": ("first_step_seconds", ".1f"),
    "peak memory, GB": ("gigabytes", ".2f"), "loss": ("loss", ".4f"),
}  # fmt: skip


class UnpaddedConfig(GPTConfig):
    @property
    def padded_vocab_size(self):
        return self.vocab_size


class LectureGPT(torch.nn.Module):
    """A GPT with the lecture's loss: from one tensor of logits, over all columns, including those of the padding."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def forward(self, idx, targets):
        logits, _ = self.gpt(idx)
        return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def lecture_step(model, optimizers, scaler, loader, step, config, runtime):
    """Do one update as in the lecture before clipping. Return its loss."""
    x, y = loader.next_batch()
    (optimizer,) = optimizers
    for group in optimizer.param_groups:
        group["lr"] = get_lr(step, config)
    optimizer.zero_grad()
    with runtime.autocast():
        _, loss = model(x, y)
    loss.backward()
    optimizer.step()
    return loss.item()  # waits for the device


def build_rung(rung, args):
    """Return the arguments of train_step for a rung, except the step. All changes up to this rung are on."""
    torch.manual_seed(args.config.seed)
    config = replace(
        args.config, data_dir=str(args.data_dir), shuffle=False, micro_batch=args.micro_batch, seq_len=args.seq_len,
        total_batch_tokens=args.micro_batch * args.seq_len, max_steps=args.steps, warmup_steps=args.steps // 2,
    )  # fmt: skip
    loader = DataLoaderLite(config.data_dir, "train", args.micro_batch, args.seq_len, shuffle=False, device=args.device)
    if rung == DEFAULT:
        runtime = setup_runtime(config)
        model = GPT(args.model_config)
    else:
        if args.device == "cuda":
            torch.set_float32_matmul_precision("high" if rung >= TF32 else "highest")
        dtype = torch.bfloat16 if rung >= BF16 else torch.float32
        runtime = Runtime(0, 1, torch.device(args.device), dtype, rung >= COMPILED)
        shape = asdict(args.model_config) | {"flash": rung >= FLASH}
        if rung >= PADDED:
            shape["vocab_size"] = args.model_config.padded_vocab_size
        model = LectureGPT(GPT(UnpaddedConfig(**shape)))
        config = replace(config, optimizer="adamw", lr=6e-4, min_lr_ratio=0.1)
    model.to(runtime.device)
    if rung >= CLIPPED:
        optimizers = configure_optimizers(model, config)
    else:
        optimizers = [torch.optim.AdamW(model.parameters(), betas=config.betas, eps=config.eps)]
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    if rung == DEFAULT:
        model = wrap_model(model, runtime)
    elif runtime.compile:
        model = torch.compile(model, dynamic=False, fullgraph=True)
    return model, optimizers, scaler, loader, config, runtime


def climb(rung, args):
    """Train on a rung, and print the times of its steps as one line of JSON. With --profile, also write a profile."""
    model, optimizers, scaler, loader, config, runtime = build_rung(rung, args)
    update = train_step if rung >= CLIPPED else lecture_step
    milliseconds = []
    for step in range(args.steps):
        start = time.perf_counter()
        loss = update(model, optimizers, scaler, loader, step, config, runtime)
        milliseconds.append((time.perf_counter() - start) * 1000)
    loss = loss[0] if rung >= CLIPPED else loss  # train_step also returns the norm of the gradient
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else None
    print(json.dumps({"milliseconds": milliseconds, "loss": loss, "peak_bytes": peak}))
    if args.profile:
        with torch.profiler.profile() as profiler:
            for step in range(2):
                update(model, optimizers, scaler, loader, step, config, runtime)
        profiler.export_chrome_trace(str(args.out_dir / f"trace_{args.name}.json.gz"))
        order = "self_cuda_time_total" if args.device == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=70)
        (args.out_dir / f"{args.name}_kernels.txt").write_text(table + "\n")


def run_rung(rung, args, *more_flags):
    """Run `climb` in a process of its own. Return its figures."""
    flags = ["--rung", rung, "--data_dir", args.data_dir, "--preset", args.preset, "--micro_batch", args.micro_batch]
    flags += ["--seq_len", args.seq_len, "--steps", args.steps, "--out_dir", args.out_dir, "--name", args.name]
    lines, _, peak = run_child([sys.executable, Path(__file__).resolve(), *flags, *more_flags], ROOT)
    found = next(json.loads(line.text) for line in lines if line.text.startswith('{"milliseconds"'))
    return found | {"peak_bytes": found["peak_bytes"] or peak}


def summarize(figures, args):
    """Return a row for each rung. A gain is over the rung before it that this machine has, a speedup over the first."""
    rows = [{"rung": name, "lecture_ms": milliseconds} for name, milliseconds in RUNGS.items()]
    for rung, runs in figures.items():
        row = rows[rung]
        row |= spread([ms for run in runs for ms in timed(run["milliseconds"])])
        row["tokens_per_second"] = args.micro_batch * args.seq_len / row["median"] * 1000
        row["first_step_seconds"] = statistics.median(run["milliseconds"][0] for run in runs) / 1000
        row["gigabytes"] = max(run["peak_bytes"] for run in runs) / 1e9
        row |= {"loss": runs[0]["loss"], "runs": runs}
    for prefix, key in (("", "median"), ("lecture_", "lecture_ms")):
        known = [row for row in rows if row.get(key)]
        for before, row in zip([known[0], *known], known):
            row |= {f"{prefix}gain": before[key] / row[key], f"{prefix}speedup": known[0][key] / row[key]}
    return rows


def draw(rows):
    """Draw the speedup of each rung over the first, here and in the lecture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("lecture_speedup", "the lecture, A100", "o--"), ("speedup", "here", "o-")):
        known = [row for row in rows if key in row]
        axes.plot([row[key] for row in known], [row["rung"] for row in known], style, label=label)
    axes.set(xlabel="speedup over the first rung", xlim=(0, None))
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def main():
    parser = make_parser(__doc__, repetitions=3)
    parser.add_argument("--profile", action="store_true", help="write a trace and a table of kernels for the last rung")
    parser.add_argument("--rung", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--data_dir", type=Path, help=argparse.SUPPRESS)
    args = parse_training_flags(parser, "ladder")
    if args.rung is not None:
        return climb(args.rung, args)
    _, about = describe_training(args)
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        args.data_dir = Path(temporary, "data")
        make_shards(args.data_dir, args, args.steps)
        for _ in range(args.repetitions):
            for rung, name in enumerate(RUNGS):
                if rung != TF32 or args.device == "cuda":
                    figures.setdefault(rung, []).append(run_rung(rung, args))
                    median = statistics.median(timed(figures[rung][-1]["milliseconds"]))
                    print(f"{name}: {median:.1f} ms", file=sys.stderr, flush=True)
        rows = summarize(figures, args)
        about |= {
            "batch": f"{args.micro_batch} rows x {args.seq_len} tokens, one micro-step",
            "runs": f"{args.repetitions} of {args.steps} steps, alternating, each with an empty cache of compiled code",
            "times": "medians, without the first step, which compiles, and the last; a gain is over the rung before",
            "n/a": "not available on this machine, or not in the lecture",
            "peak memory": "allocated by torch" if args.device == "cuda" else "resident, of the largest process",
            "loss": f"of update {args.steps}, on the same rows; two rungs include the padding's ids",
        }  # fmt: skip
        write_report(args, "The lecture's ladder", about, rows, COLUMNS, draw(rows))
        if args.profile:
            run_rung(DEFAULT, args, "--profile")


if __name__ == "__main__":
    run_main(main)
