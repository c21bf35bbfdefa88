"""
Fewer tokens: recipes for one and the same GPT-2, held against the AdamW default at the same loss.

    python benchmarks/recipes.py                              the whole table
    python benchmarks/recipes.py --only adamw --only muon     these alone, into the same cache: for a second process

The demo's model on the source of Python's standard library, in bytes; less than one epoch. Model, rows of text, batch,
clipping and the tokens of the validation loss (whole files, of which no run trains on any) are the same for all. Each
recipe searches its own rate, by factors of two and with a seed of its own, on half of the budget (AdamW on all of it)
until the best rate is inside of what was tried. The AdamW whose loss is the target is searched by factors of the square
root of two, too, and at other warmups. Those that are worth it then run with three other seeds.

What the winner saves is not read off its curve: a schedule ends where its budget ends, and a curve says nothing of a
run that had planned for less. So the winner runs anew with smaller budgets, its whole schedule pressed into each, and
its final losses are interpolated, in the logarithm of tokens, to where they meet the default's final loss. Every run
is appended to OUT_DIR/recipes.jsonl as it ends, so that a killed program goes on where it was (delete that file after
a change of the code); one thread, so that it is repeatable. Writes recipes.json, .md and .png.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measure import ROOT, describe, write_report

import fineweb
from support.common import pick_dtype
from train_gpt2 import (
    DEMO_SHARD_TOKENS,
    GPT,
    PRESETS,
    DataLoaderLite,
    Muon,
    Runtime,
    configure_optimizers,
    get_lr,
    validation_loss,
)

MODEL, FAITHFUL = PRESETS["demo"][0], PRESETS["gpt2"][1]
T, BATCH_ROWS = 128, 16
WARMUP = FAITHFUL.warmup_steps / FAITHFUL.max_steps  # the same share of a run as in the 10B tokens of the lecture's
SEARCH_SEED, SEEDS = 1, (2, 3, 4)
COLUMNS = {
    "recipe": ("recipe", ""), "what it changes": ("says", ""), "rates tried": ("rates", ""), "best": ("lr", ".4g"),
    "loss of the search": ("search_loss", ".4f"), "loss, three seeds": ("loss", ""),
    "difference": ("difference", "+.4f"), "share of the default's tokens": ("tokens", ""),
}  # fmt: skip


# --- what a recipe can change -----------------------------------------------------------------------------------------


def stable_then(decay):
    """Warmup, the peak, and for the last share of the steps a straight line to 0 (warmup-stable-decay)."""

    def schedule(step, config):
        left = (config.max_steps - step) / config.max_steps
        return min(get_lr(step, replace(config, min_lr_ratio=1.0)), config.lr * left / decay)

    return schedule


class ShorterMuon(Muon):
    """Momentum over ten steps in place of twenty."""

    momentum = 0.9


def nothing(*_):
    """Changes nothing."""


def small_positions(model):
    """wpe as OpenAI's code has it."""
    torch.nn.init.normal_(model.transformer.wpe.weight, std=0.01)


def zero_projections(model):
    """Each block begins as the identity."""
    for block in model.transformer.h:
        torch.nn.init.zeros_(block.attn.c_proj.weight)
        torch.nn.init.zeros_(block.mlp.c_proj.weight)


def set_groups(**values):
    """For the groups of AdamW: betas, or rate, a factor of the learning rate."""
    return lambda adamw: [group.update(values) for group in adamw.param_groups]


@dataclass(frozen=True)
class Recipe:
    says: str
    config: dict = field(default_factory=dict)  # fields of TrainConfig
    schedule: Callable = get_lr
    warmup: float = WARMUP  # share of the steps
    muon: Callable | None = None  # another one in place of train_gpt2.py's
    init: Callable = nothing
    adamw: Callable = nothing  # to change the groups of AdamW
    ramp: float = 0.0  # share of the run in which the batch grows linearly, from an eighth
    whole_rows: bool = False  # each file begins a row
    teacher: float = 0.0  # weight of the divergence from a larger model's predictions, beside the cross entropy
    model: dict = field(default_factory=dict)  # fields of GPTConfig: for the teacher, which is no contestant
    guess: float = 0.016  # the rate in the middle of the first three
    budgets: tuple = ()  # shares of the tokens to run with three seeds; none: only the search


