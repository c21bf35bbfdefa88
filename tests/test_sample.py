import shutil

import pytest
import torch

import fineweb
from train_gpt2 import GPT, GPTConfig, save_checkpoint


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """An output folder with two checkpoints of a bytes model and an unfinished third."""
    folder = tmp_path_factory.mktemp("run")
    for seed, step in enumerate((2, 10)):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=1, n_head=1, n_embd=16))
        save_checkpoint(folder, model, fineweb.get_encoding("bytes"), {"step": step})
    (folder / "checkpoints" / ".step_000020").mkdir()
    return folder


def test_samples_of_the_newest_checkpoint(run_folder, run_script):
    """An output folder means its newest complete checkpoint; the seed fixes the samples, past block_size too."""
    flags = ["--prompt", "héllo", "--num_samples", 2, "--max_new_tokens", 50, "--device", "cpu"]
    newest = run_script("sample.py", "--model", run_folder, *flags)
    assert newest.returncode == 0, newest.stderr
    assert newest.stdout.count("--- sample") == newest.stdout.count("\nhéllo") == 2
    named = run_script("sample.py", "--model", run_folder / "checkpoints" / "step_000010", *flags)
    older = run_script("sample.py", "--model", run_folder / "checkpoints" / "step_000002", *flags)
    assert named.stdout == newest.stdout != older.stdout


def test_a_folder_without_tokenizer_means_gpt2(shared_data, run_script, tmp_path):
    """Folders of other programs often hold weights alone: with GPT-2's 50,257 ids their tokenizer is known."""
    GPT(GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path / "gpt2")
    done = run_script("sample.py", "--model", tmp_path / "gpt2", "--max_new_tokens", 3, "--device", "cpu")
    assert done.returncode == 0 and done.stdout.count("Hello, I'm a language model,") == 4
    GPT(GPTConfig(block_size=16, vocab_size=300, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path / "other")
    done = run_script("sample.py", "--model", tmp_path / "other", "--device", "cpu")
    assert done.returncode == 2 and "no tokenizer files" in done.stderr


@pytest.mark.parametrize(
    "flags, reason",
    [(["--model", "/nowhere/model"], "/nowhere/model"), (["--prompt", ""], "--prompt"), (["--top_k", "0"], "--top_k")],
)
def test_mistakes_are_one_line(run_folder, run_script, flags, reason):
    """A wrong model or flag ends in one line that names it and code 2."""
    done = run_script("sample.py", "--model", run_folder, *flags, HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and reason in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_broken_tokenizer_is_named(run_folder, run_script, tmp_path):
    """A cut tokenizer.json ends in one line, too."""
    shutil.copytree(run_folder / "checkpoints" / "step_000010", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    done = run_script("sample.py", "--model", tmp_path / "model", "--device", "cpu")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "tokenizer" in done.stderr
