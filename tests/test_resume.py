"""What a run survives: kills, full disks, signals, broken checkpoints, and being resumed as something else."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, Program, assert_same_run, error_lines, steps_saved, worker
from safetensors.torch import load_file

import fineweb
import train_gpt2
from support.checkpoints import (
    CheckpointWriter,
    delete_checkpoint,
    list_checkpoints,
    load_newest,
    prepare_out_dir,
    save_checkpoint,
)
from support.common import UserError
from support.distributed import EXIT_STOPPED, StopSignal
from support.runlog import cut_log, read_log


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For models this small a second thread is only in the way of whatever else the machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(text_shards, tmp_path_factory, run_script):
    """A run of 40 steps with a checkpoint at each tenth."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = run_script("train_gpt2.py", *TINY, "--data_dir", text_shards, "--out_dir", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def interrupted(undisturbed, tmp_path):
    """The same run as a crash after step 25 or so has left it: checkpoints 10 and 20, a longer log, half a save."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    lines = (out / "log.txt").read_text().splitlines(keepends=True)
    (out / "log.txt").write_text("".join(line for line in lines if int(line.split()[0]) <= 25) + "26 tra")
    shutil.rmtree(out / "checkpoints" / "step_000040")
    (out / "checkpoints" / "step_000030").rename(out / "checkpoints" / ".step_000025")
    return out


# --- continuing -------------------------------------------------------------------------------------------------------


def test_resumed_run_is_the_undisturbed_one(interrupted, undisturbed, text_shards, run_script):
    """To the bit: the original has no optimizer state to go on from. What is beyond the checkpoint goes."""
    done = run_script("train_gpt2.py", *TINY, "--data_dir", text_shards, "--out_dir", interrupted, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"resuming {interrupted} at step 20" in done.stdout
    assert not re.search(r"^step +(\d|1\d|20) \| val", done.stdout, re.M)  # evaluated already
    assert_same_run(interrupted, undisturbed)
    assert steps_saved(interrupted) == ["step_000010", "step_000020", "step_000030", "step_000040"]
    before = (interrupted / "log.txt").read_text()
    again = run_script("train_gpt2.py", *TINY, "--data_dir", text_shards, "--out_dir", interrupted, "--resume")
    assert again.returncode == 0 and not re.search(r"^saved|^step", again.stdout, re.M)
    assert (interrupted / "log.txt").read_text() == before


def test_the_best_checkpoint_stays(tmp_path):
    """--save_best would be of no use if later checkpoints replaced the best one."""
    model = train_gpt2.GPT(train_gpt2.GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=8))
    encoding = fineweb.get_encoding("bytes")
    with CheckpointWriter(tmp_path, 2, asdict(model.config), encoding, None) as writer:
        for step in (1, 2, 3, 4):
            writer.best_step = 1
            writer.save(step, model.pretrained_weights(), {"step": step})
            writer.finish()
    assert steps_saved(tmp_path) == ["step_000001", "step_000003", "step_000004"]


@pytest.mark.slow
def test_resumed_run_with_dropout(undisturbed, text_shards, run_script, tmp_path):
    """The same masks as undisturbed, whatever was sampled on the way; evaluation has none; a change is refused."""
    flags = [*TINY, "--data_dir", text_shards, "--dropout", 0.3, "--max_steps", 8, "--save_interval", 4]
    done = run_script("train_gpt2.py", *flags, "--out_dir", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves" / "checkpoints" / "step_000008")
    resume = [*flags, "--out_dir", tmp_path / "halves", "--resume"]
    for change in ([], ["--init_from", tmp_path / "whole" / "checkpoints" / "step_000004"]):
        refused = run_script("train_gpt2.py", *resume, *change, "--dropout", 0.2)
        assert f"--dropout is 0.2, the run in {tmp_path / 'halves'} has 0.3" in refused.stderr
        assert "allow it with --override dropout" in refused.stderr
    done = run_script("train_gpt2.py", *resume, "--sample_interval", 2, "--max_new_tokens", 3)
    assert done.returncode == 0 and "sample 0" in done.stdout, done.stderr
    assert_same_run(tmp_path / "halves", tmp_path / "whole")
    folder = tmp_path / "whole" / "checkpoints" / "step_000008"
    assert json.loads((folder / "config.json").read_text())["attn_pdrop"] == 0.3
    loader = train_gpt2.DataLoaderLite(text_shards, "val", 4, 64, shuffle=False)
    runtime = train_gpt2.Runtime(0, 1, torch.device("cpu"), torch.float32, False)
    loss = train_gpt2.validation_loss(train_gpt2.GPT.from_pretrained(folder), loader, 2000, runtime)
    log, without = read_log(tmp_path / "whole" / "log.txt"), read_log(undisturbed / "log.txt")
    assert log["val"][1][-1] == pytest.approx(loss, abs=1e-6)
    assert log["val"][1][0] == without["val"][1][0] and log["train"][1][0] != without["train"][1][0]


def test_cut_log(tmp_path):
    """Lines from beyond the checkpoint, half lines and the update that follows it go; its evaluation stays."""
    log = tmp_path / "log.txt"
    log.write_text("0 val 5\n0 train 5\n9 train 3\n10 val 2\n10 hella 0.25\n10 train 1\n11 train 1\n12 val 0\n1 tr")
    assert cut_log(log, 10)
    assert log.read_text() == "0 val 5\n0 train 5\n9 train 3\n10 val 2\n10 hella 0.25\n"
    assert not cut_log(log, 9) and log.read_text() == "0 val 5\n0 train 5\n"
    assert not cut_log(tmp_path / "none.txt", 5)


def test_lines_that_are_no_measurement(tmp_path):
    """Someone adds a comment or a blank line to log.txt. Drawing the curve of the running training must not fail."""
    path = tmp_path / "log.txt"
    text = "# my run\n0 val 11\n\n  \n0 train 10.5\nlr was too high\n1 train 9e0\n² val 3\n1 val\n2 val x\n3 val 8 9\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\xff\0\n2 train 8\n2 val 7\n3 trai")
    assert read_log(path) == {"val": ([0, 2], [11, 7]), "train": ([0, 1, 2], [10.5, 9, 8])}
    path.write_text("# my run\n0 val 11\n\n² val 3\nx\n1 train 9\n2 train 8\n# last\n2 val")
    assert not cut_log(path, 1)
    assert path.read_text() == "# my run\n0 val 11\n\n# last\n"


@pytest.mark.slow
def test_newest_checkpoints_are_kept(undisturbed, text_shards, run_script, tmp_path):
    """--keep_checkpoints prunes the oldest, and only them; --resume starts where there is nothing to resume."""
    flags = [*TINY, "--data_dir", text_shards, "--out_dir", tmp_path / "out", "--keep_checkpoints", 2, "--resume"]
    assert run_script("train_gpt2.py", *flags).returncode == 0
    assert steps_saved(tmp_path / "out") == ["step_000030", "step_000040"]
    assert_same_run(tmp_path / "out", undisturbed)


def test_checkpoint_is_of_its_moment_and_finite(tmp_path, capsys):
    """Training changes the tensors while the thread writes. What is saved is as it was before, and is never NaN."""
    model = train_gpt2.GPT(train_gpt2.GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=8))
    config = train_gpt2.TrainConfig(out_dir=str(tmp_path))
    optimizers = train_gpt2.configure_optimizers(model, config)

    def update():
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizers[0].step()

    update()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    scaler, loader = torch.amp.GradScaler("cpu", enabled=False), SimpleNamespace(position=8)
    encoding = fineweb.get_encoding("bytes")
    training = train_gpt2.Training(model, model, optimizers, scaler, loader, loader, {}, encoding, None, None, None)
    runtime = train_gpt2.Runtime(0, 1, torch.device("cpu"), torch.float32, compile=False)
    with CheckpointWriter(tmp_path, 5, asdict(model.config), encoding, newest_step=None) as writer:
        free = threading.Event()
        writer.thread.submit(free.wait)
        train_gpt2.save(3, 0, training, config, runtime, writer)
        update()
        free.set()
        writer.finish()
        with torch.no_grad():
            model.lm_head.weight[5, 5] = float("nan")
        train_gpt2.save(4, 0, training, config, runtime, writer)
        with pytest.raises(UserError, match="has no checkpoint of step 4"):
            writer.finish()
        assert "the weights are not finite" in capsys.readouterr().err and steps_saved(tmp_path) == ["step_000003"]
    folder = tmp_path / "checkpoints" / "step_000003"
    saved = train_gpt2.GPT.from_pretrained(folder).state_dict()
    assert all(torch.equal(saved[name][:257], before[name][:257]) for name in before)
    adam = torch.load(folder / "training_state.pt", weights_only=True)["optimizers"][0]["state"]
    assert {state["step"].item() for state in adam.values()} == {1}
    assert optimizers[0].state[model.lm_head.weight]["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_other_layout_goes_on_with_the_same_batches(text_shards, run_script, tmp_path, before, after):
    """Another number of processes and another micro-batch must read the same rows: losses as of a run of one."""
    flags = [
        *TINY,
        "--optimizer",
        "adamw",
        "--data_dir",
        text_shards,
    ]  # Muon multiplies in bfloat16, which magnifies noise
    for out, processes, more in [
        ("whole", 1, []),
        ("out", before, ["--micro_batch", 4 // before]),
        ("out", after, ["--micro_batch", 2, "--resume"]),
    ]:
        done = run_script("train_gpt2.py", *flags, *more, "--out_dir", tmp_path / out, processes=processes)
        assert done.returncode == 0, done.stderr
        if "--resume" not in more:
            for step in (30, 40) if out == "out" else ():
                shutil.rmtree(tmp_path / out / "checkpoints" / f"step_0000{step}")
    assert "at step 20" in done.stdout
    ours, expected = (read_log(tmp_path / out / "log.txt") for out in ("out", "whole"))
    for stream in ("train", "val", "lr", "norm"):
        assert ours[stream][0] == expected[stream][0]
        assert ours[stream][1] == pytest.approx(expected[stream][1], abs=1e-4, rel=1e-4 if stream == "norm" else 0)
    states = [torch.load(tmp_path / out / "checkpoints/step_000040/training_state.pt") for out in ("out", "whole")]
    assert states[0]["loader"] == states[1]["loader"] == 40 * 8


@pytest.mark.slow
def test_fast_preset_on_any_layout(text_shards, run_script, tmp_path):
    """Two processes train gpt2-fast on the rows of one, and by its schedule, but for bfloat16's noise."""
    flags = ["--preset", "gpt2-fast", *TINY, "--data_dir", text_shards]
    for out, processes in [("whole", 1), ("two", 2)]:
        layout = ["--micro_batch", 4 // processes, "--out_dir", tmp_path / out]
        done = run_script("train_gpt2.py", *flags, *layout, processes=processes)
        assert done.returncode == 0, done.stderr
    whole, two = (read_log(tmp_path / out / "log.txt") for out in ("whole", "two"))
    assert whole["lr"] == two["lr"] and whole["lr"][1][39] == pytest.approx(0.01 / 35)
    assert whole["train"][1][0] == pytest.approx(two["train"][1][0], abs=1e-5)
    assert whole["val"][1] == pytest.approx(two["val"][1], abs=5e-3)


# --- kills ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_again_and_again(text_shards, tmp_path, run_script):
    """Kills that no program can catch, three in a step, a save and an evaluation each: the weights end the same."""
    flags = [*TINY, "--data_dir", text_shards, "--max_steps", 800, "--eval_interval", 20, "--val_tokens", 20_000]
    flags += ["--save_interval", 5, "--keep_checkpoints", 2]
    whole = run_script("train_gpt2.py", *flags, "--out_dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    out, killed_in = tmp_path / "out", {"step": 0, "save": 0, "evaluation": 0}
    for _ in range(30):  # a kill may come too late for its phase
        if (phase := min(killed_in, key=killed_in.get)) and killed_in[phase] == 3:
            break
        run = Program(*flags, "--out_dir", out, "--resume")
        run.wait_for(r"^step +\d+ \| loss" if phase != "evaluation" else r"^step +\d*[13579]9 \| loss")
        while phase == "save" and not list(out.glob("checkpoints/.step_*")) and run.process.poll() is None:
            time.sleep(0.001)
        run.process.kill()
        run.end()
        assert run.process.returncode == -signal.SIGKILL, run.text
        last = (out / "log.txt").read_text().splitlines()[-1].split()
        evaluating = (int(last[0]) + 1) % 20 == 0 and last[1] != "val"
        saving = list(out.glob("checkpoints/.step_*"))
        killed_in["save" if saving else "evaluation" if evaluating else "step"] += 1
    assert min(killed_in.values()) >= 3, killed_in
    done = run_script("train_gpt2.py", *flags, "--out_dir", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_run(out, tmp_path / "whole")
    assert steps_saved(out) == ["step_000795", "step_000800"]


def exit_code_of_a_crash(crash, moment, function):
    """Call `function` in a process that dies at its flush, rename or deletion number `crash`. Return 8 if it ends."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = iter(range(crash, -1, -1))

    def crashing(call):
        def wrapper(*values, **options):
            is_last = next(left) == 0
            if moment == "after" or not is_last:
                call(*values, **options)
            if is_last:
                os._exit(9)

        return wrapper

    for name in ("replace", "fsync", "unlink", "rmdir"):
        setattr(os, name, crashing(getattr(os, name)))
    try:
        function()
    finally:
        os._exit(8)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="crashes in a forked process")
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_crash_at_each_step_of_a_save_leaves_whole_checkpoints(interrupted, tmp_path, moment):
    """Saving and pruning at every point of failure: each folder with its final name opens, and none is lost."""
    state, weights, _ = load_newest(interrupted)
    newest = interrupted / "checkpoints" / "step_000020"
    shape = {"vocab_size": 257, "block_size": 64, "dropout": 0.0, "n_layer": 2, "n_head": 2, "n_embd": 32}

    def save_and_prune():
        save_checkpoint(out, 30, weights, {**state, "step": 30}, shape, fineweb.get_encoding("bytes"))
        delete_checkpoint(out / "checkpoints" / "step_000010")

    whole, outcomes = {file.name for file in newest.iterdir()}, set()
    for crash in range(100):
        out = tmp_path / f"crash{crash}"
        shutil.copytree(newest, out / "checkpoints" / "step_000010")
        shutil.copytree(newest, out / "checkpoints" / "step_000020")
        code = exit_code_of_a_crash(crash, moment, save_and_prune)
        found, _, damaged = load_newest(out)
        names = {folder.name for folder in list_checkpoints(out)}
        assert not damaged and found["step"] == (30 if "step_000030" in names else 20) and "step_000020" in names
        assert all({file.name for file in folder.iterdir()} == whole for folder in list_checkpoints(out))
        assert "step_000010" in names or "step_000030" in names
        outcomes.add(frozenset(names))
        if code == 8:
            break
        prepare_out_dir(out, {}, resumed=True, overwrite=False)  # what the next start does
        assert not list(out.glob("checkpoints/.step_*"))
    assert code == 8 and crash >= 8 and len(outcomes) == 3


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc")
def test_a_killed_rank_is_restarted(text_shards, tmp_path, run_script):
    """One of two processes dies: the other must end too, and torchrun resumes both without a human."""
    flags = [*TINY, "--data_dir", text_shards, "--max_steps", 300, "--save_interval", 20]
    whole = run_script("train_gpt2.py", *flags, "--out_dir", tmp_path / "whole", processes=2)
    assert whole.returncode == 0, whole.stderr
    run = Program(*flags, "--out_dir", tmp_path / "out", "--resume", processes=2, restarts=1)
    run.wait_for(r"^step +45 \| loss")
    os.kill(worker(run.process, rank=1), signal.SIGKILL)
    assert run.end() == 0, run.text
    assert re.search(r"^resuming .* at step [1-9]", run.text, re.M)
    assert_same_run(tmp_path / "out", tmp_path / "whole")


# --- signals ----------------------------------------------------------------------------------------------------------


PHASES = {
    "training": (r"^step +13 \| loss", ["--total_batch_tokens", 65536]),  # 256 micro-steps in a step
    "evaluating": (r"^step +9 \| loss", ["--val_tokens", 90_000, "--micro_batch", 1, "--n_layer", 6]),
    "sampling": (r"^step +10 \| val", ["--sample_interval", 10, "--max_new_tokens", 4000, "--prompt", "def "]),
}


@pytest.mark.timing
@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, name, phase",
    [(processes, "SIGTERM", phase) for processes in (1, 2) for phase in PHASES]
    + [(1, "SIGINT", "training"), (1, "SIGUSR1", "evaluating")],
)
def test_signals_save_and_stop(text_shards, tmp_path, phase, processes, name):
    """Whatever the run is doing: it saves the step that it is at, soon, says so by its exit code, and can go on."""
    pattern, extra = PHASES[phase]
    flags = [*TINY, "--data_dir", text_shards, "--save_interval", 1000, "--out_dir", tmp_path / "out", *extra]
    run = Program(*flags, "--resume", processes=processes)
    run.wait_for(pattern)
    time.sleep(0.3)
    # one of two processes, where both meet at each micro-step; else torchrun, which passes it on to both
    one_of_two = processes > 1 and phase == "training"
    os.kill(worker(run.process, rank=1) if one_of_two else run.process.pid, getattr(signal, name))
    sent = time.monotonic()
    code = run.end()
    assert code == EXIT_STOPPED if processes == 1 else code != 0, run.text  # torchrun has exit codes of its own
    stopped = next(at for at, line in zip(run.times, run.lines) if line.startswith("stopped"))
    assert stopped - sent < (run.seconds_to(r"^step +0 \| val") / 2 if phase == "evaluating" else 10)
    step = int(re.search(r"stopped at step (\d+): continue with --resume", run.text)[1])
    assert step >= 14 if phase == "training" else step == 10
    assert "sample 0" not in run.text
    assert steps_saved(tmp_path / "out") == [f"step_{step:06d}"]
    log = read_log(tmp_path / "out" / "log.txt")
    assert log["train"][0] == list(range(step)) and (10 in log["val"][0]) == (phase != "evaluating")
    state = torch.load(tmp_path / "out" / "checkpoints" / f"step_{step:06d}" / "training_state.pt")
    assert state["loader"] == step * (1024 if phase == "training" else 8)


@pytest.mark.timing
@pytest.mark.slow
def test_signal_during_hellaswag(shared_data, tmp_path, make_shards):
    """HellaSwag takes minutes on small machines, which a preempted job does not have."""
    tokens = np.random.RandomState(0).randint(0, 50257, 9000)
    data = make_shards(tmp_path / "data", {"val": [tokens[:3000]], "train": [tokens[3000:]]})
    file = shared_data / "hellaswag" / "hellaswag_val_600.jsonl"
    flags = [*TINY, "--data_dir", data, "--out_dir", tmp_path / "out", "--block_size", 256, "--hellaswag_file", file]
    run = Program(*flags, "--n_layer", 4, "--n_embd", 128, "--eval_interval", 3)
    run.wait_for(r"^step +2 \| loss")
    time.sleep(1)
    run.process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    assert run.end() == EXIT_STOPPED, run.text
    assert run.times[-1] - sent < run.seconds_to(r"^step +0 \| val") / 2
    assert "stopped at step 3: continue with --resume" in run.lines and read_log(tmp_path / "out" / "log.txt")["val"][
        0
    ] == [0]


@pytest.mark.timing
def test_second_signal_ends_at_once():
    """Who cannot wait, or sees it hang, sends a second signal. An echo of the first, which torchrun makes, is none."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nimport torch\nfrom support.distributed import StopSignal\n"
        "with (stop := StopSignal()):\n"
        "    print('deaf', flush=True); torch.linalg.svd(torch.randn(5000, 5000)); print(stop.received, flush=True)\n"
    )
    deaf = Program("-c", code, ROOT, launcher=[])  # for half a minute in one call that no handler interrupts
    deaf.wait_for("deaf")
    time.sleep(0.2)
    for pause in (0.1, 0.8, 0):
        assert deaf.process.poll() is None
        deaf.process.send_signal(signal.SIGTERM)
        time.sleep(pause)
    assert deaf.process.wait(3) == 128 + signal.SIGTERM
    before = signal.getsignal(signal.SIGTERM)
    with (stop := StopSignal()):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        assert stop.received == "SIGINT"
    assert signal.getsignal(signal.SIGTERM) == before


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("largest", [100_000, 200_000])  # bytes: too few for the weights, or for the training state
def test_failing_saves(interrupted, undisturbed, text_shards, tmp_path, run_script, largest):
    """A disk with no room: an error, nothing half-written stays, the old checkpoint does. Training continues."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    flags = [*TINY, "--data_dir", text_shards, "--out_dir", interrupted, "--resume", "--eval_interval", 5]
    run = Program(*flags, preexec_fn=limit)
    assert run.end() == 2
    failures = [
        line for line in run.lines if re.match(r"error: saving step \d+ failed: .*(too large|No space)", line, re.I)
    ]
    steps = [int(re.search(r"\d+", line)[0]) for line in failures]
    assert steps[0] == 30 and steps[-1] == 40 and len(steps) >= 2, run.text  # the last right after one that failed
    assert (
        run.lines[-1].startswith(f"error: {interrupted} has no checkpoint of step 40") and "Traceback" not in run.text
    )
    assert steps_saved(interrupted) == ["step_000010", "step_000020"]
    done = run_script("train_gpt2.py", *TINY, "--data_dir", text_shards, "--out_dir", interrupted, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_run(interrupted, undisturbed)


@pytest.mark.slow
def test_full_disk(undisturbed, text_shards, tmp_path, run_script):
    """A real disk, full to the last byte, which is given room while the run goes on: nothing is missing at the end."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        flags = [
            *TINY,
            "--data_dir",
            text_shards,
            "--out_dir",
            disk / "out",
            "--max_steps",
            400,
            "--eval_interval",
            400,
        ]
        run = Program(*flags, "--keep_checkpoints", 1)
        run.wait_for(r"^step +3 \| loss")
        while "log.txt cannot be written" not in run.text:  # whatever comes free is taken
            assert run.process.poll() is None, run.text
            with suppress(OSError), open(disk / "ballast", "ab", buffering=0) as ballast:
                while True:
                    ballast.write(bytes(4096))
        run.wait_for(r"^error: saving step \d+ failed")
        (disk / "ballast").unlink()
        assert run.end() == 0, run.text
        assert steps_saved(disk / "out") == ["step_000400"]
        log = read_log(disk / "out" / "log.txt")
        assert log["train"][0] == list(range(400)) and log["val"][0] == [0, 400]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("file", [pytest.param("model.safetensors", marks=pytest.mark.slow), "training_state.pt"])
def test_truncated_checkpoint(interrupted, text_shards, tmp_path, run_script, file, capsys):
    """The newest is named and the one before it used; asked for by its path it is an error; with no other, too."""
    broken = interrupted / "checkpoints" / "step_000020"
    (broken / "SHA256SUMS").unlink()  # as in a checkpoint of an earlier version
    os.truncate(broken / file, (broken / file).stat().st_size // 2)
    flags = [*TINY, "--data_dir", text_shards, "--out_dir", interrupted, "--max_steps", 40, "--resume"]
    if file == "model.safetensors":
        assert error_lines(
            capsys, *TINY, "--data_dir", text_shards, "--out_dir", tmp_path / "other", "--init_from", broken
        )
        assert run_script("sample.py", "--model", broken).returncode == 2
    done = run_script("train_gpt2.py", *flags)
    assert done.returncode == 0, done.stderr
    assert re.search(f"^warning: {broken} is damaged: .+$", done.stderr, re.M)
    assert f"resuming {interrupted} at step 10" in done.stdout
    assert steps_saved(interrupted) == [
        "step_000010", "step_000020", "step_000020.damaged", "step_000030", "step_000040"
    ]  # fmt: skip
    for folder in interrupted.glob("checkpoints/step_*"):
        (folder / file).write_bytes(b"")
    assert "are damaged" in error_lines(capsys, *flags)[0] and len(steps_saved(interrupted)) == 5


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['BOMB_FILE']}",)


def test_malicious_pickle_never_runs(interrupted, text_shards, tmp_path, monkeypatch, capsys):
    """A training state from a stranger is data: what it would execute is refused, and the checkpoint named."""
    monkeypatch.setenv("BOMB_FILE", str(tmp_path / "exploded"))
    folder = interrupted / "checkpoints" / "step_000020"
    torch.save({"step": 20, "rng": Bomb()}, folder / "training_state.pt")
    (folder / "SHA256SUMS").unlink()  # a stranger would write one that fits
    train_gpt2.main(
        [*TINY, "--data_dir", str(text_shards), "--out_dir", str(interrupted), "--resume", "--max_steps", "40"]
    )
    captured = capsys.readouterr()
    assert f"warning: {folder} is damaged" in captured.err and "at step 10" in captured.out
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(Exception, match="."):  # the bomb is one
        torch.load(folder.with_name("step_000020.damaged") / "training_state.pt", weights_only=False)["none"]
    assert (tmp_path / "exploded").exists()


def test_two_runs_in_one_folder(text_shards, tmp_path, capsys):
    """The second would delete or overwrite what the first writes; a lock that outlives its process would be as bad."""
    flags = [*TINY, "--data_dir", text_shards, "--out_dir", tmp_path / "out"]
    run = Program(*flags, "--max_steps", 100_000)
    run.wait_for(r"^step +2 \| loss")
    for second in ("--resume", "--overwrite"):
        (line,) = error_lines(capsys, *flags, second)
        assert line.startswith(f"error: another run is writing to {tmp_path / 'out'}")
    run.process.kill()
    run.end()
    train_gpt2.main([*map(str, flags), "--resume", "--max_steps", "5"])


def test_restart_does_not_delete_the_run(interrupted, text_shards, capsys, monkeypatch):
    """--overwrite in the command that torchrun starts again would delete what the first start has trained."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    flags = [*TINY, "--data_dir", text_shards, "--out_dir", interrupted]
    assert "give --resume" in error_lines(capsys, *flags, "--overwrite")[0]
    assert "step_000020" in steps_saved(interrupted)


def test_checkpoints_are_deleted_on_request_alone(interrupted):
    """A folder that was mounted or filled after the run looked for checkpoints must not be cleared."""
    with pytest.raises(UserError, match="was created after this run started"):
        prepare_out_dir(interrupted, {}, resumed=False, overwrite=False)
    assert {"step_000010", "step_000020"} <= set(steps_saved(interrupted)) and (interrupted / "log.txt").exists()
    prepare_out_dir(interrupted, {}, resumed=False, overwrite=True)
    assert steps_saved(interrupted) == [] and not (interrupted / "log.txt").exists()


def test_a_disk_that_cannot_be_read_is_no_damage(interrupted, text_shards, capsys):
    """Where the system refuses to read, all may be well tomorrow: nothing is renamed, skipped or started anew."""
    state = interrupted / "checkpoints" / "step_000020" / "training_state.pt"
    state.unlink()
    state.mkdir()  # reading it is an OSError even for root
    (line,) = error_lines(capsys, *TINY, "--data_dir", text_shards, "--out_dir", interrupted, "--resume")
    assert "cannot read" in line and "step_000020" in line and "step_000020" in steps_saved(interrupted)


# --- what may change --------------------------------------------------------------------------------------------------


def test_changed_configuration(interrupted, text_shards, capsys):
    """A run must not silently go on as another: each difference is named with the ways out, unless it was asked for."""
    flags = [*TINY, "--data_dir", text_shards, "--out_dir", interrupted, "--resume"]
    log = (interrupted / "log.txt").read_text()
    changes = ["--lr", 0.02, "--max_steps", 50, "--no_shuffle", "--n_layer", 3, "--schedule", "linear"]
    lines = error_lines(capsys, *flags, *changes)
    assert [re.match(r"error: --(\w+) is (\S+), the run in \S+ has (\S+): ", line).groups() for line in lines] == [
        ("lr", "0.02", "0.01"), ("max_steps", "50", "40"), ("n_layer", "3", "2"), ("schedule", "linear", "cosine"),
        ("shuffle", "False", "True"),
    ]  # fmt: skip
    assert "allow it with --override lr" in lines[0] and "--override" not in lines[2]
    assert "allow it with --override schedule" in lines[3]
    assert (
        error_lines(capsys, *flags, "--max_steps", 50, "--override", "lr", "shuffle")
        and log == (interrupted / "log.txt").read_text()
    )
    for name in ("n_layer", "seq_len", "optimizer", "no_such_flag", "device"):
        assert f"--override {name}" in error_lines(capsys, *flags, "--override", name)[0]
    assert "exclude each other" in error_lines(capsys, *flags, "--overwrite")[0]


def test_overridden_configuration(interrupted, undisturbed, text_shards):
    """--override takes effect, decays and rates included, and is remembered; intervals change freely."""
    flags = [*TINY, "--data_dir", text_shards, "--out_dir", interrupted, "--resume", "--max_steps", 45]
    flags += [
        "--override",
        "max_steps",
        "weight-decay",
        "--weight_decay",
        0.5,
        "--eval_interval",
        9,
        "--save_interval",
        15,
    ]
    train_gpt2.main([*map(str, flags)])
    log, before = read_log(interrupted / "log.txt"), read_log(undisturbed / "log.txt")
    assert log["val"][0] == [0, 10, 20, 27, 36, 45] and log["train"][0] == list(range(45))
    assert steps_saved(interrupted) == ["step_000010", "step_000020", "step_000030", "step_000045"]
    assert log["train"][1][20] == before["train"][1][20] and log["train"][1][25] != before["train"][1][25]
    assert log["lr"][1][:20] == before["lr"][1][:20] and log["lr"][1][39] > before["lr"][1][39]
    state = torch.load(interrupted / "checkpoints" / "step_000045" / "training_state.pt", weights_only=True)
    assert {group["weight_decay"] for o in state["optimizers"] for group in o["param_groups"]} == {0.5, 0.0}
    without = [flag for flag in flags if flag not in ("--override", "max_steps", "weight-decay")]
    train_gpt2.main([*map(str, without), "--dtype", "bfloat16", "--no_flash", "--micro_batch", "2"])


@pytest.mark.parametrize("change", ["replaced", "added", "removed", "resized", "encoding"])
def test_changed_data(tmp_path, make_shards, text_shards, capsys, change):
    """Where the data is not what the position refers to, the run must not go on reading something else."""
    tokens = np.random.RandomState(0).randint(0, 50257, 9000)
    splits = {"val": [tokens[:1000]], "train": [tokens[1000:5000], tokens[5000:]]}
    data = make_shards(tmp_path / "data", splits)
    flags = [*TINY, "--out_dir", tmp_path / "out", "--n_embd", 8, "--micro_batch", 8, "--val_tokens", 500]
    train_gpt2.main([*map(str, flags), "--data_dir", str(data), "--max_steps", "2", "--warmup_steps", "1"])
    resume = [*flags, "--max_steps", 3, "--warmup_steps", 1, "--resume", "--override", "max_steps"]
    if change == "encoding":
        (line,) = error_lines(capsys, *resume, "--data_dir", text_shards)
        assert "has bytes tokens" in line and "gpt2 tokens" in line
        return
    second = data / "edufineweb_train_000002.npy"
    if change == "replaced":
        np.save(second, tokens[5000:][::-1].astype(np.uint16))
    elif change == "added":
        second = data / "edufineweb_train_000003.npy"
        np.save(second, tokens[:100].astype(np.uint16))
    elif change == "removed":
        second.unlink()
    else:
        np.save(second, tokens[5000:-1].astype(np.uint16))
    (line,) = error_lines(capsys, *resume, "--data_dir", data)
    assert str(second) in line and "--override data_dir" in line
    train_gpt2.main([*map(str, resume), "data_dir", "--data_dir", str(data)])


# --- numbers that are none --------------------------------------------------------------------------------------------

POISONER = """
import os, sys
sys.path.insert(0, {root!r})
import train_gpt2

steps, calls, wrap_model = {steps}, [], train_gpt2.wrap_model

def poisoned(gradient):
    calls.append(None)
    here = os.environ.get("RANK", "{rank}") == "{rank}" and (len(calls) - 1) // {micro_steps} in steps
    return gradient * float("nan") if here else gradient

def wrap(raw_model, runtime):
    raw_model.transformer.h[1].mlp.c_fc.weight.register_hook(poisoned)
    return wrap_model(raw_model, runtime)

train_gpt2.wrap_model = wrap
train_gpt2.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_poisoned_gradient_is_skipped(text_shards, tmp_path, processes):
    """One NaN on one process must neither reach the weights nor part the processes; the run counts it and goes on."""
    script = tmp_path / "poisoner.py"
    script.write_text(POISONER.format(root=str(ROOT), steps=(3, 4, 7), rank=processes - 1, micro_steps=2 // processes))
    out = tmp_path / "out"
    run = Program(
        *TINY, "--data_dir", text_shards, "--out_dir", out, "--lr", 0.001, launcher=[str(script)], processes=processes
    )
    assert run.end() == 0, run.text
    log = read_log(out / "log.txt")
    assert log["skipped"] == ([3, 4, 7], [1, 2, 1]) and [s for s, n in zip(*log["norm"]) if np.isnan(n)] == [3, 4, 7]
    assert np.isfinite(log["val"][1]).all() and log["val"][1][-1] < log["val"][1][0] - 0.5
    assert all(
        weight.isfinite().all() for weight in load_file(out / "checkpoints/step_000040/model.safetensors").values()
    )
    state = torch.load(out / "checkpoints" / "step_000010" / "training_state.pt", weights_only=True)
    assert state["optimizers"][0]["state"][0]["step"] == 10 - 3


@pytest.mark.slow
def test_a_run_of_poisoned_gradients_ends(interrupted, undisturbed, text_shards, tmp_path, run_script):
    """Twenty in a row are no accident: the run stops, and the checkpoints are good to go on from."""
    script = tmp_path / "poisoner.py"
    script.write_text(POISONER.format(root=str(ROOT), steps=range(5, 99), rank=0, micro_steps=2))
    flags = [*TINY, "--data_dir", text_shards, "--out_dir", interrupted, "--resume"]
    run = Program(*flags, "--max_steps", 50, "--override", "max_steps", launcher=[str(script)])
    assert run.end() == 2 and run.lines[-1].startswith("error: 20 updates in a row were skipped"), run.text
    for step in (30, 40):  # of finite weights, and fit to go on from, but not of the undisturbed run
        shutil.rmtree(interrupted / "checkpoints" / f"step_0000{step}")
    done = run_script("train_gpt2.py", *flags)
    assert done.returncode == 0, done.stderr
    assert_same_run(interrupted, undisturbed)


@pytest.mark.slow
def test_ctrl_c_while_compiling_is_a_stop(text_shards, tmp_path):
    """A terminal's Ctrl-C reaches the compilers that torch.compile has started, too, and what they fail with."""
    flags = [*TINY, "--compile", "on", "--data_dir", text_shards, "--out_dir", tmp_path / "out"]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "train_gpt2.py"), *map(str, flags)], text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
    )  # fmt: skip
    for line in run.stdout:
        if line.startswith("machine: "):
            break
    deadline = time.time() + 120
    while not any(name in ("cc1plus", "clang") for name in process_group(run.pid)) and time.time() < deadline:
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGINT)
    output = run.communicate(timeout=120)[0]
    assert run.returncode == 75 and "stopped at step 0" in output and "Traceback" not in output, output


def process_group(group):
    """The names of the running programs of a process group."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, fields = stat.read_text().partition("(")[2].rpartition(")")
            if int(fields.split()[2]) == group:
                yield name
