"""What a run records: log.txt, the curve that is drawn from it, and a tracker such as wandb."""

import argparse
import csv
import importlib
import json
import math
import os
import platform
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from support.common import UserError, atomic_write, exit_on_error, git_revision, one_line, quoted, tolerant_output, warn

# OpenAI's results: GPT-2's loss on the validation shard of FineWeb-Edu and its HellaSwag acc_norm are from the notebook
# of build-nanogpt (whose hellaswag.py has 0.2955 for the 124M), GPT-3's HellaSwag is from its paper. Each panel always
# shows its first three lines, and the others if the run comes near them.
REFERENCES = {
    "val": {"GPT-2 124M": 3.2924},
    "hella": {"chance": 0.25, "GPT-2 124M": 0.294463, "GPT-3 125M": 0.337, "GPT-2 350M": 0.375224, "GPT-3 350M": 0.436,
              "GPT-2 774M": 0.431986, "GPT-3 760M": 0.510, "GPT-2 1558M": 0.488946, "GPT-3 1.3B": 0.547},
}  # fmt: skip

# The presets for which references.csv has the values of healthy runs, and the data of those runs: encoding, pattern of
# the source, and how many tokens must measure the validation loss, because fewer are too inexact.
CHECKED = {"gpt2": ("gpt2", r"\bfineweb-edu(?!-score)", 1_000_000), "demo": ("bytes", "^stdlib$", 200_000)}

WEEK = 7 * 24 * 3600  # seconds


class TensorBoard:
    """TensorBoard's writer with the functions of wandb. Its files are in OUT/tensorboard.

    step: the first of this run. TensorBoard hides what an earlier run has written from there on, but log.txt may have
    kept the evaluation of this step, so it is written again.
    """

    __name__ = "tensorboard"

    def __init__(self, log_path, step):
        from torch.utils.tensorboard import SummaryWriter

        self.step, self.writer = step, SummaryWriter(log_path.with_name("tensorboard"), purge_step=step)
        for stream, points in read_log(log_path).items() if log_path.exists() else ():
            for at, value in zip(*points):
                if at >= step:
                    self.log({stream: value}, at)

    def init(self, config, **_):
        """Write the flags of this run."""
        text = "".join(f"    {name}: {value}\n" for name, value in config.items())  # in Markdown, indented is verbatim
        self.writer.add_text("flags", text, self.step)

    def log(self, values, step):
        """Write a step's values. They are flushed, because a run that is killed continues after its last checkpoint."""
        for stream, value in values.items():
            self.writer.add_scalar(stream, value, step)
        self.writer.flush()

    def finish(self):
        """Close the file."""
        self.writer.close()


