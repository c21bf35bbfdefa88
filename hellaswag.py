"""
Score a language model on HellaSwag (Zellers et al. 2019, https://arxiv.org/abs/1905.07830).

Each row of the data is a context with four endings, one of which is right. The model chooses the most likely ending.

    python hellaswag.py --model gpt2                 # a model from the Hugging Face Hub
    python hellaswag.py --model log --limit 1000     # the newest checkpoint of train_gpt2.py, on the first 1,000 rows
    python hellaswag.py --model gpt2 --style harness --save answers.jsonl

There are two conventions. Do not compare their results with each other. In both, `acc` chooses the ending with the
lowest summed loss. A sum favours short endings, so `acc_norm` first divides it by the length of the ending.

    completion  as in build-nanogpt and llm.c: the context is unchanged; lengths are numbers of tokens
    harness     as in lm-evaluation-harness: the texts are reworded and cleaned; lengths are numbers of characters

`evaluate` calls prepare (text to tokens) -> batches -> score (losses) -> count. It takes the model as two callables, so
it knows nothing about GPT or torch.distributed. The context of a row is computed only once: its four endings follow it
in one sequence, and a mask hides them from each other.
Shapes: B sequences (usually one per row of the file), T positions, C channels, V vocabulary, N scored tokens.
"""

import http.client
import json
import math
import os
import re
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from support.checkpoints import newest_checkpoint, open_gpt2
from support.common import UserError, cli, exit_on_error, lfs_message, one_line, pick_device, tolerant_output
from support.tokenizer import load_tokenizer

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
FILE = Path(__file__).parent / "hellaswag" / "hellaswag_val.jsonl"
FULL_ROWS = 10_042  # rows of the official validation file
# The final states of a batch are projected to the vocabulary in this many parts, because logits need 200 KB per token.
HEAD_PARTS = {"cpu": 2, "cuda": 8, "mps": 8}
CONTEXT_FIELDS = {"completion": ["ctx"], "harness": ["activity_label", "ctx_a", "ctx_b"]}

# acc / acc_norm over all rows. GPT-2's 124M and 1558M are from build-nanogpt's hellaswag.py, which quotes EleutherAI's
# for harness. The others are from its notebook, where the 124M has 0.2945: ten rows less, a quarter of the standard
# error. GPT-3's are from its paper (Brown et al. 2020, table H.1), which uses its own wording.
PUBLISHED = {
    "completion": "GPT-2 124M 0.2859 / 0.2955, 350M - / 0.3752, 774M - / 0.4320, 1558M 0.3842 / 0.4893",
    "harness": "GPT-2 124M 0.2892 / 0.3114, 1558M 0.4004 / 0.5089",
    "GPT-3's paper": "125M - / 0.337, 350M - / 0.436, 760M - / 0.510, 1.3B - / 0.547",
}


# --- the file ---------------------------------------------------------------------------------------------------------


def load_rows(path, limit=None, style="completion") -> list[dict]:
    """Read the first `limit` rows of a jsonl file, or all. Raises UserError, which names the line of a bad row."""
    fields = " and ".join(f'"{field}"' for field in CONTEXT_FIELDS[style])
    rows, shape = [], f'an object with text in {fields}, four texts "endings" and a "label" from 0 to 3'
    fix = "fix or replace the file, or leave out the flag to download the official one"
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if len(rows) == limit:
                    break
                if line.isspace():
                    continue
                if (row := parse_row(line, style)) is None:
                    if message := lfs_message(path):
                        raise UserError(message)
                    raise UserError(f"{path}:{number}: not a HellaSwag row for {style} style, which is {shape}: {fix}")
                rows.append(row)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {fix}") from error
    if not rows:
        raise UserError(f"{path} is empty: {fix}")
    return rows


