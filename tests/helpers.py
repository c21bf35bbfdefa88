"""What several test files use: small runs, programs in the background, and comparisons of runs."""

import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import fineweb
import train_gpt2
from support.checkpoints import save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "--device cpu --compile off --dtype float32 --n_layer 2 --n_head 2 --n_embd 32 --block_size 64 --seq_len 64 "
    "--optimizer muon --total_batch_tokens 512 --micro_batch 4 --warmup_steps 5 --max_steps 40 --lr 0.01 "
    "--eval_interval 10 --val_tokens 2000 --sample_interval 0 --save_interval 10 --keep_checkpoints 9 "
    "--hellaswag_file none"
).split()


class Program:
    """train_gpt2.py as a user starts it, in the background; its lines as they come."""

    def __init__(self, *flags, launcher=(str(ROOT / "train_gpt2.py"),), processes=1, restarts=0, **options):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(torchrun + [f"--max-restarts={restarts}"] if processes > 1 else []), *launcher]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        one_thread = {"env": os.environ | {"OMP_NUM_THREADS": "1"}}  # as run_script: sums on more round otherwise
        self.process = subprocess.Popen([*command, *map(str, flags)], **pipes, **one_thread | options)
        self.lines, self.times, self.came = [], [], threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            with self.came:
                self.lines.append(line.rstrip("\n"))
                self.times.append(time.monotonic())
                self.came.notify_all()

    @property
    def text(self):
        return "\n".join(self.lines)

    def wait_for(self, pattern, timeout=60):
        with self.came:
            found = self.came.wait_for(lambda: re.search(pattern, self.text, re.M), timeout)
        assert found, f"{pattern} did not come:\n{self.text}"

    def seconds_to(self, pattern):
        """From the line before the first that matches."""
        index = next(i for i, line in enumerate(self.lines) if re.search(pattern, line))
        return self.times[index] - self.times[index - 1]

    def end(self, timeout=200):
        """Its exit code; killed if it does not end."""
        try:
            return self.process.wait(timeout)
        finally:
            self.process.kill()
            time.sleep(0.1)  # for the last lines


def error_lines(capsys, *flags):
    """The lines with which the program refuses its command line, run in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        train_gpt2.main([*map(str, flags)])
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and all(line.startswith("error: ") for line in lines)
    return lines


def worker(torchrun, rank):
    """The process id of a rank."""
    children = subprocess.run(["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True).stdout.split()
    return next(
        int(pid) for pid in children if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    )


def identical(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(identical, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(out, expected):
    """Weights, optimizer state and log equal to the bit; what is measured in seconds aside."""
    last = max(expected.glob("checkpoints/step_*")).name
    ours, theirs = out / "checkpoints" / last, expected / "checkpoints" / last
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    states = [torch.load(folder / "training_state.pt", weights_only=True) for folder in (ours, theirs)]
    for state in states:
        del state["config"]  # holds the folder
    assert identical(*states)
    logs = [
        [line for line in (run / "log.txt").read_text().splitlines() if "tok_s" not in line] for run in (out, expected)
    ]
    assert logs[0] == logs[1]


def steps_saved(out):
    return [folder.name for folder in sorted((out / "checkpoints").iterdir())]


def write_bin(path, tokens, magic=20240520, version=1, count=None):
    """Write tokens as a .bin shard of llm.c; magic, version and count can be wrong."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype=np.uint16).tobytes())
    return path


def save_model(out_dir, model, step=1, **state):
    """Save a model that reads bytes as a checkpoint of an output folder, and return the checkpoint's folder."""
    encoding = fineweb.get_encoding("bytes")
    state = {"step": step} | state
    return save_checkpoint(out_dir, step, model.pretrained_weights(), state, asdict(model.config), encoding)
