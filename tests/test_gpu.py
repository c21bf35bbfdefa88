"""What only a CUDA device can show; run with pytest -m gpu."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from support.runlog import read_log
from train_gpt2 import GPT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "--device cuda --n_layer 2 --n_head 2 --n_embd 64 --block_size 128 --seq_len 128 --total_batch_tokens 4096 "
    "--micro_batch 8 --warmup_steps 5 --max_steps 20 --lr 0.003 --eval_interval 10 --val_tokens 5000 "
    "--sample_interval 10 --prompt ! --hellaswag_file none"
).split()


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_shards):
    tokens = np.random.RandomState(0).randint(0, 1000, 400_000)
    return make_shards(tmp_path_factory.mktemp("gpu") / "data", {"val": [tokens[:20_000]], "train": [tokens[20_000:]]})


def test_precisions_and_compilation_agree(shards, run_script, tmp_path):
    """bfloat16, float16 with its scaler, and compiled code train like eager float32, and report their MFU."""
    losses = {}
    for dtype in ("float32", "bfloat16", "float16"):
        for compile in ("off", "on"):
            out = tmp_path / f"{dtype}_{compile}"
            flags = [*SMALL, "--data_dir", shards, "--out_dir", out, "--dtype", dtype, "--compile", compile]
            done = run_script("train_gpt2.py", *flags)
            assert done.returncode == 0, done.stderr
            assert re.search(r"machine: cuda.*" + ("compiled" if compile == "on" else "eager"), done.stdout)
            losses[dtype, compile] = read_log(out / "log.txt")["train"][1]
    reference = losses["float32", "off"]
    for values in losses.values():
        assert values == pytest.approx(reference, abs=0.05)


def test_equal_to_hugging_face_on_the_gpu(tmp_path):
    """The model computes there what transformers computes."""
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=3, n_head=4, n_embd=64)).eval()
    theirs.save_pretrained(tmp_path)
    theirs, ours = theirs.cuda(), GPT.from_pretrained(tmp_path).cuda().eval()
    ids = torch.randint(0, 50257, (2, 200), device="cuda")
    with torch.no_grad():
        assert (ours(ids)[0] - theirs(ids).logits).abs().max() <= 1e-3
    generator = torch.Generator("cuda").manual_seed(1)
    assert ours.generate(ids[:, :5], 10, generator=generator).max() < 50257


def test_micro_batch_auto_fits(shards, run_script, tmp_path):
    """The largest micro-batch that the memory holds is found by trying, and the run goes through with it."""
    script = (
        "import sys, torch, train_gpt2; torch.cuda.set_per_process_memory_fraction(float(sys.argv.pop(1)));"
        "train_gpt2.main(sys.argv[1:])"
    )
    total = torch.cuda.get_device_properties(0).total_memory
    flags = [*SMALL, "--micro_batch", "auto", "--total_batch_tokens", 131072, "--n_embd", 512, "--data_dir", shards]
    rows = {}
    for gigabytes in (1.5, 8):
        out = ["--compile", "off", "--max_steps", "5", "--out_dir", tmp_path / str(gigabytes)]
        command = [sys.executable, "-c", script, gigabytes * 2**30 / total, *flags, *out]
        done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        rows[gigabytes] = int(re.search(r"= (\d+) sequences x", done.stdout)[1])
    assert rows[1.5] < rows[8] == 512


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_shards_on_two_gpus(shards, run_script, tmp_path):
    """--fsdp over NCCL, compiled, in bfloat16, trains DDP's run, finds its micro-batch, samples and can be resumed."""
    losses = []
    for more in ([], ["--fsdp"], ["--fsdp", "--activation_checkpointing", "--micro_batch", "auto"]):
        flags = [*SMALL, "--data_dir", shards, "--dtype", "bfloat16", "--out_dir", tmp_path / str(len(losses)), *more]
        done = run_script("train_gpt2.py", *flags, processes=2)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("sample 0: !") == 2
        losses.append(read_log(tmp_path / str(len(losses)) / "log.txt")["train"][1])
        assert losses[-1] == pytest.approx(losses[0], abs=0.05)
    done = run_script("train_gpt2.py", *flags, "--resume", "--max_steps", 25, "--override", "max_steps")
    assert done.returncode == 2 and "torchrun" in done.stderr  # --fsdp on one process
    flags.remove("--fsdp")
    done = run_script("train_gpt2.py", *flags, "--resume", "--max_steps", 25, "--override", "max_steps")
    assert done.returncode == 0 and "at step 20" in done.stdout, done.stderr