def parse_row(line: bytes, style="completion") -> dict | None:
    """Return the row in a line of the file, or None if the line is not a valid row.

    The official file has the label as a number, and the Hub's copy as text.
    """
    try:
        row = json.loads(line)
        texts, endings, label = [row[field] for field in CONTEXT_FIELDS[style]], row["endings"], row["label"]
        json.dumps([*texts, *endings], ensure_ascii=False).encode()  # raises for half of a surrogate pair
    except (ValueError, KeyError, TypeError, RecursionError):  # ValueError: the line is not JSON or not UTF-8
        return None
    valid = isinstance(endings, list) and len(endings) == 4 and all(isinstance(e, str) and e for e in endings)
    valid &= all(isinstance(text, str) for text in texts) and any(texts)  # rows from WikiHow have an empty ctx_b
    if label in ("0", "1", "2", "3"):
        row["label"] = label = int(label)
    return row if valid and type(label) is int and 0 <= label <= 3 else None


def download(path, url=URL, timeout=10.0) -> None:
    """Download the official validation file to `path` if it does not exist.

    timeout: the limit of each wait for the network, in seconds.
    Raises UserError, and leaves no file behind, if the file does not arrive complete.
    """
    path = Path(path)
    if path.exists():
        return
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            body = response.read()  # 12 MB; raises IncompleteRead if Content-Length promised more
        rows = list(map(parse_row, body.splitlines()))
        if len(rows) != FULL_ROWS or None in rows:
            raise UserError(f"the server sent something other than the official file of {FULL_ROWS:,} rows")
        path.parent.mkdir(parents=True, exist_ok=True)
        # The temporary folder has a unique name, so that two runs can start together.
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
            partial = Path(folder, path.name)
            partial.write_bytes(body)
            os.replace(partial, path)
    except (OSError, http.client.HTTPException, UserError) as error:
        raise UserError(f"cannot download {url} to {path}: {one_line(error)}: try again, or by hand") from error


def find_rows(path, limit=None, style="completion") -> list[dict]:
    """Load rows like `load_rows`, but download FILE, the official file, if it is missing. Raises UserError."""
    if Path(path) != FILE:
        return load_rows(path, limit, style)
    download(FILE)
    with suppress(UserError):  # if the file is an error page, for example, or ends within a row
        if len(rows := load_rows(FILE, style=style)) == FULL_ROWS:
            return rows[:limit]
    raise UserError(f"{FILE} is not the official file of {FULL_ROWS:,} rows: to download it again, delete it")


# --- from a row to text and tokens ------------------------------------------------------------------------------------


class Example(NamedTuple):
    """A tokenized row: one pack, (context, its four endings), or four packs of one ending if the row is too long."""

    number: int  # index of the row, from 0
    packs: list[tuple[list[int], list[list[int]]]]
    divisors: list[int]  # the lengths that acc_norm divides by, one per ending
    label: int


def width(packs) -> int:
    """Count the positions of the widest pack. The last token of an ending predicts nothing and needs no position."""
    return max(len(context) + sum(len(ending) - 1 for ending in endings) for context, endings in packs)


