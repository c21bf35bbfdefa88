"""
Compare AdamW with Muon fairly: how many tokens does Muon need to reach AdamW's loss, at several sizes and batches?

    python benchmarks/recipes.py                  do all runs that are missing, then write the report
    python benchmarks/recipes.py --parts A B      only these parts
    python benchmarks/recipes.py --report         do no runs: report the runs that are done
    python benchmarks/recipes.py --device cuda    train on a GPU: start eight or more at once to keep it busy
    python benchmarks/recipes.py --tiny           the same with tiny models, in seconds, to test the program

Part A: 0.4M parameters, 4 and 20 tokens per parameter. B: other batch sizes. C and D: 1.3M and 3.1M parameters. The
first two tasks of A are the searches of AdamW's and of Muon's hyperparameters, on which everything else is based.

The rule of the comparison was written before the first run. It is in docs/recipe.md ("A fair comparison"): what is
compared, how both optimizers are searched with equal effort, how the token ratio is interpolated, and what counts as a
significant difference: Welch's t-test between the losses of seeds, p < 0.01. Seed 1 searches. Seeds from 2 on confirm.

Every run is appended to OUT_DIR/ladder.jsonl when it ends, so a killed program loses only the run that it was doing.
Several processes with the same --out_dir share the work: each run has a lock. Delete ladder.jsonl after a change of
the code that changes losses. One thread makes runs repeatable, except for rounding on other machines and devices.

The text is the Python code of the standard library and of the packages in SOURCES, in bytes. Each file is either for
validation or for training, and a content that occurs in several files is used once. No run reads a text twice. The
files, with their hashes, are listed in ladder_files.txt. Another machine has other versions of them: copy the text's
folder from benchmarks/out/recipes_text and name it with --text. Writes ladder.md, .json and .png: see measure.py.
"""

import hashlib
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from measure import ROOT, describe, make_parser, parse_flags, revision, run_main, write_report

import fineweb
from support.common import UserError
from support.hardware import device_name
from support.muon import Muon
from train_gpt2 import (
    GPTConfig,
    TrainConfig,
    configure_optimizers,
    set_up,
    setup_runtime,
    train_step,
    validation_loss,
)

SOURCES = ("stdlib", "numpy", "matplotlib")  # 21.8M bytes; part D needs 12.6M
NOT_READ = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_vendor", "vendor"}
SEARCH_SEED, FIRST_SEED = 1, 2
SHARES = [4 ** (-k / 3) for k in range(5)]  # of AdamW's tokens, for Muon: 1, 0.63, 0.40, 0.25, 0.16
SIGNIFICANT = 0.01
PUBLISHED = {"modded-nanogpt, track 3": (124e6, 0.657), "arXiv 2509.02046": (130e6, 1 / 1.4)}  # docs/recipe.md
COLUMNS = {
    "part": ("part", ""), "parameters": ("parameters", ","), "tokens per parameter": ("tokens_per_parameter", "g"),
    "batch": ("batch", ","), "learning rates": ("rates", ""), "AdamW's loss": ("adamw", ""),
    "Muon's loss, at shares of the tokens": ("muon", ""), "token ratio, 95% interval": ("ratio", ""),
    "Muon needs at most": ("at_most", ""), "p, against the first row": ("p_base", ".2g"),
}  # fmt: skip


# --- what is compared -------------------------------------------------------------------------------------------------


class Axis(NamedTuple):
    """A hyperparameter as the search sees it: a coordinate between two limits, in steps of 1, later of 1/2 or less."""

    value: Callable  # of a coordinate
    low: int
    high: int
    start: dict  # {optimizer: coordinate}
    is_choice: bool = False  # three coordinates without an order, each of which is tried


def same(coordinate):
    return {"adamw": coordinate, "muon": coordinate}


def decay_at(u):
    return 10 ** ((u - 4) / 2) if u > 0 else 0.0


SCHEDULES = {"cosine to 0.1": ("cosine", 0.1), "cosine to 0": ("cosine", 0.0), "linear to 0": ("linear", 0.0),
             "linear to 0.1": ("linear", 0.1)}  # fmt: skip
