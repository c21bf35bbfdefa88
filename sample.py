"""
Generate text from any GPT-2: one of Hugging Face's, or a checkpoint of ours.

    python sample.py --model log                          the newest checkpoint of train_gpt2.py's output folder
    python sample.py --model gpt2 --prompt "In the beginning" --num_samples 2
"""

import sys
from pathlib import Path

import torch

import fineweb
import hellaswag
from train_gpt2 import GPT, ConfigError, TrainConfig, pick_device


def load_tokenizer(model_name, vocab_size):
    """(encode, decode) of a Hub name or a model folder; one without tokenizer files, but 50,257 ids, means gpt2."""
    folder = Path(model_name)
    if folder.is_dir() and not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        if vocab_size != 50257:
            raise ConfigError(f"{folder} holds no tokenizer.json, and its {vocab_size} ids are not GPT-2's 50257")
        encoding = fineweb.get_encoding("gpt2")
        return encoding.encode_ordinary, encoding.decode
    from transformers import AutoTokenizer  # takes seconds to import, so only here

    tokenizer = AutoTokenizer.from_pretrained(model_name)
    return lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.decode


def run(
    model: str = TrainConfig.out_dir,
    prompt: str = TrainConfig.prompt,
    num_samples: int = TrainConfig.num_samples,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int = 50,
    seed: int = 42,
    device: str = "auto",
) -> None:
    """Print samples of a GPT-2.

    Args:
        model: a Hugging Face name, a model folder, or an output folder of train_gpt2.py (its newest checkpoint)
        prompt: what the samples begin with
        num_samples: how many
        max_new_tokens: tokens added to the prompt
        temperature: 0 for the likeliest text, 1 for the model's own distribution
        top_k: how many of the likeliest tokens to draw from
        seed: of the draw; the same seed gives the same samples
        device: auto, cpu, cuda or mps
    """
    if not prompt or num_samples < 1 or max_new_tokens < 1 or temperature < 0 or top_k < 1:
        raise ConfigError(
            "--prompt, --num_samples, --max_new_tokens and --top_k must not be empty or 0, --temperature not negative"
        )
    name = hellaswag.newest_checkpoint(model)
    device = torch.device(pick_device(device))
    gpt = GPT.from_pretrained(name).to(device).eval()
    encode, decode = load_tokenizer(name, gpt.config.vocab_size)
    ids = torch.tensor(encode(prompt), dtype=torch.long, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    rows = gpt.generate(ids.expand(num_samples, -1), max_new_tokens, temperature, top_k, generator).tolist()
    for i, row in enumerate(rows):
        print(f"--- sample {i}\n{decode(row)}")


def main():
    """Sample as the command line says. Exit code 2 for a user's mistake."""
    import tyro

    try:
        tyro.cli(run, use_underscores=True)
    except (ConfigError, fineweb.DataError, hellaswag.HellaSwagError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
