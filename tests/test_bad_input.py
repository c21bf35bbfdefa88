import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from helpers import write_bin

import fineweb
import hellaswag
import sample
import train_gpt2
from support.runlog import read_log
from train_gpt2 import GPTConfig, TrainConfig

ROOT = Path(__file__).parent.parent
TINY = (
    "--device cpu --compile off --dtype float32 --n_layer 1 --n_head 2 --n_embd 8 --block_size 16 --seq_len 16 "
    "--total_batch_tokens 64 --micro_batch 2 --max_steps 2 --warmup_steps 1 --lr 0.01 --min_lr_ratio 0.1 "
    "--eval_interval 1 --val_tokens 64 --save_interval 2 --sample_interval 2 --prompt Hi --num_samples 1 "
    "--max_new_tokens 2 --hellaswag_file none"
).split()
VOCAB = {"gpt2": 50257, "bytes": 257}


@pytest.fixture
def tiny(tmp_path):
    """The flags of a two-step run on tmp_path/data, with its output in tmp_path/out."""
    return [*TINY, "--data_dir", str(tmp_path / "data"), "--out_dir", str(tmp_path / "out")]


@pytest.fixture
def data(tmp_path, make_shards):
    """tmp_path/data with a validation and two training shards, in a few ids that every encoding has."""
    tokens = np.random.RandomState(0).randint(0, 8, 900)  # of which even two steps learn something
    return make_shards(tmp_path / "data", {"val": [tokens[:300]], "train": [tokens[300:600], tokens[600:]]})


def the_error(ended, *parts, stdout=""):
    """Assert exit code 2 and one line on stderr that holds the parts; stdout=None: whatever it printed before."""
    code, out, err = ended
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert stdout in (None, out)
    for part in parts:
        assert str(part) in err, (part, err)


def add_manifest(folder, encoding="gpt2", lengths=None):
    """Write the manifest that fineweb.py would have left beside these shards of lengths {name: tokens}."""
    lengths = lengths or {path.name: fineweb.open_shard(path).size for path in fineweb.list_shards(folder)}
    shards = {name: {"tokens": tokens, "sha256": ""} for name, tokens in lengths.items()}
    manifest = {"encoding": encoding, "vocab_size": VOCAB[encoding], "source": "stdlib", "finished": True}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"shards": shards}))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def to_bin(path, magic=20240520, version=1):
    """Rewrite a .npy shard as a .bin, and return its path."""
    tokens = np.load(path)
    path.unlink()
    return write_bin(path.with_suffix(".bin"), tokens, magic, version)


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "bare"])
@pytest.mark.parametrize("name", ["val_000000", "train_000002"])
@pytest.mark.parametrize("suffix", [".npy", ".bin"])
@pytest.mark.parametrize("damage", ["cut", "cut in the header", "two bytes more", "twice"])
def test_a_shard_of_another_length_is_named_at_the_start(tmp_path, data, tiny, main, damage, suffix, name, manifest):
    """Half a download passes for data until a step reaches its end, and np.load never tells of bytes past the end."""
    path = data / f"edufineweb_{name}.npy"
    path = to_bin(path) if suffix == ".bin" else path
    if manifest:
        add_manifest(data)
    whole = path.read_bytes()
    path.write_bytes(
        {"cut": whole[:-1], "cut in the header": whole[:9], "two bytes more": whole + b"\0\0", "twice": 2 * whole}[
            damage
        ]
    )
    before = contents(tmp_path)
    the_error(main(train_gpt2, tiny), path, "again")
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "bare"])
@pytest.mark.parametrize("name", ["val_000000", "train_000002"])
@pytest.mark.parametrize(
    "kind", ["int32", "int16", "big-endian", "2-D", "0-D", "objects", "npz", "magic", "version", "header"]
)
def test_what_is_no_shard_is_named_at_the_start(tmp_path, data, tiny, main, kind, name, manifest):
    """Numbers of another width are trained on as garbage; another array or archive ends in a traceback."""
    path = data / f"edufineweb_{name}.npy"
    if manifest:
        lengths = {shard.name: np.load(shard).size for shard in data.iterdir()}
        lengths[path.with_suffix(".bin").name if kind in ("magic", "version") else path.name] = lengths.pop(path.name)
        add_manifest(data, lengths=lengths)
    tokens = np.load(path)
    wrong = {
        "int32": tokens.astype(np.int32), "int16": tokens.astype(np.int16), "big-endian": tokens.astype(">u2"),
        "2-D": tokens[None], "0-D": tokens[0], "objects": tokens.astype(object),
    }  # fmt: skip
    if kind in wrong:
        np.save(path, wrong[kind], allow_pickle=True)
    elif kind == "npz":
        with open(path, "wb") as file:
            np.savez(file, tokens)
    elif kind == "header":
        path.write_bytes(path.read_bytes().replace(b"(300,)", b"((((((", 1))
    else:
        path = to_bin(path, **{"magic": {"magic": 20240521}, "version": {"version": 2}}[kind])
    before = contents(tmp_path)
    the_error(main(train_gpt2, tiny), path)
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


