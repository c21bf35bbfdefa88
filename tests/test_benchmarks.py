"""The benchmarks at a tiny size: they run to their end, and what they write makes sense. Minutes, so slow."""

import gzip
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import save_model

import fineweb
from support.runlog import read_log
from train_gpt2 import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import recipes  # noqa: E402

pytestmark = pytest.mark.slow
PADDING = math.log(384 / 257)  # what the demo's loss gains at the start where padding ids take part in it


def run_benchmark(run_script, tmp_path, program, *flags):
    """Run a benchmark on the demo's model; return its rows by name."""
    flags = [*flags, "--preset", "demo", "--repetitions", 1, "--out_dir", tmp_path, "--name", "tiny"]
    done = run_script(f"benchmarks/{program}", *flags, timeout=1200)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "tiny.json").read_text())
    assert program in result["command"] and torch.__version__ in result["versions"]
    assert (tmp_path / "tiny.md").read_text() in done.stdout and (tmp_path / "tiny.png").stat().st_size > 10_000
    return {next(iter(row.values())): row for row in result["rows"]}


def test_ladder(run_script, tmp_path):
    """Every rung of the machine's is measured, on the same rows from the same seed, and the last is profiled."""
    rows = run_benchmark(run_script, tmp_path, "ladder.py", "--steps", 6, "--profile")
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
    assert losses["the command as it is"] < reference
    seconds = {name: row.get("first_step_seconds") for name, row in rows.items()}
    assert seconds["torch.compile"] > seconds["bfloat16 autocast"] + 1
    assert "aten::addmm" in (tmp_path / "tiny_kernels.txt").read_text()  # among the costliest
    assert "AdamW.step" in gzip.open(tmp_path / "trace_tiny.json.gz", "rt").read()  # and all of a step


def test_peers(run_script, tmp_path):
    """build-nanogpt (at GPT2_PEER) and ours train the same rows by the same recipe, timed in the same way."""
    if "GPT2_PEER" not in os.environ:
        pytest.skip("GPT2_PEER names no checkout of build-nanogpt")
    flags = ["--peer", os.environ["GPT2_PEER"], "--steps", 6, "--ours", "--compile off", "--ours", "--compile on"]
    rows = run_benchmark(run_script, tmp_path, "peers.py", *flags)
    peer, peer_compiled, plain, ours, ours_compiled = rows.values()
    assert list(rows)[:2] == ["build-nanogpt", "build-nanogpt, use_compile"]
    assert list(rows)[2:] == ["train_gpt2.py", "train_gpt2.py --compile off", "train_gpt2.py --compile on"]
    assert peer["loss"] == pytest.approx(peer_compiled["loss"], abs=0.005)
    assert plain["loss"] == pytest.approx(ours["loss"], abs=0.005)
    assert ours["loss"] == pytest.approx(ours_compiled["loss"], abs=0.005)
    differences = [theirs - own for theirs, own in zip(peer["runs"][0]["losses"], plain["runs"][0]["losses"])]
    assert differences == pytest.approx([PADDING] * 6, abs=0.03)  # other rows or rates: 0.1 and more
    assert peer["step_speedup"] == peer["program_speedup"] == 1
    for row in rows.values():
        assert 0 < row["p10"] <= row["median"] <= row["p90"] and 0 < row["mfu"] < 1
        assert row["tokens_per_second"] * row["median"] == pytest.approx(2048 * 1000)
        assert row["step_speedup"] == pytest.approx(peer["median"] / row["median"])
        assert row["program_speedup"] == pytest.approx(peer["seconds"] / row["seconds"])
        assert row["first_step_seconds"] < row["seconds"] and row["training_gigabytes"] > 0.01
    assert (
        min(peer_compiled["first_step_seconds"], ours_compiled["first_step_seconds"]) > ours["first_step_seconds"] + 1
    )


