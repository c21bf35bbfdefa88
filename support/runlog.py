"""What a run records: log.txt, the curve that is drawn from it, a tracker such as wandb, and the use of the GPU."""

import importlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from support.common import UserError, atomic_write, one_line, quoted, warn

# OpenAI's results: GPT-2's loss on the validation shard of FineWeb-Edu and its HellaSwag acc_norm are from the notebook
# of build-nanogpt (whose hellaswag.py has 0.2955 for the 124M), GPT-3's HellaSwag is from its paper. Each panel always
# shows its first three lines, and the others if the run comes near them.
REFERENCES = {
    "val": {"GPT-2 124M": 3.2924},
    "hella": {"chance": 0.25, "GPT-2 124M": 0.294463, "GPT-3 125M": 0.337, "GPT-2 350M": 0.375224, "GPT-3 350M": 0.436,
              "GPT-2 774M": 0.431986, "GPT-3 760M": 0.510, "GPT-2 1558M": 0.488946, "GPT-3 1.3B": 0.547},
}  # fmt: skip


WEEK = 7 * 24 * 3600  # seconds


class Log:
    """Append to OUT/log.txt, one `step stream value` per line (build-nanogpt's format), and to a tracker.

    Lines that a full disk refuses are kept in memory until it has space. A tracker that fails is dropped.
    """

    def __init__(self, out_dir):
        self.path = Path(out_dir) / "log.txt"
        self.unwritten, self.warned, self.tracker = b"", False, None
        self.thread = ThreadPoolExecutor(max_workers=1)  # draws the curve

    def start_tracker(self, name, settings):
        """Send the values to the package `name`, too. OUT/tracker_id lets a resumed run continue the same record."""
        id_file = self.path.with_name("tracker_id")
        if not id_file.exists():
            id_file.write_text(os.urandom(4).hex())
        identifier = id_file.read_text()
        options = {"name": f"{self.path.absolute().parent.name}-{identifier}", "resume": "allow"}
        if name == "wandb":
            options["id"] = identifier  # trackio identifies a run by its name
        try:
            self.tracker = importlib.import_module(name)
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
        git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
        try:
            revision = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            revision = ""
        versions = {"python": platform.python_version(), "torch": torch.__version__, "revision": revision or "unknown"}
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

    def draw(self, manifest):
        """Start to draw OUT/curve.png, on a thread, so that training does not wait. manifest: see draw_curve."""
        # By default a thread gives way after 5 ms, and training would wait that long in almost every kernel launch.
        sys.setswitchinterval(1e-4)
        self.thread.submit(self._draw, manifest)

    def _draw(self, manifest):
        try:
            draw_curve({"": read_log(self.path)}, manifest).savefig(self.path.with_name("curve.png"), dpi=120)
        except Exception as error:  # a full disk, or an error of matplotlib's own
            warn(f"curve.png is not drawn: {one_line(error)}")

    def finish(self):
        """Wait for the last curve, and end the tracker's record. A second call does nothing."""
        self.thread.shutdown()
        self._track("finish")
        self.tracker = None


class Clock:
    """The time that a run takes. Its first step, which compiles, does not count for the time that is left."""

    def __init__(self, last_step):
        self.last_step, self.start, self.first, self.warned = last_step, time.monotonic(), None, False

    def time_left(self, step):
        """Return the time after this update until the end, such as "3:12:05 left", or "" after the first."""
        if self.first is None:
            self.first = step, time.monotonic()
            return ""
        first_step, start = self.first
        seconds = (time.monotonic() - start) / (step - first_step) * (self.last_step - 1 - step)
        if seconds > WEEK and step - first_step >= 10 and not self.warned:
            self.warned = True
            warn(
                f"at this speed the run takes {seconds / 86400:.0f} days: --preset demo or fewer --max_steps take less"
            )
        return f"{duration(seconds)} left"


def duration(seconds):
    """Return seconds as text: 0:42, 3:12:05 or 2 days, 3:12:05."""
    return re.sub("^0:0?(?=.:)|^0:(?=..:)", "", str(timedelta(seconds=round(seconds))))


