import json
import math
import re
import shutil
import sqlite3
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from helpers import error_lines, save_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import fineweb
import train_gpt2
from support import runlog
from support.common import pick_dtype
from support.hardware import peak_flops
from support.runlog import Log, draw_curve, read_log
from train_gpt2 import (
    GPT,
    PRESETS,
    DataLoaderLite,
    GPTConfig,
    Muon,
    Runtime,
    TrainConfig,
    batch_tokens,
    configure_optimizers,
    get_lr,
    parse_command_line,
    pick_micro_batch,
    pick_val_tokens,
    tokens_before,
    train_step,
    validation_loss,
)

SMALL = (
    "--device cpu --compile off --dtype float32 --n_layer 2 --n_head 2 --n_embd 32 --block_size 64 --seq_len 64 "
    "--total_batch_tokens 512 --micro_batch 4 --warmup_steps 5 --max_steps 20 --lr 0.01 "
    "--eval_interval 10 --val_tokens 2000 --sample_interval 0 --save_interval 10 --hellaswag_file none"
).split()
CPU = Runtime(rank=0, world_size=1, device=torch.device("cpu"), dtype=torch.float32, compile=False)


@pytest.fixture(scope="session")
def web_shards(shared_data, tmp_path_factory, run_script):
    """The real FineWeb documents as GPT-2 shards, made by the command line."""
    folder = tmp_path_factory.mktemp("fineweb") / "shards"
    done = run_script(
        "fineweb.py", "--source", shared_data / "fineweb", "--out_dir", folder, "--shard_tokens", 300_000
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def small_run(web_shards, tmp_path_factory, run_script):
    """A small model trained on them for 20 steps by one process."""
    out = tmp_path_factory.mktemp("small") / "out"
    done = run_script("train_gpt2.py", *SMALL, "--data_dir", web_shards, "--out_dir", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def small_model(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=16))


@pytest.fixture
def byte_shards(tmp_path, make_shards):
    tokens = np.random.RandomState(0).randint(0, 257, 3000)
    return make_shards(tmp_path / "bytes", {"val": [tokens[:700]], "train": [tokens[700:]]})


# --- importing --------------------------------------------------------------------------------------------------------


def test_help_names_every_flag(run_script):
    """Each field of the tables is a flag, with its help."""
    done = run_script("train_gpt2.py", "--help", COLUMNS="200")
    assert done.returncode == 0
    flags = set(re.findall(r"--(\w+)", done.stdout))
    assert {field.name for field in fields(TrainConfig)} <= flags
    assert {"n_layer", "n_head", "n_embd", "block_size"} <= flags and "vocab_size" not in flags
    assert "peak learning rate" in done.stdout and "gpt3-1.3b" in done.stdout


# --- configuration ----------------------------------------------------------------------------------------------------


def test_no_shards(run_script, tmp_path):
    """The first thing a newcomer meets without data is one line with the two commands that help, not a traceback."""
    done = run_script("train_gpt2.py", "--device=cpu", "--data_dir", tmp_path / "none", "--out_dir", tmp_path / "out")
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: .*python fineweb\.py.*--preset demo.*\n", done.stderr)
    assert not any(tmp_path.iterdir())


def test_all_mistakes_at_once(run_script, tmp_path):
    """Every mistake of a configuration is named in one go, each on a line, before anything is made."""
    done = run_script(
        "train_gpt2.py", "--device", "cpu", "--n_embd", 100,
        "--min_lr_ratio", 2, "--seed", -1, "--seq_len", 2048, "--total_batch_tokens", 8192,
        "--micro-batch", 3, "--max_steps", 10, "--val_tokens", 5, "--dtype", "float16",
        "--data_dir", tmp_path / "none", "--out_dir", tmp_path / "out", "--hellaswag_file", tmp_path / "no.jsonl",
    )  # fmt: skip
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    for flag in ("n_embd 100", "seq_len 2048", "micro_batch 3", "min_lr_ratio", "warmup_steps 715", "val_tokens 5",
                 "dtype float16", "no.jsonl", "fineweb.py", "seed"):  # fmt: skip
        assert any(flag in line for line in lines), flag
    assert len(lines) == 10 and not any(tmp_path.iterdir())
    (tmp_path / "file").write_text("in the way")
    flags = [
        "--lr",
        0,
        "--n_layer",
        0,
        "--n_embd",
        100,
        "--data_dir",
        tmp_path / "none",
        "--out_dir",
        tmp_path / "file" / "out",
    ]
    lines = run_script("train_gpt2.py", "--device", "cpu", *flags).stderr.splitlines()
    assert len(lines) == 5 and "out_dir" in lines[-1]  # one out of range hides no other
    unknown = run_script("train_gpt2.py", "--preset", "gpt4")
    assert unknown.returncode == 2 and unknown.stderr.startswith("error: --preset gpt4") and "demo" in unknown.stderr


def test_presets_are_consistent():
    """A preset that its own checks refuse, or that strays from the papers' tables, is no default."""
    for name, (model, run) in PRESETS.items():
        assert run.preset == name and model.n_embd % model.n_head == 0 and run.seq_len <= model.block_size
        assert run.total_batch_tokens % (8 * run.seq_len) == 0
    sizes = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    with torch.device("meta"):
        assert {name: GPT(PRESETS[name][0]).num_params() for name in sizes} == sizes
    rates = {"gpt3-125m": 6e-4, "gpt3-350m": 3e-4, "gpt3-760m": 2.5e-4, "gpt3-1.3b": 2e-4}
    assert {name: PRESETS[name][1].lr for name in rates} == rates
    (model, run), (fast_model, fast) = PRESETS["gpt2"], PRESETS["gpt2-fast"]
    assert fast_model == model and fast.max_steps <= run.max_steps / 2  # the same model, in half of the tokens
    kept = {"total_batch_tokens", "seq_len", "grad_clip", "weight_decay", "val_tokens"}
    assert all(getattr(fast, name) == getattr(run, name) for name in kept)


# finetune has the shape of the model that it starts from
SHAPES = [name for name in PRESETS if name != "finetune"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "gpt3-1.3b" else name for name in SHAPES]
)
def test_presets_train(name, tmp_path, byte_shards):
    """Every shape, at full width and one layer: a step of it learns, and transformers opens what is saved."""
    flags = ["--preset", name, "--n_layer", 1, "--seq_len", 16, "--total_batch_tokens", 128]
    shape, config = parse_command_line([*map(str, flags), "--lr=1e-3", "--warmup_steps=0"])
    assert shape == replace(PRESETS[name][0], n_layer=1)
    model = GPT(replace(shape, vocab_size=257))
    loader, scaler = DataLoaderLite(byte_shards, "train", 8, 16), torch.amp.GradScaler("cpu", enabled=False)
    x, y = loader.rows(range(8))
    loss, _ = train_step(model, configure_optimizers(model, config), scaler, loader, 0, config, CPU)
    with torch.no_grad():
        assert model(x, y)[1] < loss - 0.1
        if name in ("gpt2-xl", "gpt3-1.3b"):  # 25 heads, and the widest
            model.save_pretrained(tmp_path)
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
            assert (theirs(x).logits - model(x)[0]).abs().max() <= 1e-4


