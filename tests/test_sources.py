"""What people bring as a corpus: odd text files, folders, columns and rows, as in public bug reports."""

import csv
import gzip
import io
import json
import os
import random
import shlex
import socket

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import fineweb
from fineweb import encode_task, find_shards, get_encoding, open_shard, prepare, read_manifest
from support import sources, texts
from support.common import UserError

STORIES = [f"Once upon a time there was a fox number {i}. It ran, and then it slept." for i in range(20)]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"


def texts_of(source, tally=None):
    tasks, _ = sources.open_source(str(source), None, tally)
    return [text for task in tasks for text in sources.read_texts(task)]


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def zstd(data):
    return pa.compress(data, "zstd", asbytes=True)


def run(main, tmp_path, source, *flags):
    """Return (exit code, stdout, stderr) of fineweb.py in bytes into tmp_path/out, in this process."""
    common = ["--encoding", "bytes", "--out_dir", tmp_path / "out", "--shard_tokens", 700, "--workers", 1]
    return main(fineweb, ["--source", source, *common, *flags])


def stream_of(folder):
    paths = [path for split in ("val", "train") for path in find_shards(folder, split)]
    return np.concatenate([open_shard(path) for path in paths])


# --- large text files -------------------------------------------------------------------------------------------------


def documents_of(text):
    """Return the documents of a .txt, by a plain loop over its lines."""
    documents = [""]
    *lines, last = text.replace("\r\n", "\n").split("\n")
    for line in [*(line + "\n" for line in lines), last]:
        if line.removesuffix("\n") == "<|endoftext|>":
            documents.append("")
        else:
            documents[-1] += line
    return [document for document in documents if document]


@pytest.mark.parametrize("seed", range(4))
def test_a_text_in_pieces_has_the_tokens_of_the_whole(seed):
    """Guards the places of the cuts: contractions, whitespace before a word and at an end, emoji, and line ends."""
    encoding, chance = get_encoding("gpt2"), random.Random(seed)
    spaces = [" ", "\n", "\r\n", "\r", "\t", "\u3000", "\x85", "\x1c", "\u200b", " \n", "\n "]
    words = [
        "don't",
        "x's",
        "'s",
        "'",
        "''ll",
        "we're",
        "12",
        "3.14",
        "(a)",
        "...",
        "😀",
        "👩‍👩‍👧",
        "é",
        "e\u0301",
        "日本語",
        "。",
    ]
    words += [
        "<|endoftext|>",
        "\n<|endoftext|>\n",
        "\r\n<|endoftext|>\r\n",
        "<|endo",
        "ftext|>",
        "!",
        "，",
        "１２",
        "٣",
        "²",
        "ab",
    ]
    for _ in range(150):
        pool = chance.sample(words, 6) + chance.sample(spaces, 3)
        text = "".join(chance.choice(pool) * chance.choice([1, 1, 1, 2, 30]) for _ in range(chance.randrange(40)))
        for size in (1, chance.randrange(2, 80)):
            pieces = list(texts.text_pieces(io.StringIO(text, newline=""), size))
            expected = []
            for document in documents_of(text):
                expected += [encoding.eot_token, *encoding.encode_ordinary(document)]
            assert encode_task(pieces, "gpt2").tolist() == expected, (text, size, pieces)


