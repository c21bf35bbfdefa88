"""Tokenizers: of any model, as functions; of a prompt; whether they fit the shards; and as files of a checkpoint."""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from support.common import UserError, lfs_message, one_line, warn
from support.texts import decode_prompt, plain_prompt

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
GPT2_IDS = range(50257, 51201)  # of an embedding for GPT-2's 50,257 ids: exact, with a few more, or padded up to 1,024


def import_transformers():
    """Import transformers and make it print errors only. The import takes seconds, so it happens on first use."""
    # transformers imports torchao if it is installed. torchao warns that GPU kernels for other machines do not load.
    for name in ("huggingface_hub", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    return transformers


def has_tokenizer(name: str) -> bool:
    """Return whether a model brings a tokenizer: a Hub name, or a folder with one of TOKENIZER_FILES."""
    return not os.path.exists(name) or any(os.path.exists(os.path.join(name, file)) for file in TOKENIZER_FILES)


def load_tokenizer(name: str, vocab_size: int, flag: str = "--model") -> tuple[Callable, Callable]:
    """Load the tokenizer of a model as (encode, decode); encode adds no special tokens, decode skips unknown ids.

    A folder or file without a tokenizer and with GPT2_IDS ids uses GPT-2's tokenizer.
    Raises UserError if the tokenizer cannot be loaded, and in encode if an id is not in the model's vocabulary.
    """
    try:
        if has_tokenizer(name):
            tokenizer = import_transformers().AutoTokenizer.from_pretrained(name)
            ids_of, decode = (lambda text: tokenizer.encode(text, add_special_tokens=False)), tokenizer.decode
        elif vocab_size not in GPT2_IDS:
            raise UserError(f"it has no tokenizer files, and its {vocab_size:,} ids are not GPT-2's 50,257")
        else:
            from fineweb import get_encoding

            encoding = get_encoding("gpt2")
            ids_of = lambda text: encode_prompt(text, encoding)  # noqa: E731
            decode = lambda ids: decode_known(ids, encoding)  # noqa: E731
        decode(ids_of("a"))  # settings of a wrong type fail only when they are used
    except Exception as error:  # from a broken file, the Hub or the download of GPT-2's vocabulary
        reason = one_line(error).rstrip(".")
        fix = "put the tokenizer files of the model into its folder, or give another model"
        if message := lfs_message(name):
            reason, _, fix = message.partition(": ")
        raise UserError(f"the tokenizer of {flag} {name} cannot be opened: {reason}: {fix}") from error

    def encode(text):
        ids = ids_of(text)
        if ids and max(ids) >= vocab_size:
            reason = f"gives the id {max(ids)}, but the model has only {vocab_size} ids"
            raise UserError(f"the tokenizer of {flag} {name} {reason}: give another text, or resize its embedding")
        return ids

    return encode, decode


class GrowingText:
    """The text of ids that come one after another. Each call of `add` decodes only the last ids, not all of them."""

    def __init__(self, decode: Callable):
        self.decode, self.ids, self.start, self.end = decode, [], 0, 0

    def add(self, ids: list[int], last: bool = False) -> str:
        """Return the text that ids add. A character comes when all its bytes are here, or with the last ids.

        The ids before are decoded with them, because some tokenizers write a word differently at the start of a text.
        """
        self.ids = self.ids[self.start :] + ids  # the text of self.ids[: self.end] was returned before
        self.start, self.end = 0, self.end - self.start
        before, text = self.decode(self.ids[: self.end]), self.decode(self.ids)
        if not last and (len(text) <= len(before) or text.endswith("\ufffd")):
            return ""
        self.start, self.end = self.end, len(self.ids)
        return text[len(before) :]


def read_prompt(prompt: str, path: str | None) -> str:
    """Return the prompt, or the text of a file if path is given (- is standard input). Raises UserError."""
    source = "--prompt" if path is None else f"--prompt_file {path}"
    try:
        if path is not None:
            data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
            prompt = decode_prompt(data, path).removesuffix("\n")  # editors and echo add the last one
        prompt = plain_prompt(prompt)
        prompt.encode()  # raises if the shell passed bytes that are not text
    except UnicodeError:
        raise UserError(f"{source} is not UTF-8 text: convert it to UTF-8") from None
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror}): give another file") from error
    if not prompt:
        raise UserError(f"{source} is empty, but samples need a beginning: give some text")
    return prompt