def test_schedule():
    """Warmup starts above zero and reaches the peak; the cosine ends at a tenth; steps past the end stay there."""
    config = TrainConfig()
    assert get_lr(0, config) == pytest.approx(6e-4 / 715)
    assert get_lr(714, config) == get_lr(715, config) == pytest.approx(6e-4)
    assert get_lr((715 + 19073) // 2, config) == pytest.approx(0.55 * 6e-4, rel=1e-3)
    assert get_lr(19073, config) == get_lr(99999, config) == pytest.approx(6e-5)
    rates = [get_lr(step, config) for step in range(19074)]
    assert all(a < b for a, b in zip(rates[:714], rates[1:715]))
    assert all(a > b for a, b in zip(rates[715:], rates[716:]))
    assert get_lr(0, TrainConfig(warmup_steps=0, max_steps=0)) == pytest.approx(6e-5)
    linear = replace(config, schedule="linear", min_lr_ratio=0.0)
    assert get_lr(714, linear) == get_lr(715, linear) == pytest.approx(6e-4) and get_lr(19073, linear) == 0
    falls = [get_lr(step, linear) - get_lr(step + 1, linear) for step in range(715, 19073)]
    assert falls == pytest.approx([6e-4 / (19073 - 715)] * len(falls))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_groups(optimizer):
    """Every parameter is in one group, decayed if it has two dimensions; Muon has the blocks' matrices alone."""
    model = small_model()
    optimizers = configure_optimizers(model, TrainConfig(optimizer=optimizer))
    groups = [group for o in optimizers for group in o.param_groups]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    for group in groups:
        assert all((p.dim() >= 2) == (group["weight_decay"] == 0.1) for p in group["params"]) and group["lr"] == 6e-4
    assert optimizers[0].param_groups[0]["betas"] == (0.9, 0.95) and optimizers[0].param_groups[0]["eps"] == 1e-8
    if optimizer == "muon":
        muon = {id(p) for group in optimizers[1].param_groups for p in group["params"]}
        assert muon == {id(p) for name, p in model.named_parameters() if p.dim() == 2 and ".h." in name}


def test_muon_takes_query_key_and_value_apart():
    """Muon is torch's, in AdamW's size, but for c_attn.weight, whose three matrices it must not mix."""
    torch.manual_seed(0)
    before = [torch.randn(rows, columns) for rows, columns in ((48, 16), (64, 16), (16, 64), (16, 16))]
    ours = [nn.Parameter(weight.clone()) for weight in before]
    theirs = [nn.Parameter(weight.clone()) for weight in (*before[0].chunk(3), *before[1:])]
    mixed = [nn.Parameter(before[0].clone())]
    options = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = [Muon(ours, 0.1, 0.1), torch.optim.Muon(theirs, **options), torch.optim.Muon(mixed, **options)]
    for _ in range(3):
        gradients = [torch.randn_like(weight) * scale for weight, scale in zip(before, (1, 1e-3, 1e3, 1))]
        for parameters, values in ((ours, gradients), (theirs, [*gradients[0].chunk(3), *gradients[1:]])):
            for parameter, gradient in zip(parameters, values):
                parameter.grad = gradient
        mixed[0].grad = gradients[0]
        for optimizer in optimizers:
            optimizer.step()
    theirs = [torch.cat(theirs[:3]), *theirs[3:]]
    moved = [(a - b).norm() for a, b in zip(theirs, before)]
    assert all((a - b).norm() < 0.05 * distance for a, b, distance in zip(ours, theirs, moved))
    assert (mixed[0] - theirs[0]).norm() > 0.2 * moved[0]


@pytest.mark.parametrize("has_bfloat16, expected", [(True, torch.bfloat16), (False, torch.float32)])
def test_muon_multiplies_in_a_type_of_the_hardware(monkeypatch, has_bfloat16, expected):
    """Emulated bfloat16 is slow. (tests/fake_gpu.py has a GPU with only float16.)"""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": has_bfloat16}, raising=False)
    weight = nn.Parameter(torch.randn(8, 16))
    weight.grad = torch.randn(8, 16)
    before, products = weight.detach().clone(), set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "bmm" in str(function):
                products.add(args[0].dtype)
            return function(*args, **(kwargs or {}))

    with Recorder():
        Muon([weight], 0.1, 0.0).step()
    assert products == {expected}
    assert (weight - before).norm().item() == pytest.approx(0.1 * 0.2 * 16**0.5 * 8**0.5, rel=0.3)


def test_precision_by_device():
    """The original gives an Apple GPU no autocast, having asked for the CPU's."""
    runtime = Runtime(0, 1, torch.device("mps"), pick_dtype("auto", "mps"), False)
    with runtime.autocast():
        assert torch.is_autocast_enabled("mps") and torch.get_autocast_dtype("mps") == torch.bfloat16
    with CPU.autocast():
        assert not torch.is_autocast_enabled("cpu")
    assert pick_dtype("float16", "cuda") == torch.float16


# --- a step -----------------------------------------------------------------------------------------------------------


def one_step(byte_shards, micro_batch, optimizer="adamw", wrap=lambda model: model, optimizers=None, grad_clip=1.0):
    model = small_model()
    config = TrainConfig(
        total_batch_tokens=8 * 16, micro_batch=micro_batch, seq_len=16,
        optimizer=optimizer, lr=1e-2, grad_clip=grad_clip,
    )  # fmt: skip
    loader = DataLoaderLite(byte_shards, "train", micro_batch, 16)
    optimizers = [] if optimizers is None else optimizers
    optimizers += configure_optimizers(model, config)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    result = train_step(wrap(model), optimizers, scaler, loader, 800, config, CPU)
    return result, model


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulation_is_the_same_update(byte_shards, optimizer):
    """Eight rows at once or one after another must give the same loss, gradient norm and update."""
    (loss, norm), whole = one_step(byte_shards, 8, optimizer)
    for micro_batch in (4, 1):
        (part_loss, part_norm), part = one_step(byte_shards, micro_batch, optimizer)
        assert part_loss == pytest.approx(loss, abs=1e-6) and part_norm == pytest.approx(norm, rel=1e-5)
        changed = sum((a - b).abs().sum() for a, b in zip(whole.parameters(), part.parameters()))
        moved = sum((a - b).abs().sum() for a, b in zip(whole.parameters(), small_model().parameters()))
        assert changed < 1e-2 * moved


def test_step_clips_and_sets_the_rate(byte_shards):
    """The norm that is reported is the one before clipping, and the rate is the schedule's."""
    (_, norm), model = one_step(byte_shards, 8)
    reference = small_model()
    x, y = DataLoaderLite(byte_shards, "train", 8, 16).next_batch()
    reference(x, y)[1].backward()
    assert norm == pytest.approx(math.sqrt(sum(p.grad.square().sum().item() for p in reference.parameters())), rel=1e-5)
    bias, before = model.transformer.ln_f.bias, reference.transformer.ln_f.bias
    # AdamW's first update of an undecayed tensor is the rate times the gradient's sign
    expected = before - get_lr(800, TrainConfig(lr=1e-2)) * before.grad.sign()
    torch.testing.assert_close(bias, expected, rtol=0, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())
    optimizers = []
    (_, same_norm), model = one_step(byte_shards, 8, optimizers=optimizers, grad_clip=norm / 4)
    assert same_norm == norm
    momentum = optimizers[0].state[model.transformer.ln_f.bias]["exp_avg"]  # 0.1 of the clipped gradient
    torch.testing.assert_close(momentum, 0.1 * before.grad / 4, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gradient_that_is_not_finite_changes_nothing(byte_shards, optimizer):
    """When float16 overflows, the one optimizer that sees it steps back and the other must not step on alone."""

    def wrap(model):
        model.transformer.wpe.weight.register_hook(lambda gradient: gradient * float("inf"))
        return model

    (loss, norm), model = one_step(byte_shards, 8, optimizer, wrap)
    assert math.isfinite(loss) and not math.isfinite(norm)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), small_model().parameters()))


