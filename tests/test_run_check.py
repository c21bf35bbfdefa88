"""The check of a run against healthy ones: on a public run, on runs with planted faults, and on the real program."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from support import runlog
from support.runlog import CHECKED, Expected, check_run, comparison, draw_curve, due_checks, expected_values

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
GPT2_DATA = {"encoding": "gpt2", "source": "HuggingFaceFW/fineweb-edu"}


@pytest.fixture(scope="module")
def public_log(shared_data):
    """The public run as build-nanogpt logs it: {stream: {step: value}}. Each step has the mean loss of its 250."""
    with open(shared_data / "reference_runs" / "recipe_fineweb_edu_124m.csv", newline="") as file:
        rows = [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    log = {stream: {int(row["step"]): row[stream] for row in rows} for stream in ("val", "hella")}
    means = {int(row["step"]): row["train_mean_of_the_250_before"] for row in rows}
    return log | {
        "train": {
            i: means[step] for step in means if step and step in range(250, 19001, 250) for i in range(step - 250, step)
        }
    }


def as_text(log):
    return "".join(f"{step} {stream} {value:.4f}\n" for stream, values in log.items() for step, value in values.items())


def check(path, text, *flags):
    """Run the command on a log. Return its exit code, its lines and its errors."""
    path.write_text(text)
    command = [sys.executable, "-m", "support.runlog", path, *flags]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_a_public_run_is_as_expected(public_log, tmp_path):
    """A log of build-nanogpt's form passes, and the lines name the values and the reference."""
    code, lines, errors = check(tmp_path / "log.txt", as_text(public_log))
    assert (code, errors, lines[-1]) == (
        0,
        "",
        "compared with healthy runs: as expected at all 78 steps, up to 19072",
    )
    assert lines[4] == (
        "check  1000 | val 4.1123 (reference 4.1123) | hella 0.2546 (reference 0.2546) | "
        "train 4.3202 (reference 4.3202) | as expected"
    )
    assert len(lines) == len(public_log["val"]) + 1


@pytest.mark.parametrize("first", [0, 1000, 19000])
def test_a_run_that_ends_too_high_is_found(public_log, tmp_path, first):
    """0.18 nats above the reference from some step on: found there, and the exit code is 1."""
    log = public_log | {"val": {step: value + 0.18 * (step >= first) for step, value in public_log["val"].items()}}
    code, lines, _ = check(tmp_path / "log.txt", as_text(log))
    wrong = [line for line in lines if "not as expected, see docs/troubleshooting.md#is-my-run-right" in line]
    late = [step for step in log["val"] if step >= max(first, 1250)]  # before, losses fall too fast for 0.18
    assert code == 1 and len(wrong) >= len(late) and "0.18 above the reference" in wrong[-1]
    assert all(int(line.split()[1]) >= first for line in wrong) and f"of {len(lines) - 1} steps" in lines[-1]


def test_gradients_that_are_not_synchronized_are_found(tmp_path):
    """The figures of build-nanogpt's pull request 30."""
    for step, value in ((250, 6.43), (1000, 4.8797)):
        code, lines, _ = check(tmp_path / "log.txt", f"{step} val {value}\n")
        assert code == 1 and f"val {value:.5g} (" in lines[0]