@pytest.mark.parametrize("pattern", ["It ran; ", "it ran\n", "狐狸跑啊跑，然后睡着了。", "a\u3000", "😀 ", "f(x)=1;"])
def test_a_long_text_is_read_in_small_pieces(tmp_path, pattern):
    """Guards memory and the share of each worker, also for texts without spaces or without lines."""
    text = pattern * (2_000_000 // len(pattern))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = list(texts.file_texts(str(tmp_path / "a.txt"), "text", 100_000))
    assert "".join(pieces) == text and max(map(len, pieces)) < 250_000
    assert [type(piece) for piece in pieces] == [str] + [texts.Rest] * (len(pieces) - 1)


def test_a_text_without_a_place_to_cut_is_one_piece():
    """Guards texts such as base64 or a gene: the search must not start at the beginning again for every block."""
    reads = []

    class File(io.StringIO):
        def read(self, size=-1):
            reads.append(size)
            return super().read(size)

    text = "a" * 1_000_000
    assert list(texts.text_pieces(File(text), 1000)) == [text] and len(reads) < 20


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_join_the_pieces(tmp_path, monkeypatch, workers):
    """Guards that the documents of a text in many tasks keep their order, their number and one <|endoftext|> each."""
    monkeypatch.setattr(sources, "TASK_CHARACTERS", 500)
    documents = [" ".join(STORIES) + "\n", "short\n", "\n".join(STORIES * 3) + "\n"]
    (tmp_path / "a.txt").write_text("<|endoftext|>\n".join(documents))
    (tmp_path / "b.txt").write_text(documents[0])
    manifest = prepare(str(tmp_path / "*.txt"), tmp_path / "out", shard_tokens=300, workers=workers)
    expected = []
    for document in [*documents, documents[0]]:
        expected += [50256, *get_encoding("gpt2").encode_ordinary(document)]
    assert stream_of(tmp_path / "out").tolist() == expected and manifest["documents"] == 4
    assert max(entry["end"]["task"] for entry in manifest["shards"].values()) > 5


# --- separators, BOM, line ends, encodings ----------------------------------------------------------------------------


def test_a_line_of_endoftext_separates_documents(tmp_path):
    """Guards files such as TinyStories: each separator was seven ordinary tokens. Within a line it stays a text."""
    for text, documents in {
        "a\n<|endoftext|>\nb\n": ["a\n", "b\n"],
        "\ufeffa\r\n<|endoftext|>\r\nb": ["a\n", "b"],
        "<|endoftext|>\na\n<|endoftext|>\n<|endoftext|>\nb\n<|endoftext|>": ["a\n", "b\n"],
        "a <|endoftext|>\n<|endoftext|> b\n <|endoftext|>\n": ["a <|endoftext|>\n<|endoftext|> b\n <|endoftext|>\n"],
    }.items():
        for data, suffix in ((text.encode(), ""), (gzip.compress(text.encode()), ".gz"), (zstd(text.encode()), ".zst")):
            (tmp_path / f"a.txt{suffix}").write_bytes(data)
            assert texts_of(tmp_path / f"a.txt{suffix}") == documents
    (tmp_path / "a.jsonl").write_text(json_lines([{"text": "a\r\n<|endoftext|>\r\nb"}]))
    assert texts_of(tmp_path / "a.jsonl") == ["a\r\n<|endoftext|>\r\nb"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "bom utf-16-be", "bom utf-16-le"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".tsv", ".txt.gz", ".jsonl.zst"])
def test_a_bom_is_no_text(tmp_path, encoding, suffix):
    """Guards files from Windows, in every format of text."""
    text = "naïve 日本語 😀\u2028"
    content = {
        ".txt": text, ".jsonl": json_lines([{"id": 1, "text": text}]), ".json": json.dumps([{"text": text}], indent=1),
        ".csv": f'text,id\r\n"{text}",1\r\n', ".tsv": f"text\tid\n{text}\t1\n",
    }[sources.text_format(f"a{suffix}")]  # fmt: skip
    data = content.encode(encoding) if "bom" not in encoding else ("\ufeff" + content).encode(encoding[4:])
    pack = {"gz": gzip.compress, "zst": zstd}.get(suffix.split(".")[-1], bytes)
    (tmp_path / f"a{suffix}").write_bytes(pack(data))
    assert texts_of(tmp_path / f"a{suffix}") == [text]


