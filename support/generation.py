"""Parts of text generation: the cache of what was read, the choice of the next token, and weights that multiply fast.

A new token of one sequence multiplies every weight matrix by a single vector, so its time is the time to read the
weights. `prepare` therefore stores them in fewer bytes and in the order in which the processor reads them.
"""

import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.common import pick_dtype

# steps of FBGEMM's inputs, from 0 to the largest: so that two products fit in 16 bits, as older processors add them
STEPS = 63
FBGEMM_ROWS = 64  # vectors of a product; the time of more grows faster than their number
INT8_ROWS = 16  # up to this many vectors, the int8 kernel is the fastest; above, a product with dequantized weights is


class KVCache:
    """The keys and values of the tokens that a layer's attention has already read, at most N of them."""

    def __init__(self, N):
        self.N, self.length, self.keys, self.values = N, 0, None, None

    def append(self, k, v):
        """Store the keys and values of T more tokens, each (B, nh, T, hs), and return those of all tokens so far."""
        if self.keys is None:
            B, nh, _, hs = k.shape
            self.keys, self.values = k.new_empty(B, nh, self.N, hs), v.new_empty(B, nh, self.N, hs)
        first, self.length = self.length, self.length + k.size(2)
        self.keys[:, :, first : self.length] = k
        self.values[:, :, first : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


def pick_next_id(logits, temperature, top_k, top_p, generator):
    """Return the next id (B, 1) of each row of logits (B, V): see GPT.generate."""
    likeliest, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # (B, k), sorted
    if temperature == 0:
        return ids[:, :1]
    probabilities = F.softmax(likeliest / max(temperature, 1e-6), dim=-1)  # less than 1e-6 could overflow
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # total probability of the likelier ids
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    return ids.gather(1, torch.multinomial(probabilities, 1, generator=generator))


def can_pack(device, dtype):
    """Return whether oneDNN is here and can put weights of this dtype into its own order, which is faster."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_acl_supported():
        return False  # ACL is for ARM processors, where this was not measured
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class CastLinear(nn.Module):
    """A linear layer with weights of a float dtype, which its inputs are converted to. On a CPU, oneDNN packs them.

    rows: the number of vectors that are usually multiplied at once. oneDNN chooses the order of the weights for it.
    """

    def __init__(self, weight, bias, dtype, rows):
        super().__init__()
        self.dtype, self.packed = dtype, can_pack(weight.device, dtype)
        weight = weight.to(dtype)
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(weight, rows) if self.packed else weight)
        self.register_buffer("bias", None if bias is None else bias.to(dtype))
        # looked up once, because that takes 6 us
        self.multiply = torch.ops.mkldnn._linear_pointwise.default if self.packed else None

    def forward(self, x):
        x = x.to(self.dtype)
        if self.packed:  # attention to one new token is several times slower in bfloat16
            return self.multiply(x, self.weight, self.bias, "none", [], "").float()
        return F.linear(x, self.weight, self.bias)


def quantize(weight, dtype):
    """Return weight (out, in) as int8 (out, in) and a scale of dtype for each output (out): it is about int8 * scale.

    The largest weight of an output becomes about 127 or -127. The error of a weight is at most half of the scale.
    """
    scale = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(dtype).tiny).to(dtype)  # 0 would give 0 / 0
    steps = weight / scale[:, None].float()  # by the rounded scale, so that its rounding causes no further error
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def has_fbgemm(weight):
    """Return whether FBGEMM, a library for x86 processors, can multiply int8 weights here. torch has deprecated it."""
    has_kernel = hasattr(torch, "fbgemm_linear_int8_weight_fp32_activation")
    is_built = "fbgemm" in torch.backends.quantized.supported_engines
    return weight.device.type == "cpu" and weight.size(1) > 1 and has_kernel and is_built


class FBGEMMLinear(nn.Module):
    """A linear layer with int8 weights for x86 processors, with float32 inputs and outputs.

    FBGEMM multiplies int8 by int8, as fast as it can read the weights. So that 8 bits of the inputs suffice, each
    vector becomes two: in steps of 1/63 of its largest element, and the remainder, in steps 126 times finer. The two
    are rows of one product. This is more exact than bfloat16, until one element of a vector is about forty times as
    large as the others. All inputs must be finite.
    """

    def __init__(self, weight, bias):
        super().__init__()
        weight, scale = quantize(weight, torch.float32)
        self.register_buffer("weight", weight[:1, :1].clone().expand(weight.shape))  # only its shape is read
        self.register_buffer("sums", weight.sum(dim=1, dtype=torch.int32))
        self.register_buffer("scale", scale / STEPS)
        self.register_buffer("bias", torch.zeros(len(weight)) if bias is None else bias)
        self.register_buffer("no_bias", torch.zeros(len(weight)))
        # FBGEMM rounds its inputs to 255 steps between the least and the largest. With this row a step is 1.
        self.register_buffer("range", torch.zeros(1, weight.size(1)))
        self.range[0, 0], self.range[0, 1] = 191, -64
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated: see has_fbgemm
            self.packed = torch.fbgemm_pack_quantized_matrix(weight)
            self(torch.zeros(1, weight.size(1)))  # warns once, here

    def forward(self, x):
        rows = x.reshape(-1, x.size(-1))
        few = len(rows) <= FBGEMM_ROWS
        y = self.product(rows) if few else torch.cat([self.product(part) for part in rows.split(FBGEMM_ROWS)])
        return y.view(*x.shape[:-1], len(self.bias))

    def product(self, x):
        """Multiply vectors x (n, in). Return (n, out)."""
        n, largest = len(x), torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).clamp_(min=1e-30)
        x = x * (STEPS / largest)
        coarse = x.round()
        fine = x.sub_(coarse).mul_(2 * STEPS)  # at most half a step, so now at most 63, too
        y = torch.fbgemm_linear_int8_weight_fp32_activation(
            torch.cat((coarse, fine, self.range)), self.weight, self.packed, self.sums, 1.0, 0, self.no_bias
        )
        return torch.addcmul(self.bias, y[:n].add_(y[n : 2 * n], alpha=0.5 / STEPS), largest * self.scale)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights. It converts its inputs to a float dtype, which its outputs have."""

    def __init__(self, weight, bias, dtype):
        super().__init__()
        weight, scale = quantize(weight, dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.to(dtype))
        self.has_kernel = weight.device.type == "cpu" and weight.size(1) % 32 == 0  # other sizes give wrong products

    def forward(self, x):
        rows = x.flatten(0, -2).to(self.scale.dtype)
        if self.has_kernel and rows.size(0) <= INT8_ROWS:
            y = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)
        else:  # many rows: converting the weights takes less time than the product
            y = F.linear(rows, self.weight.to(rows.dtype)) * self.scale
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


