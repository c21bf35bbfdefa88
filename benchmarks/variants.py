"""
Try better hyperparameters and changes of Muon: what is significantly better than the presets, at two sizes?

    python benchmarks/variants.py --known benchmarks/out/ladder.jsonl     do all missing runs, then write the report
    python benchmarks/variants.py --known … --report                      report the runs that are done
    python benchmarks/variants.py --known … --tiny                        with tiny models, to test the program

It starts from the searches of recipes.py, whose runs it takes from --known, and has the same text, rule, seeds and
resumption. It answers three questions:

1. tuned: how many of the lecture's tokens does the searched AdamW need? And gpt2-tuned, with the search's beta2?
2. changes: which changes of the searched Muon lower the loss? Each has its own search of the learning rate (by factors
   of the square root of two) and ten seeds. Those that win at the first size, with p < 0.01, run at the second one, and
   all of them together at both, against today's gpt2-fast.
3. transfer: which learning rate is best for Muon at three sizes, with a weight decay that is constant, or falls with
   the width?

Writes variants.md and .json: see measure.py.
"""

import math
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from measure import describe, make_parser, parse_flags, run_main, write_report
from recipes import (
    FIRST_SEED,
    PLAN,
    SIGNIFICANT,
    TINY_PLAN,
    Point,
    Settings,
    TunedMuon,
    advance,
    do_runs,
    finite,
    make_optimizers,
    mean_interval,
    paired,
    race,
    read_records,
    search,
    show,
    tune_lr,
    welch,
)

from support.common import UserError
from support.muon import orthogonalize

LECTURE = Settings("adamw", 0.004, 0.0375, 0.95, "cosine to 0.1", 1.0, 0.1, 0.9)  # at 124M: 6e-4, warmup 715 of 19,073
TUNED = Settings("adamw", 0.004, 0.25, 0.9929, "linear to 0", 1.0, 0.1, 0.8)  # gpt2-tuned with the search's beta2
FAST = Settings("muon", 0.016, 0.0375, 0.95, "linear to 0", 1.0, 0.1, 0.95)  # gpt2-fast: warmup 358 of 9,536
SEEDS, ROOT_TWO = 10, 2**0.5
GRID = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]  # shares of the tokens
POINTS = Point("A", 2, 128, 4), Point("C", 3, 192, 4)
TRANSFER = (*POINTS, Point("D", 4, 256, 4, searched=0.5))
TINY_POINTS = Point("A", 1, 32, 0.25, 256), Point("C", 1, 64, 0.1, 256)
COLUMNS = {
    "question": ("question", ""), "parameters": ("parameters", ","), "settings": ("name", ""),
    "learning rate": ("lr", ".4g"), "n": ("n", ""), "loss": ("loss", ""), "difference": ("difference", "+.4f"),
    "p": ("p", ".2g"), "p, paired": ("paired", ".2g"), "token ratio, 95% interval": ("ratio", ""),
    "verdict": ("verdict", ""),
}  # fmt: skip


# --- the changes ------------------------------------------------------------------------------------------------------


class ChangedMuon(TunedMuon):
    """Muon with some of the changes "head pairs", "NorMuon", "cautious", "falling decay" and "momentum warmup"."""

    def __init__(self, muon, changes, steps, head_rows):
        group = muon.param_groups[0]
        super().__init__(group["params"], group["lr"], group["weight_decay"], muon.momentum)
        self.changes, self.steps, self.head_rows = changes, steps, head_rows
        self.peak_lr, self.peak_momentum, self.done = group["lr"], muon.momentum, 0

    def step(self):
        if "momentum warmup" in self.changes:  # Jordan et al.: from 0.85, over a tenth of the run
            self.momentum = self.peak_momentum - (self.peak_momentum - 0.85) * max(0, 1 - 10 * self.done / self.steps)
        super().step()
        self.done += 1

    def _update(self, weights, lr, weight_decay):
        updates = []
        for weight in weights:
            state = self.state[weight]
            average = state.setdefault("momentum_buffer", torch.zeros_like(weight))
            average.lerp_(weight.grad, 1 - self.momentum)
            updates.append(weight.grad.lerp(average, self.momentum).bfloat16())
        rows, columns = weights[0].shape
        block = rows // 3 if rows == 3 * columns else rows
        if "head pairs" in self.changes and block != rows:
            block = min(block, 2 * self.head_rows)
        updates = orthogonalize(torch.stack(updates).view(-1, block, columns)).reshape(-1, rows, columns).float()
        scale = 0.2 * max(block, columns) ** 0.5
        decay = lr * weight_decay * (lr / self.peak_lr if "falling decay" in self.changes else 1)
        for weight, update in zip(weights, updates):
            if "NorMuon" in self.changes:  # Li et al. 2025: an update's rows get the same size, on average over steps
                squares = self.state[weight].setdefault("row_squares", torch.zeros(rows, 1, device=weight.device))
                squares.lerp_(update.square().mean(dim=1, keepdim=True), 0.05)
                scaled = update / (squares.sqrt() + 1e-8)
                update = scaled * (update.norm() / scaled.norm())
            shrinks = (update * weight > 0) if "cautious" in self.changes else 1.0  # only where the step shrinks, too
            weight.sub_(decay * weight * shrinks)
            weight.add_(update, alpha=-lr * scale)


