"""hellaswag.py against a plain one-sequence-at-a-time loop, a local web server and the real command."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiktoken
import torch
import torch.nn.functional as F

import hellaswag
from hellaswag import FULL_ROWS, Counts, HellaSwagError, download, evaluate, load_rows

SCRIPT = Path(hellaswag.__file__)
ROW = {"ctx": "A man is sitting on a roof. he", "endings": ["sings.", "falls off.", "waits.", "jumps up."], "label": 3}


# --- a small random model, and the convention written the slow way ----------------------------------------------------


def random_gpt2(seed):
    """A tiny GPT-2 whose logits spread wide enough for its answers to differ."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=64, n_positions=160)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


@torch.no_grad()
def reference(model, encode, row, max_length=None):
    """Summed losses and token counts of a row's four endings, each alone, in fp32 and without any padding."""
    context, endings = encode(row["ctx"]), [encode(" " + ending) for ending in row["endings"]]
    if max_length:
        context = context[max(0, len(context) + max(map(len, endings)) - max_length) :]
    sums = []
    for ending in endings:
        tokens = torch.tensor(context + ending)
        logits = model(tokens[None]).logits[0].float()
        sums.append(F.cross_entropy(logits[:-1], tokens[1:], reduction="none")[-len(ending) :].sum().item())
    return sums, [len(ending) for ending in endings]


def tally(scored, rows):
    """Counts from the (sums, lengths) of each row."""
    correct = sum(sums.index(min(sums)) == row["label"] for (sums, _), row in zip(scored, rows, strict=True))
    means = [[a / b for a, b in zip(sums, lengths, strict=True)] for sums, lengths in scored]
    correct_norm = sum(mean.index(min(mean)) == row["label"] for mean, row in zip(means, rows, strict=True))
    return Counts(len(rows), correct, correct_norm)


def halves(model):
    """The two callables that evaluate takes."""

    def trunk(ids, position_ids, mask):
        return model.transformer(input_ids=ids, position_ids=position_ids, attention_mask=mask).last_hidden_state

    return trunk, model.lm_head


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads of work this small cost more than they save, above all where tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def encode(shared_data):
    return tiktoken.get_encoding("gpt2").encode_ordinary


@pytest.fixture(scope="module")
def rows(shared_data):
    """Forty real rows, WikiHow's long ones among them."""
    return load_rows(shared_data / "hellaswag/hellaswag_val_600.jsonl")[::15]


@pytest.fixture(scope="module")
def few(rows, truth):
    """A dozen rows and their true counts."""
    return rows[:12], tally(truth[:12], rows[:12])


@pytest.fixture(scope="module")
def model():
    return random_gpt2(seed=0)


@pytest.fixture(scope="module")
def truth(model, encode, rows):
    return [reference(model, encode, row) for row in rows]


# --- scores -----------------------------------------------------------------------------------------------------------


def test_losses_agree_with_plain_loop(model, encode, rows, truth):
    """Guards the off-by-one of the ending's first token, leaks of padding, and the order of sequences in a batch."""
    batch = hellaswag.prepare(rows, encode, 1024)
    sums, lengths = hellaswag.score(*halves(model), batch)
    expected = torch.tensor([sums for sums, _ in truth], dtype=torch.float64)
    assert lengths.tolist() == [lengths for _, lengths in truth]
    torch.testing.assert_close(sums / lengths, expected / lengths, rtol=0, atol=1e-4)
    assert torch.equal(sums.argmin(1), expected.argmin(1))
    assert torch.equal((sums / lengths).argmin(1), (expected / lengths).argmin(1))
    assert len(set(expected.argmin(1).tolist())) == 4, "the model must not always answer the same"
    assert not torch.equal(sums.argmin(1), (sums / lengths).argmin(1)), "the two accuracies must differ somewhere"


def test_counts_agree_with_plain_loop(model, encode, rows, truth):
    """Guards labels that part from their rows when the rows are sorted by length."""
    assert evaluate(*halves(model), encode, rows) == tally(truth, rows)


