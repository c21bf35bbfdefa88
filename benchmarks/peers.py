"""
The speed of training, beside build-nanogpt's and nanoGPT's: whole programs on the same text, batch and model, in turns.

    git clone https://github.com/karpathy/build-nanogpt PEER
    python benchmarks/peers.py --peer PEER --ours "--compile off"
    python benchmarks/peers.py --peer PEER --preset demo --steps 1700           # compilation counted in
    python benchmarks/peers.py --peer PEER --micro_batch 64 --total_batch_tokens 524288       # a GPU, the lecture's run

build-nanogpt runs as it is, and with use_compile = True. Only constants are set in it: shape, steps and schedule, one
validation batch, and neither HellaSwag nor samples, which are no part of a training step. Ours runs as a user starts it
and once more for each --ours; nanoGPT, if given, compiles and on a CPU trains in float32, as it is made. Writes
benchmarks/results/peers_DEVICE_124m.json, .md and .png. Leave the machine alone.
"""

import argparse
import re
import shlex
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from measure import ROOT, describe, make_shards, parse_flags, revision, run_child, spread, timed, write_report

from support.runlog import flops_per_token

# Runs a script as python does, and says at its end what it took of a GPU's memory.
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
# a step's line, ours, build-nanogpt's or nanoGPT's: number, loss, milliseconds
STEP = re.compile(r"(?:step|iter)\s+(\d+)\b.*?loss:? (nan|[\d.]+).*?(?:dt:|time) ([\d.]+)ms")
COLUMNS = {
    "program": ("program", ""), "step, ms": ("median", ".1f"), "p10": ("p10", ".1f"), "p90": ("p90", ".1f"),
    "tok/s": ("tokens_per_second", ",.0f"), "MFU": ("mfu", ".1%"), "speed of a step": ("step_speedup", ".2f"),
    "memory of training, GB": ("training_gigabytes", ".2f"), "of the program": ("program_gigabytes", ".2f"),
    "to the first step's end, s": ("first_step_seconds", ".1f"),
    "whole program, s": ("seconds", ".1f"), "speed of the program": ("program_speedup", ".2f"), "loss": ("loss", ".4f"),
}  # fmt: skip


def substitute(text, replacements, origin):
    """Replace strings, each of which must occur exactly once."""
    for old, new in replacements.items():
        if text.count(old) != 1:
            sys.exit(f"error: {origin} has {text.count(old)} times {old!r}: name the checkout that this is for")
        text = text.replace(old, new)
    return text


def make_peer(folder, args, data, use_compile):
    """A copy of build-nanogpt with our constants, beside its data. Returns the command to run there."""
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
    """A copy of nanoGPT, beside the same tokens in its own format. Returns the command to run there."""
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
        flags["dtype"] = "float32"  # its own choice, float16, makes no difference there but a warning
    return [folder / "train.py", *(f"--{name}={value}" for name, value in flags.items())]


def our_command(folder, args, data, more_flags):
    """Our command, with the recipe, evaluations and batch order of build-nanogpt."""
    flags = {
        "preset": args.preset, "data_dir": data, "out_dir": folder / "ours", "micro_batch": args.micro_batch,
        "seq_len": args.seq_len, "total_batch_tokens": args.total_batch_tokens, "max_steps": args.steps,
        "warmup_steps": args.warmup_steps, "optimizer": "adamw", "lr": 6e-4, "min_lr_ratio": 0.1,
        "eval_interval": 250, "val_tokens": args.micro_batch * args.seq_len, "save_interval": 5000,
        "sample_interval": 0, "hellaswag_file": "none",
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in flags.items()]
    return [ROOT / "train_gpt2.py", *flags, "--no_shuffle", "--overwrite", *shlex.split(more_flags)]


