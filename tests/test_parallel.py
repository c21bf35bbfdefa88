"""More machines: models in shards, blocks computed twice, and torchrun on two nodes train the same run."""

import math
import os
import re
import shutil
import signal
import socket
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from helpers import ROOT, TINY, Program, assert_same_run, error_lines, worker
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from support import muon
from support.distributed import gather
from support.hardware import flops_per_token
from support.muon import Muon, orthogonalize
from support.runlog import read_log
from train_gpt2 import (
    GPT,
    PRESETS,
    DataLoaderLite,
    GPTConfig,
    Runtime,
    TrainConfig,
    configure_optimizers,
    train_step,
    wrap_model,
)

# 33 channels, and with them most tensors, do not divide by two processes; micro-steps add up; 29 rows to validate on,
# two at a time, leave one process none in the end: it must not stay away, for shards need all in each forward pass
ODD = [*TINY, "--n_head", 3, "--n_embd", 33, "--optimizer", "adamw", "--max_steps", 20, "--micro_batch", 2]
ODD += ["--val_tokens", 29 * 64]


def trained(run_script, out, *flags, processes=1, **environment):
    """The log of a finished run."""
    done = run_script("train_gpt2.py", *ODD, *flags, "--out_dir", out, processes=processes, **environment)
    assert done.returncode == 0, done.stderr
    return read_log(out / "log.txt"), done.stdout


def assert_close(log, expected):
    for stream in ("train", "val", "norm"):
        assert log[stream][0] == expected[stream][0]
        rel = 1e-4 if stream == "norm" else 0
        assert log[stream][1] == pytest.approx(expected[stream][1], abs=1e-4, rel=rel)


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_shards_train_the_same_run(text_shards, run_script, tmp_path, optimizer):
    """One process, two, or two with a share of the weights each: the same losses, gradient norms and checkpoints."""
    # Muon multiplies in bfloat16, which magnifies the noise of another order of sums: small steps keep that small
    flags = ["--data_dir", text_shards, "--optimizer", optimizer, "--lr", 0.01 if optimizer == "adamw" else 0.002]
    one, _ = trained(run_script, tmp_path / "one", *flags)
    two, _ = trained(run_script, tmp_path / "two", *flags, processes=2)
    shards, stdout = trained(run_script, tmp_path / "shards", *flags, "--fsdp", processes=2)
    assert "sharded" in stdout and shards["train"][1][-1] < shards["train"][1][0] - 1
    assert_close(shards, one)
    assert_close(shards, two)
    states = [
        torch.load(tmp_path / out / "checkpoints" / "step_000020" / "training_state.pt", weights_only=True)[
            "optimizers"
        ]
        for out in ("one", "shards")
    ]
    for one, shards in zip(*states, strict=True):
        assert one["param_groups"] == shards["param_groups"] and one["state"].keys() == shards["state"].keys()
        for i, values in one["state"].items():
            for name, value in values.items():
                torch.testing.assert_close(shards["state"][i][name], value, rtol=0.05, atol=1e-4)


def test_shards_need_processes_and_a_wide_exponent(text_shards, tmp_path, capsys, monkeypatch):
    """One process has nothing to share with, and float16's scaler would part the processes: a line for each."""
    flags = [*ODD, "--data_dir", text_shards, "--out_dir", tmp_path / "out", "--fsdp"]
    (line,) = error_lines(capsys, *flags)
    assert "--fsdp" in line and "torchrun" in line
    monkeypatch.setenv("WORLD_SIZE", "2")
    lines = error_lines(capsys, *flags, "--dtype", "float16")
    assert "--dtype bfloat16" in lines[0] and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_shards_in_bfloat16_compiled_and_computed_twice(text_shards, run_script, tmp_path):
    """Blocks gathered in bfloat16, compiled, and run again in the backward pass compute what autocast does."""
    flags = ["--data_dir", text_shards, "--n_layer", 4, "--n_embd", 36, "--lr", 0.001, "--dtype", "bfloat16"]
    whole, _ = trained(run_script, tmp_path / "whole", *flags, processes=2)
    flags += ["--fsdp", "--compile", "on", "--activation_checkpointing"]
    shards, stdout = trained(run_script, tmp_path / "shards", *flags, processes=2)
    for stream in ("train", "val"):
        assert shards[stream][1] == pytest.approx(whole[stream][1], abs=5e-4)
    assert "sharded, compiled" in stdout