RUSSIAN = "Жила-была лиса, она бежала и бежала, а потом уснула под старым деревом.\n" * 5
CHINESE = "从前有一只狐狸，它跑啊跑，然后在老树下睡着了。\n" * 5
FRENCH = "Il était une fois un renard naïf à Noël; señor, Straße.\n" * 5
ENCODED = {
    "ISO-8859-1": FRENCH.encode("latin-1"),
    "WINDOWS-1252": ("“It’s” a fox — " + FRENCH).encode("cp1252"),
    "WINDOWS-1251": RUSSIAN.encode("cp1251"),
    "KOI8-R": RUSSIAN.encode("koi8-r"),
    "GB18030": CHINESE.encode("gbk"),
    "SHIFT_JIS": ("昔々、キツネがいました。走って走って、そして古い木の下で眠りました。\n" * 5).encode("shift_jis"),
    "UTF-16LE": RUSSIAN.encode("utf-16-le"),
    "UTF-16BE": FRENCH.encode("utf-16-be"),
    "UTF-32": RUSSIAN.encode("utf-32"),
}


@pytest.mark.parametrize("name", ENCODED)
def test_another_encoding_is_named_with_the_command_that_converts_it(tmp_path, main, name):
    """Guards the advice: the command must give the text, also for a path with spaces and for a late character."""
    path = tmp_path / "my texts.txt"
    path.write_bytes(ENCODED[name])
    code, _, err = run(main, tmp_path, path)
    command = err.split("`")[1]
    assert (
        code == 2 and err.count("\n") == 1 and f"seems to be {name})" in err and f"iconv -f {name} -t UTF-8" in command
    )
    if os.path.exists("/usr/bin/iconv"):
        assert os.system(command) == 0
        converted = (tmp_path / "my texts.utf8.txt").read_text(encoding="utf-8")
        codec = {"GB18030": "gbk"}.get(name, name)
        assert converted.removeprefix("\ufeff") == ENCODED[name].decode(codec)


def test_a_damaged_character_and_binary_data_are_told_apart(tmp_path, main):
    """Guards the advice for a UTF-8 file with a bad byte, for a cut one, for a compressed one and for a picture."""
    text = (CHINESE * 500).encode()
    for name, data, part in [
        ("bad.txt", text[:30_000] + b"\xff" + text[30_000:], "iconv -c -f UTF-8"),
        ("cut.txt", text[:-2], "iconv -c -f UTF-8"),
        ("late.txt", b"plain text\n" * 9999 + FRENCH.encode("latin-1"), "iconv -f ISO-8859-1"),
        ("end.txt", b"plain text\n" * 9999 + b"caf\xe9", "iconv -f ISO-8859-1"),
        ("a.csv", b"text\n" + ENCODED["WINDOWS-1251"], "iconv -f WINDOWS-1251"),
        ("a.jsonl", b'{"text": "' + ENCODED["WINDOWS-1251"].replace(b"\n", b"") + b'"}', "iconv -f WINDOWS-1251"),
        ("a.txt.gz", gzip.compress(ENCODED["WINDOWS-1251"]), f"gzip -dc {tmp_path}/a.txt.gz | iconv -f WINDOWS-1251"),
        ("a.png.txt", b"\x89PNG\r\n\x1a\n" + random.Random(0).randbytes(3000), "binary data"),
        ("zeros.txt", bytes(3000), "binary data"),
    ]:
        (tmp_path / name).write_bytes(data)
        code, _, err = run(main, tmp_path, tmp_path / name)
        assert code == 2 and err.count("\n") == 1 and part in err and name in err


# --- folders ----------------------------------------------------------------------------------------------------------


