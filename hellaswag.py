"""
Score a language model on HellaSwag (Zellers et al. 2019, https://arxiv.org/abs/1905.07830): which of four endings
continues a context? A model answers with the ending that it finds the likeliest; chance is 0.25.

    python hellaswag.py --model gpt2                 # a model of the Hugging Face Hub
    python hellaswag.py --model log --limit 1000     # the newest checkpoint of train_gpt2.py, on the first 1,000 rows

The convention is `completion`, that of build-nanogpt and llm.c: the tokens of the context, then those of " " + ending,
and only the latter are scored. `acc` takes the ending of the lowest summed loss, `acc_norm` that of the lowest mean
loss per token, since a sum favours short endings. Figures over all 10,042 rows, as build-nanogpt publishes them:

    gpt2 (124M)       acc 0.2859    acc_norm 0.2955
    gpt2-xl (1558M)   acc 0.3842    acc_norm 0.4893

lm-evaluation-harness words the rows in another way (gpt2: 0.2892, 0.3114); never compare figures across conventions.

`evaluate` goes prepare (tokens) -> batches -> score (losses) -> count. It takes callables and knows neither GPT nor
torch.distributed. Shapes: B sequences (four a row of the file), T positions, C channels, V ids, N scored tokens.
"""

import http.client
import itertools
import json
import logging
import os
import sys
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
FILE = Path(__file__).parent / "hellaswag" / "hellaswag_val.jsonl"
FULL_ROWS = 10_042  # rows of the official validation file
HEAD_TOKENS = 1024  # tokens projected to the vocabulary at once: 200 MB of fp32 logits at GPT-2's 50,257 ids


class HellaSwagError(ValueError):
    """A user's mistake, in one line that names the file or flag and what mends it."""


# --- the file ---------------------------------------------------------------------------------------------------------


def load_rows(path, limit=None) -> list[dict]:
    """Read the first `limit` rows of a jsonl file, or all. Raises HellaSwagError, naming file:line for a bad row."""
    rows, shape = [], 'an object with a text "ctx", four texts "endings" and a "label" of 0 to 3'
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(itertools.islice(file, limit), start=1):
                if (row := parse(line)) is None:
                    raise HellaSwagError(f"{path}:{number}: not a HellaSwag row, {shape}: mend or replace the file")
                rows.append(row)
    except OSError as error:
        raise HellaSwagError(f"{path}: {error.strerror}; without the flag the official file is downloaded") from error
    if not rows:
        raise HellaSwagError(f"{path}: the file is empty; without the flag the official file is downloaded")
    return rows


def parse(line: bytes) -> dict | None:
    """The row in a line of the file, or None where there is none."""
    try:
        row = json.loads(line)
        texts, label = [row["ctx"], *row["endings"]], row["label"]
    except (ValueError, KeyError, TypeError):  # ValueError is neither JSON nor UTF-8
        return None
    fits = isinstance(row["endings"], list) and len(texts) == 5 and all(isinstance(t, str) and t for t in texts)
    return row if fits and type(label) is int and 0 <= label <= 3 else None


def download(path, url=URL, timeout=10.0) -> None:
    """
    Fetch the official validation file to `path`, unless it is there. It bears its name only once it is whole and every
    row has been read. Raises HellaSwagError, and leaves no file; each wait on the network is at most `timeout` seconds.
    """
    path = Path(path)
    if path.exists():
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")  # a name of its own, for two runs may start together
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            body = response.read()  # 12 MB; raises IncompleteRead where Content-Length promised more
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(body)
        if (found := len(load_rows(partial))) != FULL_ROWS:
            raise HellaSwagError(f"{found:,} rows came instead of {FULL_ROWS:,}")
        os.replace(partial, path)
    except (OSError, http.client.HTTPException, HellaSwagError) as error:
        raise HellaSwagError(f"cannot download {url} to {path}: {one_line(error)}; try again, or by hand") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def find_rows(path, limit=None) -> list[dict]:
    """load_rows, before which the official file, whose place is FILE, is downloaded if missing; it must be whole."""
    if Path(path) != FILE:
        return load_rows(path, limit)
    download(FILE)
    try:
        rows = load_rows(FILE)
    except HellaSwagError:  # an error page, or cut within a row
        rows = []
    if len(rows) != FULL_ROWS:
        mend = "delete it, and it is downloaded again"
        raise HellaSwagError(f"{FILE} is not the official file, which has {FULL_ROWS:,} rows: {mend}")
    return rows[:limit]


# --- the evaluation ---------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """A row in tokens."""

    context: list[int]
    endings: list[list[int]]  # four
    label: int


class Counts(NamedTuple):
    """Rows scored, and those of them answered rightly by summed and by mean loss. Counts of several ranks add up."""

    total: int
    correct: int
    correct_norm: int