def encode_prompt(text: str, encoding) -> list[int]:
    """Return the ids of a text in which <|endoftext|> is one id, as everywhere in a prompt."""
    from fineweb import END_OF_TEXT, encode_text

    first, *others = (encode_text(part, encoding).tolist() for part in text.split(END_OF_TEXT))
    return first + [i for ids in others for i in (encoding.eot_token, *ids)]


def decode_known(ids: list[int], encoding) -> str:
    """Return the text of ids. An id beyond the encoding has none: a model may have more ids than its tokenizer."""
    return encoding.decode([i for i in ids if i < encoding.n_vocab])


def model_encoding(name: str, vocab_size: int, candidates: list[str]) -> str | None:
    """Return which of our encodings has the ids of the model --init_from, or None if it has other ids.

    candidates: names of encodings, in the order in which they are tried. Raises UserError for a broken tokenizer.
    """
    from fineweb import get_encoding

    sizes = {"gpt2": GPT2_IDS[0], "bytes": 257}
    encode = None
    try:
        if has_tokenizer(name):
            encode, _ = load_tokenizer(name, vocab_size, "--init_from")
    except UserError as error:
        if os.path.exists(name):
            raise
        warn(f"{error}. Its ids are taken for GPT-2's")  # a Hub model's weights may be cached without its tokenizer
    if encode is None:
        return "gpt2" if vocab_size in GPT2_IDS else "bytes" if vocab_size == sizes["bytes"] else None
    for candidate in candidates:
        if vocab_size >= sizes[candidate] and same_ids(encode, get_encoding(candidate)):
            return candidate
    return None


def same_ids(encode: Callable, encoding) -> bool:
    """Return whether a tokenizer gives the ids of an encoding, for a text that contains nearly every token."""
    tokens = (encoding.decode([i]) for i in range(encoding.n_vocab - 1))
    lines = [token for token in tokens if "\ufffd" not in token and token.strip() and token.strip().isprintable()]
    # It starts with a space, because some tokenizers add one. The last lines need bytes, merges and several spaces.
    lines = [" the", *lines, "Não está à venda, señor: 7 € für 12345 日本語 🙂", "", "    if x:", "\treturn 'don't'  "]
    text = "\n".join(lines)
    return list(encode(text)) == encoding.encode_ordinary(text)


def save_tokenizer(encoding, folder: Path, model_max_length: int) -> None:
    """Write a tiktoken encoding as the tokenizer files of a folder, which transformers.AutoTokenizer then opens.

    That tokenizer gives the same ids as `encoding`, except that <|endoftext|> in a text becomes the special token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # GPT-2's alphabet for tokens: a printable byte is its own character, the other bytes are numbered from 256.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(unprintable)}

    def spell(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    ids = [i for i in range(encoding.n_vocab) if not encoding.is_special_token(i)]
    ranks = {encoding.decode_single_token_bytes(i): i for i in ids}
    merges = [tuple(map(spell, last_merge(token, ranks))) for token in ranks if len(token) > 1]
    tokenizer = Tokenizer(models.BPE(vocab={spell(token): i for token, i in ranks.items()}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(merges))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    tokenizer.save(str(Path(folder, "tokenizer.json")))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # uses tokenizer.json without changes
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,  # otherwise decoding drops the space in " ,"
    }
    Path(folder, "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens that byte-pair encoding merges last to form `token`. It merges the lowest rank first."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