def test_links_capitals_and_metadata_in_a_folder(tmp_path, capsys):
    """Guards against a corpus of which a part is silently missing, and against metadata taken for documents."""
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    (corpus / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    for path, text in {"A.TXT": "A", "b.Json": '["B"]', "c.JSONL.GZ": "", "sub/d.txt": "D", "m.txt/e.txt": "E"}.items():
        (corpus / path).parent.mkdir(exist_ok=True)
        (corpus / path).write_bytes(gzip.compress(b'{"text": "C"}') if path == "c.JSONL.GZ" else text.encode())
    (elsewhere / "x.txt").write_text("X")
    for link, target in {
        "linked": elsewhere, "again": elsewhere, "loop": corpus, "sub/up": "..", "a_sub": "sub",
        "y.txt": elsewhere / "x.txt", "gone.txt": "nowhere", "self": "self",
    }.items():  # fmt: skip
        (corpus / link).symlink_to(target)
    for name in ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "manifest.json"):
        (corpus / "sub" / name).write_text('{"text": "metadata"}')
    os.mkfifo(corpus / "pipe.txt")
    # "again" and "linked" are one folder, which is read once; a folder keeps its own name
    assert texts_of(corpus) == ["A", "X", "B", "C", "E", "D", "X"]
    warned = capsys.readouterr().err
    assert f"{corpus}/gone.txt is skipped" in warned and f"{corpus}/pipe.txt is skipped" in warned


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_arrow_files_are_read(tmp_path, new, kind):
    """Guards folders of save_to_disk, whose only .json files are metadata, in both forms of the format."""
    table = pa.table({"id": range(20), "text": pa.array(STORIES).cast(kind)})
    for index in range(2):
        with new(str(tmp_path / f"data-0000{index}-of-00002.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    (tmp_path / "cache-0123.arrow").write_bytes(b"what `datasets` keeps of a map")
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00002.arrow"}]}')
    (tmp_path / "dataset_info.json").write_text('{"features": {"text": {"dtype": "string"}}}')
    assert texts_of(tmp_path) == STORIES * 2


def test_save_to_disk_itself(tmp_path):
    """Guards the files that today's `datasets` writes, with several shards and null rows."""
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"text": [*STORIES, None], "id": [*range(21)]})
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved", num_shards={"train": 2})
    tally = sources.Tally()
    assert texts_of(tmp_path / "saved", tally) == STORIES and tally.skipped["row"] == 1


# --- rows -------------------------------------------------------------------------------------------------------------


def write_rows(path, rows, column="text"):
    """Write rows of texts, of which None has none, in the format of the path's suffix."""
    table = pa.table({"id": range(len(rows)), column: pa.array(rows, pa.string())})
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path, row_group_size=5, write_statistics="none" not in path.name)
    elif path.suffix == ".arrow":
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([["id", column], *enumerate(rows)])
    else:
        data = json_lines([{"id": i, column: text} for i, text in enumerate(rows)])
        path.write_bytes(zstd(data.encode()) if path.suffix == ".zst" else data.encode())
    return path


