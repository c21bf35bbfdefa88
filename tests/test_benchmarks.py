"""The benchmarks at a tiny size: each runs to its end, and what it writes is consistent.

If GPT2_PEER names a checkout of build-nanogpt, the benchmarks measure it. Otherwise a short script takes its place.
"""

import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import data
import hellaswag_agreement
import hellaswag_speed
import identical
import inference
import measure
import numpy as np
import peers
import pytest
import recipes
import saving
import scale
import torch
import variants
from count_step import count_fsdp_step, count_step
from helpers import save_model

import train_gpt2
from support.common import UserError
from support.runlog import read_log

OPTIMIZERS = ("adamw", "muon")
PADDING = math.log(384 / 257)  # at the start, the demo's loss is higher by this if padding ids take part in it

# These stand in for build-nanogpt's scripts. Each has the strings and functions that its benchmark relies on.
PEER_TRAINING = """
GPTConfig, step, last_step = dict, 1, False
use_compile = False
total_batch_size = 524288
B = 64
T = 1024
shape = GPTConfig(vocab_size=50304)
warmup_steps = 715
max_steps = 19073
val_loss_steps = 20
if (step % 250 == 0 or last_step) and (not use_compile):
    pass
if ((step > 0 and step % 250 == 0) or last_step) and (not use_compile):
    pass
for step in range(max_steps):
    print(f"step {step:5d} | loss: {5 - step / 8:.6f} | lr 6.0e-04 | norm: 1.0000 | dt: {40 + step:.2f}ms | tok/sec: 9")
"""
PEER_MODEL = "from train_gpt2 import GPT, GPTConfig\nimport tiktoken\n"
PEER_HELLASWAG = """
import tiktoken, torch
def render_example(row):
    encode = tiktoken.get_encoding("gpt2").encode
    context, endings = encode(row["ctx"]), [encode(" " + ending) for ending in row["endings"]]
    tokens = torch.zeros(4, len(context) + max(map(len, endings)), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, ending in enumerate(endings):
        tokens[i, : len(context) + len(ending)] = torch.tensor(context + ending)
        mask[i, len(context) : len(context) + len(ending)] = 1
    return {}, tokens, mask, row["label"]
"""
PEER_FINEWEB = """
import os, numpy as np, tiktoken
from datasets import load_dataset
encode = tiktoken.get_encoding("gpt2").encode_ordinary
tokens = [token for row in load_dataset("fineweb") for token in (50256, *encode(row["text"]))]
os.makedirs("edu_fineweb10B", exist_ok=True)
np.save("edu_fineweb10B/edufineweb_train_000000.npy", np.array(tokens, dtype=np.uint16))
"""
ROWS = [
    {"activity_label": "Cooking", "ctx_a": "A man cuts an onion.", "ctx_b": "then he", "label": 1,
     "ctx": "A man cuts an onion. then he",
     "endings": ["cries.", "fries it in oil.", "flies to the moon and back", "lies down"]},
    {"activity_label": "Removing ice", "ctx_a": "She scrapes the windshield.", "ctx_b": "", "label": 3,
     "ctx": "She scrapes the windshield.", "endings": ["The car sings.", "It [title] rains", "No.", "The ice falls"]},
]  # fmt: skip


def make_peer(folder, **scripts):
    """Return the checkout that GPT2_PEER names, or a new folder with these scripts: {name: text}."""
    if "GPT2_PEER" in os.environ:
        return Path(os.environ["GPT2_PEER"])
    folder.mkdir()
    for name, text in ({"train_gpt2": "", "hellaswag": ""} | scripts).items():
        (folder / f"{name}.py").write_text(text)
    return folder


def read_report(folder, name, stdout):
    """Return the JSON of a report. Its Markdown must be what the program printed."""
    assert (folder / f"{name}.md").read_text() in stdout
    result = json.loads((folder / f"{name}.json").read_text())
    assert result["command"].startswith("python ") and torch.__version__ in result["versions"] and result["revision"]
    return result


@pytest.fixture
def hellaswag_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


# --- measure.py -------------------------------------------------------------------------------------------------------


def test_a_trial_run_overwrites_no_result():
    """Without --out_dir, a report goes to a folder that git ignores."""
    out_dir = measure.make_parser("").parse_args([]).out_dir
    ignored = (measure.ROOT / ".gitignore").read_text().splitlines()
    assert f"/{out_dir.relative_to(measure.ROOT)}/" in ignored


def test_report(tmp_path, capsys):
    """A report is a table, and the same rows as JSON with one line per row."""
    args = SimpleNamespace(out_dir=tmp_path, name="tiny")
    rows = [{"program": "a", "ms": 1.25, "runs": [1, 2, 3]}, {"program": "b"}]
    columns = {"program": ("program", ""), "step, ms": ("ms", ".1f")}
    measure.write_report(args, "Title", {"machine": "x"}, rows, columns)
    assert capsys.readouterr().out.strip() == (tmp_path / "tiny.md").read_text().strip()
    assert (tmp_path / "tiny.md").read_text().splitlines()[-2:] == ["| a | 1.2 |", "| b | n/a |"]
    text = (tmp_path / "tiny.json").read_text()
    assert json.loads(text) == {"machine": "x", "rows": rows} and len(text.splitlines()) == 7


def test_published_results_are_clean():
    """A published result comes from a committed state of the code, and names no folder of the machine."""
    for path in (measure.ROOT / "benchmarks" / "results").glob("*.json"):
        result = json.loads(path.read_text())
        facts = " ".join(str(value) for key, value in result.items() if key != "rows")
        assert result["rows"] and "dirty" not in facts, path
        assert not any(word.startswith("/") for word in facts.replace("=", " ").split() if word != "/"), path
        assert len(path.read_text().splitlines()) < 100, f"{path} has raw data: write it compactly"


# --- the benchmarks ---------------------------------------------------------------------------------------------------