def test_inference(run_script, tmp_path):
    """One layer of each program, a few tokens: what the table says follows from what was timed and counted."""
    if "GPT2_PEER" not in os.environ:
        pytest.skip("GPT2_PEER names no checkout of build-nanogpt")
    fineweb.prepare("stdlib", tmp_path / "data", "bytes", shard_tokens=20_000, max_tokens=40_000, workers=1)
    shape = GPTConfig(block_size=64, vocab_size=257, n_layer=1, n_head=1, n_embd=32)
    save_model(tmp_path / "log", GPT(shape))
    flags = ["--peer", os.environ["GPT2_PEER"], "--trained", tmp_path / "log", "--data", tmp_path / "data"]
    flags += ["--n_layer", 1, "--max_new_tokens", 16, "--repetitions", 1, "--rows", 4, "--out_dir", tmp_path]
    done = run_script("benchmarks/inference.py", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "inference_cpu.json").read_text())
    peer, theirs, ours, *others = result["rows"]
    assert peer["to_peer"] == theirs["to_transformers"] == 1 and len(others) == 5
    assert ours["to_peer"] == pytest.approx(peer["milliseconds"] / ours["milliseconds"])
    block, head = 12 * 768**2 + 9 * 768, 50304 * 768
    assert ours["megabytes"] == pytest.approx(4e-6 * (block + head + 1024 * 768), rel=0.001)
    rate = float(result["floor"].split(" at ")[1].split()[0]) * 1e9
    read = ours["of_floor"] * ours["milliseconds"] / 1e3 * rate
    assert read == pytest.approx(4 * (block + head), rel=0.01)
    assert all(abs(row["loss_change"]) < 0.05 for row in others) and ours["loss_change"] == 0


def test_peers_refuses_another_script(run_script, tmp_path):
    """A checkout that is not the one that the constants are known of must not be measured with wrong ones."""
    (tmp_path / "train_gpt2.py").write_text("total_batch_size = 524288\nB = 64\nB = 64\n")
    done = run_script("benchmarks/peers.py", "--peer", tmp_path, "--preset", "demo", "--steps", 4)
    assert done.returncode != 0 and "has 2 times 'B = 64'" in done.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--peer", "nowhere"], "--peer nowhere holds no train_gpt2.py"),
        (["--peer", ROOT, "--total_batch_tokens", 1000], "--total_batch_tokens 1000"),
        (["--peer", ROOT, "--steps", 2], "--steps 2"),
        (["--peer", ROOT, "--source", "nowhere"], "nowhere is neither a file"),
    ],
)
def test_bad_flags(flags, says, run_script):
    """A mistake is told in a line that names the flag, with exit code 2."""
    done = run_script("benchmarks/peers.py", *flags)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_short_text(run_script, tmp_path):
    """Text for less than two equal shards is refused: build-nanogpt's loader crashes on a short one."""
    (tmp_path / "short.txt").write_text("word " * 12_000)
    flags = ["--peer", ROOT, "--preset", "demo", "--source", tmp_path / "short.txt"]
    done = run_script("benchmarks/peers.py", *flags)
    assert done.returncode == 2 and "short.txt has less than 81,922 tokens" in done.stderr


@pytest.fixture
def run_recipes(tmp_path, monkeypatch):
    """run_recipes() -> a table at ten steps a run: its result, rows by name, and the lines of its cache."""
    names = ["adamw", "adamw-warmup0.25", "fast", "ramp", "distilled", "whole-rows"]
    monkeypatch.setattr(recipes, "RECIPES", {name: recipes.RECIPES[name] for name in names})
    flags = ["--tokens", 20_480, "--val_tokens", 4096, "--out_dir", tmp_path]
    monkeypatch.setattr(sys, "argv", ["recipes.py", *map(str, flags)])
    threads = torch.get_num_threads()

    def run():
        recipes.main()
        result = json.loads((tmp_path / "recipes.json").read_text())
        lines = (tmp_path / "recipes.jsonl").read_text().splitlines()
        return result, {row["recipe"]: row for row in result["rows"]}, list(map(json.loads, lines))

    yield run
    torch.set_num_threads(threads)