def test_dropout_follows_from_seed_step_and_process(byte_shards):
    """Guards a resumed run's masks, which no state is saved for, and processes that would all draw the same ones."""

    def loss(step=3, rank=0, seed=1337, dropout=0.5):
        model, runtime = GPT(replace(small_model().config, dropout=dropout)), replace(CPU, rank=rank)
        config = TrainConfig(total_batch_tokens=8 * 16, seq_len=16, seed=seed)
        loader, scaler = DataLoaderLite(byte_shards, "train", 4, 16), torch.amp.GradScaler("cpu", enabled=False)
        return train_step(model, configure_optimizers(model, config), scaler, loader, step, config, runtime)[0]

    first = loss()
    torch.rand(1)  # as whatever else draws may
    assert loss() == first
    assert len({first, loss(step=4), loss(rank=1), loss(seed=1), loss(dropout=0.0)}) == 5
    assert loss(dropout=0.0) == loss(dropout=0.0, step=4, rank=1, seed=1)


def test_gradients_are_synchronized_once_a_step(byte_shards, tmp_path):
    """Averaging over the processes in every micro-step wastes the network: it belongs to the last one only."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    calls = []

    def count(_, bucket):
        calls.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def wrap(model):
        model = DistributedDataParallel(model)
        model.register_comm_hook(None, count)
        return model

    try:
        (loss, _), _ = one_step(byte_shards, 1, wrap=wrap)
    finally:
        dist.destroy_process_group()
    assert len(calls) == len(set(calls)) > 0
    assert loss == pytest.approx(one_step(byte_shards, 8)[0][0], abs=1e-6)


@pytest.mark.parametrize("val_tokens", [10_000, 320])
def test_validation_loss_is_of_the_tokens_alone(byte_shards, val_tokens):
    """The original's validation loss depends on batch size and rank count; ours is the mean over fixed tokens."""
    model = small_model()
    tokens = torch.from_numpy(np.load(byte_shards / "edufineweb_val_000000.npy").astype(np.int64))
    rows = min(val_tokens, tokens.numel() - 1) // 16
    x, y = tokens[: rows * 16].view(rows, 16), tokens[1 : rows * 16 + 1].view(rows, 16)
    with torch.no_grad():
        expected = model(x, y)[1].item()
    for B in (1, 7, 8, 64, 200):
        loader = DataLoaderLite(byte_shards, "val", B, 16, shuffle=False)
        assert validation_loss(model, loader, val_tokens, CPU) == pytest.approx(expected, abs=1e-6)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_log_and_curve(small_run):
    """Old tools read the log: `step stream value`, each once, with the finished model's evaluation at the end."""
    out, stdout = small_run
    lines = (out / "log.txt").read_text().splitlines()
    assert all(re.fullmatch(r"\d+ \w+ -?\d[\d.e+-]*", line) for line in lines)
    log = read_log(out / "log.txt")
    assert log["train"][0] == log["lr"][0] == log["norm"][0] == log["tok_s"][0] == list(range(20))
    assert log["val"][0] == [0, 10, 20]
    assert abs(log["val"][1][0] - math.log(50257)) < 0.1 and log["val"][1][-1] < log["val"][1][0] - 1
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    step_line = r"^step +(\d+) \| loss: [\d.]+ \| lr: \S+ \| norm: \S+ \| dt: [\d.]+ms \| tok/s: [\d,]+"
    step_line += r" \| ([\d.]+)% done \| [\d:]+ elapsed(?: \| [\d:]+ left)?$"
    printed = [(int(step), float(percent)) for step, percent in re.findall(step_line, stdout, re.M)]
    assert printed == [(step, 5.0 * (step + 1)) for step in range(20)]
    assert stdout.count(" left") == 19 and re.search(r"^finished: 10,240 tokens in [\d:]+$", stdout, re.M)
    about = json.loads((out / "run.json").read_text())
    assert (
        about["flags"]["max_steps"] == 20 and about["torch"] == torch.__version__ and about["device"].startswith("cpu")
    )


FINEWEB_EDU = {"encoding": "gpt2", "source": "HuggingFaceFW/fineweb-edu:sample-10BT"}


def test_curve_shows_the_losses_that_matter():
    """The first steps' losses, about 11, must not press the later ones flat, nor noise hide where they go."""
    losses = [11.0] * 40 + [3.5, 3.1] * 480
    log = {"train": (list(range(1000)), losses), "val": ([0, 500, 1000], [11.0, 3.4, 3.2])}
    (axes,) = draw_curve({"": log}, {"encoding": "gpt2"}).axes
    low, high = axes.get_ylim()
    assert 3.0 <= low < 3.1 and 3.5 < high < 4
    raw, mean, val = axes.lines
    assert list(raw.get_ydata()) == losses and val.get_label().endswith("val, last 3.2000")
    steps, values = mean.get_data()
    assert len(values) == 990 and np.allclose(values[40:], 3.3, atol=0.02) and abs(steps[0] - 5) <= 1


GPT2_LOSS, NEAR = {"GPT-2 124M, 3.292"}, {"chance, 0.250", "GPT-2 124M, 0.294", "GPT-3 125M, 0.337"}


