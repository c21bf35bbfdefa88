"""What other programs wrote: checkpoints of nanoGPT, build-nanogpt and llm.c, and data folders without our shards."""

import itertools
import os
import pickle
import re
import shlex
import zipfile
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import torch

from support.common import UserError, lfs_message, warn
from support.sources import SUFFIXES, text_format

SHAPE = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")  # in the order of llm.c's header
NAMES = re.compile(r"ckpt\.pt|model_(\d+)\.(pt|bin)")  # of nanoGPT; of build-nanogpt and llm.c, with the step
# the modules from which build-nanogpt's class GPTConfig may come: it was run as a script, or imported
CONFIG_CLASSES = ("__main__.GPTConfig", "train_gpt2.GPTConfig", "model.GPTConfig")
# llm.c's files begin with 256 int32: a magic number, a version, SHAPE and the rows of the padded embedding
HEADER, MAGIC, VERSIONS = 1024, 20240326, {3: torch.float32, 5: torch.bfloat16}
OTHER_FILES = {20240520: "a token shard", 20240327: "llm.c's debug state", 20240328: "llm.c's tokenizer"}
OTHER_FILES |= {20240527: "llm.c's optimizer state, which lies beside the model"}


# --- checkpoints ------------------------------------------------------------------------------------------------------


class PickledConfig:
    """Takes the place of build-nanogpt's GPTConfig: the unpickler sets its attributes and runs nothing."""


def find_checkpoint(folder: str | Path) -> Path | None:
    """Return another program's checkpoint in its output folder, the one of the last step, or None."""
    found = [(int(name[1] or 0), path) for path in Path(folder).iterdir() if (name := NAMES.fullmatch(path.name))]
    return max(found)[1] if found else None


def read_checkpoint(path: str | Path) -> tuple[dict, dict]:
    """Return (shape, weights) of a checkpoint file: {name of SHAPE: number}, and tensors as in a GPT2LMHeadModel.

    Nothing in the file is executed. Raises UserError if it is of another kind or its computation differs from GPT-2's.
    A damaged file may also raise errors of torch.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        raise UserError("it has weights but no config: give its folder, with config.json")
    with open(path, "rb") as file:
        is_pickle = zipfile.is_zipfile(path) or file.read(1) == b"\x80"
    shape, weights = read_pickle(path) if is_pickle else read_bin(path)
    # Hugging Face's folders store the matrices of the blocks as (in, out), and nn.Linear has (out, in).
    return shape, {
        name: (weight.t() if ".h." in name and weight.dim() == 2 else weight).float().contiguous()
        for name, weight in weights.items()
    }


def read_pickle(path: Path) -> tuple[dict, dict]:
    """Return (shape, weights) of nanoGPT's ckpt.pt or build-nanogpt's model_*.pt, with the matrices as (out, in)."""
    try:
        with torch.serialization.safe_globals([(PickledConfig, name) for name in CONFIG_CLASSES]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if code := re.search(r"(?:GLOBAL|class) (\S+)", str(error).partition("\n\n")[2]):
            raise UserError(f"it contains code ({code[1]}), which was not executed") from error
        raise UserError("it is damaged, or not a checkpoint") from error
    config = checkpoint.get("model_args", checkpoint.get("config")) if isinstance(checkpoint, dict) else None
    config = vars(config) if isinstance(config, PickledConfig) else config
    if not isinstance(config, dict) or not isinstance(checkpoint.get("model"), dict):
        raise UserError("it has no config and weights as nanoGPT's and build-nanogpt's checkpoints have them")
    shape = {name: config.get(name) for name in SHAPE}
    weights = {re.sub(r"^(_orig_mod\.|module\.)+", "", str(name)): w for name, w in checkpoint["model"].items()}
    # Early versions also saved the causal mask.
    weights = {name: w for name, w in weights.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    if not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        raise UserError(f"its {next(n for n, w in weights.items() if not isinstance(w, torch.Tensor))} is no tensor")
    head, table = weights.pop("lm_head.weight", None), weights.get("transformer.wte.weight")
    if head is not None and table is not None and not torch.equal(head, table):
        raise UserError("its lm_head.weight differs from transformer.wte.weight, but GPT-2 has one table for both")
    check_weights(weights, shape)
    if "model_args" in checkpoint and os.environ.get("RANK", "0") == "0":
        warn(f"nanoGPT computes GELU exactly, but GPT-2 approximates it: activations of {path} differ by up to 0.0005")
    return shape, weights


def read_bin(path: Path) -> tuple[dict, dict]:
    """Return (shape, weights) of llm.c's model file, without the rows that pad the vocabulary."""
    magic, version, *numbers, padded = [*np.fromfile(path, dtype="<i4", count=8).tolist(), *8 * [0]][:8]
    if magic != MAGIC:
        kind = OTHER_FILES.get(magic, "neither a checkpoint of nanoGPT or build-nanogpt (.pt) nor of llm.c (.bin)")
        raise UserError(f"it is {kind}")
    if version not in VERSIONS:
        raise UserError(f"it has version {version} of llm.c's format, but 3 (float32) or 5 (bfloat16) is required")
    shape, dtype = dict(zip(SHAPE, numbers)), VERSIONS[version]
    T, V, L, heads, C = numbers
    size = HEADER + dtype.itemsize * (C * (padded + T + 2) + L * C * (12 * C + 13))
    if min(numbers) < 1 or padded < V or C % heads or path.stat().st_size != size:
        raise UserError(f"its header describes {size:,} bytes, but it has {path.stat().st_size:,}: copy it again")
    data = np.memmap(path, dtype="<f4" if dtype == torch.float32 else "<i2", mode="r", offset=HEADER)
    weights, start = {}, 0
    for name, dimensions in layout(shape | {"vocab_size": padded}):
        flat = torch.from_numpy(data[start : start + prod(dimensions)].copy()).view(dtype)
        weights[name], start = flat.view(dimensions), start + prod(dimensions)
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:V]
    return shape, weights