def clean(text: str) -> str:
    """Remove WikiHow's marks as the harness does: [title] ends a sentence. The result may end with a space."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def row_texts(row, style) -> tuple[str, list[str]]:
    """Return the context and the four endings of a row, worded as the convention requires."""
    if style == "completion":
        return row["ctx"], row["endings"]
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return clean(context), [clean(ending) for ending in row["endings"]]


def prepare(rows, encode, max_length=1024, style="completion") -> list[Example]:
    """Tokenize rows for `evaluate`.

    If a row needs more than `max_length` positions, each ending gets its own copy of the context, whose beginning is
    cut off as far as necessary. The harness does the same. Raises UserError if a text has no tokens, or too many.
    """
    examples = []
    for number, row in enumerate(rows):
        text, ending_texts = row_texts(row, style)
        if style == "completion":
            context, endings = encode(text), [encode(" " + ending) for ending in ending_texts]
        else:
            # The harness splits the tokens of the joined text. A final space of the context belongs to the ending.
            context = encode(text.rstrip())
            endings = [encode(f"{text} {ending}")[len(context) :] for ending in ending_texts]
        name = f"HellaSwag row {number + 1}"
        if not context or not all(endings):
            raise UserError(f"{name} has a text without tokens: remove it, or use another model")
        if (longest := max(map(len, endings))) > max_length:
            raise UserError(f"{name} needs {longest} positions, more than {max_length}: use another model")
        packs = [(context, endings)]
        if width(packs) > max_length:
            packs = [(context[max(0, width([(context, [e])]) - max_length) :], [e]) for e in endings]
        divisors = list(map(len, endings if style == "completion" else ending_texts))
        examples.append(Example(number, packs, divisors, row["label"]))
    return examples


# --- the evaluation ---------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """The losses that a model assigns to the four endings of a row, in nats."""

    example: Example
    losses: list[float]  # summed over the tokens of an ending, for acc
    normed: list[float]  # divided by the length of the ending, for acc_norm


class Counts(NamedTuple):
    """The number of scored rows, and how many of them `acc` and `acc_norm` answer correctly. Ranks add theirs up."""

    total: int
    correct: int
    correct_norm: int


def choice(losses) -> int:
    """Return the index of the most likely ending, the first one if several are equal."""
    return losses.index(min(losses))


def count(answers) -> Counts:
    """Count the correct answers."""
    correct = [(1, choice(losses) == row.label, choice(normed) == row.label) for row, losses, normed in answers]
    return Counts(*map(sum, zip(*correct, strict=True))) if correct else Counts(0, 0, 0)


def evaluate(trunk, head, encode, rows, rank=0, world_size=1, device="cpu", max_length=1024, batch_tokens=None,
             style="completion") -> Counts:  # fmt: skip
    """Count the correct answers in this rank's share of `rows`. The sum over all ranks is the same for any world size.

    trunk, head, rank, world_size, device, batch_tokens: see `ask`.
    encode(text) -> token ids, without special tokens. max_length: the number of positions of the model.
    rows: from `load_rows`; or from `prepare`, so that repeated evaluations tokenize only once. Then encode, max_length
        and style are ignored.
    Raises UserError as `prepare` does.
    """
    examples = rows if rows and isinstance(rows[0], Example) else prepare(rows, encode, max_length, style)
    return count(ask(trunk, head, examples, rank, world_size, device, batch_tokens))


def ask(trunk, head, examples, rank=0, world_size=1, device="cpu", batch_tokens=None) -> Iterator[Answer]:
    """Yield the Answer to each Example in this rank's share, the longest first.

    trunk(ids, position_ids, mask) -> (B, T, C) final hidden states. ids and position_ids are (B, T) int64 on `device`.
        mask is (B, 1, T, T) bool, True where a query may attend to a key, and it includes causality. Neither T nor a
        position exceeds the max_length of `prepare`. The caller turns dropout off.
    head(states) -> (..., V) logits.
    batch_tokens: limits the tokens of a forward pass, padding included, and so its memory. It changes no answer. The
        default is 512 on a CPU, whose caches hold that many, and 16,384 elsewhere.

    All ranks form the same batches, and each takes every world_size-th of them. All ranks call trunk and head equally
    often, as a sharded model requires: a rank that has no batch left repeats the last one and drops its answers.
    """
    batch_tokens = batch_tokens or (512 if torch.device(device).type == "cpu" else 16384)
    everything = list(batches(examples, batch_tokens))
    own = everything[rank::world_size]
    with tqdm(total=sum(map(len, own)), desc="HellaSwag", unit="row", leave=False, disable=bool(rank) or None) as bar:
        for batch in own:
            losses = score(trunk, head, batch, device)
            normed = losses / torch.tensor([example.divisors for example in batch])  # inf if cleaning left no ending
            yield from map(Answer, batch, losses.tolist(), normed.tolist())
            bar.update(len(batch))
    if len(own) < math.ceil(len(everything) / world_size):
        score(trunk, head, everything[-1], device)


def batches(examples, batch_tokens) -> Iterator[list[Example]]:
    """Yield batches of similar width, to need little padding; the widest comes first, to run out of memory early."""
    batch, sequences = [], 0
    for example in sorted(examples, key=lambda example: width(example.packs), reverse=True):
        sequences += len(example.packs)
        if batch and width(batch[0].packs) * sequences > batch_tokens:
            yield batch
            batch, sequences = [], len(example.packs)
        batch.append(example)
    if batch:
        yield batch


def lay_out(packs):
    """Write packs as sequences of equal width.

    Returns ids, position_ids and parts, all (B, T) int64, and predictors and targets, both (N) int64. predictors[i] is
    the index, among the B * T positions, of the position that predicts the token targets[i].

        tokens      The man sat | down . | up and left       (without the last token of an ending: it predicts nothing)
        position_ids  0   1   2 |    3 4 |  3   4    5
        parts         0   0   0 |    1 1 |  2   2    2       (padding on the right: -1)
    """
    T, columns, predictors, targets = width(packs), [], [], []
    for row, (context, endings) in enumerate(packs):
        ids, position_ids, parts = list(context), list(range(len(context))), [0] * len(context)
        for part, ending in enumerate(endings, start=1):
            start, length = row * T + len(ids), len(ending) - 1
            predictors += [row * T + len(context) - 1, *range(start, start + length)]
            targets += ending
            ids += ending[:-1]
            position_ids += range(len(context), len(context) + length)
            parts += [part] * length
        columns.append(torch.tensor([ids, position_ids, parts]).T)  # (positions, 3)
    ids, position_ids, parts = pad_sequence(columns, batch_first=True, padding_value=-1).unbind(2)
    return ids.clamp(0), position_ids.clamp(0), parts, torch.tensor(predictors), torch.tensor(targets)


@torch.no_grad()
def score(trunk, head, batch, device="cpu") -> torch.Tensor:
    """Compute the summed losses of the endings of a list of Examples: (rows, 4) float64 on the CPU, in nats."""
    packs = [pack for example in batch for pack in example.packs]
    ids, position_ids, parts, predictors, targets = (tensor.to(device) for tensor in lay_out(packs))
    # A token sees the context and its own ending, but nothing that comes later.
    mask = ((parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None])).tril()[:, None]  # (B, 1, T, T)
    with exact_fp32(device):
        # Select the predicting positions before the head, because the vocabulary makes it expensive.
        states = trunk(ids, position_ids, mask).flatten(0, 1)[predictors]  # (N, C)
        n = HEAD_PARTS[torch.device(device).type]
        pairs = zip(states.tensor_split(n), targets.tensor_split(n), strict=True)
        losses = torch.cat([F.cross_entropy(head(state).float(), target, reduction="none") for state, target in pairs])
    lengths = [len(ending) for _, endings in packs for ending in endings]
    sums = [loss.sum() for loss in losses.cpu().double().split(lengths)]  # on the CPU, because mps has no float64
    return torch.stack(sums).view(-1, 4)


@contextmanager
def exact_fp32(device) -> Iterator[None]:
    """Turn off autocast and TF32, because bf16 logits would change about 1% of the choices."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


