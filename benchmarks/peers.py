"""
Compare the speed of training with build-nanogpt and nanoGPT: whole programs, with the same text, batch and model.

    git clone https://github.com/karpathy/build-nanogpt PEER
    python benchmarks/peers.py --peer PEER --ours "--compile off"
    python benchmarks/peers.py --peer PEER --preset demo --steps 1700           # long enough to include compilation
    python benchmarks/peers.py --peer PEER --micro_batch 64 --total_batch_tokens 524288       # a GPU, the lecture's run

build-nanogpt runs as it is published, and again with use_compile = True. Only constants are set in it: shape, steps and
schedule, one validation batch, and neither HellaSwag nor samples, because they are not part of a training step. Our
program runs with its default flags, and again for each --ours. nanoGPT, if given, runs with its own defaults: it
compiles, and on a CPU it trains in float32. The programs alternate. Writes peers_DEVICE_124m.md, .json and .png: see
measure.py.
"""

import re
import shlex
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from measure import (
    ROOT,
    describe_training,
    make_parser,
    make_shards,
    parse_training_flags,
    require_checkouts,
    revision,
    run_child,
    run_main,
    spread,
    timed,
    write_report,
)

from support.common import UserError
from support.hardware import flops_per_token

# Runs a script as python does, and at its end prints the peak of the GPU's memory.
WRAPPER = """
import atexit, os, runpy, sys
def report():
    import torch
    if torch.cuda.is_available():
        print("peak bytes:", torch.cuda.max_memory_allocated(), flush=True)
atexit.register(report)
sys.argv.pop(0)
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# the line of a step in the output of each of the three programs: number, loss, milliseconds
STEP = re.compile(r"(?:step|iter)\s+(\d+)\b.*?loss:? (nan|[\d.]+).*?(?:dt:|time) ([\d.]+)ms")
COLUMNS = {
    "program": ("program", ""), "step, ms": ("median", ".1f"), "p10": ("p10", ".1f"), "p90": ("p90", ".1f"),
    "tok/s": ("tokens_per_second", ",.0f"), "MFU": ("mfu", ".1%"), "speedup of a step": ("step_speedup", ".2f"),
    "memory of training, GB": ("training_gigabytes", ".2f"), "of the program, GB": ("program_gigabytes", ".2f"),
    "until the first step ends, s": ("first_step_seconds", ".1f"), "whole program, s": ("seconds", ".1f"),
    "speedup of the program": ("program_speedup", ".2f"), "loss": ("loss", ".4f"),
}  # fmt: skip
KEPT_LOSSES = 10  # of each run, in the JSON file: enough to see that two programs train in the same way


def substitute(text, replacements, origin):
    """Replace strings in a text. Raises UserError if one of them does not occur exactly once."""
    for old, new in replacements.items():
        if (times := text.count(old)) != 1:
            raise UserError(f"{origin} contains {old!r} {times} times, not once: give an unchanged checkout")
        text = text.replace(old, new)
    return text


def make_peer(folder, args, data, use_compile):
    """Write a copy of build-nanogpt with our constants next to its data. Return the command that runs it."""
    c = args.model_config
    shape = f"block_size={c.block_size}, vocab_size={c.padded_vocab_size}, "
    shape += f"n_layer={c.n_layer}, n_head={c.n_head}, n_embd={c.n_embd}"
    replacements = {
        "total_batch_size = 524288": f"total_batch_size = {args.total_batch_tokens}",
        "B = 64": f"B = {args.micro_batch}",
        "T = 1024": f"T = {args.seq_len}",
        "GPTConfig(vocab_size=50304)": f"GPTConfig({shape})",
        "warmup_steps = 715": f"warmup_steps = {args.warmup_steps}",
        "max_steps = 19073": f"max_steps = {args.steps}",
        "val_loss_steps = 20": "val_loss_steps = 1",
        "if (step % 250 == 0 or last_step) and (not use_compile):": "if False:",
        "if ((step > 0 and step % 250 == 0) or last_step) and (not use_compile):": "if False:",
        "use_compile = False": f"use_compile = {use_compile}",
    }
    folder.mkdir()
    script = args.peer / "train_gpt2.py"
    (folder / script.name).write_text(substitute(script.read_text(), replacements, script))
    shutil.copy(args.peer / "hellaswag.py", folder)
    (folder / "edu_fineweb10B").symlink_to(data)
    return [folder / script.name]


def make_nanogpt(folder, args, data):
    """Write a copy of nanoGPT next to the same tokens in its own format. Return the command that runs it."""
    for name in ("train.py", "model.py", "configurator.py"):
        (folder / "data" / "text").mkdir(parents=True, exist_ok=True)
        shutil.copy(args.nanogpt / name, folder)
    for shard, name in zip(sorted(data.glob("*.npy"), reverse=True), ("val.bin", "train.bin"), strict=True):
        np.load(shard).tofile(folder / "data" / "text" / name)
    c = args.model_config
    source = substitute((folder / "train.py").read_text(), {"else 50304": f"else {c.padded_vocab_size}"}, "train.py")
    (folder / "train.py").write_text(source)
    flags = {
        "dataset": "text", "device": args.device, "batch_size": args.micro_batch, "block_size": args.seq_len,
        "gradient_accumulation_steps": args.total_batch_tokens // (args.micro_batch * args.seq_len),
        "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "max_iters": args.steps - 1,
        "warmup_iters": args.warmup_steps, "lr_decay_iters": args.steps, "eval_iters": 1, "eval_interval": 10**9,
    }  # fmt: skip
    if args.device == "cpu":
        flags["dtype"] = "float32"  # its default, float16, has no effect there except a warning
    return [folder / "train.py", *(f"--{name}={value}" for name, value in flags.items())]


def our_command(folder, args, data, more_flags):
    """Return our command, with the recipe, the evaluations and the order of batches of build-nanogpt."""
    flags = {
        "preset": args.preset, "data_dir": data, "out_dir": folder / "ours", "micro_batch": args.micro_batch,
        "seq_len": args.seq_len, "total_batch_tokens": args.total_batch_tokens, "max_steps": args.steps,
        "warmup_steps": args.warmup_steps, "optimizer": "adamw", "lr": 6e-4, "min_lr_ratio": 0.1,
        "eval_interval": 250, "val_tokens": args.micro_batch * args.seq_len, "save_interval": 5000,
        "sample_interval": 0, "hellaswag_file": "none", "log_interval": 1,
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in flags.items()]
    return [ROOT / "train_gpt2.py", *flags, "--no_shuffle", "--overwrite", *shlex.split(more_flags)]


def make_contestants(folder, args, data):
    """Return {name: command}. The others are compared with the first."""
    contestants = {
        "build-nanogpt": make_peer(folder / "peer", args, data, False),
        "build-nanogpt, use_compile": make_peer(folder / "peer_compiled", args, data, True),
    }
    if args.nanogpt:
        contestants["nanoGPT"] = make_nanogpt(folder / "nanogpt", args, data)
    for more_flags in ["", *args.ours]:
        contestants[f"train_gpt2.py {more_flags}".strip()] = our_command(folder, args, data, more_flags)
    return contestants


def run_once(name, command, args):
    """Run a contestant in the folder of its script. Return its figures."""
    lines, seconds, peak = run_child([sys.executable, "-c", WRAPPER, *command], command[0].parent)
    steps = [(line, match) for line in lines if (match := STEP.match(line.text))]
    if [int(match[1]) for _, match in steps] != [*range(args.steps)]:
        sys.exit(f"error: {name} did not print steps 0 to {args.steps - 1}: {''.join(line.text for line in lines)}")
    losses, milliseconds = [float(match[2]) for _, match in steps], [float(match[3]) for _, match in steps]
    on_gpu = [int(line.text.split()[-1]) for line in lines if line.text.startswith("peak bytes:")]
    median = statistics.median(timed(milliseconds))
    return {
        "median_ms": median, "timed_ms": timed(milliseconds), "first_step_seconds": steps[0][0].seconds,
        "seconds": seconds, "first_losses": losses[:KEPT_LOSSES], "loss": losses[-1],
        "training_gigabytes": (on_gpu[0] if on_gpu else steps[-2][0].peak_bytes or peak) / 1e9,
        "program_gigabytes": peak / 1e9,
    }  # fmt: skip


def summarize(name, runs, first_runs, args, peak_flops):
    """Return the row of a contestant. A speedup compares a run with the first contestant's run next to it."""
    row = {"program": name} | spread([ms for run in runs for ms in run["timed_ms"]])
    row["tokens_per_second"] = args.total_batch_tokens / row["median"] * 1000
    row["mfu"] = flops_per_token(args.model_config, args.seq_len) * row["tokens_per_second"] / peak_flops
    for key in ("first_step_seconds", "seconds", "loss"):
        row[key] = statistics.median(run[key] for run in runs)
    for key, ratio in (("median_ms", "step_speedup"), ("seconds", "program_speedup")):
        row[ratio] = statistics.median(first[key] / run[key] for first, run in zip(first_runs, runs, strict=True))
    for key in ("training_gigabytes", "program_gigabytes"):
        row[key] = max(run[key] for run in runs)
    return row | {"runs": [{key: value for key, value in run.items() if key != "timed_ms"} for run in runs]}


