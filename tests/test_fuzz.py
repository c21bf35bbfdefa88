"""Fifty damaged or odd inputs for each script: none ends in a traceback, and the exit code is 0 or 2.

Each case is drawn from its number, so a failure can be repeated: pytest -n 0 tests/test_fuzz.py -k "sample and 17".
"""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from helpers import save_model

import fineweb
import hellaswag
import sample
import train_gpt2
from train_gpt2 import GPT, GPTConfig

TINY = (
    "--device cpu --compile off --dtype float32 --total_batch_tokens 64 --seq_len 16 --micro_batch 2 --max_steps 2 "
    "--warmup_steps 1 --lr 0.01 --eval_interval 1 --val_tokens 64 --save_interval 2 --sample_interval 2 --prompt Hi "
    "--num_samples 1 --max_new_tokens 2 --hellaswag_file none"
).split()
SHAPE = "--n_layer 1 --n_head 2 --n_embd 8 --block_size 16".split()
ROW = {"ctx": "A man", "activity_label": "a", "ctx_a": "A man", "ctx_b": "", "endings": [*"abcd"], "label": 2}
VALUES = [None, True, 0, -1, 1.5, 2**63, 10**30, "", "x", "1", [], [1], {}, {"a": 1}, "\ud800", "é\n", float("nan")]


@pytest.fixture(scope="module")
def world(tmp_path_factory, text_shards):
    """A folder with a model of bytes in an output folder, its shards, and HellaSwag rows."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=1, n_head=2, n_embd=8))
    save_model(folder / "run", model)
    tokens = fineweb.open_shard(fineweb.list_shards(text_shards)[0])[:2000]
    fineweb.prepare("stdlib", folder / "data", "bytes", shard_tokens=1000, max_tokens=3000, workers=1)
    (folder / "rows.jsonl").write_text("".join(json.dumps(ROW | {"ind": i}) + "\n" for i in range(5)))
    (folder / "prompt.txt").write_text("def f(x):\n    return x\n")
    assert len(tokens) == 2000
    return folder


# --- damage -----------------------------------------------------------------------------------------------------------


def change_json(rng, data):
    """Replace one value somewhere in a JSON document, or remove it."""
    places, stack = [], [data]
    while stack:
        node = stack.pop()
        for key in range(len(node)) if isinstance(node, list) else node:
            places.append((node, key))
            if isinstance(node[key], (dict, list)) and len(places) < 2000:
                stack.append(node[key])
    node, key = rng.choice(places)
    if rng.random() < 0.3:
        del node[key]
    else:
        node[key] = rng.choice(VALUES)
    return json.dumps(data).encode("utf-8", "surrogatepass")


def damage(rng, path):
    """Change a file as a bad disk, a broken download or a person with an editor might."""
    data = path.read_bytes()
    cut = rng.randrange(len(data) + 1)
    kinds = ["cut", "bits", "grow", "empty", "noise", "remove", "folder", "html", "lfs", "zeros", "middle", "utf-16"]
    kind = rng.choice(kinds + ["json"] * 8 if path.suffix in (".json", ".jsonl") else kinds)
    if kind in ("remove", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        return
    flipped = bytearray(data)
    for _ in range(rng.randint(1, 5)):
        if flipped:
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    if kind == "json":
        lines = data.split(b"\n") if path.suffix == ".jsonl" else [data]
        i = rng.randrange(max(1, len(lines) - 1))
        lines[i] = change_json(rng, json.loads(lines[i]))
        data = b"\n".join(lines)
    path.write_bytes({
        "cut": data[:cut], "bits": bytes(flipped), "grow": data + rng.randbytes(9), "empty": b"",
        "noise": rng.randbytes(len(data)), "html": b"<!DOCTYPE html>\n<html>Sign in</html>\n",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "zeros": bytes(len(data)),
        "middle": data[: cut // 2] + data[cut:], "utf-16": data.decode("latin1").encode("utf-16"), "json": data,
    }[kind])  # fmt: skip


def odd_flags(rng, choices):
    """Return some flags with odd values: {name: values}."""
    return [f"--{name}={rng.choice(values)}" for name, values in rng.sample(sorted(choices.items()), rng.randint(1, 2))]


NUMBERS = [
    "0",
    "-1",
    "1",
    "2",
    "1e400",
    "nan",
    "inf",
    "-0.0",
    "x",
    "",
    str(10**12),
    str(2**63),
    str(10**30),
    "1e-300",
    "0.5",
    "3",
]
TEXTS = ["", " ", "\ufeff", "\ufeffa", "a\udcff", "<|endoftext|>", "\r\n", "\0", "🙂" * 50, "é", "a" * 3000, "-"]
PATHS = [
    "",
    ".",
    "/",
    "/dev/null",
    "/nowhere/x",
    "~",
    "a b",
    "\x01",
    "x" * 300,
    "/proc/self/mem",
    "*",
    "gpt2:x",
    "a//b",
]
SAMPLE_FLAGS = dict.fromkeys(["num_samples", "max_new_tokens", "temperature", "top_k", "top_p", "seed"], NUMBERS)
SAMPLE_FLAGS |= {"prompt": TEXTS, "prompt_file": PATHS, "model": PATHS, "device": ["auto", "cpu", "cuda:9", "tpu", ""]}
HELLASWAG_FLAGS = {"limit": NUMBERS, "style": ["harness", "x", ""], "save": PATHS, "file": PATHS, "model": PATHS}
NAMES = ["seed", "max_steps", "total_batch_tokens", "micro_batch", "seq_len", "n_layer", "n_head", "n_embd", "lr"]
NAMES += ["block_size", "dropout", "min_lr_ratio", "warmup_steps", "weight_decay", "grad_clip", "eps", "val_tokens"]
NAMES += ["eval_interval", "save_interval", "keep_checkpoints", "sample_interval", "num_samples", "max_new_tokens"]
TRAIN_FLAGS = dict.fromkeys([*NAMES, "sample_seed", "max_skipped_steps"], NUMBERS)
TRAIN_FLAGS |= {"prompt": TEXTS, "data_dir": PATHS, "init_from": PATHS, "hellaswag_file": PATHS, "betas": NUMBERS}
TRAIN_FLAGS |= {"preset": ["x", "", "demo2"], "optimizer": ["x", "muon"], "tracker": ["x", "none"], "override": ["x"]}


def copy(world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    return tmp_path / "world"


def check(ended, case):
    """Assert an exit code of 0 or 2, without a traceback. An error says something: a line of ours, or tyro's table."""
    code, _, err = ended
    assert code in (0, 2), (case, code, err)
    assert "Traceback" not in err and 'File "' not in err, (case, err)
    assert code == 0 or "error: " in err or "----" in err, (case, err)