@pytest.mark.parametrize(
    ("manifest", "hella", "loss_lines", "hella_lines"),
    [
        (FINEWEB_EDU, 0.30, GPT2_LOSS, NEAR),
        (FINEWEB_EDU, 0.38, GPT2_LOSS, NEAR | {"GPT-2 350M, 0.375"}),
        ({"encoding": "gpt2", "source": "my text"}, 0.30, set(), NEAR),
        (FINEWEB_EDU | {"encoding": "bytes"}, None, set(), set()),
    ],
)
def test_curve_compares_what_can_be_compared(manifest, hella, loss_lines, hella_lines):
    """OpenAI's loss is one per token of FineWeb-Edu, its HellaSwag one of GPT-2 tokens: neither is drawn elsewhere."""
    log = {"train": ([0, 1], [3.5, 3.4]), "val": ([0, 2], [3.5, 3.4])}
    logs = {"mine": log | ({"hella": ([0, 2], [0.25, hella])} if hella else {}), "lecture": log}
    figure = draw_curve(logs, manifest)
    figure.draw_without_rendering()  # which finds out what lies outside
    drawn = [{text.get_text() for text in axes.texts if text._check_xy()} for axes in figure.axes]
    assert drawn == [loss_lines, hella_lines][: 2 if hella else 1]
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["mine train", "mine val, last 3.4000", "lecture train", "lecture val, last 3.4000"]
    assert ("byte" in figure.axes[0].get_ylabel()) == (manifest["encoding"] == "bytes")


