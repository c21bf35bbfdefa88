"""
Show that a change of the code changes no result: the same small runs at a git revision and in the working tree.

    python benchmarks/identical.py --revision HEAD~1

Each run trains a tiny model for a few steps on one CPU thread per process. The train, val, lr and norm lines of log.txt
are compared, and the sha256 of the last model.safetensors. A resumed run starts from a checkpoint of that revision.
Prints a table as it runs. The exit code is 1 if a result differs.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "--device cpu --compile off --dtype float32 --n_layer 2 --n_head 2 --n_embd 32 --block_size 64 --seq_len 64 "
    "--total_batch_tokens 1024 --micro_batch 4 --warmup_steps 5 --max_steps 20 --lr 0.01 --eval_interval 10 "
    "--val_tokens 4000 --sample_interval 10 --max_new_tokens 8 --save_interval 10 --hellaswag_file none"
)
RUNS = {  # name: (processes, flags)
    "adamw": (1, f"{SMALL} --optimizer adamw"),
    "muon": (1, f"{SMALL} --optimizer muon --schedule linear"),
    "dropout, explicit attention, bfloat16": (1, f"{SMALL} --dropout 0.2 --no_flash --dtype bfloat16"),
    "compiled, blocks computed twice": (1, f"{SMALL} --compile on --activation_checkpointing"),
    "adamw, two processes": (2, f"{SMALL} --optimizer adamw"),
    "muon, two processes": (2, f"{SMALL} --optimizer muon"),
    "adamw, --fsdp": (2, f"{SMALL} --fsdp --optimizer adamw"),
    "muon, --fsdp, bfloat16": (2, f"{SMALL} --fsdp --optimizer muon --dtype bfloat16"),
    "demo": (1, "--preset demo --max_steps 60 --eval_interval 30 --save_interval 30 --sample_interval 0"),
}
# name: the run that is continued from its checkpoint at step 10
RESUMED = {"resumed: adamw": "adamw", "resumed: muon, two processes": "muon, two processes"}


def run(tree, name, flags, processes, data, out_dir):
    """Train in a checkout. Return what must not change: {name: the start of its sha256}."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, "train_gpt2.py", *flags.split(), "--data_dir", str(data), "--out_dir", str(out_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: the run {name!r} failed in {tree}:\n{done.stdout}{done.stderr}")
    lines = [line for line in (out_dir / "log.txt").read_text().splitlines() if "tok_s" not in line]
    weights = max(out_dir.glob("checkpoints/step_*")) / "model.safetensors"
    contents = {"log": "\n".join(lines).encode(), "weights": weights.read_bytes()}
    return {key: hashlib.sha256(content).hexdigest()[:16] for key, content in contents.items()}


def report(name, before, after):
    """Print one line of the table. Return whether the two results are the same."""
    same = before == after
    print(name, *before.values(), "same" if same else "DIFFERENT", sep=" | ", flush=True)
    return same


def compare(tree, revision, runs, resumed):
    """Do all runs at a git revision of the checkout `tree`, and in `tree` as it is. Return whether all are the same.

    runs: see RUNS. resumed: see RESUMED.
    """
    same = True
    with tempfile.TemporaryDirectory() as folder:
        folder, before = Path(folder), Path(folder, "before")
        subprocess.run(["git", "clone", "-q", tree, before], check=True)
        subprocess.run(["git", "checkout", "-q", revision], cwd=before, check=True)
        shards = f"fineweb.prepare('stdlib', {str(folder / 'data')!r}, 'bytes', 100_000, 400_000, 1)"
        subprocess.run([sys.executable, "-c", f"import fineweb; {shards}"], cwd=before, check=True)
        for name, (processes, flags) in runs.items():
            data = folder / ("demo" if name == "demo" else "data")
            outs = {before: folder / "old" / name, tree: folder / "new" / name}
            same &= report(name, *(run(where, name, flags, processes, data, out) for where, out in outs.items()))
        for name, original in resumed.items():
            processes, flags = runs[original]
            outs = {before: folder / "old" / original, tree: folder / "resumed" / name}
            shutil.copytree(outs[before], outs[tree])
            shutil.rmtree(max(outs[tree].glob("checkpoints/step_*")))  # the last one, so it resumes from the one before
            flags, data = f"{flags} --resume", folder / "data"
            same &= report(name, *(run(where, name, flags, processes, data, out) for where, out in outs.items()))
    return same


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revision", default="HEAD", help="the git revision to compare the working tree with")
    sys.exit(not compare(ROOT, parser.parse_args().revision, RUNS, RESUMED))


if __name__ == "__main__":
    main()
