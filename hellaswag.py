"""
Score a language model on HellaSwag (Zellers et al. 2019, https://arxiv.org/abs/1905.07830): which of four endings
continues a context? A model answers with the ending that it finds the likeliest; chance is 0.25.

    python hellaswag.py --model gpt2                 # a model of the Hugging Face Hub
    python hellaswag.py --model log --limit 1000     # the newest checkpoint of train_gpt2.py, on the first 1,000 rows
    python hellaswag.py --model gpt2 --style harness --save answers.jsonl

Two conventions are in use, and their figures must not be compared. In both, `acc` takes the ending of the lowest summed
loss; a sum favours short endings, so `acc_norm` divides it first.

    completion  build-nanogpt's and llm.c's: the tokens of the context as it is, then those of " " + ending;
                acc_norm divides by the ending's tokens
    harness     lm-evaluation-harness's: its wording and cleaning of both; acc_norm divides by the ending's characters

`evaluate` goes prepare (tokens) -> batches -> score (losses) -> count. It takes callables and knows neither GPT nor
torch.distributed. A row's context is computed once, for its four endings follow it side by side and do not see each
other. Shapes: B sequences (mostly one a row of the file), T positions, C channels, V ids, N scored tokens.
"""

import http.client
import itertools
import json
import logging
import math
import os
import re
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
FILE = Path(__file__).parent / "hellaswag" / "hellaswag_val.jsonl"
FULL_ROWS = 10_042  # rows of the official validation file
HEAD_PARTS = {
    "cpu": 2,
    "cuda": 8,
    "mps": 8,
}  # in which a batch is projected to the vocabulary: 200 KB of logits a token
FIELDS = {"completion": ["ctx"], "harness": ["activity_label", "ctx_a", "ctx_b"]}  # of a row, to make the context of

# acc / acc_norm over all rows: GPT-2's from build-nanogpt's hellaswag.py and notebook, which quote EleutherAI's for
# harness; GPT-3's, in a wording of its own, from its paper (Brown et al. 2020, table H.1)
PUBLISHED = {
    "completion": "GPT-2 124M 0.2859 / 0.2955, 350M - / 0.3752, 774M - / 0.4320, 1558M 0.3842 / 0.4893",
    "harness": "GPT-2 124M 0.2892 / 0.3114, 1558M 0.4004 / 0.5089",
    "GPT-3's paper": "125M - / 0.337, 350M - / 0.436, 760M - / 0.510, 1.3B - / 0.547",
}


class HellaSwagError(ValueError):
    """A user's mistake, in one line that names the file or flag and what mends it."""


# --- the file ---------------------------------------------------------------------------------------------------------


def load_rows(path, limit=None, style="completion") -> list[dict]:
    """Read the first `limit` rows of a jsonl file, or all. Raises HellaSwagError, naming file:line for a bad row."""
    fields = " and ".join(f'"{field}"' for field in FIELDS[style])
    rows, shape = [], f'an object with text in {fields}, four texts "endings" and a "label" of 0 to 3'
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(itertools.islice(file, limit), start=1):
                if (row := parse(line, style)) is None:
                    message = f"not a HellaSwag row for {style} style, {shape}: mend or replace the file"
                    raise HellaSwagError(f"{path}:{number}: {message}")
                rows.append(row)
    except OSError as error:
        raise HellaSwagError(f"{path}: {error.strerror}; without the flag the official file is downloaded") from error
    if not rows:
        raise HellaSwagError(f"{path}: the file is empty; without the flag the official file is downloaded")
    return rows


def parse(line: bytes, style="completion") -> dict | None:
    """The row in a line of the file, or None where there is none."""
    try:
        row = json.loads(line)
        texts, endings, label = [row[field] for field in FIELDS[style]], row["endings"], row["label"]
        json.dumps([*texts, *endings], ensure_ascii=False).encode()  # raises for half a surrogate pair
    except (ValueError, KeyError, TypeError, RecursionError):  # ValueError is neither JSON nor UTF-8
        return None
    fits = isinstance(endings, list) and len(endings) == 4 and all(isinstance(e, str) and e for e in endings)
    fits &= all(isinstance(text, str) for text in texts) and any(texts)  # WikiHow's ctx_b is empty
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


def find_rows(path, limit=None, style="completion") -> list[dict]:
    """load_rows, before which the official file, whose place is FILE, is downloaded if missing; it must be whole."""
    if Path(path) != FILE:
        return load_rows(path, limit, style)
    download(FILE)
    try:
        rows = load_rows(FILE, style=style)
    except HellaSwagError:  # an error page, or cut within a row
        rows = []
    if len(rows) != FULL_ROWS:
        mend = "delete it, and it is downloaded again"
        raise HellaSwagError(f"{FILE} is not the official file, which has {FULL_ROWS:,} rows: {mend}")
    return rows[:limit]