def evaluate(trunk, head, encode, rows, rank=0, world_size=1, device="cpu", max_length=1024, batch_tokens=16384):
    """
    Count the right answers in this rank's share of `rows`: returns Counts.

    trunk(ids, position_ids, mask) -> (B, T, C) final hidden states of a causal model. ids is (B, T) int64 on `device`;
        None for the other two means positions 0 to T-1 and plain causal attention. Dropout is the caller's to turn off.
    head(states) -> (..., V) logits. encode(text) -> token ids, with no special ones added.
    max_length: the model's positions; a longer context loses its beginning.
    batch_tokens: padded tokens of one forward pass, which bound its memory and change no result.

    Every rank forms the same batches and takes each world_size-th of them, so the sum over the ranks is the same to the
    bit at any world size. Raises HellaSwagError where an ending leaves no room for a context.
    """
    everything = batches(prepare(rows, encode, max_length), batch_tokens)
    mine = list(itertools.islice(everything, rank, None, world_size))
    total = correct = correct_norm = 0
    with tqdm(total=sum(map(len, mine)), desc="HellaSwag", unit="row", leave=False, disable=bool(rank) or None) as bar:
        for batch in mine:
            losses, lengths = score(trunk, head, batch, device)
            labels = torch.tensor([example.label for example in batch])
            total += len(batch)
            correct += int((losses.argmin(dim=1) == labels).sum())
            correct_norm += int(((losses / lengths).argmin(dim=1) == labels).sum())
            bar.update(len(batch))
    return Counts(total, correct, correct_norm)


def prepare(rows, encode, max_length) -> list[Example]:
    """Tokenize rows; a context is cut from the left until it fits `max_length` tokens with its longest ending."""
    examples = []
    for row in rows:
        context = encode(row["ctx"])
        endings = [encode(" " + ending) for ending in row["endings"]]  # GPT-2's tokens carry the space before a word
        assert context and all(endings), "encode gave no tokens"
        longest = max(map(len, endings))
        if longest >= max_length:
            raise HellaSwagError(f"HellaSwag: an ending of {longest} tokens needs more than {max_length} positions")
        examples.append(Example(context[longest - max_length :], endings, row["label"]))
    return examples


def batches(examples, batch_tokens):
    """Yield lists of examples of like lengths, so that little is padding; longest first, to run out of memory soon."""
    batch, width = [], lambda example: len(example.context) + max(map(len, example.endings))
    for example in sorted(examples, key=width, reverse=True):
        if batch and 4 * width(batch[0]) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


