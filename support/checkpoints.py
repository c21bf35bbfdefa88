"""Output and model folders: find the checkpoints of a run, open any GPT-2 and its tokenizer."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from support.common import UserError, one_line

HINT = "Give a Hub name, the folder of a Hugging Face GPT-2 or an output folder of train_gpt2.py"


def list_checkpoints(out_dir: str | Path) -> list[Path]:
    """List the complete checkpoints in an output folder of train_gpt2.py, oldest first."""
    # While a checkpoint is incomplete, its name starts with a dot.
    folders = [path for path in Path(out_dir).glob("checkpoints/step_*") if path.name[5:].isdigit()]
    return sorted(folders, key=lambda path: int(path.name[5:]))


def newest_checkpoint(model: str, flag: str = "--model") -> str:
    """Return the newest checkpoint of an output folder of train_gpt2.py; any other name is returned unchanged.

    Raises UserError for a folder that is neither a model nor an output folder with a checkpoint.
    """
    if not os.path.isdir(model) or os.path.exists(os.path.join(model, "config.json")):
        return model
    if not (checkpoints := list_checkpoints(model)):
        raise UserError(f"{flag} {model} contains neither config.json nor checkpoints/step_NNNNNN. {HINT}")
    return str(checkpoints[-1])


def import_transformers():
    """Import transformers and make it print errors only. The import takes seconds, so it happens on first use."""
    # transformers imports torchao if it is installed. torchao warns that GPU kernels for other machines do not load.
    for name in ("huggingface_hub", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    return transformers


def check_same_computation(hf_config) -> None:
    """Raise UserError unless a GPT-2 config of Hugging Face describes exactly the computation of train_gpt2.GPT."""
    expected = {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
    for name, value in expected.items():
        if getattr(hf_config, name, value) != value:
            raise UserError(f"its {name} is {getattr(hf_config, name)}, but GPT-2's is {value}")
    if hf_config.n_inner not in (None, 4 * hf_config.n_embd):
        raise UserError(f"its n_inner is {hf_config.n_inner}, but GPT-2's is 4 * n_embd")


def open_gpt2(name: str | Path, flag: str = "--model", exactly: bool = False):
    """Open a GPT-2, given by Hub name or folder, as a GPT2LMHeadModel of transformers in float32 on the CPU.

    exactly: refuse variants of GPT-2 that transformers computes correctly, but train_gpt2.GPT does not.
    Raises UserError if the model cannot be read, is not a GPT-2 or lacks weights.
    """
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if config.model_type != "gpt2":
            raise UserError(f"its model_type is {config.model_type}, but gpt2 is required")
        if exactly:
            check_same_computation(config)
        # Both names mean the same formula. gelu_new computes it in eight passes over memory instead of one.
        if config.activation_function == "gelu_new":
            config.activation_function = "gelu_pytorch_tanh"
        # hellaswag.py passes boolean masks, which sdpa supports. Other implementations may add them to the scores.
        model, report = transformers.GPT2LMHeadModel.from_pretrained(
            name, config=config, dtype=torch.float32, attn_implementation="sdpa",
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
        # transformers fills missing weights with random numbers, and such a model must not be used unnoticed.
        if unusable := [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]:
            raise UserError(f"the weight {min(unusable)} is missing or has another shape")
    except Exception as error:  # a broken folder raises OSError, SafetensorError, KeyError and more
        raise UserError(f"{flag} {name} cannot be opened: {one_line(error).rstrip('.')}. {HINT}") from error
    return model


def load_tokenizer(name: str, vocab_size: int, flag: str = "--model") -> tuple[Callable, Callable]:
    """Load the tokenizer of a model as (encode, decode); encode adds no special tokens.

    A folder without tokenizer files and with 50,257 ids uses GPT-2's tokenizer.
    Raises UserError if the tokenizer cannot be loaded.
    """
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    try:
        if not os.path.isdir(name) or any(os.path.exists(os.path.join(name, file)) for file in files):
            tokenizer = import_transformers().AutoTokenizer.from_pretrained(name)
            return lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.decode
        if vocab_size != 50257:
            raise UserError(f"the folder has no tokenizer files, and its {vocab_size:,} ids are not GPT-2's 50,257")
        from fineweb import get_encoding

        encoding = get_encoding("gpt2")
        return encoding.encode_ordinary, encoding.decode
    except Exception as error:  # from a broken file, the Hub or the download of GPT-2's vocabulary
        reason = one_line(error).rstrip(".")
        fix = "Put the tokenizer files of the model into its folder, or give another model"
        raise UserError(f"the tokenizer of {flag} {name} cannot be opened: {reason}. {fix}") from error
