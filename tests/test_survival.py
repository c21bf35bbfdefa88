"""What must not end or damage a run: a lost terminal, a closed pipe, a file system without locks, a flipped bit."""

import io
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from helpers import ROOT

import sample
import train_gpt2
from support import distributed
from support.common import TolerantStream
from support.distributed import EXIT_STOPPED, join_slurm
from support.runlog import read_log

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of a Unix")
TINY = (
    "--device cpu --compile off --dtype float32 --n_layer 1 --n_head 2 --n_embd 16 --block_size 32 --seq_len 32 "
    "--total_batch_tokens 256 --micro_batch 4 --warmup_steps 1 --lr 0.01 --eval_interval 100000 --val_tokens 1000 "
    "--save_interval 10 --sample_interval 0 --hellaswag_file none"
).split()


@pytest.fixture
def start(text_shards, tmp_path):
    """start(flags, **options) -> the process of a run into tmp_path/out, in the background."""
    started = []

    def call(*flags, out="out", environment=None, launcher=("-u",), **options):
        command = [sys.executable, *launcher, str(ROOT / "train_gpt2.py"), *TINY, "--data_dir", str(text_shards)]
        env = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
        flags = ["--out_dir", str(tmp_path / out), *map(str, flags)]
        started.append(subprocess.Popen([*command, *flags], env=env, **options))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.wait()


def wait_for_step(process, number):
    for line in process.stdout:
        if line.startswith(f"step {number:5d} | loss"):
            return
    raise AssertionError(f"the run ended before step {number}")


def finished_steps(out):
    return sorted(folder.name for folder in (out / "checkpoints").glob("step_*"))


# --- the terminal -----------------------------------------------------------------------------------------------------


def test_lines_of_two_threads_do_not_mix():
    """The thread that writes checkpoints prints its errors while the steps print theirs."""
    written = []

    class Pipe(io.StringIO):
        def write(self, text):
            written.append(text)

    stream = TolerantStream(Pipe())
    stream.write("step 1")
    other = threading.Thread(target=print, args=["saved"], kwargs={"file": stream})
    other.start()
    other.join()
    stream.write("\n")
    print("a token", end="", file=stream, flush=True)
    assert written == ["saved\n", "step 1\n", "a token"]


def test_sighup_saves_like_sigterm(start, tmp_path):
    run = start("--max_steps", 100_000, "--save_interval", 100_000, stdout=subprocess.PIPE, text=True)
    wait_for_step(run, 3)
    run.send_signal(signal.SIGHUP)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == EXIT_STOPPED and "continue with --resume" in output
    assert len(finished_steps(tmp_path / "out")) == 1


@pytest.mark.slow
def test_sighup_to_torchrun_saves_too(start, tmp_path):
    """torchrun passes the signal on to its processes, and has exit codes of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = start(
        "--max_steps", 100_000, "--save_interval", 100_000, stdout=subprocess.PIPE, text=True, launcher=launcher
    )
    wait_for_step(run, 3)
    run.send_signal(signal.SIGHUP)
    output, _ = run.communicate(timeout=60)
    assert run.returncode != 0 and "continue with --resume" in output
    assert len(finished_steps(tmp_path / "out")) == 1


def test_nohup_is_respected(start, tmp_path):
    """nohup starts a program with SIGHUP ignored, so that it survives its terminal."""
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    run = start("--max_steps", 80, "--save_interval", 100_000, stdout=subprocess.PIPE, text=True, **ignore)
    wait_for_step(run, 3)
    run.send_signal(signal.SIGHUP)
    run.communicate(timeout=60)
    assert run.returncode == 0 and finished_steps(tmp_path / "out") == ["step_000080"]


def test_a_closed_pipe_does_not_end_the_run(start, tmp_path):
    """`python train_gpt2.py | head` closes the pipe (EPIPE) while the run has much to print."""
    run = start("--max_steps", 80, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(run, 3)
    run.stdout.close()
    assert run.wait(60) == 0 and "step_000080" in finished_steps(tmp_path / "out")
    assert run.stderr.read() == ""


def test_a_lost_terminal_does_not_end_the_run(start, tmp_path):
    """The output of a run whose terminal is gone fails with EIO."""
    terminal, side = os.openpty()
    run = start("--max_steps", 80, stdout=side, stderr=side)
    os.close(side)
    os.read(terminal, 1)
    os.close(terminal)
    assert run.wait(60) == 0 and "step_000080" in finished_steps(tmp_path / "out")


def test_output_that_cannot_show_a_character(start, tmp_path):
    """A Windows console often has cp1252, which lacks most of the world's characters."""
    flags = ["--max_steps", 2, "--sample_interval", 1, "--prompt", "日本語"]
    run = start(*flags, stdout=subprocess.PIPE, environment={"PYTHONIOENCODING": "cp1252"})
    output = run.communicate(timeout=60)[0].decode("cp1252")
    assert run.returncode == 0 and "sample 0: ???" in output