AXES = {  # in the order of the search
    "lr": Axis(lambda u: 0.004 * 2**u, -6, 6, same(0)),
    "warmup": Axis(lambda u: min(0.5, 0.04 * 2.5**u), -2, 3, same(0)),  # share of the steps
    "beta2": Axis(lambda u: 1 - 0.05 * 50 ** (-u / 4), 0, 4, same(0)),  # 0.95 … 0.999, at the search's batch
    "schedule": Axis(lambda u: list(SCHEDULES)[int(u)], 0, 2, same(0), is_choice=True),  # the first three
    "factor": Axis(lambda u: 3.0**u, -3, 3, same(0)),  # on the learning rate of embeddings (Muon: of all but matrices)
    "weight_decay": Axis(decay_at, 0, 4, same(2)),  # 0, 0.03, 0.1, 0.3, 1
    "momentum": Axis(lambda u: 1 - 0.1 * 2**-u, -1, 3, {"adamw": 0, "muon": 1}),  # AdamW's beta1; 0.9, and Muon's 0.95
}


@dataclass(frozen=True)
class Settings:
    """An optimizer and the values of its AXES."""

    optimizer: str
    lr: float
    warmup: float
    beta2: float
    schedule: str
    factor: float
    weight_decay: float
    momentum: float
    variant: str = ""  # a change of Muon: see variants.py


@dataclass(frozen=True)
class Run:
    """What determines the loss of a run."""

    n_layer: int
    n_embd: int
    batch: int  # tokens of an update
    tokens: int  # of the whole run
    seed: int
    settings: Settings


@dataclass(frozen=True)
class Point:
    """A setting in which the optimizers are compared."""

    part: str
    n_layer: int
    n_embd: int
    per_parameter: float  # tokens of AdamW's whole budget
    batch: int = 2048
    seeds: int = 3
    shares: tuple = tuple(SHARES[1:3])  # of Muon that are always run; others, if these do not enclose AdamW's loss
    searched: float = 1.0  # share of the budget with which AdamW searches its learning rate; Muon: half as much

    @property
    def parameters(self):
        """The matrices of the blocks, without embeddings."""
        return 12 * self.n_layer * self.n_embd**2

    def run(self, settings, seed, share=1.0):
        """Return the run with a share of the whole budget, rounded to whole updates."""
        updates = max(1, round(share * self.parameters * self.per_parameter / self.batch))
        return Run(self.n_layer, self.n_embd, self.batch, updates * self.batch, seed, settings)


@dataclass(frozen=True)
class Plan:
    points: tuple  # the first one is that of the search
    search_runs: int = 27
    sequence: int = 128  # tokens
    val_tokens: int = 262_144
    sources: tuple = SOURCES


PLAN = Plan((
    Point("A", 2, 128, 4, seeds=5, shares=tuple(SHARES[:4])),
    Point("B", 2, 128, 4, 512), Point("B", 2, 128, 4, 8192), Point("B", 2, 128, 4, 32768),
    Point("C", 3, 192, 4),
    Point("A", 2, 128, 20, seeds=5, shares=tuple(SHARES[:4])),
    Point("D", 4, 256, 4, seeds=1, searched=0.5),
))  # fmt: skip
TINY_PLAN = Plan(
    (Point("A", 1, 32, 0.25, 256, 2, shares=tuple(SHARES[:2])), Point("B", 1, 32, 0.25, 128, 2),
     Point("D", 1, 64, 0.1, 256, 1, searched=0.5)),
    search_runs=4, sequence=32, val_tokens=1024, sources=("tqdm", "tyro"),
)  # fmt: skip


# --- the order of the runs --------------------------------------------------------------------------------------------
# Each task is a generator: it yields lists of runs, receives their losses, and returns its result. So it reads like a
# program that trains, but only `advance` knows which runs are done, and nothing else must be stored to resume.