@torch.no_grad()
def prepare(gpt, dtype, rows=1):
    """Replace the linear layers of a GPT by faster ones with weights of a dtype, which cannot be trained.

    dtype: the name of a float type, or int8. rows: the number of sequences that are usually generated together.
    The embeddings, the normalizations and the sums between the layers keep their dtype.
    """
    table = gpt.lm_head.weight.detach()
    old_gpu = pick_dtype("auto", table.device.type) == torch.float16
    activations = torch.float32 if old_gpu else torch.bfloat16  # of int8: sums of int8 weights overflow float16

    def fast(weight, bias=None):
        if dtype == "int8" and has_fbgemm(weight):
            return FBGEMMLinear(weight.detach(), bias)
        if dtype == "int8":
            return Int8Linear(weight.detach(), bias, activations)
        return CastLinear(weight.detach(), bias, getattr(torch, dtype), rows)

    for block in gpt.transformer.h:
        for part, name in ((block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")):
            linear = getattr(part, name)
            setattr(part, name, fast(linear.weight, linear.bias.detach()))
    if dtype != "float32":
        # The logits of GPT-2 are near -100, where the numbers of bfloat16 are 0.5 apart. Without the mean row they are
        # near 0, where they are closer. This adds the same number to all logits of a token: the softmax stays the same.
        table = table - table[: gpt.config.vocab_size].mean(dim=0)
    bias = None
    if dtype == "int8":  # its rounding would change the logits of all positions by the same amount: this undoes that
        steps, scale = quantize(table, torch.float32 if has_fbgemm(table) else activations)
        bias = (table - steps * scale[:, None].float()) @ gpt.transformer.ln_f.bias
    gpt.lm_head = fast(table, bias)
