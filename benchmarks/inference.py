"""
Measure the speed of generating text with GPT-2 124M: sample.py, build-nanogpt, transformers and llama.cpp.

    git clone https://github.com/karpathy/build-nanogpt PEER
    python train_gpt2.py --preset demo
    python benchmarks/inference.py --peer PEER --trained demo/log --data demo/data

All continue one prompt of 8 tokens by 512, sampled from the 50 most likely. They alternate in one process, with the
same random weights. build-nanogpt's model is its own, and its loop is that of its train_gpt2.py, for one sequence. Ours
runs with the weights of each --dtype of sample.py. The effect of the dtype on the validation loss is measured with
--trained, a model folder or output folder, on the shards in --data. On a CPU, llama.cpp takes part if --llama names a
checkout of it, whose converter opens our folder; this needs the packages llama-cpp-python and gguf. Then several
samples at once and a long prompt are compared with plain float32 layers. Writes inference_DEVICE.md, .json and .png:
see measure.py.
"""

import copy
import importlib.util
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from measure import describe, make_parser, parse_flags, require_checkouts, revision, run_main, write_report

from fineweb import get_encoding
from support.checkpoints import newest_checkpoint
from support.common import pick_device
from support.generation import CastLinear, FBGEMMLinear, Int8Linear, prepare
from support.tokenizer import save_tokenizer
from train_gpt2 import GPT, DataLoaderLite, GPTConfig

PROMPT, TOP_K = 8, 50
CASES = {  # name: (samples, tokens of the prompt, tokens to add)
    "4 samples of 64 tokens": (4, PROMPT, 64), "16 samples of 64 tokens": (16, PROMPT, 64),
    "64 samples of 32 tokens": (64, PROMPT, 32), "one token after a prompt of 900": (1, 900, 1),
}  # fmt: skip
COLUMNS = {
    "program": ("program", ""), "tok/s": ("tokens_per_second", ".1f"), "ms per token": ("milliseconds", ".1f"),
    "speedup over build-nanogpt": ("to_peer", ".2f"), "over transformers": ("to_transformers", ".2f"),
    "share of the limit": ("of_limit", ".0%"), "weights, MB": ("megabytes", ".0f"),
    "validation loss": ("loss", ".4f"), "its change": ("loss_change", "+.5f"),
}  # fmt: skip