MUON = {"optimizer": "muon"}
TORCH_MUON = partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
TO_ZERO = {"schedule": "linear", "min_lr_ratio": 0.0}
FAST = Recipe("the gpt2-fast preset's: query, key and value apart, linear to 0", MUON | TO_ZERO)
DEFAULT, WINNER, TEACHER_RATE = "adamw-warmup0.25", "fast", 0.012
RECIPES = {
    "adamw": Recipe("the gpt2 preset's: AdamW, cosine to 0.1", guess=0.002, budgets=(1,)),
    "adamw-warmup0.1": Recipe("AdamW, a tenth of the steps to warm up", warmup=0.1, guess=0.002),
    "adamw-warmup0.25": Recipe("AdamW, a quarter of the steps to warm up", warmup=0.25, guess=0.002, budgets=(1,)),
    "adamw-warmup0.5": Recipe("AdamW, half of the steps to warm up", warmup=0.5, guess=0.008),
    "muon": Recipe("torch's Muon, cosine to 0.1", MUON, muon=TORCH_MUON, budgets=(1,)),
    "muon-cosine0": Recipe("torch's Muon, cosine to 0", MUON | {"min_lr_ratio": 0.0}, muon=TORCH_MUON),
    "muon-linear0": Recipe("torch's Muon, linear to 0", MUON | TO_ZERO, muon=TORCH_MUON),
    "fast": replace(FAST, budgets=(0.25, 0.33, 0.4, 0.5, 1)),
    "warmup0.1": replace(FAST, says="a tenth of the steps to warm up", warmup=0.1),
    "wsd": replace(FAST, says="warmup, stable, linear to 0 in the last 0.4", schedule=stable_then(0.4)),
    "decay0.3": replace(FAST, says="weight decay 0.3", config=FAST.config | {"weight_decay": 0.3}),
    "wpe0.01": replace(FAST, says="wpe drawn with 0.01", init=small_positions),
    "zero-init": replace(FAST, says="projections start at 0", init=zero_projections),
    "adam-rate0.3": replace(FAST, says="AdamW's rate x 0.3", adamw=set_groups(rate=0.3)),
    "adam-rate3": replace(FAST, says="AdamW's rate x 3", adamw=set_groups(rate=3.0)),
    "momentum0.9": replace(FAST, says="momentum 0.9", muon=ShorterMuon),
    "ramp": replace(FAST, says="batch from an eighth, in 0.3 of the run", ramp=0.3),
    "distilled": replace(FAST, says="half of the loss: divergence from a teacher of 192 channels", teacher=0.5),
    "whole-rows": replace(FAST, says="rows begin at a file's start", whole_rows=True),
}


# --- one run ----------------------------------------------------------------------------------------------------------