@pytest.mark.slow
def test_shards_are_scored_and_sampled(shared_data, make_shards, run_script, tmp_path):
    """HellaSwag and samples come from whole float32 weights, without dropout: the counts and text of one process."""
    tokens = np.random.RandomState(0).randint(0, 50257, 9000)
    data = make_shards(tmp_path / "data", {"val": [tokens[:3000]], "train": [tokens[3000:]]})
    rows = (shared_data / "hellaswag" / "hellaswag_val_600.jsonl").read_text().splitlines(keepends=True)[:21]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    flags = ["--data_dir", data, "--block_size", 256, "--max_steps", 6, "--eval_interval", 3, "--sample_interval", 3]
    flags += ["--hellaswag_file", tmp_path / "rows.jsonl", "--dtype", "bfloat16", "--dropout", 0.3, "--lr", 1e-9]
    one, one_stdout = trained(run_script, tmp_path / "one", *flags)
    shards, stdout = trained(run_script, tmp_path / "shards", *flags, "--fsdp", processes=2)
    assert shards["hella"] == one["hella"] and len(one["hella"][0]) == 3
    samples = re.findall(r"^sample \d: .*$", one_stdout, re.M)
    assert len(samples) == 2 * 4 and re.findall(r"^sample \d: .*$", stdout, re.M) == samples


@pytest.mark.slow
def test_shards_resume_to_the_bit_and_as_anything_else(text_shards, run_script, tmp_path):
    """A checkpoint knows no layout: the same one goes on exactly, DDP -> shards -> one process within rounding."""
    flags = ["--data_dir", text_shards, "--max_steps", 30, "--optimizer", "muon"]
    trained(run_script, tmp_path / "whole", *flags, "--fsdp", processes=2)
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    for step in (20, 30):
        shutil.rmtree(tmp_path / "out" / "checkpoints" / f"step_0000{step}")
    _, stdout = trained(run_script, tmp_path / "out", *flags, "--fsdp", "--resume", processes=2)
    assert "at step 10" in stdout
    assert_same_run(tmp_path / "out", tmp_path / "whole")

    flags[-1] = "adamw"
    expected, _ = trained(run_script, tmp_path / "one", *flags)
    for processes, more, steps in ((2, [], (20, 30)), (2, ["--fsdp", "--resume"], (30,)), (1, ["--resume"], ())):
        log, stdout = trained(run_script, tmp_path / "tour", *flags, *more, processes=processes)
        for step in steps:
            shutil.rmtree(tmp_path / "tour" / "checkpoints" / f"step_0000{step}")
    assert "at step 20" in stdout
    assert_close(log, expected)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc")
def test_shards_stop_and_go_on(text_shards, run_script, tmp_path):
    """A signal to one of the processes while micro-steps add up: both gather what they save, and it goes on."""
    flags = [*ODD, "--data_dir", text_shards, "--total_batch_tokens", 8192, "--fsdp", "--save_interval", 1000]
    run = Program(*flags, "--out_dir", tmp_path / "out", "--resume", processes=2)
    run.wait_for(r"^step +12 \| loss")
    os.kill(worker(run.process, rank=1), signal.SIGTERM)
    assert run.end() != 0 and re.search("^stopped at step 1[3-9]", run.text, re.M), run.text
    log, _ = trained(run_script, tmp_path / "out", *flags[len(ODD) :], "--resume", processes=2)
    expected, _ = trained(run_script, tmp_path / "whole", *flags[len(ODD) :], processes=2)
    assert_close(log, expected)


