"""
Generate text from any GPT-2: one of Hugging Face's, or a checkpoint of ours.

    python sample.py --model log                          the newest checkpoint of train_gpt2.py's output folder
    python sample.py --model gpt2 --prompt "In the beginning" --num_samples 2
    python sample.py --prompt_file story.txt              a prompt from a file; - is standard input
"""

import math
import os
import sys
from pathlib import Path

import torch

import hellaswag
from train_gpt2 import GPT, ConfigError, TrainConfig


def run(
    model: str = TrainConfig.out_dir,
    prompt: str = TrainConfig.prompt,
    prompt_file: str | None = None,
    num_samples: int = TrainConfig.num_samples,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 42,
    int8: bool = False,
    device: str = "auto",
) -> None:
    """Print samples of a GPT-2. All are drawn together: the first is shown as it grows, the others when it is done.

    Args:
        model: a Hugging Face name, a model folder, or an output folder of train_gpt2.py (its newest checkpoint)
        prompt: what the samples begin with
        prompt_file: a text file to begin with instead, or - for standard input
        num_samples: how many
        max_new_tokens: tokens added to the prompt
        temperature: 0 for the likeliest text, 1 for the model's own distribution
        top_k: how many of the likeliest tokens to draw from
        top_p: draw from the likeliest of these that together have this probability (1 for all)
        seed: of the draw; the same seed gives the same samples
        int8: keep the weights of the matrices in 8 bits: about half the memory, slower on a CPU; needs torchao
        device: auto, cuda, mps or cpu; auto is the first of these that is here
    """
    check_numbers(num_samples, max_new_tokens, temperature, top_k, top_p, seed)
    prompt = prompt if prompt_file is None else read_prompt(prompt_file)
    check_prompt(prompt)
    name = hellaswag.newest_checkpoint(model)
    device = hellaswag.pick_device(device)
    gpt = GPT.from_pretrained(name).to(device).eval()
    if not all(parameter.isfinite().all() for parameter in gpt.parameters()):
        raise ConfigError(f"--model {model}: its weights are not all finite, take an earlier checkpoint")
    if int8:
        quantize(gpt)
    encode, decode = hellaswag.load_tokenizer(name, gpt.config.vocab_size)
    ids = torch.tensor(encode(prompt), dtype=torch.long, device=device).expand(num_samples, -1)
    if not ids.size(1):
        raise ConfigError("the model's tokenizer makes nothing of the prompt: give it words (--prompt, --prompt_file)")
    generator = torch.Generator(device).manual_seed(seed)
    show(ids, gpt.stream(ids, max_new_tokens, temperature, top_k, generator, top_p), decode)


def check_numbers(num_samples, max_new_tokens, temperature, top_k, top_p, seed):
    """Raise ConfigError with a line for each that is out of its range."""
    counts = {"num_samples": num_samples, "max_new_tokens": max_new_tokens, "top_k": top_k}
    errors = [f"--{name} is {value}: it must be above 0" for name, value in counts.items() if value < 1]
    if not 0 <= temperature < math.inf:
        errors.append(f"--temperature is {temperature}: it must be 0 or more and finite")
    if not 0 < top_p <= 1:
        errors.append(f"--top_p is {top_p}: it is a probability, above 0 and at most 1")
    if not 0 <= seed < 2**64:
        errors.append(f"--seed is {seed}: it must be from 0 to 2**64 - 1")
    if errors:
        raise ConfigError("\n".join(errors))


def check_prompt(prompt):
    """Raise ConfigError for one that no tokenizer can read."""
    if not prompt:
        raise ConfigError("the prompt is empty: samples need something to begin with (--prompt, --prompt_file)")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # the shell passed bytes that are no text
        raise ConfigError("--prompt is not UTF-8 text") from None


def read_prompt(path):
    """The UTF-8 text of a file, or of standard input for -. Raises ConfigError."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = data.decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ConfigError(f"--prompt_file {path}: {reason}") from error
    return text.removesuffix("\n")  # an editor's, or echo's


def quantize(gpt):
    """Keep the weights of gpt's linear layers as 8-bit integers, with a scale for each row. Raises ConfigError."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        config = Int8WeightOnlyConfig(version=2)
    except (ImportError, TypeError) as error:  # none, or one older than its version 2
        mend = "pip install -U torchao"
        raise ConfigError(f"--int8 needs torchao ({hellaswag.one_line(error)}): {mend}") from error
    quantize_(gpt, config)  # the token embedding itself stays: a row of it is read for a token


def show(ids, stream, decode):
    """Print the rows of ids (B, T) and what the stream appends, (B, 1) at a time: the first row as it grows."""
    print("--- sample 0")
    shown = ""
    for next_ids in stream:
        text = decode(ids[0].tolist())  # all of it: how a token reads may depend on the one before
        if not text.endswith("\ufffd"):  # as the first bytes of a character do, until the rest has come
            print(text[len(shown) :], end="", flush=True)
            shown = text
        ids = torch.cat((ids, next_ids), dim=1)
    first, *others = map(decode, ids.tolist())
    print(first[len(shown) :])
    for i, text in enumerate(others, start=1):
        print(f"--- sample {i}\n{text}")


def main():
    """Sample as the command line says. Exit code 2 for a user's mistake, 130 for Ctrl-C."""
    import tyro

    try:
        tyro.cli(run, use_underscores=True)
        sys.stdout.flush()
    except (ConfigError, hellaswag.HellaSwagError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("error: out of GPU memory: give fewer --num_samples, or --device cpu", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever reads has had enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal cannot show
    main()