class WholeRows(DataLoaderLite):
    """Rows that begin where a file begins; what a file's last row lacks is masked out of the loss."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        stream = np.concatenate(self.shards)
        starts = np.append(np.flatnonzero(stream == self.vocab_size - 1), len(stream))
        cuts = [(row, end) for start, end in zip(starts, starts[1:]) for row in range(start, end - 1, self.T)]
        cuts = np.array([cut for cut in cuts if cut[0] + self.T < len(stream)])
        self.row_starts, self.row_ends = cuts[np.random.RandomState(self.seed).permutation(len(cuts))].T

    def rows(self, positions):
        positions = [position % len(self.row_starts) for position in positions]
        tokens = np.empty((len(positions), self.T + 1), dtype=np.int32)
        for row, position in zip(tokens, positions):
            self._read_tokens(self.row_starts[position], row)
        tokens = torch.from_numpy(tokens).long()
        lengths = torch.tensor([self.row_ends[position] - self.row_starts[position] for position in positions])
        outside = torch.arange(1, self.T + 1) >= lengths[:, None]
        return tokens[:, :-1], tokens[:, 1:].masked_fill(outside, -100)


def make_optimizers(model, recipe, config):
    optimizers = configure_optimizers(model, config)
    recipe.adamw(optimizers[0])
    if recipe.muon:
        optimizers[1] = recipe.muon(optimizers[1].param_groups[0]["params"], config.lr, config.weight_decay)
    return optimizers


def distillation(model, teacher, x, y, weight):
    """Cross entropy and divergence from the teacher, in nats per token, weighed."""
    with torch.no_grad():
        wanted = F.log_softmax(teacher(x)[0].float(), dim=-1)  # (B, T, V)
    got = F.log_softmax(model(x)[0].float(), dim=-1)
    divergence = F.kl_div(got, wanted, log_target=True, reduction="none").sum(-1).mean()
    return (1 - weight) * F.nll_loss(got.flatten(0, 1), y.flatten()) + weight * divergence


def train(recipe, lr, seed, tokens, args, teacher=None):
    """Train a model. Returns it, and [tokens, validation loss] of its end; for the first of SEEDS on the way, too."""
    batch = BATCH_ROWS * T
    steps = tokens // batch
    config = replace(FAITHFUL, lr=lr, seed=seed, seq_len=T, total_batch_tokens=batch, max_steps=steps,
                     warmup_steps=max(1, round(recipe.warmup * steps)), **recipe.config)  # fmt: skip
    runtime = Runtime(0, 1, torch.device("cpu"), pick_dtype("auto", "cpu"), compile=False)
    torch.manual_seed(seed)
    model = GPT(replace(MODEL, **recipe.model))
    recipe.init(model)
    optimizers = make_optimizers(model, recipe, config)
    loader = (WholeRows if recipe.whole_rows else DataLoaderLite)(args.data, "train", BATCH_ROWS, T, seed=seed)
    val_loader = DataLoaderLite(args.data, "val", 64, T, shuffle=False)
    curve = []
    while loader.position < steps * BATCH_ROWS:
        done = loader.position / (steps * BATCH_ROWS)
        loader.B = BATCH_ROWS if done >= recipe.ramp else max(BATCH_ROWS // 8, round(BATCH_ROWS * done / recipe.ramp))
        loader.B = min(loader.B, steps * BATCH_ROWS - loader.position)
        if seed == SEEDS[0] and len(curve) < done * 8:
            curve.append([loader.position * T, validation_loss(model, val_loader, args.val_tokens, runtime)])
        rate = recipe.schedule(loader.position / BATCH_ROWS, config)
        x, y = loader.next_batch()
        with runtime.autocast():
            loss = distillation(model, teacher, x, y, recipe.teacher) if recipe.teacher else model(x, y)[1]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        if not math.isfinite(norm):
            return model, [[loader.position * T, math.inf]]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("rate", 1.0)
            optimizer.step()
            optimizer.zero_grad()
    curve.append([loader.position * T, validation_loss(model, val_loader, args.val_tokens, runtime)])
    return model, curve


# --- all runs, and what they say --------------------------------------------------------------------------------------


def get_teacher(args):
    """The larger model, trained the first time that it is asked for, on three times the default's tokens."""
    path, recipe = args.out_dir / "recipes_teacher.pt", replace(FAST, model={"n_embd": 192})
    if not path.exists():
        model, curve = train(recipe, TEACHER_RATE, SEARCH_SEED, 3 * args.tokens, args)
        print(f"teacher: {curve[-1][1]:.4f}", file=sys.stderr, flush=True)
        torch.save(model.state_dict(), path)
    model = GPT(replace(MODEL, **recipe.model))
    model.load_state_dict(torch.load(path))
    return model.eval()


