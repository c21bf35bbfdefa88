"""
Count the memory and the messages of a training step on 1 to 512 GPUs, without a GPU, and calculate its time from them.

    python benchmarks/scale.py                                 all presets: 20 minutes on two slow cores
    python benchmarks/scale.py --presets gpt2 --ranks 1 8

Memory and messages are counted (count_step.py), DDP's buckets are those that torch assigns. The step is not compiled:
compiled, it needs less (see "check" in the report). Time is calculated from the flags: it is an estimate. Published
throughputs are of other programs and not measured here.
Writes scale.md and .json: see measure.py.
"""

import sys

from count_step import count_fsdp_step, count_step, ddp_buckets
from measure import compact_json, describe, make_parser, markdown, parse_flags, run_main

from support.hardware import PEAK_TFLOPS, flops_per_token
from train_gpt2 import AUTO_TOKENS, PRESETS

MEMORIES = 8, 12, 16, 24, 40, 80, 141  # GB of the cards
FLAGS = {
    "memory": (80, "GB of a GPU"),
    "reserve": (1, "GB of it for the CUDA context and gaps between tensors"),
    "mfu": (0.4, "share of the peak that a GPU reaches (measured on an H200: 0.45)"),
    "tflops": (989, "peak of a GPU (H100, bfloat16)"),
    "node_bandwidth": (450, "GB/s between 8 GPUs of a node (NVLink 4)"),
    "network_bandwidth": (400, "GB/s between nodes (8 cards of 400 Gb/s each)"),
}
CARDS = {  # key of PEAK_TFLOPS: memory in GB, and published tokens/s of one GPU with a model like the 124M
    "RTX 4060$": (8, None), "RTX 4070$": (12, None), "T4": (16, None), "RTX 4080$": (16, None), "A10G": (24, None),
    "L4": (24, None), "RTX 3090$": (24, None), "RTX 4090$": (24, "110k"),
    "A100": (40, "188k, of eight with 80 GB (modded-nanogpt)"),
    "H100": (80, "468k (llm.c); 423k to 446k, of eight (modded-nanogpt)"),
    "H200": (141, "490k (modded-nanogpt); this program, measured: 523k (h200.md)"),
}  # fmt: skip
STEP_COLUMNS = {
    **{key: (key, "") for key in ("preset", "ranks", "layout", "B x m")},
    **{key: (key, ".2f") for key in ("weights", "moments", "gradients", "activations", "loss")},
    "peak, GB": ("peak", ".1f"), "collectives": ("collectives", ""), "sent, GB": ("sent", ".2f"),
    **{f"{key}, ms": (key, ".0f") for key in ("compute", "network", "not hidden")}, "efficiency": ("efficiency", ".0%"),
}  # fmt: skip
CARD_COLUMNS = {
    "card": ("card", ""), "memory, GB": ("memory", ""), "largest B": ("B", ""), "tok/s": ("rate", ",.0f"),
    "hours for 10B tokens": ("hours", ".1f"), "published tok/s": ("published", ""),
}  # fmt: skip


def timed_row(head, parts, messages, exposed, args):
    """Return a row. messages: what a rank sends, in bytes, of which `exposed` cannot be hidden behind computation."""
    model_config, config = PRESETS[head["preset"]]
    flops = flops_per_token(model_config, config.seq_len) * config.total_batch_tokens / head["ranks"]
    bandwidth = 1e9 * (args.node_bandwidth if head["ranks"] <= 8 else args.network_bandwidth)
    compute, network, late = flops / (args.mfu * args.tflops * 1e12), sum(messages) / bandwidth, exposed / bandwidth
    # FSDP sends all the time; DDP in the last backward pass, which is two thirds of a micro-step
    covers = compute if head["layout"] == "FSDP" else compute / int(head["B x m"].split()[-1]) * 2 / 3
    late += max(0, network - late - covers)
    times = {"compute": compute * 1e3, "network": network * 1e3, "not hidden": late * 1e3}
    row = head | {"collectives": len(messages), "sent": sum(messages) / 1e9, "efficiency": compute / (compute + late)}
    return row | {key: value / 1e9 for key, value in parts.items()} | times