COUNTER = """
import sys
sys.path.insert(0, {root!r})
from torch.utils._python_dispatch import TorchDispatchMode
import train_gpt2

calls = []

class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        calls.append(str(function))
        return function(*args, **(kwargs or {{}}))

with Recorder():
    train_gpt2.main()
print("reductions:", sum("reduce_scatter" in call for call in calls), flush=True)
"""


@pytest.mark.slow
def test_shards_reduce_gradients_once_a_step(text_shards, tmp_path):
    """In every micro-step it would cost the network four times as much here: two blocks and the rest, 20 steps."""
    script = tmp_path / "counter.py"
    script.write_text(COUNTER.format(root=str(ROOT)))
    flags = [*ODD, "--data_dir", text_shards, "--total_batch_tokens", 1024, "--fsdp", "--out_dir", tmp_path / "out"]
    run = Program(*flags, launcher=[str(script)], processes=2)
    assert run.end() == 0, run.text
    assert "x 4 micro-steps" in run.text and run.text.count("reductions: 60") == 2, run.text


# --- blocks computed twice --------------------------------------------------------------------------------------------


def test_activation_checkpointing_changes_nothing_but_memory():
    """Each block runs once more in the backward pass, and loss and gradients stay the same to the bit."""
    torch.manual_seed(0)
    model, calls = GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=3, n_head=2, n_embd=16)), []
    model.transformer.h[1].mlp.gelu.register_forward_hook(lambda *_: calls.append(None))
    x, y = torch.randint(0, 257, (2, 2, 16))
    results = []
    for wanted, expected_calls in ((False, 1), (True, 2)):
        model.activation_checkpointing = wanted
        loss = model(x, y)[1]
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        model.zero_grad()
        assert len(calls) == expected_calls
        calls.clear()
    assert all(map(torch.equal, *results))
    with torch.no_grad():
        model(x, y)
    assert len(calls) == 1


@pytest.mark.slow
def test_activation_checkpointing_trains_the_same_run(text_shards, run_script, tmp_path):
    """As a flag: the same log to the bit."""
    flags = ["--data_dir", text_shards, "--n_embd", 36]
    plain, _ = trained(run_script, tmp_path / "plain", *flags)
    twice, _ = trained(run_script, tmp_path / "twice", *flags, "--activation_checkpointing")
    assert all(twice[stream] == plain[stream] for stream in ("train", "val", "norm"))


# --- Muon on several processes ----------------------------------------------------------------------------------------