class Log:
    """Append to OUT/log.txt, one `step stream value` per line (build-nanogpt's format), and to a tracker.

    Lines that a full disk refuses are kept in memory until it has space. A tracker that fails is dropped.
    manifest: of the data. recipe: the preset with whose healthy runs this one is compared (see CHECKED), or None.
    """

    def __init__(self, out_dir, manifest=None, recipe=None):
        self.path, self.manifest, self.recipe = Path(out_dir) / "log.txt", manifest, recipe
        self.unwritten, self.warned, self.tracker = b"", False, None
        self.thread, self.job, self.reported = ThreadPoolExecutor(1, "report"), None, None

    def start_tracker(self, name, settings, step=0):
        """Send the values from `step` on to the package `name`, too. OUT/tracker_id lets a resumed run continue the
        same record.
        """
        id_file = self.path.with_name("tracker_id")
        if not id_file.exists():
            id_file.write_text(os.urandom(4).hex())
        identifier = id_file.read_text()
        options = {"name": f"{self.path.absolute().parent.name}-{identifier}", "resume": "allow"}
        if name == "wandb":
            options["id"] = identifier  # trackio identifies a run by its name
        try:
            is_tensorboard = name == "tensorboard"
            self.tracker = TensorBoard(self.path, step) if is_tensorboard else importlib.import_module(name)
        except Exception as error:  # an installed package can fail in many ways while it is imported
            warn(f"training continues without {name}: {one_line(error)}")
        self._track("init", project="gpt2", config=settings, **options)

    def _track(self, function, *values, **options):
        if self.tracker is None:
            return
        try:
            getattr(self.tracker, function)(*values, **options)
        except Exception as error:  # a tracker's errors include those of its network libraries
            warn(f"training continues without {self.tracker.__name__}: {one_line(error)}")
            self.tracker = None

    def describe(self, flags, device, world_size):
        """Write OUT/run.json: what this run was started with. (config.json would make the folder look like a model.)"""
        versions = {"python": platform.python_version(), "torch": torch.__version__, "revision": git_revision()}
        about = {"flags": flags, "device": device, "processes": world_size, **versions}
        try:
            with atomic_write(self.path.with_name("run.json"), "free some disk space") as file:
                file.write(json.dumps(about, indent=2).encode())
        except (OSError, UserError) as error:
            warn(f"run.json is not written: {one_line(error)}")

    def write(self, step, **values):
        """Append one line for each value."""
        self._track("log", values, step=step)
        self.unwritten += "".join(f"{step} {stream} {value:.8g}\n" for stream, value in values.items()).encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                written = file.write(self.unwritten)  # a disk that is almost full takes only a part
            self.unwritten, self.warned = self.unwritten[written:], False
        except OSError as error:
            if not self.warned:
                warn(f"{self.path} cannot be written ({error}). Log lines are kept in memory until it can.")
            self.warned = True

    def best_step(self):
        """Return the step with the lowest validation loss so far, or None."""
        losses = validation_losses(self.path)
        return min(losses, key=losses.get, default=None)

    def report(self, step):
        """Compare the run with healthy ones and draw OUT/curve.png. A thread does both, so training does not wait.

        If the thread is late, a report that has not started is left out, because the next one includes it.
        """
        if self.job:
            self.job.cancel()
        self.job = self.thread.submit(self._report, step)

    def _report(self, step):
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-4)  # seconds; with the usual 0.005, training would wait that long at each kernel
        try:
            log = read_log(self.path)
            for line in due_checks(log, self.recipe, step if self.reported is None else self.reported, step):
                print(line, flush=True)
            self.reported = step
            figure = draw_curve({"": log}, self.manifest, self.recipe)
            figure.savefig(self.path.with_name("curve.png"), dpi=120)
        except Exception as error:  # a full disk, a damaged file, or an error of matplotlib's own
            warn(f"curve.png is not drawn: {one_line(error)}")
        finally:
            sys.setswitchinterval(interval)

    def finish(self):
        """Wait for the last report, and end the tracker's record. A second call does nothing."""
        self.thread.shutdown()
        self._track("finish")
        self.tracker = None


class Clock:
    """The time that a run takes. Its first step, which compiles, does not count for the time that is left."""

    def __init__(self, last_step):
        self.last_step, self.start, self.first, self.warned = last_step, time.monotonic(), None, False

    def progress(self, step):
        """Return what is done after this update, such as "1.3% done | 0:42 elapsed | 3:12:05 left".

        After the first update, the time that is left is not known yet. A resumed run's time starts when it is resumed.
        """
        now = time.monotonic()
        done = f"{(step + 1) / self.last_step:.1%} done | {duration(now - self.start)} elapsed"
        if self.first is None:
            self.first = step, now
            return done
        first_step, start = self.first
        seconds = (now - start) / (step - first_step) * (self.last_step - 1 - step)
        if seconds > WEEK and step - first_step >= 10 and not self.warned:
            self.warned = True
            warn(
                f"at this speed the run takes {seconds / 86400:.0f} days: --preset demo or fewer --max_steps take less"
            )
        return f"{done} | {duration(seconds)} left"


def duration(seconds):
    """Return seconds as text: 0:42, 3:12:05 or 2 days, 3:12:05."""
    return re.sub("^0:0?(?=.:)|^0:(?=..:)", "", str(timedelta(seconds=round(seconds))))


def summary(log, tokens, clock, device):
    """Return the last lines of a run: what it took, what it reached, and what to do next."""
    memory = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of GPU memory" if device.type == "cuda" else ""
    lines = [f"finished: {tokens:,} tokens in {duration(time.monotonic() - clock.start)}{memory}"]
    out_dir, model = quoted(log.path.parent), log.path.parent
    if losses := validation_losses(log.path):
        best, last = min(losses, key=losses.get), max(losses)
        lines.append(f"validation loss: {losses[last]:.4f}, at best {losses[best]:.4f} at step {best}")
        checkpoint = model / "checkpoints" / f"step_{best:06d}"
        model = checkpoint if best < last and checkpoint.exists() else model
    with suppress(OSError, ValueError):  # the run is saved, so nothing may end it with an error
        if checks := check_run(read_log(log.path), log.recipe):
            lines.append(f"compared with healthy runs: {describe_checks(checks)}")
    lines.append(f"log and curve: {out_dir}/log.txt, {out_dir}/curve.png")
    lines.append(f"to generate text: python sample.py --model {quoted(model)}")
    lines.append(
        "to train further: the same command with --resume --override max_steps and more --max_steps or --epochs"
    )
    return "\n".join(lines)


