"""The code that runs on a GPU, checked on a machine without one: fake_gpu.py and fake_cuda.cpp."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT

FAULTS = {  # what fake_gpu.py plants, and a part of the error that must find it
    "targets_on_cpu": "two devices, cuda:0 and cpu",
    "positions_on_cpu": "two devices, cuda:0 and cpu",
    "weight_in_float64": "torch.float64",
    "states_in_bfloat16": "torch.bfloat16",
}


@pytest.fixture(scope="module")
def fake_cuda(tmp_path_factory):
    """The library that gives a process a fake CUDA device, if it is loaded before torch."""
    if torch.cuda._is_compiled() or torch.version.hip:
        pytest.skip("this build of torch has real CUDA functions: run pytest -m gpu on a GPU instead")
    if not (sys.platform.startswith("linux") and shutil.which("g++")):
        pytest.skip("needs g++ on Linux")
    root, library = Path(torch.__file__).parent, tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so"
    command = [
        "g++",
        "-O0",
        "-std=c++20",
        "-shared",
        "-fPIC",
        f"-I{root}/include",
        Path(__file__).with_name("fake_cuda.cpp"),
    ]
    command += ["-o", library, f"-L{root}/lib", f"-Wl,-rpath,{root}/lib", "-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def run_on_fake_gpu(fake_cuda, *command):
    """Run a Python script that finds a GPU, and return its lines of output as {name: result}."""
    environment = os.environ | {"LD_PRELOAD": str(fake_cuda), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


def test_every_path_runs_on_a_fake_gpu(fake_cuda, make_shards, tmp_path):
    """Steps, validation, generation and HellaSwag in all types: no tensor has a wrong device or type. A planted fault
    of each kind is found.
    """
    tokens = np.arange(3000) % 257
    data = make_shards(tmp_path / "data", {"val": [tokens], "train": [tokens]})
    results = run_on_fake_gpu(fake_cuda, Path(__file__).with_name("fake_gpu.py"), data)
    for fault, message in FAULTS.items():
        assert message in results.pop(fault)
    assert len(results) == 3 * 2 * 2 and set(results.values()) == {"ok"}, results
