import gc
import math
import weakref
from dataclasses import replace

import pytest
import tiktoken
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import support.loss
import train_gpt2
from support.common import UserError
from train_gpt2 import GPT, PRESETS, GPTConfig, KVCache, TrainConfig, configure_optimizers

TINY = GPTConfig(block_size=64, vocab_size=1000, n_layer=2, n_head=4, n_embd=32)


@pytest.fixture(scope="module")
def gpt2():
    """GPT-2 124M at its initialization."""
    torch.manual_seed(1337)
    return GPT(GPTConfig())


def hugging_face_twin(folder, seed=0, **shape):
    """A random GPT2LMHeadModel, far enough from its initialization for errors to show, and our reading of it."""
    torch.manual_seed(seed)
    theirs = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    theirs.save_pretrained(folder)
    return theirs, GPT.from_pretrained(folder).eval()


def largest_difference(ours, theirs, T, vocab_size):
    ids = torch.randint(0, vocab_size, (2, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return (ours(ids)[0] - theirs(ids).logits).abs().max().item()


def test_initialization_of_124M(gpt2):
    """A wrong shape, tie or init scale shows in the parameter count and in the loss before training."""
    assert gpt2.num_params() == 124_439_808
    assert gpt2.transformer.wte.weight is gpt2.lm_head.weight and gpt2.lm_head.weight.shape == (50304, 768)
    ids = torch.randint(0, 50257, (4, 65), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, loss = gpt2(ids[:, :-1], ids[:, 1:])
    assert logits is None and 0 < loss.item() - math.log(50257) < 0.35
    block = gpt2.transformer.h[5]
    for residual in (block.attn.c_proj, block.mlp.c_proj):
        assert residual.weight.std().item() == pytest.approx(0.02 / math.sqrt(24), rel=0.02)
    for matrix in (block.attn.c_attn, block.mlp.c_fc, gpt2.transformer.wte, gpt2.transformer.wpe):
        assert matrix.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.attn.c_attn.bias.abs().max() == 0


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_equal_to_hugging_face(name, tmp_path):
    """Logits and greedy text must be those of GPT2LMHeadModel with the same weights, at each size's heads."""
    heads = PRESETS[name][0].n_head
    assert PRESETS[name][0].n_embd == heads * 64
    shape = {"n_layer": 3, "n_head": heads, "n_embd": heads * 8, "n_positions": 128, "vocab_size": 999}
    theirs, ours = hugging_face_twin(tmp_path, **shape)
    assert largest_difference(ours, theirs, 128, 999) <= 1e-4
    prompt = torch.tensor([[5, 17, 998]])
    expected = theirs.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ours.generate(prompt, 40, temperature=0).tolist() == expected.tolist()


@pytest.mark.slow
def test_124M_equal_to_hugging_face(tmp_path):
    """The full size opens in transformers and computes the same there, both ways."""
    theirs, ours = hugging_face_twin(tmp_path / "theirs")
    assert ours.config == GPTConfig() and ours.num_params() == 124_439_808
    assert largest_difference(ours, theirs, 64, 50257) <= 1e-4
    prompt = torch.tensor([[15496, 11, 314, 1101]])
    expected = theirs.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ours.generate(prompt, 20, temperature=0).tolist() == expected.tolist()
    ours.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_state_dict_names(gpt2):
    """Others load our weights by the lecture's names."""
    names = gpt2.state_dict().keys()
    assert {"transformer.wte.weight", "transformer.h.0.attn.c_attn.weight", "lm_head.weight"} <= names
    assert len(names) == 4 + 12 * 12 + 1


def test_from_pretrained_refuses_what_is_not_gpt2(tmp_path):
    """Another architecture, a different activation, lacking weights or no folder at all: one line, not wrong logits."""
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 8, "vocab_size": 10}
    GPT2LMHeadModel(GPT2Config(**shape, activation_function="relu")).save_pretrained(tmp_path / "relu")
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    lacking = GPT2LMHeadModel(GPT2Config(**shape))
    state = {k: v for k, v in lacking.state_dict().items() if k != "transformer.h.0.mlp.c_fc.weight"}
    lacking.save_pretrained(tmp_path / "lacking", state_dict=state)
    whole = GPT2LMHeadModel(GPT2Config(**shape))
    whole.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    whole.save_pretrained(tmp_path / "longer")
    config = tmp_path / "longer" / "config.json"
    config.write_text(config.read_text().replace('"n_positions": 8', '"n_positions": 9'))
    reasons = {"relu": "activation", "llama": "llama", "lacking": "c_fc", "cut": "cut", "longer": "wpe", "none": "none"}
    for folder, reason in reasons.items():
        with pytest.raises(UserError, match=reason) as error:
            GPT.from_pretrained(str(tmp_path / folder))
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_overfits_one_batch_of_shakespeare(shared_data):
    """The lecture's first check of training: 50 AdamW steps at 3e-4 take one small batch from about 11 to under 1."""
    torch.manual_seed(1337)
    model = GPT(GPTConfig())
    text = (shared_data / "text" / "tinyshakespeare.txt").read_text()[:1000]
    tokens = torch.tensor(tiktoken.get_encoding("gpt2").encode_ordinary(text)[: 4 * 32 + 1])
    x, y = tokens[:-1].view(4, 32), tokens[1:].view(4, 32)
    (optimizer,) = configure_optimizers(model, TrainConfig(lr=3e-4))
    losses = []
    for _ in range(50):
        _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert 10.5 < losses[0] < 11.5 and losses[-1] < 1


def test_flash_and_explicit_attention_agree():
    """The readable attention is the same function as the fused one, with and without a mask, forward and backward."""
    torch.manual_seed(0)
    fused, explicit = GPT(TINY), GPT(GPTConfig(**{**vars(TINY), "flash": False}))
    explicit.load_state_dict(fused.state_dict())
    ids = torch.randint(0, 1000, (2, 48))
    mask = torch.rand(2, 1, 48, 48) < 0.5
    mask |= torch.eye(48, dtype=torch.bool)
    for arguments in ((ids,), (ids, torch.arange(48).flip(0), mask)):
        results = [model.head(model.trunk(*arguments)) for model in (fused, explicit)]
        torch.testing.assert_close(*results, rtol=0, atol=1e-5)
        gradients = [
            torch.autograd.grad(logits.logsumexp(-1).sum(), model.transformer.wpe.weight)[0]
            for model, logits in zip((fused, explicit), results)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flash", [True, False])
def test_dropout_is_where_hugging_face_has_it(flash, tmp_path):
    """Same seed, same masks: in training every logit is GPT2LMHeadModel's with the config that we write; then none."""
    torch.manual_seed(0)
    ours = GPT(replace(TINY, flash=flash, dropout=0.3))
    ours.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager").train()
    ids, logits = torch.randint(0, 1000, (2, 48)), []
    with torch.no_grad():
        for model in (ours, theirs):
            torch.manual_seed(1)
            logits.append(model(ids)[0] if model is ours else model(ids).logits)
        torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
        plain = GPT.from_pretrained(tmp_path, flash=flash)(ids)[0]
        assert (plain - logits[0]).abs().max() > 0.1 and torch.equal(plain, ours.eval()(ids)[0])


@pytest.mark.parametrize("flash", [True, False])
def test_the_future_is_invisible(flash):
    """A later token must never change an earlier logit."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**vars(TINY), "flash": flash}))
    ids = torch.randint(0, 1000, (1, 64))
    changed = ids.clone()
    changed[0, 40] = (changed[0, 40] + 1) % 1000
    before, after = model(ids)[0], model(changed)[0]
    assert torch.equal(before[:, :40], after[:, :40]) and not torch.equal(before[:, 40:], after[:, 40:])


def test_padding_ids_do_not_exist():
    """The original can sample ids past the vocabulary; here their weights, however large, change nothing at all."""
    torch.manual_seed(0)
    model = GPT(TINY)
    ids = torch.randint(0, 1000, (2, 33))
    before = model(ids[:, :-1], ids[:, 1:])[1].item()
    with torch.no_grad():
        model.lm_head.weight[1000:] = 100.0
    assert model(ids)[0].shape == (2, 33, 1000)
    loss = model(ids[:, :-1], ids[:, 1:])[1]
    assert loss.item() == before
    loss.backward()
    assert model.lm_head.weight.grad[1000:].abs().max() == 0
    assert model.generate(ids, 200, temperature=100.0, top_k=None).max() < 1000


def test_generate():
    """Sampling repeats with its generator, keeps the prompt, draws only from the top k, and runs past block_size."""
    torch.manual_seed(0)
    model = GPT(TINY)
    with torch.no_grad():
        model.transformer.wpe.weight.normal_(std=1.0)  # or a tied, untrained model repeats its last token
    prompt = torch.randint(0, 1000, (3, 5))
    samples = [model.generate(prompt, 100, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])
    assert samples[0].shape == (3, 105) and torch.equal(samples[0][:, :5], prompt)
    for t in range(5, 60):
        top = model(samples[0][:, :t])[0][:, -1].topk(50).indices
        assert (top == samples[0][:, t : t + 1]).any(dim=1).all()
    assert torch.equal(model.generate(prompt, 20, top_k=1), model.generate(prompt, 20, temperature=0))
    assert torch.equal(model.generate(prompt, 20, temperature=1e-40), model.generate(prompt, 20, temperature=0))
    assert torch.equal(model.generate(prompt, 0), prompt)
    for wrong in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(ValueError, match="generate needs"):
            model.generate(prompt, 1, **wrong)
    with pytest.raises(ValueError, match="block_size 64"):
        model(torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.parametrize("flash", [True, False])
def test_cached_text_is_the_uncached_text(flash):
    """Guards the KV cache: positions, masks, rows and the window that moves past block_size, greedy and drawn."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**vars(TINY), "flash": flash}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model.transformer.wpe.weight.normal_(std=1.0)  # or a tied, untrained model repeats its last token
    for T in (1, 5, 64, 70):
        prompt = torch.randint(0, 1000, (3, T))
        greedy, drawn, rng = prompt, prompt, torch.Generator().manual_seed(7)
        for _ in range(80):
            greedy = torch.cat((greedy, model(greedy[:, -64:])[0][:, -1].argmax(-1, keepdim=True)), dim=1)
            likeliest, ids = model(drawn[:, -64:])[0][:, -1].topk(20)
            choice = torch.multinomial(F.softmax(likeliest / 0.8, dim=-1), 1, generator=rng)
            drawn = torch.cat((drawn, ids.gather(1, choice)), dim=1)
        assert greedy.unique().numel() > 20
        assert torch.equal(model.generate(prompt, 80, temperature=0), greedy)
        again = model.generate(prompt, 80, temperature=0.8, top_k=20, generator=torch.Generator().manual_seed(7))
        assert torch.equal(again, drawn)


def test_a_token_is_read_once(monkeypatch):
    """Guards the cost of a new token, which must not grow with what is there, nor memory with what is not asked for."""
    model, read = GPT(TINY), []
    model.transformer.wte.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].size(1)))
    model.generate(torch.zeros(2, 10, dtype=torch.long), 54)
    assert read == [10] + 53 * [1]
    sizes = []
    monkeypatch.setattr(train_gpt2, "KVCache", lambda N: sizes.append(N) or KVCache(N))
    model.generate(torch.zeros(2, 10, dtype=torch.long), 6)
    assert sizes == [16, 16]
    cache = KVCache(20)
    for T in (7, 1):
        keys, values = cache.append(torch.zeros(2, 4, T, 8), torch.ones(2, 4, T, 8))
    assert keys.shape == values.shape == (2, 4, 8, 8) and cache.keys.shape == (2, 4, 20, 8)
    assert keys.max() == 0 and values.min() == 1