def make_contestants(folder, args, data):
    """{name: command}; the first is what the others are compared to."""
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
    """Run a contestant in the folder of its script; return its figures."""
    lines, seconds, peak = run_child([sys.executable, "-c", WRAPPER, *command], command[0].parent)
    steps = [(line, match) for line in lines if (match := STEP.match(line.text))]
    if [int(match[1]) for _, match in steps] != [*range(args.steps)]:
        sys.exit(f"error: {name} has not printed steps 0 to {args.steps - 1}: {''.join(line.text for line in lines)}")
    losses, milliseconds = [float(match[2]) for _, match in steps], [float(match[3]) for _, match in steps]
    on_gpu = [int(line.text.split()[-1]) for line in lines if line.text.startswith("peak bytes:")]
    median = statistics.median(timed(milliseconds))
    return {
        "median_ms": median, "timed_ms": timed(milliseconds), "first_step_seconds": steps[0][0].seconds,
        "seconds": seconds, "losses": losses, "loss": losses[-1],
        "training_gigabytes": (on_gpu[0] if on_gpu else steps[-2][0].peak_bytes or peak) / 1e9,
        "program_gigabytes": peak / 1e9,
    }  # fmt: skip


def summarize(name, runs, first_runs, args, peak_flops):
    """The figures of a contestant's runs; ratios are to the first contestant's run of the same turn."""
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
    """Bars: milliseconds of a step, with p10 to p90, and seconds of a program, up to the first step's end and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.5 + 0.5 * len(rows)), layout="constrained")
    step, program = figure.subplots(1, 2, sharey=True)
    names = [row["program"] for row in rows]
    medians, p10, p90 = (np.array([row[key] for row in rows]) for key in ("median", "p10", "p90"))
    step.barh(names, medians, xerr=[medians - p10, p90 - medians], capsize=4)
    step.set(xlabel="milliseconds of a step, median, p10 to p90")
    first = np.array([row["first_step_seconds"] for row in rows])
    program.barh(names, first, label="up to the first step's end")
    program.barh(names, [row["seconds"] for row in rows] - first, left=first, label="after it")
    program.set(xlabel="seconds of the whole program")
    figure.legend(frameon=False, loc="outside upper right", ncols=2)
    step.invert_yaxis()
    return figure


def parse_command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of build-nanogpt")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--ours", action="append", default=[], help='flags of one more run of ours: "--compile off"')
    parser.add_argument("--total_batch_tokens", type=int, help="tokens of an update (one micro-batch)")
    args = parse_flags(parser, "peers")
    for name, folder, script in (("peer", args.peer, "train_gpt2.py"), ("nanogpt", args.nanogpt, "train.py")):
        if folder and not (folder / script).exists():
            parser.error(f"--{name} {folder} holds no {script}: name a checkout")
    batch = args.micro_batch * args.seq_len
    args.total_batch_tokens = args.total_batch_tokens or batch
    if args.total_batch_tokens % batch:
        parser.error(f"--total_batch_tokens {args.total_batch_tokens} is not a multiple of a micro-batch's {batch}")
    args.warmup_steps = min(args.config.warmup_steps, args.steps // 2)
    return args


def main():
    args = parse_command_line()
    peak_flops, about = describe(args)
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
    where = "allocated on the GPU" if args.device == "cuda" else "resident until the last step but one"
    per_token = flops_per_token(args.model_config, args.seq_len)
    about |= {
        "peers": ", ".join(f"{path} at {revision(path)}" for path in (args.peer, args.nanogpt) if path),
        "batch": f"{args.total_batch_tokens} tokens = {args.micro_batch} rows x {args.seq_len} tokens x "
                 f"{args.total_batch_tokens // (args.micro_batch * args.seq_len)} micro-steps",
        "runs": f"{args.repetitions} of {args.steps} steps, taking turns, each with an empty cache of compiled code",
        "times": "the programs' own, medians; without steps that build-nanogpt evaluates in (0, the last, each 250th)",
        "speed": "times build-nanogpt's, in the same turn; medians",
        "MFU": f"FLOPs of a token x tok/s / peak; FLOPs = 6 (12 L C^2 + V C) + 12 L C T = {per_token:,}",
        "memory": f"peaks: of training, {where}; of the program, resident, with what saving its last step takes",
        "types": "build-nanogpt bfloat16 autocast; nanoGPT float32 on a CPU; ours bfloat16 where it is native",
        "loss": f"at update {args.steps}, on the same rows for all but nanoGPT, which draws its own",
    }  # fmt: skip
    write_report(args, "Training beside build-nanogpt", about, rows, COLUMNS, draw(rows))


if __name__ == "__main__":
    main()
