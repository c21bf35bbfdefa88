import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fineweb
import sample
from train_gpt2 import GPT, ConfigError, GPTConfig, save_checkpoint

ROOT = Path(__file__).parent.parent


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
    greedy = run_script("sample.py", "--model", run_folder, *flags, "--temperature", 0)
    likeliest = run_script("sample.py", "--model", run_folder, *flags, "--top_p", 1e-6)
    assert likeliest.stdout == greedy.stdout != newest.stdout


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
    [
        (["--model", "/nowhere/model"], "/nowhere/model"),
        (["--prompt", ""], "--prompt"),
        (["--prompt_file", "/nowhere/prompt"], "/nowhere/prompt"),
        (["--prompt_file", sys.executable], "UTF-8"),
        (["--top_k", "0"], "--top_k"),
        (["--top_p", "0"], "--top_p"),
    ],
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


def test_prompts_from_files(run_folder, tmp_path):
    """A file, and standard input as -, mean the same as the flag; the line break at their end is not of the prompt."""
    (tmp_path / "prompt").write_text("héllo\n", encoding="utf-8")
    command = [sys.executable, ROOT / "sample.py", "--model", run_folder, "--max_new_tokens", "9", "--device", "cpu"]
    texts = []
    for flags in (["--prompt", "héllo"], ["--prompt_file", tmp_path / "prompt"], ["--prompt_file", "-"]):
        done = subprocess.run([*command, *flags], input="héllo\n".encode(), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        texts.append(done.stdout)
    assert texts[0] == texts[1] == texts[2] and "\nhéllo".encode() in texts[0]


def test_text_is_shown_as_it_comes(capsys):
    """Each character of the first sample must be there before the next token is drawn, and never a part of one."""
    decode = fineweb.get_encoding("bytes").decode
    seen, text = [], "naïve €5"

    def stream():
        for byte in text.encode():
            seen.append(capsys.readouterr().out)
            yield torch.tensor([[byte], [ord("x")]])

    sample.show(torch.tensor([[ord(">")], [ord("<")]]), stream(), decode)
    seen.append(capsys.readouterr().out)
    assert seen[0] == "--- sample 0\n" and seen[1] == ">" and seen[2:6] == ["n", "a", "", "ï"]
    assert "".join(seen) == f"--- sample 0\n>{text}\n--- sample 1\n<{'x' * len(text.encode())}\n"


def test_a_reader_who_has_had_enough(run_folder):
    """`| head` closes the pipe: no traceback."""
    flags = "--num_samples 40 --max_new_tokens 3000 --device cpu"
    command = f"'{sys.executable}' '{ROOT / 'sample.py'}' --model '{run_folder}' {flags} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("--- sample 0\n", "")


def test_int8_weights(run_folder, run_script):
    """--int8 keeps the blocks' matrices in a quarter of the memory, and the logits within a few hundredths."""
    pytest.importorskip("torchao")
    flags = ["--model", run_folder, "--max_new_tokens", 20, "--device", "cpu"]
    samples = [run_script("sample.py", *flags, *int8) for int8 in ([], ["--int8"])]
    assert samples[1].returncode == 0 and samples[1].stdout != samples[0].stdout, samples[1].stderr
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=64))
    ids = torch.randint(0, 257, (2, 32))
    before, embedding = model(ids)[0].detach(), model.transformer.wte.weight
    sample.quantize(model)
    for linear in (model.transformer.h[1].mlp.c_fc, model.lm_head):
        assert {getattr(linear.weight, name).dtype for name in linear.weight.__tensor_flatten__()[0]} >= {torch.int8}
    after = model(ids)[0].detach()
    assert model.transformer.wte.weight is embedding and embedding.dtype == torch.float32
    assert 0 < (after - before).norm() < 0.02 * before.norm()
    assert model.generate(ids[:, :3], 5).shape == (2, 8)


def test_int8_without_torchao(monkeypatch):
    """The extra package is named where it is missing."""
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)  # as if not installed
    with pytest.raises(ConfigError, match="pip install torchao"):
        sample.quantize(GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=8)))