@pytest.fixture
def savefig(monkeypatch):
    """Events of a slow drawing: set when it starts, and awaited, for 20 s at most, before it is written."""
    from matplotlib.figure import Figure

    started, release, write = threading.Event(), threading.Event(), Figure.savefig

    def savefig(figure, *args, **options):
        started.set()
        release.wait(20)
        write(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    interval = sys.getswitchinterval()
    yield started, release
    sys.setswitchinterval(interval)


def report_threads():
    """Return the living threads that draw curves. Other threads may be torch's own."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("report")]


def test_training_does_not_wait_for_the_curve(tmp_path, savefig):
    """It is drawn on a thread, which gives way to training at once and has ended when the log is finished."""
    started, release = savefig
    log, curve = Log(tmp_path, {"encoding": "gpt2"}), tmp_path / "curve.png"
    for step in range(3):
        log.write(step, train=3.0 - step)
        log.report(step)
    assert started.wait(20) and not curve.exists() and sys.getswitchinterval() < 1e-3 and report_threads()
    release.set()
    log.finish()
    log.finish()
    assert curve.read_bytes().endswith(b"IEND\xaeB`\x82") and not report_threads()


def test_a_failed_run_has_its_last_curve(byte_shards, tmp_path, savefig, main):
    """Whatever ends a run, the drawing that has started is finished, and its thread ends."""
    started, release = savefig
    threading.Timer(8, release.set).start()  # after the failure, which comes at once
    flags = [*SMALL, "--data_dir", byte_shards, "--out_dir", tmp_path / "out", "--lr", 1e30, "--warmup_steps", 0]
    flags += ["--val_tokens", 64, "--max_skipped_steps", 1, "--eval_interval", 50, "--total_batch_tokens", 256]
    code, _, stderr = main(train_gpt2, flags)
    assert code == 2 and "were skipped" in stderr and started.is_set()
    assert (tmp_path / "out" / "curve.png").read_bytes().endswith(b"IEND\xaeB`\x82")
    assert not report_threads()


def test_a_curve_that_cannot_be_drawn_is_a_warning(tmp_path, capsys):
    """The run is worth more than its picture."""
    (tmp_path / "curve.png").mkdir()
    log = Log(tmp_path, {"encoding": "gpt2"})
    log.write(0, val=3.0)
    log.report(0)
    log.finish()
    assert "warning: curve.png is not drawn: " in capsys.readouterr().err


@pytest.mark.parametrize("losses", [[10.9], [math.nan], [math.inf, 3.0]])
def test_curve_of_a_run_that_fails(losses, recwarn):
    """A loss that is not finite, or a single one, is no reason for training to end, nor for a warning."""
    log = {"train": (list(range(len(losses))), losses), "val": ([0], losses[:1])}
    draw_curve({"": log}, {"encoding": "bytes"}).draw_without_rendering()
    assert not recwarn


@pytest.mark.parametrize(
    ("name", "tflops"),
    [  # as torch.cuda.get_device_name reports them
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GB10", None),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA A40", 149.7),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA RTX 4000 Ada Generation", None),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GeForce RTX 5090 D", None),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", 114),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", 147),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 85.8),
        ("NVIDIA GeForce RTX 4080", 97.5),
        ("NVIDIA GeForce RTX 4080 SUPER", 104.5),
        ("NVIDIA GeForce RTX 4080 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-32GB", 112),
        ("Tesla V100S-PCIE-32GB", 130),
        ("NVIDIA T400", None),
        ("AMD Instinct MI300X", 1307),
        ("AMD Radeon RX 7900 XTX", None),
    ],
)
def test_peak_of_a_gpu(name, tflops, monkeypatch):
    """The MFU needs the peak of this very model. No peak is better than that of another one."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (tflops and pytest.approx(tflops * 1e12))


def test_checkpoint_opens_in_transformers(small_run, web_shards):
    """A checkpoint is the finished model of its step, in a folder that transformers opens, tokenizer and all."""
    out, _ = small_run
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_000010", "step_000020"]
    folder = out / "checkpoints" / "step_000020"
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder).eval(), GPT.from_pretrained(folder).eval()
    tokens = fineweb.open_shard(fineweb.find_shards(web_shards, "val")[0])[: 2000 // 64 * 64 + 1].astype(np.int64)
    x, y = (torch.from_numpy(t).view(-1, 64) for t in (tokens[:-1], tokens[1:]))
    with torch.no_grad():
        logits = theirs(x).logits
        assert (logits - ours(x)[0]).abs().max() <= 1e-4
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    assert read_log(out / "log.txt")["val"][1][-1] == pytest.approx(loss.item(), abs=1e-4)
    assert json.loads((folder / "config.json").read_text())["n_ctx"] == 64  # what llama.cpp's converter asks for
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Hello, I'm a language model,"
    assert tokenizer(text)["input_ids"] == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_training_state_is_plain(small_run):
    """The original pickles its classes; ours loads where nothing may be executed, and holds what resuming needs."""
    folder = small_run[0] / "checkpoints" / "step_000010"
    state = torch.load(folder / "training_state.pt", weights_only=True)
    assert (state["step"], state["loader"], state["config"]["n_embd"]) == (10, 10 * 8, 32)
    assert state["optimizers"][0]["state"][0]["step"] == 10 and state["rng"].dtype == torch.uint8


@pytest.mark.slow
def test_same_losses_on_two_processes(small_run, web_shards, run_script, tmp_path):
    """One process or two, other micro-batches: the same run to 1e-4, logged once and by one of them."""
    flags = [*SMALL, "--data_dir", web_shards, "--out_dir", tmp_path, "--micro_batch", "2"]
    done = run_script("train_gpt2.py", *flags, processes=2)
    assert done.returncode == 0, done.stderr
    one, two = read_log(small_run[0] / "log.txt"), read_log(tmp_path / "log.txt")
    for stream in ("train", "val", "lr", "norm"):
        assert one[stream][0] == two[stream][0]
        assert one[stream][1] == pytest.approx(two[stream][1], abs=1e-4)


@pytest.mark.slow
def test_a_run_is_not_overwritten(text_shards, run_script, tmp_path):
    """The original truncates the log at every start; here a run is deleted only on request, and it alone."""
    flags = [*SMALL, "--data_dir", text_shards, "--max_steps", 2, "--warmup_steps", 1, "--out_dir", tmp_path]
    assert run_script("train_gpt2.py", *flags).returncode == 0
    for mine in ("notes.txt", "checkpoints/step_000001_mine.txt"):
        (tmp_path / mine).write_text("mine")
    log = (tmp_path / "log.txt").read_text()
    refused = run_script("train_gpt2.py", *flags)
    assert refused.returncode == 2 and "--overwrite" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert (tmp_path / "log.txt").read_text() == log
    assert run_script("train_gpt2.py", *flags, "--overwrite", "--max_steps", 1).returncode == 0
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_000001", "step_000001_mine.txt"] and (tmp_path / "notes.txt").exists()
    assert read_log(tmp_path / "log.txt")["val"][0] == [0, 1]
    source = tmp_path / "checkpoints" / ".." / "checkpoints" / "step_000001"
    for own in (source, tmp_path):
        refused = run_script("train_gpt2.py", *flags, "--overwrite", "--init_from", own)
        assert refused.returncode == 2 and "--overwrite would delete --init_from" in refused.stderr
        assert (tmp_path / "checkpoints" / "step_000001").exists()
    demo = run_script("train_gpt2.py", "--preset", "demo", "--out_dir", tmp_path, "--data_dir", tmp_path / "demo")
    assert demo.returncode == 2 and "--overwrite" in demo.stderr and (tmp_path / "log.txt").exists()


@pytest.mark.slow
def test_samples_do_not_change_the_run(small_run, web_shards, run_script, tmp_path):
    """Looking at samples draws random numbers; the training must not notice."""
    flags = [*SMALL, "--data_dir", web_shards, "--out_dir", tmp_path, "--sample_interval", 5, "--prompt", "The law"]
    done = run_script("train_gpt2.py", *flags)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^sample \d: The law", done.stdout, re.M)) == 4 * 4
    assert read_log(tmp_path / "log.txt")["train"] == read_log(small_run[0] / "log.txt")["train"]
    states = [torch.load(out / "checkpoints" / "step_000020" / "training_state.pt") for out in (tmp_path, small_run[0])]
    assert torch.equal(states[0]["rng"], states[1]["rng"])


def test_a_diverged_run_stops(text_shards, run_script, tmp_path):
    """A run whose loss is no number must not go on to its end and leave its weights as a finished model."""
    flags = [*SMALL, "--data_dir", text_shards, "--out_dir", tmp_path, "--lr", 1e30, "--max_steps", 100]
    done = run_script("train_gpt2.py", *flags, "--save_interval", 1)
    assert done.returncode == 2 and "error: 20 updates in a row were skipped, because the loss is nan" in done.stderr
    log = read_log(tmp_path / "log.txt")
    assert log["train"][0] == list(range(21)) and log["skipped"] == (list(range(1, 21)), list(range(1, 21)))


@pytest.mark.timing
def test_speed_leaves_evaluation_out(text_shards, run_script, tmp_path):
    """The original counts evaluation into tok/s; here most of the time is evaluation, and the steps do not show it."""
    flags = [*SMALL, "--data_dir", text_shards, "--out_dir", tmp_path, "--max_steps", 5, "--eval_interval", 1]
    start = time.perf_counter()
    done = run_script("train_gpt2.py", *flags, "--total_batch_tokens", 256, "--val_tokens", 10_000)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    assert sum(256 / tok_s for tok_s in read_log(tmp_path / "log.txt")["tok_s"][1]) < seconds / 5


@pytest.mark.slow
def test_init_from_goes_on_from_a_checkpoint(small_run, web_shards, text_shards, run_script, tmp_path):
    """Training on must start where the checkpoint stopped, and refuse data of another vocabulary."""
    flags = [*SMALL, "--init_from", small_run[0], "--dropout", 0.2, "--max_steps", 5, "--out_dir", tmp_path / "out"]
    done = run_script("train_gpt2.py", *flags, "--data_dir", web_shards)
    assert done.returncode == 0, done.stderr
    assert read_log(tmp_path / "out" / "log.txt")["val"][1][0] == read_log(small_run[0] / "log.txt")["val"][1][-1]
    saved = json.loads((tmp_path / "out" / "checkpoints" / "step_000005" / "config.json").read_text())
    assert saved["attn_pdrop"] == saved["embd_pdrop"] == saved["resid_pdrop"] == 0.2
    wrong = run_script("train_gpt2.py", *flags, "--data_dir", text_shards, "--overwrite")
    assert wrong.returncode == 2 and "50257 ids" in wrong.stderr and len(wrong.stderr.splitlines()) == 1
    assert read_log(tmp_path / "out" / "log.txt")["val"][0] == [0, 5]


def tracked(tracker, folder):
    """What a tracker has stored: (id of the run, step, values) in the order of the calls."""
    if tracker == "trackio":
        rows = sqlite3.connect(folder / "gpt2.db").execute("SELECT run_id, step, metrics FROM metrics ORDER BY id")
        return [(run, step, json.loads(values)) for run, step, values in rows]
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):  # the log format of LevelDB, after 7 bytes
        data, start, record = path.read_bytes(), 7, b""
        while start + 7 <= len(data):
            if start % 2**15 > 2**15 - 7:  # what is left of a block holds no header
                start += -start % 2**15
            length, kind = int.from_bytes(data[start + 4 : start + 6], "little"), data[start + 6]
            record, start = record + data[start + 7 : start + 7 + length], start + 7 + length
            if kind in (1, 4):  # whole, or the last part
                found, record = Record.FromString(record), b""
                if found.WhichOneof("record_type") == "run":
                    run = found.run.run_id
                if found.WhichOneof("record_type") == "history":
                    values = {item.nested_key[0]: json.loads(item.value_json) for item in found.history.item}
                    rows.append((run, found.history.step.num, values))
    return rows


