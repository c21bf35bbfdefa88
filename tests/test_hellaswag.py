"""Compare hellaswag.py with a plain loop over single sequences; test its download and its command."""

import json
import os
import re
import shutil
import statistics
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
from hellaswag import FULL_ROWS, Counts, ask, download, evaluate, load_rows, prepare, row_texts
from support.checkpoints import open_gpt2
from support.common import UserError
from train_gpt2 import GPT

SCRIPT = Path(hellaswag.__file__)
ROW = {"ctx": "A man is sitting on a roof. he", "endings": ["sings.", "falls off.", "waits.", "jumps up."], "label": 3}
STYLES = "completion", "harness"


# --- a small random model, and the conventions computed in the simplest way -------------------------------------------


def random_gpt2(seed):
    """Create a tiny GPT-2 whose logits vary enough for its answers to differ."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=64, n_positions=160)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))  # biases start as zeros
    return model


@torch.no_grad()
def reference(model, encode, row, style="completion", max_length=160):
    """Compute summed losses and divisors of a row's four endings, each separately, in fp32 and without padding."""
    context, endings = row_texts(row, style)
    sums, divisors = [], []
    for ending in endings:
        before, after = encode(context), encode(" " + ending)
        if style == "harness":  # tokens of the joined text, split where the stripped context ends
            whole = encode(context + " " + ending)
            before, after = whole[: len(encode(context.rstrip()))], whole[len(encode(context.rstrip())) :]
        tokens = torch.tensor((before + after)[-max_length - 1 :])  # the last is only predicted: no position
        logits = model(tokens[None, :-1]).logits[0].float()
        sums.append(F.cross_entropy(logits, tokens[1:], reduction="none")[-len(after) :].sum().item())
        divisors.append(len(after) if style == "completion" else len(ending))
    return sums, divisors


def tally(scored, rows):
    """Compute Counts from the (sums, divisors) of each row."""
    correct = sum(sums.index(min(sums)) == row["label"] for (sums, _), row in zip(scored, rows, strict=True))
    means = [[a / b for a, b in zip(sums, divisors, strict=True)] for sums, divisors in scored]
    correct_norm = sum(mean.index(min(mean)) == row["label"] for mean, row in zip(means, rows, strict=True))
    return Counts(len(rows), correct, correct_norm)


halves = hellaswag.trunk_and_head


def losses_by_row(answers):
    """Return the summed losses, (rows, 4), in the order of the rows."""
    answers = sorted(answers, key=lambda answer: answer.example.number)
    return torch.tensor([answer.losses for answer in answers], dtype=torch.float64)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread: for work this small, more threads cost more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def encode(shared_data):
    return tiktoken.get_encoding("gpt2").encode_ordinary


@pytest.fixture(scope="module")
def rows(shared_data):
    """Forty real rows, some of them long ones from WikiHow."""
    return load_rows(shared_data / "hellaswag/hellaswag_val_600.jsonl")[::15]


@pytest.fixture(scope="module")
def model():
    return random_gpt2(seed=0)


@pytest.fixture(scope="module")
def truth(model, encode, rows):
    """For each style, the (sums, divisors) of each row."""
    return {style: [reference(model, encode, row, style) for row in rows] for style in STYLES}


@pytest.fixture(scope="module")
def few(rows, truth):
    """A dozen rows and their true counts."""
    return rows[:12], tally(truth["completion"][:12], rows[:12])