def cached(name, lr, seed, tokens, args):
    """The record of a run, done now unless the cache has it."""
    wanted = {"recipe": name, "lr": lr, "seed": seed, "tokens": tokens, "val_tokens": args.val_tokens}
    lines = args.cache.read_text().splitlines() if args.cache.exists() else []
    for record in map(json.loads, lines):
        if wanted.items() <= record.items():
            return record
    start = time.perf_counter()
    teacher = get_teacher(args) if RECIPES[name].teacher else None
    _, curve = train(RECIPES[name], lr, seed, tokens, args, teacher)
    record = wanted | {"val": curve[-1][1], "seconds": round(time.perf_counter() - start, 1), "curve": curve}
    with open(args.cache, "a") as file:
        file.write(json.dumps(record) + "\n")
    print(f"{name}: rate {lr:g}, seed {seed}, {tokens:,} tokens: {curve[-1][1]:.4f}", file=sys.stderr, flush=True)
    return record


def search_rate(name, args):
    """{rate: loss} of the search, from small to large rates: by factors of two until the best is not at an edge."""
    tokens, guess = args.tokens if name.startswith("adamw") else args.tokens // 2, RECIPES[name].guess
    losses = {lr: cached(name, lr, SEARCH_SEED, tokens, args)["val"] for lr in (guess / 2, guess, guess * 2)}
    while (best := min(losses, key=losses.get)) in (min(losses), max(losses)) and len(losses) < 8:
        lr = best / 2 if best == min(losses) else best * 2
        losses[lr] = cached(name, lr, SEARCH_SEED, tokens, args)["val"]
    for lr in (best / 2**0.5, best * 2**0.5) if name == DEFAULT else ():  # the target is its loss: search more finely
        losses[lr] = cached(name, lr, SEARCH_SEED, tokens, args)["val"]
    return dict(sorted(losses.items()))


def run_recipe(name, args):
    """All runs of a recipe, as a row of the table."""
    searched = search_rate(name, args)
    lr = min(searched, key=searched.get)
    row = {"recipe": name, "says": RECIPES[name].says, "lr": lr, "searched": searched, "search_loss": searched[lr]}
    row["rates"] = ", ".join(f"{rate:.4g}" for rate in searched)
    row["runs"] = {
        share: [cached(name, lr, seed, round(share * args.tokens), args) for seed in SEEDS]
        for share in RECIPES[name].budgets
    }
    losses = {share: [run["val"] for run in runs] for share, runs in row["runs"].items()}
    row["losses"] = {share: [statistics.mean(values), statistics.stdev(values)] for share, values in losses.items()}
    row["loss"] = "{:.4f} ± {:.4f}".format(*row["losses"][1]) if losses else None
    return row


def crossing(points, target):
    """The share of the tokens at which (share, loss), by share, meets the target: linear in log share; inf if never."""
    for (share, loss), (before, loss_before) in zip(points, [(None, None), *points]):
        if loss <= target:
            weight = 0 if before is None else (loss - target) / (loss - loss_before)  # of the point before
            return math.exp((1 - weight) * math.log(share) + weight * math.log(before or share))
    return math.inf


def tokens_ratio(row, default):
    """Mean and spread over the seeds of the tokens that a recipe needs for the default's loss, as a share of its.

    inf where a seed's loss stays above; no spread then.
    """
    shares = []
    for i in range(len(SEEDS)):
        points = sorted((share, runs[i]["val"]) for share, runs in row["runs"].items())
        shares.append(crossing(points, default["runs"][1][i]["val"]))
    spread = statistics.stdev(shares) if max(shares) < math.inf else math.inf
    return [statistics.mean(shares), spread, shares]


