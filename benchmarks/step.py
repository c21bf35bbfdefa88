"""
Measure one training step on this machine: milliseconds, tokens per second, MFU and peak memory.

    python benchmarks/step.py --micro_batch 64 --profile               # a GPU with 40 GB or more, the lecture's shape
    python benchmarks/step.py --preset demo                            # a CPU

It calls train_step, as a run does, with real tokens. --profile also writes the most expensive kernels of two steps to
NAME_kernels.txt. Writes step_DEVICE_124m.md and .json: see measure.py.
"""

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from measure import (
    describe_training,
    make_parser,
    make_shards,
    parse_training_flags,
    resident_peak,
    run_main,
    spread,
    timed,
    write_report,
)

from support.hardware import flops_per_token
from train_gpt2 import GPT, DataLoaderLite, configure_optimizers, setup_runtime, train_step, wrap_model

COLUMNS = {
    "step, ms": ("median", ".1f"), "p10": ("p10", ".1f"), "p90": ("p90", ".1f"), "tok/s": ("tokens_per_second", ",.0f"),
    "MFU": ("mfu", ".1%"), "peak memory, GB": ("gigabytes", ".2f"), "first step, s": ("first_step_seconds", ".1f"),
    "loss": ("loss", ".4f"),
}  # fmt: skip


def set_up(args, data_dir):
    """Return the runtime, and the arguments of train_step except the step."""
    tokens = args.micro_batch * args.seq_len * args.micro_steps
    config = replace(
        args.config, data_dir=str(data_dir), shuffle=False, micro_batch=args.micro_batch, seq_len=args.seq_len,
        total_batch_tokens=tokens, compile=args.compile or args.config.compile,
        optimizer=args.optimizer or args.config.optimizer, dtype=args.dtype,
    )  # fmt: skip
    runtime = setup_runtime(config)
    torch.manual_seed(config.seed)
    raw_model = GPT(args.model_config).to(runtime.device)
    raw_model.set_activation_checkpointing(args.activation_checkpointing)
    model = wrap_model(raw_model, runtime)
    optimizers = configure_optimizers(raw_model, config)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    loader = DataLoaderLite(data_dir, "train", args.micro_batch, args.seq_len, shuffle=False, device=runtime.device)
    return runtime, (model, optimizers, scaler, loader), config


def time_steps(parts, config, runtime, steps):
    """Run updates. Return the milliseconds of each, and the last one's loss."""
    milliseconds = []
    for step in range(steps):
        start = time.perf_counter()
        loss, _ = train_step(*parts, step, config, runtime)
        milliseconds.append((time.perf_counter() - start) * 1000)
    return milliseconds, loss


def profile(parts, config, runtime, path):
    """Write a table of the kernels, or a CPU's operators, that take the most time of two updates."""
    with torch.profiler.profile() as profiler:
        time_steps(parts, config, runtime, 2)
    order = "self_cuda_time_total" if runtime.device.type == "cuda" else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90)
    path.write_text(table + "\n")


def parse_command_line():
    parser = make_parser(__doc__)
    parser.add_argument("--micro_steps", type=int, default=2, help="micro-batches of an update")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], help="the preset's by default")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--compile", choices=["auto", "on", "off"], help="the preset's by default")
    parser.add_argument("--activation_checkpointing", action="store_true", help="compute each block twice")
    parser.add_argument("--profile", action="store_true", help="also write the most expensive kernels")
    return parse_training_flags(parser, "step")


def main():
    args = parse_command_line()
    peak_flops, about = describe_training(args)
    tokens = args.micro_batch * args.seq_len * args.micro_steps
    with tempfile.TemporaryDirectory() as temporary:
        make_shards(Path(temporary, "data"), args, args.steps * args.micro_steps)
        runtime, parts, config = set_up(args, Path(temporary, "data"))
        milliseconds, loss = time_steps(parts, config, runtime, args.steps)
        on_gpu = runtime.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_gpu else resident_peak(os.getpid())
        if args.profile:
            profile(parts, config, runtime, args.out_dir / f"{args.name}_kernels.txt")
    row = spread(timed(milliseconds)) | {"loss": loss, "gigabytes": peak / 1e9, "milliseconds": milliseconds}
    row |= {"first_step_seconds": milliseconds[0] / 1000, "tokens_per_second": tokens / row["median"] * 1000}
    row["mfu"] = flops_per_token(args.model_config, args.seq_len) * row["tokens_per_second"] / peak_flops
    about |= {
        "batch": f"{args.micro_batch} rows x {args.seq_len} tokens x {args.micro_steps} micro-steps",
        "how": f"{runtime.dtype}, {'compiled' if runtime.compile else 'eager'}, {config.optimizer}",
        "times": f"of {args.steps} steps without the first, which compiles, and the last: medians",
        "peak memory": "allocated by torch" if on_gpu else "resident",
    }
    write_report(args, "A training step", about, [row], COLUMNS)


if __name__ == "__main__":
    run_main(main)