def test_main_in_a_thread_with_a_notebooks_stream(text_shards, tmp_path, monkeypatch):
    """Only the main thread can handle signals, and the streams of Jupyter have no `reconfigure`."""

    class Stream:
        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    stream = Stream()
    monkeypatch.setattr(sys, "stdout", stream)
    flags = [*TINY, "--data_dir", text_shards, "--out_dir", tmp_path / "out", "--max_steps", 2]
    thread = threading.Thread(target=train_gpt2.main, args=[list(map(str, flags))])
    thread.start()
    thread.join()
    assert "step     1 | loss" in stream.text and finished_steps(tmp_path / "out") == ["step_000002"]


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_locks(tmp_path):
    """The environment in which flock fails with ENOLCK, as on some network file systems."""
    compiler = shutil.which("cc")
    if not compiler or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    (tmp_path / "flock.c").write_text("#include <errno.h>\nint flock(int f, int o) { errno = ENOLCK; return -1; }\n")
    library = tmp_path / "flock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "flock.c"], check=True)
    return {"LD_PRELOAD": str(library)}


def test_a_file_system_without_locks(start, tmp_path, without_locks):
    run = start("--max_steps", 2, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, environment=without_locks)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 0 and errors.count("warning: ") == 1 and "without locks" in errors
    assert finished_steps(tmp_path / "out") == ["step_000002"]


def test_a_folder_that_takes_no_checkpoints_is_named_at_the_start(start, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoints").write_text("a file in the way")
    run = start("--max_steps", 2, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 2 and "checkpoints cannot be saved" in errors and errors.count("\n") == 1
    assert "| loss" not in output


def test_a_flipped_bit_is_noticed(text_shards, tmp_path, main, capsys):
    """Each file of a checkpoint: --resume sets the checkpoint aside, sample.py refuses it. One bit may not be loud."""
    flags = [*TINY, "--data_dir", text_shards, "--out_dir", tmp_path / "out", "--max_steps", 20]
    train_gpt2.main([*map(str, flags)])
    expected = read_log(tmp_path / "out" / "log.txt")["train"]
    for name in ("model.safetensors", "training_state.pt"):
        path = tmp_path / "out" / "checkpoints" / "step_000020" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        if name == "model.safetensors":
            code, _, errors = main(sample, ["--model", path.parent, "--prompt", "a", "--device", "cpu"])
            assert code == 2 and "model.safetensors differs" in errors
        capsys.readouterr()
        train_gpt2.main([*map(str, flags), "--resume"])
        captured = capsys.readouterr()
        assert f"warning: {path.parent} is damaged: {name} differs" in captured.err and "at step 10" in captured.out
        assert "step_000020.damaged" in finished_steps(tmp_path / "out")
        assert read_log(tmp_path / "out" / "log.txt")["train"] == expected
    (path.parent / "SHA256SUMS").unlink()  # a checkpoint of an earlier version
    train_gpt2.main([*map(str, flags), "--resume"])
    assert "at step 20" in capsys.readouterr().out


# --- srun -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tasks_of_srun_join_one_run(start, tmp_path):
    """The same losses as one process has, in one log."""
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "3"}
    tasks = [
        start("--max_steps", 5, environment=slurm | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for i in range(2)
    ]  # fmt: skip
    outputs = [task.communicate(timeout=100)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert "2 processes" in outputs[0] and outputs[1] == ""
    one = start("--max_steps", 5, out="one", stdout=subprocess.PIPE)
    one.communicate(timeout=60)
    losses = [read_log(tmp_path / out / "log.txt")["train"][1] for out in ("out", "one")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_tasks_of_srun_on_several_machines_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(train_gpt2.UserError, match="torchrun"):
        join_slurm()
    monkeypatch.setenv("RANK", "3")  # torchrun under srun
    join_slurm()


@pytest.mark.parametrize(
    "visible, allocated, local_rank, index, is_error",
    [(2, 2, 1, 1, False), (1, 2, 1, 0, False), (1, 0, 0, 0, True), (1, 1, 1, 0, True), (8, 8, 5, 5, False)],
)
def test_srun_with_a_gpu_per_task(monkeypatch, visible, allocated, local_rank, index, is_error):
    """With --gpus-per-task=1 each process sees one GPU as number 0, though it is the second process."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    world_size = max(2, local_rank + 1)
    values = {"LOCAL_RANK": local_rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    for name, value in (values | {"SLURM_GPUS_ON_NODE": allocated}).items():
        monkeypatch.setenv(name, str(value))
    assert distributed.local_gpu() == index
    assert bool(distributed.machine_errors("cuda", "float32", False)) == is_error