def search(optimizer, plan):
    """Search all AXES of an optimizer with plan.search_runs runs, one coordinate at a time. Return the best Settings.

    A move that lowers the loss is kept and repeated. When a pass over all coordinates moves nothing, steps are halved.
    """
    here, step, losses = {name: axis.start[optimizer] for name, axis in AXES.items()}, 1, {}

    def loss_at(place):
        values = {name: axis.value(place[name]) for name, axis in AXES.items()}
        rounded = {name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in values.items()}
        settings = Settings(optimizer, **rounded)
        if settings not in losses and len(losses) < plan.search_runs:
            (losses[settings],) = yield [plan.points[0].run(settings, SEARCH_SEED)]
        return losses.get(settings, math.inf)

    best = yield from loss_at(here)
    while len(losses) < plan.search_runs:
        before = here
        for name, axis in AXES.items():
            for change in (1, 2, -1, -2) if axis.is_choice else (step, -step):
                while axis.low <= here[name] + change <= axis.high:
                    there = here | {name: here[name] + change}
                    loss = yield from loss_at(there)
                    if not loss < best:
                        break
                    here, best = there, loss
        step = step / 2 if here == before else step
    return min(losses, key=losses.get)


def tune_lr(settings, point, share, base_batch, factor=2.0):
    """Search only the learning rate, by a factor: three runs, and up to two if the best is at an edge.

    base_batch: tokens of the batch that the settings are for. The first guess grows with the square root of the batch.
    Return the settings with the best one, and {rate: loss}.
    """
    guess = settings.lr * (point.batch / base_batch) ** 0.5
    beta2 = settings.beta2 ** (point.batch / base_batch)  # the same half-life in tokens

    def at(lr):
        return replace(settings, lr=float(f"{lr:.4g}"), beta2=float(f"{beta2:.6g}"))

    tries = [at(guess / factor), at(guess), at(factor * guess)]
    found = yield [point.run(trial, SEARCH_SEED, share) for trial in tries]
    losses = dict(zip(tries, found))
    while len(losses) < 5 and (best := min(losses, key=losses.get)) in (tries[0], tries[-1]):
        trial = at(best.lr / factor if best == tries[0] else factor * best.lr)
        tries = [trial, *tries] if best == tries[0] else [*tries, trial]
        (losses[trial],) = yield [point.run(trial, SEARCH_SEED, share)]
    return min(losses, key=losses.get), {trial.lr: losses[trial] for trial in tries}


def race(point, slow, fast, shares, grid=SHARES):
    """Train with both settings: slow with the whole budget, fast with shares of it.

    shares: those that are always run. Others from the grid, a falling list, follow until they enclose slow's loss.
    Return (slow's losses, {share: fast's losses}, for each seed the share of the tokens at which fast has slow's loss).
    """
    seeds = range(FIRST_SEED, FIRST_SEED + point.seeds)
    targets = yield [point.run(slow, seed) for seed in seeds]
    found, wanted = {}, sorted(shares)
    while wanted:
        losses = yield [point.run(fast, seed, share) for share in wanted for seed in seeds]
        found |= {share: losses[i * len(seeds) : (i + 1) * len(seeds)] for i, share in enumerate(wanted)}
        found, wanted = dict(sorted(found.items())), []
        lowest, highest = min(found), max(found)
        if lowest != grid[-1] and any(loss <= target for loss, target in zip(found[lowest], targets)):
            wanted.append(grid[grid.index(lowest) + 1])
        if highest != grid[0] and any(loss > target for loss, target in zip(found[highest], targets)):
            wanted.append(grid[grid.index(highest) - 1])
    whole = point.run(slow, FIRST_SEED).tokens
    tokens = {share: point.run(fast, FIRST_SEED, share).tokens / whole for share in found}
    curves = [[(tokens[share], losses[i]) for share, losses in found.items()] for i in range(len(seeds))]
    return targets, found, [crossing(curve, target) for curve, target in zip(curves, targets)]


class Comparison(NamedTuple):
    """What is known when all runs of a point are done."""

    point: Point
    settings: dict  # {optimizer: Settings}
    rates: dict  # {optimizer: {learning rate: loss}}, empty where the search has them
    adamw: list  # a loss for each seed, with the whole budget
    muon: dict  # {share: a loss for each seed}, sorted
    ratios: list  # for each seed: Muon's tokens at AdamW's loss, as a share of AdamW's