def layout(shape: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and the dimensions of each weight of a GPT-2, in the order of llm.c's files."""
    T, V, L, _, C = (shape[name] for name in SHAPE)
    yield "transformer.wte.weight", (V, C)
    yield "transformer.wpe.weight", (T, C)
    linear = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        dimensions = linear.get(module, (C,))
        yield from ((f"transformer.h.{i}.{module}.weight", dimensions) for i in range(L))
        yield from ((f"transformer.h.{i}.{module}.bias", dimensions[:1]) for i in range(L))
    yield "transformer.ln_f.weight", (C,)
    yield "transformer.ln_f.bias", (C,)


def check_weights(weights: dict, shape: dict) -> None:
    """Raise UserError, which names the first difference, unless these are the weights of a GPT-2 of this shape."""
    for name, value in shape.items():
        if type(value) is not int or value < 1:
            raise UserError(f"its config has no {name} (it is {value!r})")
    if shape["n_embd"] % shape["n_head"]:
        raise UserError(f"its n_embd {shape['n_embd']} is not a multiple of its n_head {shape['n_head']}")
    if shape["n_layer"] > len(weights):
        raise UserError(f"its config has n_layer {shape['n_layer']}, but it has only {len(weights)} weights")
    expected = dict(layout(shape))
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing and all(name.endswith(".bias") for name in missing):
        raise UserError(f"it has no {missing[0]} (bias=False), but GPT-2 has biases")
    if missing or unknown:
        difference = f"it has no {missing[0]}" if missing else f"it has {unknown[0]}"
        raise UserError(f"{difference}, so its computation is not GPT-2's")
    for name, dimensions in expected.items():
        if weights[name].shape != dimensions:
            raise UserError(f"its {name} is {tuple(weights[name].shape)}, but GPT-2's is {dimensions}")


# --- data -------------------------------------------------------------------------------------------------------------


def check_data_dir(data_dir: str | Path) -> None:
    """Raise UserError if --data_dir names texts, a single file or an incomplete folder of nanoGPT."""
    from fineweb import list_shards, raw_shards

    path, flag = Path(data_dir), f"--data_dir {data_dir}"
    if path.is_file():
        if message := lfs_message(path):
            raise UserError(f"{flag}: {message}")
        if text_format(path).lower() in SUFFIXES:
            raise UserError(f"{flag} is a text file, not a folder of shards. {shard_command(path, [path])}")
        if path.suffix in (".bin", ".npy"):
            folder = shlex.quote(str(path.absolute().parent))
            raise UserError(f"{flag} is one file, but training needs two: give their folder, --data_dir {folder}")
    if not path.is_dir() or list_shards(path):
        return
    found = itertools.islice(path.rglob("*"), 10_000)  # it may be the root of a disk
    texts = [file for file in found if is_text(file.relative_to(path)) and file.is_file()]
    splits = {file.stem for file in raw_shards(path)}
    if splits and (path / "meta.pkl").exists():
        reason = "has nanoGPT's tokens of characters (meta.pkl), which are not GPT-2's"
        source = path / "input.txt"
        fix = shard_command(source, [source]) if source.exists() else "Create shards of its text with python fineweb.py"
        raise UserError(f"{flag} {reason}. {fix}")
    if len(splits) == 1:
        missing = {"train": "val", "val": "train"}[splits.pop()]
        raise UserError(f"{flag} has no {missing}.bin: put nanoGPT's {missing}.bin beside the other file")
    if texts and not splits:
        raise UserError(f"{flag} has texts, but no shards. {shard_command(path, texts)}")


def is_text(path: Path) -> bool:
    """Return whether a file of a folder looks like a part of a corpus. A .json file is more often a description."""
    kind = text_format(path).lower()
    return kind in SUFFIXES and kind != ".json" and path.name != "log.txt" and not any(p[0] == "." for p in path.parts)


def shard_command(source: Path, files: list[Path]) -> str:
    """Return the sentence with the command that creates shards from a corpus, beside it."""
    # about a twentieth of the tokens, of four bytes each, for validation; large corpora have shards of 100M tokens
    tokens = min(100_000_000, sum(file.stat().st_size for file in files) // 80 + 1)
    named = source if source.name else source.absolute()  # . has no name
    out_dir = named.parent / f"{named.name.partition('.')[0] or 'text'}_shards"
    names = f"--source {shlex.quote(str(source))} --out_dir {shlex.quote(str(out_dir))}"
    return f"Create them with: python fineweb.py {names} --shard_tokens {tokens}"