CASES = range(50)


@pytest.fixture(autouse=True)
def sandbox(monkeypatch, tmp_path):
    """A Hub name is asked for on the network, which tests do not use. Relative paths are below tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("i", CASES)
def test_sample(i, world, tmp_path, main):
    """Damaged models, tokenizers and prompts, and odd flags."""
    rng, folder = random.Random(f"sample {i}"), copy(world, tmp_path)
    model = folder / "run" / "checkpoints" / "step_000001"
    flags = ["--max_new_tokens", 3, "--num_samples", 1, "--device", "cpu", "--model", folder / "run"]
    if i % 2:
        (model / "SHA256SUMS").unlink()
    if i % 5 == 4:
        flags += odd_flags(rng, SAMPLE_FLAGS)
    elif i % 5 == 3:
        damage(rng, folder / "prompt.txt")
        flags += ["--prompt_file", folder / "prompt.txt"]
    else:
        files = sorted(path for path in model.iterdir() if path.name != "training_state.pt")
        damage(rng, rng.choice(files))
    check(main(sample, flags), (i, flags))


@pytest.mark.parametrize("i", CASES)
def test_hellaswag(i, world, tmp_path, main):
    """Damaged rows and models, and odd flags."""
    rng, folder = random.Random(f"hellaswag {i}"), copy(world, tmp_path)
    model = folder / "run" / "checkpoints" / "step_000001"
    flags = ["--device", "cpu", "--model", folder / "run", "--file", folder / "rows.jsonl", "--limit", 4]
    flags += ["--style", rng.choice(sorted(hellaswag.CONTEXT_FIELDS))]
    if i % 5 == 4:
        flags += odd_flags(rng, HELLASWAG_FLAGS)
    elif i % 5 == 3:
        (model / "SHA256SUMS").unlink()
        damage(rng, rng.choice(sorted(path for path in model.iterdir() if path.name != "training_state.pt")))
    else:
        damage(rng, folder / "rows.jsonl")
    check(main(hellaswag, flags), (i, flags))


@pytest.mark.parametrize("i", [i if i < 20 else pytest.param(i, marks=pytest.mark.slow) for i in CASES])
def test_train_gpt2(i, world, tmp_path, main):
    """Damaged shards, manifests, checkpoints, logs and rows, and odd flags."""
    rng, folder = random.Random(f"train {i}"), copy(world, tmp_path)
    model = folder / "run" / "checkpoints" / "step_000001"
    flags = [*TINY, "--data_dir", folder / "data", "--out_dir", folder / "out"]
    kind = i % 5
    if kind == 4:
        flags += [*SHAPE, *odd_flags(rng, TRAIN_FLAGS)]
    elif kind == 3:  # start from a damaged model
        if rng.random() < 0.5:
            (model / "SHA256SUMS").unlink()
        damage(rng, rng.choice(sorted(model.iterdir())))
        flags += ["--init_from", folder / "run"]
    elif kind == 2:  # resume a damaged run
        assert main(train_gpt2, [*flags, *SHAPE])[0] == 0
        saved = folder / "out" / "checkpoints" / "step_000002"
        if rng.random() < 0.5:
            (saved / "SHA256SUMS").unlink()
        damage(rng, rng.choice([*sorted(saved.iterdir()), folder / "out" / "log.txt", folder / "out" / "log.txt"]))
        flags += [*SHAPE, "--resume", "--max_steps", 3, "--override", "max_steps"]
    else:
        if rng.random() < 0.3:
            (folder / "data" / "manifest.json").unlink()
        damage(rng, rng.choice(sorted((folder / "data").iterdir())))
        flags += SHAPE
    check(main(train_gpt2, flags), (i, flags))


def test_the_cases_are_not_all_refused(world, main):
    """Without damage all three scripts succeed, so the cases above test what they seem to test."""
    flags = ["--device", "cpu", "--model", world / "run"]
    assert main(sample, [*flags, "--prompt_file", world / "prompt.txt", "--max_new_tokens", 3])[0] == 0
    assert main(hellaswag, [*flags, "--file", world / "rows.jsonl"])[0] == 0
    assert np.load(world / "data" / "edufineweb_val_000000.npy").size == 1000