def step_rows(preset, peaks, args):
    """Yield the rows of a preset: one process, then DDP and FSDP for each number of ranks."""
    for ranks in args.ranks:
        rows, share = PRESETS[preset][1].total_batch_tokens // PRESETS[preset][1].seq_len // ranks, (ranks - 1) / ranks
        B = fitting({size: peak for size, peak in peaks.items() if rows and rows % size == 0}, args.memory, args)
        if not B:
            continue  # fewer sequences than ranks, or too little memory
        head = {
            "preset": preset,
            "ranks": ranks,
            "layout": "one" if ranks == 1 else "DDP",
            "B x m": f"{B} x {rows // B}",
        }
        parts, _, _ = count_step(preset, B, rows // B if ranks == 1 else 2)  # DDP's buckets always exist
        messages = [2 * share * size for size in ddp_buckets(preset)] if ranks > 1 else []
        yield timed_row(head, parts, messages, sum(messages[-1:]), args)
        if ranks > 1:
            parts, first, last = count_fsdp_step(preset, B, rows // B, ranks)
            messages = [share * size for size in first * (rows // B - 1) + last]
            # the first gather of a pass has the embedding, and so has the last reduction: nothing computes meanwhile
            exposed = share * (first[0] * (rows // B) + last[-1])
            yield timed_row(head | {"layout": "FSDP"}, parts, messages, exposed, args)


def count_peaks(preset, checkpointing):
    """Return {micro-batch: peak in GB} on one GPU that takes several micro-steps, up to the largest card's memory."""
    peaks, B = {}, 1
    while B * PRESETS[preset][1].seq_len <= AUTO_TOKENS["cuda"] and max(peaks.values(), default=0) <= MEMORIES[-1]:
        peaks[B] = count_step(preset, B, micro_steps=2, checkpointing=checkpointing)[0]["peak"] / 1e9
        print(f"{preset}, B={B}: {peaks[B]:.1f} GB", file=sys.stderr, flush=True)
        B *= 2
    return peaks


def fitting(peaks, GB, args):
    """Return the largest micro-batch that fits in a card's memory, 0 if none does."""
    return max((B for B, peak in peaks.items() if peak <= GB - args.reserve), default=0)


def card_row(key, peaks, args):
    """Return what a card needs for 10B tokens with GPT-2 124M."""
    (GB, published), (model_config, config) = CARDS[key], PRESETS["gpt2"]
    rate = args.mfu * PEAK_TFLOPS[key] * 1e12 / flops_per_token(model_config, config.seq_len)
    row = {"card": key.strip("$"), "memory": GB, "B": fitting(peaks, GB, args), "rate": rate, "published": published}
    return row | {"hours": 1e10 / rate / 3600}


def parse_command_line():
    parser, skipped = make_parser(__doc__), {"demo", "gpt2-fast", "gpt2-tuned"}  # for a CPU; of the shape of gpt2
    presets = [name for name in PRESETS if name not in skipped]
    parser.add_argument("--presets", nargs="+", default=presets, choices=list(PRESETS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 8, 64, 512], help="numbers of GPUs")
    for name, (default, help) in FLAGS.items():
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{help}: {default}")
    return parse_flags(parser, "scale")


def main():
    args = parse_command_line()
    peaks = {(preset, on): count_peaks(preset, on) for preset in args.presets for on in (False, True)}
    steps = [row for preset in args.presets for row in step_rows(preset, peaks[preset, False], args)]
    heads = {key: {"preset": key[0], "recompute": "yes" if key[1] else "no"} for key in peaks}
    by_batch = [heads[key] | {str(B): peak for B, peak in peaks[key].items()} for key in peaks]
    by_card = [heads[key] | {str(GB): fitting(peaks[key], GB, args) for GB in MEMORIES} for key in peaks]
    about = describe(("torch",)) | {
        "GB": "1e9 bytes, of one rank in its second step, eager, in bfloat16 autocast",
        "check": "gpt2, B=64, on an H200 (h200.md): 27.06 GB eager with moments and earlier gradients; compiled 25.77",
        "B x m": "micro-batch x micro-steps; the largest micro-batch that fits in --memory less --reserve",
        "activations, loss": "what the trunk keeps for the backward pass, and the most that the loss adds to it",
        "gradients": "between micro-steps, where FSDP keeps whole ones; DDP keeps them in its buckets all the time",
        "sent": "by a rank in a step: (N - 1) / N of a gather or a reduction, twice that for an all-reduce",
        "not hidden": "DDP's last bucket; FSDP's gathers and last reduction of the embedding; what exceeds the compute",
        "recompute": "--activation_checkpointing",
        "assumptions, for all times": ", ".join(f"{name} {getattr(args, name):g}" for name in FLAGS),
    }
    head, sizes = (
        {key: (key, "") for key in heads[args.presets[0], False]},
        sorted({B for p in peaks.values() for B in p}),
    )
    tables = {
        "Peak on one GPU in GB, by micro-batch": (by_batch, head | {f"B={B}": (str(B), ".1f") for B in sizes}),
        "Largest micro-batch, by memory": (by_card, head | {f"{GB} GB": (str(GB), "") for GB in MEMORIES}),
    }
    if "gpt2" in args.presets:
        cards = [card_row(key, peaks["gpt2", False], args) for key in CARDS]
        tables["GPT-2 124M on 10B tokens, calculated, beside published throughputs"] = cards, CARD_COLUMNS
    text = markdown("Scaling, counted without a GPU", about, steps, STEP_COLUMNS)
    for title, table in tables.items():
        text += "\n#" + markdown(title, {}, *table).replace("\n\n\n", "\n\n")
    print(text)
    (args.out_dir / f"{args.name}.md").write_text(text)
    (args.out_dir / f"{args.name}.json").write_text(compact_json(about, {"rows": steps + by_batch}))


if __name__ == "__main__":
    run_main(main)