def device_name(device):
    """Return a device and the name of its hardware."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device}, {name}"


def summary(log_path, tokens, clock, device):
    """Return the last lines of a run: what it took, what it reached, and what to do next."""
    memory = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of GPU memory" if device.type == "cuda" else ""
    lines = [f"finished: {tokens:,} tokens in {duration(time.monotonic() - clock.start)}{memory}"]
    out_dir, model = quoted(log_path.parent), log_path.parent
    if losses := validation_losses(log_path):
        best, last = min(losses, key=losses.get), max(losses)
        lines.append(f"validation loss: {losses[last]:.4f}, at best {losses[best]:.4f} at step {best}")
        checkpoint = model / "checkpoints" / f"step_{best:06d}"
        model = checkpoint if best < last and checkpoint.exists() else model
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


def draw_curve(logs, manifest):
    """Return a matplotlib Figure of {label: log, as read_log returns it}: losses, and HellaSwag accuracies if any.

    manifest: the manifest of the runs' data. OpenAI's loss is per GPT-2 token of FineWeb-Edu, so it is drawn only
    beside losses of the same kind.
    """
    from matplotlib.figure import Figure  # not pyplot: no window and no global state

    is_gpt2, is_edu = manifest["encoding"] == "gpt2", "fineweb-edu" in manifest.get("source", "")
    known = {"val": REFERENCES["val"] if is_gpt2 and is_edu else {}, "hella": REFERENCES["hella"] if is_gpt2 else {}}
    labels = {"val": f"loss, nats per {'token' if is_gpt2 else 'byte'}", "hella": "HellaSwag acc_norm"}
    panels = ["val", "hella"] if any("hella" in log for log in logs.values()) else ["val"]
    figure = Figure(figsize=(7 * len(panels), 4.5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
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


# Dense TFLOP/s in bfloat16, or float16 where the GPU has no bfloat16, with sums in float32, for the MFU. They are from
# memory of the data sheets (half of a figure "with sparsity"), and for GeForce of the white papers. Only A100, H100
# and V100 were compared with a second source. For 4080 SUPER, 4090 D, 4070, 4060 and Laptop models they are NVIDIA's
# "AI TOPS" / 8, for the 50 series / 16, because those count FP4. A Laptop GPU has the peak of its highest power limit.
# The first name that a device's name contains as whole words counts, so longer names come first. A "$" is the end of
# the name, because an "RTX 5090 D" is another GPU than an "RTX 5090".
PEAK_TFLOPS = {
    "GB300": 2500, "GB200": 2500, "B300": 2250, "B200": 2250,
    "GH200": 989, "H200 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H20": 148,
    "A100": 312, "A40": 149.7, "A30": 165, "A10G": 70, "A10": 125, "L40S": 362, "L40": 181, "L4": 121,
    "T4": 65, "V100S": 130, "V100-PCIE": 112, "V100": 125,
    "RTX 6000 Ada Generation": 364, "RTX A6000$": 154.8,
    "RTX 5090 Laptop GPU": 114, "RTX 4090 Laptop GPU": 85.8, "RTX 4090 D$": 147,
    "RTX 5090$": 209.5, "RTX 5080$": 112.6, "RTX 4090$": 165.2, "RTX 4080 SUPER$": 104.5, "RTX 4080$": 97.5,
    "RTX 4070 Ti$": 80.2, "RTX 4070$": 58.3, "RTX 4060 Ti$": 44.1, "RTX 4060$": 30.3,
    "RTX 3090 Ti$": 80, "RTX 3090$": 71,
    "MI355X": 2500, "MI325X": 1307, "MI300X": 1307,
}  # fmt: skip


def peak_flops(device):
    """Return a GPU's peak in FLOP/s, or None if it is unknown, as for a part of a GPU (MIG)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if re.search(r"\bMIG\b", name):
        return None
    return next((tflops * 1e12 for key, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{key}(?!\w)", name)), None)


def mfu(flops, device):
    """Return as text the FLOP/s that the model's mathematics needs, as a share of a GPU's peak; "" if it is unknown."""
    peak = peak_flops(device)
    return f"mfu: {flops / peak:.1%}" if peak else ""


def flops_per_token(config, T):
    """Return a training step's FLOPs per token of a GPTConfig: 6 per weight in products, and 12·L·C·T for attention
    (PaLM, appendix B).
    """
    weights = 12 * config.n_layer * config.n_embd**2 + config.padded_vocab_size * config.n_embd
    return 6 * weights + 12 * config.n_layer * config.n_embd * T