@pytest.fixture(scope="module")
def model_folder(model, tmp_path_factory):
    """The model as a Hugging Face folder without tokenizer files."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_losses_agree_with_plain_loop(model, encode, rows, truth, style):
    """Guards the first token of an ending, the mask between endings, positions, padding, divisors and the order."""
    sums, divisors = (torch.tensor(column, dtype=torch.float64) for column in zip(*truth[style], strict=True))
    answers = list(ask(*halves(model), prepare(rows, encode, 160, style)))
    packs = {len(answer.example.packs) for answer in answers}
    assert packs == {1, 4}, "some rows must fit into the 160 positions, and some must not"
    torch.testing.assert_close(losses_by_row(answers), sums, rtol=1e-6, atol=1e-4)
    normed = [answer.normed for answer in sorted(answers, key=lambda answer: answer.example.number)]
    torch.testing.assert_close(torch.tensor(normed).double(), sums / divisors, rtol=1e-6, atol=1e-4)
    choices, choices_norm = sums.argmin(1), (sums / divisors).argmin(1)
    for answer in answers:
        assert hellaswag.choice(answer.losses) == choices[answer.example.number]
        assert hellaswag.choice(answer.normed) == choices_norm[answer.example.number]
    assert len(set(choices.tolist())) == 4, "the model must not always answer the same"
    assert not torch.equal(choices, choices_norm), "the two accuracies must differ somewhere"
    assert evaluate(*halves(model), encode, rows, max_length=160, style=style) == tally(truth[style], rows)


@pytest.mark.parametrize("flash", [True, False])
def test_train_gpt2s_model_agrees(model_folder, encode, rows, truth, flash):
    """Guards the mask and positions that the two models read, the padded vocabulary, and T beyond block_size."""
    gpt = GPT.from_pretrained(model_folder, flash=flash).eval()
    losses = losses_by_row(ask(gpt.trunk, gpt.head, prepare(rows, encode, gpt.config.block_size)))
    expected = torch.tensor([sums for sums, _ in truth["completion"]], dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-4)


def test_answers_do_not_depend_on_the_batch(model, encode, rows):
    """Guards against scores that depend on the other rows of a batch or on padding."""
    examples = prepare(rows, encode, 160)
    together = losses_by_row(ask(*halves(model), examples, batch_tokens=10**6))
    alone = losses_by_row(ask(*halves(model), examples, batch_tokens=1))
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-4)


def test_each_context_is_computed_once(model, encode, few):
    """Guards against wasted work: contexts computed four times, padding, and logits at every position."""
    (trunk, head), (rows, _) = halves(model), few
    fed, projected = [], []

    def watched_trunk(ids, position_ids, mask):
        fed.append(ids.numel())
        return trunk(ids, position_ids, mask)

    def watched_head(states):
        projected.append(states.shape[0])
        return head(states)

    contexts = sum(len(encode(row["ctx"])) for row in rows)
    endings = [len(encode(" " + ending)) for row in rows for ending in row["endings"]]
    evaluate(watched_trunk, watched_head, encode, rows, batch_tokens=1)
    assert sum(fed) == contexts + sum(endings) - len(endings)
    assert sum(projected) == sum(endings)
    fed.clear()
    evaluate(watched_trunk, watched_head, encode, rows, batch_tokens=500)
    assert len(fed) < len(rows) and sum(fed) < 1.2 * (contexts + sum(endings)), "similar lengths go together"


def test_tokenized_once(model, encode, few):
    """Guards against tokenizing 50,000 texts again at each evaluation of a training run."""
    rows, counts = few
    examples = prepare(rows, encode)
    assert evaluate(*halves(model), None, examples) == evaluate(*halves(model), None, examples) == counts


@pytest.mark.parametrize("batch_tokens", [1, 900, 2500, 10**6])
def test_batch_tokens_bound_the_batch_and_change_no_count(model, encode, few, batch_tokens):
    """Guards against batches above the limit, and rows that are dropped or repeated between batches."""
    (trunk, head), (rows, counts) = halves(model), few
    sizes = []

    def watched_trunk(ids, position_ids, mask):
        sizes.append(ids.shape)
        return trunk(ids, position_ids, mask)

    assert evaluate(watched_trunk, head, encode, rows, batch_tokens=batch_tokens) == counts
    assert all(b == 1 or b * t <= batch_tokens for b, t in sizes)
    assert sum(b for b, _ in sizes) == len(rows)
    assert len(sizes) < len(rows) or batch_tokens == 1
    sizes.clear()
    divided = prepare(rows, encode, 100)  # a row that does not fit becomes four sequences of one batch
    assert 0 < sum(len(example.packs) == 4 for example in divided) < len(rows)
    assert evaluate(watched_trunk, head, None, divided, batch_tokens=batch_tokens).total == len(rows)
    assert all(b in (1, 4) or b * t <= batch_tokens for b, t in sizes)
    assert sum(b for b, _ in sizes) == sum(len(example.packs) for example in divided)


@pytest.mark.parametrize("world_size", [2, 3, 20])
def test_ranks_share_the_same_batches(model, encode, few, world_size):
    """Guards against counts that depend on the number of processes, and ranks that make different numbers of calls."""
    (trunk, head), (rows, counts) = halves(model), few
    seen, calls = [], []

    def watched_trunk(ids, position_ids, mask):
        seen.append(str(ids.tolist()))
        calls.append("trunk")
        return trunk(ids, position_ids, mask)

    def watched_head(states):
        calls.append("head")
        return head(states)

    alone = evaluate(watched_trunk, watched_head, encode, rows, batch_tokens=250)
    batches_alone = sorted(seen)
    seen.clear()
    ranks, calls_by_rank = [], []
    for rank in range(world_size):
        calls.clear()
        ranks.append(evaluate(watched_trunk, watched_head, encode, rows, rank, world_size, batch_tokens=250))
        calls_by_rank.append(list(calls))
    assert Counts(*map(sum, zip(*ranks, strict=True))) == alone == counts
    assert all(calls == calls_by_rank[0] for calls in calls_by_rank)
    assert len(seen) == -(-len(batches_alone) // world_size) * world_size and len(batches_alone) > 3
    assert sorted(set(seen)) == batches_alone, "the same batches, except that the last may be repeated"
    assert ranks[0].total < alone.total


def test_autocast_of_the_caller_does_not_leak_in(model, encode, few):
    """Guards against bf16 logits, as in build-nanogpt, which change about 1% of the choices."""
    rows, counts = few
    examples = prepare(rows, encode)
    plain = hellaswag.score(*halves(model), examples)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = hellaswag.score(*halves(model), examples)
        assert evaluate(*halves(model), encode, rows) == counts
        assert torch.is_autocast_enabled("cpu"), "it must be active again afterwards"
    assert torch.equal(plain, inside)


def test_matmul_precision_is_highest_inside_and_restored(model, encode, rows):
    """Guards against TF32 scores, and against a training run that loses TF32 after an evaluation, even a failed one."""
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


def test_open_gpt2_uses_the_fast_gelu(model_folder):
    """Guards the speed: gelu_new computes the same formula in eight passes over memory."""
    assert open_gpt2(model_folder).config.activation_function == "gelu_pytorch_tanh"


def test_no_graph_is_kept(model, encode, rows):
    """Guards against keeping all activations for a backward pass, which needs too much memory."""
    trunk, head = halves(model)

    def watched_head(states):
        assert not states.requires_grad and not torch.is_inference(states)  # inference tensors would break training
        return head(states)

    assert torch.is_grad_enabled()
    evaluate(trunk, watched_head, encode, rows[:2])


@pytest.mark.parametrize("style", STYLES)
def test_long_context_is_cut_from_the_left(model, encode, rows, style):
    """Guards against positions beyond the model's last one, and against cutting elsewhere than the harness does."""
    trunk, head = halves(model)
    max_length = 50

    def watched_trunk(ids, position_ids, mask):
        assert ids.shape[1] <= max_length and position_ids.max() < max_length
        return trunk(ids, position_ids, mask)

    endings = [[len(encode(" " + ending)) for ending in row_texts(row, style)[1]] for row in rows]
    pairs = [(row, lengths) for row, lengths in zip(rows, endings, strict=True) if max(lengths) <= max_length][:15]
    assert 3 <= sum(len(encode(row_texts(row, style)[0])) + max(n) > max_length + 1 for row, n in pairs) < len(pairs)
    rows = [row for row, _ in pairs]
    expected = [reference(model, encode, row, style, max_length) for row in rows]
    losses = losses_by_row(ask(watched_trunk, head, prepare(rows, encode, max_length, style)))
    torch.testing.assert_close(losses, torch.tensor([s for s, _ in expected]).double(), rtol=1e-6, atol=1e-4)
    assert evaluate(watched_trunk, head, encode, rows, max_length=max_length, style=style) == tally(expected, rows)