def test_a_bad_shard_stops_the_command(data, tiny, run_script):
    """The same from the outside, in one go with the other mistakes: found with them, before any work starts."""
    path = data / "edufineweb_train_000001.npy"
    path.write_bytes(path.read_bytes() + b"\0")
    done = run_script("train_gpt2.py", *tiny, "--seed", -1)
    assert (done.returncode, done.stdout) == (2, "")
    seed, shard = done.stderr.splitlines()
    assert seed.startswith("error: --seed is -1")
    assert shard.startswith(f"error: {path} is longer than the 300 tokens")


@pytest.mark.parametrize("token", ["first", 65535])
@pytest.mark.parametrize("encoding", VOCAB)
@pytest.mark.parametrize("name", ["val_000000", "train_000002"])
def test_a_token_beyond_the_vocabulary_is_named(data, tiny, main, name, encoding, token):
    """An id that the embedding lacks ends in an index error or, on a GPU, in an assertion that names nothing."""
    path, token = data / f"edufineweb_{name}.npy", VOCAB[encoding] if token == "first" else token
    tokens = np.load(path)
    tokens[10] = token
    np.save(path, tokens)
    add_manifest(data, encoding)
    before = contents(data)
    flags = ["--total_batch_tokens", 320, "--sample_interval", 0]  # two steps read nearly all of the 600 tokens
    ended = main(train_gpt2, [*tiny, *flags, "--max_steps", 4])
    the_error(ended, path, f"token id {token}", VOCAB[encoding], "fineweb.py", stdout=None)
    assert contents(data) == before


# --- folders ----------------------------------------------------------------------------------------------------------

