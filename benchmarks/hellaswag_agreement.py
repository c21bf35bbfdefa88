"""
Compare the log-likelihoods and choices of hellaswag.py, row by row, with implementations that share no code with it.

    pip install "lm-eval[hf]==0.4.13"    (only for this check; the project does not depend on it)
    python benchmarks/hellaswag_agreement.py --model FOLDER --file hellaswag_val.jsonl
    python benchmarks/hellaswag_agreement.py --model FOLDER --file hellaswag_val.jsonl --without_lm_eval

The harness style is compared with lm-evaluation-harness: its hellaswag task, on a local file, and its own scoring of a
Hugging Face model. The completion style and the model of train_gpt2.py are compared with a plain loop, which scores one
ending at a time in fp32 without padding. Each comparison is made for the weights of FOLDER, for random weights of its
shape, and for random weights with 80 positions, which require contexts to be cut. Writes hellaswag_agreement.md and
.json: see measure.py.
"""

import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from measure import describe, make_parser, parse_flags, run_main, write_report

import hellaswag
from support.checkpoints import newest_checkpoint, open_gpt2
from support.tokenizer import load_tokenizer
from train_gpt2 import GPT

COLUMNS = {
    "ours, compared with": ("comparison", ""), "rows": ("rows", ""), "rows cut or divided": ("rows_cut", ""),
    "other choices: acc": ("differing_acc", ""), "acc_norm": ("differing_acc_norm", ""),
    "largest difference of a log-likelihood, nats": ("max_difference", ".1e"),
    "our acc": ("acc", ".4f"), "our acc_norm": ("acc_norm", ".4f"),
    "their acc": ("their_acc", ".4f"), "their acc_norm": ("their_acc_norm", ".4f"),
}  # fmt: skip