def test_saving(main, tmp_path):
    """The checkpoints are real ones, and nothing but the report is left."""
    flags = ["--preset", "demo", "--repetitions", 2, "--device", "cpu", "--out_dir", tmp_path]
    code, stdout, _ = main(saving, flags)
    result = read_report(tmp_path, "saving", stdout)
    waits, written, blocking = result["rows"]
    assert code == 0 and "446,080 parameters" in result["checkpoint"]
    assert all(wait < end for wait, end in zip(waits["runs"], written["runs"], strict=True))
    assert 0 < min(blocking["runs"]) <= blocking["median"] <= blocking["longest"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saving.json", "saving.md"]


@pytest.mark.slow
def test_data(main, tmp_path):
    """Both programs write the same tokens, and each share is one of tiktoken's limit."""
    pytest.importorskip("datasets")
    pa = pytest.importorskip("pyarrow")
    (tmp_path / "source").mkdir()
    texts = [f"Document {i} of a small corpus. " * 200 for i in range(20)]
    pa.parquet.write_table(pa.table({"text": texts}), tmp_path / "source" / "000.parquet")
    flags = ["--source", tmp_path / "source", "--peer", make_peer(tmp_path / "peer", fineweb=PEER_FINEWEB)]
    flags += ["--megabytes", 1, "--shard_tokens", 100_000, "--processes", 1, "--repetitions", 1, "--out_dir", tmp_path]
    code, stdout, _ = main(data, flags)
    assert code == 0
    limit, peer, ours = json.loads((tmp_path / "data.json").read_text())["rows"]
    assert (tmp_path / "data.md").read_text() in stdout
    assert limit["share"] == 1 and ours["share"] * limit["tokens_per_second"] == pytest.approx(
        ours["tokens_per_second"]
    )
    assert peer["runs"][0]["sha256"] == ours["runs"][0]["sha256"] and ours["runs"][0]["tokens"] > 100_000
    assert min(peer["megabytes"], ours["megabytes"]) > 10


def test_hellaswag_speed(main, tmp_path, hellaswag_file):
    """The peer's loop and ours give the same counts, and a ratio is one of the measured times."""
    flags = ["--peer", make_peer(tmp_path / "peer", hellaswag=PEER_HELLASWAG), "--file", hellaswag_file]
    code, stdout, _ = main(hellaswag_speed, [*flags, "--n_layer", 1, "--repetitions", 1, "--out_dir", tmp_path])
    result = read_report(tmp_path, "hellaswag_speed", stdout)
    assert code == 0 and [row["model"] for row in result["rows"]] == ["GPT2LMHeadModel", "train_gpt2.GPT"]
    for row in result["rows"]:
        assert row["peer_counts"] == row["our_counts"] and row["our_counts"][0] == len(ROWS)
        assert row["ratio"] == pytest.approx(row["peer_seconds"] / row["our_seconds"])


def test_hellaswag_agreement(main, tmp_path, hellaswag_file):
    """All choices agree with those of the plain loop, and of lm-eval if it is installed."""
    torch.manual_seed(0)
    shape = train_gpt2.GPTConfig(block_size=128, vocab_size=257, n_layer=1, n_head=1, n_embd=32)
    save_model(tmp_path / "log", train_gpt2.GPT(shape))
    flags = ["--model", tmp_path / "log", "--file", hellaswag_file, "--out_dir", tmp_path]
    without = [] if hellaswag_agreement.importlib.util.find_spec("lm_eval") else ["--without_lm_eval"]
    code, stdout, _ = main(hellaswag_agreement, [*flags, *without])
    rows = read_report(tmp_path, "hellaswag_agreement", stdout)["rows"]
    assert code == 0 and len(rows) == (6 if without else 9)
    for row in rows:
        assert row["differing_acc"] == row["differing_acc_norm"] == 0 and row["max_difference"] < 1e-3
        assert (row["acc"], row["acc_norm"]) == pytest.approx((row["their_acc"], row["their_acc_norm"]))
    assert rows[0]["rows_cut"] == 0 < rows[-1]["rows_cut"]  # the last model has only 80 positions


@pytest.mark.slow
def test_inference(main, tmp_path, text_shards, monkeypatch):
    """With one layer of each program and a few tokens: the table follows from what was timed and counted."""
    monkeypatch.setattr(inference, "CASES", {"two samples": (2, 8, 4), "a prompt": (1, 40, 1)})
    shape = train_gpt2.GPTConfig(block_size=64, vocab_size=257, n_layer=1, n_head=1, n_embd=32)
    save_model(tmp_path / "log", train_gpt2.GPT(shape))
    flags = ["--peer", make_peer(tmp_path / "peer", train_gpt2=PEER_MODEL), "--trained", tmp_path / "log"]
    flags += ["--data", text_shards, "--n_layer", 1, "--max_new_tokens", 16, "--repetitions", 1, "--rows", 4]
    code, stdout, _ = main(inference, [*flags, "--out_dir", tmp_path, "--name", "tiny"])
    result = read_report(tmp_path, "tiny", stdout)
    assert code == 0 and (tmp_path / "tiny.png").stat().st_size > 10_000
    peer, theirs, ours, *others = result["rows"]
    assert peer["to_peer"] == theirs["to_transformers"] == 1 and len(others) == 2
    assert ours["to_peer"] == pytest.approx(peer["milliseconds"] / ours["milliseconds"])
    block, head = 12 * 768**2 + 9 * 768, 50304 * 768
    assert ours["megabytes"] == pytest.approx(4e-6 * (block + 2 * head + 1024 * 768), rel=0.001)  # also for look-up
    rate = float(result["limit"].split(" at ")[1].split()[0]) * 1e9
    read = ours["of_limit"] * ours["milliseconds"] / 1e3 * rate
    assert read == pytest.approx(4 * (block + head), rel=0.01)
    assert all(abs(row["loss_change"]) < 0.05 for row in others) and abs(ours["loss_change"]) < 1e-4
    cases = [result[f"{case}, times as fast as plain float32 layers"] for case in inference.CASES]
    assert all(re.fullmatch(r"float32 \d+\.\d\d, bfloat16 \d+\.\d\d, int8 \d+\.\d\d", case) for case in cases)


def test_cases_of_generation_are_compared_with_plain_layers(monkeypatch):
    """With a clock that the models move: plain layers take 6 s, the others 3, 2 and 1 s, after a slower first call."""
    clock = [0.0]

    def model(seconds):
        calls = iter([100, seconds, seconds])

        def generate(ids, *_):
            clock[0] += next(calls)
            return ids

        return SimpleNamespace(generate=generate, lm_head=SimpleNamespace(weight=torch.zeros(1)))

    monkeypatch.setattr(inference, "CASES", {"case": (2, 3, 1)})
    monkeypatch.setattr(inference, "variants", lambda gpt, rows: dict(a=model(3), b=model(2), c=model(1)))
    monkeypatch.setattr(inference.time, "perf_counter", lambda: clock[0])
    assert inference.time_cases(model(6), 2) == {"case": {"a": 2, "b": 3, "c": 6}}


def run_training_benchmark(run_script, tmp_path, program, *flags):
    """Run peers.py or ladder.py on the demo's model. Return its rows by name."""
    flags = [*flags, "--preset", "demo", "--repetitions", 1, "--out_dir", tmp_path, "--name", "tiny"]
    done = run_script(f"benchmarks/{program}", *flags, timeout=1200)
    assert done.returncode == 0, done.stderr
    result = read_report(tmp_path, "tiny", done.stdout)
    assert program in result["command"] and (tmp_path / "tiny.png").stat().st_size > 10_000
    return {next(iter(row.values())): row for row in result["rows"]}


def test_counted_memory_is_what_a_gpu_needs():
    """An eager pass of the 124M at B=64 took 25.57 GB on an H200, without moments and earlier gradients (h200.md)."""
    parts, _, _ = count_step("gpt2", 64, micro_steps=2)
    assert parts["peak"] - parts["moments"] - parts["gradients"] == pytest.approx(25.57e9, rel=0.005)
    assert parts["moments"] == pytest.approx(2 * parts["weights"], rel=1e-3)
    assert parts["gradients"] == parts["weights"] > 4 * 124_439_808


@pytest.mark.slow
def test_counted_memory_of_a_shard():
    """FSDP keeps an eighth of weights and moments on each of 8 ranks, but whole gradients between micro-steps."""
    whole, _, _ = count_step("gpt2", 4, micro_steps=2)
    parts, first, last = count_fsdp_step("gpt2", 4, micro_steps=2, ranks=8)
    for name in "weights", "moments":
        assert parts[name] == pytest.approx(whole[name] / 8, rel=1e-3)
    assert parts["gradients"] >= whole["gradients"]
    assert len(first) == 2 * 12 + 1 and len(last) == 3 * 12 + 2


@pytest.mark.slow
def test_scale(main, tmp_path):
    """Each number of ranks has its rows, and the report has its tables."""
    code, stdout, stderr = main(scale, ["--presets", "demo", "--ranks", 1, 8, 512, "--out_dir", tmp_path])
    assert code == 0, stderr
    rows = read_report(tmp_path, "scale", stdout)["rows"][:3]
    assert [(row["ranks"], row["layout"], row["B x m"]) for row in rows] == [
        (1, "one", "16 x 1"), (8, "DDP", "2 x 1"), (8, "FSDP", "2 x 1")
    ]  # fmt: skip
    assert rows[0]["efficiency"] == 1 > rows[1]["efficiency"] and rows[0]["sent"] == 0
    assert rows[1]["sent"] == pytest.approx(2 * 7 / 8 * rows[1]["weights"])
    assert stdout.count("\n## ") == 2


@pytest.mark.slow
def test_ladder(run_script, tmp_path):
    """Every rung of this machine is measured, on the same rows from the same seed, and the last one is profiled."""
    rows = run_training_benchmark(run_script, tmp_path, "ladder.py", "--steps", 6, "--profile")
    measured = [row for row in rows.values() if "median" in row]
    assert [name for name in rows if rows[name] not in measured] == ([] if torch.cuda.is_available() else ["TF32"])
    for row in measured:
        assert 0 < row["p10"] <= row["median"] <= row["p90"] and row["gigabytes"] > 0.01
        assert row["tokens_per_second"] * row["median"] == pytest.approx(2048 * 1000)
        assert len(row["runs"][0]["milliseconds"]) == 6
    assert math.prod(row["gain"] for row in measured) == pytest.approx(measured[-1]["speedup"])
    assert rows["clipping, fused AdamW"]["lecture_speedup"] == pytest.approx(1000 / 90)
    losses = {name: row.get("loss") for name, row in rows.items()}
    reference = losses["float32, explicit attention"]
    for name in ("bfloat16 autocast", "torch.compile", "flash attention"):
        assert losses[name] == pytest.approx(reference, abs=0.01)
    for name in ("padded vocabulary", "clipping, fused AdamW"):
        assert 0.5 * PADDING < losses[name] - reference < 1.5 * PADDING
    assert losses["padded vocabulary"] != losses["clipping, fused AdamW"]
    assert losses["the command by default"] < reference
    seconds = {name: row.get("first_step_seconds") for name, row in rows.items()}
    assert seconds["torch.compile"] > seconds["bfloat16 autocast"] + 1
    assert "aten::addmm" in (tmp_path / "tiny_kernels.txt").read_text()  # one of the most expensive
    assert "AdamW.step" in gzip.open(tmp_path / "trace_tiny.json.gz", "rt").read()  # the trace has the whole step


@pytest.mark.slow
def test_peers(run_script, tmp_path):
    """All programs are timed in the same way. If build-nanogpt is there, the losses show that ours trains like it."""
    peer = make_peer(tmp_path / "peer", train_gpt2=PEER_TRAINING)
    flags = ["--peer", peer, "--steps", 6, "--ours", "--compile on"]
    rows = run_training_benchmark(run_script, tmp_path, "peers.py", *flags)
    assert list(rows) == [
        "build-nanogpt", "build-nanogpt, use_compile", "train_gpt2.py", "train_gpt2.py --compile on",
    ]  # fmt: skip
    peer, peer_compiled, ours, ours_compiled = rows.values()
    assert peer["loss"] == pytest.approx(peer_compiled["loss"], abs=0.005)
    assert ours["loss"] == pytest.approx(ours_compiled["loss"], abs=0.005)
    assert peer["step_speedup"] == peer["program_speedup"] == 1
    for row in rows.values():
        assert 0 < row["p10"] <= row["median"] <= row["p90"]
        # the same FLOPs per token and peak for all; on a busy machine the measured peak may be too low for a bound
        assert row["mfu"] / row["tokens_per_second"] == pytest.approx(peer["mfu"] / peer["tokens_per_second"])
        assert row["tokens_per_second"] * row["median"] == pytest.approx(2048 * 1000)
        assert row["step_speedup"] == pytest.approx(peer["median"] / row["median"])
        assert row["program_speedup"] == pytest.approx(peer["seconds"] / row["seconds"])
        assert row["first_step_seconds"] < row["seconds"] and row["program_gigabytes"] > 0.001
    assert ours_compiled["first_step_seconds"] > ours["first_step_seconds"] + 1
    if "GPT2_PEER" in os.environ:
        losses = [row["runs"][0]["first_losses"] for row in (peer, ours)]
        differences = np.subtract(*losses).tolist()
        assert differences == pytest.approx([PADDING] * 6, abs=0.03)  # other rows or learning rates: 0.1 and more
        assert peer_compiled["first_step_seconds"] > ours["first_step_seconds"] + 1
    else:
        assert peer["median"] == 42.5 and peer["loss"] == 5 - 5 / 8  # what the script printed


def test_peers_refuses_another_script():
    """If a checkout is not the one for which the constants are known, wrong ones must not be measured."""
    with pytest.raises(UserError, match="train_gpt2.py contains 'B = 64' 2 times"):
        peers.substitute("B = 64\nB = 64\n", {"B = 64": "B = 4"}, "train_gpt2.py")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--peer", "nowhere"], "--peer nowhere has no train_gpt2.py"),
        (["--peer", measure.ROOT, "--total_batch_tokens", 1000], "--total_batch_tokens 1000"),
        (["--peer", measure.ROOT, "--steps", 2], "--steps 2"),
        (["--peer", measure.ROOT, "--repetitions", 0], "--repetitions 0"),
    ],
)
def test_bad_flags(flags, says, main, tmp_path):
    """The message of a mistake names the flag, and the exit code is 2."""
    code, _, stderr = main(peers, [*flags, "--out_dir", tmp_path])
    assert code == 2 and says in stderr