@pytest.mark.parametrize("batch_tokens", [1, 900, 2500, 10**6])
def test_batch_tokens_bound_the_batch_and_change_no_count(model, encode, few, truth, batch_tokens):
    """Guards a budget that is overrun, or that drops or repeats the rows at a batch's edge."""
    (trunk, head), (rows, counts) = halves(model), few
    sizes, projected = [], []

    def watched_trunk(ids, position_ids, mask):
        sizes.append(ids.shape)
        return trunk(ids, position_ids, mask)

    def watched_head(states):
        projected.append(states.shape[0])
        return head(states)

    assert evaluate(watched_trunk, watched_head, encode, rows, batch_tokens=batch_tokens) == counts
    assert all(b % 4 == 0 and (b == 4 or b * t <= batch_tokens) for b, t in sizes)
    assert sum(b for b, _ in sizes) == 4 * len(rows)
    assert len(sizes) < len(rows) or batch_tokens == 1
    scored = sum(sum(lengths) for _, lengths in truth[: len(rows)])
    assert sum(projected) == scored, "only the tokens of endings need the wide head"


@pytest.mark.parametrize("world_size", [2, 3, 20])
def test_ranks_share_the_same_batches(model, encode, few, world_size):
    """Guards counts that depend on the number of processes, through lost rows or batches cut in another way."""
    (trunk, head), (rows, counts) = halves(model), few
    seen = []

    def watched_trunk(ids, position_ids, mask):
        seen.append(str(ids.tolist()))
        return trunk(ids, position_ids, mask)

    alone = evaluate(watched_trunk, head, encode, rows, batch_tokens=900)
    batches_alone = sorted(seen)
    seen.clear()
    ranks = [evaluate(watched_trunk, head, encode, rows, rank, world_size, batch_tokens=900)
             for rank in range(world_size)]  # fmt: skip
    assert Counts(*map(sum, zip(*ranks, strict=True))) == alone == counts
    assert sorted(seen) == batches_alone and len(batches_alone) > 3
    assert ranks[0].total < alone.total


