"""The code that runs on a GPU, checked on a machine without one: fake_gpu.py and fake_cuda.cpp."""

import importlib.util
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


def run_on_fake_gpu(fake_cuda, *command, paths=()):
    """Run a Python script that finds a GPU, and return its lines of output as {name: result}."""
    path = os.pathsep.join(map(str, [ROOT, *paths]))
    environment = os.environ | {"LD_PRELOAD": str(fake_cuda), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
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


TRITON = "triton==3.7.1"  # the version that torch 2.13 uses on a GPU


@pytest.mark.slow
def test_compiled_memory_on_a_fake_gpu(fake_cuda, tmp_path):
    """Only one chunk's logits exist at once. Compiled, the loss of 65,536 tokens takes less than 3 GB, and a pass of
    the 124M at B=64 less than 26 GB beside the weights. With the logits of all chunks they took 7.2 and 29.4 GB.
    """
    paths = [ROOT / "benchmarks"]
    if not importlib.util.find_spec("triton"):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", TRITON]
        if subprocess.run([*map(str, pip)], capture_output=True).returncode:
            pytest.skip(f"{TRITON} cannot be installed")
        paths.append(tmp_path / "site")
    try:
        gigabytes = run_on_fake_gpu(fake_cuda, Path(__file__).with_name("fake_inductor.py"), paths=paths)
    except AssertionError as error:
        if torch.__version__.startswith("2.13."):
            raise
        pytest.skip(f"private functions of torch or triton have changed since torch 2.13: {str(error)[-500:]}")
    assert 0.9 < float(gigabytes["loss"]) < 3 and 20 < float(gigabytes["model"]) < 26