def draw(default, winner):
    """The default's curve and the winner's with the whole budget, and the winner's last losses with each budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row, color in ((default, "C0"), (winner, "C1")):
        axes.plot(*zip(*row["runs"][1][0]["curve"]), color=color, lw=1, label=f"{row['recipe']}, one run on its way")
        tokens = [runs[0]["tokens"] for runs in row["runs"].values()]
        means, errors = zip(*(row["losses"][share] for share in row["runs"]))
        axes.errorbar(tokens, means, errors, color=color, ls="", marker="o", ms=4, capsize=3,
                      label=f"{row['recipe']}, ends of runs with that budget, three seeds")  # fmt: skip
    target, tokens = default["losses"][1][0], default["runs"][1][0]["tokens"]
    axes.axhline(target, color="gray", lw=1, ls="--")
    if winner["ratio"][0] < math.inf:
        point = (winner["ratio"][0] * tokens, target)
        label = f"{winner['ratio'][0]:.2f} of the tokens"
        axes.annotate(label, point, (-8, 8), ha="right", textcoords="offset points")
    axes.set(xlabel="tokens trained on", ylabel="validation loss, nats per byte", xscale="log",
             xlim=(0.1 * tokens, 1.2 * tokens), ylim=(min(means) - 0.02, target + 0.35))  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower left")
    return figure


def parse_command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=RECIPES, help="a recipe to run, without a report")
    parser.add_argument("--tokens", type=int, default=1_638_400, help="the default's budget")
    parser.add_argument("--val_tokens", type=int, default=131_072, help="tokens of the validation loss")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    args.cache, args.data = args.out_dir / "recipes.jsonl", ROOT / "demo" / "data"
    args.name, args.preset, args.model_config, args.source = "recipes", "demo", MODEL, "stdlib"
    return args


def main():
    args = parse_command_line()
    torch.set_num_threads(1)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    fineweb.prepare("stdlib", args.data, "bytes", shard_tokens=DEMO_SHARD_TOKENS, workers=1)
    shard = fineweb.open_shard(fineweb.find_shards(args.data, "val")[0])
    whole_files = int(np.flatnonzero(shard == 256)[-1])  # tokens: the last file goes on in the training split
    args.val_tokens = min(args.val_tokens, whole_files // T * T)
    rows = {name: run_recipe(name, args) for name in args.only or RECIPES}
    if args.only:
        return
    default, winner = rows[DEFAULT], rows[WINNER]
    for row in rows.values():
        if row["runs"]:
            row["difference"] = row["losses"][1][0] - default["losses"][1][0]
        if len(row["runs"]) > 1:
            row["ratio"] = tokens_ratio(row, default)
            row["tokens"] = "{:.3f} ± {:.3f}".format(*row["ratio"])
    _, about = describe(args)
    curve = [(tokens / args.tokens, loss) for tokens, loss in winner["runs"][1][0]["curve"]]
    records = map(json.loads, args.cache.read_text().splitlines())
    records = [record for record in records if record["lr"] in rows[record["recipe"]]["searched"]]
    about |= {
        "tokens_ratio_to_adamw": winner["ratio"][0],
        "winner": WINNER,
        "default": f"{DEFAULT}: the gpt2 preset's recipe with its rate and its warmup tuned",
        "beside the preset's own warmup": f"{tokens_ratio(winner, rows['adamw'])[0]:.3f}",
        "read off the winner's curve with the whole budget": f"{crossing(curve, default['runs'][1][0]['val']):.3f}",
        "budget": f"{args.tokens:,} tokens in steps of {BATCH_ROWS} rows x {T}; half of it for searches but AdamW's",
        "validation": f"the same {args.val_tokens:,} tokens of whole files",
        "seeds": f"{SEARCH_SEED} for the searches, then {SEEDS}; ± is the standard deviation over these",
        "time": f"{len(records)} runs, {sum(record['seconds'] for record in records) / 3600:.1f} hours of one thread",
    }
    write_report(args, "Fewer tokens", about, list(rows.values()), COLUMNS, draw(default, winner))


if __name__ == "__main__":
    main()