MUON = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from test_parallel import muon_steps

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
results = {{
    "whole": muon_steps(torch.clone),
    "sharded": muon_steps(lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)])),
}}
torch.save(results, f"{folder}/rank{{dist.get_rank()}}.pt")
dist.barrier()
dist.destroy_process_group()
"""
MUON_SHAPES = {(96, 32): 5, (32, 32): 17, (128, 32): 5, (32, 128): 2}  # 17 are a batch of 16 and one of a single matrix


def muon_steps(place):
    """Do two steps of Muon. Return the FLOPs of this process, and the whole weights and momenta.

    place: what makes a parameter of a tensor, and a gradient.
    """
    torch.manual_seed(0)
    tensors = [torch.randn(shape) for shape, count in MUON_SHAPES.items() for _ in range(count)]
    weights = [torch.nn.Parameter(place(tensor)) for tensor in tensors]
    optimizer = Muon(weights, 0.1, 0.1)
    with FlopCounterMode(display=False) as counter:
        for _ in range(2):
            for weight, tensor in zip(weights, tensors):
                weight.grad = place(torch.randn_like(tensor))
            optimizer.step()
    values = [*weights, *(optimizer.state[weight]["momentum_buffer"] for weight in weights)]
    return counter.get_total_flops(), [gather(value.detach()) for value in values]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_products_of_muon(tmp_path, processes):
    """Each does its part of every batch. All get the bits of one process, with whole weights and with shards."""
    script = tmp_path / "muon.py"
    script.write_text(MUON.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path)))
    run = Program(launcher=[str(script)], processes=processes)
    assert run.end() == 0, run.text
    all_flops, expected = muon_steps(torch.clone)
    # FLOPs of five rounds for (a, b), a <= b, and how many matrices a batch has
    wide, square, long = ((5 * 2 * (2 * a * a * b + a**3)) for a, b in ((32, 128), (32, 32), (32, 128)))
    batches = [(15, square), (16, square), (1, square), (5, wide), (2, long)]
    assert all_flops == 2 * sum(count * flops for count, flops in batches)
    for rank in range(processes):
        own = 0
        for count, flops in batches:
            share = math.ceil(count / processes)
            own += max(0, min(share, count - rank * share)) * flops
        for layout, (flops, values) in torch.load(tmp_path / f"rank{rank}.pt").items():
            assert flops == 2 * own, (layout, rank)
            assert all(map(torch.equal, values, expected)), (layout, rank)


@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (1600, 400), (400, 1600)])
def test_an_update_does_not_depend_on_its_batch(shape):
    """However many processes share a batch, each matrix gets the same bits. oneDNN sums long rows in blocks."""
    torch.manual_seed(0)
    matrices = torch.randn(5, *shape).bfloat16()
    whole = orthogonalize(matrices)
    for share in (1, 2, 3):
        assert torch.equal(torch.cat([orthogonalize(part) for part in matrices.split(share)]), whole)


# --- nodes ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc")
def test_two_nodes_survive_a_killed_rank(text_shards, run_script, tmp_path):
    """Two torchruns that meet by c10d: when one's process dies both start theirs again, and end as one machine does."""
    flags = ["--data_dir", text_shards, "--total_batch_tokens", 4096]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=1", "--rdzv_id=test"]
    torchrun += ["--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", str(ROOT / "train_gpt2.py")]
    nodes = [Program(*ODD, *flags, "--out_dir", tmp_path / "out", "--resume", launcher=torchrun) for _ in range(2)]
    while not any(re.search(r"^step +13 \| loss", node.text, re.M) for node in nodes):
        assert all(node.process.poll() is None for node in nodes), nodes[0].text + nodes[1].text
        time.sleep(0.05)
    first, second = sorted(nodes, key=lambda node: "step " not in node.text)  # the first has rank 0
    os.kill(worker(second.process, rank=1), signal.SIGKILL)
    assert first.end() == second.end() == 0, first.text + second.text
    assert re.findall(r"^resuming .* at step (\d+)", first.text, re.M) == ["10"]
    assert not re.search(r"^(model|step|saved|resuming)", second.text, re.M)
    trained(run_script, tmp_path / "two", *flags, processes=2)
    assert_same_run(tmp_path / "out", tmp_path / "two")
    one, _ = trained(run_script, tmp_path / "one", "--data_dir", text_shards, "--total_batch_tokens", 4096)
    assert_close(read_log(tmp_path / "out" / "log.txt"), one)


# --- what the processes send, counted with a process group that sends nothing -----------------------------------------

RANKS = 8