def test_logs_that_cannot_be_compared_are_user_errors(tmp_path):
    code, _, errors = check(tmp_path / "log.txt", "3 val 4.0\n")
    assert code == 2 and errors.startswith("error: ") and "--recipe gpt2" in errors
    command = [sys.executable, "-m", "support.runlog", tmp_path / "missing.txt"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "give the log.txt of a run" in done.stderr


def test_nan_is_not_as_expected_and_skipped_updates_do_not_count():
    """A skipped update has a loss that is not finite. In float16 the first ones are skipped, which is normal."""
    point = next(p for p in expected_values("gpt2") if p.stream == "train")
    losses = [point.value] * point.window
    log = {"train": (list(range(point.window)), [float("nan"), *losses[1:]])}
    assert not check_run(log, "gpt2")[point.step][0]
    assert check_run(log | {"skipped": ([0], [1])}, "gpt2")[point.step][0]
    skipped_after = {"val": ([250], [99.0]), "skipped": ([250], [1])}  # the evaluation comes before the update
    assert not check_run(skipped_after, "gpt2")[250][0]
    assert point.step not in check_run({"train": (list(range(1, point.window)), losses[1:])}, "gpt2")


def test_an_evaluation_reports_what_failed_since_the_last_one():
    points = [p for p in expected_values("gpt2") if p.stream == "val"]
    log = {"val": ([p.step for p in points], [p.value + (1 if p.step == 750 else 0) for p in points])}
    assert [line.split()[1] for line in due_checks(log, "gpt2", 500, 1000)] == ["750", "1000"]
    assert [line.split()[1] for line in due_checks(log, "gpt2", 1000, 1250)] == ["1250"]
    assert not due_checks(log, None, 500, 1000) and not due_checks(log, "gpt2-fast", 500, 1000)


def test_a_check_that_fails_does_not_end_a_run(monkeypatch, tmp_path, capsys):
    """For example because references.csv is missing: the run is worth more than its check."""
    monkeypatch.setattr(runlog, "__file__", str(tmp_path / "runlog.py"))
    log = runlog.Log(tmp_path, GPT2_DATA, "gpt2")
    log.write(0, val=10.9)
    log.report(0)
    log.finish()
    clock = runlog.Clock(1)
    assert "references.csv" in capsys.readouterr().err
    assert "compared" not in runlog.summary(log, 1, clock, torch.device("cpu"))


@pytest.mark.parametrize(
    "preset, manifest, val_tokens, expected",
    [
        ("gpt2", GPT2_DATA, 1_000_000, True),
        ("gpt2", GPT2_DATA | {"source": "HuggingFaceFW/fineweb-edu:sample-10BT"}, 10**7, True),
        ("gpt2", GPT2_DATA, 999_999, False),
        ("gpt2", GPT2_DATA | {"source": "HuggingFaceFW/fineweb-edu-score-2"}, 10**7, False),
        ("gpt2", {"encoding": "gpt2", "source": None}, 10**7, False),
        ("gpt2", GPT2_DATA | {"encoding": "bytes"}, 10**7, False),
        ("gpt2-fast", GPT2_DATA, 10**7, False),
        ("demo", {"encoding": "bytes", "source": "stdlib"}, 249_984, True),
        ("demo", {"encoding": "bytes", "source": "my/stdlib"}, 249_984, False),
    ],
)
def test_only_the_same_data_is_compared(preset, manifest, val_tokens, expected):
    assert runlog.has_reference(preset, manifest, val_tokens) is expected


def test_the_curve_shows_the_healthy_run_up_to_the_last_step():
    log = {"": {"val": ([0, 500], [10.9, 5.2]), "hella": ([0, 500], [0.25, 0.25])}}
    labels = [[line.get_label() for line in axes.lines] for axes in draw_curve(log, GPT2_DATA, "gpt2").axes]
    assert all("healthy run" in panel for panel in labels)
    healthy = next(
        line for line in draw_curve(log, GPT2_DATA, "gpt2").axes[0].lines if line.get_label() == "healthy run"
    )
    assert list(healthy.get_xdata()) == [0, 250, 500] and healthy.get_ydata()[1] == pytest.approx(6.1495)
    assert all("healthy run" not in (line.get_label()) for line in draw_curve(log, GPT2_DATA).axes[0].lines)


def failures_of(points):
    """Return the first steps at which the stored points of a run are not as expected. points: {stream: values}."""
    from run_check import POINTS

    expected = {p[:3]: p for p in expected_values("demo")}
    pairs = [(expected[stream, *at], value) for stream in POINTS for at, value in zip(POINTS[stream], points[stream])]
    return sorted({point.step for point, value in pairs if value is not None and not comparison(point, value)[0]})


def test_planted_faults_are_found_and_healthy_runs_pass():
    """The stored runs of benchmarks/run_check.py: no false alarm, and at least nine of the faults are found."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "run_check.json").read_text())["rows"]
    healthy = [points for row in rows if row["says"].startswith("nothing") for points in row["points"]]
    assert len(healthy) >= 34 and not any(map(failures_of, healthy))
    faults = {row["run"]: failures_of(row["points"][0]) for row in rows if not row["says"].startswith("nothing")}
    assert len(faults) == 11 and sum(map(bool, faults.values())) >= 9, faults
    for row in rows:
        for end, last in (("by_100", 100), ("by_300", 300), ("by_600", 600)):
            assert row[end] == sum(any(step <= last for step in failures_of(points)) for points in row["points"])


def test_references_are_of_the_presets():
    """Each recipe has rows, with a tolerance that is above 0 and not so wide that it never fails."""
    for recipe in CHECKED:
        points = expected_values(recipe)
        assert {p.stream for p in points} >= {"val", "train", "lr"} and points == sorted(points, key=lambda p: p.step)
        assert all(0 < p.tolerance < 0.5 * abs(p.value) for p in points if p.stream != "norm")
    assert isinstance(points[0], Expected)


def run_until(folder, flags, line, tmp_path):
    """Run the demo in a copy of the program until log.txt has a line that starts so. Return what it printed."""
    command = [
        sys.executable,
        "-u",
        folder / "train_gpt2.py",
        "--preset",
        "demo",
        "--out_dir",
        tmp_path / "run",
        *flags,
    ]
    with open(tmp_path / "output.txt", "w") as output:
        process = subprocess.Popen([*map(str, command)], cwd=folder, stdout=output, stderr=output)
        log, start = tmp_path / "run" / "log.txt", time.monotonic()
        while process.poll() is None and time.monotonic() - start < 600:
            time.sleep(0.2)
            if log.exists() and any(text.startswith(line) for text in log.read_text().splitlines()):
                break
        process.send_signal(signal.SIGTERM)
        process.wait()
    return (tmp_path / "output.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, "no_mask", "accumulation"])
def test_the_program_checks_itself(fault, tmp_path):
    """The real demo prints a verdict at each evaluation: as expected, or not if a fault is planted."""
    from run_check import EXTRA_FLAGS, plant

    (tmp_path / "copy").mkdir()
    plant(fault, tmp_path / "copy")
    output = run_until(tmp_path / "copy", ["--eval_interval", 50, *EXTRA_FLAGS.get(fault, [])], "100 val", tmp_path)
    checks = [line for line in output.splitlines() if line.startswith("check ")]
    assert len(checks) >= 3, output
    assert all(line.endswith("| as expected") for line in checks) == (fault is None), output


@pytest.mark.slow
def test_another_recipe_is_not_checked(tmp_path):
    from run_check import plant

    (tmp_path / "copy").mkdir()
    plant(None, tmp_path / "copy")
    output = run_until(tmp_path / "copy", ["--lr", 0.01, "--eval_interval", 25], "25 val", tmp_path)
    assert "step    25 | val" in output and "\ncheck " not in output