@pytest.mark.slow
@pytest.mark.parametrize("text, says", [(None, "no such file"), ("word " * 12_000, "less than 81,922 tokens")])
def test_too_little_text(text, says, run_script, tmp_path):
    """Text for less than two equal shards is refused, because build-nanogpt's loader crashes with a short one."""
    source = tmp_path / "missing"
    if text:
        source = tmp_path / "short.txt"
        source.write_text(text)
    flags = ["--peer", measure.ROOT, "--preset", "demo", "--source", source, "--out_dir", tmp_path]
    done = run_script("benchmarks/peers.py", *flags)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


# --- recipes.py -------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    """recipes.py sets the number of threads: restore it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bowl(run):
    """Return a made-up loss: best at certain hyperparameters, falling with tokens, faster with Muon."""
    s, speed = run.settings, 2 if run.settings.optimizer == "muon" else 1
    loss = (math.log2(s.lr / 0.016) / 9) ** 2 + (math.log(s.warmup / 0.1) / 9) ** 2 + 3 * abs(s.beta2 - 0.98)
    loss += (math.log(s.factor / 3) / 9) ** 2 + abs(s.weight_decay - 0.3) / 9 + abs(s.momentum - 0.9)
    return loss + (s.schedule != "linear to 0") / 9 - 0.1 * math.log(speed * run.tokens) + run.seed / 1000


