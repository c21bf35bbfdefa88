"""
Compare the log-likelihoods and choices of hellaswag.py, row by row, with implementations that share no code with it.

    pip install "lm-eval[hf]==0.4.13"    (for this check alone; the project does not depend on it)
    python benchmarks/hellaswag_agreement.py --model FOLDER --file hellaswag_val.jsonl

The harness style is compared with lm-evaluation-harness: its hellaswag task, on a local file, and its own scoring of a
Hugging Face model. The completion style and the model of train_gpt2.py are compared with a plain loop, which scores one
ending at a time in fp32 without padding. Each comparison is made for the weights of FOLDER, for random weights of its
shape, and for random weights with 80 positions, which require contexts to be cut. Prints a Markdown table and writes
benchmarks/results/hellaswag_agreement.json.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import torch.nn.functional as F
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hellaswag
from support.checkpoints import load_tokenizer, newest_checkpoint, open_gpt2
from train_gpt2 import GPT


def from_harness(folder, file, rows):
    """Return lm-eval's log-likelihoods (rows, 4), choices for acc and for acc_norm, and {metric: value}."""
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
    """Compute one line of the table."""
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


def comparisons(folder, file, rows, weights):
    """Yield all comparisons of one model folder."""
    model = open_gpt2(folder)
    encode, _ = load_tokenizer(str(folder), model.config.vocab_size)
    callables, positions = hellaswag.trunk_and_head(model.eval()), model.config.n_positions
    harness = hellaswag.prepare(rows, encode, positions, "harness")
    yield compare(f"{weights}: harness, lm-eval", hellaswag.ask(*callables, harness), from_harness(folder, file, rows))
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
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("training_state.pt", "*.safetensors"))
        config = transformers.GPT2Config.from_pretrained(folder)
        config.n_positions = positions or config.n_positions
        torch.manual_seed(0)
        transformers.GPT2LMHeadModel(config).save_pretrained(copy)
        yield name, copy


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="a model folder or an output folder of train_gpt2.py")
    parser.add_argument("--file", required=True, help="rows with every field of the official file")
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    rows, folder = hellaswag.load_rows(args.file, args.limit, "harness"), newest_checkpoint(args.model)
    lines = []
    with tempfile.TemporaryDirectory() as into:
        for weights, variant in variants(folder, into):
            lines += comparisons(variant, Path(args.file).resolve(), rows, weights)
    packages = {name: version(name) for name in ("lm_eval", "torch", "transformers")}
    config = transformers.GPT2Config.from_pretrained(folder)
    shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")}
    result = {"file": Path(args.file).name, "model": shape, "packages": packages, "comparisons": lines}
    out = Path(__file__).parent / "results" / "hellaswag_agreement.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print("| ours, beside | rows | of them cut or divided | other choices: acc, acc_norm | largest difference of a "
          "log-likelihood, nats | acc, acc_norm | theirs |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for line in lines:
        print("| {comparison} | {rows} | {rows_cut} | {differing_acc}, {differing_acc_norm} | {max_difference:.1e} | "
              "{acc:.4f}, {acc_norm:.4f} | {their_acc:.4f}, {their_acc_norm:.4f} |".format(**line))  # fmt: skip


if __name__ == "__main__":
    main()