# --- the command line -------------------------------------------------------------------------------------------------


def trunk_and_head(model):
    """Return the two callables that `evaluate` takes, for a GPT2LMHeadModel of transformers."""

    def trunk(ids, position_ids, mask):
        return model.transformer(ids, position_ids=position_ids, attention_mask=mask, use_cache=False).last_hidden_state

    return trunk, model.get_output_embeddings()


def report(counts, style) -> str:
    """Show published results, then those of `counts` with standard errors (unbiased, as in the harness)."""
    lines = [f"published ({source}): {PUBLISHED[source]}" for source in (style, "GPT-3's paper")]
    for name, correct in (("acc", counts.correct), ("acc_norm", counts.correct_norm)):
        rate = correct / counts.total
        error = math.sqrt(rate * (1 - rate) / (counts.total - 1)) if counts.total > 1 else math.nan
        lines.append(f"{name} {correct}/{counts.total} = {rate:.4f} ± {error:.4f} ({style})")
    return "\n".join(lines)


def save_answers(path, rows, answers, style, mode="w") -> None:
    """Write one line of JSON per row, in the order of the rows. Raises UserError."""
    try:
        with open(path, mode, encoding="utf-8") as file:
            for answer in sorted(answers, key=lambda answer: answer.example.number):
                number, _, divisors, label = answer.example
                record = {"line": number + 1, "ind": rows[number].get("ind"), "style": style, "label": label}
                record |= {"prediction": choice(answer.losses), "prediction_norm": choice(answer.normed)}
                record |= {"loglikelihoods": [-loss for loss in answer.losses], "divisors": divisors}
                file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(f"--save {path} cannot be written ({error.strerror}): give another file") from error