def do_all(task, losses):
    """Do a task's runs with the losses of the bowl, one at a time, and return its result."""
    while True:
        result, missing = recipes.advance(task(), losses)
        if not missing:
            return result
        losses[missing[0]] = bowl(missing[0])


def test_both_searches_have_the_same_effort():
    """27 runs each, from the same start except for the momentum, within the same limits. Both find the best values."""
    runs, best = {}, {}
    for optimizer in ("adamw", "muon"):
        runs[optimizer] = {}
        best[optimizer] = do_all(lambda name=optimizer: recipes.search(name, recipes.PLAN), runs[optimizer])
    assert len(runs["adamw"]) == len(runs["muon"]) == 27
    starts = [next(iter(of_one)).settings for of_one in runs.values()]
    assert starts[0] == recipes.replace(starts[1], optimizer="adamw", momentum=0.9) and starts[1].momentum == 0.95
    for optimizer, of_one in runs.items():
        for run in of_one:
            assert (run.seed, run.tokens, run.batch, run.settings.optimizer) == (1, 1_572_864, 2048, optimizer)
            assert 0.95 <= run.settings.beta2 <= 0.999 and 0 <= run.settings.weight_decay <= 1
        s = best[optimizer]
        assert (s.lr, s.warmup, s.schedule, s.factor, s.momentum) == (0.016, 0.1, "linear to 0", 3, 0.9)
        assert 0.97 < s.beta2 < 0.99 and s.weight_decay == 0.3162