def compare(point, plan):
    """Do all runs of a point, as its task: search the learning rates, then train with other seeds."""
    settings, rates = {}, {}
    for optimizer, share in (("adamw", point.searched), ("muon", point.searched / 2)):
        settings[optimizer], rates[optimizer] = (yield from search(optimizer, plan)), {}
        if point != plan.points[0]:
            found = yield from tune_lr(settings[optimizer], point, share, plan.points[0].batch)
            settings[optimizer], rates[optimizer] = found
    race_result = yield from race(point, settings["adamw"], settings["muon"], point.shares)
    return Comparison(point, settings, rates, *race_result)


def advance(task, losses):
    """Return (result of a task, []) or, if runs are missing in losses, (None, those that can be done next)."""
    try:
        wanted = next(task)
        while True:
            missing = [run for run in wanted if run not in losses]
            if missing:
                return None, missing
            wanted = task.send([losses[run] for run in wanted])
    except StopIteration as end:
        return end.value, []


def all_tasks(plan, parts):
    """Return the tasks of this program, the first ones first."""
    tasks = [search("adamw", plan), search("muon", plan)]
    return tasks + [compare(point, plan) for point in plan.points if point.part in parts]


def missing_runs(tasks, losses):
    """Return the runs that can be done next, in order. Empty if all is done."""
    return list(dict.fromkeys(run for task in tasks for run in advance(task, losses)[1]))


# --- one run ----------------------------------------------------------------------------------------------------------


class TunedMuon(Muon):
    """Muon with another momentum than the program's."""

    def __init__(self, params, lr, weight_decay, momentum):
        super().__init__(params, lr, weight_decay)
        self.momentum = momentum


def apply_factor(optimizer, args, kwargs):
    """Multiply the learning rate that train_step has set. The optimizer calls this before its step."""
    for group in optimizer.param_groups:
        group["lr"] *= group.get("lr_factor", 1.0)


def make_optimizers(model, settings, config):
    """Return the program's own optimizers, changed as the settings say."""
    adamw, *muon = configure_optimizers(model, config)
    if muon:
        for group in adamw.param_groups:
            group["lr_factor"] = settings.factor
        muon = [TunedMuon(muon[0].param_groups[0]["params"], config.lr, config.weight_decay, settings.momentum)]
    else:
        embeddings = [model.transformer.wte.weight, model.transformer.wpe.weight]
        decayed = adamw.param_groups[0]
        decayed["params"] = [p for p in decayed["params"] if all(p is not embedding for embedding in embeddings)]
        group = {"params": embeddings, "weight_decay": config.weight_decay, "lr_factor": settings.factor}
        adamw.add_param_group(group)
    adamw.register_step_pre_hook(apply_factor)
    return [adamw, *muon]


def train(run, plan, data_dir, device="cpu", make=make_optimizers):
    """Train a model. Return its validation loss, in nats per byte, or inf if training diverged.

    make: a function of (model, settings, config) that returns the optimizers.
    """
    is_gpu = device == "cuda"
    settings, steps, rows = run.settings, run.tokens // run.batch, run.batch // plan.sequence
    schedule, min_lr_ratio = SCHEDULES[settings.schedule]
    beta1 = settings.momentum if settings.optimizer == "adamw" else TrainConfig.betas[0]
    config = TrainConfig(
        optimizer=settings.optimizer, lr=settings.lr, schedule=schedule, min_lr_ratio=min_lr_ratio, seed=run.seed,
        weight_decay=settings.weight_decay, betas=(beta1, settings.beta2), max_steps=steps,
        warmup_steps=max(1, round(settings.warmup * steps)), data_dir=str(data_dir), seq_len=plan.sequence,
        micro_batch=rows if is_gpu else min(16, rows), total_batch_tokens=run.batch, hellaswag_file="none",
        device=device, compile="off",
    )  # fmt: skip
    shape = GPTConfig(block_size=plan.sequence, n_layer=run.n_layer, n_head=run.n_embd // 32, n_embd=run.n_embd,
                      flash=is_gpu)  # fmt: skip
    runtime = setup_runtime(config)
    training = set_up(shape, config, runtime, None, None)
    if run.tokens > training.loader.num_rows * plan.sequence:
        raise UserError(f"a run of {run.tokens:,} tokens would read the text twice: add packages to SOURCES")
    optimizers = make(training.raw_model, settings, config)
    for step in range(steps):
        values = train_step(training.model, optimizers, training.scaler, training.loader, step, config, runtime)
        if not all(map(math.isfinite, values)):
            return math.inf
    return validation_loss(training.model, training.val_loader, plan.val_tokens, runtime)