@pytest.fixture
def fake_group():
    """A process group in which this process is the first of RANKS, and the others do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    dist.destroy_process_group()


def parallel_training(data_dir, micro_steps, steps, watch, dtype=torch.float32, compile=False, fsdp=False, **shape):
    """Run train_step as one of RANKS processes. watch(model, raw_model, loader) is called before the first step."""
    raw_model = GPT(GPTConfig(block_size=16, vocab_size=257, n_head=2, **shape))
    config = TrainConfig(total_batch_tokens=RANKS * micro_steps * 2 * 16, seq_len=16)
    loader = DataLoaderLite(data_dir, "train", 2, 16, 0, RANKS)
    runtime = Runtime(0, RANKS, torch.device("cpu"), dtype, compile, fsdp)
    model = wrap_model(raw_model, runtime)
    optimizers, scaler = configure_optimizers(raw_model, config), torch.amp.GradScaler("cpu", enabled=False)
    watch(model, raw_model, loader)
    for step in range(steps):
        train_step(model, optimizers, scaler, loader, step, config, runtime)


def record_buckets(model, record):
    """Call record(bucket) when DDP would sum a bucket of gradients over the processes."""

    def hook(_, bucket):
        record(bucket)
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model.register_comm_hook(None, hook)


def test_gradients_are_sent_while_a_compiled_model_computes(text_shards, fake_group, monkeypatch):
    """DDP splits the compiled graph where its buckets end: a bucket is sent as soon as its part has been computed."""
    graphs, events = [], []

    def compile_backward(graph, _):
        graphs.append(graph)
        number = len(graphs)

        def run(*inputs):
            events.append(f"graph {number}")
            return graph.forward(*inputs)

        return make_boxed_func(run)

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=compile_backward)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))  # Inductor would take a minute

    def watch(model, raw_model, loader):
        record_buckets(model, lambda bucket: events.append("bucket"))

    torch._dynamo.reset()
    parallel_training(text_shards, 2, 2, watch, compile=True, n_layer=2, n_embd=768)  # 28 MB a block, 25 MB a bucket
    torch._dynamo.reset()
    last_step = events[len(events) // 2 :]
    computed = [event for event in last_step if event != "bucket"]
    assert len(graphs) == len({*computed}) > 1
    first, last = last_step.index("bucket"), len(last_step) - last_step[::-1].index(computed[-1]) - 1
    assert first > len(computed) // 2  # nothing is sent in the first of two micro-steps
    assert first < last


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_of_a_sharded_step(text_shards, fake_group, dtype):
    """A block's weights are gathered for each pass, the rest once for both, and gradients are summed once a step."""
    micro_steps, layers, sent = 3, 4, []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            for name in "_allgather_base", "_reduce_scatter_base":
                if name in str(function):
                    whole = max(tree_leaves(args[:2]), key=lambda tensor: tensor.numel())
                    sent.append((name, whole.nbytes, whole.dtype))
            return function(*args, **(kwargs or {}))

    sizes = []

    def watch(model, raw_model, loader):
        sizes.extend(sum(p.numel() for p in part.parameters()) for part in (raw_model, raw_model.transformer.h))

    with Recorder():
        parallel_training(text_shards, micro_steps, 1, watch, dtype, fsdp=True, n_layer=layers, n_embd=64)
    everything, blocks = sizes
    gathered = [bytes for name, bytes, _ in sent if name == "_allgather_base"]
    reduced = [(bytes, dtype) for name, bytes, dtype in sent if name == "_reduce_scatter_base"]
    assert len(gathered) == micro_steps * (2 * layers + 1) and len(reduced) == layers + 1
    assert sum(gathered) == micro_steps * (2 * dtype.itemsize * blocks + 4 * (everything - blocks))
    assert sum(bytes for bytes, _ in reduced) == 4 * everything and {dtype for _, dtype in reduced} == {torch.float32}


def test_gradients_have_no_second_copy(text_shards, fake_group):
    """DDP keeps gradients in its buckets. A gradient that was set to None is a new tensor until the last micro-step."""
    buckets, outside = set(), []

    def watch(model, raw_model, loader):
        record_buckets(model, lambda bucket: buckets.add(bucket.buffer().untyped_storage().data_ptr()))
        next_batch = loader.next_batch

        def look():
            gradients = [p.grad for p in raw_model.parameters() if p.grad is not None]
            storages = {gradient.untyped_storage().data_ptr() for gradient in gradients}
            outside.append(len(storages - buckets) if gradients else None)
            return next_batch()

        loader.next_batch = look

    parallel_training(text_shards, 3, 4, watch, n_layer=2, n_embd=64)
    assert outside[2 * 3 :] == [0] * 2 * 3  # DDP moves its buckets once, after its first step


# --- what scale costs -------------------------------------------------------------------------------------------------