def test_a_point_is_confirmed_with_fresh_seeds():
    """Shares are added until they enclose AdamW's loss. The ratio is that of the bowl. No seed is used twice."""
    point = recipes.Point("C", 3, 192, 4, seeds=2, shares=(recipes.SHARES[0],))
    losses, plan = {}, recipes.Plan((recipes.PLAN.points[0], point))
    result = do_all(lambda: recipes.compare(point, plan), losses)
    assert list(result.muon) == sorted(recipes.SHARES[:3]) and result.ratios == pytest.approx([0.5, 0.5], rel=2e-3)
    own = [run for run in losses if run.n_embd == 192]
    assert {run.seed for run in own} == {1, 2, 3}
    searches = {name: [run for run in own if run.seed == 1 and run.settings.optimizer == name] for name in OPTIMIZERS}
    assert [len(runs) for runs in searches.values()] == [3, 3]  # the bowl is the same, so the first guess is the best
    assert {run.tokens for run in searches["adamw"]} == {5_308_416} == {2 * run.tokens for run in searches["muon"]}
    assert sum(run.tokens == 5_308_416 and run.seed > 1 for run in own) == 4
    far = recipes.Point("B", 2, 128, 4, 2048 * 64)  # its first guess is 8 times the best: two more runs each
    tuned, rates = do_all(lambda: recipes.tune_lr(result.settings["adamw"], far, 1.0, 2048), {})
    assert len(rates) == 5 and tuned.lr == min(rates) == 0.016 and tuned.beta2 == pytest.approx(0.98**64, abs=0.08)


def test_welch():
    """p is that of closed forms: freedom 1, 2 and 4. Unequal variances give fewer degrees of freedom."""
    for t in (0.1, 1.0, 2.776445, 8.0):
        assert recipes.student_p(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-6)
        assert recipes.student_p(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-6)
    assert recipes.student_p(3.169273, 10) == pytest.approx(0.01, rel=1e-5)  # a table's
    assert recipes.student_quantile(0.95, 4) == pytest.approx(2.776445, abs=1e-5)
    assert recipes.welch([1, 2, 3], [2, 3, 4]) == pytest.approx(0.287864, abs=1e-5)  # t = -1.2247, freedom 4
    assert recipes.welch([1, 1, 1], [2, 4]) == pytest.approx(1 - 2 / math.pi * math.atan(2))  # freedom 1, pooled: 3
    assert recipes.welch([1], [2, 4]) == recipes.welch([1, math.inf], [2, 4]) == 1
    assert recipes.welch([1, 1], [1, 1]) == 1 and recipes.welch([1, 1], [2, 2]) == 0


def test_intervals_and_claims():
    """The interval is Student's for the logarithm. A claim ends at the first share that is not significantly lower."""
    mean, low, high = recipes.mean_interval([math.exp(-0.6), math.exp(-0.5), math.exp(-0.4)])
    reach = 4.302653 * 0.1 / 3**0.5
    assert [mean, low, high] == pytest.approx([math.exp(-0.5 + change) for change in (0, -reach, reach)])
    assert recipes.mean_interval([0.5]) == (0.5, None, None)
    assert recipes.mean_interval([0.5, math.inf]) == (None, None, None)
    adamw, lower, alike = [1.0, 1.01, 0.99], [0.8, 0.81, 0.79], [0.98, 0.99, 1.0]

    def claim(muon):
        return recipes.at_most(recipes.Comparison(None, {}, {}, adamw, muon, []))

    assert claim({0.4: alike, 0.63: lower, 1.0: lower}) == 0.63 and claim({0.4: lower, 0.63: lower}) == 0.4
    assert claim({0.4: lower, 0.63: alike, 1.0: lower}) == 1.0 and claim({0.63: alike}) is None
    assert claim({1.0: [1.2, 1.21, 1.19]}) is None  # significantly higher


def test_the_paired_test():
    """Student's table has t = 4.541 for p = 0.02 and 5.841 for 0.01, with 3 degrees of freedom; here t is 4.70."""
    assert 0.01 < recipes.paired([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 1.0]) < 0.02
    assert recipes.paired([1.0, 2.0], [1.0, 2.0]) == 1 and recipes.paired([1.0, math.inf], [1.0, 2.0]) == 1


def test_the_crossing_is_interpolated():
    """Half of the way in loss is half of the way in the logarithm of tokens. A loss that is never reached gives inf."""
    points = [(0.25, 3.0), (0.5, 2.0), (1, 1.0)]
    assert recipes.crossing(points, 2.5) == pytest.approx(0.25 * 2**0.5)
    assert recipes.crossing(points, 2.0) == 0.5 and recipes.crossing(points, 3.5) == 0.25
    assert recipes.crossing(points, 0.9) == math.inf


def test_files_are_for_validation_or_for_training(tmp_path):
    """The first shard holds whole files, and none of them is in the others. The same text gives the same hash."""
    plan = recipes.TINY_PLAN
    folder, listing, digest = recipes.prepare_text(plan, tmp_path)
    assert recipes.prepare_text(plan, tmp_path)[1:] == (listing, digest)
    rows = [line.split() for line in listing.splitlines() if not line.startswith("#")]
    sizes = {split: [int(row[2]) for row in rows if row[0] == split] for split in ("val", "train")}
    shards = {split: recipes.fineweb.find_shards(folder, split) for split in sizes}
    for split, paths in shards.items():
        tokens = np.concatenate([recipes.fineweb.open_shard(path) for path in paths])
        assert len(tokens) == sum(sizes[split]) + len(sizes[split]) and tokens[0] == 256
        assert np.diff(np.flatnonzero(np.append(tokens, 256) == 256)).tolist() == [size + 1 for size in sizes[split]]
    assert len(shards["val"]) == 1 and sum(sizes["val"]) >= plan.val_tokens - len(sizes["val"])
    assert len({row[1] for row in rows}) == len(rows)
    files = {row[3]: row for row in rows}
    contents = Path(recipes.importlib.util.find_spec("tqdm").origin).with_name("std.py").read_bytes()
    assert files["tqdm/std.py"][1:3] == [recipes.hashlib.sha256(contents).hexdigest()[:16], str(len(contents))]


