"""
Time HellaSwag against build-nanogpt's loop, alternately: the same rows, GPT-2 124M's shape, random weights.

    git clone https://github.com/karpathy/build-nanogpt PEER
    python benchmarks/hellaswag_speed.py --peer PEER --file hellaswag_val.jsonl --rows 60

The peer's render_example is imported from its hellaswag.py. The loop around it is that of its evaluate(), with the
counting and without the printing. Two pairs with the same weights are timed: Hugging Face's class, as each command
opens it, and train_gpt2.GPT on both sides. Our time includes everything from text to counts, also tokenizing. Prints a
Markdown table and writes benchmarks/results/hellaswag_speed.json, or hellaswag_speed_cuda.json. Run nothing else
meanwhile.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fineweb
import hellaswag
from support.checkpoints import open_gpt2
from train_gpt2 import GPT, GPTConfig


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
    """Count the token positions that the peer's loop and ours compute, before the padding of our batches."""
    packs = [example.packs for example in hellaswag.prepare(rows, encode)]
    peer = sum(4 * (len(pack[0][0]) + max(map(len, pack[0][1]))) for pack in packs)
    return {"rows": len(rows), "peer": peer, "ours": sum(hellaswag.width(pack) for pack in packs)}


def time_pair(name, peer, ours, repetitions, device):
    """Run the two alternately. Return the medians of their seconds, and of the ratios of adjacent runs."""
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


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", required=True, help="a checkout of build-nanogpt")
    parser.add_argument("--file", required=True, help="HellaSwag's rows")
    parser.add_argument("--rows", type=int, default=60, help="the number of rows, evenly spaced in the file")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch_tokens", type=int)
    args = parser.parse_args()
    device, every = args.device, hellaswag.load_rows(args.file)
    rows = every[:: max(1, len(every) // args.rows)][: args.rows]
    encode, render_example = fineweb.get_encoding("gpt2").encode_ordinary, load_peer(args.peer).render_example
    torch.manual_seed(0)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: the peer's evaluate() turns it on, ours turns it off
    gpt = GPT(GPTConfig()).to(device).eval()
    with tempfile.TemporaryDirectory() as folder:  # each program opens the model in its own way
        gpt.save_pretrained(folder)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).to(device).eval()
        opened = open_gpt2(folder).to(device).eval()

    def ours(trunk, head):
        return hellaswag.evaluate(trunk, head, encode, rows, device=device, batch_tokens=args.batch_tokens)

    pairs = [
        ("GPT2LMHeadModel", lambda tokens: theirs(tokens).logits, hellaswag.trunk_and_head(opened)),
        ("train_gpt2.GPT", lambda tokens: gpt(tokens)[0], (gpt.trunk, gpt.head)),
    ]
    timings = [
        time_pair(name, lambda logits_of=logits_of: peer_counts(render_example, logits_of, rows, device),
                  lambda callables=callables: ours(*callables), args.repetitions, device)
        for name, logits_of, callables in pairs
    ]  # fmt: skip
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    result = {
        "what": "HellaSwag, GPT-2 124M's shape, random weights, fp32; seconds are medians of alternating runs",
        "positions": positions(rows, encode), "positions_of_the_file": positions(every, encode), "timings": timings,
        "machine": f"{machine}, {torch.get_num_threads()} threads", "load_average": os.getloadavg()[0],
        "torch": torch.__version__, "transformers": transformers.__version__, "repetitions": args.repetitions,
    }  # fmt: skip
    name = "hellaswag_speed.json" if device == "cpu" else f"hellaswag_speed_{device}.json"
    (Path(__file__).parent / "results" / name).write_text(json.dumps(result, indent=2) + "\n")
    for where in ("positions", "positions_of_the_file"):
        print("{rows:,} rows: {peer:,} token positions by the peer, {ours:,} by ours".format(**result[where]))
    print("\n| model | build-nanogpt's loop, s | ours, s | ratio |\n|---|---|---|---|")
    for timing in timings:
        print("| {model} | {peer_seconds:.2f} | {our_seconds:.2f} | {ratio:.2f} |".format(**timing))


if __name__ == "__main__":
    main()
