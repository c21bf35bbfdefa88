"""
Measure how many tokens the gpt2-fast recipe saves: the same small model, compared with AdamW at the same loss.

    python benchmarks/recipes.py                            the whole table
    python benchmarks/recipes.py --only adamw --only fast   only these, into the same cache: for a second process

The model is the demo's, the text the source of Python's standard library, in bytes, and no run reads a whole epoch. The
batch, the clipping and the tokens of the validation loss (whole files, which no run trains on) are the same for all.
Each recipe searches its own learning rate, by factors of two and with a separate seed, until the best one is not at an
edge. For the AdamW whose loss is the target, the search is finer. Recipes with budgets then run with three other seeds.

The saving is not read from the winner's loss curve, because a run that plans for fewer tokens also decays its learning
rate earlier. Instead the winner runs with smaller budgets, each with its whole schedule. The budget at which it would
meet the default's final loss is interpolated, in the logarithm of tokens.

Every run is appended to recipes.jsonl when it ends, so that a killed program continues. Delete that file after a change
of the code. One thread makes runs repeatable. Writes recipes.md, .json and .png: see measure.py.

benchmarks/results/recipes.md also lists the recipes that lost. Their code was removed.
"""

import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from measure import ROOT, describe, make_parser, parse_flags, run_main, write_report

import fineweb
from train_gpt2 import DEMO_SHARD_TOKENS, PRESETS, TrainConfig, set_up, setup_runtime, train_step, validation_loss