# As root, mode bits stop nobody: give up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, which stop with the next exec.
LAUNCHER = """
import ctypes, os, sys
if os.geteuid() == 0:
    for capability in (1, 2):
        if ctypes.CDLL(None, use_errno=True).prctl(24, capability, 0, 0, 0):  # PR_CAPBSET_DROP
            sys.exit("prctl: " + os.strerror(ctypes.get_errno()))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.fixture
def run_bound(tmp_path):
    """run_bound(script, *flags) -> (exit code, stdout, stderr) of a script that mode bits bind, even if we are root."""

    def run(script, *flags):
        command = [sys.executable, "-c", LAUNCHER, script, *map(str, flags)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        return done.returncode, done.stdout, done.stderr

    if os.name != "posix":
        pytest.skip("mode bits bind nobody here")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    code, _, reason = run("-c", f"import os; os.listdir({str(locked)!r})")
    locked.rmdir()
    if "PermissionError" not in reason:
        pytest.skip(f"cannot run without root's rights: {reason or code}")
    return lambda script, *flags: run(str(ROOT / script), *flags)


@pytest.fixture
def lock():
    """lock(path, mode) until the end of the test."""
    locked = []

    def change(path, mode):
        locked.append((path, path.stat().st_mode))
        path.chmod(mode)

    yield change
    for path, mode in locked:
        path.chmod(mode)


@pytest.mark.parametrize("place", ["absent", "empty", "a file", "validation only"])
def test_a_folder_without_shards_is_named(tmp_path, data, tiny, main, place):
    """Without data a newcomer needs the command that makes it, and a run must not begin on one split."""
    for path in data.iterdir():
        if place != "validation only" or "train" in path.name:
            path.unlink()
    if place in ("absent", "a file"):
        data.rmdir()
    if place == "a file":
        data.write_text("in the way")
    the_error(main(train_gpt2, tiny), data, "name another folder" if place == "a file" else "python fineweb.py")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, mode", [("data", 0), ("data", 0o444), ("data", 0o111), ("data/*train_000001.npy", 0)])
def test_unreadable_data_is_named(tmp_path, data, tiny, run_bound, lock, name, mode):
    """A folder that may not be read looks like one without shards, and the advice was to make them anew."""
    path = next(tmp_path.glob(name))
    lock(path, mode)
    the_error(run_bound("train_gpt2.py", *tiny), "--data_dir", path, "Permission denied", "permissions")
    assert not (tmp_path / "out").exists()


def test_shards_that_may_only_be_read_are_verified(data, run_bound, lock):
    """Guards --verify on a corpus of others."""
    for path in [*data.iterdir(), data]:
        lock(path, 0o555)
    out, err = run_bound("fineweb.py", "--verify", data)[1:]
    assert "tokens per document" in out and "denied" not in err, err


@pytest.mark.parametrize("mode", [0o555, 0o333, 0])
def test_an_output_folder_without_rights_is_named(tmp_path, data, tiny, run_bound, lock, mode):
    """A folder that cannot be written to must stop the run before it trains, not when it saves."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    lock(out, mode)
    the_error(run_bound("train_gpt2.py", *tiny), "--out_dir", out, "permissions")
    if mode == 0:
        the_error(run_bound("train_gpt2.py", *tiny, "--out_dir", out / "below"), "--out_dir", out, "permissions")
    out.chmod(0o755)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("below", [".", "out", "a/b/out"])
def test_a_file_where_the_output_folder_should_be_is_named(tmp_path, data, tiny, main, below):
    """A path that leads through a file is no folder, at whatever depth."""
    file = tmp_path / "file"
    file.write_text("mine")
    file.chmod(0o755)  # a folder's rights make it none
    the_error(main(train_gpt2, [*tiny, "--out_dir", file / below]), "--out_dir", file, "name another folder")
    assert file.read_text() == "mine" and {path.name for path in tmp_path.iterdir()} == {"data", "file"}


def test_shards_that_cannot_be_written_are_named(tmp_path, run_bound, lock):
    """fineweb.py's own output folder, read-only: the line names it and the flag."""
    out = tmp_path / "out"
    out.mkdir()
    lock(out, 0o555)
    flags = ["--source", "stdlib", "--encoding", "bytes", "--shard_tokens", 1000, "--max_tokens", 3000]
    the_error(run_bound("fineweb.py", *flags, "--out_dir", out), "Permission denied", out, "--out_dir")
    assert not any(out.iterdir())


# --- HellaSwag's own file ---------------------------------------------------------------------------------------------

ROW = json.dumps({"ctx": "A man", "endings": ["walks.", "runs.", "sits.", "sings."], "label": 2}) + "\n"
WRONG_FILES = {
    "cut": (ROW * hellaswag.FULL_ROWS)[:-30],
    "a row less": ROW * (hellaswag.FULL_ROWS - 1),
    "html": "<!DOCTYPE html>\n<html><body>Sign in to the hotel's network</body></html>\n",
}


