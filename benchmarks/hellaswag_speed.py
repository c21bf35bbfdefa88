"""
Measure the speed of HellaSwag compared with build-nanogpt's loop: the same rows, GPT-2 124M's shape, random weights.

    git clone https://github.com/karpathy/build-nanogpt PEER
    python benchmarks/hellaswag_speed.py --peer PEER --file hellaswag_val.jsonl --rows 60

The peer's render_example is imported from its hellaswag.py. The loop around it is that of its evaluate(), with the
counting and without the printing. Two pairs with the same weights are timed, alternating: Hugging Face's class, as each
command opens it, and train_gpt2.GPT on both sides. Our time includes everything from text to counts, also tokenizing.
Writes hellaswag_speed.md and .json (on a GPU hellaswag_speed_cuda): see measure.py.
"""

import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from measure import describe, make_parser, parse_flags, require_checkouts, revision, run_main, write_report

import fineweb
import hellaswag
from support.checkpoints import open_gpt2
from support.common import pick_device
from train_gpt2 import GPT, GPTConfig

COLUMNS = {
    "model": ("model", ""), "build-nanogpt's loop, s": ("peer_seconds", ".2f"), "ours, s": ("our_seconds", ".2f"),
    "ratio": ("ratio", ".2f"),
}  # fmt: skip


def load_peer(folder):
    """Import build-nanogpt's hellaswag.py as a module."""
    spec = importlib.util.spec_from_file_location("peer_hellaswag", Path(folder) / "hellaswag.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def peer_counts(render_example, logits_of, rows, device):
    """Do what build-nanogpt does with each row: four padded sequences, logits and losses everywhere, then a mask."""
    correct = correct_norm = 0
    for row in rows:
        _, tokens, mask, label = render_example(row)
        tokens, mask = tokens.to(device), mask.to(device)
        logits = logits_of(tokens)
        logits, targets = logits[..., :-1, :].contiguous(), tokens[..., 1:].contiguous()
        losses = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), reduction="none")
        mask = mask[..., 1:].contiguous()
        sums = (losses.view(tokens.size(0), -1) * mask).sum(dim=1)
        correct += int(sums.argmin().item() == label)
        correct_norm += int((sums / mask.sum(dim=1)).argmin().item() == label)
    return hellaswag.Counts(len(rows), correct, correct_norm)


def positions(rows, encode):
    """Describe the token positions that the peer's loop and ours compute, before the padding of our batches."""
    packs = [example.packs for example in hellaswag.prepare(rows, encode)]
    peer = sum(4 * (len(pack[0][0]) + max(map(len, pack[0][1]))) for pack in packs)
    ours = sum(hellaswag.width(pack) for pack in packs)
    return f"{peer:,} by build-nanogpt's loop, {ours:,} by ours, for {len(rows):,} rows"


def time_pair(name, peer, ours, repetitions):
    """Run the two alternately. Return a row: medians of their seconds, and of the ratios of adjacent runs."""
    seconds, counts = {"peer": [], "ours": []}, {}
    for _ in range(repetitions + 1):  # the first warms up
        for who, work in (("peer", peer), ("ours", ours)):
            start = time.perf_counter()
            counts[who] = work()  # returns numbers on the CPU, so the device has finished
            seconds[who].append(time.perf_counter() - start)
            print(f"{name}, {who}: {seconds[who][-1]:.2f} s, {tuple(counts[who])}", file=sys.stderr, flush=True)
    ratios = [a / b for a, b in zip(seconds["peer"][1:], seconds["ours"][1:], strict=True)]
    return {
        "model": name, "peer_seconds": statistics.median(seconds["peer"][1:]),
        "our_seconds": statistics.median(seconds["ours"][1:]), "ratio": statistics.median(ratios),
        "ratios": ratios, "peer_counts": counts["peer"], "our_counts": counts["ours"],
    }  # fmt: skip


def make_models(n_layer, device):
    """Return a random GPT with GPT-2 124M's shape, and its weights as each of the two commands opens them."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(n_layer=n_layer)).to(device).eval()
    with tempfile.TemporaryDirectory() as folder:
        gpt.save_pretrained(folder)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).to(device).eval()
        return gpt, theirs, open_gpt2(folder).to(device).eval()


def parse_command_line():
    parser = make_parser(__doc__, repetitions=5)
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of build-nanogpt")
    parser.add_argument("--file", type=Path, required=True, help="HellaSwag's rows")
    parser.add_argument("--rows", type=int, default=60, help="the number of rows, evenly spaced in the file")
    parser.add_argument("--n_layer", type=int, default=12, help="fewer layers, for a trial run")
    parser.add_argument("--device", default="cpu", help="auto, cuda, mps or cpu")
    parser.add_argument("--batch_tokens", type=int, help="the most tokens of our batches (the default of hellaswag.py)")
    args = parse_flags(parser, "hellaswag_speed")
    require_checkouts(parser, peer=(args.peer, "hellaswag.py"))
    args.device = pick_device(args.device)
    if args.name == "hellaswag_speed" and args.device != "cpu":
        args.name += f"_{args.device}"
    return args


def main():
    args = parse_command_line()
    about, device, every = describe(("torch", "transformers")), args.device, hellaswag.load_rows(args.file)
    rows = every[:: max(1, len(every) // args.rows)][: args.rows]
    encode, render_example = fineweb.get_encoding("gpt2").encode_ordinary, load_peer(args.peer).render_example
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: the peer's evaluate() turns it on, ours turns it off
    gpt, theirs, opened = make_models(args.n_layer, device)

    def ours(trunk, head):
        return hellaswag.evaluate(trunk, head, encode, rows, device=device, batch_tokens=args.batch_tokens)

    pairs = [
        ("GPT2LMHeadModel", lambda tokens: theirs(tokens).logits, hellaswag.trunk_and_head(opened)),
        ("train_gpt2.GPT", lambda tokens: gpt(tokens)[0], (gpt.trunk, gpt.head)),
    ]
    timings = [
        time_pair(name, lambda logits_of=logits_of: peer_counts(render_example, logits_of, rows, device),
                  lambda callables=callables: ours(*callables), args.repetitions)
        for name, logits_of, callables in pairs
    ]  # fmt: skip
    about |= {
        "peer": f"{args.peer.name} at {revision(args.peer)}",
        "model": f"{args.n_layer} layers, GPT-2 124M's width, random weights, float32, on {device}",
        "token positions": positions(rows, encode),
        "token positions of the file": positions(every, encode),
        "runs": f"{args.repetitions}, alternating; medians",
    }
    write_report(args, "The speed of HellaSwag", about, timings, COLUMNS)


if __name__ == "__main__":
    run_main(main)