# --- the text ---------------------------------------------------------------------------------------------------------


def list_files(source):
    """Yield (name, contents) of the Python files of a package, or of "stdlib", without tests and vendored copies."""
    stdlib = source == "stdlib"
    root = Path(sysconfig.get_paths()["stdlib"] if stdlib else importlib.util.find_spec(source).origin)
    root = root if stdlib else root.parent
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in NOT_READ]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            yield f"{source}/{path.relative_to(root).as_posix()}", path.read_bytes()


def list_hash(lines):
    """Return the hash that names a text, of the lines that list its files."""
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]


def prepare_text(plan, folder, known=None):
    """Write the shards of the plan's sources into a subfolder of a folder, named by the text's hash. known: the hash of
    a text that is there already. Raises UserError if it is not.

    Returns (folder of the shards, list of the files as text, with facts in lines that start with #, hash). The files'
    hashes decide their order, and the first ones are the validation split. Two processes may call this at once.
    """
    if known:
        path = folder / known / "files.txt"
        listing = path.read_text() if path.exists() else ""
        if list_hash(line for line in listing.splitlines(keepends=True) if not line.startswith("#")) != known:
            raise UserError(f"--text {known}: {path} is missing or of another text: copy the whole folder")
        return folder / known / "shards", listing, known
    texts = {}  # {hash: (name, text)}
    for source in plan.sources:
        for name, contents in sorted(list_files(source)):
            with suppress(UnicodeDecodeError):
                texts.setdefault(hashlib.sha256(contents).hexdigest(), (name, contents.decode()))
    lines, rows, val_tokens = [], [], 0
    for digest, (name, text) in sorted(texts.items()):
        split, tokens = "val" if val_tokens < plan.val_tokens else "train", len(text.encode()) + 1
        val_tokens += tokens if split == "val" else 0
        lines.append(f"{split} {digest[:16]} {tokens - 1} {name}\n")
        rows.append(json.dumps({"text": text}) + "\n")
    digest = list_hash(lines)
    folder = folder / digest
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "text.lock"):
        path = folder / "text.jsonl"
        if not (folder / "shards" / "manifest.json").exists():
            path.write_text("".join(rows))
        # so the first shard, which is for validation, ends where a file ends
        fineweb.prepare(str(path), folder / "shards", "bytes", shard_tokens=val_tokens, workers=1)
    head = []
    for source in plan.sources:
        own = [line for line in lines if line.split()[3].startswith(f"{source}/")]
        release = platform.python_version() if source == "stdlib" else version(source)
        size, own_digest = sum(int(line.split()[2]) for line in own), hashlib.sha256("".join(own).encode()).hexdigest()
        head.append(f"# {source} {release}: {len(own)} files, {size:,} bytes, sha256 of their list {own_digest[:16]}\n")
    listing = "".join(head + lines)
    with FileLock(folder / "text.lock"):
        (folder / "files.txt").write_text(listing)
    return folder / "shards", listing, digest


# --- the records of the runs ------------------------------------------------------------------------------------------