class AfterStep(torch.optim.Optimizer):
    """Changes all weights after the other optimizers have updated them."""

    def __init__(self, model, steps):
        super().__init__(model.parameters(), {"lr": 0.0})
        self.weights, self.steps, self.done = list(model.parameters()), steps, 0
        self.start = [weight.detach().clone() for weight in self.weights]
        self.average = [torch.zeros_like(weight) for weight in self.start]
        self.peak_lr = 0.0


class TailAverage(AfterStep):
    """The weights at the end of the run are the mean of those after its last tenth of steps."""

    @torch.no_grad()
    def step(self):
        self.done += 1
        first = self.steps - self.steps // 10
        if self.done >= first:
            torch._foreach_lerp_(self.average, self.weights, 1 / (self.done - first + 1))
        if self.done == self.steps:
            torch._foreach_copy_(self.weights, self.average)


class EMANesterov(AfterStep):
    """The gradients are taken ahead of the weights, along their average movement (arXiv 2605.25395).

    The constants are those of modded-nanogpt's pull request 308, as shares of the run: it looks ahead between 0.16 and
    0.76 of the steps, by at most 0.6, in proportion to the learning rate, and averages over 1/32 of the run.
    """

    @torch.no_grad()
    def step(self):
        self.done += 1
        moved = torch._foreach_sub(self.weights, self.start)  # the others have stepped from the point ahead
        torch._foreach_lerp_(self.average, moved, min(1.0, 32 / self.steps))
        torch._foreach_copy_(self.start, self.weights)
        if 0.16 <= self.done / self.steps < 0.76:
            self.peak_lr = max(self.peak_lr, self.param_groups[0]["lr"])
            torch._foreach_add_(self.weights, self.average, alpha=0.6 * self.param_groups[0]["lr"] / self.peak_lr)