# --- a row as text and as tokens --------------------------------------------------------------------------------------


class Example(NamedTuple):
    """A row in tokens. Its packs, (context, endings), hold the four endings in order, all four in the usual case."""

    number: int  # of the row, from 0
    packs: list[tuple[list[int], list[list[int]]]]
    divisors: list[int]  # acc_norm's, one an ending
    label: int


def width(packs) -> int:
    """Positions of the widest of packs; the last token of an ending predicts nothing and takes none."""
    return max(len(context) + sum(len(ending) - 1 for ending in endings) for context, endings in packs)


def clean(text: str) -> str:
    """What the harness makes of WikiHow's marks: [title] ends a sentence, [step] vanishes. May leave a space last."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def texts(row, style) -> tuple[str, list[str]]:
    """A row's context and four endings, worded as a convention wants them."""
    if style == "completion":
        return row["ctx"], row["endings"]
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return clean(context), [clean(ending) for ending in row["endings"]]


def prepare(rows, encode, max_length=1024, style="completion") -> list[Example]:
    """
    Tokenize rows for `evaluate`. As in the harness, a context too long for `max_length` positions loses its beginning,
    for each ending no more than it must. Raises HellaSwagError where an ending leaves no room for a context.
    """
    examples = []
    for number, row in enumerate(rows):
        text, ending_texts = texts(row, style)
        if style == "completion":
            context, endings = encode(text), [encode(" " + ending) for ending in ending_texts]
            divisors = [len(ending) for ending in endings]
        else:  # the harness splits the tokens of the whole; a space that cleaning left at the end goes to the ending
            context = encode(text.rstrip())
            endings = [encode(f"{text} {ending}")[len(context) :] for ending in ending_texts]
            divisors = [len(ending) for ending in ending_texts]
        if not context or not all(endings):
            raise HellaSwagError(f"HellaSwag: row {number + 1}: its context or an ending has no tokens")
        if (longest := max(map(len, endings))) > max_length:
            raise HellaSwagError(f"HellaSwag: an ending of {longest} tokens needs more than {max_length} positions")
        packs = [(context, endings)]
        if width(packs) > max_length:  # each ending goes behind a context of its own, of at least one token
            packs = [(context[max(0, width([(context, [e])]) - max_length) :], [e]) for e in endings]
        examples.append(Example(number, packs, divisors, row["label"]))
    return examples


# --- the evaluation ---------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a model makes of a row: the losses of its four endings in nats, summed, and divided for acc_norm."""

    example: Example
    losses: list[float]
    normed: list[float]


class Counts(NamedTuple):
    """Rows scored, and those of them answered rightly by `acc` and by `acc_norm`. Counts of several ranks add up."""

    total: int
    correct: int
    correct_norm: int


def choice(losses) -> int:
    """The likeliest ending; the first of equals."""
    return losses.index(min(losses))


def count(answers) -> Counts:
    """Add up Answers."""
    rights = [(1, choice(losses) == row.label, choice(normed) == row.label) for row, losses, normed in answers]
    return Counts(*map(sum, zip(*rights, strict=True))) if rights else Counts(0, 0, 0)


def evaluate(trunk, head, encode, rows, rank=0, world_size=1, device="cpu", max_length=1024, batch_tokens=None,
             style="completion") -> Counts:  # fmt: skip
    """
    Count the right answers in this rank's share of `rows`; the sum over the ranks is the same at any world size.

    trunk, head, rank, world_size, device, batch_tokens: as `ask` takes them.
    encode(text) -> token ids, with no special ones added.
    rows: of load_rows; or what `prepare` made of them, so that many evaluations tokenize once: encode, max_length and
        style, which it was given, then have no say.
    max_length: the model's positions. style: completion or harness. Raises HellaSwagError as `prepare` does.
    """
    prepared = rows if rows and isinstance(rows[0], Example) else prepare(rows, encode, max_length, style)
    return count(ask(trunk, head, prepared, rank, world_size, device, batch_tokens))


def ask(trunk, head, examples, rank=0, world_size=1, device="cpu", batch_tokens=None):
    """
    Yield the Answer to each Example of this rank's share, longest rows first.

    trunk(ids, position_ids, mask) -> (B, T, C) final hidden states. ids and position_ids are (B, T) int64 on `device`;
        mask is (B, 1, T, T) bool, True where the row may look at the column, causality included. Neither T nor a
        position exceeds `prepare`'s max_length. Dropout is the caller's to turn off.
    head(states) -> (..., V) logits.
    batch_tokens: padded tokens of one forward pass, which bound its memory and change no answer; on a CPU 512 unless
        given, which stay in its caches, elsewhere 16,384.

    Every rank forms the same batches and takes each world_size-th of them. All ranks call trunk and head equally often,
    as models in shards need: where the batches run out, some repeat the last and drop its answers.
    """
    batch_tokens = batch_tokens or (512 if torch.device(device).type == "cpu" else 16384)
    everything = list(batches(examples, batch_tokens))
    own = everything[rank::world_size]
    with tqdm(total=sum(map(len, own)), desc="HellaSwag", unit="row", leave=False, disable=bool(rank) or None) as bar:
        for batch in own:
            losses = score(trunk, head, batch, device)
            normed = losses / torch.tensor([example.divisors for example in batch])  # inf for an ending cleaned away
            yield from map(Answer, batch, losses.tolist(), normed.tolist())
            bar.update(len(batch))
    if len(own) < math.ceil(len(everything) / world_size):
        score(trunk, head, everything[-1], device)