def validation_losses(log_path):
    """Return {step: validation loss} of a log.txt; {} if it does not exist."""
    return dict(zip(*read_log(log_path).get("val", ([], [])))) if log_path.exists() else {}


def read_log(path):
    """Return {stream: (steps, values)} of a log.txt of ours or of build-nanogpt, each list in the file's order.

    Other lines, such as blank ones and comments, are skipped.
    """
    streams = {}
    complete, _, _ = Path(path).read_text("utf-8-sig", "replace").rpartition("\n")  # the last line may be incomplete
    for line in complete.splitlines():
        with suppress(ValueError):  # not three words, or not numbers
            step, stream, value = line.split()
            step, value = int(step), float(value)
            steps, values = streams.setdefault(stream, ([], []))
            steps.append(step)
            values.append(value)
    return streams


def cut_log(path, step):
    """Remove the lines that a run resumed at `step` will write again. Return whether that step's evaluation remains."""
    lines = path.read_text("utf-8", "replace").splitlines(keepends=True) if path.exists() else []
    kept, evaluated = [], False
    for line in lines:
        number, stream, *_ = [*line.split(), "", ""]  # padded, because a broken line may be empty
        evaluation = number == str(step) and stream in ("val", "hella")
        is_kept = int(number) < step or evaluation if number.isdecimal() else number[:1] in ("", "#")
        if is_kept and line.endswith("\n"):
            kept.append(line)
            evaluated |= evaluation
    if len(kept) < len(lines):
        with atomic_write(path, "free some disk space and check its permissions, then --resume") as file:
            file.write("".join(kept).encode())
    return evaluated


