"""Weights of other dtypes (--dtype), and text that is decoded while it grows."""

import copy
import random

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from helpers import save_model

import fineweb
import sample
from support import generation
from support.generation import FBGEMM_ROWS, INT8_ROWS, FBGEMMLinear, Int8Linear, prepare, quantize
from support.tokenizer import GrowingText
from train_gpt2 import GPT, GPTConfig

SMALL = GPTConfig(block_size=64, vocab_size=257, n_layer=2, n_head=4, n_embd=64)
DTYPES = ("float32", "bfloat16", "int8")


@pytest.fixture(scope="module")
def text_ids(shared_data):
    """Real text as bytes: sequences of 65 ids."""
    text = (shared_data / "text" / "tinyshakespeare.txt").read_bytes()[:520_000]
    return torch.tensor(list(text)).view(-1, 65)


@pytest.fixture(scope="module")
def trained(text_ids):
    """A small model that has learned some of the text."""
    torch.manual_seed(0)
    gpt = GPT(SMALL)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    for rows in text_ids[:3200].split(16):
        gpt(rows[:, :-1], rows[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return gpt.eval()


def prepared(gpt, dtype, rows=1):
    gpt = copy.deepcopy(gpt)
    prepare(gpt, dtype, rows)
    return gpt


@torch.no_grad()
def loss_of(gpt, rows):
    """Return the mean loss from the logits that generation uses."""
    return F.cross_entropy(gpt(rows[:, :-1])[0].flatten(0, 1).float(), rows[:, 1:].flatten()).item()


def test_the_error_of_int8_weights():
    """It is at most half a step, for an output with small weights and for one with only zeros, too."""
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 2, 96)[:, None]
    weight[7] = 0
    quantized, scale = quantize(weight, torch.bfloat16)
    scale = scale.float()
    error = (quantized * scale[:, None] - weight).abs()
    assert quantized.dtype == torch.int8 and (quantized.abs().amax(1)[torch.arange(96) != 7] >= 126).all()
    assert (error <= scale[:, None] * 0.5001).all() and (error[7] == 0).all()
    assert error.norm() > 0.1 * scale.norm()  # weights between the steps are rounded


@pytest.mark.parametrize("shape", [(96, 64), (24, 64), (20, 12), (128, 33)])
def test_int8_products(shape):
    """One row, several and many give the product with the rounded weights, for sizes that have no kernel as well."""
    torch.manual_seed(0)
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    quantized, scale = quantize(weight, torch.bfloat16)
    layer = Int8Linear(weight, bias, torch.bfloat16)
    for size in ((1,), (1, 1), (2, 5), (4, INT8_ROWS)):
        x = torch.randn(*size, shape[1])
        expected = F.linear(x, quantized * scale[:, None].float(), bias)
        assert layer(x).shape == expected.shape
        assert (layer(x).float() - expected).norm() < 0.01 * expected.norm()


needs_fbgemm = pytest.mark.skipif(not generation.has_fbgemm(torch.zeros(1, 2)), reason="torch has no FBGEMM here")


@needs_fbgemm
@pytest.mark.parametrize("shape", [(96, 64), (24, 64), (20, 12), (128, 33), (3, 2)])
def test_fbgemm_products(shape):
    """The product with the rounded weights, more exact than bfloat16: one vector, several, many, and unlike ones."""
    torch.manual_seed(0)
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    quantized, scale = quantize(weight, torch.float32)
    layer = FBGEMMLinear(weight, bias)
    for size in ((), (1,), (1, 1), (0, 4), (2, 5), (3, FBGEMM_ROWS)):
        x = torch.randn(*size, shape[1])
        x *= torch.logspace(-3, 3, x.shape[:-1].numel()).view(*size, 1)  # no vector suffers from a larger one beside it
        weights = quantized * scale[:, None]
        expected, rounded = F.linear(x, weights), F.linear(x.bfloat16().float(), weights)
        found = layer(x) - bias
        assert found.shape == expected.shape
        limit = (rounded - expected).norm(dim=-1) if shape[1] > 32 else 2e-3 * x.norm(dim=-1) * weights.norm()
        assert ((found - expected).norm(dim=-1) <= limit + 1e-6 * bias.norm()).all()
    assert layer(torch.zeros(2, shape[1])).equal(bias.expand(2, -1))


@needs_fbgemm
@pytest.mark.parametrize("outlier, better", [(10, True), (300, False)])
def test_fbgemm_products_with_an_outlier(outlier, better):
    """One element that is much larger than the others costs exactness, as the class says."""
    torch.manual_seed(0)
    weight, x = torch.randn(256, 768), torch.randn(20, 768)
    weight[:, 5], x[:, 5] = weight[:, 5] / 1000, outlier
    quantized, scale = quantize(weight, torch.float32)
    weights = quantized * scale[:, None]
    expected, rounded = F.linear(x, weights), F.linear(x.bfloat16().float(), weights)
    error = (FBGEMMLinear(weight, None)(x) - expected).norm()
    assert (error < (rounded - expected).norm()) == better and error < 0.02 * expected.norm()


@needs_fbgemm
def test_sums_of_two_products_fit_in_16_bits():
    """Old processors add two products of an input (as 0 to 255) and a weight in 16 bits: the largest ones fit."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        kernel = torch.fbgemm_linear_int8_weight_fp32_activation
        layer = FBGEMMLinear(torch.randn(8, 64), None)
        patch.setattr(
            torch, "fbgemm_linear_int8_weight_fp32_activation", lambda x, *more: seen.append(x) or kernel(x, *more)
        )
        layer(torch.randn(5, 64))
    (rows,) = seen
    low, step = rows.min(), (rows.max() - rows.min()) / 255
    levels = ((rows[:-1] - low) / step).round()  # without the row that only sets the range
    assert step == 1 and levels.max() * 127 * 2 < 2**15 and levels.max() - levels.min() > 120


def test_int8_without_fbgemm(trained, text_ids, monkeypatch):
    """Other processors, and a torch that has removed it, use torch's other kernel."""
    monkeypatch.delattr(torch, "fbgemm_linear_int8_weight_fp32_activation", raising=False)
    gpt = prepared(trained, "int8")
    assert isinstance(gpt.lm_head, Int8Linear)
    assert abs(loss_of(gpt, text_ids[5000:5400]) - loss_of(trained, text_ids[5000:5400])) < 0.001


def test_float32_chooses_the_same_ids(trained, text_ids):
    """Greedy samples are those of the plain model, for one sequence and for several, also past block_size."""
    for rows, prompt, tokens in ((1, 1, 80), (5, 20, 20), (1, 64, 3)):
        ids = text_ids[5000 : 5000 + rows, :prompt]
        expected = trained.generate(ids, tokens, temperature=0)
        assert prepared(trained, "float32", rows).generate(ids, tokens, temperature=0).equal(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_stays_the_same(trained, text_ids, dtype):
    """Within 0.001 nats on text that the model has not seen."""
    rows = text_ids[5000:5400]
    before = loss_of(trained, rows)
    assert before < 3.2  # it has learned: at random, 5.5
    assert abs(loss_of(prepared(trained, dtype), rows) - before) < (0.001 if dtype != "float32" else 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_logits_far_from_zero(trained, text_ids, dtype):
    """GPT-2's logits are near -100, which 16 bits cannot hold to less than 0.5. Here they are, too."""
    gpt, rows = copy.deepcopy(trained), text_ids[5000:5400]
    with torch.no_grad():
        gpt.transformer.wte.weight += 1.6  # no LayerNorm sees it
        gpt.transformer.ln_f.bias -= 1 + gpt.transformer.ln_f.bias.mean()
        assert gpt(rows[:8, :-1])[0].mean() < -80
    assert abs(loss_of(prepared(gpt, dtype), rows) - loss_of(gpt, rows)) < 0.001


def test_what_is_stored(trained):
    """int8 matrices, bfloat16 matrices, and embeddings that stay as they were."""
    for dtype in DTYPES:
        gpt = prepared(trained, dtype)
        for layer in (gpt.transformer.h[1].attn.c_attn, gpt.transformer.h[0].mlp.c_proj, gpt.lm_head):
            assert layer.weight.dtype == getattr(torch, dtype)
        assert gpt.transformer.wte.weight.equal(trained.transformer.wte.weight)
        assert len([*gpt.parameters()]) == 2 + 4 * SMALL.n_layer + 2  # embeddings and normalizations


def test_dtype_and_int8_in_sample(trained, main, tmp_path):
    """Each dtype gives samples, --int8 is --dtype int8, and auto is one of the others."""
    save_model(tmp_path, trained)
    flags = ["--model", tmp_path, "--max_new_tokens", 60, "--device", "cpu", "--prompt", "KING"]
    texts = {}
    for more in (*(("--dtype", dtype) for dtype in (*DTYPES, "auto")), ("--int8",), ()):
        code, texts[more], stderr = main(sample, [*flags, *more])
        assert (code, stderr) == (0, "") and texts[more].count("\nKING") == 4
    assert texts["--int8",] == texts["--dtype", "int8"] != texts["--dtype", "float32"]
    assert texts[()] == texts["--dtype", "auto"] in (texts["--dtype", "float32"], texts["--dtype", "bfloat16"])


def decoders(shared_data):
    """Return {name: (number of ids, decode)} of tokenizers that treat bytes and spaces differently."""
    words = {"▁the": 0, "▁quick": 1, "the": 2, "quick": 3, "##ly": 4, "▁": 5, "[UNK]": 6}
    result = {
        name: (fineweb.get_encoding(name).n_vocab, fineweb.get_encoding(name).decode) for name in ("gpt2", "bytes")
    }
    for kind in ("Metaspace", "WordPiece"):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
        tokenizer.decoder = getattr(tokenizers.decoders, kind)()
        result[kind] = len(words), tokenizer.decode
    return result


TEXT = "naïve 🙂👩‍👩‍👧 日本語の文章。中文字符 €5 <|endoftext|>  two  spaces\n\ttab Привет "


@pytest.mark.parametrize("name", ["gpt2", "bytes", "Metaspace", "WordPiece"])
def test_growing_text_equals_the_whole(name, shared_data):
    """Random ids, which are mostly no characters, and emoji and Chinese, which are several tokens each."""
    vocab_size, decode = decoders(shared_data)[name]
    draw = random.Random(0)
    cases = [[draw.randrange(vocab_size) for _ in range(draw.randrange(1, 60))] for _ in range(300)]
    if name in ("gpt2", "bytes"):
        cases.append(fineweb.get_encoding(name).encode_ordinary(TEXT))
    for ids in cases:
        prompt = draw.randrange(len(ids))
        text, shown = GrowingText(decode), ""
        for piece in (ids[:prompt], *([i] for i in ids[prompt:])):
            shown += text.add(piece)
            assert decode(ids).startswith(shown)  # no character is shown before it is complete
        assert shown + text.add([], last=True) == decode(ids)


def test_growing_text_decodes_little(shared_data):
    """A token costs the same at the end of a long text as at its beginning."""
    decoded = []
    encoding = fineweb.get_encoding("bytes")
    text = GrowingText(lambda ids: decoded.append(len(ids)) or encoding.decode(ids))
    for byte in (TEXT * 20).encode():
        text.add([byte])
    assert max(decoded) <= 8