def test_top_p_draws_from_the_likeliest(monkeypatch):
    """Of ids with probabilities 0.4, 0.3, 0.2 and 0.1, top_p 0.6 leaves the two whose sum reaches it, as they were."""
    model = GPT(TINY)
    probabilities = torch.full((1000,), 1e-9)
    probabilities[[3, 8, 500, 7]] = torch.tensor([0.2, 0.4, 0.1, 0.3])
    monkeypatch.setattr(model, "head", lambda states: probabilities.log().expand(len(states), -1))
    prompt = torch.zeros(4000, 1, dtype=torch.long)

    def shares(**options):
        drawn = model.generate(prompt, 1, generator=torch.Generator().manual_seed(0), **options)[:, 1]
        return {id: (drawn == id).float().mean().item() for id in drawn.unique().tolist()}

    assert shares(top_p=0.6) == pytest.approx({8: 4 / 7, 7: 3 / 7}, abs=0.03)
    assert shares(top_p=0.4).keys() == {8}
    assert shares(top_p=0.95).keys() == {8, 7, 3, 500}
    assert shares(top_p=0.8, top_k=3) == pytest.approx({8: 4 / 9, 7: 3 / 9, 3: 2 / 9}, abs=0.03)


def test_loss_ignores_filled_rows():
    """The last validation batch is filled up with -100: those targets count neither in the sum nor in the mean."""
    torch.manual_seed(0)
    model = GPT(TINY)
    ids = torch.randint(0, 1000, (4, 33))
    x, y = ids[:, :-1], ids[:, 1:].clone()
    y[3:] = -100
    torch.testing.assert_close(model(x, y)[1], model(x[:3], y[:3])[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_in_chunks_is_the_plain_loss(dtype, monkeypatch):
    """Guards the gradients that the loss computes by itself, its padding, its ignored targets and its last chunk."""
    monkeypatch.setattr(support.loss, "CHUNK", 50)  # 4 * 32 targets are two chunks and a part of one
    torch.manual_seed(0)
    model = GPT(TINY)
    ids = torch.randint(0, 1000, (4, 33))
    x, y = ids[:, :-1], ids[:, 1:].clone()
    y[2:, 20:] = -100
    losses, gradients = [], []
    for plain in (True, False):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(x)[0].flatten(0, 1).float(), y.flatten()) if plain else model(x, y)[1]
        (3 * loss).backward()  # as a scaler does
        losses.append(loss.detach())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad(set_to_none=True)
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], atol=2e-6, rtol=0)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02  # bfloat16 keeps 8 bits
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() <= tolerance * expected.norm(), name
    with torch.no_grad():
        torch.testing.assert_close(model(x, y)[1], losses[0], atol=2e-6 if dtype == torch.float32 else 1e-2, rtol=0)


