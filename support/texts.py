"""
One file to texts: decompress it, decode it, and take the documents out of its format.

Each reader yields a str for a document, and anything else for a row that has none. A long .txt is one document in
several pieces, so that memory stays small and every worker has work. It is cut only where GPT-2's pattern always cuts,
therefore its tokens are those of the whole text.
"""

import codecs
import csv
import gzip
import io
import json
import os
import re
import shlex
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from support.common import UserError

BINARY = (".parquet", ".arrow")
SUFFIXES = (*BINARY, ".jsonl", ".json", ".csv", ".tsv", ".txt")  # .gz or .zst may follow
SPACES = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # whitespace in GPT-2's pattern
LETTERS = r"0-9A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"  # letters and numbers in any Unicode version
MARKS = r"!-/:;=-@\u3001\u3002\uff01\uff0c\uff1f"  # neither, also in any; without < because SEPARATOR starts with it
# No match of GPT-2's pattern has whitespace after another character, or a mark after a letter or number. So its matches
# before such a place are the same whatever follows, and the next match starts there. This finds the last such place.
CUT = re.compile(rf".*(?:[^{SPACES}](?=[{SPACES}])|[{LETTERS}](?=[{MARKS}]))", re.DOTALL)
# A line between two documents of a .txt. The plain characters come first, which makes the search 14 times as fast.
SEPARATOR = re.compile(r"<\|endoftext\|>(?<=^<\|endoftext\|>)(?:\n|\Z)", re.MULTILINE)
FIELD_CHARACTERS = 2**26  # of a csv field; a quote that is never closed would read the rest of the file
CONTROLS = bytes([*range(9), *range(14, 32)])  # control characters that texts do not have
# The encodings to guess, by their names for iconv. If several fit equally well, the first is taken.
ENCODINGS = (
    "ISO-8859-1 WINDOWS-1252 SHIFT_JIS GB18030 BIG5 EUC-JP CP949 WINDOWS-1251 KOI8-R CP1250 "
    "CP1253 CP1254 CP1255 CP1256 UTF-16 UTF-16LE UTF-16BE UTF-32 UTF-32LE UTF-32BE"
).split()


class Rest(str):
    """A piece of a document other than its first, so no <|endoftext|> precedes it."""


# --- files ------------------------------------------------------------------------------------------------------------


def text_format(path: str | Path) -> str:
    """Return the suffix in lower case without .gz or .zst: ".txt" for both a.TXT and a.txt.gz."""
    return Path(re.sub(r"\.(gz|zst)$", "", str(path).lower())).suffix


def open_file(path: str) -> io.IOBase:
    """Open a file for reading bytes, local or on the Hub, whose library repeats requests that fail."""
    if not path.startswith("hf://"):
        return open(path, "rb")
    from huggingface_hub import HfFileSystem

    if text_format(path) == ".parquet":  # read in many places, so a cache would fetch more than is needed
        return HfFileSystem().open(path, cache_type="none")
    return HfFileSystem().open(path, block_size=2**24)


@contextmanager
def open_text(path: str) -> Iterator[io.TextIOWrapper]:
    """Open a text file, which may be compressed. Line ends are kept. UTF-8 may have a BOM, and UTF-16 needs one.

    Raises UnicodeDecodeError for UTF-16 without a BOM, which may be valid UTF-8 with many control characters.
    """
    with open_file(path) as file:
        if path.lower().endswith(".gz"):
            file = gzip.open(file)
        elif path.lower().endswith(".zst"):
            import pyarrow

            file = pyarrow.CompressedInputStream(file, "zstd")
        with io.BufferedReader(file, 2**20) as buffered:
            start, kind = buffered.peek(2**13), text_format(path)
            if kind in (".json", ".jsonl"):  # whose first two characters are ASCII, so this is certain
                encoding, errors = json.detect_encoding(start[:4]), "surrogatepass"
            else:
                is_utf16 = start.startswith((b"\xff\xfe", b"\xfe\xff")) and start[2:4] != b"\0\0"
                encoding, errors = "utf-16" if is_utf16 else "utf-8-sig", "strict"
                if not is_utf16 and 4 * len(start.translate(None, CONTROLS)) < 3 * len(start):
                    raise UnicodeDecodeError("utf-8", start, 0, 1, "many control characters")
            encoding = "utf-8-sig" if encoding == "utf-8" else encoding
            yield io.TextIOWrapper(buffered, encoding, errors, newline="" if kind in (".csv", ".tsv") else "\n")