def test_ending_without_room_is_an_error(model, encode):
    """Guards against scoring only a part of an ending, or an ending without context, on a model with few positions."""
    assert evaluate(*halves(model), encode, [ROW], max_length=3).total == 1  # " jumps up." is three tokens
    with pytest.raises(UserError, match="row 1 needs 3 positions, more than 2"):
        evaluate(*halves(model), encode, [ROW], max_length=2)


def test_text_without_tokens_is_an_error():
    """Guards against an empty sum, which would be the lowest loss, when a tokenizer does not know an alphabet."""
    with pytest.raises(UserError, match="row 2 has a text without tokens"):
        prepare([ROW, {**ROW, "ctx": "Ω"}], lambda text: [1 for c in text if c.isascii()])


# --- the conventions --------------------------------------------------------------------------------------------------


def test_harness_wording(encode):
    """Guards the exact text of the harness. The expected values come from process_docs of lm_eval 0.4.13."""
    wikihow = {
        "activity_label": "Food and Entertaining", "ctx_b": "", "ctx": "unused",
        "ctx_a": "[header] How to make  tea [title] Boil water. [substeps] Pour it [step] ",
        "endings": [" [title] Wait. [step] Drink [it].", "Stir.  Twice. ", "[step]", "É [title] thé."], "label": 0,
    }  # fmt: skip
    assert row_texts(wikihow, "harness") == (
        "Food and Entertaining: How to make tea. Boil water. Pour it ",
        [" Wait. Drink .", "Stir. Twice.", "", "É. thé."],
    )
    assert row_texts(wikihow, "completion") == ("unused", wikihow["endings"])
    video = {**ROW, "activity_label": "Roof", "ctx_a": "A man  sits.", "ctx_b": "he AND I"}
    assert row_texts(video, "harness") == ("Roof: A man sits. He and i", ROW["endings"])

    context, endings = prepare([wikihow], encode, style="harness")[0].packs[0]
    assert context == encode("Food and Entertaining: How to make tea. Boil water. Pour it")
    assert endings[1] == encode("  Stir. Twice."), "the space that cleaning leaves belongs to the ending"
    example = prepare([wikihow], encode, style="harness")[0]
    assert example.divisors == [14, 12, 0, 7], "characters, not bytes, and without the space before them"
    assert prepare([wikihow], encode)[0].divisors == [len(encode(" " + ending)) for ending in wikihow["endings"]]