def test_a_model_is_freed_with_its_last_reference():
    """Guards the memory of a sharded run, which gathers a whole model for each save."""
    gc.disable()
    try:
        model = GPT(TINY)
        model.compile_training(trunk=True)
        reference = weakref.ref(model)
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_the_loss_in_float16_holds_sums_over_many_tokens():
    """No loss scale divides the product that gives the embedding's gradient: one frequent token made it infinite."""
    torch.manual_seed(0)
    states = torch.full((4096, 8), 60.0, requires_grad=True)
    weight = torch.zeros(128, 8, requires_grad=True)
    targets = torch.zeros(4096, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.float16):
        support.loss.cross_entropy(states, weight, targets, 128).backward()
    expected = 60 * (1 / 128 - 1)  # mean over the tokens of state * (softmax - onehot)
    torch.testing.assert_close(weight.grad[0], torch.full((8,), expected), rtol=2e-3, atol=0)


def test_loss_keeps_no_logits(monkeypatch):
    """Guards the memory of a training step: of all that waits for the backward pass, nothing is as wide as the ids."""
    monkeypatch.setattr(support.loss, "CHUNK", 50)
    model, widths = GPT(TINY), []
    ids = torch.randint(0, 1000, (4, 33))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: widths.append(t.shape) or t, lambda t: t):
        model(ids[:, :-1], ids[:, 1:])
    assert widths and not any(shape[-1:] in [(1000,), (1024,)] for shape in widths)