def encoding_error(path: str, error: UnicodeDecodeError) -> UserError:
    """Return the error for a file that is not UTF-8. It names the encoding that the file seems to have."""
    sample = error.object[max(0, error.start - 2**14) : error.start + 2**14]
    if len(sample) < 4 and Path(path).suffix.lower() in SUFFIXES and Path(path).exists():
        with open(path, "rb") as file:  # at the end of a file the decoder has only the last bytes
            file.seek(max(0, os.path.getsize(path) - 2**14))
            sample = file.read()
    option, name = guess_encoding(sample)
    if name is None:
        return UserError(f"{path} cannot be read as UTF-8 (it seems to hold binary data): check --source")
    what = "UTF-8 with damaged characters" if option else name
    source, suffix = shlex.quote(path), re.search(r"(\.gz|\.zst)?$", path.lower())[0]
    unpack = {".gz": f"gzip -dc {source} | ", ".zst": f"zstd -dc {source} | "}.get(suffix, "")
    new = Path(path[: len(path) - len(suffix)])
    target = shlex.quote(str(new.with_name(f"{new.stem}.utf8{new.suffix}")))
    command = f"{unpack}iconv {option}-f {name} -t UTF-8 {'' if unpack else source + ' '}> {target}"
    return UserError(f"{path} cannot be read as UTF-8 (it seems to be {what}): run `{command}` and use that file")


def guess_encoding(sample: bytes) -> tuple[str, str | None]:
    """Return a flag for iconv and its name of the likely encoding of a text that is not UTF-8 (None: it is no text)."""
    from charset_normalizer import from_bytes  # comes with tiktoken

    replaced = [character for character in sample.decode("utf-8", "replace") if character > "\x7f"]
    if 2 * replaced.count("\ufffd") < len(replaced):
        return "-c ", "UTF-8"  # most is valid: -c leaves out what is not
    if not (matches := list(from_bytes(sample, cp_isolation=ENCODINGS))):
        return "", None
    best = [m for m in matches if (m.chaos, m.coherence) == (matches[0].chaos, matches[0].coherence)]
    fitting = {codecs.lookup(fit).name for match in best for fit in match.could_be_from_charset}
    return "", next((name for name in ENCODINGS if codecs.lookup(name).name in fitting), None)


def decode_prompt(data: bytes, path: str) -> str:
    """Return a prompt in UTF-8, or in UTF-16 or UTF-32 with a byte order mark, without the mark and carriage returns.

    path: - for standard input. Raises UserError, which says how to convert the file.
    """
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
             codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
    kind = next((kind for mark, kind in marks.items() if data.startswith(mark)), "utf-8-sig")
    try:
        if kind == "utf-8-sig" and b"\0" in data:
            raise UnicodeDecodeError("utf-8", data, 0, 1, "a zero byte")
        return plain_prompt(data.decode(kind))
    except UnicodeDecodeError as error:
        option, name = guess_encoding(data)
        wrong = f"--prompt_file {path} is not UTF-8 text"
        if name is None:
            raise UserError(f"{wrong}: it seems to be no text at all: give another file") from error
        target = "" if path == "-" else f" {shlex.quote(path)} > {shlex.quote(f'{path}.utf8')}"
        command = f"iconv {option}-f {name} -t UTF-8{target}"
        raise UserError(f"{wrong}: it seems to be {name}: convert it with {command}") from error


