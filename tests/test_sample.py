import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from helpers import TINY, save_model
from transformers import PreTrainedTokenizerFast

import fineweb
import sample
import train_gpt2
from support.common import UserError
from support.texts import decode_prompt
from support.tokenizer import encode_prompt, load_tokenizer
from train_gpt2 import GPT, GPTConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """An output folder with two checkpoints of a bytes model and an incomplete third one."""
    folder = tmp_path_factory.mktemp("run")
    for seed, step in enumerate((2, 10)):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=1, n_head=1, n_embd=16))
        save_model(folder, model, step)
    (folder / "checkpoints" / ".step_000020").mkdir()
    return folder


def test_samples_of_the_newest_checkpoint(run_folder, main):
    """An output folder means its newest complete checkpoint. The seed determines the samples, also past block_size."""

    def text(folder, *more):
        flags = ["--prompt", "héllo", "--num_samples", 2, "--max_new_tokens", 50, "--device", "cpu"]
        code, stdout, stderr = main(sample, ["--model", folder, *flags, *more])
        assert (code, stderr) == (0, "")
        return stdout

    newest = text(run_folder)
    assert newest.count("--- sample") == newest.count("\nhéllo") == 2
    older, named = (text(run_folder / "checkpoints" / step) for step in ("step_000002", "step_000010"))
    assert named == newest != older
    greedy = text(run_folder, "--temperature", 0)
    assert text(run_folder, "--top_p", 1e-6) == greedy != newest


def test_a_folder_without_tokenizer_means_gpt2(shared_data, main, tmp_path):
    """Other programs often save weights only. If such a folder has 50,257 ids, its tokenizer is GPT-2's."""
    GPT(GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path / "gpt2")
    code, stdout, _ = main(sample, ["--model", tmp_path / "gpt2", "--max_new_tokens", 3, "--device", "cpu"])
    assert code == 0 and stdout.count("Hello, I'm a language model,") == 4
    GPT(GPTConfig(block_size=16, vocab_size=300, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path / "other")
    code, _, stderr = main(sample, ["--model", tmp_path / "other", "--device", "cpu"])
    assert code == 2 and "no tokenizer files" in stderr


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--model", "/nowhere/model"], "/nowhere/model"),
        (["--prompt", ""], "--prompt"),
        (["--prompt_file", "/nowhere/prompt"], "/nowhere/prompt"),
        (["--prompt_file", sys.executable], "UTF-8"),
        (["--prompt_file", ""], "--prompt_file"),
        (["--prompt", "a\udcff"], "--prompt is not UTF-8 text"),  # how Python represents a byte that is not text
        (["--top_k", "0"], "--top_k"),
        (["--top_p", "0"], "--top_p"),
        (["--dtype", "int4"], "--dtype int4 is unknown: give one of auto, float32, bfloat16, int8"),
        (["--int8", "--dtype", "float32"], "--int8 means --dtype int8"),
    ],
)
def test_mistakes_are_one_line(run_folder, main, flags, reason):
    """A wrong model or flag gives one line that names it, and exit code 2."""
    code, stdout, stderr = main(sample, ["--model", run_folder, *flags])
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ") and reason in stderr and len(stderr.splitlines()) == 1


def test_weights_that_are_not_finite_are_named(main, tmp_path):
    """Sampling from such weights would end in an assertion of torch."""
    model = GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=1, n_head=1, n_embd=8))
    model.transformer.ln_f.weight.data[0] = math.nan
    save_model(tmp_path, model)
    code, _, stderr = main(sample, ["--model", tmp_path, "--device", "cpu"])
    assert code == 2 and "has weights that are not finite" in stderr and len(stderr.splitlines()) == 1


