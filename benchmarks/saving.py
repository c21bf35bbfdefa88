"""
What a checkpoint of GPT-2 124M costs: how long training stands still for it, and how long the writing takes.

    python benchmarks/saving.py OUT_DIR          a folder on the disk to be measured; its checkpoints are deleted
"""

import json
import platform
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fineweb
from support.checkpoints import CheckpointWriter, save_checkpoint
from train_gpt2 import GPT, GPTConfig, Run, Runtime, TrainConfig, configure_optimizers


class Loader:
    position = 0


def main(out_dir, repetitions=5):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT(GPTConfig()).to(device)
    config = TrainConfig(out_dir=str(Path(out_dir)), keep_checkpoints=1)
    optimizers = configure_optimizers(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    scaler = torch.amp.GradScaler(device, enabled=False)
    run = Run(model, model, optimizers, scaler, Loader, Loader, {}, fineweb.get_encoding("gpt2"), None, None)
    stalls, writes, blocking = [], [], []
    with ThreadPoolExecutor(max_workers=1) as thread:
        writer = CheckpointWriter(thread, config, run, Runtime(0, 1, device, torch.float32, False), None)
        for step in range(1, 2 * repetitions, 2):
            start = time.perf_counter()
            writer.save(step, 0)
            stalls.append(time.perf_counter() - start)
            writer.finish()
            writes.append(time.perf_counter() - start)
            start = time.perf_counter()
            state = {"step": step + 1, "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            folder = save_checkpoint(out_dir, model, run.encoding, state)
            blocking.append(time.perf_counter() - start)
    size = sum(file.stat().st_size for file in folder.iterdir())
    result = {
        "what": "seconds for a checkpoint of GPT-2 124M, medians",
        "stall": statistics.median(stalls),
        "stall_and_background_write": statistics.median(writes),
        "blocking_save": statistics.median(blocking),
        "bytes": size,
        "repetitions": repetitions,
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {device}",
        "torch": torch.__version__,
        "command": f"python benchmarks/saving.py {out_dir}",
    }
    print(json.dumps(result, indent=2))
    (Path(__file__).parent / "results" / "saving.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