def test_an_ending_cleaned_away_is_never_chosen_by_its_characters(model, encode):
    """Guards against a division by zero: as in the harness, such an ending has an infinite loss."""
    row = {
        **ROW,
        "activity_label": "Roof",
        "ctx_a": "A man sits.",
        "ctx_b": "he",
        "endings": ["[step]", *ROW["endings"][1:]],
    }
    (answer,) = ask(*halves(model), prepare([row], encode, style="harness"))
    assert answer.normed[0] == float("inf") and answer.losses[0] < 100


def test_report_names_the_convention_and_the_error():
    """Guards against results of one convention beside those of the other, and against a biased standard error."""
    error = statistics.stdev([1] * 71 + [0] * 50) / 121**0.5
    error_norm = statistics.stdev([1] * 73 + [0] * 48) / 121**0.5
    for style, published in (("completion", ("0.2859 / 0.2955", "0.4893")), ("harness", ("0.2892 / 0.3114", "0.5089"))):
        lines = hellaswag.report(Counts(121, 71, 73), style).splitlines()
        assert lines[-2] == f"acc 71/121 = 0.5868 ± {error:.4f} ({style})"
        assert lines[-1] == f"acc_norm 73/121 = 0.6033 ± {error_norm:.4f} ({style})"
        assert style in lines[0] and all(figure in lines[0] for figure in published)
        assert "GPT-3" in lines[1] and "0.337" in lines[1]
    assert "= 1.0000 ± nan" in hellaswag.report(Counts(1, 1, 1), "harness")


# --- the file ---------------------------------------------------------------------------------------------------------


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_are_read_in_order_up_to_the_limit(tmp_path):
    """Guards against a limit that is off by one, and against rows that lose a field or a non-ASCII letter."""
    rows = [{**ROW, "ind": i, "ctx": f"café {i}"} for i in range(5)]
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    assert load_rows(path) == load_rows(str(path), limit=9) == rows
    assert load_rows(path, limit=3) == rows[:3]