def test_recipes(run_recipes, tmp_path):
    """Each recipe searches its rate, finalists run thrice on the same tokens, and a killed table goes on as it was."""
    result, rows, records = run_recipes()
    assert (tmp_path / "recipes.png").stat().st_size > 10_000
    for row in rows.values():
        assert row["searched"][str(row["lr"])] == row["search_loss"] == min(row["searched"].values())
        rates = [float(rate) for rate in row["searched"]]
        assert min(rates) < row["lr"] < max(rates) or len(rates) >= 8
        for share, runs in row["runs"].items():
            assert [run["seed"] for run in runs] == [2, 3, 4] and {run["lr"] for run in runs} == {row["lr"]}
            assert all(run["tokens"] == round(float(share) * 20_480) for run in runs)
            assert all(run["curve"][-1] == [run["tokens"] // 2048 * 2048, run["val"]] for run in runs)
    winner = rows[result["winner"]]
    assert min(map(float, winner["runs"])) < 0.5 and 0 < result["tokens_ratio_to_adamw"] < 1
    assert result["tokens_ratio_to_adamw"] == pytest.approx(sum(winner["ratio"][2]) / 3)
    cache = (tmp_path / "recipes.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "recipes.jsonl").write_text("".join(cache[:-2]))
    _, rows_again, again = run_recipes()
    assert len(again) == len(records) and again[:-2] == records[:-2]
    assert [record["curve"] for record in again] == [record["curve"] for record in records]


def test_the_crossing_is_interpolated():
    """Half way in loss is half way in the logarithm of tokens; better than all is the least share, worse is never."""
    points = [(0.25, 3.0), (0.5, 2.0), (1, 1.0)]
    assert recipes.crossing(points, 2.5) == pytest.approx(0.25 * 2**0.5)
    assert recipes.crossing(points, 2.0) == 0.5 and recipes.crossing(points, 3.5) == 0.25
    assert recipes.crossing(points, 0.9) == math.inf


def test_a_target_that_is_not_reached():
    """A seed that stays above the default's loss makes the share infinite, not the report fail."""
    runs = {share: [{"val": loss + seed / 10} for seed in range(3)] for share, loss in ((0.5, 2.0), (1, 1.0))}
    default = {"runs": {1: [{"val": 1.5}] * 3}}
    mean, spread, shares = recipes.tokens_ratio({"runs": runs}, default)
    assert shares == pytest.approx([0.5 ** (0.5 - seed / 10) for seed in range(3)]) and 0 < spread < mean < 1
    default["runs"][1][0] = {"val": 0.9}
    assert recipes.tokens_ratio({"runs": runs}, default)[:2] == [math.inf, math.inf]


def test_the_preset_is_what_was_measured(run_script, tmp_path):
    """The winner's recipe in the table and train_gpt2.py's preset of it must be the same training."""
    model = "--n_layer 2 --n_head 4 --n_embd 128 --block_size 128 --seq_len 128 --no_flash --compile off".split()
    run = "--total_batch_tokens 2048 --micro_batch 16 --lr 0.016 --max_steps 20 --warmup_steps 1 --seed 2".split()
    quiet = "--val_tokens 4096 --sample_interval 0 --hellaswag_file none --eval_interval 100 --device cpu".split()
    fineweb.prepare("stdlib", tmp_path / "data", "bytes", shard_tokens=100_000, max_tokens=400_000, workers=1)
    flags = ["--preset", "gpt2-fast", *model, *run, *quiet, "--data_dir", tmp_path / "data"]
    done = run_script("train_gpt2.py", *flags, "--out_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    args = SimpleNamespace(data=tmp_path / "data", val_tokens=4096)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as both programs: other sums round otherwise, and Muon magnifies that
    _, curve = recipes.train(recipes.RECIPES[recipes.WINNER], 0.016, 2, 20 * 2048, args)
    torch.set_num_threads(threads)
    assert curve[-1][1] == pytest.approx(read_log(tmp_path / "out" / "log.txt")["val"][1][-1], abs=1e-4)
