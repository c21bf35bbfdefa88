"""
Speed of generating text with GPT-2 124M: sample.py's way beside build-nanogpt's loop and transformers' generate.

    git clone https://github.com/karpathy/build-nanogpt PEER
    python train_gpt2.py --preset demo
    python benchmarks/inference.py --peer PEER --trained demo/log --data demo/data

All continue one prompt of 8 tokens by 512, drawn from the 50 likeliest, in turns in one process, with the same random
weights. build-nanogpt's model is its own, and its loop the one of its train_gpt2.py, for one row. Ours runs in float32,
as sample.py does, and for a quarter of the tokens compiled, in bfloat16 and with int8 weights (torchao). What a type of
weights does to the validation loss is measured on --trained, a model folder or output folder, and the shards of --data.
Writes benchmarks/results/inference_DEVICE.json, .md and .png. Leave the machine alone.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from measure import ROOT, describe, revision, write_report

import sample
from support.checkpoints import newest_checkpoint
from support.common import pick_device
from train_gpt2 import GPT, DataLoaderLite, GPTConfig

PROMPT, TOP_K = 8, 50
COLUMNS = {
    "program": ("program", ""), "tok/s": ("tokens_per_second", ".1f"), "ms a token": ("milliseconds", ".1f"),
    "times build-nanogpt": ("to_peer", ".2f"), "times transformers": ("to_transformers", ".2f"),
    "of the floor": ("of_floor", ".0%"), "weights, MB": ("megabytes", ".0f"),
    "validation loss": ("loss", ".4f"), "change": ("loss_change", "+.5f"),
}  # fmt: skip


def load_peer(folder, gpt):
    """build-nanogpt's own GPT, which stands above the rest of its script, with the weights of ours."""
    source = (folder / "train_gpt2.py").read_text().split("import tiktoken\n")[0]
    source = source.replace("from hellaswag import", "# from hellaswag import")  # the model needs none of it
    peer = {"__name__": "peer"}
    exec(compile(source, folder / "train_gpt2.py", "exec"), peer)
    c = gpt.config
    shape = dict(block_size=c.block_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
    model = peer["GPT"](peer["GPTConfig"](vocab_size=c.padded_vocab_size, **shape)).to(gpt.lm_head.weight.device)
    model.load_state_dict(gpt.state_dict())
    return model.eval()


@torch.no_grad()
def peer_loop(model, ids, max_new_tokens, generator):
    """What build-nanogpt does for its samples: the whole sequence again for every token, logits everywhere."""
    for _ in range(max_new_tokens):
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            logits, _ = model(ids)
        probabilities, likeliest = F.softmax(logits[:, -1, :], dim=-1).topk(TOP_K, dim=-1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        ids = torch.cat((ids, likeliest.gather(-1, drawn)), dim=1)
    return ids


def hugging_face(gpt):
    """The same weights as transformers opens them."""
    with tempfile.TemporaryDirectory() as folder:
        gpt.save_pretrained(folder)
        return transformers.GPT2LMHeadModel.from_pretrained(folder).to(gpt.lm_head.weight.device).eval()


def variants(gpt):
    """{name: a copy of the model with weights of another type}, and the model itself."""
    int8 = copy.deepcopy(gpt)
    sample.quantize(int8)
    return {"float32": gpt, "bfloat16": copy.deepcopy(gpt).bfloat16(), "int8": int8}


def compiled(gpt):
    """The model with its trunk and head compiled: once for a prompt, once for all further tokens, of any position."""
    gpt = copy.copy(gpt)  # shares the weights
    gpt.trunk, gpt.head = torch.compile(gpt.trunk, dynamic=True), torch.compile(gpt.head, dynamic=True)
    return gpt


def megabytes(modules):
    """What their weights take, tied ones once, of any type."""

    def size(tensor):
        inner = getattr(tensor, "__tensor_flatten__", None)
        return sum(getattr(tensor, name).nbytes for name in inner()[0]) if inner else tensor.nbytes

    weights = {id(weight): weight.data for module in modules for weight in module.parameters()}
    return sum(map(size, weights.values())) / 1e6


@torch.no_grad()
def validation_loss(gpt, loader, rows):
    """Mean loss in nats per token over the first rows, from the model's logits as generating sees them."""
    losses = []
    for row in range(min(rows, loader.num_rows)):
        x, y = loader.rows([row])
        losses.append(F.cross_entropy(gpt(x)[0].flatten(0, 1).float(), y.flatten()).item())
    return statistics.fmean(losses)


def read_rate(device, gigabytes=0.5):
    """Bytes per second that the device reads of a large tensor, the fastest of ten times: no token comes faster."""
    tensor, seconds = torch.ones(int(gigabytes * 1e9 / 4), device=device), []
    for _ in range(10):
        start = time.perf_counter()
        tensor.sum().item()
        seconds.append(time.perf_counter() - start)
    return tensor.nbytes / min(seconds)


def floor(model, rate):
    """Seconds that a token takes at least: all matrices are read, at this rate. Of the embeddings, only a row is."""
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    return megabytes(module for module in model.modules() if isinstance(module, kinds)) * 1e6 / rate


def draw(rows):
    """Bars: tokens per second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([row["program"] for row in rows], [row["tokens_per_second"] for row in rows])
    axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.set(xlabel="tokens per second, GPT-2 124M, one row")
    axes.margins(x=0.1)
    axes.invert_yaxis()
    return figure


def parse_command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of build-nanogpt")
    parser.add_argument("--trained", required=True, help="a model to measure losses with")
    parser.add_argument("--data", required=True, help="its token shards")
    parser.add_argument("--rows", type=int, default=200, help="of the validation split")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--n_layer", type=int, default=12, help="for a quick look")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each, taking turns")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    args.device = pick_device("auto")
    args.name, args.preset, args.source = f"inference_{args.device}", "gpt2", "random ids"
    args.model_config = GPTConfig(n_layer=args.n_layer)
    return args


def make_programs(args, gpt):
    """{name: (model, function of a number of tokens and a generator)}; the first two are the peers, then sample.py."""
    ids = torch.randint(0, 50257, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(args.device)
    peer, theirs = load_peer(args.peer, gpt), hugging_face(gpt)

    def generate(tokens, generator):
        options = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, top_k=TOP_K, pad_token_id=50256)
        torch.manual_seed(generator.initial_seed())  # it takes no generator
        return theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)

    programs = {
        "build-nanogpt's loop, bfloat16 autocast": (peer, lambda tokens, rng: peer_loop(peer, ids, tokens, rng)),
        "transformers' generate, float32": (theirs, generate),
    }
    for name, model in variants(gpt).items():
        for kind, runner in ((name, model), (f"{name}, compiled", compiled(model))):
            programs[f"sample.py, {kind}"] = (model, lambda n, rng, m=runner: m.generate(ids, n, 1.0, TOP_K, rng))
    return programs


def time_programs(programs, args):
    """{name: milliseconds of a token in each repetition}, in turns."""
    milliseconds = {name: [] for name in programs}
    for repetition in range(args.repetitions + 1):  # in the first, which compiles, as few tokens as will do
        for i, (name, (_, work)) in enumerate(programs.items()):
            tokens = (args.max_new_tokens if i < 3 else args.max_new_tokens // 4) if repetition else 4
            start = time.perf_counter()
            made = work(tokens, torch.Generator(args.device).manual_seed(repetition)).tolist()  # waits for the device
            assert len(made[0]) == PROMPT + tokens
            if repetition:
                milliseconds[name].append((time.perf_counter() - start) / tokens * 1000)
                print(f"{name}: {milliseconds[name][-1]:.2f} ms", file=sys.stderr, flush=True)
    return milliseconds


def main():
    args = parse_command_line()
    _, about = describe(args)
    torch.manual_seed(0)
    gpt = GPT(args.model_config).to(args.device).eval()
    programs = make_programs(args, gpt)
    milliseconds = time_programs(programs, args)
    trained = GPT.from_pretrained(newest_checkpoint(args.trained)).to(args.device).eval()
    loader = DataLoaderLite(args.data, "val", 1, trained.config.block_size, shuffle=False, device=args.device)
    losses = {name: validation_loss(model, loader, args.rows) for name, model in variants(trained).items()}
    rate, rows = read_rate(args.device), []
    peers = list(milliseconds)[:2]
    for name, (model, _) in programs.items():
        kind = next((kind for kind in losses if name.startswith(f"sample.py, {kind}")), None)
        row = {"program": name, "runs_ms": milliseconds[name], "megabytes": megabytes([model])}
        row["milliseconds"] = statistics.median(milliseconds[name])
        row["tokens_per_second"] = 1000 / row["milliseconds"]
        for key, peer in zip(("to_peer", "to_transformers"), peers if len(rows) < 3 else ()):  # of as many tokens
            row[key] = statistics.median(a / b for a, b in zip(milliseconds[peer], milliseconds[name], strict=True))
        row["of_floor"] = floor(model, rate) / (row["milliseconds"] / 1000)
        if kind:
            row |= {"loss": losses[kind], "loss_change": losses[kind] - losses["float32"]}
        rows.append(row)
    del about["peak"]
    about |= {
        "peers": f"{args.peer} at {revision(args.peer)}, transformers {transformers.__version__}",
        "runs": f"{args.repetitions} of {args.max_new_tokens} tokens after {PROMPT}, taking turns; medians. "
                "What stands below sample.py's float32: a quarter of the tokens",
        "floor": f"reading all matrices once a token at {rate / 1e9:.1f} GB/s, the fastest sum over a tensor of 0.5 GB",
        "loss": f"of {args.trained} over {min(args.rows, loader.num_rows)} rows of {args.data}",
    }  # fmt: skip
    write_report(args, "Generating text", about, rows, COLUMNS, draw(rows))


if __name__ == "__main__":
    main()