def test_records_survive_a_kill(tmp_path):
    """Half a line is a run that is missing. The next record begins on its own line. A run is claimed only once."""
    path = tmp_path / "ladder.jsonl"
    args = SimpleNamespace(out_dir=tmp_path, name="ladder", records=path)
    task = recipes.search("muon", recipes.PLAN)
    first = recipes.advance(task, {})[1][0]
    second, third = recipes.replace(first, seed=2), recipes.replace(first, seed=3)
    recipes.add_record(path, first, 1.5, text="x")
    recipes.add_record(path, second, math.inf, text="x")
    path.write_bytes(path.read_bytes()[:-20])
    assert [record["run"] for record in recipes.read_records(path)] == [first]
    recipes.add_record(path, third, math.inf, text="x")
    assert [(record["run"], record["val"]) for record in recipes.read_records(path)] == [
        (first, 1.5),
        (third, math.inf),
    ]
    with recipes.claim(second, args) as mine, recipes.claim(second, args) as again, recipes.claim(first, args) as done:
        assert (mine, again, done) == (True, False, False)
    assert [file.name for file in tmp_path.iterdir()] == ["ladder.jsonl"]


def test_recipes(main, tmp_path, one_thread):
    """A killed program continues. Another process shares the work. What is not run yet is not in the report."""
    command = [measure.ROOT / "benchmarks" / "recipes.py", "--tiny", "--out_dir", tmp_path]
    records = tmp_path / "ladder.jsonl"

    def start():
        return subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip

    process = start()
    while not records.exists() or len(records.read_text().splitlines()) < 9:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    records.write_text("".join(records.read_text().splitlines(keepends=True)[:9]) + '{"run": {"n_la')
    code, stdout, _ = main(recipes, [*command[1:], "--report"])
    result = read_report(tmp_path, "ladder", stdout)
    assert code == 0 and result["ratios"] == [] and {row["ratio"] for row in result["rows"]} == {"not run yet"}
    before = recipes.read_records(records)
    assert result["search of adamw"].startswith("4 runs of 3,072 tokens; best ") and len(before) == 9
    process = start()
    assert main(recipes, command[1:])[0] == process.wait() == 0
    _, stdout, _ = main(recipes, [*command[1:], "--report"])  # each of the two has written a report
    after = recipes.read_records(records)
    assert after[: len(before)] == before and len({record["run"] for record in after}) == len(after) > 40
    result = read_report(tmp_path, "ladder", stdout)
    assert [(r["parameters"], r["batch"], r["n"]) for r in result["ratios"]] == [
        (12288, 256, 2), (12288, 128, 2), (49152, 256, 1)
    ]  # fmt: skip
    for entry, row in zip(result["ratios"], result["rows"], strict=True):
        assert 0 < entry["mean"] == pytest.approx(math.exp(np.mean(np.log(row["ratios"]))))
        assert (entry["low"] is None) == (entry["n"] == 1) and entry["tokens_per_parameter"] in (0.25, 0.1)
    losses = {record["run"]: record["val"] for record in after}
    assert recipes.missing_runs(recipes.all_tasks(recipes.TINY_PLAN, "ABCD"), losses) == []
    assert (tmp_path / "ladder.png").exists()
    for optimizer in OPTIMIZERS:
        searches = [run for run in losses if run.seed == 1 and run.settings.optimizer == optimizer]
        assert sum((run.batch, run.n_embd) == (256, 32) for run in searches) == 4
    data_dir = recipes.prepare_text(recipes.TINY_PLAN, tmp_path)[0]
    assert recipes.train(after[0]["run"], recipes.TINY_PLAN, data_dir) == after[0]["val"]


def test_runs_on_another_text_are_refused(main, tmp_path, one_thread):
    """Losses on different texts must not be compared."""
    run = recipes.advance(recipes.search("adamw", recipes.TINY_PLAN), {})[1][0]
    recipes.add_record(tmp_path / "ladder.jsonl", run, 1.0, text="another")
    with pytest.raises(UserError, match=r"runs on another text \(another\)"):
        main(recipes, ["--tiny", "--out_dir", tmp_path])


def test_a_text_of_another_machine_can_be_used(tmp_path):
    """Its folder holds the list of its files, too."""
    folder, listing, digest = recipes.prepare_text(recipes.TINY_PLAN, tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / digest).rename(tmp_path / "there" / digest)
    there = tmp_path / "there" / digest / "shards"
    assert recipes.prepare_text(recipes.TINY_PLAN, tmp_path / "there", digest) == (there, listing, digest)
    for name in ("missing", "another"):
        shutil.copytree(tmp_path / "there" / digest, tmp_path / "there" / "another", dirs_exist_ok=True)
        with pytest.raises(UserError, match="is missing or of another text"):
            recipes.prepare_text(recipes.TINY_PLAN, tmp_path / "there", name)


def optimizers_after_steps(settings, steps=20, seed=0, watch=None, make=variants.make_changed):
    """Train a tiny model on random gradients. Return it. watch: a list that gets the weights after each step."""
    torch.manual_seed(seed)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=4, n_embd=32))
    config = train_gpt2.TrainConfig(optimizer="muon", lr=0.01, weight_decay=settings.weight_decay, max_steps=steps)
    optimizers = make(model, settings, config)
    for step in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (1 - step / steps)
            optimizer.step()
        if watch is not None:
            watch.append([parameter.detach().clone() for parameter in model.parameters()])
    return model