MODEL = PRESETS["demo"][0]
GPT2, FAST = PRESETS["gpt2"][1], PRESETS["gpt2-fast"][1]
T, BATCH_ROWS = 128, 16
SEARCH_SEED, SEEDS = 1, (2, 3, 4)
COLUMNS = {
    "recipe": ("recipe", ""), "what it is": ("says", ""), "learning rates tried": ("rates", ""), "best": ("lr", ".4g"),
    "loss of the search": ("search_loss", ".4f"), "loss, three seeds": ("loss", ""),
    "difference": ("difference", "+.4f"), "share of the default's tokens": ("tokens", ""),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    says: str
    config: TrainConfig  # its optimizer and schedule
    guess: float  # the middle one of the first three learning rates of the search
    warmup: float = GPT2.warmup_steps / GPT2.max_steps  # share of the steps
    budgets: tuple = ()  # shares of the tokens to train on with three seeds; none: only the search


DEFAULT, WINNER = "adamw-warmup0.25", "fast"
RECIPES = {
    "adamw": Recipe("the gpt2 preset: AdamW, cosine to 0.1", GPT2, 0.002, budgets=(1,)),
    DEFAULT: Recipe("AdamW, warmup in a quarter of the steps", GPT2, 0.002, 0.25, budgets=(1,)),
    WINNER: Recipe("the gpt2-fast preset: Muon, linear to 0", FAST, 0.016, budgets=(0.25, 0.33, 0.4, 0.5, 1)),
}


# --- one run ----------------------------------------------------------------------------------------------------------


def train(recipe, lr, seed, tokens, args):
    """Train a model. Return [tokens, validation loss] at its end; for the first of SEEDS, also at earlier steps."""
    steps = tokens // (BATCH_ROWS * T)
    config = replace(
        recipe.config, lr=lr, seed=seed, max_steps=steps, warmup_steps=max(1, round(recipe.warmup * steps)),
        data_dir=str(args.data), seq_len=T, micro_batch=BATCH_ROWS, total_batch_tokens=BATCH_ROWS * T, device="cpu",
        compile="off", hellaswag_file="none",
    )  # fmt: skip
    runtime = setup_runtime(config)
    training = set_up(MODEL, config, runtime, None, None)
    parts = training.model, training.optimizers, training.scaler, training.loader
    curve = []
    for step in range(steps + 1):
        if step == steps or (seed == SEEDS[0] and len(curve) < 8 * step / steps):
            val = validation_loss(training.model, training.val_loader, args.val_tokens, runtime)
            curve.append([step * BATCH_ROWS * T, val])
        if step < steps and not math.isfinite(sum(train_step(*parts, step, config, runtime))):
            return [[step * BATCH_ROWS * T, math.inf]]
    return curve


def cached(name, lr, seed, tokens, args):
    """Return the record of a run, from the cache if it is there."""
    wanted = {"recipe": name, "lr": lr, "seed": seed, "tokens": tokens, "val_tokens": args.val_tokens}
    lines = args.cache.read_text().splitlines() if args.cache.exists() else []
    for record in map(json.loads, lines):
        if wanted.items() <= record.items():
            return record
    start = time.perf_counter()
    curve = train(RECIPES[name], lr, seed, tokens, args)
    record = wanted | {"val": curve[-1][1], "seconds": round(time.perf_counter() - start, 1), "curve": curve}
    with open(args.cache, "a") as file:
        file.write(json.dumps(record) + "\n")
    print(f"{name}: lr {lr:g}, seed {seed}, {tokens:,} tokens: {curve[-1][1]:.4f}", file=sys.stderr, flush=True)
    return record


# --- all runs, and what they show -------------------------------------------------------------------------------------


def search_rate(name, args):
    """Return {learning rate: loss}, from low to high. The search ends when the best one is not at an edge.

    AdamW searches with all tokens. The winner searches with half of them, which cannot be to its advantage.
    """
    guess = RECIPES[name].guess
    tokens = args.tokens if RECIPES[name].config.optimizer == "adamw" else args.tokens // 2
    losses = {lr: cached(name, lr, SEARCH_SEED, tokens, args)["val"] for lr in (guess / 2, guess, guess * 2)}
    while (best := min(losses, key=losses.get)) in (min(losses), max(losses)) and len(losses) < 8:
        lr = best / 2 if best == min(losses) else best * 2
        losses[lr] = cached(name, lr, SEARCH_SEED, tokens, args)["val"]
    for lr in (best / 2**0.5, best * 2**0.5) if name == DEFAULT else ():  # its loss is the target: search more finely
        losses[lr] = cached(name, lr, SEARCH_SEED, tokens, args)["val"]
    return dict(sorted(losses.items()))


def run_recipe(name, args):
    """Do all runs of a recipe. Return its row of the table, and {share of the tokens: its records}."""
    searched = search_rate(name, args)
    lr = min(searched, key=searched.get)
    row = {"recipe": name, "says": RECIPES[name].says, "lr": lr, "searched": searched, "search_loss": searched[lr]}
    row["rates"] = ", ".join(f"{rate:.4g}" for rate in searched)
    runs = {
        share: [cached(name, lr, seed, round(share * args.tokens), args) for seed in SEEDS]
        for share in RECIPES[name].budgets
    }
    losses = {share: [run["val"] for run in records] for share, records in runs.items()}
    row["losses"] = {share: [statistics.mean(values), statistics.stdev(values)] for share, values in losses.items()}
    row["loss"] = "{:.4f} ± {:.4f}".format(*row["losses"][1]) if losses else None
    return row, runs


def crossing(points, target):
    """Return the share of the tokens at which the points (share, loss) meet the target, or inf if they never do.

    The points are sorted by share. The interpolation is linear in the logarithm of the share.
    """
    for (share, loss), (before, loss_before) in zip(points, [(None, None), *points]):
        if loss <= target:
            weight = 0 if before is None else (loss - target) / (loss - loss_before)  # of the point before
            return math.exp((1 - weight) * math.log(share) + weight * math.log(before or share))
    return math.inf


def tokens_ratio(runs, default_runs):
    """Return the tokens that a recipe needs for the default's loss, as a share: mean, spread, and value of each seed.

    The mean and the spread are inf if a seed never reaches that loss.
    """
    shares = []
    for i in range(len(SEEDS)):
        points = sorted((share, records[i]["val"]) for share, records in runs.items())
        shares.append(crossing(points, default_runs[1][i]["val"]))
    spread = statistics.stdev(shares) if max(shares) < math.inf else math.inf
    return [statistics.mean(shares), spread, shares]


def draw(rows, runs):
    """Draw the curves of the default and the winner with the whole budget, and their final losses with each budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, color in ((DEFAULT, "C0"), (WINNER, "C1")):
        axes.plot(*zip(*runs[name][1][0]["curve"]), color=color, lw=1, label=f"{name}, during one run")
        tokens = [records[0]["tokens"] for records in runs[name].values()]
        means, errors = zip(*rows[name]["losses"].values())
        axes.errorbar(tokens, means, errors, color=color, ls="", marker="o", ms=4, capsize=3,
                      label=f"{name}, end of a run with this budget, three seeds")  # fmt: skip
    target, tokens, ratio = rows[DEFAULT]["losses"][1][0], runs[DEFAULT][1][0]["tokens"], rows[WINNER]["ratio"][0]
    axes.axhline(target, color="gray", lw=1, ls="--")
    if ratio < math.inf:
        label, place = f"{ratio:.2f} of the tokens", {"textcoords": "offset points", "ha": "right"}
        axes.annotate(label, (ratio * tokens, target), (-8, 8), **place)
    axes.set(xlabel="tokens trained on", ylabel="validation loss, nats per byte", xscale="log",
             xlim=(0.1 * tokens, 1.2 * tokens), ylim=(min(means) - 0.02, target + 0.35))  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower left")
    return figure


def facts(args, rows, runs):
    """Return what the head of the report says about the runs."""
    curve = [(tokens / args.tokens, loss) for tokens, loss in runs[WINNER][1][0]["curve"]]
    records = [json.loads(line) for line in args.cache.read_text().splitlines()]
    records = [record for record in records if record["recipe"] in rows]
    return {
        "tokens_ratio_to_adamw": rows[WINNER]["ratio"][0],
        "winner": WINNER,
        "default": f"{DEFAULT}: the recipe of the gpt2 preset, with its learning rate and its warmup tuned",
        "ratio to the preset's own warmup": f"{tokens_ratio(runs[WINNER], runs['adamw'])[0]:.3f}",
        "ratio if read from the winner's curve": f"{crossing(curve, runs[DEFAULT][1][0]['val']):.3f}",
        "budget": f"{args.tokens:,} tokens in steps of {BATCH_ROWS} rows x {T}; half of it for the winner's search",
        "validation": f"the same {args.val_tokens:,} tokens of whole files",
        "seeds": f"{SEARCH_SEED} for the searches, then {SEEDS}; ± is the standard deviation over these",
        "time": f"{len(records)} runs, {sum(record['seconds'] for record in records) / 3600:.1f} hours of one thread",
    }


def parse_command_line():
    parser = make_parser(__doc__)
    parser.add_argument("--only", action="append", choices=RECIPES, help="a recipe to run, without a report")
    parser.add_argument("--tokens", type=int, default=1_638_400, help="the default's budget")
    parser.add_argument("--val_tokens", type=int, default=131_072, help="tokens of the validation loss")
    args = parse_flags(parser, "recipes")
    args.cache, args.data = args.out_dir / "recipes.jsonl", ROOT / "demo" / "data"
    return args


def main():
    args = parse_command_line()
    torch.set_num_threads(1)
    about = describe()
    fineweb.prepare("stdlib", args.data, "bytes", shard_tokens=DEMO_SHARD_TOKENS, workers=1)
    shard = fineweb.open_shard(fineweb.find_shards(args.data, "val")[0])
    whole_files = int(np.flatnonzero(shard == 256)[-1])  # tokens: the last file continues in the training split
    args.val_tokens = min(args.val_tokens, whole_files // T * T)
    rows, runs = {}, {}
    for name in args.only or RECIPES:
        rows[name], runs[name] = run_recipe(name, args)
    if args.only:
        return
    for name, row in rows.items():
        row["difference"] = row["losses"][1][0] - rows[DEFAULT]["losses"][1][0]
        if len(runs[name]) > 1:
            row["ratio"] = tokens_ratio(runs[name], runs[DEFAULT])
            row["tokens"] = "{:.3f} ± {:.3f}".format(*row["ratio"])
    write_report(args, "Fewer tokens", about | facts(args, rows, runs), list(rows.values()), COLUMNS, draw(rows, runs))


if __name__ == "__main__":
    run_main(main)
