"""The shape of the code: what an import loads, how long files and functions are, and what support/ may know."""

import ast
import os
import platform
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, TINY, error_lines

import train_gpt2
from support.common import UserError, flag, locked, range_errors
from support.distributed import StopSignal

CODE = sorted([*ROOT.glob("*.py"), *ROOT.glob("support/*.py")])
HEAVY = {"datasets", "transformers", "matplotlib.pyplot", "wandb"}
FORBIDDEN = {  # what importing a module must not load
    "train_gpt2": HEAVY,
    "fineweb": HEAVY | {"torch", "pyarrow", "huggingface_hub", "tyro"},
    "hellaswag": HEAVY | {"tiktoken", "tyro", "train_gpt2"},
    "sample": HEAVY,
    "support.common": HEAVY | {"torch", "numpy"},
    "support.texts": HEAVY | {"torch", "pyarrow", "huggingface_hub", "charset_normalizer"},
    "support.sources": HEAVY | {"torch", "pyarrow", "huggingface_hub"},
    "support.checkpoints": HEAVY | {"train_gpt2"},
    "support.generation": HEAVY | {"train_gpt2"},
    "support.loss": HEAVY | {"train_gpt2"},
    "support.tokenizer": HEAVY | {"train_gpt2", "tiktoken"},
    "support.foreign": HEAVY | {"train_gpt2", "tiktoken"},
    "support.hardware": HEAVY | {"train_gpt2"},
    "support.runlog": HEAVY | {"train_gpt2"},
    "support.distributed": HEAVY | {"train_gpt2"},
}


@pytest.mark.parametrize("module", FORBIDDEN)
def test_importing_does_nothing(module, tmp_path):
    """No output, no file, no process group, no heavy package. (Importing build-nanogpt starts a run.)"""
    code = f"import sys, {module}; print(*{FORBIDDEN[module]} & set(sys.modules)); sys.argv = ['x', '--no']\n"
    code += "import torch.distributed as dist; assert not dist.is_initialized()"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HTTPS_PROXY": "localhost:9"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["train_gpt2.py", "fineweb.py", "hellaswag.py", "sample.py"])
def test_version(script, tmp_path):
    """A report of a problem needs it. It also works in a copy without git, and it creates nothing."""
    folders = ROOT, tmp_path / "copy"
    shutil.copytree(ROOT / "support", folders[1] / "support", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folders[1])
    files, environment = sorted(folders[1].rglob("*")), os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    git = ["git", "-C", ROOT, "describe", "--always"]
    own = subprocess.check_output(git, text=True).strip() if (ROOT / ".git").exists() else "unknown"
    for folder, revision in zip(folders, (own, "unknown")):
        command = [sys.executable, folder / script, "--version"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.replace("-dirty", "") == (
            f"revision {revision}, Python {platform.python_version()}, torch {torch.__version__}\n"
        )
    assert sorted(folders[1].rglob("*")) == files


def test_the_code_is_short():
    """It is read in one evening."""
    assert len((ROOT / "train_gpt2.py").read_text().splitlines()) <= 1200
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 55, f"{path.name}: {node.name}"


def test_support_does_not_know_the_run():
    """Its functions take paths, numbers, tensors and dicts, or moving code there would lengthen the reader's path."""
    for path in ROOT.glob("support/*.py"):
        assert not {"TrainConfig", "Runtime"} & set(re.findall(r"\w+", path.read_text())), path


def test_every_flag_has_a_help_text():
    """The comment on a flag's line, or the one above it, becomes its help text."""
    lines = (ROOT / "train_gpt2.py").read_text().splitlines()
    flags = [i for i, line in enumerate(lines) if re.match(r"    \w+: .* = flag\(", line)]
    bare = [lines[i] for i in flags if "  # " not in lines[i] and not lines[i - 1].startswith("    # ")]
    assert not bare and len(flags) > 40


def test_help_has_the_defaults_of_the_preset(monkeypatch, capsys):
    """The demo's learning rate differs from GPT-2's, so the help must show the one that a run would take."""
    monkeypatch.setenv("COLUMNS", "200")
    for flags, preset, lr in ([], "gpt2", "0.0006"), (["--preset", "demo"], "demo", "0.014"):
        with pytest.raises(SystemExit) as end:
            train_gpt2.main([*flags, "--help"])
        text = capsys.readouterr().out
        assert end.value.code == 0 and f"The defaults below are those of {preset}." in text
        assert f"peak learning rate (GPT-3) (default: {lr})" in text


def test_range_errors():
    from dataclasses import dataclass

    @dataclass
    class Config:
        free: float = flag(1.0)
        positive: int = flag(1, above=0)
        natural: float = flag(0.0, at_least=0)

    assert range_errors(Config(free=-5.0)) == []
    assert range_errors(Config(positive=0, natural=float("nan"))) == [
        "--positive is 0: it must be above 0",
        "--natural is nan: it must be 0 or more",
    ]
    assert range_errors(Config(natural=float("inf"))) == ["--natural is inf: it must be finite"]


def test_a_lock_can_be_taken_again(tmp_path):
    """By a second run in the same process, such as a notebook's."""
    for _ in range(2):
        with locked(tmp_path / "folder" / ".lock"):
            with pytest.raises(UserError, match="another run is writing"), locked(tmp_path / "folder" / ".lock"):
                pass


def test_betas_and_eps_are_flags(text_shards, tmp_path, capsys):
    """They reach AdamW and the checkpoint, and a resumed run may change them only if --override names them."""
    flags = [*TINY, "--data_dir", text_shards, "--out_dir", tmp_path, "--max_steps", 5]
    changed = ["--betas", 0.8, 0.9, "--eps", 1e-6]
    train_gpt2.main([*map(str, [*flags, *changed])])
    path = tmp_path / "checkpoints" / "step_000005" / "training_state.pt"
    state = torch.load(path, weights_only=True)
    group = state["optimizers"][0]["param_groups"][0]
    assert tuple(group["betas"]) == state["config"]["betas"] == (0.8, 0.9)
    assert group["eps"] == state["config"]["eps"] == 1e-6
    lines = error_lines(capsys, *flags, "--resume")
    assert len(lines) == 2 and "--override betas" in lines[0] and "--override eps" in lines[1]
    train_gpt2.main([*map(str, [*flags, "--resume", "--override", "betas", "eps"])])
    del state["config"]["betas"], state["config"]["eps"]  # a checkpoint from before they were flags
    torch.save(state, path)
    (path.parent / "SHA256SUMS").unlink()
    train_gpt2.main([*map(str, [*flags, "--resume"])])
    assert len(error_lines(capsys, *flags, "--resume", "--eps", 1e-7)) == 1


def test_a_sharded_model_is_gathered_only_when_needed(monkeypatch):
    """`evaluate` runs at every step, and gathering a model on every step would cost more than training it."""
    gathered = []
    monkeypatch.setattr(train_gpt2.distributed, "whole_model", lambda *_: gathered.append(1))
    model = torch.nn.Linear(1, 1)
    training = train_gpt2.Training(
        model, model, [], None, None, None, {}, None, hellaswag_rows=[1], log=None, clock=None
    )
    runtime = train_gpt2.Runtime(0, 1, torch.device("cpu"), torch.float32, compile=False, stop=StopSignal())
    config = train_gpt2.TrainConfig(eval_interval=100, sample_interval=100)
    for step in range(1, 100):
        train_gpt2.evaluate(step, training, config, runtime)
    assert not gathered