def test_the_table_of_scale_is_its_arithmetic():
    """README's bytes, times and memory of DDP and FSDP at 8 and 64 GPUs follow from the formulas that stand there."""
    readme = (ROOT / "docs" / "scaling.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in readme.splitlines() if line.startswith("| ")]
    scale = [row for row in rows if len(row) == 6 and re.match(r"\d+ x \d+$", row[2])]
    memory = [row for row in rows if len(row) == 6 and row[1] == "8, 64"]

    def numbers(*cells):
        found = [
            float(number.replace(",", "")) for cell in cells for number in re.findall(r"\d[\d.]*(?:,\d{3})*", cell)
        ]
        return pytest.approx(found, rel=0.03, abs=0.05)

    for preset, rows, gigabytes in zip(("gpt2", "gpt2-xl", "gpt3-1.3b"), (scale[:3], scale[3:6], scale[6:]), memory):
        config, run = PRESETS[preset]
        with torch.device("meta"):
            model = GPT(config)
        P, blocks = model.num_params(), sum(p.numel() for p in model.transformer.h.parameters())
        ddp, fsdp, kept, recomputed = [], [], [], []
        for row, N, bandwidth in zip(rows, (1, 8, 64), (math.inf, 450e9, 400e9)):
            B, m = map(int, row[2].split(" x "))
            assert B * m * N * run.seq_len == 2**19 and row[1] == str(N)
            seconds = flops_per_token(config, run.seq_len) * 2**19 / N / (0.4 * 989e12)
            assert [seconds if " s" in row[3] else seconds * 1e3] == numbers(row[3])
            if N == 1:
                continue
            sent = [2 * (N - 1) / N * 4 * P, (N - 1) / N * 4 * P * (m + 1)]
            assert [x for n in sent for x in (n / 1e9, n / bandwidth * 1e3)] == numbers(*row[4:])
            gathered = 4 * (P - blocks) + 3 * 2 * blocks / config.n_layer
            ddp.append(18 * P / 1e9)
            embedding_gradient = 4 * model.transformer.wte.weight.numel()
            fsdp.append((16 * P / N + (4 * P if m > 1 else embedding_gradient) + gathered) / 1e9)
            tokens_and_channels = B * run.seq_len * config.n_embd / 1e9
            kept.append(36 * tokens_and_channels * config.n_layer)
            recomputed.append((4 * config.n_layer + 36) * tokens_and_channels)
        assert [ddp[0], *fsdp, *kept, *recomputed] == numbers(*gigabytes[2:])
    assert len(scale) == 9 and preset == "gpt3-1.3b"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_update_has_one_type_on_any_number_of_processes(monkeypatch, dtype):
    """Where products are not in bfloat16, one process must not keep digits that an exchange would lose."""
    monkeypatch.setattr(muon, "pick_dtype", lambda *_: dtype)
    update = orthogonalize(torch.randn(2, 16, 8).bfloat16())
    assert update.dtype == torch.bfloat16 and torch.linalg.svdvals(update.float()).sub(1).abs().max() < 0.4


def test_the_table_of_muon_is_its_arithmetic():
    """The products of the GPU with the largest part, and the sum of all results, follow from the shapes."""
    text = (ROOT / "docs" / "scaling.md").read_text().partition("### Muon")[2]
    for preset, name in (("gpt2", "124M"), ("gpt2-xl", "gpt2-xl"), ("gpt3-1.3b", "gpt3-1.3b")):
        (row,) = re.findall(rf"^\| {name} \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text, re.M)
        C, layers, expected = PRESETS[preset][0].n_embd, PRESETS[preset][0].n_layer, []
        for N, bandwidth in ((1, math.inf), (8, 450e9), (64, 400e9)):
            flops = 0
            for batch in [16] * (layers // 16) + [layers % 16]:
                for matrices, cost in ((3 * batch, 30), (batch, 30), (batch, 90), (batch, 90)):  # c_attn, c_proj, MLP
                    flops += math.ceil(matrices / N) * cost * C**3
            expected += [flops / (0.4 * 989e12) * 1e3, 2 * (N - 1) / N * 24 * layers * C**2 / bandwidth * 1e3]
        del expected[1]  # a single GPU sends nothing
        numbers = [float(number) for number in re.findall(r"[\d.]+", " ".join(row))]
        assert numbers == pytest.approx(expected, abs=0.06, rel=0.01)
