"""The demo as a newcomer runs it, and what it leaves behind. Minutes, so behind the marker `slow`."""

import os
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.runlog import read_log
from train_gpt2 import GPT

pytestmark = [pytest.mark.slow, pytest.mark.timing]  # the demo uses all cores, so it runs alone
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory, run_script):
    """A copy of the scripts, and the demo as it ran there."""
    folder = tmp_path_factory.mktemp("copy")
    for script in ("train_gpt2.py", "fineweb.py", "hellaswag.py"):
        shutil.copy(ROOT / script, folder)
    shutil.copytree(ROOT / "support", folder / "support")
    done = run_script(folder / "train_gpt2.py", "--preset", "demo", timeout=900, OMP_NUM_THREADS=str(os.cpu_count()))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_demo_meets_its_figure(demo):
    """The demo must learn: 1.10 nats per byte or less over the whole validation split, with samples on the way."""
    folder, stdout = demo
    log = read_log(folder / "demo" / "log" / "log.txt")
    assert log["val"][1][-1] <= 1.10
    assert stdout.count("sample 0:") >= 3 and stdout.count("def ") >= 3
    for name in ("log.txt", "curve.png", f"checkpoints/step_{log['val'][0][-1]:06d}"):
        assert f"{folder}/demo/log/{name}" in stdout and (folder / "demo" / "log" / name).exists()


def test_demo_opens_in_transformers(demo):
    """Its checkpoint is a Hugging Face model like any other: the same logits, and a tokenizer of bytes."""
    checkpoint = max((demo[0] / "demo" / "log" / "checkpoints").iterdir())
    theirs, ours = AutoModelForCausalLM.from_pretrained(checkpoint).eval(), GPT.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer("def main():\n    print('größe')\n", return_tensors="pt")["input_ids"]
    assert bytes(ids[0].tolist()).decode() == tokenizer.decode(ids[0]) == "def main():\n    print('größe')\n"
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)[0]).abs().max() <= 1e-4
    text = theirs.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=256)
    assert text.tolist() == ours.generate(ids, 20, temperature=0).tolist()


def test_notebook_runs_on_the_demo(demo, monkeypatch):
    """play.ipynb runs from top to bottom on what the demo leaves, shows what it says, and is kept without outputs."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "play.ipynb", as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(demo[0])}}).execute()
    if folder := os.environ.get("KEEP_NOTEBOOK"):
        nbformat.write(notebook, Path(folder) / "play.ipynb")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 7
    text = "".join(output.get("text", "") for output in outputs)
    checkpoints = sorted((demo[0] / "demo" / "log" / "checkpoints").iterdir())
    assert re.findall(r"^--- (step_\d+)\n\ndef ", text, re.M) == [folder.name for folder in checkpoints]
    assert len(set(re.findall(r"at address (\d+)", text))) == 1  # of two tensors
    assert "attention paid to the future: 0\n" in text
    assert float(re.search(r"the model's own attention: (\S+)", text)[1]) < 1e-5
    full, divided, undivided = (
        np.array(re.search(rf"{name}: (.*)", text)[1].split(), dtype=float)
        for name in ("full batch", "divided by 4", "not divided")
    )
    assert abs(full).max() > 1e-5 and np.allclose(divided, full, atol=2e-6)
    assert np.allclose(undivided, 4 * full, atol=5e-6)
    check_notebook_hellaswag(text, GPT.from_pretrained(checkpoints[-1]))


def check_notebook_hellaswag(text, model):
    """The notebook's four figures are the mean log-likelihoods of the endings, each read by itself, byte by byte."""
    context, *endings = re.search(r"^(A man .*)\n" + r"  \d \(loss \S+\) (.*)\n" * 4, text, re.M).groups()
    expected = []
    for ending in endings:
        ids = torch.tensor([list(f"{context} {ending}".encode())])
        with torch.no_grad():
            log_p = model(ids[:, :-1])[0].log_softmax(-1).gather(2, ids[:, 1:, None])
        expected.append(log_p[0, len(context) - 1 :].mean().item())
    shown = re.search(r"mean log-likelihoods: (.*)", text)[1].split(", ")
    assert [float(value) for value in shown] == pytest.approx(expected, abs=1e-3)
    assert f"predicted {np.argmax(expected)}, actual 3" in text


def test_an_interrupted_demo_makes_its_shards_anew(demo, run_script):
    """Ctrl-C while the demo writes its shards must not leave it refusing to start."""
    folder, _ = demo
    manifest = folder / "demo" / "data" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"finished": true', '"finished": false'))
    (folder / "demo" / "data" / "edufineweb_train_000003.npy").unlink()
    done = run_script(folder / "train_gpt2.py", "--preset", "demo", "--max_steps", 60)
    assert done.returncode == 0, done.stderr
    assert (folder / "demo" / "data" / "edufineweb_train_000003.npy").exists()


def test_a_second_demo_starts_over(demo, run_script):
    """Run again, the demo keeps its shards and begins a new run, without a flag."""
    folder, _ = demo
    shard = folder / "demo" / "data" / "edufineweb_val_000000.npy"
    before = shard.stat().st_mtime_ns
    done = run_script(folder / "train_gpt2.py", "--preset", "demo", "--max_steps", 60)
    assert done.returncode == 0, done.stderr
    assert shard.stat().st_mtime_ns == before
    assert read_log(folder / "demo" / "log" / "log.txt")["val"][0] == [0, 60]
    assert [path.name for path in (folder / "demo" / "log" / "checkpoints").iterdir()] == ["step_000060"]