def load_peer(folder, gpt):
    """Return build-nanogpt's own GPT with the weights of ours. Its script defines the model before all else."""
    source = (folder / "train_gpt2.py").read_text().split("import tiktoken\n")[0]
    source = source.replace("from hellaswag import", "# from hellaswag import")  # the model does not need it
    peer = {"__name__": "peer"}
    exec(compile(source, folder / "train_gpt2.py", "exec"), peer)
    c = gpt.config
    shape = dict(block_size=c.block_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
    model = peer["GPT"](peer["GPTConfig"](vocab_size=c.padded_vocab_size, **shape)).to(gpt.lm_head.weight.device)
    model.load_state_dict(gpt.state_dict())
    return model.eval()


@torch.no_grad()
def peer_loop(model, ids, max_new_tokens, generator):
    """Sample like build-nanogpt: for every token, compute the whole sequence and all its logits again."""
    for _ in range(max_new_tokens):
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            logits, _ = model(ids)
        probabilities, likeliest = F.softmax(logits[:, -1, :], dim=-1).topk(TOP_K, dim=-1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        ids = torch.cat((ids, likeliest.gather(-1, drawn)), dim=1)
    return ids


def hugging_face(gpt):
    """Return the same weights as transformers opens them."""
    with tempfile.TemporaryDirectory() as folder:
        gpt.save_pretrained(folder)
        return transformers.GPT2LMHeadModel.from_pretrained(folder).to(gpt.lm_head.weight.device).eval()


def llama_programs(checkout, gpt, prompt):
    """Return {name: (megabytes stored, megabytes read per token, function)} of llama.cpp.

    Its converter makes files of our folder. It keeps keys and values in float16.
    """
    from llama_cpp import Llama

    programs, threads = {}, torch.get_num_threads()
    options = dict(n_ctx=gpt.config.block_size, n_threads=threads, n_threads_batch=threads, use_mmap=False)
    with tempfile.TemporaryDirectory() as folder:
        gpt.save_pretrained(folder)
        save_tokenizer(get_encoding("gpt2"), Path(folder), gpt.config.block_size)
        for kind in ("f32", "q8_0"):
            file = Path(folder, f"{kind}.gguf")
            convert = [sys.executable, checkout / "convert_hf_to_gguf.py", folder, "--outfile", file, "--outtype", kind]
            subprocess.run(convert, check=True, stdout=subprocess.DEVNULL)
            model, size = Llama(str(file), verbose=False, **options), file.stat().st_size / 1e6

            def generate(tokens, generator, model=model):
                model.reset()  # so that it reads the prompt, as the others do
                model.set_seed(generator.initial_seed())
                stream = model.generate(prompt, top_k=TOP_K, top_p=1.0, min_p=0.0, temp=1.0, repeat_penalty=1.0)
                return torch.tensor([[*prompt, *itertools.islice(stream, tokens)]])

            programs[f"llama.cpp, {kind}"] = size, size, generate  # its embedding is its head, too
    return programs


def variants(gpt, rows=1):
    """Return {dtype: a copy of the model with its weights of that dtype, as sample.py generates with it}."""
    models = {dtype: copy.deepcopy(gpt) for dtype in ("float32", "bfloat16", "int8")}
    for dtype, model in models.items():
        prepare(model, dtype, rows)
    return models


def megabytes(modules):
    """Return the size of the weights of modules, of any dtype, with tied weights counted once."""
    weights = {id(w): w for module in modules for w in (*module.parameters(), *module.buffers())}
    return sum(w.numel() * w.element_size() for w in weights.values()) / 1e6


@torch.no_grad()
def validation_loss(gpt, loader, rows):
    """Return the mean loss, in nats per token, over the first rows, from the same logits that generation uses."""
    losses = []
    for row in range(min(rows, loader.num_rows)):
        x, y = loader.rows([row])
        losses.append(F.cross_entropy(gpt(x)[0].flatten(0, 1).float(), y.flatten()).item())
    return statistics.fmean(losses)


def read_rate(device, gigabytes=0.5):
    """Return the gigabytes per second at which the device reads a large tensor, the fastest of ten times."""
    tensor, seconds = torch.ones(int(gigabytes * 1e9 / 4), device=device), []
    for _ in range(10):
        start = time.perf_counter()
        tensor.sum().item()
        seconds.append(time.perf_counter() - start)
    return gigabytes / min(seconds)


def matrices(model):
    """Return the layers whose weights are read for each token. Of an embedding, only one row is read."""
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D, CastLinear, FBGEMMLinear, Int8Linear)
    return [module for module in model.modules() if isinstance(module, kinds)]


def draw(rows):
    """Draw bars: tokens per second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([row["program"] for row in rows], [row["tokens_per_second"] for row in rows])
    axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.set(xlabel="tokens per second, GPT-2 124M, one sequence")
    axes.margins(x=0.1)
    axes.invert_yaxis()
    return figure


def parse_command_line():
    parser = make_parser(__doc__, repetitions=3)
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of build-nanogpt")
    parser.add_argument("--llama", type=Path, help="a checkout of llama.cpp")
    parser.add_argument("--trained", required=True, help="a model whose losses are measured")
    parser.add_argument("--data", required=True, help="its token shards")
    parser.add_argument("--rows", type=int, default=200, help="sequences of the validation split")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--n_layer", type=int, default=12, help="fewer layers, for a trial run")
    device = pick_device("auto")
    args = parse_flags(parser, f"inference_{device}")
    require_checkouts(parser, peer=(args.peer, "train_gpt2.py"), llama=(args.llama, "convert_hf_to_gguf.py"))
    if args.llama and not all(map(importlib.util.find_spec, ("llama_cpp", "gguf"))):
        parser.error("--llama needs two packages: pip install llama-cpp-python gguf")
    if args.llama and device != "cpu":
        parser.error(f"--llama is for CPUs, and this is {device}: leave it out")
    args.device = device
    return args


def make_programs(args, gpt):
    """Return {name: (megabytes stored, megabytes read per token, function of a number of tokens and a generator)}.

    The first is build-nanogpt, the second transformers.
    """
    ids = torch.randint(0, 50257, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(args.device)
    peer, theirs = load_peer(args.peer, gpt), hugging_face(gpt)

    def generate(tokens, generator):
        options = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, top_k=TOP_K, pad_token_id=50256)
        torch.manual_seed(generator.initial_seed())  # it takes no generator
        return theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)

    def program(model, function):
        return megabytes([model]), megabytes(matrices(model)), function

    programs = {
        "build-nanogpt's loop, bfloat16 autocast": program(peer, lambda n, rng: peer_loop(peer, ids, n, rng)),
        "transformers' generate, float32": program(theirs, generate),
    }
    if args.llama:
        programs |= llama_programs(args.llama, gpt, ids[0].tolist())
    for dtype, model in variants(gpt).items():
        programs[f"sample.py, {dtype}"] = program(model, lambda n, rng, m=model: m.generate(ids, n, 1.0, TOP_K, rng))
    return programs


def time_programs(programs, args):
    """Return {name: milliseconds of a token in each repetition}, and the highest read_rate. The programs alternate."""
    milliseconds, rates = {name: [] for name in programs}, []
    for repetition in range(args.repetitions + 1):  # the first is not timed, so it has few tokens
        rates.append(read_rate(args.device))
        for name, (*_, work) in programs.items():
            tokens, generator = args.max_new_tokens if repetition else 4, torch.Generator(args.device)
            start = time.perf_counter()
            with torch.inference_mode():  # as sample.py does
                made = work(tokens, generator.manual_seed(repetition)).tolist()  # waits for the device
            assert len(made[0]) == PROMPT + tokens
            if repetition:
                milliseconds[name].append((time.perf_counter() - start) / tokens * 1000)
                print(f"{name}: {milliseconds[name][-1]:.2f} ms", file=sys.stderr, flush=True)
    return milliseconds, max(rates)


def time_cases(gpt, repetitions):
    """Return {case: {dtype: how many times as fast as plain layers}}: several samples, and a long prompt."""
    speedups, device = {}, gpt.lm_head.weight.device
    for case, (samples, prompt, tokens) in CASES.items():
        ids, seconds = torch.randint(0, 50257, (samples, prompt), device=device), {}
        models = {"plain": gpt} | variants(gpt, samples)
        for _ in range(repetitions + 1):  # the first is not counted
            for name, model in models.items():
                start = time.perf_counter()
                with torch.inference_mode():
                    model.generate(ids, tokens, 1.0, TOP_K).tolist()
                seconds.setdefault(name, []).append(time.perf_counter() - start)
        plain = seconds.pop("plain")[1:]
        speedups[case] = {k: statistics.median(a / b for a, b in zip(plain, v[1:])) for k, v in seconds.items()}
        print(case, speedups[case], file=sys.stderr, flush=True)
    return speedups


def measure_losses(args):
    """Return {dtype: validation loss} of the trained model, and the number of sequences."""
    trained = GPT.from_pretrained(newest_checkpoint(args.trained)).to(args.device).eval()
    loader = DataLoaderLite(args.data, "val", 1, trained.config.block_size, shuffle=False, device=args.device)
    models = {"exact": trained} | variants(trained)
    losses = {name: validation_loss(model, loader, args.rows) for name, model in models.items()}
    return losses, min(args.rows, loader.num_rows)


def summarize(programs, milliseconds, losses, rate):
    """Return a row for each program. Each repetition gives a speedup; the median is reported."""
    rows, peers = [], list(milliseconds)[:2]
    for name, (stored, read, _) in programs.items():
        row = {"program": name, "milliseconds": statistics.median(milliseconds[name]), "megabytes": stored}
        row["tokens_per_second"] = 1000 / row["milliseconds"]
        for key, peer in zip(("to_peer", "to_transformers"), peers):
            row[key] = statistics.median(a / b for a, b in zip(milliseconds[peer], milliseconds[name], strict=True))
        row["of_limit"] = read / rate / row["milliseconds"]  # MB / (GB/s) = ms
        dtype = next((dtype for dtype in losses if name == f"sample.py, {dtype}"), None)
        if dtype:
            row |= {"loss": losses[dtype], "loss_change": losses[dtype] - losses["exact"]}
        rows.append(row | {"runs_ms": milliseconds[name]})
    return rows


def main():
    args = parse_command_line()
    about = describe(("torch", "transformers", *(["llama-cpp-python"] if args.llama else [])))
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(n_layer=args.n_layer)).to(args.device).eval()
    programs = make_programs(args, gpt)
    milliseconds, rate = time_programs(programs, args)
    cases = time_cases(gpt, args.repetitions)
    losses, sequences = measure_losses(args)
    rows = summarize(programs, milliseconds, losses, rate)
    about |= {
        "peer": f"{args.peer.name} at {revision(args.peer)}",
        "model": f"GPT-2 124M with {args.n_layer} layers, random weights",
        "runs": f"{args.repetitions} of {args.max_new_tokens} tokens after {PROMPT}, alternating; medians",
        "limit": f"all matrices are read for each token, at {rate:.1f} GB/s, the fastest sum over half a GB",
        "validation loss": f"of {args.trained} over {sequences} sequences of {args.data}",
    }  # fmt: skip
    if args.llama:
        about["llama.cpp"] = "called from Python, with keys and values in float16"
    for case, speedups in cases.items():
        figures = ", ".join(f"{dtype} {speedup:.2f}" for dtype, speedup in speedups.items())
        about[f"{case}, times as fast as plain float32 layers"] = figures
    write_report(args, "Generating text", about, rows, COLUMNS, draw(rows))


if __name__ == "__main__":
    run_main(main)