def draw(rows):
    """Draw bars: milliseconds of a step, and seconds of a program until its first step ends and afterwards."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.5 + 0.5 * len(rows)), layout="constrained")
    step, program = figure.subplots(1, 2, sharey=True)
    names = [row["program"] for row in rows]
    medians, p10, p90 = (np.array([row[key] for row in rows]) for key in ("median", "p10", "p90"))
    step.barh(names, medians, xerr=[medians - p10, p90 - medians], capsize=4)
    step.set(xlabel="milliseconds of a step, median, p10 to p90")
    first = np.array([row["first_step_seconds"] for row in rows])
    program.barh(names, first, label="until the first step ends")
    program.barh(names, [row["seconds"] for row in rows] - first, left=first, label="afterwards")
    program.set(xlabel="seconds of the whole program")
    figure.legend(frameon=False, loc="outside upper right", ncols=2)
    step.invert_yaxis()
    return figure


def parse_command_line():
    parser = make_parser(__doc__, repetitions=3)
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of build-nanogpt")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--ours", action="append", default=[], help='flags of another run of ours: "--compile off"')
    parser.add_argument("--total_batch_tokens", type=int, help="tokens of an update (one micro-batch)")
    args = parse_training_flags(parser, "peers")
    require_checkouts(parser, peer=(args.peer, "train_gpt2.py"), nanogpt=(args.nanogpt, "train.py"))
    batch = args.micro_batch * args.seq_len
    args.total_batch_tokens = args.total_batch_tokens or batch
    if args.total_batch_tokens % batch:
        parser.error(f"--total_batch_tokens {args.total_batch_tokens} is not a multiple of a micro-batch, {batch}")
    args.warmup_steps = min(args.config.warmup_steps, args.steps // 2)
    return args


def facts(args):
    """Return what the head of the report says about the runs."""
    where = "allocated on the GPU" if args.device == "cuda" else "resident until the step before the last"
    per_token = flops_per_token(args.model_config, args.seq_len)
    micro_steps = args.total_batch_tokens // (args.micro_batch * args.seq_len)
    layout = f"{args.micro_batch} rows x {args.seq_len} tokens x {micro_steps} micro-steps"
    return {
        "peers": ", ".join(f"{path.name} at {revision(path)}" for path in (args.peer, args.nanogpt) if path),
        "batch": f"{args.total_batch_tokens} tokens = {layout}",
        "runs": f"{args.repetitions} of {args.steps} steps, alternating, each with an empty cache of compiled code",
        "times": "printed by the programs; medians, without the steps in which build-nanogpt evaluates (0, each 250th, "
                 "the last)",
        "speedup": "over the run of build-nanogpt next to it; medians",
        "MFU": f"FLOPs of a token x tok/s / peak; FLOPs = 6 (12 L C^2 + V C) + 12 L C T = {per_token:,}",
        "memory": f"peaks: of training, {where}; of the program, resident, including the save of its last step",
        "dtypes": "build-nanogpt bfloat16 autocast; nanoGPT float32 on a CPU; ours bfloat16 if the hardware has it",
        "loss": f"of update {args.steps}; on the same rows, except for nanoGPT, which draws its own",
    }  # fmt: skip


def main():
    args = parse_command_line()
    peak_flops, about = describe_training(args)
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        make_shards(folder / "data", args, args.steps * args.total_batch_tokens // (args.micro_batch * args.seq_len))
        contestants = make_contestants(folder, args, folder / "data")
        for _ in range(args.repetitions):
            for name, command in contestants.items():
                figures.setdefault(name, []).append(run_once(name, command, args))
                print("{}: {median_ms:.1f} ms".format(name, **figures[name][-1]), file=sys.stderr, flush=True)
    first_runs = figures["build-nanogpt"]
    rows = [summarize(name, runs, first_runs, args, peak_flops) for name, runs in figures.items()]
    write_report(args, "Training compared with build-nanogpt", about | facts(args), rows, COLUMNS, draw(rows))


if __name__ == "__main__":
    run_main(main)