def test_a_tracker_that_does_not_import(tmp_path, monkeypatch, capsys):
    """Training goes on without a tracker that is broken, and says so."""
    (tmp_path / "trackio.py").write_text("raise ImportError('no such symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    log = Log(tmp_path)
    log.start_tracker("trackio", {})
    log.write(0, val=1.0)
    assert capsys.readouterr().err == "warning: training continues without trackio: no such symbol\n"
    assert read_log(tmp_path / "log.txt") == {"val": ([0], [1.0])}


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_tracker_has_the_log(tracker, text_shards, run_script, tmp_path):
    """All that is in log.txt, of one run although it was resumed; one that starts over is another."""
    pytest.importorskip(tracker, reason=f"{tracker} is optional: pip install {tracker}")
    flags = [*SMALL, "--data_dir", text_shards, "--out_dir", tmp_path / "out", "--tracker", tracker]
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path)}
    for more in ([], ["--resume"], ["--overwrite"]):
        done = run_script("train_gpt2.py", *flags, *more, **environment)
        assert done.returncode == 0 and "training continues without" not in done.stderr, done.stderr
        rows, log = tracked(tracker, tmp_path), read_log(tmp_path / "out" / "log.txt")
        last = rows[-1][0]
        for stream in ("train", "val", "lr", "norm"):
            stored = {step: values[stream] for run, step, values in rows if run == last and stream in values}
            assert list(stored) == log[stream][0] and list(stored.values()) == pytest.approx(log[stream][1], rel=1e-6)
        assert len({run for run, _, _ in rows}) == 1 + (more == ["--overwrite"])
        shutil.rmtree(tmp_path / "out" / "checkpoints" / "step_000020")


