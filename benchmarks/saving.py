"""
Measure what a checkpoint costs: how long training waits for it, and how long writing it takes.

    python benchmarks/saving.py --disk FOLDER          a folder on the disk to be measured

train_gpt2.py hands copies of weights and optimizer state to a thread, which writes them. For comparison, the same
checkpoint is also written without a thread. The checkpoints go to a temporary folder in --disk, which is deleted at the
end. Writes saving.md and .json: see measure.py.
"""

import statistics
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from measure import SHAPES, describe, make_parser, parse_flags, run_main, write_report

import fineweb
from support.checkpoints import CheckpointWriter, save_checkpoint
from support.distributed import copy_to_cpu
from train_gpt2 import PRESETS, save, set_up, setup_runtime, train_step, training_state

COLUMNS = {"seconds of a checkpoint": ("what", ""), "median": ("median", ".3f"), "longest": ("longest", ".3f")}


def start_training(preset, device, folder):
    """Return a Training, its config and its runtime after one update, so that AdamW has its moments."""
    fineweb.prepare("stdlib", folder / "data", SHAPES[preset].encoding, 10_000, 20_000, workers=1)
    model_config, config = PRESETS[preset]
    config = replace(
        config, data_dir=str(folder / "data"), out_dir=str(folder / "out"), keep_checkpoints=1, device=device,
        optimizer="adamw", micro_batch=1, total_batch_tokens=config.seq_len, compile="off", hellaswag_file="none",
    )  # fmt: skip
    runtime = setup_runtime(config)
    training = set_up(model_config, config, runtime, None, None)
    train_step(training.model, training.optimizers, training.scaler, training.loader, 0, config, runtime)
    return training, config, runtime


def blocking_save(step, training, config):
    """Write a checkpoint without a thread. Return its folder."""
    weights, shape = training.raw_model.pretrained_weights(), asdict(training.raw_model.config)
    state = copy_to_cpu(training_state(step, 0, training, config), keep=True)
    return save_checkpoint(config.out_dir, step, weights, state, shape, training.encoding)


def time_saves(training, config, runtime, repetitions):
    """Return {what: its seconds in each repetition}, and the bytes of a checkpoint."""
    stalls, writes, blocking = [], [], []
    shape = asdict(training.raw_model.config)
    with CheckpointWriter(config.out_dir, config.keep_checkpoints, shape, training.encoding, None) as writer:
        for step in range(1, 2 * repetitions, 2):
            start = time.perf_counter()
            save(step, 0, training, config, runtime, writer)
            stalls.append(time.perf_counter() - start)
            writer.finish()
            writes.append(time.perf_counter() - start)
            start = time.perf_counter()
            folder = blocking_save(step + 1, training, config)
            blocking.append(time.perf_counter() - start)
    size = sum(file.stat().st_size for file in folder.iterdir())
    seconds = {"training waits": stalls, "until the thread has written it": writes, "without a thread": blocking}
    return seconds, size


def main():
    parser = make_parser(__doc__, repetitions=5)
    parser.add_argument("--disk", type=Path, help="folder on the disk to be measured (--out_dir)")
    parser.add_argument("--preset", choices=SHAPES, default="gpt2")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parse_flags(parser, "saving")
    about = describe()
    with tempfile.TemporaryDirectory(dir=args.disk or args.out_dir) as folder:
        training, config, runtime = start_training(args.preset, args.device, Path(folder))
        seconds, size = time_saves(training, config, runtime, args.repetitions)
    rows = [
        {"what": what, "median": statistics.median(runs), "longest": max(runs), "runs": runs}
        for what, runs in seconds.items()
    ]
    about |= {
        "checkpoint": f"{size / 1e6:,.1f} MB: {training.raw_model.num_params():,} parameters and AdamW's moments",
        "device": str(runtime.device),
        "runs": f"{args.repetitions}, alternating",
    }
    write_report(args, "Saving a checkpoint", about, rows, COLUMNS)


if __name__ == "__main__":
    run_main(main)