def batches(examples, batch_tokens):
    """Yield lists of examples of like widths, so that little is padding; widest first, to run out of memory soon."""
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
    """
    Write packs as sequences of one width. Returns ids, position_ids and parts, all (B, T) int64, and predictors and
    targets, both (N), for the scored tokens: token targets[i] is predicted at predictors[i] of the B * T positions.

        tokens      The man sat | down . | up and left       (the last token of an ending predicts nothing: not there)
        position_ids  0   1   2 |    3 4 |  3   4    5
        parts         0   0   0 |    1 1 |  2   2    2       (padding on the right: -1)
    """
    T, columns, predictors, targets = width(packs), [], [], []
    for row, (context, endings) in enumerate(packs):
        ids, position_ids, parts = list(context), list(range(len(context))), [0] * len(context)
        for part, ending in enumerate(endings, start=1):
            here, length = row * T + len(ids), len(ending) - 1
            predictors += [row * T + len(context) - 1, *range(here, here + length)]
            targets += ending
            ids += ending[:-1]
            position_ids += range(len(context), len(context) + length)
            parts += [part] * length
        columns.append(torch.tensor([ids, position_ids, parts]).T)  # (positions, 3)
    ids, position_ids, parts = pad_sequence(columns, batch_first=True, padding_value=-1).unbind(2)
    return ids.clamp(0), position_ids.clamp(0), parts, torch.tensor(predictors), torch.tensor(targets)


@torch.no_grad()
def score(trunk, head, batch, device="cpu") -> torch.Tensor:
    """Summed losses in nats of the endings of a list of Examples: (rows, 4) float64 on the CPU."""
    packs = [pack for example in batch for pack in example.packs]
    ids, position_ids, parts, predictors, targets = (tensor.to(device) for tensor in lay_out(packs))
    # an ending sees the context and itself; what comes later, nobody
    mask = ((parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None])).tril()[:, None]  # (B, 1, T, T)
    with exact_fp32(device):
        states = trunk(ids, position_ids, mask).flatten(0, 1)[predictors]  # (N, C): spare the wide head all the rest
        parts = HEAD_PARTS[torch.device(device).type]
        pieces = zip(states.tensor_split(parts), targets.tensor_split(parts), strict=True)
        losses = torch.cat([F.cross_entropy(head(state).float(), target, reduction="none") for state, target in pieces])
    lengths = [len(ending) for _, endings in packs for ending in endings]
    sums = [loss.sum() for loss in losses.cpu().double().split(lengths)]  # on the CPU, since mps has no float64
    return torch.stack(sums).view(-1, 4)


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


def newest_checkpoint(model: str, flag: str = "--model") -> str:
    """The newest checkpoint of an output folder of train_gpt2.py; a Hub name or a model folder stays as it is."""
    if not os.path.isdir(model) or os.path.exists(os.path.join(model, "config.json")):
        return model
    if not (steps := list_checkpoints(model)):
        raise HellaSwagError(f"{flag} {model}: the folder holds neither a config.json nor checkpoints/step_NNNNNN")
    return str(steps[-1])