def read_records(path):
    """Return the records of finished runs. A line that a killed program left incomplete is skipped."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):
            record = json.loads(line)
            settings = Settings(**record["run"]["settings"])
            record["run"] = Run(**record["run"] | {"settings": settings})
            record["val"] = math.inf if record["val"] is None else record["val"]
            records.append(record)
    return records


def add_record(path, run, val, **facts):
    """Append a finished run. A loss that is not finite becomes null."""
    line = json.dumps({"run": asdict(run), "val": val if math.isfinite(val) else None, **facts})
    with open(path, "ab+") as file:
        file.seek(max(0, file.tell() - 1))
        complete = file.read() in (b"", b"\n")  # otherwise a killed program left a part of a line
        file.write(b"" if complete else b"\n")
        file.write(line.encode() + b"\n")


@contextmanager
def claim(run, args):
    """Yield whether this process may do a run: no other one is doing it, and it is still missing."""
    path = args.out_dir / f".{args.name}_{hashlib.sha256(repr(run).encode()).hexdigest()[:16]}.lock"
    lock = FileLock(path)
    try:
        with lock.acquire(timeout=0):
            yield all(record["run"] != run for record in read_records(args.records))
            path.unlink(missing_ok=True)
    except Timeout:
        yield False


def do_runs(plan, args, make_tasks, make=make_optimizers):
    """Do the runs of the tasks that make_tasks() returns until none is missing. Another process may do some of them.

    args.records gets them. args.known: a file with runs of another program, which are not done again. make: see train.
    """
    data_dir, listing, digest = prepare_text(plan, ROOT / "benchmarks" / "out" / "recipes_text", args.text)
    known = {"text": digest, "revision": revision(ROOT), "device": device_name(torch.device(args.device))}
    while True:
        records = read_records(args.records)
        known_records = read_records(args.known)
        if others := {record["text"] for record in records + known_records} - {digest}:
            fix = "install the packages with the versions of its report, or give another --out_dir"
            raise UserError(f"{args.records} has runs on another text ({', '.join(others)}): {fix}")
        losses = {record["run"]: record["val"] for record in known_records + records}
        missing = missing_runs(make_tasks(), losses)
        if not missing:
            return
        args.files.write_text(listing)
        for run in missing:
            with claim(run, args) as is_mine:
                if is_mine:
                    start, cpu_start = time.perf_counter(), time.process_time()
                    val = train(run, plan, data_dir, args.device, make)
                    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
                    add_record(args.records, run, val, seconds=round(seconds, 1), cpu_seconds=round(cpu, 1), **known)
                    done = f"{val:.4f} in {seconds:.0f} s, {len(records) + 1} runs done"
                    print(f"{run}: {done}", file=sys.stderr, flush=True)
                    break
        else:
            time.sleep(1)  # the runs that can be done are being done


# --- statistics -------------------------------------------------------------------------------------------------------


def crossing(points, target):
    """Return the share of the tokens at which the points (share, loss) meet the target, or inf if they never do.

    The points are sorted by share. The interpolation is linear in the logarithm of the share. If the first point is
    already below the target, its share is returned.
    """
    for (share, loss), (before, loss_before) in zip(points, [(None, None), *points]):
        if loss <= target:
            weight = 0 if before is None else (loss - target) / (loss - loss_before)  # of the point before
            return math.exp((1 - weight) * math.log(share) + weight * math.log(before or share))
    return math.inf


def student_p(t, freedom):
    """Return the two-sided p of Student's t: the share of its density beyond |t|. freedom: 1 or more."""
    # with t = sqrt(freedom) tan(angle), the density is cos(angle) ** (freedom - 1), up to a constant
    start = math.atan(abs(t) / freedom**0.5)
    areas = [np.trapezoid(np.cos(angles) ** (freedom - 1), angles)
             for angles in (np.linspace(first, math.pi / 2, 100_001) for first in (start, 0))]  # fmt: skip
    return areas[0] / areas[1]


def student_quantile(confidence, freedom):
    """Return the t within which a share `confidence` of Student's distribution lies."""
    low, high = 0.0, 1000.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(middle, freedom) > 1 - confidence else (low, middle)
    return low


def welch(a, b):
    """Return the two-sided p of Welch's t-test for equal means; 1 if it cannot be done (one value, or not finite)."""
    if min(len(a), len(b)) < 2 or not all(map(math.isfinite, [*a, *b])):
        return 1.0
    difference = statistics.mean(a) - statistics.mean(b)
    parts = [(statistics.variance(values) / len(values), len(values) - 1) for values in (a, b)]
    total = sum(part for part, _ in parts)
    if total == 0:
        return float(difference == 0)
    freedom = total**2 / sum(part**2 / n for part, n in parts)
    return student_p(difference / total**0.5, freedom)