@torch.no_grad()
def score(trunk, head, batch, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Summed losses in nats and token counts of the endings of a list of Examples: two (rows, 4) float64 on the CPU."""
    texts = [(example.context, ending) for example in batch for ending in example.endings]  # B of them
    lengths = [len(ending) for _, ending in texts]
    # A last token predicts nothing and stays out. Padding stands on the right, where no causal position sees it.
    ids = pad_sequence([torch.tensor((context + ending)[:-1]) for context, ending in texts], batch_first=True)  # (B, T)
    predicts = torch.zeros_like(ids, dtype=torch.bool)  # (B, T): the positions whose next token belongs to the ending
    for row, (context, ending) in zip(predicts, texts, strict=True):
        row[len(context) - 1 : len(context) - 1 + len(ending)] = True
    targets = torch.tensor([token for _, ending in texts for token in ending], device=device)  # (N,)

    with exact_fp32(device):
        states = trunk(ids.to(device), None, None)[predicts.to(device)]  # (N, C): spare the wide head all the rest
        parts = zip(states.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True)
        losses = torch.cat([F.cross_entropy(head(state).float(), target, reduction="none") for state, target in parts])
    sums = [loss.sum() for loss in losses.cpu().double().split(lengths)]  # on the CPU, since mps has no float64
    return torch.stack(sums).view(-1, 4), torch.tensor(lengths, dtype=torch.float64).view(-1, 4)


@contextmanager
def exact_fp32(device):
    """Turn off autocast and TF32 for a while: endings lie so close that bf16 logits flip about 1% of the choices."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


# --- the command line -------------------------------------------------------------------------------------------------


def list_checkpoints(out_dir) -> list[Path]:
    """The complete checkpoints in an output folder of train_gpt2.py, oldest first."""
    steps = [path for path in Path(out_dir).glob("checkpoints/step_*") if path.name[5:].isdigit()]  # a dot: unfinished
    return sorted(steps, key=lambda path: int(path.name[5:]))


def newest_checkpoint(model: str) -> str:
    """The newest checkpoint of an output folder of train_gpt2.py; a Hub name or a model folder stays as it is."""
    if not os.path.isdir(model) or os.path.exists(os.path.join(model, "config.json")):
        return model
    if not (steps := list_checkpoints(model)):
        raise HellaSwagError(f"--model {model}: the folder holds neither a config.json nor checkpoints/step_NNNNNN")
    return str(steps[-1])


def load_model(name: str):
    """Open a GPT-2 by Hub name or folder: returns (model in fp32, encode). Raises HellaSwagError."""
    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if config.model_type != "gpt2":
            raise ValueError(f"a {config.model_type} model, where a GPT-2 is needed")
        options = {"dtype": torch.float32, "ignore_mismatched_sizes": True, "output_loading_info": True}
        model, report = transformers.AutoModelForCausalLM.from_pretrained(name, **options)
        # What the file lacks has been filled with random weights; they must not be scored without a word.
        if absent := [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]:
            raise ValueError(f"its weights lack {min(absent)}, or have it in another shape")
        return model, load_tokenizer(name, config.vocab_size)[0]
    except HellaSwagError:
        raise
    except Exception as error:  # whatever a broken folder makes its readers raise: OSError, SafetensorError, KeyError
        hint = "give a Hub name, a Hugging Face GPT-2 folder or an output folder of train_gpt2.py"
        raise HellaSwagError(f"--model {name}: {one_line(error)} ({hint})") from error


def load_tokenizer(name: str, vocab_size: int):
    """A model's own tokenizer as (encode, decode), no special ids added; GPT-2's for 50,257 ids and no such files."""
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    try:
        if not os.path.isdir(name) or any(os.path.exists(os.path.join(name, file)) for file in files):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(name)
            return lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.decode
        if vocab_size != 50257:
            raise ValueError(f"no tokenizer files, and {vocab_size:,} ids are not GPT-2's 50,257")
        import tiktoken

        encoding = tiktoken.get_encoding("gpt2")
        return encoding.encode_ordinary, encoding.decode
    except Exception as error:  # of a broken file, of the hub, or of the download of GPT-2's vocabulary
        raise HellaSwagError(f"--model {name}: cannot open its tokenizer: {one_line(error)}") from error


def pick_device(name: str) -> str:
    """The device of a flag; auto is the fastest one here. Raises HellaSwagError where it cannot be used."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # one for each way of not being there
        raise HellaSwagError(f"--device {name}: {one_line(error)} (auto is the fastest here)") from error
    return name


def one_line(error: Exception) -> str:
    """The first line of what an exception says, or its name where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def render(row, losses) -> str:
    """A row with the mean loss per token of each ending, and the answer that they make."""
    endings = [f"  {i} (loss {losses[i]:.4f}) {ending}" for i, ending in enumerate(row["endings"])]
    return "\n".join([row["ctx"], *endings, f"predicted {losses.index(min(losses))}, actual {row['label']}\n"])


def run(model: str = "gpt2", file: Path = FILE, limit: int | None = None, device: str = "auto") -> None:
    """
    Score a GPT-2 on HellaSwag, in fp32 and completion style.

    Args:
        model: a Hugging Face Hub name, a model folder, or an output folder of train_gpt2.py (its newest checkpoint).
        file: the rows, in HellaSwag's jsonl format; the default is downloaded if missing.
        limit: score the first rows only, so many of them.
        device: auto, cuda, mps or cpu; auto is the first of these that is here.
    """
    if limit is not None and limit < 1:
        raise HellaSwagError(f"--limit {limit}: give a number above 0, or leave it out")
    device, model = pick_device(device), newest_checkpoint(model)
    rows = find_rows(file, limit)
    note = "" if len(rows) == FULL_ROWS else f" (not all {FULL_ROWS:,}: do not compare with published figures)"
    print(f"{model} on {device}, {len(rows):,} rows of {file}{note}\n", flush=True)

    gpt, encode = load_model(model)
    gpt.to(device).eval()
    head, max_length = gpt.get_output_embeddings(), gpt.config.max_position_embeddings

    def trunk(ids, position_ids, mask):
        call = gpt.transformer(input_ids=ids, position_ids=position_ids, attention_mask=mask, use_cache=False)
        return call.last_hidden_state

    for row in rows[:3]:  # a look at what is asked, and at what the model makes of it
        losses, lengths = score(trunk, head, prepare([row], encode, max_length), device)
        print(render(row, (losses / lengths)[0].tolist()))
    total, correct, correct_norm = evaluate(trunk, head, encode, rows, device=device, max_length=max_length)
    print(f"acc {correct}/{total} = {correct / total:.4f} (completion)")
    print(f"acc_norm {correct_norm}/{total} = {correct_norm / total:.4f} (completion)")


def main() -> None:
    """Read the command line and run; a user's mistake ends in one line and exit code 2."""
    import tyro

    try:
        tyro.cli(run, use_underscores=True)
    except HellaSwagError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