def import_transformers():
    """The module, told to print errors alone. It takes seconds to import, so only what needs it calls this."""
    # transformers imports torchao, if it is there, which warns of what it has for GPUs and compilers that are not
    for name in ("huggingface_hub", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    return transformers


def load_model(name: str):
    """Open a GPT-2 by Hub name or folder: returns (model in fp32, encode). Raises HellaSwagError."""
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if config.model_type != "gpt2":
            raise ValueError(f"a {config.model_type} model, where a GPT-2 is needed")
        # sdpa takes masks of True and False; another attention might add them to its scores
        options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
        options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        if config.activation_function == "gelu_new":  # the same formula, in eight passes over memory instead of one
            config.activation_function = "gelu_pytorch_tanh"
        model, report = transformers.AutoModelForCausalLM.from_pretrained(name, config=config, **options)
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
            tokenizer = import_transformers().AutoTokenizer.from_pretrained(name)
            return lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.decode
        if vocab_size != 50257:
            raise ValueError(f"no tokenizer files, and {vocab_size:,} ids are not GPT-2's 50,257")
        from fineweb import get_encoding

        encoding = get_encoding("gpt2")
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


def trunk_and_head(model):
    """The two callables that `evaluate` takes, of a Hugging Face GPT2LMHeadModel."""

    def trunk(ids, position_ids, mask):
        call = model.transformer(input_ids=ids, position_ids=position_ids, attention_mask=mask, use_cache=False)
        return call.last_hidden_state

    return trunk, model.get_output_embeddings()


def render(text, endings, answer) -> str:
    """A row with the loss of each ending, divided as acc_norm wants it, and the choice that they make."""
    lines = [f"  {i} (loss {answer.normed[i]:.4f}) {ending}" for i, ending in enumerate(endings)]
    return "\n".join([text, *lines, f"predicted {choice(answer.normed)}, actual {answer.example.label}\n"])


def report(counts, style) -> str:
    """Published figures, and below them those of `counts` with standard errors (unbiased, as the harness has them)."""
    lines = [f"published ({source}): {PUBLISHED[source]}" for source in (style, "GPT-3's paper")]
    for name, correct in (("acc", counts.correct), ("acc_norm", counts.correct_norm)):
        rate = correct / counts.total
        error = math.sqrt(rate * (1 - rate) / (counts.total - 1)) if counts.total > 1 else math.nan
        lines.append(f"{name} {correct}/{counts.total} = {rate:.4f} ± {error:.4f} ({style})")
    return "\n".join(lines)


def save_answers(path, rows, answers, style, mode="w") -> None:
    """Write a line of JSON for each row, in the rows' order. Raises HellaSwagError."""
    try:
        with open(path, mode, encoding="utf-8") as file:
            for answer in sorted(answers, key=lambda answer: answer.example.number):
                number, _, divisors, label = answer.example
                record = {"line": number + 1, "ind": rows[number].get("ind"), "style": style, "label": label}
                record |= {"prediction": choice(answer.losses), "prediction_norm": choice(answer.normed)}
                record |= {"loglikelihoods": [-loss for loss in answer.losses], "divisors": divisors}
                file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise HellaSwagError(f"--save {path}: {error.strerror}; give a file in a folder that can be written") from error


def run(
    model: str = "gpt2",
    file: Path = FILE,
    limit: int | None = None,
    style: Literal["completion", "harness"] = "completion",
    device: str = "auto",
    save: Path | None = None,
) -> None:
    """
    Score a GPT-2 on HellaSwag, in fp32.

    Args:
        model: a Hugging Face Hub name, a model folder, or an output folder of train_gpt2.py (its newest checkpoint).
        file: the rows, in HellaSwag's jsonl format; the default is downloaded if missing.
        limit: score the first rows only, so many of them.
        style: the convention, build-nanogpt's and llm.c's (completion) or lm-evaluation-harness's (harness).
        device: auto, cuda, mps or cpu; auto is the first of these that is here.
        save: a file for the answer to each row, as jsonl; what it held is lost.
    """
    if limit is not None and limit < 1:
        raise HellaSwagError(f"--limit {limit}: give a number above 0, or leave it out")
    device, model = pick_device(device), newest_checkpoint(model)
    rows = find_rows(file, limit, style)
    if save and Path(save).resolve() == Path(file).resolve():
        raise HellaSwagError(f"--save {save}: the rows are in that file; give another name")
    if save:  # now, rather than when the work is done, is the time to find that it fails
        save_answers(save, rows, [], style, mode="a")
    note = "" if len(rows) == FULL_ROWS else f" (not all {FULL_ROWS:,}: do not compare with published figures)"
    print(f"{model} on {device}, {len(rows):,} rows of {file}{note}, {style} style\n", flush=True)

    gpt, encode = load_model(model)
    callables = trunk_and_head(gpt.to(device).eval())
    examples = prepare(rows, encode, gpt.config.max_position_embeddings, style)
    for view in ask(*callables, examples[:3], device=device):  # what is asked, and what the model makes of it
        print(render(*texts(rows[view.example.number], style), view))
    start = time.perf_counter()
    answers = list(ask(*callables, examples, device=device))
    print(f"{len(rows):,} rows in {time.perf_counter() - start:.1f} s")
    if not all(map(math.isfinite, itertools.chain.from_iterable(answer.losses for answer in answers))):
        raise HellaSwagError(f"--model {model}: its losses are not finite, so are its weights: give another checkpoint")
    print(report(count(answers), style))
    if save:
        save_answers(save, rows, answers, style)


def main() -> None:
    """Read the command line and run; a user's mistake ends in one line and exit code 2."""
    import tyro

    try:
        tyro.cli(run, use_underscores=True)
    except HellaSwagError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a row may hold what the terminal cannot show
    main()