def command(
    model: str = "gpt2",
    file: Path = FILE,
    limit: int | None = None,
    style: Literal["completion", "harness"] = "completion",
    device: str = "auto",
    save: Path | None = None,
) -> None:
    """Score a GPT-2 on HellaSwag, in float32.

    Args:
        model: a Hugging Face Hub name, a model folder, or an output folder of train_gpt2.py (its newest checkpoint).
        file: the rows, in HellaSwag's jsonl format. The default file is downloaded if missing.
        limit: score only this many rows, the first ones.
        style: the convention: completion (build-nanogpt, llm.c) or harness (lm-evaluation-harness).
        device: auto, cuda, mps or cpu. auto is the first of these that is available.
        save: write the answer to each row to this jsonl file. An existing file is overwritten.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} must be above 0: to score all rows, leave it out")
    device, model = pick_device(device), newest_checkpoint(model)
    rows = find_rows(file, limit, style)
    if save:  # if the file cannot be written, fail now and not after the work
        if save.resolve() == file.resolve():
            raise UserError(f"--save {save} would overwrite the rows: give another name")
        save_answers(save, rows, [], style, mode="a")
    note = "" if len(rows) == FULL_ROWS else f" (not all {FULL_ROWS:,}: do not compare with published results)"
    print(f"{model} on {device}, {len(rows):,} rows of {file}{note}, {style} style\n", flush=True)

    gpt = open_gpt2(model).to(device).eval()
    callables, (encode, _) = trunk_and_head(gpt), load_tokenizer(model, gpt.config.vocab_size)
    examples = prepare(rows, encode, gpt.config.n_positions, style)
    for answer in ask(*callables, examples[:3], device=device):  # show what the model is asked, and its answers
        text, endings = row_texts(rows[answer.example.number], style)
        print(text, *(f"  {i} (loss {answer.normed[i]:.4f}) {endings[i]}" for i in range(4)), sep="\n")
        print(f"predicted {choice(answer.normed)}, actual {answer.example.label}\n")
    start = time.perf_counter()
    answers = list(ask(*callables, examples, device=device))
    print(f"{len(rows):,} rows in {time.perf_counter() - start:.1f} s")
    if not all(math.isfinite(loss) for answer in answers for loss in answer.losses):
        raise UserError(f"--model {model} has weights that are not finite: give another checkpoint")
    print(report(count(answers), style))
    if save:
        save_answers(save, rows, answers, style)


def main() -> None:
    """Run the command line. The exit code is 2 for a user error and 130 for Ctrl-C."""
    with tolerant_output(), exit_on_error():
        cli(command)


if __name__ == "__main__":
    main()