def paired(a, b):
    """Return the two-sided p of the paired t-test: a seed fixes the data and the initialization of both. See welch."""
    if not all(map(math.isfinite, [*a, *b])):
        return 1.0
    differences = [x - y for x, y in zip(a, b, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return student_p(statistics.mean(differences) / error, len(differences) - 1) if error else float(a == b)


def mean_interval(ratios):
    """Return the geometric mean of ratios and its 95% interval: (mean, low, high). None for what is not known."""
    if not all(map(math.isfinite, ratios)):
        return None, None, None
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.mean(logs)
    if len(logs) < 2:
        return math.exp(mean), None, None
    reach = student_quantile(0.95, len(logs) - 1) * statistics.stdev(logs) / len(logs) ** 0.5
    return math.exp(mean), math.exp(mean - reach), math.exp(mean + reach)


def at_most(comparison):
    """Return the smallest share at which, as at all larger ones, Muon's loss is significantly lower, or None."""
    smallest = None
    for share, losses in sorted(comparison.muon.items(), reverse=True):
        lower = statistics.mean(losses) < statistics.mean(comparison.adamw)
        if not (lower and welch(losses, comparison.adamw) < SIGNIFICANT):
            break
        smallest = share
    return smallest


# --- the report -------------------------------------------------------------------------------------------------------


def show(losses):
    """Return losses as text: mean and standard deviation over seeds."""
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 and max(losses) < math.inf else ""
    return f"{statistics.mean(losses):.4f}{spread}"


def finite(value):
    """Return a value in which None replaces the numbers that JSON cannot hold, also inside of dicts and lists."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if value in (math.inf, -math.inf) else value


def ratio_entry(comparison):
    """Return the token ratio of a point as the report's JSON has it."""
    point = comparison.point
    mean, low, high = mean_interval(comparison.ratios)
    return {"part": point.part, "parameters": point.parameters, "tokens_per_parameter": point.per_parameter,
            "batch": point.batch, "mean": mean, "low": low, "high": high, "n": len(comparison.ratios)}  # fmt: skip


def make_row(point, comparison, base):
    """Return a row of the table. comparison: None if runs are missing. base: the Comparison of the first row."""
    row = {"part": point.part, "parameters": point.parameters, "tokens_per_parameter": point.per_parameter}
    row["batch"] = point.batch
    if comparison is None:
        return row | {"ratio": "not run yet"}
    rates = (f"{name} {comparison.settings[name].lr:.4g}" for name in ("adamw", "muon"))
    entry, smallest = ratio_entry(comparison), at_most(comparison)
    row |= {"rates": ", ".join(rates), "adamw": show(comparison.adamw), "losses": comparison.adamw}
    row["muon"] = "; ".join(f"{share:.2f}: {show(losses)}" for share, losses in comparison.muon.items())
    row |= {"muon_losses": comparison.muon, "ratios": comparison.ratios, "searched": comparison.rates}
    row = finite(row)
    row["ratio"] = f"{entry['mean']:.3f}" if entry["mean"] else "above 1 for some seed"
    row["ratio"] += f" ({entry['low']:.3f} to {entry['high']:.3f}, n={entry['n']})" if entry["low"] else ""
    row["ratio"] += " (one seed: no interval)" if entry["n"] == 1 else ""
    row["at_most"] = f"{smallest:.2f}" if smallest else None
    if base and comparison is not base and entry["n"] > 1:
        row["p_base"] = welch(*([math.log(ratio) for ratio in c.ratios] for c in (comparison, base)))
    return row


def search_facts(plan, losses):
    """Return what the head of the report says about the two searches."""
    facts = {}
    for optimizer in ("adamw", "muon"):
        point = plan.points[0]
        tokens = point.run(None, SEARCH_SEED).tokens
        best, _ = advance(search(optimizer, plan), losses)
        name = f"search of {optimizer}"
        if best is None:
            done = [run for run in losses if run.settings.optimizer == optimizer]
            done = [run for run in done if run == point.run(run.settings, SEARCH_SEED)]
            facts[name] = f"not finished: {len(done)} of {plan.search_runs} runs"
            continue
        values = ", ".join(f"{key} {value}" for key, value in asdict(best).items() if key != "optimizer")
        loss = losses[point.run(best, SEARCH_SEED)]
        facts[name] = f"{plan.search_runs} runs of {tokens:,} tokens; best {loss:.4f}: {values}"
    return facts


def draw(comparisons):
    """Draw the token ratio against size, batch and duration, with its intervals and two published ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = {"parameters": "parameters (matrices of the blocks)", "batch": "tokens of a batch",
              "tokens_per_parameter": "tokens per parameter"}  # fmt: skip
    entries = [entry for entry in map(ratio_entry, comparisons) if entry["mean"]]
    base = entries[0]
    for axes, (key, label) in zip(figure.subplots(1, 3, sharey=True), panels.items()):
        shown = [entry for entry in entries if all(entry[other] == base[other] for other in panels if other != key)]
        for entry in shown:
            low, high = entry["low"] or entry["mean"], entry["high"] or entry["mean"]
            errors = [[entry["mean"] - low], [high - entry["mean"]]]
            axes.errorbar(entry[key], entry["mean"], errors, color="C0", marker="o", ms=4, capsize=3)
        for (name, (size, ratio)), marker in zip(PUBLISHED.items() if key == "parameters" else (), "s^"):
            axes.plot(size, ratio, marker, color="gray", label=f"published: {name}")
        axes.set(xlabel=label, xscale="log", ylim=(0, 1.05))
        if key != "parameters":
            axes.set_xticks([entry[key] for entry in shown], [f"{entry[key]:,}" for entry in shown])
            axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.axhline(1, color="gray", lw=1)
    figure.axes[0].set_ylabel("Muon's tokens / AdamW's tokens")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def report(plan, args):
    """Write the report of all runs that are done."""
    records = read_records(args.records)
    if not records:
        raise UserError(f"{args.records} has no runs: leave --report out, or give another --out_dir")
    losses = {record["run"]: record["val"] for record in records}
    results = [advance(compare(point, plan), losses) for point in plan.points]
    done = [comparison for comparison, _ in results if comparison]
    rows = [make_row(point, comparison, results[0][0]) for point, (comparison, _) in zip(plan.points, results)]
    hours = [sum(record[key] for record in records) / 3600 for key in ("cpu_seconds", "seconds")]
    about = describe() | {
        "rule": "docs/recipe.md, a fair comparison; a difference is significant if Welch's test gives p < 0.01",
        "runs done": f"{len(records)}, {hours[0]:.1f} hours of one thread ({hours[1]:.1f} hours passed)",
        "devices of the runs": ", ".join(sorted({record.get("device", "cpu") for record in records})),
        "revision of the runs": ", ".join(sorted({record["revision"] for record in records})),
        "text": ", ".join(sorted({record["text"] for record in records})),
    }
    sources = [line[2:].split(": ") for line in args.files.read_text().splitlines() if line.startswith("# ")]
    about |= dict(sources) | search_facts(plan, losses)
    about |= {"published": "; ".join(f"{name}: {ratio:.2f}" for name, (_, ratio) in PUBLISHED.items())}
    figure = draw(done) if any(ratio_entry(comparison)["mean"] for comparison in done) else None
    write_report(args, "AdamW and Muon", about, rows, COLUMNS, figure, {"ratios": list(map(ratio_entry, done))})


def parse_command_line():
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices="ABCD", default="ABCD", help="the parts to run")
    parser.add_argument("--report", action="store_true", help="do no runs, and report those that are done")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    parser.add_argument("--text", help="the hash of a text that is in benchmarks/out/recipes_text already")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few runs, to test the program")
    args = parse_flags(parser, "ladder")
    args.records = args.known = args.out_dir / f"{args.name}.jsonl"
    args.files = args.out_dir / f"{args.name}_files.txt"
    return args


def main():
    args = parse_command_line()
    torch.set_num_threads(1)
    plan = TINY_PLAN if args.tiny else PLAN
    if not args.report:
        do_runs(plan, args, lambda: all_tasks(plan, args.parts))
    report(plan, args)


if __name__ == "__main__":
    run_main(main)