def test_autocast_of_the_caller_does_not_leak_in(model, encode, few):
    """Guards scores on bf16 logits, the original's mistake, which flip about 1% of the choices."""
    rows, counts = few
    batch = hellaswag.prepare(rows, encode, 1024)
    plain, _ = hellaswag.score(*halves(model), batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = hellaswag.score(*halves(model), batch)
        assert evaluate(*halves(model), encode, rows) == counts
        assert torch.is_autocast_enabled("cpu"), "it must hold again afterwards"
    assert torch.equal(plain, inside)


def test_matmul_precision_is_highest_inside_and_restored(model, encode, rows):
    """Guards TF32 scores, and a training run that loses its TF32 to an evaluation, failed ones included."""
    trunk, head = halves(model)
    seen = []

    def watched_trunk(ids, position_ids, mask):
        seen.append(torch.get_float32_matmul_precision())
        if len(seen) > 1:
            raise KeyError("boom")
        return trunk(ids, position_ids, mask)

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        evaluate(watched_trunk, head, encode, rows[:1])
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(KeyError, match="boom"):
            evaluate(watched_trunk, head, encode, rows[:1])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest", "highest"]


def test_no_graph_is_kept(model, encode, rows):
    """Guards an evaluation that holds every activation for a backward pass, and so runs out of memory."""
    trunk, head = halves(model)

    def watched_head(states):
        assert not states.requires_grad and not torch.is_inference(states)  # inference tensors would break training
        return head(states)

    assert torch.is_grad_enabled()
    evaluate(trunk, watched_head, encode, rows[:2])


def test_long_context_is_cut_from_the_left(model, encode, rows):
    """Guards a crash past the model's last position, and endings cut where the context should be."""
    trunk, head = halves(model)
    max_length = 50

    def watched_trunk(ids, position_ids, mask):
        assert ids.shape[1] <= max_length
        return trunk(ids, position_ids, mask)

    longest = [max(len(encode(" " + ending)) for ending in row["endings"]) for row in rows]
    pairs = [(row, length) for row, length in zip(rows, longest, strict=True) if length < max_length][:15]
    assert 3 <= sum(len(encode(row["ctx"])) + length > max_length for row, length in pairs) < len(pairs)
    rows = [row for row, _ in pairs]
    expected = [reference(model, encode, row, max_length) for row in rows]
    sums, _ = hellaswag.score(watched_trunk, head, hellaswag.prepare(rows, encode, max_length))
    torch.testing.assert_close(sums, torch.tensor([s for s, _ in expected], dtype=torch.float64), rtol=1e-5, atol=1e-4)
    assert evaluate(watched_trunk, head, encode, rows, max_length=max_length) == tally(expected, rows)


def test_ending_without_room_is_an_error(model, encode):
    """Guards an ending scored in part, or with no context before it, on a model of few positions."""
    assert evaluate(*halves(model), encode, [ROW], max_length=4).total == 1  # " jumps up." is three tokens
    with pytest.raises(HellaSwagError, match="3 tokens .* more than 3 positions"):
        evaluate(*halves(model), encode, [ROW], max_length=3)


# --- the file ---------------------------------------------------------------------------------------------------------


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_are_read_in_order_up_to_the_limit(tmp_path):
    """Guards a limit that is off by one, and rows that lose a field or a non-ASCII letter."""
    rows = [{**ROW, "ind": i, "ctx": f"café {i}"} for i in range(5)]
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    assert load_rows(path) == load_rows(str(path), limit=9) == rows
    assert load_rows(path, limit=3) == rows[:3]


@pytest.mark.parametrize("bad", [
    b"<html>", b"", b"[]", b"null", b'"text"', b'{"ctx": "\xff"}', json.dumps(ROW).encode()[:-1],
    *(json.dumps({k: v for k, v in ROW.items() if k != field}).encode() for field in ROW),
    *(json.dumps({**ROW, **change}).encode() for change in (
        {"ctx": ""}, {"ctx": None}, {"endings": ["a"] * 3}, {"endings": ["a"] * 5}, {"endings": "abcd"},
        {"endings": ["a", "b", "c", 4]}, {"endings": ["a", "b", "c", ""]}, {"endings": None},
        {"label": "3"}, {"label": 4}, {"label": -1}, {"label": 1.0}, {"label": True}, {"label": None},
    )),
])  # fmt: skip
def test_malformed_row_is_named_by_line(tmp_path, bad):
    """Guards rows scored against a wrong label, and a traceback that does not say which line is at fault."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([json.dumps(ROW).encode()] * 2 + [bad] + [json.dumps(ROW).encode()]))
    with pytest.raises(HellaSwagError, match=r"rows\.jsonl:3: ") as caught:
        load_rows(path)
    assert "\n" not in str(caught.value)
    assert len(load_rows(path, limit=2)) == 2


def test_empty_or_missing_file_is_an_error(tmp_path):
    """Guards a division by zero rows, and an accuracy of nothing."""
    with pytest.raises(HellaSwagError, match="rows.jsonl: .*empty"):
        load_rows(jsonl(tmp_path / "rows.jsonl"))
    with pytest.raises(HellaSwagError, match="none.jsonl: No such file"):
        load_rows(tmp_path / "none.jsonl")


# --- the download -----------------------------------------------------------------------------------------------------

FULL = (json.dumps(ROW) + "\n").encode() * FULL_ROWS


@pytest.fixture(scope="module")
def server():
    """A web server on this machine: (its address, the list of paths asked for)."""
    asked, closing = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, body, promised = {
                "/full": (200, FULL, len(FULL)),
                "/truncated": (200, FULL[: len(FULL) // 2], len(FULL)),
                "/short": (200, FULL[: -len(json.dumps(ROW)) - 1], None),  # a row less, and no length to give it away
                "/broken": (200, FULL[:-20], None),
                "/html": (200, b"<html><body>Sign in to the hotel's network</body></html>", None),
                "/empty": (200, b"", 0),
                "/slow": (200, b"", 100),
            }.get(self.path, (404, FULL, len(FULL)))  # believing this body would mean that the status went unread
            self.send_response(status)
            if promised is not None:
                self.send_header("Content-Length", str(promised))
            self.end_headers()
            self.wfile.write(body)
            if self.path == "/slow":
                closing.wait(20)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_download_happens_once(server, tmp_path):
    """Guards a file fetched anew by every run, or one that differs from what was sent."""
    address, asked = server
    path = tmp_path / "new" / "folder" / "val.jsonl"
    asked.clear()
    download(path, f"{address}/full")
    download(str(path), f"{address}/full")
    assert asked == ["/full"]
    assert path.read_bytes() == FULL
    assert [p.name for p in path.parent.iterdir()] == ["val.jsonl"]


@pytest.mark.parametrize("page", ["missing", "truncated", "short", "broken", "html", "empty", "slow"])
def test_failed_download_leaves_no_file(server, tmp_path, page):
    """Guards the original's mistake: an error page or half a file, cached as data for good."""
    address, _ = server
    path = tmp_path / "folder" / "val.jsonl"
    start = time.monotonic()
    with pytest.raises(HellaSwagError, match=f"{address}/{page}") as caught:
        download(path, f"{address}/{page}", timeout=0.5)
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_download_into_a_file_is_an_error(server, tmp_path):
    """Guards a traceback where the folder cannot be made."""
    (tmp_path / "folder").write_text("in the way")
    with pytest.raises(HellaSwagError, match="cannot download"):
        download(tmp_path / "folder" / "val.jsonl", f"{server[0]}/full")


# --- the command ------------------------------------------------------------------------------------------------------

# No test may reach the network: the Hub is switched off, and nothing listens on port 9.
OFFLINE = {"HF_HUB_OFFLINE": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


def command(*flags, script=SCRIPT, **kwargs):
    environment = {**os.environ, **OFFLINE, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, script, *map(str, flags)], capture_output=True, text=True, env=environment,
                          timeout=120, **kwargs)  # fmt: skip


@pytest.fixture(scope="module")
def rows_file(shared_data):
    return shared_data / "hellaswag/hellaswag_val_600.jsonl"


@pytest.fixture(scope="module")
def model_folder(model, tmp_path_factory):
    """The model as a Hugging Face folder without tokenizer files."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


def expect_counts(done, counts):
    """The two result lines of a command that went well."""
    assert done.returncode == 0, done.stderr
    total, correct, correct_norm = counts
    lines = done.stdout.splitlines()[-2:]
    assert lines[0].startswith(f"acc {correct}/{total} = {correct / total:.4f}")
    assert lines[1].startswith(f"acc_norm {correct_norm}/{total} = {correct_norm / total:.4f}")
    assert all("completion" in line for line in lines)


def test_command_scores_a_folder_without_tokenizer(model, model_folder, encode, rows_file, tmp_path):
    """Guards the command from flags to result lines, and transformers 5's empty tokenizer where files are missing."""
    rows = load_rows(rows_file, 13)
    done = command("--model", model_folder, "--file", rows_file, "--limit", 13, "--device", "cpu", cwd=tmp_path)
    expect_counts(done, tally([reference(model, encode, row) for row in rows], rows))
    assert done.stderr == ""
    assert f"13 rows of {rows_file} (not all 10,042" in done.stdout
    assert rows[0]["ctx"] in done.stdout and "predicted" in done.stdout
    assert not list(tmp_path.iterdir())


def test_command_takes_newest_checkpoint(model, model_folder, encode, rows_file, shared_data, tmp_path):
    """Guards an older or an unfinished checkpoint scored in silence, or one read with tokens that are not its own."""
    checkpoints = tmp_path / "log" / "checkpoints"
    for name, seed in (("step_000900", 1), ("step_999999", 2), (".step_1000001", 3), ("step_1000001.bak", 4)):
        random_gpt2(seed).save_pretrained(checkpoints / name)
    newest = shutil.copytree(model_folder, checkpoints / "step_1000000")
    merges, vocab = sorted((shared_data / "tiktoken").iterdir(), key=lambda path: path.stat().st_size)
    # GPT-2's tokens under other ids, which only the folder's own tokenizer knows.
    ids = {token: i if i == 50256 else 50255 - i for token, i in json.loads(vocab.read_text("utf-8")).items()}
    (newest / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    shutil.copy(merges, newest / "merges.txt")

    def encode_mirrored(text):
        return [50255 - i for i in encode(text)]

    rows = load_rows(rows_file, 15)
    expected = tally([reference(model, encode_mirrored, row) for row in rows], rows)
    assert expected != tally([reference(model, encode, row) for row in rows], rows)
    done = command("--model", tmp_path / "log", "--file", rows_file, "--limit", 15, "--device", "cpu")
    expect_counts(done, expected)
    assert f"{newest} on cpu" in done.stdout


def test_command_offline_without_data(model_folder, tmp_path):
    """Guards a traceback, a long wait, or rubbish left beside the script where there is no network."""
    script = shutil.copy(SCRIPT, tmp_path)
    start = time.monotonic()
    done = command("--model", model_folder, script=script, cwd=tmp_path)
    assert time.monotonic() - start < 30
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: cannot download https://") and done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.rglob("*") if p.name != "__pycache__"] == ["hellaswag.py"]


def test_mistakes_get_one_line_and_exit_code_2(model_folder, rows_file, tmp_path, monkeypatch, capsys):
    """Guards tracebacks, and a model of random weights scored in silence because its file lacks some."""
    from safetensors.torch import load_file, save_file

    def broken(name, **config):
        folder = shutil.copytree(model_folder, tmp_path / name)
        settings = {**json.loads((folder / "config.json").read_text()), **config}
        (folder / "config.json").write_text(json.dumps(settings))
        return folder

    (tmp_path / "empty").mkdir()
    (broken("no_weights") / "model.safetensors").unlink()
    (broken("cut") / "model.safetensors").write_bytes(b"abc")
    weights = load_file(broken("lacking") / "model.safetensors")
    absent = weights.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(weights, tmp_path / "lacking" / "model.safetensors", metadata={"format": "pt"})
    weights |= {"transformer.h.1.mlp.c_fc.weight": absent, "transformer.wte.weight": torch.zeros(257, 64)}
    save_file(weights, broken("bytes", vocab_size=257) / "model.safetensors", metadata={"format": "pt"})
    (broken("bad_config") / "config.json").write_text("{")
    (broken("bad_tokenizer") / "tokenizer.json").write_text("{")
    broken("bert", model_type="bert")
    broken("wider", n_inner=512)
    jsonl(tmp_path / "bad.jsonl", ROW, {**ROW, "label": 4})

    mistakes = [({"--model": tmp_path / name}, f"--model {tmp_path / name}: .*{hint}") for name, hint in [
        ("empty", "checkpoints/step_NNNNNN"), ("no_weights", "model.safetensors"), ("cut", ""),
        ("lacking", r"transformer\.h\.1\.mlp\.c_fc\.weight"), ("bad_config", "config.json"), ("bad_tokenizer", ""),
        ("bert", "a bert model"), ("bytes", "257 ids"), ("wider", r"mlp\.c_fc"), ("nowhere", ""),
    ]]  # fmt: skip
    mistakes += [
        ({"--model": "gpt2-that-is-nowhere"}, "--model gpt2-that-is-nowhere: .*Hub name"),
        ({"--file": tmp_path / "none.jsonl"}, "none.jsonl: No such file"),
        ({"--file": tmp_path / "bad.jsonl"}, "bad.jsonl:2: "),
        ({"--limit": 0}, "--limit 0"),
        ({"--device": "gpu"}, "--device gpu: "),
        ({"--device": f"cuda:{torch.cuda.device_count() + 1}"}, "--device cuda:"),
    ]
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read at its import, perhaps before this
    for flags, message in mistakes:
        flags = {"--model": model_folder, "--file": rows_file, "--limit": 2, "--device": "cpu", **flags}
        monkeypatch.setattr(sys, "argv", ["hellaswag.py", *(str(word) for item in flags.items() for word in item)])
        with pytest.raises(SystemExit) as caught:
            hellaswag.main()
        stderr = capsys.readouterr().err
        assert caught.value.code == 2
        assert re.match(f"error: .*{message}.*\n$", stderr), (message, stderr)
        assert stderr.count("\n") == 1


def test_unknown_flag_exits_2():
    """Guards a misspelt flag that is taken for none."""
    done = command("--modle", "gpt2")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_import_does_nothing(tmp_path):
    """Guards the original's import, which loads transformers, fetches an encoding and may start a run."""
    code = "import sys, hellaswag; assert not {'transformers', 'datasets', 'tiktoken', 'tyro'} & set(sys.modules)"
    environment = {**os.environ, **OFFLINE, "PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
