"""fineweb.py when it is killed, on a full disk, on a bad network and on several nodes; published shards; --verify."""

import errno
import hashlib
import http.server
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import write_bin

import fineweb
from fineweb import find_shards, list_shards, open_shard, prepare, read_manifest, verify_shards
from support import common
from support.common import UserError

ROOT = Path(fineweb.__file__).parent
SHARD_TOKENS = 60_000


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """13,000 documents, 6 MB without repetition: .jsonl, .txt, and parquet with small and with large row groups."""
    folder, words = tmp_path_factory.mktemp("corpus"), random.Random(1337)
    texts = [" ".join(f"{words.random():.9f}" for _ in range(words.randrange(80))) for _ in range(12_999)]
    texts.insert(7000, "x" * 5 * SHARD_TOKENS)  # longer than several shards
    for i in range(3):
        table = pa.table({"id": range(2000), "text": texts[2000 * i : 2000 * (i + 1)]})
        pa.parquet.write_table(table, folder / f"{i}.parquet", row_group_size=[100, 300, 2000][i])
    (folder / "3.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[6000:12_990]))
    for i, text in enumerate(texts[12_990:]):
        (folder / f"4.{i}.txt").write_text(text)
    return folder, texts


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """{file name: bytes} of the folder after a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    prepare(str(corpus[0]), out, "bytes", shard_tokens=SHARD_TOKENS, workers=1)
    stream = b"".join(b"\0\1" + text.encode().decode("latin-1").encode("utf-16-le") for text in corpus[1])
    shards = [path.read_bytes()[128:] for path in sorted(list_shards(out), key=lambda path: path.name[-10:])]
    assert b"".join(shards) == stream and len(shards) > 99
    return folder_bytes(out)


def flags(corpus, out):
    return ["--source", corpus[0], "--encoding", "bytes", "--shard_tokens", SHARD_TOKENS, "--out_dir", out]


@pytest.fixture
def finished(tmp_path):
    """A finished folder in the byte encoding, with shards of 1,000 tokens."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(400)))
    prepare(str(tmp_path / "in.jsonl"), tmp_path / "data", "bytes", shard_tokens=1000, workers=1)
    return tmp_path / "data"


# --- killed and started again -----------------------------------------------------------------------------------------


def kill_and_restart(corpus, out, kills, chance, longest):
    """Kill runs with SIGKILL, each at a random moment, until one finishes. Return the number of kills."""
    for killed in range(kills):
        command = [sys.executable, ROOT / "fineweb.py", *flags(corpus, out), "--workers", chance.choice("123")]
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        written = len(list_shards(out)) if killed % 5 else -1  # a fifth of them are killed while they start
        try:
            deadline = time.time() + 60
            while len(list_shards(out)) <= written and process.poll() is None and time.time() < deadline:
                time.sleep(0.001)
            process.wait(timeout=chance.uniform(0, longest))
            assert process.returncode == 0, process.stderr.read()
            return killed
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        finally:
            process.stdout.close(), process.stderr.close()
        begun = (out / "manifest.json").exists()
        if begun and read_manifest(out)["finished"]:  # it was about to end
            return killed + 1
        with pytest.raises(UserError, match="is unfinished" if begun else "no train shards"):
            find_shards(out, "train")
    return kills


@pytest.mark.parametrize("kills, longest", [(3, 0.1), pytest.param(60, 0.02, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_continues_to_the_same_bytes(corpus, undisturbed, tmp_path, kills, longest):
    """Guards the restart: at any moment and for any --workers, nothing is lost and nothing is written twice."""
    assert kill_and_restart(corpus, tmp_path / "out", kills, random.Random(kills), longest) > kills // 4
    prepare(str(corpus[0]), tmp_path / "out", "bytes", shard_tokens=SHARD_TOKENS, workers=2)
    assert folder_bytes(tmp_path / "out") == undisturbed


def exit_code_of_a_crash(crash, moment, settings):
    """Run `prepare` in a process that dies before or after rename number `crash`. Return 8 if it has fewer renames."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    rename, left = os.replace, iter(range(crash, -1, -1))

    def replace(*paths):
        is_last = next(left) == 0
        if moment == "after" or not is_last:
            rename(*paths)
        if is_last:
            os._exit(9)

    os.replace = replace
    try:
        prepare(**settings)
    finally:
        os._exit(8)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("lost", [None, "edufineweb_train_000003.npy"])
def test_a_crash_at_each_rename_is_fixed(finished, tmp_path, moment, lost):
    """Guards the order in which shard and manifest are written: a run can continue from every state of the folder."""
    undisturbed = folder_bytes(finished)
    settings = {"source": str(finished.parent / "in.jsonl"), "encoding": "bytes", "shard_tokens": 1000, "workers": 1}
    for crash in itertools.count():
        out = tmp_path / str(crash)
        if lost:
            shutil.copytree(finished, out)
            (out / lost).unlink()
        code = exit_code_of_a_crash(crash, moment, settings | {"out_dir": out})
        if code == 8:
            break
        if not (out.exists() and read_manifest(out)["finished"] and moment == "after"):
            with pytest.raises(UserError, match="is unfinished|no train shards|is missing"):
                find_shards(out, "train")
        prepare(out_dir=out, **settings)
        assert folder_bytes(out) == undisturbed
    assert crash == 2 + 2 * (3 if lost else 6)  # the first manifest and the last one, and two files for each shard


def test_from_every_shard_on_the_rest_is_the_same(corpus, undisturbed, tmp_path):
    """Guards the end position of each shard: in a row group, in the long document, in a list."""
    names = list(json.loads(undisturbed["manifest.json"])["shards"])
    for kept in (1, 29, 58, len(names) - 1):
        out = tmp_path / str(kept)
        out.mkdir()
        for name in names[:kept]:
            (out / name).write_bytes(undisturbed[name])
        # The manifest is that of the finished run: the other shards were deleted.
        (out / "manifest.json").write_bytes(undisturbed["manifest.json"])
        prepare(str(corpus[0]), out, "bytes", shard_tokens=SHARD_TOKENS, workers=1)
        assert folder_bytes(out) == undisturbed
        shutil.rmtree(out)


def test_finished_work_is_not_done_again(corpus, undisturbed, tmp_path, monkeypatch, capsys):
    """Guards the hours that a restart saves: no task is tokenized again and no shard is written again."""
    out = tmp_path / "out"
    out.mkdir()
    for name, data in undisturbed.items():
        (out / name).write_bytes(data)
    last = list(read_manifest(out)["shards"])[-1]
    (out / last).unlink()
    times = {path.name: path.stat().st_mtime_ns for path in list_shards(out)}
    encoded, encode_task = [], fineweb.encode_task
    monkeypatch.setattr(fineweb, "encode_task", lambda *task: encoded.append(task) or encode_task(*task))
    prepare(str(corpus[0]), out, "bytes", shard_tokens=SHARD_TOKENS, workers=1)
    assert folder_bytes(out) == undisturbed and len(encoded) <= 2
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times
    assert capsys.readouterr().out.count("edufineweb_") == 1


def test_no_shard_is_deleted_before_another_is_written(finished, monkeypatch):
    """Guards hours of work after a lost shard, if the source is damaged or edited, or if the disk fails."""
    source, lost = finished.parent / "in.jsonl", "edufineweb_train_000002.npy"
    settings = {"out_dir": finished, "encoding": "bytes", "shard_tokens": 1000, "workers": 1}
    undisturbed, text = folder_bytes(finished), source.read_text()
    with monkeypatch.context() as patch:
        maps = np.lib.format.open_memmap

        def failing(path, **options):
            if path.name == lost:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return maps(path, **options)

        patch.setattr(np.lib.format, "open_memmap", failing)
        with pytest.raises(OSError, match=f"Input/output error: .*{lost}"):
            prepare(str(source), **settings)
    assert folder_bytes(finished) == undisturbed
    (finished / lost).unlink()
    left = {path.name: path.read_bytes() for path in list_shards(finished)}
    for change, complaint in (
        (str.upper, "no string named `text`"),
        (lambda text: text.replace("u", "v"), "the text of .* has changed since"),
    ):
        source.write_text(change(text))
        with pytest.raises(UserError, match=complaint):
            prepare(str(source), **settings)
        assert {path.name: path.read_bytes() for path in list_shards(finished)} == left
    source.write_text(text)
    prepare(str(source), **settings)
    assert folder_bytes(finished) == undisturbed


def test_a_source_that_changed_meanwhile_is_refused(tmp_path):
    """Guards against shards of two corpora in one folder, even if a change keeps every length."""
    source = tmp_path / "in.txt"
    for change, complaint in (("grown", "other settings .revision"), ("edited", "has changed since")):
        source.write_text("abcdefgh" * 100)
        prepare(str(source), tmp_path / change, "bytes", shard_tokens=100, workers=1)
        (tmp_path / change / "edufineweb_train_000005.npy").unlink()
        source.write_text("abcdefgh" * 100 + "i" if change == "grown" else "abcdefgi" * 100)
        with pytest.raises(UserError, match=f"{complaint}.*name another --out_dir"):
            prepare(str(source), tmp_path / change, "bytes", shard_tokens=100, workers=1)


def test_two_runs_cannot_write_one_folder(finished, hub, tmp_path, run_script):
    """Guards against a second run by mistake: each run would delete and rewrite the other's shards."""
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin"]
    server, environment = hub(pretokenized(names))
    commands = {
        "prepared": ["--source", finished.parent / "in.jsonl", "--encoding", "bytes", "--shard_tokens", 1000],
        "fetched": ["--pretokenized", server.repo],
    }
    for name, command in commands.items():
        (tmp_path / name).mkdir()
        with filelock.FileLock(tmp_path / name / ".manifest.lock"):
            done = run_script("fineweb.py", *command, "--out_dir", tmp_path / name, **environment)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"error: another run is writing to {tmp_path / name}: wait for it to end" in done.stderr
        assert list_shards(tmp_path / name) == []
        assert run_script("fineweb.py", *command, "--out_dir", tmp_path / name, **environment).returncode == 0
        with filelock.FileLock(tmp_path / name / ".manifest.lock"):  # a complete folder needs no lock
            done = run_script("fineweb.py", *command, "--out_dir", tmp_path / name, **environment)
        assert done.returncode == 0 and "is complete" in done.stdout


def test_a_run_that_ends_just_before_the_lock_is_free_is_continued(finished, tmp_path, monkeypatch, capsys):
    """Guards the moment between the first look into the folder and the lock: another run may finish in it."""

    class LateLock(filelock.FileLock):
        def acquire(self, *arguments, **options):
            shutil.copytree(finished, tmp_path / "out", dirs_exist_ok=True)
            return super().acquire(*arguments, **options)

    monkeypatch.setattr(common, "FileLock", LateLock)
    prepare(str(finished.parent / "in.jsonl"), tmp_path / "out", "bytes", shard_tokens=1000, workers=1)
    assert capsys.readouterr().out.endswith("out is complete: 5,090 tokens in 6 shards\n")


def children_of(process):
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_a_killed_run_leaves_no_workers(corpus, tmp_path):
    """Guards memory and cores: processes outlive their parent unless they watch it."""
    command = [sys.executable, ROOT / "fineweb.py", *flags(corpus, tmp_path / "out"), "--workers", "2"]
    with (
        open(tmp_path / "stderr", "w") as stderr,
        subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=stderr) as process,
    ):
        process.stdout.readline()
        children = children_of(process)
        process.kill()
    assert len(children) == 2
    deadline = time.time() + 20
    while any(Path(f"/proc/{child}").exists() for child in children) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert (tmp_path / "stderr").read_text() == ""


@pytest.mark.parametrize("moment", ["at work", "in the middle of a result"])
def test_a_worker_that_dies_stops_the_run_with_a_line(corpus, tmp_path, moment):
    """Guards against a traceback or an endless wait if the system kills a worker to free memory."""
    source = tmp_path / "in.jsonl"  # results of 2 MB, more than a pipe holds, and more tasks than are open at a time
    source.write_bytes((corpus[0] / "3.jsonl").read_bytes() * 5)
    command = [sys.executable, ROOT / "fineweb.py", *flags([source], tmp_path / "out"), "--workers", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*map(str, command)], **pipes) as process:
        try:
            process.stdout.readline()
            if moment == "at work":
                os.kill(children_of(process)[0], signal.SIGKILL)
            else:
                process.send_signal(signal.SIGSTOP)  # now nobody reads what the workers send
                time.sleep(1)
                for child in children_of(process):
                    os.kill(child, signal.SIGKILL)
                process.send_signal(signal.SIGCONT)
            out, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 2 and error.count("\n") == 1
    assert error.startswith("error: a worker process died") and "fewer --workers" in error


def test_workers_that_cannot_be_started_stop_the_run_with_a_line(corpus, tmp_path):
    """Guards against a traceback or an endless wait if the system does not open any more files."""
    command = [sys.executable, ROOT / "fineweb.py", *flags(corpus, tmp_path / "out"), "--workers", "40"]
    resource = pytest.importorskip("resource", reason="Windows has no such limits")

    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

    done = subprocess.run([*map(str, command)], capture_output=True, text=True, preexec_fn=limit, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "a worker process cannot be started (Too many open files): give fewer --workers" in done.stderr


def test_ctrl_c_says_how_to_continue(corpus, undisturbed, tmp_path, run_script):
    """Guards the terminal against a traceback from each process."""
    command = [sys.executable, ROOT / "fineweb.py", *flags(corpus, tmp_path / "out"), "--workers", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([*map(str, command)], **pipes) as process:
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == "interrupted: run the same command again to continue\n"
    assert run_script("fineweb.py", *flags(corpus, tmp_path / "out")).returncode == 0
    assert folder_bytes(tmp_path / "out") == undisturbed


def test_a_full_disk_stops_with_a_line_and_space_fixes_it(corpus, undisturbed, tmp_path, run_script):
    """Tests a real, small file system: finished shards stay, and nothing incomplete does."""
    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path / "disk"], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a file system here")
    try:
        out = tmp_path / "disk" / "out"
        done = run_script("fineweb.py", *flags(corpus, out), "--workers", 1)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert re.match(
            r"error: \S+ cannot be written \(No space left on device\): make room or check --out_dir, and run .* again",
            done.stderr,
        )
        left = folder_bytes(out)
        assert 10 < len(left) < 30 and left.pop("manifest.json") and left.items() <= undisturbed.items()
        subprocess.run(["mount", "-o", "remount,size=99m", tmp_path / "disk"], check=True)
        done = run_script("fineweb.py", *flags(corpus, out), "--workers", 1)
        assert done.returncode == 0 and not any(name in done.stdout for name in left)
        assert folder_bytes(out) == undisturbed
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


# --- the Hub ----------------------------------------------------------------------------------------------------------


class Hub(http.server.ThreadingHTTPServer):
    """A server of the Hub's URLs for one dataset, `files` by name. Each data request takes one of the `faults`."""

    repo, sha = "some-org/some-data", "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files, self.faults, self.requests, self.hashes = files, [], [], {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def file_info(self, name):
        data = self.files[name]
        sha256 = self.hashes.get(name, hashlib.sha256(data).hexdigest())
        lfs = {"oid": sha256, "sha256": sha256, "size": len(data), "pointerSize": 134}
        return {"type": "file", "path": name, "rfilename": name, "size": len(data), "oid": sha256[:40], "lfs": lfs}


class HubHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        paths = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        self.reply(200, json.dumps([self.server.file_info(p) for p in paths if p in self.server.files]).encode())

    def do_GET(self):
        hub = self.server
        path = self.path.split("?")[0]
        if path.startswith(f"/datasets/{hub.repo}/resolve/{hub.sha}/"):
            return self.send_file(path.split(hub.sha + "/")[1])
        if path in (f"/api/datasets/{hub.repo}", f"/api/datasets/{hub.repo}/revision/{hub.sha}"):
            siblings = [hub.file_info(name) for name in sorted(hub.files)]
            return self.reply(200, json.dumps({"id": hub.repo, "sha": hub.sha, "siblings": siblings}).encode())
        if path.startswith(f"/api/datasets/{hub.repo}/tree/{hub.sha}"):
            return self.reply(200, json.dumps([hub.file_info(name) for name in sorted(hub.files)]).encode())
        self.reply(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def send_file(self, name):
        data = self.server.files.get(name)
        if data is None:
            return self.reply(404, X_Error_Code="EntryNotFound")
        headers = {"ETag": f'"{self.server.file_info(name)["oid"]}"', "X_Repo_Commit": self.server.sha}
        if self.command == "HEAD":
            return self.reply(200, data, **headers)
        self.server.requests.append(name)
        fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, int):
            return self.reply(fault)
        start, end = 0, len(data)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
            start, end = int(match[1]), min(end, int(match[2] or end) + 1)
            headers["Content_Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        if fault == "drop":
            self.send_response(206 if "Content_Range" in headers else 200)
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            self.wfile.write(data[start : (start + end) // 2])
            self.close_connection = True
            return None
        return self.reply(206 if "Content_Range" in headers else 200, data[start:end], **headers)


@pytest.fixture
def hub(tmp_path):
    """hub(files) -> a running Hub, and the environment variables with which a script finds it."""
    servers = []

    def start(files):
        servers.append(Hub(files))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1], {"HF_ENDPOINT": servers[-1].url, "HF_HOME": str(tmp_path / "hf_home")}

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_hub_dataset_is_streamed_through_a_bad_network(hub, corpus, undisturbed, tmp_path, run_script):
    """Guards the default source: retries, the pinned revision, workers that read; the disk keeps nothing."""
    texts = corpus[1][:6000]
    server, environment = hub({path.name: path.read_bytes() for path in corpus[0].glob("*.parquet")})
    server.faults = [None, None, 500, None, "drop"]
    out = tmp_path / "out"
    command = ["--source", server.repo, *flags(corpus, out)[2:], "--workers", 2]
    done = run_script("fineweb.py", *command, **environment)
    assert done.returncode == 0 and server.faults == [], done.stderr
    assert "Error 500" in done.stderr and read_manifest(out)["revision"] == server.sha
    prepare(str(corpus[0] / "*.parquet"), tmp_path / "local", "bytes", shard_tokens=SHARD_TOKENS, workers=1)
    streamed, local = folder_bytes(out), folder_bytes(tmp_path / "local")
    assert read_manifest(out)["documents"] == len(texts) and streamed.pop("manifest.json") != local.pop("manifest.json")
    assert streamed == local
    assert sum(path.stat().st_size for path in Path(environment["HF_HOME"]).rglob("*") if path.is_file()) < 10_000

    (out / list(read_manifest(out)["shards"])[-1]).unlink()
    server.requests.clear()
    assert run_script("fineweb.py", *command, **environment).returncode == 0
    assert folder_bytes(out).items() >= streamed.items()
    assert all(server.requests.count(name) <= 2 for name in ("0.parquet", "1.parquet"))  # to find their row groups


def pretokenized(names):
    """Return {file name: bytes} of .bin shards of 3,000 tokens, as llm.c and modded-nanogpt publish them."""
    files, chance = {"README.md": b"shards"}, np.random.RandomState(1337)
    for name in names:
        header, tokens = np.zeros(256, dtype="<i4"), chance.randint(50257, size=3000).astype("<u2")
        header[:3], tokens[0] = (20240520, 1, tokens.size), 50256
        files[name] = header.tobytes() + tokens.tobytes()
    return files


@pytest.mark.parametrize(
    "pattern, first", [("edu_fineweb_{}_{:06d}.bin", 0), ("fineweb_{}_{:06d}.bin", 1)], ids=["llm.c", "modded-nanogpt"]
)
def test_published_shards_are_fetched(hub, tmp_path, run_script, pattern, first):
    """Guards both naming schemes, --max_tokens, the restart of a download, and reading its result."""
    names = [pattern.format("val", 0), *(pattern.format("train", i) for i in range(first, first + 5))]
    server, environment = hub(pretokenized(names))
    out = tmp_path / "out"
    command = ["--pretokenized", server.repo, "--out_dir", out, "--max_tokens", 8000]
    server.faults = [None, None, 404]  # one for each of the three
    done = run_script("fineweb.py", *command, **environment)
    assert done.returncode == 2 and "run the same command again" in done.stderr
    command_line = f"python fineweb.py --pretokenized {server.repo} --out_dir"
    with pytest.raises(UserError, match=f"is unfinished: run `{command_line}"):
        find_shards(out, "train")
    server.requests.clear()
    done = run_script("fineweb.py", *command, **environment)
    assert done.returncode == 0 and len(server.requests) == 1, done.stderr
    assert [path.name for path in find_shards(out, "val")] == names[:1]
    assert [path.name for path in find_shards(out, "train")] == names[1:3]
    assert {name: (out / name).read_bytes() for name in names[:3]}.items() <= server.files.items()
    manifest = read_manifest(out)
    assert (manifest["revision"], manifest["tokens"], manifest["encoding"]) == (server.sha, 9000, "gpt2")
    verify_shards(out)
    done = run_script("fineweb.py", *command, HF_ENDPOINT="http://127.0.0.1:9")  # needs no network now
    assert "is complete: 9,000 tokens in 3 shards" in done.stdout


@pytest.mark.parametrize("damage", ["header", "length", "hash", "no shards"])
def test_a_damaged_published_shard_is_refused(hub, tmp_path, run_script, damage):
    """Guards against a download that is complete but has wrong contents."""
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin"]
    server, environment = hub({"data.csv": b"text"} if damage == "no shards" else pretokenized(names))
    data = server.files.get(names[1])
    if damage == "header":
        server.files[names[1]] = b"\1" + data[1:]
    elif damage == "length":
        server.files[names[1]] = data[:-2]
    server.hashes = {names[1]: "0" * 64} if damage == "hash" else {}
    done = run_script("fineweb.py", "--pretokenized", server.repo, "--out_dir", tmp_path / "out", **environment)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    assert ("has no shards" if damage == "no shards" else names[1]) in done.stderr
    if damage != "no shards":
        with pytest.raises(UserError, match="is unfinished"):
            find_shards(tmp_path / "out", "train")


@pytest.mark.slow
def test_a_hub_dataset_of_lines_is_streamed(hub, corpus, tmp_path, run_script):
    """Guards the Hub's formats without row groups: the main process reads them, and a restart skips what is done."""
    server, environment = hub({"data.jsonl": (corpus[0] / "3.jsonl").read_bytes()})
    command = ["--source", server.repo, *flags(corpus, tmp_path / "out")[2:], "--workers", 2]
    assert run_script("fineweb.py", *command, **environment).returncode == 0
    prepare(str(corpus[0] / "3.jsonl"), tmp_path / "local", "bytes", shard_tokens=SHARD_TOKENS, workers=1)
    local = folder_bytes(tmp_path / "local")
    del local["manifest.json"]
    local = local.items()
    assert local <= folder_bytes(tmp_path / "out").items()
    (tmp_path / "out" / "edufineweb_train_000020.npy").unlink()
    assert run_script("fineweb.py", *command, **environment).returncode == 0
    assert local <= folder_bytes(tmp_path / "out").items()


@pytest.mark.slow
def test_a_dead_server_stops_the_run_and_a_working_one_lets_it_continue(hub, corpus, tmp_path, run_script):
    """Guards the end of the retries: a clear line within a minute, and no short shard that looks like the last."""
    server, environment = hub({path.name: path.read_bytes() for path in corpus[0].glob("*.parquet")})
    server.faults = [None] * 30 + [503] * 500
    command = ["--source", server.repo, *flags(corpus, tmp_path / "out")[2:], "--workers", 1]
    start = time.time()
    done = run_script("fineweb.py", *command, **environment)
    assert done.returncode == 2 and time.time() - start < 90
    assert "run the same command again to continue" in done.stderr.splitlines()[-1]
    assert {open_shard(path).size for path in list_shards(tmp_path / "out")} == {SHARD_TOKENS}
    with pytest.raises(UserError, match="is unfinished"):
        find_shards(tmp_path / "out", "train")
    server.faults = []
    assert run_script("fineweb.py", *command, **environment).returncode == 0
    prepare(str(corpus[0] / "*.parquet"), tmp_path / "local", "bytes", shard_tokens=SHARD_TOKENS, workers=1)
    streamed, local = folder_bytes(tmp_path / "out"), folder_bytes(tmp_path / "local")
    assert streamed.pop("manifest.json") != local.pop("manifest.json") and streamed == local


# --- several nodes ----------------------------------------------------------------------------------------------------


def documents_of(paths):
    stream = np.concatenate([open_shard(path) for path in paths])
    return [bytes(document[1:].tolist()).decode() for document in np.split(stream, np.flatnonzero(stream == 256)[1:])]


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_two_nodes_make_one_corpus(corpus, tmp_path, launcher):
    """Guards two runs at once into one folder: each document once, in a fixed order, one validation shard."""
    out = tmp_path / "out"
    rank, world_size = ("RANK", "WORLD_SIZE") if launcher == "torchrun" else ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    command = [sys.executable, ROOT / "fineweb.py", *flags(corpus, out), "--workers", "1"]
    runs = []
    for node in range(2):
        environment = {**os.environ, rank: str(node), world_size: "2"}
        runs.append(subprocess.Popen([*map(str, command)], env=environment, stdout=subprocess.PIPE))
    assert [run.wait(60) for run in runs] == [0, 0]
    for run in runs:
        run.stdout.close()
    val, train = find_shards(out, "val"), find_shards(out, "train")
    assert [path.name for path in val] == ["edufineweb_val_node000_000000.npy"]
    by_node = [[path for path in train if f"_node{node:03d}_" in path.name] for node in range(2)]
    assert by_node[0] + by_node[1] == train and 30 < len(by_node[0]) < 70
    found = documents_of(val + by_node[0]) + documents_of(by_node[1])
    assert sorted(found) == sorted(corpus[1]) and read_manifest(out)["documents"] == len(found)
    verify_shards(out)
    for path, complaint in (
        (by_node[1][3], "is missing: run `.*`$"),
        (out / "manifest_node001.json", "is unfinished: run `.*` on each of its 2 nodes$"),
    ):
        path.unlink()
        with pytest.raises(UserError, match=complaint):
            find_shards(out, "train")


def test_nodes_of_different_runs_are_refused(finished, tmp_path):
    """Guards the merged corpus against parts that do not belong together."""
    source = str(finished.parent / "in.jsonl")
    for node in range(2):
        prepare(source, tmp_path / "a", "bytes", shard_tokens=1000, workers=1, node=node, nodes=2)
    prepare(source, tmp_path / "b", "bytes", shard_tokens=900, workers=1, node=1, nodes=2)
    assert len(find_shards(tmp_path / "a", "train")) >= 1
    with pytest.raises(UserError, match="shards of other settings .nodes 2"):
        prepare(source, tmp_path / "a", "bytes", shard_tokens=1000, workers=1, node=2, nodes=3)
    shutil.copy(tmp_path / "b" / "manifest_node001.json", tmp_path / "a")
    with pytest.raises(UserError, match="manifest_node001.json and manifest_node000.json are from different runs"):
        find_shards(tmp_path / "a", "train")


def test_another_number_of_nodes_is_refused_from_the_start(finished, tmp_path):
    """Guards hours of work that could not be read, even if no earlier run has written a first shard."""
    source, settings = str(finished.parent / "in.jsonl"), {"encoding": "bytes", "shard_tokens": 1000, "workers": 1}
    for was, now in ((2, 1), (1, 2), (2, 3)):
        out = tmp_path / f"{was}{now}"
        out.mkdir()
        prepare(source, tmp_path / f"of {was}", nodes=was, **settings)
        path = fineweb.manifest_path(tmp_path / f"of {was}", 0, was)
        begun = json.loads(path.read_text()) | {"shards": {}, "finished": False}
        (out / path.name).write_text(json.dumps(begun))
        for node in range(was == now - 1 == 2, now):
            with pytest.raises(UserError, match=f"{out} holds manifests of other settings .nodes {was}"):
                prepare(source, out, nodes=now, node=node, **settings)
        assert [child.name for child in out.iterdir()] == [path.name]
        shutil.rmtree(tmp_path / f"of {was}")


def test_max_tokens_is_the_sum_of_all_nodes(corpus, tmp_path):
    """Guards against applying --max_tokens to each node separately."""
    for node in range(3):
        prepare(str(corpus[0]), tmp_path, "bytes", 10_000, max_tokens=200_000, workers=1, node=node, nodes=3)
    assert read_manifest(tmp_path)["tokens"] == 200_000 and read_manifest(tmp_path)["finished"]


# --- verifying --------------------------------------------------------------------------------------------------------


def test_verify_summarizes_a_good_folder(finished, run_script):
    """Guards the numbers, which can be computed by hand here."""
    done = run_script("fineweb.py", "--verify", finished)
    tokens = sum(1 + len(f"document {i}") for i in range(400))
    assert (done.returncode, done.stderr) == (0, "")
    for part in (f"{tokens:,} tokens (bytes), 400 documents", "6 (1 val, 5 train)", f"{tokens / 400:,.1f}",
                 f"{400 / tokens:.3%}", "no errors found"):  # fmt: skip
        assert part in done.stdout


@pytest.mark.parametrize(
    "damage, finding",
    {
        "missing": "edufineweb_train_000002.npy is missing",
        "unlisted": "edufineweb_train_000099.npy is not in the manifest",
        "a bit": "edufineweb_train_000002.npy has sha256 ",
        "short": "edufineweb_train_000002.npy is damaged",
        "fewer tokens": "edufineweb_train_000002.npy has tokens 999, but the manifest says 1000",
        "not a shard": "edufineweb_train_000002.npy is damaged",
        "unfinished": "is unfinished",
        "range": "edufineweb_train_000002.npy holds token id 257, but the vocabulary has 257 ids",
        "boundary": "edufineweb_val_000000.npy is the first of a stream, but begins with token id 100",
    }.items(),
)  # fmt: skip
def test_verify_names_each_error(finished, damage, finding, capsys):
    """Guards against a check that always passes."""
    manifest, path = read_manifest(finished), finished / "edufineweb_train_000002.npy"
    data, tokens = bytearray(path.read_bytes()), open_shard(path).copy()
    if damage == "missing":
        path.unlink()
    elif damage == "unlisted":
        (finished / "edufineweb_train_000099.npy").write_bytes(data)
    elif damage == "unfinished":
        (finished / "manifest.json").write_text(json.dumps(manifest | {"finished": False}))
    elif damage == "boundary":
        np.save(finished / "edufineweb_val_000000.npy", np.full(1000, 100, dtype=np.uint16))
    elif damage in ("fewer tokens", "range"):
        np.save(path, tokens[:-1] if damage == "fewer tokens" else np.where(tokens == 256, np.uint16(257), tokens))
    else:
        data[-2] ^= 1  # in the last token
        path.write_bytes({"a bit": data, "short": data[:-10], "not a shard": b"text"}[damage])
    with pytest.raises(UserError, match="has errors .*delete what is damaged and run `python fineweb.py --source"):
        verify_shards(finished)
    assert finding in capsys.readouterr().out


def test_verify_reads_a_folder_without_a_manifest(make_shards, tmp_path, capsys):
    """Guards build-nanogpt's own folders: without hashes, --verify still checks token ids and boundaries."""
    make_shards(tmp_path / "good", {"val": [[50256, 1, 2]], "train": [[3, 50256, 4]]})
    verify_shards(tmp_path / "good")
    assert "6 tokens (gpt2), 2 documents" in capsys.readouterr().out
    for name in ("good_train.bin", "good_train_000000.bin", "good_val_000001.bin"):  # each continues another shard
        write_bin(tmp_path / "good" / name, np.arange(3))
    verify_shards(tmp_path / "good")
    make_shards(tmp_path / "bad", {"val": [[1, 2, 3]], "train": [[50257]]})
    with pytest.raises(UserError, match="has errors .2."):
        verify_shards(tmp_path / "bad")
    with pytest.raises(UserError, match="no shards in .*: check --verify"):
        verify_shards(tmp_path)