@pytest.mark.parametrize("bad", [
    b"<html>", b"[]", b"null", b'"text"', b'{"ctx": "\xff"}', json.dumps(ROW).encode()[:-1],
    *(json.dumps({k: v for k, v in ROW.items() if k != field}).encode() for field in ROW),
    *(json.dumps({**ROW, **change}).encode() for change in (
        {"ctx": ""}, {"ctx": None}, {"endings": ["a"] * 3}, {"endings": ["a"] * 5}, {"endings": "abcd"},
        {"endings": ["a", "b", "c", 4]}, {"endings": ["a", "b", "c", ""]}, {"endings": None},
        {"label": "4"}, {"label": 4}, {"label": -1}, {"label": 1.0}, {"label": True}, {"label": None},
    )),
])  # fmt: skip
def test_malformed_row_is_named_by_line(tmp_path, bad):
    """Guards against rows with a wrong label, and against errors that do not name the bad line."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([json.dumps(ROW).encode()] * 2 + [bad] + [json.dumps(ROW).encode()]))
    with pytest.raises(UserError, match=r"rows\.jsonl:3: ") as caught:
        load_rows(path)
    assert "\n" not in str(caught.value)
    assert len(load_rows(path, limit=2)) == 2


@pytest.mark.parametrize("field", ["activity_label", "ctx_a", "ctx_b"])
def test_harness_needs_its_fields(tmp_path, field):
    """Guards against a traceback for a file that has the fields of the other convention only."""
    row = {**ROW, "activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": ""}
    assert load_rows(jsonl(tmp_path / "rows.jsonl", row), style="harness") == [row]
    path = jsonl(tmp_path / "rows.jsonl", row, {**row, field: None})
    with pytest.raises(UserError, match=r"rows\.jsonl:2: .*harness.*activity_label"):
        load_rows(path, style="harness")
    assert len(load_rows(path)) == 2


def test_empty_or_missing_file_is_an_error(tmp_path):
    """Guards against a division by zero rows."""
    with pytest.raises(UserError, match="rows.jsonl is empty"):
        load_rows(jsonl(tmp_path / "rows.jsonl"))
    with pytest.raises(UserError, match="none.jsonl cannot be read .No such file"):
        load_rows(tmp_path / "none.jsonl")


# --- the download -----------------------------------------------------------------------------------------------------

FULL = (json.dumps(ROW) + "\n").encode() * FULL_ROWS


@pytest.fixture(scope="module")
def server():
    """Start a web server on this machine: (its address, the list of requested paths)."""
    asked, closing = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, body, promised = {
                "/full": (200, FULL, len(FULL)),
                "/truncated": (200, FULL[: len(FULL) // 2], len(FULL)),
                "/short": (200, FULL[: -len(json.dumps(ROW)) - 1], None),  # one row less, without Content-Length
                "/broken": (200, FULL[:-20], None),
                "/html": (200, b"<html><body>Sign in to the hotel's network</body></html>", None),
                "/empty": (200, b"", 0),
                "/slow": (200, b"", 100),
            }.get(self.path, (404, FULL, len(FULL)))  # whoever accepts this body has not read the status
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
    """Guards against downloading the file again in every run, and against a file that differs from what was sent."""
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
    """Guards against keeping an error page or half a file as data, as build-nanogpt does."""
    address, _ = server
    path = tmp_path / "folder" / "val.jsonl"
    start = time.monotonic()
    with pytest.raises(UserError, match=f"{address}/{page}") as caught:
        download(path, f"{address}/{page}", timeout=0.5)
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_download_into_a_file_is_an_error(server, tmp_path):
    """Guards against a traceback when the folder cannot be created."""
    (tmp_path / "folder").write_text("in the way")
    with pytest.raises(UserError, match="cannot download"):
        download(tmp_path / "folder" / "val.jsonl", f"{server[0]}/full")


# --- the command ------------------------------------------------------------------------------------------------------

# No test may use the network: the Hub is turned off, and nothing listens on port 9.
OFFLINE = {"HF_HUB_OFFLINE": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


def command(*flags, script=SCRIPT, **kwargs):
    environment = {**os.environ, **OFFLINE, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, script, *map(str, flags)], capture_output=True, text=True, env=environment,
                          timeout=120, **kwargs)  # fmt: skip


@pytest.fixture(scope="module")
def rows_file(shared_data):
    return shared_data / "hellaswag/hellaswag_val_600.jsonl"


@pytest.fixture
def main(monkeypatch, capsys):
    """Return main("--flag", …), which runs the command in this process and returns its output."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["hellaswag.py", *map(str, flags)])
        hellaswag.main()
        return capsys.readouterr().out

    return run


