"""
Draw the figures of the pages from a finished demo: its losses, and the embeddings of single characters.

    python train_gpt2.py --preset demo
    python docs/figures.py
"""

import string
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support.checkpoints import newest_checkpoint  # noqa: E402 (the path is set above)
from support.runlog import read_log  # noqa: E402
from train_gpt2 import GPT  # noqa: E402

GROUPS = {"lower case": string.ascii_lowercase, "upper case": string.ascii_uppercase, "digits": string.digits,
          "punctuation": string.punctuation}  # fmt: skip


def draw_demo(log):
    """Return a matplotlib Figure of the demo's losses, with a label at each validation loss."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    steps, losses = log["train"]
    width = 25
    axes.plot(steps, losses, color="C0", lw=0.5, alpha=0.3)
    axes.plot(steps[width // 2 :][: len(steps) - width + 1], np.convolve(losses, np.full(width, 1 / width), "valid"),
              color="C0", label=f"training text, mean of {width} steps")  # fmt: skip
    axes.plot(*log["val"], "o", color="C1", mec="black", label="text that it has not seen")
    for step, loss in zip(*log["val"]):
        axes.annotate(f"{loss:.2f}", (step, loss), (4, 8), textcoords="offset points", color="C1", fontweight="bold")
    axes.set(title="A GPT-2 with 0.4M parameters learns Python", xlabel="step", ylim=(0.7, 5.8))
    axes.set_ylabel("loss, nats per byte")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def draw_characters(model):
    """Return a matplotlib Figure of the embeddings of ASCII characters: their first two principal components."""
    import torch
    from matplotlib.figure import Figure

    characters = "".join(GROUPS.values())
    vectors = model.transformer.wte.weight.detach()[[ord(character) for character in characters]]
    U, S, _ = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    points = dict(zip(characters, (U * S)[:, :2].tolist()))
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for color, (label, group) in enumerate(GROUPS.items()):
        axes.plot([], [], "o", color=f"C{color}", label=label)
        for character in group:
            text = character.replace("$", r"\$")
            style = {"color": f"C{color}", "ha": "center", "va": "center", "family": "monospace", "fontsize": 13}
            axes.text(*points[character], text, **style)
    axes.dataLim.update_from_data_xy(list(points.values()))
    axes.autoscale_view()
    axes.set(title="The demo's embeddings of single characters", xticks=[], yticks=[])
    axes.set(xlabel="first principal component", ylabel="second")
    axes.legend(frameon=False, loc="upper left")
    return figure


if __name__ == "__main__":
    out_dir = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "demo" / "log"
    draw_demo(read_log(out_dir / "log.txt")).savefig(ROOT / "assets" / "demo_curve.png", dpi=120)
    draw_characters(GPT.from_pretrained(newest_checkpoint(str(out_dir)))).savefig(
        ROOT / "assets" / "notebook_characters.png", dpi=110
    )