def test_a_broken_tokenizer_is_named(run_folder, main, tmp_path):
    """A truncated tokenizer.json gives one line, too."""
    shutil.copytree(run_folder / "checkpoints" / "step_000010", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    code, _, stderr = main(sample, ["--model", tmp_path / "model", "--device", "cpu"])
    assert code == 2 and len(stderr.splitlines()) == 1 and "tokenizer" in stderr


def test_prompts_from_files(run_folder, main, tmp_path):
    """A file and standard input (-) work like the flag. A final line break is not part of the prompt."""
    (tmp_path / "prompt").write_text("héllo\n", encoding="utf-8")
    flags = ["--model", run_folder, "--max_new_tokens", "9", "--device", "cpu"]
    expected = main(sample, [*flags, "--prompt", "héllo"])
    assert expected[0] == 0 and "\nhéllo" in expected[1]
    assert main(sample, [*flags, "--prompt_file", tmp_path / "prompt"]) == expected
    command = [sys.executable, ROOT / "sample.py", *flags, "--prompt_file", "-"]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii:replace"}
    done = subprocess.run(command, input="héllo\r\n".encode(), capture_output=True, env=os.environ | plain)
    assert (done.returncode, done.stderr.decode()) == (0, "")
    assert done.stdout.decode() == expected[1].encode("ascii", "replace").decode()  # a terminal that shows ASCII only
    done = subprocess.run(command, input=b"a\xff", capture_output=True)
    assert done.returncode == 2 and b"--prompt_file - is not UTF-8 text" in done.stderr


def test_text_is_shown_as_it_comes(capsys):
    """Each character of the first sample is printed before the next token is sampled, and never a part of one."""
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


@pytest.mark.parametrize("kind", ["Metaspace", "WordPiece"])
def test_words_that_read_otherwise_behind_others(kind, main, tmp_path):
    """Some tokenizers write a word differently at the start of a text. Growing text must equal the whole text."""
    words = {"▁the": 0, "▁quick": 1, "the": 2, "quick": 3, "##ly": 4, "[UNK]": 5}
    model = tokenizers.models.WordPiece(words, unk_token="[UNK]")
    tokenizer, parts = tokenizers.Tokenizer(model), getattr(tokenizers.pre_tokenizers, kind, None)
    tokenizer.pre_tokenizer = parts() if parts else tokenizers.pre_tokenizers.Whitespace()
    tokenizer.decoder = getattr(tokenizers.decoders, kind)()
    GPT(GPTConfig(block_size=64, vocab_size=6, n_layer=1, n_head=1, n_embd=16)).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    flags = ["--prompt", "the quick", "--num_samples", 2, "--top_k", 1, "--max_new_tokens", 9, "--device", "cpu"]
    code, stdout, stderr = main(sample, ["--model", tmp_path, *flags])
    assert code == 0, stderr
    if kind == "WordPiece":
        assert main(sample, ["--model", tmp_path, "--prompt", " "])[0] == 2  # no word gives no token
    _, first, _, second = stdout.splitlines()
    assert first == second and first.startswith("the quick ")


def test_text_comes_through_a_pipe(run_folder):
    """A program that reads from a pipe gets the text while it grows, and not only at the end."""
    flags = "--num_samples 1 --max_new_tokens 2000 --device cpu".split()
    command = [sys.executable, ROOT / "sample.py", "--model", run_folder, *flags]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=buffered) as process:
        first = os.read(process.stdout.fileno(), 10_000)
        process.kill()
    assert 0 < len(first) < 500


def test_a_reader_who_has_had_enough(run_folder):
    """`| head` closes the pipe, which must not give a traceback."""
    flags = "--num_samples 40 --max_new_tokens 3000 --device cpu"
    command = f"'{sys.executable}' '{ROOT / 'sample.py'}' --model '{run_folder}' {flags} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("--- sample 0\n", "")


def test_end_of_text_is_one_id_in_every_prompt(shared_data, run_folder, main, tmp_path, monkeypatch):
    """In sample.py with and without tokenizer files, and in the samples of training."""
    GPT(GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path / "gpt2")
    for folder, expected in ((tmp_path / "gpt2", [50256, 64]), (run_folder / "checkpoints" / "step_000010", [256, 97])):
        encode, decode = load_tokenizer(str(folder), expected[0] + 1)
        assert encode("<|endoftext|>a") == expected and decode(expected) == "<|endoftext|>a"
    for name, expected in (("gpt2", [50256, 64, 50256, 50256]), ("bytes", [256, 97, 256, 256])):
        assert encode_prompt("<|endoftext|>a<|endoftext|><|endoftext|>", fineweb.get_encoding(name)) == expected
        assert encode_prompt("", fineweb.get_encoding(name)) == []
        text = "naïve <|endoftext| > \U0001f642 " + " " * 99
        assert encode_prompt(text, fineweb.get_encoding(name)) == fineweb.get_encoding(name).encode_ordinary(text)