def test_no_change_is_the_presets_muon():
    """The class of the changes, without a change, does what support/muon.py does."""
    muon = recipes.Settings("muon", 0.01, 0.1, 0.95, "linear to 0", 1.0, 0.1, 0.95)
    plain = optimizers_after_steps(muon)

    def make(model, settings, config):
        adamw, muon = recipes.make_optimizers(model, settings, config)
        return [adamw, variants.ChangedMuon(muon, set(), config.max_steps, 8)]

    changed = optimizers_after_steps(muon, make=make)
    for a, b in zip(plain.parameters(), changed.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_changes_of_muon():
    """Each change has the effect that it is named for."""
    muon = recipes.Settings("muon", 0.01, 0.1, 0.95, "linear to 0", 1.0, 0.1, 0.95)
    plain = dict(optimizers_after_steps(muon).named_parameters())
    name = "transformer.h.0.attn.c_attn.weight"
    for change, tried in variants.changed(muon).items():
        weights = dict(optimizers_after_steps(tried).named_parameters())
        if tried.variant:
            moved = {key for key in plain if not torch.allclose(weights[key], plain[key], atol=1e-6)}
            assert moved, change
            assert not change.startswith("vectors") or moved == {key for key in plain if plain[key].dim() == 1}
            assert change != "head pairs" or moved == {name}
    history = []
    average = optimizers_after_steps(recipes.replace(muon, variant="tail average"), watch=history)
    before = []
    optimizers_after_steps(muon, watch=before)
    expected = [torch.stack(each).mean(dim=0) for each in zip(*before[17:])]  # after the steps 18, 19 and 20 of 20
    for found, mean in zip(average.parameters(), expected, strict=True):
        assert torch.allclose(found, mean, atol=1e-6)
    first = {}
    for change in ("", "NorMuon"):
        watched = []
        optimizers_after_steps(recipes.replace(muon, weight_decay=0.0, variant=change), steps=2, watch=watched)
        index = list(plain).index(name)
        first[change] = watched[1][index] - watched[0][index]
    assert first["NorMuon"].norm() == pytest.approx(first[""].norm().item(), rel=1e-3)
    assert first["NorMuon"].norm(dim=1).std() < 0.7 * first[""].norm(dim=1).std()  # its rows are more alike
    momenta = []

    def make(*args):
        optimizers = variants.make_changed(*args)
        optimizers[1].register_step_post_hook(lambda optimizer, *_: momenta.append(optimizer.momentum))
        return optimizers

    optimizers_after_steps(recipes.replace(muon, variant="momentum warmup"), steps=40, make=make)
    momenta = momenta[::2]  # torch calls the hook for the class's step and for the one that it extends
    assert momenta[:5] == pytest.approx([0.85, 0.875, 0.9, 0.925, 0.95]) and set(momenta[4:]) == {0.95}
    heavy = recipes.replace(muon, weight_decay=1.0)
    norms = {
        change: dict(optimizers_after_steps(recipes.replace(heavy, variant=change)).named_parameters())[name].norm()
        for change in ("", "cautious", "falling decay")
    }
    assert norms["cautious"] > norms[""] and norms["falling decay"] > norms[""]  # both decay less


def test_ema_nesterov_looks_ahead_only_in_the_middle():
    """The point ahead is that of the paper's formulas, for the same steps from point to point."""
    weight, steps = torch.nn.Parameter(torch.zeros(3)), 100
    model = torch.nn.ParameterList([weight])
    optimizer = variants.EMANesterov(model, steps)
    base, average, ahead = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    for done in range(1, steps + 1):
        lr, move = 1 - done / 200, torch.full((3,), float(done))
        with torch.no_grad():
            weight += lr * move
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        new = ahead + lr * move  # A(x + beta m)
        average = average + 0.32 * (new - base - average)
        base, ahead = new, new
        if 16 <= done < 76:
            ahead = new + 0.6 * lr / (1 - 16 / 200) * average
        assert torch.allclose(weight, ahead), done
    assert torch.equal(weight, base)


def test_variants(main, tmp_path, one_thread):
    """All three questions are answered, from the searches that recipes.py has done."""
    known = tmp_path / "ladder.jsonl"
    assert main(recipes, ["--tiny", "--out_dir", tmp_path, "--parts", "C"])[0] == 0  # only the searches
    code, stdout, _ = main(variants, ["--tiny", "--out_dir", tmp_path, "--known", known])
    result = read_report(tmp_path, "variants", stdout)
    assert code == 0 and [row["n"] for row in result["rows"] if row["question"] == "tuned"] == [5, 5, 3, 3] * 2
    names = {row["name"] for row in result["rows"] if row["question"] == "changes" and row["n"] == 10}
    assert {"searched", "gpt2-fast", *variants.changed(recipes.Settings("muon", *[0.1] * 7))} <= names
    assert len([row for row in result["rows"] if row["question"] == "transfer"]) == 4
    runs = {record["run"] for record in recipes.read_records(tmp_path / "variants.jsonl")}
    assert not runs & {record["run"] for record in recipes.read_records(known)}  # none was done again
    assert variants.best_rate({1: 2.0, 2: 1.0, 4: 2.0}) == 2 and variants.best_rate({1: 1.0, 2: 2.0}) is None
    assert 2 < variants.best_rate({1: 2.0, 2: 1.0, 4: 1.5}) < 2 * 2**0.5


@pytest.mark.parametrize("name, beta1", [("gpt2-fast", 0.95), ("gpt2", 0.9), ("gpt2-tuned", 0.8)])
def test_the_preset_is_what_is_compared(name, beta1, tmp_path, text_shards, one_thread):
    """With a preset's hyperparameters, recipes.py trains as train_gpt2.py does."""
    model = "--n_layer 2 --n_head 4 --n_embd 128 --block_size 128 --seq_len 128 --no_flash --compile off".split()
    run = "--total_batch_tokens 2048 --micro_batch 16 --lr 0.016 --max_steps 20 --warmup_steps 1 --seed 2".split()
    quiet = "--val_tokens 4096 --sample_interval 0 --hellaswag_file none --eval_interval 100 --device cpu".split()
    files = ["--data_dir", str(text_shards), "--out_dir", str(tmp_path / "out")]
    train_gpt2.main(["--preset", name, *model, *run, *quiet, *files])
    schedule = "cosine to 0.1" if name == "gpt2" else "linear to 0"
    optimizer = train_gpt2.PRESETS[name][1].optimizer
    settings = recipes.Settings(optimizer, 0.016, 0.05, 0.95, schedule, 1.0, 0.1, beta1)
    plan = recipes.Plan((), val_tokens=4096)
    loss = recipes.train(recipes.Run(2, 128, 2048, 20 * 2048, 2, settings), plan, text_shards)
    assert loss == pytest.approx(read_log(tmp_path / "out" / "log.txt")["val"][1][-1], abs=1e-4)


def test_variants_start_from_the_presets():
    """Their warmup, schedule, weight decay and averages, as shares of the run; the learning rate is searched."""
    for name, settings in {"gpt2": variants.LECTURE, "gpt2-tuned": variants.TUNED, "gpt2-fast": variants.FAST}.items():
        preset = train_gpt2.PRESETS[name][1]
        assert settings.warmup == pytest.approx(preset.warmup_steps / preset.max_steps, rel=0.01)
        assert recipes.SCHEDULES[settings.schedule] == (preset.schedule, preset.min_lr_ratio)
        assert (settings.optimizer, settings.weight_decay) == (preset.optimizer, preset.weight_decay)
        momentum = preset.betas[0] if preset.optimizer == "adamw" else train_gpt2.Muon.momentum
        assert (settings.momentum, settings.factor) == (momentum, 1.0)
        assert settings.beta2 == preset.betas[1] or name == "gpt2-tuned"  # docs/recipe.md says why


def test_hyperparameters_reach_the_optimizers():
    """Each weight is in one group, with the learning rate and the decay that the settings give it."""
    shape = train_gpt2.GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=32)
    for optimizer in OPTIMIZERS:
        model = train_gpt2.GPT(shape)
        settings = recipes.Settings(optimizer, 0.01, 0.1, 0.99, "linear to 0", 3.0, 0.5, 0.8)
        config = train_gpt2.TrainConfig(optimizer=optimizer, lr=0.01, weight_decay=0.5)
        optimizers = recipes.make_optimizers(model, settings, config)
        model(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long))[1].backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for each in optimizers:
            for group in each.param_groups:
                group["lr"] = 0.01  # as train_step sets it
            each.step()
        found = {}
        for each in optimizers:
            for group in each.param_groups:
                for parameter in group["params"]:
                    assert id(parameter) not in found
                    found[id(parameter)] = (group["lr"], group["weight_decay"])
        names = {name: found[id(p)] for name, p in model.named_parameters()}
        assert len(found) == len(names) == len(before)
        assert names["transformer.wte.weight"] == names["transformer.wpe.weight"] == (0.03, 0.5)
        assert names["transformer.h.0.mlp.c_fc.weight"] == (0.01, 0.5)
        assert names["transformer.h.0.mlp.c_fc.bias"] == (0.03 if optimizer == "muon" else 0.01, 0.0)
        moved = (before["transformer.wte.weight"][0] - model.transformer.wte.weight[0]).abs().max().item()
        assert 0.025 < moved < 0.035  # AdamW's first step has the size of the learning rate
        if optimizer == "muon":
            assert optimizers[1].momentum == 0.8 and train_gpt2.Muon.momentum == 0.95