def plain_prompt(text: str) -> str:
    """Return a prompt without a byte order mark and carriage returns, which would become tokens."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


# --- formats ----------------------------------------------------------------------------------------------------------


def file_texts(path: str, column: str, size: int) -> Iterator:
    """Yield the `column` of each row of a file, or the documents of a .txt, in pieces of about `size` characters."""
    # `datasets` is not used: its JSON reader turns the text "2024-01-01" into a date, and fails at a lone surrogate.
    kind = text_format(path)
    if kind == ".arrow":
        yield from arrow_texts(path, column)
        return
    with open_text(path) as file:
        if kind == ".txt":
            yield from text_pieces(file, size)
        elif kind in (".csv", ".tsv"):
            yield from csv_texts(path, file, column, "\t" if kind == ".tsv" else ",")
        else:
            for row in json_rows(file, column, kind):
                yield row.get(column, row) if isinstance(row, dict) else None


def text_pieces(file: io.TextIOBase, size: int) -> Iterator[str]:
    r"""Yield the documents of a text, of which a long one is a str and then Rests. \r\n becomes \n."""
    kind, buffer = str, ""
    while chunk := file.read(max(size, len(buffer))):  # a buffer that has no place to cut doubles
        while chunk.endswith(("\r", ">")) and (following := file.read(1)):  # part of a \r\n or a SEPARATOR
            chunk += following
        chunk = chunk.replace("\r\n", "\n")
        buffer += chunk
        *documents, buffer = SEPARATOR.split(buffer)
        for document in documents:
            if document:
                yield kind(document)
            kind = str
        if len(buffer) >= size and (cut := CUT.match(buffer, max(0, len(buffer) - len(chunk) - 1))):
            yield kind(buffer[: cut.end()])
            kind, buffer = Rest, buffer[cut.end() :]
    if buffer:
        yield kind(buffer)


def json_rows(file: io.TextIOBase, column: str, kind: str) -> Iterator:
    """Yield the rows of a file with one row per line, or of a .json file that is one array or an object around one."""
    lines = (line for line in file if not line.isspace())
    if (first := next(lines, None)) is None:
        return
    try:
        row = json.loads(first)
    except ValueError:
        if kind != ".json":
            raise
        row = json.loads(first + file.read())  # a value over several lines
    if isinstance(row, dict) and isinstance(row.get(column), str):  # rows per line, as the others may be
        yield row
    elif (second := next(lines, None)) is None:
        rows = row if isinstance(row, list) else inner_rows(row, column) if kind == ".json" else [row]
        yield from ({column: text} if isinstance(text, str) and text is not row else text for text in rows)
    else:
        yield row
        yield json.loads(second)
    yield from map(json.loads, lines)


def inner_rows(row: object, column: str) -> list:
    """Return the rows in an object such as {"data": [{"text": …}, …]} or {"text": ["…", …]}; otherwise [row]."""
    values = row.items() if isinstance(row, dict) else ()
    lists = [value for name, value in values if isinstance(value, list) and (len(row) == 1 or name == column)]
    lists = lists or [v for _, v in values if isinstance(v, list) and v and isinstance(v[0], dict) and column in v[0]]
    return lists[0] if len(lists) == 1 else [row]


def csv_texts(path: str, file: io.TextIOBase, column: str, delimiter: str) -> Iterator[str | None]:
    """Yield a column of a .csv or .tsv file with a header. Raises UserError if it has no such column.

    A row that is empty there, or that has more or fewer fields than the header, has no text.
    """
    csv.field_size_limit(FIELD_CHARACTERS)
    rows = csv.reader(file, delimiter=delimiter, strict=True)
    names = next(filter(None, rows), None)
    if names is None:
        return
    require_column(path, names, column)
    index = names.index(column)
    for row in filter(None, rows):  # a blank line is []
        yield row[index] or None if len(row) == len(names) else None


def arrow_texts(path: str, column: str) -> Iterator[str | None]:
    """Yield a column of an Arrow file or stream, such as save_to_disk of `datasets` writes. Raises UserError."""
    import pyarrow

    with open_file(path) if path.startswith("hf://") else pyarrow.memory_map(path) as file:
        is_stream = file.read(6) != b"ARROW1"
        file.seek(0)
        reader = pyarrow.ipc.open_stream(file) if is_stream else pyarrow.ipc.open_file(file)
        check_column(path, reader.schema, column)
        for batch in reader if is_stream else map(reader.get_batch, range(reader.num_record_batches)):
            for start in range(0, batch.num_rows, 64):
                yield from batch.column(column).slice(start, 64).to_pylist()


def require_column(path: str, names: list[str], column: str) -> None:
    """Raise UserError if a file has no such column."""
    if column not in names:
        fix = "name the column of the texts with --text_column"
        raise UserError(f"{path} has no column `{column}` (it has {list_names(names)}): {fix}")


def list_names(names: Iterable) -> str:
    """Return names for a message: on one line, and not too many."""
    return textwrap.shorten(", ".join(map(str, names)), 200, placeholder=" …") or "none"


def check_column(path: str, schema, column: str) -> None:
    """Raise UserError if an Arrow schema has no such column of strings. All of its values may be null."""
    from pyarrow import types

    require_column(path, schema.names, column)
    kind = schema.field(column).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if not any(test(value) for test in tests):
        fix = "check --source, or name another column with --text_column"
        if "binary" in str(value):
            fix = "save its texts as strings, or name another column with --text_column"
        raise UserError(f"{path} has a column `{column}` of {kind}, not of strings: {fix}")
