"""The benchmarks of speed at a tiny size: they run to their end, and what they write makes sense. Minutes, so slow."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
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
    assert "AdamW.step" in (tmp_path / "tiny_kernels.txt").read_text()
    assert (tmp_path / "trace_tiny.json.gz").read_bytes()[:2] == b"\x1f\x8b"


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