def test_end_of_text_in_the_samples_of_training(text_shards, tmp_path, main, monkeypatch):
    """train_gpt2.py's --prompt, from its command line to the model."""
    prompts = []
    stream = GPT.stream
    monkeypatch.setattr(
        GPT, "stream", lambda self, idx, *a, **k: prompts.append(idx[0].tolist()) or stream(self, idx, *a, **k)
    )
    flags = [*TINY, "--data_dir", text_shards, "--out_dir", tmp_path, "--max_steps", 1, "--warmup_steps", 0]
    code, _, err = main(train_gpt2, [*flags, "--sample_interval", 1, "--prompt", "\ufeff<|endoftext|>a\r\n"])
    assert code == 0 and prompts == [[256, 97, 10]], err


def test_stop_ends_a_sample_at_end_of_text(run_folder, main, capsys):
    """--stop cuts each sample of the same run; the prompt may contain <|endoftext|>."""
    decode = fineweb.get_encoding("bytes").decode
    steps = iter([[97, 98], [256, 98], [97, 98], [98, 256], [97, 97]])
    sample.show(torch.tensor([[256, 62], [256, 62]]), (torch.tensor(ids)[:, None] for ids in steps), decode, 256)
    assert capsys.readouterr().out == "--- sample 0\n<|endoftext|>>a\n--- sample 1\n<|endoftext|>>bbb\n"
    assert next(steps) == [97, 97]  # the stream ends with the last sample
    flags = ["--model", run_folder, "--device", "cpu", "--num_samples", 9, "--max_new_tokens", 200, "--prompt", "a"]
    whole, stopped = (main(sample, [*flags, *more])[1].split("--- sample ") for more in ([], ["--stop"]))
    assert len(whole) == len(stopped) == 10
    for a, b in zip(whole, stopped):
        assert a.partition("<|endoftext|>")[0].rstrip("\n") == b.rstrip("\n")
    assert whole != stopped


def test_stop_needs_the_token(main, tmp_path):
    """A tokenizer without <|endoftext|> cannot end a sample there."""
    words = tokenizers.models.WordLevel({"the": 0, "quick": 1, "[UNK]": 2}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    GPT(GPTConfig(block_size=64, vocab_size=3, n_layer=1, n_head=1, n_embd=16)).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    code, _, err = main(sample, ["--model", tmp_path, "--prompt", "the", "--device", "cpu", "--stop"])
    assert code == 2 and err.startswith("error: --stop") and err.count("\n") == 1


ENCODINGS = {
    "utf-8-sig": "héllo", "utf-16": "héllo", "utf-32": "héllo", "utf-16-le with a mark": "héllo",
    "utf-16-be with a mark": "héllo",
}  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_prompts_with_a_byte_order_mark(encoding, run_folder, main, tmp_path):
    """Notepad writes UTF-8 with a mark, and PowerShell UTF-16. The mark is no part of the prompt."""
    flags = ["--model", run_folder, "--max_new_tokens", 3, "--num_samples", 1, "--device", "cpu"]
    name, _, with_mark = encoding.partition(" ")
    (tmp_path / "prompt").write_bytes((("\ufeff" if with_mark else "") + "héllo\r\nyou\r\n").encode(name))
    expected = main(sample, [*flags, "--prompt", "héllo\nyou"])
    assert expected[0] == 0
    assert main(sample, [*flags, "--prompt_file", tmp_path / "prompt"]) == expected
    assert main(sample, [*flags, "--prompt", "\ufeffhéllo\r\nyou"]) == expected
    assert main(sample, [*flags, "--prompt", "\ufeff"])[0] == 2


TEXTS = {
    "ISO-8859-1": "Der Bär läuft über die Straße, señor. ",
    "WINDOWS-1252": "The “price” is 5 € – café. ",
    "WINDOWS-1251": "Привет, мир. Это русский текст. ",
    "KOI8-R": "Привет, мир. Это русский текст. ",
    "SHIFT_JIS": "これは日本語の文章です。カタカナも。",
    "EUC-JP": "これは日本語の文章です。カタカナも。",
    "UTF-16LE": "Hello, this is text without a mark. ",
    "UTF-16BE": "Hello, this is text without a mark. ",
}


@pytest.mark.parametrize("encoding", TEXTS)
def test_other_encodings_are_named(encoding, tmp_path):
    """The error has the command that converts the file, for a folder with a space as well."""
    path = str(tmp_path / "my prompt.txt")
    with pytest.raises(UserError) as error:
        decode_prompt(TEXTS[encoding].encode(encoding), path)
    command = f"iconv -f {encoding} -t UTF-8 {shlex.quote(path)} > {shlex.quote(path + '.utf8')}"
    assert str(error.value).startswith(f"--prompt_file {path} is not UTF-8 text") and command in str(error.value)