# --- gpu.sh -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gpu_script(tmp_path, hellaswag_file):
    """The dry run goes through all parts of a measurement on a GPU, and leaves one folder of results."""
    peer = make_peer(tmp_path / "peer", train_gpt2=PEER_TRAINING, hellaswag=PEER_HELLASWAG)
    flags = ["--dry_run", "--peer", peer, "--hellaswag", hellaswag_file, "--out", tmp_path / "out"]
    command = [measure.ROOT / "benchmarks" / "gpu.sh", *flags]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=1200)
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert done.returncode == 0, summary + done.stderr
    parts = "machine", "tests", "step", "ladder", "peers", "hellaswag_speed", "shards", "training"
    assert [line.split(":")[0] for line in summary.splitlines()] == [*parts] and summary.count(": ok, ") == len(parts)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    device = measure.pick_device("auto")
    assert names >= {"log.txt", "curve.png", f"step_{device}_demo.json", f"ladder_{device}_demo.md"}
    assert "aten::mm" in (tmp_path / "out" / f"step_{device}_demo_kernels.txt").read_text()


# --- identical.py -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_identical(tmp_path, capsys):
    """The same code gives the same results, also when resumed. Another learning rate is reported as a difference."""
    tree, git = tmp_path / "tree", ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for name in ("train_gpt2.py", "fineweb.py", "hellaswag.py"):
        tree.mkdir(exist_ok=True)
        shutil.copy(measure.ROOT / name, tree)
    shutil.copytree(measure.ROOT / "support", tree / "support", ignore=shutil.ignore_patterns("__pycache__"))
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], cwd=tree, check=True)
    runs = {"tiny": (1, identical.SMALL)}
    assert identical.compare(tree, "HEAD", runs, {"resumed": "tiny"})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["tiny", "resumed"]
    assert all(line.endswith("same") for line in lines)
    script = (tree / "train_gpt2.py").read_text()
    (tree / "train_gpt2.py").write_text(
        script.replace("def get_lr(step, config):", "def get_lr(step, config, x=0):\n    step += 1")
    )
    assert not identical.compare(tree, "HEAD", runs, {})
    assert capsys.readouterr().out.endswith("DIFFERENT\n")