def make_changed(model, settings, config):
    """Return recipes.py's optimizers with the changes that settings.variant names, which are joined by " + "."""
    adamw, *muon = make_optimizers(model, settings, config)
    changes, steps = set(filter(None, settings.variant.split(" + "))), config.max_steps
    if changes & {"head pairs", "NorMuon", "cautious", "falling decay", "momentum warmup"}:
        muon = [ChangedMuon(muon[0], changes, steps, model.config.n_embd // model.config.n_head)]
    for name, factor in (("vectors x 3", 3.0), ("vectors / 3", 1 / 3)):
        if name in changes:
            adamw.param_groups[1]["lr_factor"] *= factor  # biases and LayerNorm
    after = {"tail average": TailAverage, "EMA-Nesterov": EMANesterov}
    return [adamw, *muon, *(after[name](model, steps) for name in after if name in changes)]


def changed(settings):
    """Return {name: settings} of what is tried, each a change of the searched Muon."""
    names = ("head pairs", "NorMuon", "cautious", "falling decay", "momentum warmup", "tail average", "EMA-Nesterov",
             "vectors x 3", "vectors / 3")  # fmt: skip
    tried = {name: replace(settings, variant=name) for name in names}
    decay = max(settings.weight_decay, 0.03)
    for name in ("cautious", "falling decay"):  # both decay less than a constant decay does
        tried[f"{name}, decay x 3"] = replace(settings, variant=name, weight_decay=3 * decay)
    tried["linear to 0.1"] = replace(settings, schedule="linear to 0.1")
    tried["linear to 0.1 + tail average"] = replace(settings, schedule="linear to 0.1", variant="tail average")
    return tried


def together(settings, winners):
    """Return the searched Muon with all winners, {name: settings}, at once. Of two decays, the larger one counts."""
    variants = dict.fromkeys(part for winner in winners.values() for part in winner.variant.split(" + ") if part)
    schedules = [winner.schedule for winner in winners.values() if winner.schedule != settings.schedule]
    decay = max((winner.weight_decay for winner in winners.values()), default=settings.weight_decay)
    return replace(settings, variant=" + ".join(variants), weight_decay=decay,
                   schedule=schedules[0] if schedules else settings.schedule)  # fmt: skip


# --- the questions, as tasks of recipes.py ----------------------------------------------------------------------------


def trained(settings, point, base, factor=ROOT_TWO):
    """Search the learning rate, then train with ten seeds. Return (settings, losses)."""
    found, _ = yield from tune_lr(settings, point, 1.0, base.batch, factor)
    losses = yield [point.run(found, seed) for seed in range(FIRST_SEED, FIRST_SEED + SEEDS)]
    return found, losses


def tuned(point, plan, preset=False):
    """Question 1 at a point, for the searched AdamW or for the preset. Return (the lecture's settings, the found ones,
    the result of their race).
    """
    base = plan.points[0]
    slow, _ = yield from tune_lr(LECTURE, point, 1.0, base.batch)
    fast = TUNED if preset else (yield from search("adamw", plan))
    if preset or point.parameters != base.parameters:
        fast, _ = yield from tune_lr(fast, point, 1.0, base.batch)
    point = replace(point, seeds=3 if preset else 5)
    return slow, fast, (yield from race(point, slow, fast, [1.0, *GRID[3:5]], GRID))


def wins(losses, base_losses):
    """Return whether losses are significantly lower."""
    return statistics.mean(losses) < statistics.mean(base_losses) and welch(losses, base_losses) < SIGNIFICANT


def changes_at(point, plan, names=None):
    """Question 2 at a point, for the named changes. Return {name: (settings, losses)}, also of what they change."""
    base, settings = plan.points[0], (yield from search("muon", plan))
    tried = {"searched": settings, "gpt2-fast": FAST} | changed(settings)
    tried = {name: tried[name] for name in tried if names is None or name in {"searched", "gpt2-fast", *names}}
    # all runs of the searches and of the seeds can be done at once
    tasks, results = {}, {}
    for name, one in tried.items():
        tasks[name] = trained(one, point, base, 2.0 if name == "gpt2-fast" else ROOT_TWO)
    wanted = {name: next(task) for name, task in tasks.items()}
    while wanted:
        losses = iter((yield [run for runs in wanted.values() for run in runs]))
        sent = {name: [next(losses) for _ in runs] for name, runs in wanted.items()}
        wanted = {}
        for name, values in sent.items():
            try:
                wanted[name] = tasks[name].send(values)
            except StopIteration as end:
                results[name] = end.value
    return {name: results[name] for name in tried}


def second_pass(points, plan):
    """Question 2. Return (the results of changes_at at both points, the adopted names, the race of each point)."""
    settings = yield from search("muon", plan)
    first = yield from changes_at(points[0], plan)
    names = [name for name, (_, losses) in first.items()
             if name not in ("searched", "gpt2-fast") and wins(losses, first["searched"][1])]  # fmt: skip
    second = yield from changes_at(points[1], plan, names)
    adopted = [name for name in names if wins(second[name][1], second["searched"][1])]
    races = []
    for point, results in zip(points, (first, second)):
        fast = together(settings, {name: results[name][0] for name in adopted})
        fast, _ = yield from tune_lr(fast, point, 1.0, plan.points[0].batch, ROOT_TWO)
        ten = replace(point, seeds=SEEDS)
        races.append((fast, (yield from race(ten, results["gpt2-fast"][0], fast, [1.0, *GRID[2:4]], GRID))))
    return (first, second), adopted, races


def transfer(point, plan, falls):
    """Question 3 at a point: return {learning rate: loss} with half of the ladder's budget of a search."""
    base, settings = plan.points[0], (yield from search("muon", plan))
    if falls:
        decay = float(f"{settings.weight_decay * base.n_embd / point.n_embd:.4g}")
        settings = replace(settings, weight_decay=decay)
    _, losses = yield from tune_lr(settings, point, point.searched / 2, base.batch)
    return losses


def all_tasks(points, plan, parts):
    """Return the tasks that these parts need, the first ones first."""
    tasks = {"tuned": [tuned(point, plan, preset) for point in points for preset in (False, True)]}
    tasks["changes"] = [second_pass(points, plan)]
    larger = TRANSFER if plan is PLAN else points
    tasks["transfer"] = [transfer(point, plan, falls) for falls in (False, True) for point in larger]
    return [task for part in parts for task in tasks[part]]


# --- the report -------------------------------------------------------------------------------------------------------


def ratio_text(ratios):
    """Return the mean of the token ratios of seeds, and its interval, as text."""
    mean, low, high = mean_interval(ratios)
    return f"{mean:.3f} ({low:.3f} to {high:.3f})" if mean else "not reached by all seeds"


def race_rows(question, point, names, slow, fast, result):
    """Return two rows: the slow settings with their losses, and the fast ones with the token ratio."""
    targets, found, ratios = result
    about = {"question": question, "parameters": point.parameters, "n": len(targets)}
    whole = found[1.0]
    return [
        about | {"name": names[0], "lr": slow.lr, "loss": show(targets), "losses": targets},
        about | {"name": names[1], "lr": fast.lr, "loss": show(whole), "losses": found, "ratio": ratio_text(ratios),
                 "paired": paired(whole, targets),
                 "difference": statistics.mean(whole) - statistics.mean(targets), "p": welch(whole, targets),
                 "ratios": ratios},
    ]  # fmt: skip


def change_rows(point, results, adopted):
    """Return a row for each change at a point, compared with the searched Muon."""
    rows, base = [], results["searched"][1]
    for name, (settings, losses) in results.items():
        row = {"question": "changes", "parameters": point.parameters, "name": name, "lr": settings.lr,
               "n": len(losses), "loss": show(losses), "losses": losses}  # fmt: skip
        if name != "searched":
            row |= {"difference": statistics.mean(losses) - statistics.mean(base), "p": welch(losses, base)}
            row["paired"] = paired(losses, base)
            row["verdict"] = "adopted" if name in adopted else "better" if wins(losses, base) else "no"
        rows.append(row)
    return rows


def best_rate(losses):
    """Return the learning rate at the lowest point of a parabola, in log2, through the best rate and its neighbors.

    losses: {learning rate: loss}. None if the best rate is at an edge.
    """
    rates = sorted(losses)
    i = rates.index(min(losses, key=losses.get))
    if not 0 < i < len(rates) - 1:
        return None
    left, middle, right = (losses[rates[j]] for j in (i - 1, i, i + 1))
    step = math.log2(rates[i + 1] / rates[i])
    return rates[i] * 2 ** (step * (left - right) / (2 * (left - 2 * middle + right)))


def report(points, plan, args):
    """Write the report of all runs that are done."""
    losses = {record["run"]: record["val"] for path in (args.known, args.records) for record in read_records(path)}
    rows = []
    for point in points:
        for preset, name in ((False, "AdamW, searched"), (True, "gpt2-tuned")):
            result, _ = advance(tuned(point, plan, preset), losses)
            rows += race_rows("tuned", point, ("the lecture's AdamW", name), *result) if result else []
    result, _ = advance(second_pass(points, plan), losses)
    if result:
        found, adopted, races = result
        for point, results, (fast, won) in zip(points, found, races):
            rows += change_rows(point, results, adopted)
            names = "gpt2-fast", "all adopted changes" if adopted else "searched"
            rows += race_rows("changes", point, names, results["gpt2-fast"][0], fast, won)
    else:  # at least those of the first size
        for point in points:
            results, _ = advance(changes_at(point, plan, None if point is points[0] else []), losses)
            rows += change_rows(point, results, []) if results else []
    for falls in (False, True):
        for point in TRANSFER if plan is PLAN else points:
            found, _ = advance(transfer(point, plan, falls), losses)
            if found:
                tried = ", ".join(f"{rate:.4g}: {loss:.4f}" for rate, loss in sorted(found.items()))
                name = "Muon, decay falls with the width" if falls else "Muon, constant decay"
                rows.append({"question": "transfer", "parameters": point.parameters, "name": name, "n": len(found),
                             "lr": best_rate(found), "loss": tried})  # fmt: skip
    records = read_records(args.records)
    about = describe() | {
        "rule": "docs/recipe.md, a fair comparison; better: Welch's test gives p < 0.01; adopted: at both sizes",
        "paired": "p of the paired test, for information: it was added after the runs, and no verdict uses it",
        "runs done": len(records),
        "text": ", ".join(sorted({record["text"] for record in records})),
        "devices of the runs": ", ".join(sorted({record["device"] for record in records})),
        "revision of the runs": ", ".join(sorted({record["revision"] for record in records})),
    }
    for optimizer in ("adamw", "muon"):
        best, _ = advance(search(optimizer, plan), losses)
        about[f"searched {optimizer}"] = str(best)
    write_report(args, "Changes of the optimizers", about, list(map(finite, rows)), COLUMNS)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--known", type=Path, required=True, help="ladder.jsonl, which has the runs of the searches")
    parser.add_argument("--parts", nargs="+", choices=("tuned", "changes", "transfer"),
                        default=("tuned", "changes", "transfer"), help="the questions to answer")  # fmt: skip
    parser.add_argument("--report", action="store_true", help="do no runs, and report those that are done")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    parser.add_argument("--text", help="the hash of a text that is in benchmarks/out/recipes_text already")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few runs, to test the program")
    args = parse_flags(parser, "variants")
    args.records, args.files = args.out_dir / f"{args.name}.jsonl", args.out_dir / f"{args.name}_files.txt"
    if not args.known.exists():
        raise UserError(f"--known {args.known} does not exist: give the ladder.jsonl of recipes.py")
    torch.set_num_threads(1)
    points, plan = (TINY_POINTS, TINY_PLAN) if args.tiny else (POINTS, PLAN)
    if not args.report:
        do_runs(plan, args, lambda: all_tasks(points, plan, args.parts), make_changed)
    report(points, plan, args)


if __name__ == "__main__":
    run_main(main)
