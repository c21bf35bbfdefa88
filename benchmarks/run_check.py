"""
Measure which faults of a training program the run check of support/runlog.py finds, and how often it is wrong.

    python benchmarks/run_check.py                   all runs, one after the other, then the table
    python benchmarks/run_check.py --share 1/2       every second run: a second process does --share 2/2

All runs are the demo, with one thread. Ten seeds are the reference, which is written to support/references.csv. Twenty
other seeds, three other layouts and a slightly different text must pass the check. For each planted fault, one line of
a copy of the program is changed. All runs but the reference's are stopped at step 600. Each run's log.txt is kept in
benchmarks/out/run_check, so that a killed program continues.
"""

import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from measure import ROOT, describe, make_parser, parse_flags, run_main, write_report

import fineweb
from support import sources
from support.common import UserError
from support.runlog import check_run, read_log
from train_gpt2 import DEMO_SHARD_TOKENS, PRESETS, get_lr, set_up, setup_runtime, validation_loss

OUT = ROOT / "benchmarks" / "out" / "run_check"
REFERENCE_SEEDS, OTHER_SEEDS, INITIAL_SEEDS = range(1, 11), range(101, 121), range(1001, 1101)
HEALTHY = {
    "micro_batch": ("nothing: micro-batches of 4", ["--micro_batch", "4"]),
    "float32": ("nothing: --dtype float32", ["--dtype", "float32"]),
    "two_processes": ("nothing: two processes under torchrun", []),
    "other_text": ("nothing: without a tenth of the modules, as another Python version", ["--data_dir", OUT / "other"]),
}
LAST_STEP, STOP = PRESETS["demo"][1].max_steps, 600
PUBLIC_RUN = Path(os.environ.get("GPT2_DATA", ROOT.parent / "shared" / "data"), "reference_runs")
COLUMNS = {
    "run": ("run", ""), "what is wrong": ("says", ""), "runs": ("runs", "d"), "found by step 100": ("by_100", "d"),
    "by step 300": ("by_300", "d"), "by step 600": ("by_600", "d"), "first at": ("first", "d"), "where": ("where", ""),
}  # fmt: skip

# what is compared, as {stream: [(step, window)]}: see Expected in support/runlog.py
WINDOWS = [(50, 50), (100, 50), (200, 50), (300, 50), (600, 50), (900, 50), (1200, 50), (1500, 50), (1700, 50)]
POINTS = {
    "val": [(step, 0) for step in (0, 300, 600, 900, 1200, 1500, 1700)],
    "train": [(1, 1), *WINDOWS],
    "norm": [(1, 1), (10, 9), *WINDOWS],
    "lr": [(step, 1) for step in (1, 10, 25, 50, 100, 300, 600, 1200, 1700)],
}

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


