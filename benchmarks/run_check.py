"""
Measure which faults of a training program the run check of support/runlog.py finds, and how often it is wrong.

    python benchmarks/run_check.py                   all runs, one after the other, then the table
    python benchmarks/run_check.py --share 1/2       every second run: a second process does --share 2/2

All runs are the demo, with one thread. Ten seeds are the reference, which is written to support/references.csv. Twenty
other seeds, and three other layouts, must pass the check. For each planted fault, one line of a copy of the program is
changed. Each run's log.txt is kept in benchmarks/out/run_check, so that a killed program continues.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "out" / "run_check"
REFERENCE_SEEDS, OTHER_SEEDS = range(1, 11), range(101, 121)
LAYOUTS = {"micro_batch": ["--micro_batch", "4"], "float32": ["--dtype", "float32"], "two_processes": []}

# name: (what is wrong, the line of train_gpt2.py, the line with the fault, further flags)
FAULTS = {
    "shifted": (
        "the targets are one token too far ahead",
        "return tokens[:, :-1], tokens[:, 1:]",
        "return tokens[:, :-1], torch.cat((tokens[:, 2:], tokens[:, :1]), dim=1)",
    ),
    "no_mask": ("attention has no causal mask", "is_causal = mask is None and T > 1", "is_causal = False"),
    "same_rows": (
        "all batches are the first one",
        "self.position += self.B * self.world_size",
        "self.position += 0",
    ),
    "double_lr": (
        "the learning rate is doubled, which its log does not show",
        'group["lr"] = get_lr(step, config)',
        'group["lr"] = 2 * get_lr(step, config)',
    ),
    "std": ("the weights are initialized three times too large", "std = 0.02\n", "std = 0.06\n"),
    "untied": (
        "the output embedding is not tied to the input embedding",
        "self.lm_head.weight = self.transformer.wte.weight",
        "pass",
    ),
    "residual": (
        "the residual branches are not scaled down at the start",
        "std *= (2 * self.config.n_layer) ** -0.5",
        "pass",
    ),
    "accumulation": (
        "gradients of four micro-steps are added up, not averaged",
        "scaler.scale(loss).backward()",
        "scaler.scale(loss * grad_accum_steps).backward()",
    ),
    "no_warmup": ("the learning rate has no warmup", "if step < config.warmup_steps:", "if False:"),
    "decay": (
        "weight decay also acts on biases and layer norms",
        '"params": undecayed, "weight_decay": 0.0',
        '"params": undecayed, "weight_decay": config.weight_decay',
    ),
    "no_sync": (
        "two processes do not average their gradients",
        "on=micro_step == grad_accum_steps - 1",
        "on=False",
    ),
}
EXTRA_FLAGS = {"accumulation": ["--micro_batch", "4"]}
TWO_PROCESSES = {"no_sync", "two_processes"}


def plant(fault, folder):
    """Copy the program into a folder, with a fault if one is named."""
    for name in ("train_gpt2.py", "fineweb.py", "hellaswag.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "support", folder / "support")
    if fault:
        path = folder / "train_gpt2.py"
        source, (_, line, broken) = path.read_text(), FAULTS[fault]
        if source.count(line) != 1:
            sys.exit(f"error: {line!r} occurs {source.count(line)} times in train_gpt2.py: change FAULTS")
        path.write_text(source.replace(line, broken))


def run(name, seed, flags, fault=None):
    """Train the demo, unless its log is complete. Return its log.txt."""
    log = OUT / f"{name}-{seed}" / "log.txt"
    if log.exists() and any(line.startswith("1700 val ") for line in log.read_text().splitlines()):
        return log
    with tempfile.TemporaryDirectory() as folder:
        plant(fault, Path(folder))
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if name in TWO_PROCESSES else []
        )
        command = [sys.executable, *launcher, "train_gpt2.py", "--preset", "demo", "--data_dir", OUT / "data"]
        command += [
            "--out_dir",
            log.parent,
            "--overwrite",
            "--seed",
            seed,
            "--eval_interval",
            300,
            "--save_interval",
            1700,
        ]
        command += ["--sample_interval", 0, "--keep_checkpoints", 1, *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"error: {name}, seed {seed}: {done.stderr[-2000:]}")
    shutil.rmtree(log.parent / "checkpoints")
    print(f"{name}-{seed}: {done.stdout.split('validation loss: ')[-1].splitlines()[0]}", file=sys.stderr, flush=True)
    return log


def all_runs():
    """Return (name, seed, flags, fault) of each run, in the order of their use."""
    runs = [("healthy", seed, [], None) for seed in REFERENCE_SEEDS]
    runs += [(fault, 1, EXTRA_FLAGS.get(fault, []), fault) for fault in FAULTS]
    runs += [("healthy", seed, [], None) for seed in OTHER_SEEDS]
    return runs + [(name, 1, flags, None) for name, flags in LAYOUTS.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", default="1/1", help="I/N: do only every Nth run, from the Ith on")
    args = parser.parse_args()
    first, step = map(int, args.share.split("/"))
    OUT.mkdir(parents=True, exist_ok=True)
    if not (OUT / "data" / "manifest.json").exists():
        flags = ["--source", "stdlib", "--encoding", "bytes", "--shard_tokens", "250000", "--out_dir", OUT / "data"]
        subprocess.run([sys.executable, ROOT / "fineweb.py", *flags], check=True)
    for parameters in all_runs()[first - 1 :: step]:
        run(*parameters)


if __name__ == "__main__":
    main()