FORMATS = ["a.parquet", "none.parquet", "a.arrow", "a.csv", "a.tsv", "a.jsonl", "a.json", "a.jsonl.zst", "A.JSONL"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_null_row_is_skipped_counted_and_reported(tmp_path, main, name):
    """Guards jobs of hours against a single null. The warning comes once; too many nulls are a wrong source."""
    rows = [*STORIES[:7], None, *STORIES[7:], None]
    code, out, err = run(main, tmp_path, write_rows(tmp_path / name, rows))
    assert code == 0 and "20 documents" in out, err
    assert err.startswith("warning: skipped 2 of 22 rows (") and err.count("\n") == 1 and name in err
    expected = [token for text in STORIES for token in (256, *text.encode())]
    assert stream_of(tmp_path / "out").tolist() == expected
    assert texts_of(write_rows(tmp_path / name, [None, "a text"] * 10)) == ["a text"] * 10
    most = write_rows(tmp_path / name, [None, *["a text", None] * 10])
    with pytest.raises(
        UserError, match=f"{name}: .* has no string named `text`.*, like 11 of the 21 rows: .*--text_col"
    ):
        texts_of(most)


def test_most_rows_without_text_end_a_long_source_early():
    """Guards hours of reading with a wrong --text_column: the count must not wait for the end."""
    tally = sources.Tally("body")
    endless = ({"text": "a"} for _ in iter(int, 1))
    with pytest.raises(UserError, match="row 1 has no string named `body`.*it has text.*10,000 of the 10,000 rows"):
        list(sources.require_texts(endless, "a.jsonl", tally))


def test_empty_files_are_skipped_and_an_empty_string_is_a_document(tmp_path, main):
    """Guards a shelf of books with one empty file, in each way in which a file can be empty."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    empty = {"a.txt": b"", "b.txt": b"\xef\xbb\xbf", "c.jsonl": b"\n\n", "d.json": b"[]", "e.csv": b"text,id\n",
             "f.tsv": b"", "g.parquet": b"", "h.txt": b"<|endoftext|>\r\n", "i.txt.gz": gzip.compress(b""),
             "j.arrow": b"", "k.txt.zst": zstd(b"")}  # fmt: skip
    for name, data in empty.items():
        (corpus / name).write_bytes(data)
    pa.parquet.write_table(pa.table({"text": pa.array([], pa.string())}), corpus / "l.parquet")
    for name in [*empty, "l.parquet"]:
        code, _, err = run(main, tmp_path, corpus / name)
        assert (code, err) == (2, f"error: {corpus / name} is empty: check --source\n")
    for index, story in enumerate(STORIES[:12]):
        write_rows(corpus / f"m{index}.jsonl", [story, ""])
    code, out, err = run(main, tmp_path, corpus)
    assert code == 0 and "24 documents" in out
    assert err == f"warning: skipped 12 of 24 files ({corpus / 'a.txt'} is empty)\n"


@pytest.mark.parametrize("name", FORMATS)
def test_a_text_column_of_another_name(tmp_path, main, name):
    """Guards corpora such as code datasets with `content`. Another column is another setting of the folder."""
    path = write_rows(tmp_path / name, STORIES, "content")
    code, _, err = run(main, tmp_path, path)
    assert code == 2 and err.count("\n") == 1 and "`text` (it has id, content)" in err and "--text_column" in err
    code, out, err = run(main, tmp_path, path, "--text_column", "content")
    assert (code, err) == (0, "") and read_manifest(tmp_path / "out")["text_column"] == "content"
    assert "is complete" in run(main, tmp_path, path, "--text-column", "content")[1]
    (tmp_path / "out" / "edufineweb_train_000001.npy").unlink()
    with pytest.raises(UserError, match="run `python fineweb.py --source .* --text_column content --out_dir"):
        find_shards(tmp_path / "out", "train")
    if name == "a.csv":
        code, _, err = run(main, tmp_path, path, "--text_column", "id")
        assert code == 2 and "other settings (text_column content)" in err


@pytest.mark.parametrize(
    "content, expected",
    [
        (["a", "b"], ["a", "b"]),
        ({"data": [{"text": "a"}, {"text": "b"}]}, ["a", "b"]),
        ({"version": "1", "tags": ["x"], "data": [{"text": "a"}, {"text": "b"}]}, ["a", "b"]),
        ({"data": ["a", "b"]}, ["a", "b"]),
        ({"text": ["a", "b"], "id": [1, 2]}, ["a", "b"]),
        ({"text": "a", "tags": ["x"]}, ["a"]),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_forms_of_json(tmp_path, content, expected, indent):
    """Guards files that people have: arrays of strings, and rows inside an object."""
    (tmp_path / "a.json").write_text(json.dumps(content, indent=indent))
    assert texts_of(tmp_path / "a.json") == expected


@pytest.mark.parametrize(
    "content", ['{"a": 1}', '{"a": ["x"], "b": ["y"]}', "7", '"a"', "null", "[1, 2]", "[[1], [2]]"]
)
def test_json_without_rows_is_named(tmp_path, content):
    """Guards against a traceback, or against strings that are not documents."""
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match="a.json: row 1 has no string named `text`"):
        texts_of(tmp_path / "a.json")


def test_csv_is_read_as_spreadsheets_write_it(tmp_path):
    """Guards quoted commas, quotes and line ends, blank lines, lines of another length, and long fields."""
    rows = [["a, b", "1"], ['say "hi"\r\nthere', "2"], ["long " * 100_000, "3"], ["<|endoftext|>", "4"]]
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text", "id"], *rows[:2], [], ["cut"], *rows[2:]])
    assert texts_of(tmp_path / "a.csv") == [row[0] for row in rows]
    (tmp_path / "mac.csv").write_bytes(b"id,text\r1,a\r2,b\r")
    assert texts_of(tmp_path / "mac.csv") == ["a", "b"]
    (tmp_path / "quote.csv").write_text('text\nfine\n"never closed\n')
    with pytest.raises(UserError, match="quote.csv cannot be read after row 1 .unexpected end of data"):
        texts_of(tmp_path / "quote.csv")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.int64(), pa.list_(pa.string())])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_column_of_another_type_is_named(tmp_path, kind, suffix):
    """Guards the advice: a binary column is not a damaged row."""
    value = {"int64": 1, "list<element: string>": ["a"], "list<item: string>": ["a"]}.get(str(kind), b"a")
    table = pa.table({"text": pa.array([value] * 3, kind)})
    if suffix == ".parquet":
        pa.parquet.write_table(table, tmp_path / "a.parquet")
    else:
        with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
            writer.write_table(table)
    fix = "save its texts as strings" if "binary" in str(kind) else "check --source"
    with pytest.raises(UserError, match=f"a{suffix} has a column `text` of .*, not of strings: {fix}.*--text_column"):
        texts_of(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.jsonl.zst", "a.txt.gz", "a.arrow"])
def test_a_git_lfs_pointer_is_named(tmp_path, main, name):
    """Guards a clone without git-lfs, whose pointer was a damaged file, or even the text."""
    (tmp_path / name).write_bytes(POINTER)
    for source in (tmp_path / name, tmp_path):
        code, _, err = run(main, tmp_path, source)
        assert code == 2 and err.count("\n") == 1 and f"{tmp_path / name} is a git-lfs pointer" in err
        assert f"`git -C {tmp_path} lfs pull`" in err
    for shard in ("a_val_000000.npy", "a_train_000001.bin"):
        (tmp_path / shard).write_bytes(POINTER)
        with pytest.raises(UserError, match=f"{shard} is a git-lfs pointer, not the file itself: run `git"):
            open_shard(tmp_path / shard)


def test_printed_commands_quote_their_paths(tmp_path, main):
    """Guards commands that are copied into a shell: a space in a path must not make two arguments of it."""
    source, out = write_rows(tmp_path / "my rows.jsonl", STORIES, "the text"), tmp_path / "my data"
    prepare(str(source), out, "bytes", shard_tokens=700, workers=1, text_column="the text")
    (out / "edufineweb_train_000001.npy").unlink()
    with pytest.raises(UserError) as caught:
        find_shards(out, "train")
    program, *flags = shlex.split(str(caught.value).split("`")[1])[1:]
    assert program == "fineweb.py" and main(fineweb, flags)[0] == 0 and find_shards(out, "train")
    with pytest.raises(UserError) as caught:
        find_shards(tmp_path / "no data", "train")
    commands = str(caught.value).split("`")
    assert shlex.split(commands[1]) == ["python", "fineweb.py", "--out_dir", str(tmp_path / "no data")]
    (tmp_path / "my lfs").mkdir()
    (tmp_path / "my lfs" / "a.txt").write_bytes(POINTER)
    err = run(main, tmp_path, tmp_path / "my lfs")[2]
    assert shlex.split(err.split("`")[1]) == ["git", "-C", str(tmp_path / "my lfs"), "lfs", "pull"]


# --- damage -----------------------------------------------------------------------------------------------------------


def odd_inputs(folder):
    """Write some sixty damaged or odd inputs into a folder, and return their paths. They are the same in every run."""
    folder.mkdir()
    write = lambda name, data: (folder / name).write_bytes(data)  # noqa: E731
    rows = json_lines([{"text": story} for story in STORIES]).encode()
    for suffix in (".parquet", ".arrow"):
        data = write_rows(folder / f"whole{suffix}", STORIES * 3).read_bytes()
        for cut in (1, 9, len(data) // 2, len(data) - 5):
            write(f"cut {cut}{suffix}", data[:cut])
        for place in (0, 5, 300, len(data) // 2, len(data) - 40, len(data) - 6):
            write(f"flipped {place}{suffix}", data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        write(f"text{suffix}", rows)
        pa.parquet.write_table(pa.table({}), folder / "no columns.parquet")
    for suffix, pack in ((".jsonl.gz", gzip.compress), (".txt.zst", zstd), (".csv.zst", zstd), (".jsonl.zst", zstd)):
        data = pack(rows)
        for cut in (0, 3, len(data) // 2, len(data) - 3):
            write(f"cut {cut}{suffix}", data[:cut])
        write(f"not packed{suffix}", rows)
        write(f"and more{suffix}", data + b"more")
    for index, line in enumerate(
        ["[" * 100_000, "{" * 9, "nan", "[NaN]", '{"text": ["a"]}', '{"text": 1e999}', '{"text": {"text": "a"}}',
         "1" * 5000, '{"text": "a"', '{"text": "\\ud83d"}', '{"text": "a\0b"}', "[]", "{}", '[{"text": "a"},]', "\0",
         "\ufeff", "text"]
    ):  # fmt: skip
        for suffix in (".json", ".jsonl", ".csv"):
            write(f"line {index}{suffix}", line.encode("utf-8"))
    chance = random.Random(0)
    for suffix in (".txt", ".csv", ".tsv", ".json", ".jsonl", ".TXT.GZ", ".parquet", ".arrow"):
        write(f"noise{suffix}", chance.randbytes(5000))
        write(f"nul{suffix}", b"a\0b" * 50)
        write(f"odd utf-16{suffix}", b"\xff\xfea\0b")
    (folder / "a folder.txt").mkdir()
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "loop.txt").symlink_to("loop.txt")
    (folder / "zero.txt").symlink_to("/dev/zero")
    (folder / "gone.txt").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as listener:
        place = os.getcwd()
        os.chdir(folder)  # a socket's path may have about 100 characters
        listener.bind("socket.txt")
        os.chdir(place)
    (folder / "x.bin").write_bytes(b"x")
    write(os.fsdecode(b"name \xff.txt"), b"a text")
    write("line\nend.txt", b"a text")
    paths = sorted(folder.iterdir())
    return [
        *map(str, paths),
        str(folder),
        f"{folder}/*",
        f"{folder}/c*",
        "",
        "~no-such-user/x",
        "x" * 5000,
        "a\0b",
        "/dev/zero",
        "[",
    ]


def test_no_damage_ends_in_a_traceback(tmp_path, main, monkeypatch):
    """Guards everybody whose input nobody thought of: the end is a corpus or a line that says what is wrong."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    codes = []
    for index, source in enumerate(odd_inputs(tmp_path / "odd")):
        flags = ["--encoding", "bytes", "--out_dir", tmp_path / f"out{index}", "--shard_tokens", 2000, "--workers", 1]
        code, _, err = main(fineweb, [f"--source={source}", *flags])
        lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
        assert code in (0, 2) and (code == 0) == (not lines), (source, code, err)
        assert len(lines) <= 1 + source.count("\n") and all(line.startswith("error: ") for line in lines), (source, err)
        codes.append(code)
    assert len(codes) > 100 and codes.count(0) > 5