def test_tensorboard_has_the_log(text_shards, tmp_path):
    """Its own reader finds each value of log.txt once, in order: also of a resumed run, and of one that starts over.

    The steps after the checkpoint are repeated, but not its evaluation, which TensorBoard would hide with them.
    """
    pytest.importorskip("tensorboard", reason="tensorboard is optional: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [*map(str, [*SMALL, "--data_dir", text_shards, "--out_dir", tmp_path, "--tracker", "tensorboard"])]
    starts = []
    for more, files in ([], 1), (["--resume"], 2), (["--overwrite", "--max_steps", "15"], 1):
        train_gpt2.main([*flags, *more])
        assert len(list(tmp_path.glob("tensorboard/*"))) == files
        events, log = EventAccumulator(str(tmp_path / "tensorboard")).Reload(), read_log(tmp_path / "log.txt")
        assert sorted(events.Tags()["scalars"]) == sorted(log) and log["val"][0][0] == 0
        for stream, (steps, values) in log.items():
            found = events.Scalars(stream)
            assert [event.step for event in found] == steps, (more, stream)
            assert [event.value for event in found] == pytest.approx(values, rel=1e-6)
        assert b"max_steps: " in events.Tensors("flags/text_summary")[-1].tensor_proto.string_val[0]
        starts.append(events.Scalars("train")[0].wall_time)
        shutil.rmtree(tmp_path / "checkpoints" / "step_000020", ignore_errors=True)
    assert starts[0] == starts[1] < starts[2]


@pytest.fixture(scope="session")
def hellaswag_rows(shared_data, tmp_path_factory):
    """Forty real rows."""
    file = tmp_path_factory.mktemp("hellaswag") / "rows.jsonl"
    rows = (shared_data / "hellaswag" / "hellaswag_val_600.jsonl").read_text().splitlines(keepends=True)[:40]
    file.write_text("".join(rows))
    return file


@pytest.mark.slow
def test_hellaswag_in_training(web_shards, hellaswag_rows, run_script, tmp_path):
    """HellaSwag is scored at every evaluation, with one process's counts on two, and by hellaswag.py afterwards."""
    flags = [*SMALL, "--data_dir", web_shards, "--block_size", 256, "--hellaswag_file", hellaswag_rows]
    flags += ["--max_steps", 5, "--eval_interval", 5]
    logs = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        done = run_script("train_gpt2.py", *flags, "--out_dir", out, processes=processes)
        assert done.returncode == 0, done.stderr
        logs.append(read_log(out / "log.txt")["hella"])
        assert logs[-1][0] == [0, 5] and all((40 * value) % 1 == pytest.approx(0, abs=1e-5) for value in logs[-1][1])
    assert logs[0] == logs[1]
    scored = run_script("hellaswag.py", "--model", tmp_path / "1", "--file", hellaswag_rows, "--device", "cpu")
    assert scored.returncode == 0 and f"acc_norm {logs[0][1][-1] * 40:.0f}/40 " in scored.stdout
    damaged = tmp_path / "bad.jsonl"
    damaged.write_text("{}")
    bad = run_script("train_gpt2.py", *flags, "--hellaswag_file", damaged, "--out_dir", tmp_path / "bad")
    assert bad.returncode == 2 and "bad.jsonl:1" in bad.stderr and not (tmp_path / "bad").exists()


@pytest.mark.slow
def test_trains_without_hellaswag_offline(web_shards, run_script, tmp_path):
    """Without the file and without a network, training says so in one line and goes on."""
    if Path(TrainConfig.hellaswag_file).exists():
        pytest.skip("the HellaSwag file is here already")
    flags = [*SMALL[:-2], "--data_dir", web_shards, "--out_dir", tmp_path, "--max_steps", 5]
    done = run_script("train_gpt2.py", *flags, https_proxy="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert len(re.findall("training continues without HellaSwag", done.stderr)) == 1
    assert not Path(TrainConfig.hellaswag_file).exists() and "hella" not in read_log(tmp_path / "log.txt")


def test_a_failed_save_leaves_no_checkpoint(tmp_path):
    """A folder that bears its final name is complete: one that failed half way must not."""
    with pytest.raises((AttributeError, TypeError, RuntimeError)):  # a function inside cannot be written
        save_model(tmp_path, small_model(), 7, rng=lambda: 7)
    assert not list(tmp_path.glob("checkpoints/*"))
    folder = save_model(tmp_path, small_model(), 7)
    assert list((tmp_path / "checkpoints").iterdir()) == [folder]
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 257


@pytest.mark.slow
def test_runs_without_a_compiler(text_shards, run_script, tmp_path):
    """--compile on, on a machine with no C++ compiler: a plain warning, and an eager run."""
    flags = [*SMALL, "--data_dir", text_shards, "--out_dir", tmp_path, "--compile", "on", "--max_steps", 5]
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}  # a warm one needs no compiler
    done = run_script("train_gpt2.py", *flags, PATH="/nowhere", CXX="/nowhere/g++", **cache)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: torch.compile does not work here") == 1 and "eager" in done.stdout


@pytest.mark.slow
def test_compiled_run(web_shards, hellaswag_rows, run_script, tmp_path):
    """The original turns compilation off because HellaSwag and sampling broke it; ours samples, scores and saves, and
    compiles trunk and loss twice each: to train, and without gradients to validate.
    """
    flags = [*SMALL, "--data_dir", web_shards, "--block_size", 256]
    compiled_flags = ["--compile", "on", "--sample_interval", 10, "--hellaswag_file", hellaswag_rows]
    done = run_script("train_gpt2.py", *flags, *compiled_flags, "--out_dir", tmp_path, TORCH_LOGS="recompiles")
    assert done.returncode == 0, done.stderr
    recompiled = re.findall(r"Recompiling function (\w+)", done.stderr)
    assert sorted(recompiled) == ["chunk_loss", "trunk"] and "grad_mode" in done.stderr, done.stderr
    assert len(read_log(tmp_path / "log.txt")["hella"][0]) == 3
    assert "compiled" in done.stdout and done.stdout.count("sample 0: Hello, I'm a language model,") == 2
    done = run_script("train_gpt2.py", *flags, "--out_dir", tmp_path / "eager")
    assert done.returncode == 0, done.stderr
    two = [*flags, "--compile", "on", "--out_dir", tmp_path / "two", "--micro_batch", 2]
    done = run_script("train_gpt2.py", *two, processes=2, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    eager, compiled, two = (read_log(out / "log.txt") for out in (tmp_path / "eager", tmp_path, tmp_path / "two"))
    assert compiled["train"][1] == pytest.approx(eager["train"][1], abs=1e-3)
    assert two["train"][1] == pytest.approx(eager["train"][1], abs=1e-3)
    names = GPT.from_pretrained(tmp_path / "checkpoints" / "step_000020").state_dict()
    assert not any("_orig_mod" in name for name in names)


def test_own_text_in_one_command(tmp_path, shared_data, run_script, capsys):
    """It makes shards with a tenth for validation, trains for whole epochs, and names the best checkpoint.

    The best one is not the last one here, because the learning rate is so high that the model overfits.
    """
    GPT(GPTConfig(block_size=64, n_layer=1, n_head=2, n_embd=32)).save_pretrained(tmp_path / "gpt2")
    text = (shared_data / "text" / "tinyshakespeare.txt").read_text()
    (tmp_path / "my.txt").write_text(text[:20_000])
    out = tmp_path / "my run"
    flags = f"--preset finetune --init_from {tmp_path}/gpt2 --seq_len 64 --total_batch_tokens 1024 --epochs 3 --lr 0.1"
    flags = [*flags.split(), "--device", "cpu", "--source", str(tmp_path / "my.txt"), "--out_dir", str(out)]
    train_gpt2.main(flags)
    printed = capsys.readouterr().out
    manifest = fineweb.read_manifest(out / "data")
    val, *train = [shard["tokens"] for shard in manifest["shards"].values()]
    assert val == manifest["tokens"] // 10 and manifest["encoding"] == "gpt2"
    steps = round(3 * sum(train) / 1024)
    losses = dict(zip(*read_log(out / "log.txt")["val"]))
    assert max(losses) == steps and len(losses) == steps + 1
    best = min(losses, key=losses.get)
    assert 0 < best < steps and f"at best {losses[best]:.4f} at step {best}" in printed
    assert f"python sample.py --model '{out}/checkpoints/step_{best:06d}'" in printed and "sample 0: Hello" in printed
    assert sorted(folder.name for folder in out.glob("checkpoints/*")) == [f"step_{best:06d}", f"step_{steps:06d}"]
    shards = {path: path.stat().st_mtime_ns for path in out.glob("data/*.npy")}
    train_gpt2.main([*flags, "--overwrite", "--epochs", "1"])
    assert shards == {path: path.stat().st_mtime_ns for path in out.glob("data/*.npy")}
    (tmp_path / "my.txt").write_text(text[40_000:90_000])
    train_gpt2.main([*flags, "--resume", "--epochs", "1.5", "--override", "max_steps"])  # keeps the shards
    shutil.rmtree(out / "checkpoints")
    (out / "log.txt").unlink()
    with pytest.raises(SystemExit):
        train_gpt2.main([*flags, "--epochs", "1"])
    assert "shards of another text: give --overwrite" in capsys.readouterr().err
    assert shards == {path: path.stat().st_mtime_ns for path in out.glob("data/*.npy")}
    train_gpt2.main([*flags, "--overwrite", "--epochs", "1"])
    assert fineweb.read_manifest(out / "data")["tokens"] > 2 * manifest["tokens"]
    with pytest.raises(SystemExit):
        train_gpt2.main([*flags, "--data_dir", str(tmp_path)])
    assert "leave --data_dir out" in capsys.readouterr().err


def test_own_text_from_scratch(tmp_path, shared_data, capsys):
    """Any preset takes a text; bytes need no download."""
    (tmp_path / "my.txt").write_text("One fox, two foxes. " * 300)
    flags = (
        "--preset demo --encoding bytes --n_layer 1 --n_embd 32 --epochs 2 --total_batch_tokens 1024 --micro_batch 8"
    )
    train_gpt2.main([*flags.split(), "--source", str(tmp_path / "my.txt"), "--out_dir", str(tmp_path / "out")])
    assert fineweb.read_manifest(tmp_path / "out" / "data")["source"].endswith("my.txt")
    assert read_log(tmp_path / "out" / "log.txt")["train"][0] == [*range(11)]


def test_own_text_that_is_too_short(tmp_path, capsys):
    """The error gives the length that is needed, and leaves no shards that a longer text would have to overwrite."""
    text, out = tmp_path / "my.txt", tmp_path / "out"
    flags = "--preset demo --encoding bytes --n_layer 1 --n_embd 32 --epochs 0 --max_steps 1 --warmup_steps 0".split()
    flags += ["--source", str(text), "--out_dir", str(out)]
    text.write_text("a" * 1288)  # with <|endoftext|> a token less than 10 sequences of 128 tokens and their targets
    lines = error_lines(capsys, *flags)
    assert lines == [
        f"error: a tenth of --source {text} is for validation, 128 tokens, and this is too short for one sequence of "
        "--seq_len 128: give 1,290 tokens of text or more, or a smaller --seq_len"
    ]
    assert not (out / "data").exists()
    text.write_text("a" * 1289)
    train_gpt2.main(flags)
    assert read_log(out / "log.txt")["val"][0] == [0, 1]
    longer = [*flags, "--block_size", 256, "--seq_len", 256, "--total_batch_tokens", 1024, "--overwrite"]
    assert "give 2,570 tokens" in error_lines(capsys, *longer)[0]  # also with the shards that exist


def test_the_demo_makes_its_shards_in_one_line(tmp_path, capsys):
    """Forty-nine lines would hide what a newcomer should read. fineweb.py names each shard that it has written."""
    flags = "--preset demo --n_layer 1 --n_embd 32 --warmup_steps 0 --max_steps 1 --val_tokens 128 --sample_interval 0"
    train_gpt2.main([*flags.split(), "--data_dir", str(tmp_path / "data"), "--out_dir", str(tmp_path / "out")])
    shards = fineweb.list_shards(tmp_path / "data")
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert re.search(rf"tokens, [\d,]+ documents, {len(shards)} shards in ", first) and len(shards) > 20
    assert second.startswith("model: ")
    fineweb.prepare("stdlib", tmp_path / "few", "bytes", shard_tokens=100_000, max_tokens=250_000, workers=1)
    names = [path.name for path in fineweb.list_shards(tmp_path / "few")]
    assert sorted(line.split()[0] for line in capsys.readouterr().out.splitlines()[:-1]) == names


def test_dry_run_writes_nothing(text_shards, tmp_path, capsys):
    """It checks the flags and prints the plan, also that of a run to continue."""
    flags = [*map(str, [*SMALL, "--data_dir", text_shards, "--out_dir", tmp_path / "out"])]
    train_gpt2.main([*flags, "--dry_run"])
    assert "2 micro-steps" in capsys.readouterr().out and not list(tmp_path.iterdir())
    train_gpt2.main([*flags, "--log_interval", "8"])
    printed = capsys.readouterr().out
    assert [int(step) for step in re.findall(r"^step +(\d+) \| loss", printed, re.M)] == [0, 8, 16]
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    train_gpt2.main([*flags, "--dry_run", "--resume"])
    assert "at step 20" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_validation_tokens_of_a_cpu():
    """Three hours of validation would hide the first step; the small model of the demo still gets all tokens."""
    big, small = (pick_val_tokens(*PRESETS[name], "cpu") for name in ("gpt2", "demo"))
    assert 20_000 < big < 100_000 and small == pick_val_tokens(*PRESETS["gpt2"], "cuda") == 10_485_760
    assert pick_val_tokens(PRESETS["gpt2"][0], TrainConfig(val_tokens=2048), "cpu") == 2048


def test_clock(monkeypatch, capsys):
    """The first step compiles, so it says nothing about the others. A run of weeks is a mistake to hear of early."""
    now = iter([0.0, 100.0, 101.0, 1000.0])
    monkeypatch.setattr(runlog.time, "monotonic", lambda: next(now))
    clock = runlog.Clock(1001)
    assert clock.progress(0) == "0.1% done | 1:40 elapsed"
    assert clock.progress(1) == "0.2% done | 1:41 elapsed | 16:39 left"
    clock.last_step = 10**6
    assert "days" in clock.progress(100) and "the run takes 104 days" in capsys.readouterr().err


def test_too_little_memory_for_a_step(text_shards, tmp_path, monkeypatch, capsys):
    """A step that does not fit is repeated with smaller micro-batches: the run is the one with those from the start."""
    flags = [
        *SMALL[: SMALL.index("--micro_batch")],
        *SMALL[SMALL.index("--micro_batch") + 2 :],
        "--data_dir",
        text_shards,
    ]
    wrap_model, tried = train_gpt2.wrap_model, []

    def small_gpu(raw_model, runtime):
        """A model that has memory for two sequences of a training step."""

        def check(model, inputs):
            if model.training:
                tried.append(len(inputs[0]))
                if len(inputs[0]) > 2:
                    raise torch.OutOfMemoryError

        raw_model.register_forward_pre_hook(check)
        return wrap_model(raw_model, runtime)

    train_gpt2.main([*map(str, flags), "--micro_batch", "2", "--out_dir", str(tmp_path / "given")])
    monkeypatch.setattr(train_gpt2, "wrap_model", small_gpu)
    train_gpt2.main([*map(str, flags), "--out_dir", str(tmp_path / "auto")])
    assert tried[:3] == [8, 4, 2] and set(tried[3:]) == {2}
    assert capsys.readouterr().err.count("training continues with micro-batches of") == 2
    given, auto = (read_log(tmp_path / name / "log.txt") for name in ("given", "auto"))
    assert auto["train"] == given["train"] and auto["norm"] == given["norm"]
    with pytest.raises(SystemExit):
        train_gpt2.main([*map(str, flags), "--micro_batch", "4", "--out_dir", str(tmp_path / "four")])
    assert "give a smaller --micro_batch" in capsys.readouterr().err

    def step(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train_gpt2, "wrap_model", wrap_model)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)  # an update that has begun is never repeated
    with pytest.raises(SystemExit):
        train_gpt2.main([*map(str, flags), "--out_dir", str(tmp_path / "update")])
    error = capsys.readouterr().err
    assert "give a smaller --micro_batch" in error and "training continues" not in error


def test_batch_ramp(text_shards, tmp_path):
    """The tokens of a step depend on nothing but the step, so a run resumed with other micro-batches is the same."""
    config = TrainConfig(total_batch_tokens=1024, batch_ramp_from=128, batch_ramp_steps=10)
    assert [batch_tokens(step, config) for step in range(12)] == [
        *(128 * n for n in (1, 1, 2, 3, 3, 4, 5, 5, 6, 7)),
        1024,
        1024,
    ]
    assert {batch_tokens(step, replace(config, batch_ramp_steps=0)) for step in range(12)} == {1024}
    for n in (0, 4, 10, 12):
        assert tokens_before(n, config) == sum(batch_tokens(step, config) for step in range(n))
    flags = [*SMALL, "--data_dir", text_shards, "--total_batch_tokens", 1024, "--batch_ramp_from", 128]
    flags = [*map(str, flags), "--batch_ramp_steps", "10", "--max_steps", "14", "--save_interval", "5"]
    train_gpt2.main([*flags, "--micro_batch", "2", "--out_dir", str(tmp_path / "whole")])
    train_gpt2.main([*flags, "--micro_batch", "1", "--out_dir", str(tmp_path / "resumed"), "--max_steps", "5"])
    more = ["--micro_batch", "2", "--out_dir", str(tmp_path / "resumed"), "--resume", "--override", "max_steps"]
    train_gpt2.main([*flags, *more])
    whole, resumed = (read_log(tmp_path / name / "log.txt") for name in ("whole", "resumed"))
    assert whole["tokens"][1] == [batch_tokens(step, config) for step in range(14)]
    assert whole["tokens"] == resumed["tokens"]
    assert resumed["train"][1] == pytest.approx(whole["train"][1], abs=1e-5)
    state = torch.load(tmp_path / "whole/checkpoints/step_000014/training_state.pt", weights_only=True)
    assert state["loader"] * 64 == sum(whole["tokens"][1])


def test_micro_batch_by_itself(text_shards, run_script, tmp_path):
    """Guards --micro_batch auto: the largest that divides each process's rows, of at most 4,096 tokens on a CPU."""
    model = GPT(GPTConfig(block_size=1024, vocab_size=257, n_layer=1, n_head=1, n_embd=8))
    for rows, seq_len, expected in (
        (6, 1024, 3),
        (512, 1024, 4),
        (7, 1024, 1),
        (48, 64, 48),
        (96, 64, 48),
        (1, 8192, 1),
    ):
        config = TrainConfig(total_batch_tokens=rows * seq_len, seq_len=seq_len)
        assert pick_micro_batch(model, config, CPU) == expected
        two = replace(CPU, world_size=2)
        assert rows % 2 or pick_micro_batch(model, replace(config, micro_batch=5), two) == 5
    flags = [*SMALL[: SMALL.index("--micro_batch")], *SMALL[SMALL.index("--micro_batch") + 2 :], "--max_steps", 5]
    done = run_script("train_gpt2.py", *flags, "--data_dir", text_shards, "--out_dir", tmp_path)
    assert "512 tokens = 8 sequences x 64 tokens x 1 processes x 1 micro-steps" in done.stdout, done.stderr
