"""
Generate text from any GPT-2: a model of Hugging Face or a checkpoint of this project.

    python sample.py --model log                          the newest checkpoint of train_gpt2.py's output folder
    python sample.py --model gpt2 --prompt "In the beginning" --num_samples 2
    python sample.py --prompt_file story.txt              a prompt from a file; - is standard input
"""

import math
import os
import re
import sys
from collections.abc import Callable, Iterator

import torch

from fineweb import END_OF_TEXT
from support.checkpoints import newest_checkpoint
from support.common import UserError, cli, exit_on_error, pick_device, pick_dtype
from support.generation import prepare
from support.tokenizer import GrowingText, load_tokenizer, read_prompt
from train_gpt2 import GPT, TrainConfig


def command(
    model: str = TrainConfig.out_dir,
    prompt: str = TrainConfig.prompt,
    prompt_file: str | None = None,
    num_samples: int = TrainConfig.num_samples,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 42,
    stop: bool = False,
    dtype: str = "auto",
    int8: bool = False,
    device: str = "auto",
) -> None:
    """Print samples of a GPT-2. They are generated together; the first is shown while it grows, the others at the end.

    Args:
        model: a Hugging Face name, a model folder, or an output folder of train_gpt2.py (its newest checkpoint)
        prompt: the text that the samples begin with
        prompt_file: read the prompt from this text file instead; - is standard input
        num_samples: the number of samples
        max_new_tokens: tokens to add to the prompt
        temperature: 0 always chooses the most likely token, 1 samples from the model's own distribution
        top_k: sample only from this many most likely tokens
        top_p: of these, sample only from the most likely ones that together have this probability (1: all)
        seed: the seed of the sampling; the same seed gives the same samples
        stop: end a sample where the model generates <|endoftext|>
        dtype: of the weights: auto, float32, bfloat16 or int8; auto is bfloat16 on a CPU that has it, else float32
        int8: the same as --dtype int8
        device: auto, cuda, mps or cpu; auto is the first of these that is available
    """
    check_numbers(num_samples, max_new_tokens, temperature, top_k, top_p, seed)
    dtype = check_dtype(dtype, int8)
    prompt = read_prompt(prompt, prompt_file)
    name, device = newest_checkpoint(model), pick_device(device)
    gpt = GPT.from_pretrained(name, flag="--model").to(device).eval()
    if not all(parameter.isfinite().all() for parameter in gpt.parameters()):
        raise UserError(f"--model {model} has weights that are not finite: give an earlier checkpoint")
    if dtype == "auto":  # on an H200 float32 is the fastest, because starting the kernels takes most of a token's time
        dtype = str(pick_dtype("auto", "cpu")).removeprefix("torch.") if device.startswith("cpu") else "float32"
    prepare(gpt, dtype, rows=num_samples)
    encode, decode = load_tokenizer(name, gpt.config.vocab_size)
    ids = torch.tensor(encode(prompt), dtype=torch.long, device=device).expand(num_samples, -1)  # (B, T)
    if not ids.size(1):
        raise UserError("the prompt has no tokens in the model's tokenizer: give another --prompt or --prompt_file")
    end = encode(END_OF_TEXT) if stop else [None]
    if len(end) != 1:
        raise UserError(f"--stop needs {END_OF_TEXT}, which the tokenizer of --model {model} lacks: leave it out")
    generator = torch.Generator(device).manual_seed(seed)
    show(ids, gpt.stream(ids, max_new_tokens, temperature, top_k, generator, top_p), decode, end[0])


def check_numbers(num_samples, max_new_tokens, temperature, top_k, top_p, seed) -> None:
    """Check that each number is in its range. Raises UserError with one line per wrong number."""
    counts = {"num_samples": num_samples, "max_new_tokens": max_new_tokens, "top_k": top_k}
    errors = [f"--{name} is {value}: it must be above 0" for name, value in counts.items() if value < 1]
    errors += [f"--{name} is {value}: it must be below 2**31" for name, value in counts.items() if value >= 2**31]
    if not 0 <= temperature < math.inf:
        errors.append(f"--temperature is {temperature}: it must be finite, and 0 or more")
    if not 0 < top_p <= 1:
        errors.append(f"--top_p is {top_p}: it must be a probability above 0 and at most 1")
    if not 0 <= seed < 2**64:
        errors.append(f"--seed is {seed}: it must be from 0 to 2**64 - 1")
    if errors:
        raise UserError("\n".join(errors))


def check_dtype(dtype: str, int8: bool) -> str:
    """Return the dtype that --dtype and --int8 name. Raises UserError if it is unknown or if they contradict."""
    names = ("auto", "float32", "bfloat16", "int8")
    if dtype not in names:
        raise UserError(f"--dtype {dtype} is unknown: give one of {', '.join(names)}")
    if int8 and dtype not in ("auto", "int8"):
        raise UserError(f"--int8 means --dtype int8, but --dtype is {dtype}: leave one of them out")
    return "int8" if int8 else dtype


@torch.inference_mode()  # a token takes 0.3 ms less than with no_grad
def show(ids: torch.Tensor, stream: Iterator[torch.Tensor], decode: Callable, end: int | None = None) -> None:
    """Print the sequences ids (B, T) and the ids (B, 1) that the stream appends. The first is shown while it grows.

    end: each sequence ends before the first of these ids that is appended, and the stream ends after the last one.
    """
    T = ids.size(1)
    print("--- sample 0")
    text, new, ended = GrowingText(decode), ids[0].tolist(), False
    for next_ids in stream:
        print(text.add(new), end="", flush=True)
        ids = torch.cat((ids, next_ids), dim=1)
        ended = ended or next_ids[0].item() == end
        new = [] if ended else next_ids[0].tolist()
        if end is not None and (ids[:, T:] == end).any(1).all():
            break
    print(text.add(new, last=True))
    for i, row in enumerate(ids[1:].tolist(), start=1):
        print(f"--- sample {i}\n{decode(row[: row.index(end, T)] if end in row[T:] else row)}")


def main() -> None:
    """Run the command line. The exit code is 2 for a user error and 130 for Ctrl-C."""
    with exit_on_error():
        try:
            cli(command)
            sys.stdout.flush()
        except torch.OutOfMemoryError:  # before RuntimeError, which it is, too
            raise UserError("the GPU memory is too small: give fewer --num_samples, or --device cpu") from None
        except RuntimeError as error:
            if not re.search("multinomial|probability tensor", str(error)):
                raise
            raise UserError("the model's predictions are not numbers: give an earlier checkpoint") from error
        except BrokenPipeError:  # the program that reads our output, such as head, has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stream cannot be reconfigured, and shows all characters
        sys.stdout.reconfigure(errors="replace")
    main()