def expect_counts(stdout, counts, style="completion"):
    """Check the two result lines of a successful command."""
    total, correct, correct_norm = counts
    lines = stdout.splitlines()[-2:]
    assert lines[0].startswith(f"acc {correct}/{total} = {correct / total:.4f} ±")
    assert lines[1].startswith(f"acc_norm {correct_norm}/{total} = {correct_norm / total:.4f} ±")
    assert all(style in line for line in lines)


def test_command_scores_a_folder_without_tokenizer(model, model_folder, encode, rows_file, tmp_path):
    """Guards the command as a whole, and against the empty tokenizer of transformers 5 when files are missing."""
    rows = load_rows(rows_file, 13)
    done = command("--model", model_folder, "--file", rows_file, "--limit", 13, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    expect_counts(done.stdout, tally([reference(model, encode, row) for row in rows], rows))
    assert f"13 rows of {rows_file} (not all 10,042" in done.stdout
    assert rows[0]["ctx"] in done.stdout and "predicted" in done.stdout
    assert not list(tmp_path.iterdir())


def test_command_saves_the_answers(model, model_folder, encode, rows_file, main, tmp_path):
    """Guards the order and the style of saved answers, and that their choices are the counted ones."""
    file = jsonl(tmp_path / "rows.jsonl", *load_rows(rows_file)[33:600:81])
    rows = load_rows(file)
    assert any("[" in row["ctx"] for row in rows)
    truth = [reference(model, encode, row, "harness") for row in rows]
    flags = "--model", model_folder, "--file", file, "--style", "harness", "--device", "cpu"
    out = main(*flags, "--save", tmp_path / "saved.jsonl")
    expect_counts(out, tally(truth, rows), "harness")
    assert row_texts(rows[0], "harness")[0] in out and rows[0]["ctx"] not in out
    saved = [json.loads(line) for line in (tmp_path / "saved.jsonl").read_text().splitlines()]
    for line, (record, row, (sums, divisors)) in enumerate(zip(saved, rows, truth, strict=True), start=1):
        means = [a / b for a, b in zip(sums, divisors, strict=True)]
        expected = {"line": line, "ind": row["ind"], "style": "harness", "label": row["label"], "divisors": divisors}
        expected |= {"prediction": sums.index(min(sums)), "prediction_norm": means.index(min(means))}
        assert [-x for x in record.pop("loglikelihoods")] == pytest.approx(sums, rel=1e-6, abs=1e-4)
        assert record == expected


def test_command_takes_newest_checkpoint(model, model_folder, encode, rows_file, shared_data, main, tmp_path):
    """Guards against scoring an older or incomplete checkpoint, or using a tokenizer that is not its own."""
    checkpoints = tmp_path / "log" / "checkpoints"
    for name, seed in (("step_000900", 1), ("step_999999", 2), (".step_1000001", 3), ("step_1000001.bak", 4)):
        random_gpt2(seed).save_pretrained(checkpoints / name)
    newest = shutil.copytree(model_folder, checkpoints / "step_1000000")
    merges, vocab = sorted((shared_data / "tiktoken").iterdir(), key=lambda path: path.stat().st_size)
    # GPT-2's tokens with other ids, which only the folder's own tokenizer knows.
    ids = {token: i if i == 50256 else 50255 - i for token, i in json.loads(vocab.read_text("utf-8")).items()}
    (newest / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    shutil.copy(merges, newest / "merges.txt")

    def encode_mirrored(text):
        return [50255 - i for i in encode(text)]

    rows = load_rows(rows_file, 15)
    expected = tally([reference(model, encode_mirrored, row) for row in rows], rows)
    assert expected != tally([reference(model, encode, row) for row in rows], rows)
    out = main("--model", tmp_path / "log", "--file", rows_file, "--limit", 15, "--device", "cpu")
    expect_counts(out, expected)
    assert f"{newest} on cpu" in out


def test_command_offline_without_data(model_folder, tmp_path):
    """Guards a traceback, a long wait, or files left beside the script when there is no network."""
    script = Path(shutil.copy(SCRIPT, tmp_path))
    shutil.copytree(SCRIPT.parent / "support", tmp_path / "support")
    start = time.monotonic()
    done = command("--model", model_folder, script=script, cwd=tmp_path)
    assert time.monotonic() - start < 30
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: cannot download https://") and done.stderr.count("\n") == 1
    assert {path for path in tmp_path.iterdir() if path.name != "__pycache__"} == {script, tmp_path / "support"}


def test_mistakes_get_one_line_and_exit_code_2(model_folder, rows_file, tmp_path, monkeypatch, capsys):
    """Guards against tracebacks, and against scoring a model some of whose weights are random."""
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
    good = jsonl(tmp_path / "good.jsonl", ROW)

    mistakes = [({"--model": tmp_path / name}, f"--model {tmp_path / name} .*{hint}") for name, hint in [
        ("empty", "checkpoints/step_NNNNNN"), ("no_weights", "model.safetensors"), ("cut", ""),
        ("lacking", r"transformer\.h\.1\.mlp\.c_fc\.weight"), ("bad_config", "config.json"), ("bad_tokenizer", ""),
        ("bert", "model_type is bert"), ("bytes", "257 ids"), ("wider", r"mlp\.c_fc"), ("nowhere", ""),
    ]]  # fmt: skip
    mistakes += [
        ({"--model": "gpt2-that-is-nowhere"}, "--model gpt2-that-is-nowhere .*Hub name"),
        ({"--file": tmp_path / "none.jsonl"}, "none.jsonl cannot be read .No such file"),
        ({"--file": tmp_path / "bad.jsonl"}, "bad.jsonl:2: "),
        ({"--file": tmp_path / "bad.jsonl", "--style": "harness"}, "bad.jsonl:1: .*harness"),
        ({"--save": tmp_path / "nowhere" / "saved.jsonl"}, "--save .*nowhere.*No such file"),
        ({"--save": tmp_path}, "--save .*Is a directory"),
        ({"--file": good, "--save": good}, "--save .*another name"),
        ({"--limit": 0}, "--limit 0"),
        ({"--device": "gpu"}, "--device gpu "),
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
        stdout, stderr = capsys.readouterr()
        assert caught.value.code == 2
        assert "predicted" not in stdout, "the error comes before any work"
        assert re.match(f"error: .*{message}.*\n$", stderr), (message, stderr)
        assert stderr.count("\n") == 1


@pytest.mark.parametrize("flags", [("--modle", "gpt2"), ("--style", "chat")])
def test_unknown_flag_exits_2(main, flags):
    """Guards against ignoring a misspelt flag or style."""
    with pytest.raises(SystemExit) as caught:
        main(*flags)
    assert caught.value.code == 2


# --- files of other sources -------------------------------------------------------------------------------------------


def test_rows_as_the_hub_has_them(tmp_path, shared_data):
    """The Hub's copy has the labels as text; a mark, Windows' line ends and blank lines do not matter."""
    rows = [ROW | {"label": label} for label in (3, "0", "1", "2", "3")]
    lines = [json.dumps(row) for row in rows]
    path = tmp_path / "rows.jsonl"
    for before, separator in (("", "\n"), ("", "\n\n"), ("\n \n", "\r\n\t\r\n"), ("\ufeff", "\n")):
        path.write_text(before + separator.join(lines) + 2 * separator, encoding="utf-8", newline="")
        assert [row["label"] for row in load_rows(path)] == [3, 0, 1, 2, 3]
        assert [row["label"] for row in load_rows(path, limit=3)] == [3, 0, 1]
    path.write_text("\n" + lines[0] + "\n\n{}\n")
    with pytest.raises(UserError, match="rows.jsonl:4: not a HellaSwag row"):
        load_rows(path)
    for label in ("4", "", "03", "a", None, True, 1.0, [], "²"):
        path.write_text(json.dumps(ROW | {"label": label}))
        with pytest.raises(UserError, match="rows.jsonl:1"):
            load_rows(path)
    path.write_text("\n\n")
    with pytest.raises(UserError, match="is empty"):
        load_rows(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 99\n")
    with pytest.raises(UserError, match="lfs pull"):
        load_rows(path)
    assert {row["label"] for row in load_rows(shared_data / "cases" / "hellaswag_hf.jsonl")} <= {0, 1, 2, 3}


def test_labels_as_text_give_the_same_answers(model, encode, rows, tmp_path):
    """The same counts as with numbers."""
    counts = []
    for kind in (int, str):
        (tmp_path / "rows").write_text("\n\n".join(json.dumps(row | {"label": kind(row["label"])}) for row in rows[:6]))
        counts.append(evaluate(*halves(model), encode, load_rows(tmp_path / "rows"), max_length=160))
    assert counts[0] == counts[1]
