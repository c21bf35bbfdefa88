"""
Generate text from any GPT-2: one of Hugging Face's, or a checkpoint of ours.

    python sample.py --model log                          the newest checkpoint of train_gpt2.py's output folder
    python sample.py --model gpt2 --prompt "In the beginning" --num_samples 2
"""

import math
import sys

import torch

import hellaswag
from train_gpt2 import GPT, ConfigError, TrainConfig


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
        device: auto, cuda, mps or cpu; auto is the first of these that is here
    """
    counts = {"num_samples": num_samples, "max_new_tokens": max_new_tokens, "top_k": top_k}
    errors = [f"--{name} is {value}: it must be above 0" for name, value in counts.items() if value < 1]
    if not prompt:
        errors.append("--prompt is empty: samples need something to begin with")
    if not 0 <= temperature < math.inf:
        errors.append(f"--temperature is {temperature}: it must be 0 or more and finite")
    if not 0 <= seed < 2**64:
        errors.append(f"--seed is {seed}: it must be from 0 to 2**64 - 1")
    if errors:
        raise ConfigError("\n".join(errors))
    name = hellaswag.newest_checkpoint(model)
    device = hellaswag.pick_device(device)
    gpt = GPT.from_pretrained(name).to(device).eval()
    encode, decode = hellaswag.load_tokenizer(name, gpt.config.vocab_size)
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
    except (ConfigError, hellaswag.HellaSwagError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal cannot show
    main()