def from_harness(folder, file, rows):
    """Return lm-eval's log-likelihoods (rows, 4), choices for acc and for acc_norm, and {metric: value}."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the rows are local; must be set before the import
    import lm_eval

    original = Path(lm_eval.__file__).parent / "tasks" / "hellaswag" / "hellaswag.yaml"
    with tempfile.TemporaryDirectory() as into:
        task = Path(into) / "hellaswag.yaml"  # the original, except for the location of the rows
        place = json.dumps({"data_files": {"validation": str(file)}})
        lines = ["task: hellaswag", "training_split: null", "dataset_path: json", f"dataset_kwargs: {place}"]
        task.write_text("\n".join([f"include: {original}", *lines]))
        done = lm_eval.simple_evaluate(
            model="hf", model_args={"pretrained": str(folder), "dtype": "float32"}, batch_size=1, device="cpu",
            tasks=[str(task)], limit=len(rows), bootstrap_iters=0,
        )  # fmt: skip
    samples = sorted(done["samples"]["hellaswag"], key=lambda sample: sample["doc_id"])
    for sample, row in zip(samples, rows, strict=True):
        assert sample["doc"]["endings"] == row["endings"]
    logs = torch.tensor(
        [[float(log) for log, _ in sample["filtered_resps"]] for sample in samples], dtype=torch.float64
    )
    characters = torch.tensor([[len(choice) for choice in sample["doc"]["choices"]] for sample in samples])
    choices, choices_norm = logs.argmax(1), (logs / characters).argmax(1)
    labels = torch.tensor([row["label"] for row in rows])
    # These choices must be the ones that lm-eval counted.
    for metric, chosen in (("acc", choices), ("acc_norm", choices_norm)):
        assert [int(sample[metric]) for sample in samples] == (chosen == labels).int().tolist()
    scores = done["results"]["hellaswag"]
    return logs, choices, choices_norm, {name: scores[f"{name},none"] for name in ("acc", "acc_norm")}


@torch.no_grad()
def from_plain_loop(folder, rows, encode):
    """Return the same values from a loop over single endings, in completion style."""
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    logs, lengths = [], []
    for row in rows:
        for ending in row["endings"]:
            before, after = encode(row["ctx"]), encode(" " + ending)
            tokens = torch.tensor((before + after)[-model.config.n_positions - 1 :])
            logits = model(tokens[None, :-1]).logits[0]
            logs.append(-F.cross_entropy(logits, tokens[1:], reduction="none")[-len(after) :].double().sum())
            lengths.append(len(after))
    logs, lengths = torch.stack(logs).view(-1, 4), torch.tensor(lengths).view(-1, 4)
    choices, choices_norm = logs.argmax(1), (logs / lengths).argmax(1)
    labels = torch.tensor([row["label"] for row in rows])
    scores = {
        "acc": (choices == labels).double().mean().item(),
        "acc_norm": (choices_norm == labels).double().mean().item(),
    }
    return logs, choices, choices_norm, scores


def compare(name, answers, theirs):
    """Return a row of the table."""
    logs, choices, choices_norm, scores = theirs
    answers = sorted(answers, key=lambda answer: answer.example.number)
    ours = -torch.tensor([answer.losses for answer in answers], dtype=torch.float64)
    differing = sum(hellaswag.choice(a.losses) != c for a, c in zip(answers, choices.tolist(), strict=True))
    differing_norm = sum(hellaswag.choice(a.normed) != c for a, c in zip(answers, choices_norm.tolist(), strict=True))
    total, correct, correct_norm = hellaswag.count(answers)
    return {
        "comparison": name, "rows": total, "differing_acc": differing, "differing_acc_norm": differing_norm,
        "max_difference": (ours - logs).abs().max().item(), "mean_loglikelihood": ours.mean().item(),
        "rows_cut": sum(len(answer.example.packs) > 1 for answer in answers),
        "acc": correct / total, "acc_norm": correct_norm / total, "their_acc": scores["acc"],
        "their_acc_norm": scores["acc_norm"],
    }  # fmt: skip


def comparisons(folder, file, rows, weights, with_lm_eval):
    """Yield all comparisons of one model folder. weights: their name in the table."""
    model = open_gpt2(folder)
    encode, _ = load_tokenizer(str(folder), model.config.vocab_size)
    callables, positions = hellaswag.trunk_and_head(model.eval()), model.config.n_positions
    if with_lm_eval:
        harness, theirs = hellaswag.prepare(rows, encode, positions, "harness"), from_harness(folder, file, rows)
        yield compare(f"{weights}: harness, lm-eval", hellaswag.ask(*callables, harness), theirs)
    completion, plain = hellaswag.prepare(rows, encode, positions), from_plain_loop(folder, rows, encode)
    yield compare(f"{weights}: completion, plain loop", hellaswag.ask(*callables, completion), plain)
    gpt = GPT.from_pretrained(str(folder)).eval()
    name = f"{weights}: completion by train_gpt2.GPT, plain loop"
    yield compare(name, hellaswag.ask(gpt.trunk, gpt.head, completion), plain)


def variants(folder, into):
    """Yield (name, folder): the given folder, and two with its tokenizer and random weights."""
    yield "trained", Path(folder)
    for name, positions in (("random", None), ("random, 80 positions", 80)):
        copy = Path(into) / name.replace(", ", "_").replace(" ", "_")
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("training_state.pt", "*.safetensors", "SHA256SUMS"))
        config = transformers.GPT2Config.from_pretrained(folder)
        config.n_positions = positions or config.n_positions
        torch.manual_seed(0)
        transformers.GPT2LMHeadModel(config).save_pretrained(copy)
        yield name, copy


def parse_command_line():
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="a model folder or an output folder of train_gpt2.py")
    parser.add_argument("--file", type=Path, required=True, help="rows with every field of the official file")
    parser.add_argument("--limit", type=int, help="compare only this many rows, the first ones")
    parser.add_argument("--without_lm_eval", action="store_true", help="compare only with the plain loop")
    args = parse_flags(parser, "hellaswag_agreement")
    if not args.without_lm_eval and importlib.util.find_spec("lm_eval") is None:
        parser.error('lm-eval is not installed: pip install "lm-eval[hf]==0.4.13", or give --without_lm_eval')
    return args


def main():
    args = parse_command_line()
    about = describe(("torch", "transformers", *([] if args.without_lm_eval else ["lm_eval"])))
    rows, folder = hellaswag.load_rows(args.file, args.limit, "harness"), newest_checkpoint(args.model)
    lines, file, with_lm_eval = [], args.file.resolve(), not args.without_lm_eval
    with tempfile.TemporaryDirectory() as into:
        for weights, variant in variants(folder, into):
            lines += comparisons(variant, file, rows, weights, with_lm_eval)
    c = transformers.GPT2Config.from_pretrained(folder)
    shape = (
        f"{c.n_layer} layers, {c.n_head} heads, {c.n_embd} channels, {c.n_positions} positions, {c.vocab_size:,} ids"
    )
    about |= {"file": file.name, "model": shape}
    write_report(args, "HellaSwag compared with other implementations", about, lines, COLUMNS)


if __name__ == "__main__":
    run_main(main)