def run(name, seed, flags, fault, last_step):
    """Train the demo until the evaluation of last_step, unless it is in the log already. Return the log.txt."""
    log = OUT / f"{name}-{seed}" / "log.txt"
    if last_step in evaluated_steps(log):
        return log
    with tempfile.TemporaryDirectory() as folder:
        plant(fault, Path(folder))
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [sys.executable, *(torchrun if name in TWO_PROCESSES else []), "train_gpt2.py", "--preset", "demo"]
        command += ["--out_dir", log.parent, "--overwrite", "--seed", seed, "--eval_interval", 300]
        command += [] if "--data_dir" in flags else ["--data_dir", OUT / "data"]
        command += ["--save_interval", LAST_STEP, "--sample_interval", 0, *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(OUT / f"{name}-{seed}.txt", "w") as output:
            process = subprocess.Popen([*map(str, command)], cwd=folder, stdout=output, stderr=output, env=environment)
            while process.poll() is None and last_step not in evaluated_steps(log):
                time.sleep(1)
            process.terminate()
            process.wait()
    if last_step not in evaluated_steps(log):
        sys.exit(f"error: {name}, seed {seed}: see {output.name}")
    shutil.rmtree(log.parent / "checkpoints", ignore_errors=True)
    print(f"{name}-{seed}: {log.read_text().split(f'{last_step} val ')[1].split()[0]}", file=sys.stderr, flush=True)
    return log


def evaluated_steps(log):
    """Return the steps at which a log.txt has a validation loss, if it exists."""
    return read_log(log).get("val", ([], []))[0] if log.exists() else []


def all_runs():
    """Return (name, seed, flags, fault, last step) of each run."""
    runs = [("healthy", seed, [], None, LAST_STEP) for seed in REFERENCE_SEEDS]
    runs += [(fault, 1, EXTRA_FLAGS.get(fault, []), fault, STOP) for fault in FAULTS]
    runs += [(name, 1, flags, None, STOP) for name, (_, flags) in HEALTHY.items()]
    return runs + [("healthy", seed, [], None, STOP) for seed in OTHER_SEEDS]


def make_shards():
    """Write the demo's shards, and those of a standard library without every tenth module."""
    whole = sources.stdlib_texts
    for folder, texts in (("data", whole), ("other", lambda: (t for i, t in enumerate(whole()) if i % 10 != 3))):
        sources.stdlib_texts = texts
        fineweb.prepare("stdlib", OUT / folder, "bytes", shard_tokens=DEMO_SHARD_TOKENS, workers=1)
    sources.stdlib_texts = whole


# --- the references ---------------------------------------------------------------------------------------------------


def value(log, stream, step, window):
    """Return what is compared at one point of a log."""
    values = dict(zip(*log[stream]))
    if (step - 1 if window else step) not in values:
        return None  # the run was stopped before
    mean = statistics.fmean(values[i] for i in (range(step - window, step) if window else [step]))
    return float(f"{mean:.6g}")


def initial_losses():
    """Return the validation losses of INITIAL_SEEDS untrained models, from a file if it is there."""
    path = OUT / "initial.json"
    if not path.exists():
        model_config, config = PRESETS["demo"]
        losses = []
        for seed in INITIAL_SEEDS:
            config = replace(config, seed=seed, data_dir=str(OUT / "data"), device="cpu", val_tokens=DEMO_SHARD_TOKENS)
            runtime = setup_runtime(config)
            training = set_up(model_config, config, runtime, None, None)
            losses.append(validation_loss(training.model, training.val_loader, config.val_tokens, runtime))
        path.write_text(json.dumps(losses))
    return json.loads(path.read_text())


def demo_references(logs, untrained):
    """Return rows of references.csv from the logs of healthy runs, and the losses of untrained models.

    A run is compared at 36 points, and a healthy one should miss none. So the tolerance is seven standard deviations
    over ten seeds (which a new run exceeds with a probability of 1e-4, by Student's t), and 1% for other machines. The
    first validation loss comes from a hundred seeds, where 4.5 standard deviations are as rare. The learning rate is
    known.
    """
    rows = []
    for stream, points in POINTS.items():
        for step, window in points:
            values = untrained if (stream, step) == ("val", 0) else [value(log, stream, step, window) for log in logs]
            mean, deviation = statistics.fmean(values), statistics.stdev(values)
            tolerance = 4.5 * deviation if values is untrained else 7 * deviation + 0.01 * mean
            if stream == "lr":
                mean = get_lr(step - 1, PRESETS["demo"][1])
                tolerance = 0.001 * mean
            rows.append(["demo", stream, step, window, f"{mean:.6g}", f"{tolerance:.3g}"])
    return rows


def gpt2_references(path):
    """Return rows of references.csv from the table of the public run of the lecture's recipe.

    It is one run, so its spread is not known. A run may be 0.06 nats away and, while the loss falls fast, also a tenth
    of its steps behind or ahead. A HellaSwag accuracy over 10,042 rows has a standard error of 0.0045: a run may be
    0.025 away. The learning rate is the recipe's. Before the first update, seeds differ by 0.05 nats (measured).
    build-nanogpt evaluates last at step 19,072, and train_gpt2.py, which also counts the last update, at 19,073.
    """
    with open(path, newline="") as file:
        table = [[float(cell) for cell in row] for row in list(csv.reader(file))[1:]]
    steps, val, hella, train = np.array(table).T
    rows = []
    last = len(steps) - 1
    for i, step in [*enumerate(steps.astype(int)), (last, int(steps[last]) + 1)]:
        tolerance = 0.06 + val[i] - np.interp(1.1 * step, steps, val) if step else 0.25
        rows.append(["gpt2", "val", step, 0, f"{val[i]:.4f}", f"{tolerance:.2f}"])
        rows.append(["gpt2", "hella", step, 0, f"{hella[i]:.4f}", "0.025"])
        if step and step % 250 == 0:
            rows.append(["gpt2", "train", step, 250, f"{train[i]:.4f}", f"{tolerance:.2f}"])
            lr = get_lr(step - 1, PRESETS["gpt2"][1])
            rows.append(["gpt2", "lr", step, 1, f"{lr:.6g}", f"{0.001 * lr:.3g}"])
    return rows


def write_references(logs):
    """Write support/references.csv: the public run's rows, and those of the demo from the logs of healthy seeds."""
    public = PUBLIC_RUN / "recipe_fineweb_edu_124m.csv"
    if not public.exists():
        raise UserError(f"{public} is missing: set GPT2_DATA to the folder that has reference_runs/")
    with open(ROOT / "support" / "references.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            gpt2_references(public) + demo_references(logs, initial_losses())
        )


# --- the table --------------------------------------------------------------------------------------------------------


def row_of(name, says, logs):
    """Return a row of the table: in how many of the runs the check finds something, and where it finds it first."""
    failures = [[step for step, (good, _) in check_run(log, "demo").items() if not good] for log in logs]
    row = {"run": name, "says": says, "runs": len(logs)}
    for end, last in (("by_100", 100), ("by_300", 300), ("by_600", STOP)):
        row[end] = sum(any(step <= last for step in steps) for steps in failures)
    found = [(min(steps), log) for steps, log in zip(failures, logs) if steps]
    if found:
        row["first"], log = min(found, key=lambda pair: pair[0])
        line = check_run(log, "demo")[row["first"]][1]
        row["where"] = line.partition(" | ")[2].rpartition(" | ")[0].replace(" | ", "; ")
    measured = [{s: [value(log, s, *point) for point in points] for s, points in POINTS.items()} for log in logs]
    return row | {"points": measured}


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--share", default="1/1", help="I/N: do only every Nth run, from the Ith on, and no table")
    args = parse_flags(parser, "run_check")
    about = describe()
    first, step = map(int, args.share.split("/"))
    OUT.mkdir(parents=True, exist_ok=True)
    make_shards()
    logs = {parameters[:2]: run(*parameters) for parameters in all_runs()[first - 1 :: step]}
    if step > 1:
        return
    logs = {key: read_log(path) for key, path in logs.items()}
    write_references([logs["healthy", seed] for seed in REFERENCE_SEEDS])
    rows = [row_of(f"healthy, seeds {s[0]} to {s[-1]}", says, [logs["healthy", seed] for seed in s])
            for s, says in ((REFERENCE_SEEDS, "nothing: the reference"), (OTHER_SEEDS, "nothing"))]  # fmt: skip
    rows += [row_of(name, says, [logs[name, 1]]) for name, (says, *_) in (HEALTHY | FAULTS).items()]
    write_report(args, "Which faults the run check finds", about, rows, COLUMNS)


if __name__ == "__main__":
    run_main(main)