@pytest.fixture
def scripts(tmp_path):
    """Return (folder, run): copies of the scripts, so that their default folders are in tmp_path/scripts.

    run(script, *flags) -> (exit code, stdout, stderr).
    """
    folder = tmp_path / "scripts"
    (folder / "hellaswag").mkdir(parents=True)
    for name in ("train_gpt2.py", "fineweb.py", "hellaswag.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "support", folder / "support")

    def run(script, *flags):
        offline = {"HF_HUB_OFFLINE": "1", "https_proxy": "http://127.0.0.1:9", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([sys.executable, folder / script, *map(str, flags)], capture_output=True, text=True,
                              timeout=100, env={**os.environ, **offline})  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    return folder, run


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG_FILES)
def test_a_wrong_official_file_is_named(data, tiny, scripts, wrong):
    """A damaged file at the default place must not be used as data, and the error must not blame a flag."""
    folder, run = scripts
    file = folder / "hellaswag" / "hellaswag_val.jsonl"
    file.write_text(WRONG_FILES[wrong])
    the_error(run("hellaswag.py", "--limit", 5), file, "10,042 rows", "delete it")
    code, out, err = run("train_gpt2.py", *tiny[: TINY.index("--hellaswag_file")], *tiny[len(TINY) :])
    (line,) = err.splitlines()
    assert code == 0 and line.startswith("warning: training continues without HellaSwag") and "step" in out
    assert str(file) in line and "10,042 rows" in line and "delete it" in line
    log = read_log(folder.parent / "out" / "log.txt")
    assert log["val"][0] == [0, 1, 2] and "hella" not in log
    assert file.read_text() == WRONG_FILES[wrong] and len(list(file.parent.iterdir())) == 1


def test_the_official_file_and_any_other(tmp_path, monkeypatch):
    """The official file must be complete, but a file that the user names may have any number of rows."""
    for rows, name in ((hellaswag.FULL_ROWS, "official.jsonl"), (7, "mine.jsonl")):
        (tmp_path / name).write_text(ROW * rows)
    monkeypatch.setattr(hellaswag, "FILE", tmp_path / "official.jsonl")
    assert len(hellaswag.find_rows(str(hellaswag.FILE))) == hellaswag.FULL_ROWS
    assert len(hellaswag.find_rows(hellaswag.FILE, 3)) == len(hellaswag.find_rows(tmp_path / "mine.jsonl", 3)) == 3
    assert len(hellaswag.find_rows(tmp_path / "mine.jsonl")) == 7


# --- numbers ----------------------------------------------------------------------------------------------------------

NUMBERS = {  # every flag of train_gpt2.py whose value is a number, by its type
    field.name: number
    for field in (*fields(GPTConfig), *fields(TrainConfig))
    for number in (int, float)
    if number in (field.type, *get_args(field.type)) and field.name not in ("vocab_size", "betas")  # no flag, and two
}
MAY_BE_ZERO = (
    "dropout max_steps warmup_steps weight_decay grad_clip sample_interval min_lr_ratio seed sample_seed "
    "batch_ramp_steps epochs".split()
)


def test_the_numbers_are_all_there():
    """An enumeration that finds no flags would pass whatever the program does."""
    assert {"n_embd", "lr", "seed", "val_tokens"} < NUMBERS.keys() and len(NUMBERS) >= 20
    assert {NUMBERS[name] for name in ("lr", "min_lr_ratio", "weight_decay", "grad_clip")} == {float}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_range_is_named(tmp_path, data, tiny, main, name):
    """A zero divides, a negative number is a slice from the end, nan passes every comparison and inf trains to nan."""
    add_manifest(data, "bytes")
    values = [-1] if name in MAY_BE_ZERO else [0, -1]
    ramp = ["--batch_ramp_steps=2"] if name == "batch_ramp_from" else []
    for value in values + (["nan", "inf", -1e-9] if NUMBERS[name] is float else []):
        the_error(main(train_gpt2, [*tiny, f"--{name}={value}", *ramp]), f"--{name} is {value}")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", MAY_BE_ZERO)
def test_zero_runs_where_it_is_allowed(tmp_path, data, tiny, main, name):
    """A value that passes the checks must also train, evaluate and save."""
    add_manifest(data, "bytes")
    code, out, err = main(train_gpt2, [*tiny, f"--{name}=0"])
    assert code == 0, err
    steps = 0 if name == "max_steps" else 2
    measured, losses = read_log(tmp_path / "out" / "log.txt")["val"]
    assert measured == list(range(steps + 1)) and losses[-1] <= losses[0] - 0.01 * steps, losses
    assert [path.name for path in (tmp_path / "out" / "checkpoints").glob("step_*")] == [f"step_{steps:06d}"]
    assert ("sample 0: Hi" in out) == (name not in ("sample_interval", "max_steps"))


@pytest.mark.parametrize(
    "flags, parts",
    [
        ({"n_head": 3}, ["--n_embd 8", "--n_head 3"]),
        ({"n_embd": 9}, ["--n_embd 9", "--n_head 2"]),
        ({"micro_batch": 3}, ["--micro_batch 3", "2 does"]),
        ({"micro_batch": 8}, ["--micro_batch 8", "4 does"]),
        ({"total_batch_tokens": 65}, ["--total_batch_tokens 65", "64 is"]),
        ({"total_batch_tokens": 8}, ["--total_batch_tokens 8", "16 is"]),
        ({"seq_len": 15}, ["--seq_len 15", "60 is"]),
        ({"seq_len": 32}, ["--seq_len 32", "--block_size 16"]),
        ({"warmup_steps": 3}, ["--warmup_steps 3", "--max_steps 2"]),
        ({"val_tokens": 15}, ["--val_tokens 15", "--seq_len 16"]),
        ({"min_lr_ratio": 1.5}, ["--min_lr_ratio is 1.5"]),
        ({"seed": 2**32}, [f"--seed is {2**32}"]),
        ({"dropout": 1}, ["--dropout is 1.0", "less than 1"]),
        ({"dropout": "nan"}, ["--dropout is nan"]),
    ],
)
def test_numbers_that_do_not_fit_each_other_are_named(tmp_path, data, tiny, main, flags, parts):
    """What must divide or bound another flag says so, and with what it would."""
    add_manifest(data, "bytes")
    the_error(main(train_gpt2, [*tiny, *(f"--{name}={value}" for name, value in flags.items())]), *parts)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_is_named(tmp_path, data, tiny, main):
    """--init_from takes output folders. If one is empty, the error must name this flag and no other."""
    add_manifest(data, "bytes")
    (tmp_path / "empty").mkdir()
    ended = main(train_gpt2, [*tiny, "--init_from", tmp_path / "empty"])
    the_error(ended, f"--init_from {tmp_path / 'empty'}", "checkpoints/step_NNNNNN", stdout=None)


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "tensorboard"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_tracker_that_is_not_installed_is_named(tmp_path, data, tiny, main, monkeypatch, tracker, folder):
    """It is optional: who asks for it is told at the start what to install, even beside the folder of an old run."""
    add_manifest(data, "bytes")
    if folder:  # which Python takes for an empty package
        with suppress(PackageNotFoundError):
            pytest.skip(f"{tracker} {version(tracker)} is installed")
        (tmp_path / tracker).mkdir()
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setitem(sys.modules, tracker, None)
    the_error(main(train_gpt2, [*tiny, "--tracker", tracker]), f"--tracker {tracker}", f"pip install {tracker}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["shard_tokens", "max_tokens", "workers"])
@pytest.mark.parametrize("value", [-1, 0])
def test_fineweb_refuses_senseless_numbers(tmp_path, main, flag, value):
    """--workers -1 ran with one process, without a word."""
    flags = {"source": "stdlib", "encoding": "bytes", "out_dir": tmp_path / "out"}
    flags |= {"shard_tokens": 1000, "max_tokens": 3000, flag: value}
    the_error(main(fineweb, [f"--{name}={value}" for name, value in flags.items()]), f"--{flag} {value}", "give")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [0, -1])
def test_hellaswag_refuses_a_senseless_limit(tmp_path, main, limit):
    """Without rows there is no accuracy, and -1 would leave out the last row."""
    (tmp_path / "rows.jsonl").write_text(ROW * 3)
    flags = ["--device", "cpu", "--file", tmp_path / "rows.jsonl", f"--limit={limit}"]
    the_error(main(hellaswag, flags), f"--limit {limit}", "above 0")


def test_a_senseless_limit_is_named_before_the_download(scripts):
    """If the default file is not downloaded yet, the error must name the flag and not the network."""
    the_error(scripts[1]("hellaswag.py", "--limit", 0), "--limit 0", "above 0")


@pytest.mark.parametrize(
    "flag, value",
    [(flag, value) for flag in ("num_samples", "max_new_tokens", "top_k") for value in (0, -1)]
    + [("temperature", value) for value in (-0.1, "nan", "inf", "-inf")]
    + [("seed", -1), ("seed", 2**64)],
)
def test_sample_refuses_senseless_numbers(main, flag, value):
    """The error names the flag that is wrong. A temperature of nan would fail only while sampling."""
    the_error(main(sample, ["--model", "/nowhere", f"--{flag}={value}"]), f"--{flag} is {value}: it must be")