def draw_curve(logs, manifest, recipe=None):
    """Return a matplotlib Figure of {label: log, as read_log returns it}: losses, and HellaSwag accuracies if any.

    manifest: the manifest of the runs' data. OpenAI's loss is per GPT-2 token of FineWeb-Edu, so it is drawn only
    beside losses of the same kind. recipe: the preset whose healthy runs are drawn, too (see CHECKED).
    """
    from matplotlib.figure import Figure  # not pyplot: no window and no global state

    is_gpt2, is_edu = manifest["encoding"] == "gpt2", "fineweb-edu" in manifest.get("source", "")
    known = {"val": REFERENCES["val"] if is_gpt2 and is_edu else {}, "hella": REFERENCES["hella"] if is_gpt2 else {}}
    labels = {"val": f"loss, nats per {'token' if is_gpt2 else 'byte'}", "hella": "HellaSwag acc_norm"}
    panels = ["val", "hella"] if any("hella" in log for log in logs.values()) else ["val"]
    figure = Figure(figsize=(7 * len(panels), 4.5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        last = max((steps[-1] for log in logs.values() for steps, _ in log.values()), default=0)
        if healthy := [(p.step, p.value) for p in expected_values(recipe) if p.stream == panel and p.step <= last]:
            axes.plot(*zip(*healthy), color="gray", lw=3, alpha=0.4, label="healthy run")
        for i, (label, log) in enumerate(logs.items()):
            if panel == "val" and "train" in log:
                draw_training_loss(axes, *log["train"], f"{label} train", f"C{i}")
            if panel in log:
                style = {"color": f"C{i}", "marker": "o", "ms": 4, "mec": "black", "ls": "" if panel == "val" else "-"}
                axes.plot(*log[panel], label=f"{label} {panel}, last {log[panel][1][-1]:.4f}", **style)
        drawn = [value for line in axes.lines for value in line.get_ydata() if math.isfinite(value)]
        for name, value in known[panel].items():
            draw_reference(axes, name, value)
        # the losses of the first steps would flatten all others, so the highest 5% may leave the picture
        top = 0.95 if panel == "val" else 1
        low, high = np.quantile([*drawn, *list(known[panel].values())[:3]] or [0], [0, top])
        margin = 0.05 * (high - low) or 1
        axes.set(xlabel="step", ylabel=labels[panel], ylim=(low - margin, high + margin))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(logs))
    return figure


def draw_training_loss(axes, steps, losses, label, color):
    """Draw each step's loss in a pale line, and its mean over 1% of the run in a strong one."""
    n = len(steps) // 100 + 1
    mean = np.convolve(losses, np.full(n, 1 / n), "valid")
    axes.plot(steps, losses, color=color, lw=0.5, alpha=0.3)
    axes.plot(steps[n // 2 :][: len(mean)], mean, color=color, label=label)


def draw_reference(axes, name, value):
    """Draw a horizontal line with its name at the right edge. GPT-2's names hang below, because GPT-3's lie close."""
    va, ls = ("top", "--") if "GPT-2" in name else ("bottom", ":")
    axes.axhline(value, color="gray", lw=1, ls=ls, zorder=1)
    at = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": True}
    axes.annotate(f"{name}, {value:.3f}", (1, value), (4, 0), va=va, color="gray", fontsize=8, **at)


# --- is this run as it should be? -------------------------------------------------------------------------------------


class Expected(NamedTuple):
    """What healthy runs measured: a stream at a step or, with a window, its mean over that many updates before it."""

    stream: str
    step: int
    window: int
    value: float
    tolerance: float


def expected_values(recipe):
    """Return the Expected values of healthy runs of a preset, sorted by step; [] if it is not in CHECKED."""
    if recipe not in CHECKED:
        return []
    with open(Path(__file__).with_name("references.csv"), newline="") as file:
        rows = [row for row in csv.reader(file) if row[0] == recipe]
    points = [Expected(row[1], int(row[2]), int(row[3]), float(row[4]), float(row[5])) for row in rows]
    return sorted(points, key=lambda point: point.step)


def check_run(log, recipe):
    """Compare a log, as read_log returns it, with healthy runs. Return {step: (whether it is as expected, a line)}.

    A step is left out if the log lacks its evaluation or an update of its window. Skipped updates do not count.
    """
    logged = {stream: dict(zip(*lists)) for stream, lists in log.items()}
    skipped, found = logged.get("skipped", {}), {}
    for point in expected_values(recipe):
        updates = range(point.step - point.window, point.step) if point.window else [point.step]
        values = [logged.get(point.stream, {}).get(i) for i in updates if not (point.window and i in skipped)]
        if values and None not in values:
            found.setdefault(point.step, []).append(comparison(point, sum(values) / len(values)))
    checks = {}
    for step, comparisons in found.items():
        is_expected = all(good for good, _ in comparisons)
        verdict = "as expected" if is_expected else "not as expected, see docs/troubleshooting.md#is-my-run-right"
        texts = [text for good, text in comparisons if good == is_expected]
        checks[step] = is_expected, f"check {step:5d} | {' | '.join(texts)} | {verdict}"
    return checks


def comparison(point, value):
    """Return whether a value is within the tolerance of an Expected one, and the text that says so."""
    difference = value - point.value
    if abs(difference) <= point.tolerance:  # not if it is nan
        return True, f"{point.stream} {value:.5g} (reference {point.value:.5g})"
    where = "below" if difference < 0 else "above"
    text = f"{abs(difference):.3g} {where} the reference {point.value:.5g}, tolerance {point.tolerance:.2g}"
    return False, f"{point.stream} {value:.5g} ({text})"


def describe_checks(checks):
    """Return the result of check_run in a few words."""
    failures = sum(not is_expected for is_expected, _ in checks.values())
    steps = f"{len(checks)} steps, up to {max(checks)}"
    return f"not as expected at {failures} of {steps}" if failures else f"as expected at all {steps}"


def due_checks(log, recipe, since, step):
    """Return the line of check_run for a step, and those of the steps after `since` that are not as expected."""
    checks = check_run(log, recipe).items()
    return [line for at, (good, line) in checks if at == step or (not good and since < at < step)]


def has_reference(preset, manifest, val_tokens):
    """Return whether references.csv describes a preset's runs, on the data of a manifest and with val_tokens."""
    if preset not in CHECKED:
        return False
    encoding, source, least = CHECKED[preset]
    same_data = manifest["encoding"] == encoding and re.search(source, manifest.get("source") or "")
    return bool(same_data) and val_tokens >= least


def main():
    """Print how a log compares with healthy runs. Exit code 0: as expected so far; 1: not; 2: cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m support.runlog", description=main.__doc__)
    parser.add_argument("log", type=Path, help="a log.txt of this project or of build-nanogpt")
    parser.add_argument("--recipe", choices=CHECKED, default="gpt2", help="the preset that the run used")
    args = parser.parse_args()
    with tolerant_output(), exit_on_error():
        if not args.log.is_file():
            raise UserError(f"{args.log} is not a file: give the log.txt of a run")
        checks = check_run(read_log(args.log), args.recipe)
        if not checks:
            raise UserError(f"{args.log} has no step that can be compared: is it a log.txt of --recipe {args.recipe}?")
        print(*(line for _, line in checks.values()), sep="\n")
        print(f"compared with healthy runs: {describe_checks(checks)}")
        sys.exit(0 if all(is_expected for is_expected, _ in checks.values()) else 1)


if __name__ == "__main__":
    main()
