"""
Train a GPT-2 from scratch: one file, read from top to bottom.

    python train_gpt2.py --preset demo                        a small model, on a CPU, in two minutes
    python train_gpt2.py                                      GPT-2 124M on one GPU (first: python fineweb.py)
    torchrun --standalone --nproc_per_node=8 train_gpt2.py    the same run, the same batches, on eight
    python train_gpt2.py --resume                             go on where an interrupted run was, or start
    python train_gpt2.py --help                               every flag

or, from a notebook: from train_gpt2 import GPT, GPTConfig. Importing this file only defines things.
Exit codes: 2 for a mistake that a line on stderr names, 75 for a run that a signal stopped and --resume goes on with.

Shapes in the comments: B rows of a batch, T tokens of a row, C channels (n_embd), nh heads (n_head), hs head size
(C = nh * hs), V ids of the vocabulary.
"""

import argparse
import gc
import hashlib
import importlib.util
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fineweb
import hellaswag
from support import common
from support.checkpoints import list_checkpoints, newest_checkpoint, open_gpt2
from support.common import UserError

HERE = Path(__file__).resolve().parent


class ConfigError(UserError):
    """A user's mistake, said in lines that name the flag or file and what mends it. main() exits with code 2 on it."""


# --- configuration: every number of the recipe stands in these tables, with its source --------------------------------


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. The defaults are GPT-2 124M."""

    block_size: int = 1024  # positions: the longest sequence the model can read (GPT-2)
    vocab_size: tyro.conf.Suppress[int] = 50257  # true size; the last id is <|endoftext|>. A run takes it from the data
    n_layer: int = 12  # blocks (GPT-2)
    n_head: int = 12  # attention heads of a block (GPT-2)
    n_embd: int = 768  # channels (GPT-2)
    flash: bool = True  # fused attention kernel; off spells out the lower-triangular mask, for reading and timing
    dropout: float = 0.0  # share of activations zeroed in training, for text read many times over (GPT-1: 0.1)

    @property
    def padded_vocab_size(self):
        """Rows of the embedding: a multiple of 128, which matrix units like (50257 -> 50304)."""
        return -(-self.vocab_size // 128) * 128


@dataclass(frozen=True)
class TrainConfig:
    """A run. The defaults are the lecture's recipe; its numbers are the GPT-3 paper's (table 2.1, appendix B)."""

    preset: str = "gpt2"  # the set of defaults that the other flags override
    data_dir: str = str(fineweb.DATA_DIR)  # token shards, as fineweb.py writes them or as published .bin files
    out_dir: str = str(HERE / "log")  # where log.txt, curve.png and checkpoints/ go
    init_from: str | None = None  # Hugging Face name, model or output folder to train on from, with its own shape
    resume: bool = False  # go on from the newest checkpoint in out_dir, or start if there is none
    overwrite: bool = False  # delete the run that out_dir holds and start anew
    override: tuple[str, ...] = ()  # flags that a resumed run may change, such as max_steps or lr
    seed: int = 1337  # of the initialization and the shuffle (lecture)

    max_steps: int = 19073  # updates: 10B tokens, about one epoch of sample-10BT (lecture)
    total_batch_tokens: int = 524288  # tokens of an update over all processes: 2**19, about 0.5M (GPT-3)
    micro_batch: int | Literal["auto"] = (
        "auto"  # rows at a time; auto: what fits, up to 65,536 tokens on a GPU, else 4,096
    )
    auto_tokens: ClassVar[dict] = {"cuda": 65536, "cpu": 4096, "mps": 4096}  # of micro_batch auto (lecture: 64 x 1024)
    seq_len: int = 1024  # tokens of a row, at most block_size (GPT-2)
    shuffle: bool = True  # permute shards and rows anew in every epoch; off is the lecture's order

    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, with AdamW for the rest
    lr: float = 6e-4  # peak learning rate (GPT-3)
    schedule: Literal["cosine", "linear"] = "cosine"  # how the rate falls from the peak (GPT-3)
    min_lr_ratio: float = 0.1  # where it ends, as a share of the peak (GPT-3)
    warmup_steps: int = 715  # linear warmup: 375M tokens (GPT-3)
    weight_decay: float = 0.1  # on tensors of two dimensions and more only (GPT-3)
    grad_clip: float = 1.0  # largest norm of the whole gradient, 0 for no limit (GPT-3)
    betas: ClassVar[tuple[float, float]] = (0.9, 0.95)  # of AdamW (GPT-3)
    eps: ClassVar[float] = 1e-8  # of AdamW (GPT-3)
    max_skipped_steps: ClassVar[int] = 20  # in a row, for a loss or norm that is not finite; float16 may skip a few

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of autocast; auto: bfloat16 where it is native
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: wherever it works, but for mps
    fsdp: bool = False  # each process holds a share of weights, gradients and moments, not all of them (FSDP2)
    activation_checkpointing: bool = False  # compute each block again in the backward pass: slower, in less memory

    eval_interval: int = 250  # steps between evaluations (lecture)
    val_tokens: int = 10_485_760  # tokens of the validation loss, the same on every layout (modded-nanogpt)
    save_interval: int = 5000  # steps between checkpoints; the last step is always saved (lecture)
    keep_checkpoints: int = 5  # the newest so many stay (the lecture's run makes four)
    sample_interval: int = 250  # steps between samples, 0 for none (lecture)
    prompt: str = "Hello, I'm a language model,"  # what the samples begin with (lecture)
    num_samples: int = 4  # samples each time (lecture)
    max_new_tokens: int = 24  # tokens added to the prompt: 32 with the prompt's eight (lecture)
    sample_seed: ClassVar[int] = 42  # of the samples' own generator (lecture)
    hellaswag_file: str = str(hellaswag.FILE)  # downloaded if missing; none turns it off
    tracker: Literal["none", "wandb", "trackio"] = "none"  # gets log.txt's values too: pip install wandb or trackio


# GPT-2's paper gives shapes but no rates: the rates are those of GPT-3's models of about the same size. Where GPT-3
# alternates dense and sparse attention, ours is dense throughout. Our 1.3B has 16 heads of 128: the paper's table
# says 24, which does not divide 2048. All train on 10B tokens; for the paper's 300B: --max_steps 572205, 1.3B 286102.
PRESETS = {
    "gpt2": (GPTConfig(), TrainConfig()),
    # fewer tokens: a small model reaches "gpt2"'s loss in less than half of the tokens (benchmarks/results/recipes.md).
    # lr is a start, not measured at this size. There the best rate is two to eight times AdamW's, and Muon's updates
    # have the size of AdamW's at any width, so that a rate moves with AdamW's own: 6e-4, times four
    "gpt2-fast": (
        GPTConfig(),
        TrainConfig(
            preset="gpt2-fast", optimizer="muon", lr=2.4e-3, schedule="linear", min_lr_ratio=0.0,
            max_steps=9536, warmup_steps=358,
        ),
    ),
    "gpt2-medium": (
        GPTConfig(n_layer=24, n_head=16, n_embd=1024),
        TrainConfig(preset="gpt2-medium", lr=3e-4),
    ),
    "gpt2-large": (
        GPTConfig(n_layer=36, n_head=20, n_embd=1280),
        TrainConfig(preset="gpt2-large", lr=2.5e-4),
    ),
    "gpt2-xl": (
        GPTConfig(n_layer=48, n_head=25, n_embd=1600),
        TrainConfig(preset="gpt2-xl", lr=2e-4),
    ),
    "gpt3-125m": (
        GPTConfig(block_size=2048),
        TrainConfig(preset="gpt3-125m", seq_len=2048),
    ),
    "gpt3-350m": (
        GPTConfig(block_size=2048, n_layer=24, n_head=16, n_embd=1024),
        TrainConfig(preset="gpt3-350m", seq_len=2048, lr=3e-4),
    ),
    "gpt3-760m": (
        GPTConfig(block_size=2048, n_layer=24, n_head=16, n_embd=1536),
        TrainConfig(preset="gpt3-760m", seq_len=2048, lr=2.5e-4),
    ),
    "gpt3-1.3b": (
        GPTConfig(block_size=2048, n_layer=24, n_head=16, n_embd=2048),
        TrainConfig(
            preset="gpt3-1.3b", seq_len=2048, lr=2e-4,
            total_batch_tokens=1048576, max_steps=9537, warmup_steps=358,
        ),
    ),
    # chosen by measurement on two CPU cores (benchmarks/results/demo.md), where at this size the explicit attention is
    # the faster one, compiling takes longer than it saves, and many steps of a shallow model learn more than fewer of a
    # deep one
    "demo": (
        GPTConfig(block_size=128, vocab_size=257, n_layer=2, n_head=4, n_embd=128, flash=False),
        TrainConfig(
            preset="demo", data_dir=str(HERE / "demo" / "data"), out_dir=str(HERE / "demo" / "log"),
            max_steps=1700, total_batch_tokens=16 * 128, seq_len=128,
            optimizer="muon", lr=0.014, min_lr_ratio=0.0, warmup_steps=50,
            eval_interval=600, save_interval=600, sample_interval=600,
            prompt="\ndef ", num_samples=1, max_new_tokens=250, hellaswag_file="none", compile="off",
        ),
    ),
}  # fmt: skip
DEMO_SHARD_TOKENS = 250_000  # the first is for validation: 2% of the standard library


# --- the model --------------------------------------------------------------------------------------------------------


class KVCache:
    """What a layer's attention needs of the tokens already read: their keys and values, at most N positions of them."""

    def __init__(self, N):
        self.N, self.length, self.keys, self.values = N, 0, None, None

    def append(self, k, v):
        """Take in the (B, nh, T, hs) of T more tokens; return those of all tokens so far."""
        if self.keys is None:
            B, nh, _, hs = k.shape
            self.keys, self.values = k.new_empty(B, nh, self.N, hs), v.new_empty(B, nh, self.N, hs)
        first, self.length = self.length, self.length + k.size(2)
        self.keys[:, :, first : self.length] = k
        self.values[:, :, first : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value of all heads in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.c_proj.NANOGPT_SCALE_INIT = True
        self.n_head = config.n_head
        self.flash = config.flash
        self.dropout = config.dropout

    def forward(self, x, mask=None, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(k, v)
        causal = mask is None and T > 1  # a single token comes last, and may look at all
        dropout = self.dropout if self.training else 0.0
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        else:
            visible = torch.ones(T, k.size(2), dtype=torch.bool, device=x.device) if mask is None else mask
            visible = visible.tril() if causal else visible
            hidden = torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, float("-inf"))
            scores = q @ k.transpose(-2, -1) * k.size(-1) ** -0.5 + hidden  # (B, nh, T, T with the cache's)
            y = F.dropout(F.softmax(scores, dim=-1), dropout) @ v  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.c_proj(y)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        # FSDP gathers the weights in bfloat16, the residual stream is float32, and the kernel wants them to be alike
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")  # the approximation that GPT-2 was trained with
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.c_proj.NANOGPT_SCALE_INIT = True

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, mask=None, cache=None):
        x = x + self.drop(self.attn(self.ln_1(x), mask, cache))  # attention is where tokens talk to each other
        x = x + self.drop(self.mlp(self.ln_2(x)))  # the MLP is where each thinks for itself
        return x


HEAD_TOKENS = 4096  # whose logits exist at a time: 0.4 GB in bfloat16, and four times that what is made of them


def head_loss(states, weight, targets, vocab_size):
    """Mean cross entropy in nats of the logits states (N, C) @ weight.T at targets (N), those of -100 left out.

    The logits are by far the largest tensor of a training step, and autograd would keep all of them for the backward
    pass. But their gradient is known as soon as they are, softmax - onehot (Bridle 1990), so that each chunk of tokens
    is carried on to states and weight at once and forgotten.
    """
    device, count = states.device, (targets != -100).sum().clamp(min=1)
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else states.dtype
    constant_weight, constant_states = weight.detach().to(dtype), states.detach().to(dtype)
    ids = torch.arange(len(weight), device=device)
    loss, weight_grad, states_grads = 0.0, torch.zeros_like(weight, dtype=torch.float32), []
    for chunk, labels in zip(constant_states.split(HEAD_TOKENS), targets.split(HEAD_TOKENS)):
        logits = chunk @ constant_weight.t()  # (chunk, padded V)
        logits[:, vocab_size:] = float("-inf")  # the padding of the vocabulary does not exist
        log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        loss = loss + F.nll_loss(log_p, labels, reduction="sum")
        if torch.is_grad_enabled():
            onehot = (ids == labels[:, None]).to(dtype)
            logits_grad = log_p.exp_().sub_(onehot).mul_((labels != -100)[:, None]).to(dtype)
            states_grads.append(logits_grad @ constant_weight)
            weight_grad += logits_grad.t() @ chunk
            del onehot, logits_grad
        del logits, log_p  # before the next chunk's are made
    loss = loss / count
    if torch.is_grad_enabled():
        # of value 0, but with the gradients found above: what autograd sees of all this
        linear = ((states * torch.cat(states_grads)).sum() + (weight * weight_grad).sum()) / count
        loss = loss + (linear - linear.detach())
    return loss


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019), with the names of OpenAI's and Hugging Face's parameters."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd),
        ))  # fmt: skip
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # one tensor reads tokens and writes them (Press & Wolf 2017)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = 0.02
            if hasattr(module, "NANOGPT_SCALE_INIT"):
                # the residual stream sums two branches a block: this keeps its size the same at any depth (GPT-2, 2.3)
                std *= (2 * self.config.n_layer) ** -0.5
            nn.init.normal_(module.weight, mean=0.0, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def num_params(self):
        """Parameters, tied weights counted once and the padding of the vocabulary not at all: 124,439,808 for GPT-2."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return sum(p.numel() for p in self.parameters()) - padding

    def trunk(self, idx, position_ids=None, mask=None, caches=None):
        """The final states of the tokens, before the vocabulary.

        idx: (B, T) token ids. position_ids: (T) or (B, T), 0 … T-1 unless given. mask: boolean, broadcast to
        (B, nh, T, T), True where the row may look at the column; causal unless given. caches: a KVCache for each block,
        empty, or with the tokens before a single further one. Returns (B, T, C).
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size {self.config.block_size}")
        if position_ids is None:
            position_ids = torch.arange(T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(position_ids))  # (B, T, C)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for block, cache in zip(self.transformer.h, caches or [None] * self.config.n_layer):
            x = checkpoint(block, x, mask, use_reentrant=False) if recompute else block(x, mask, cache)
        return self.transformer.ln_f(x)

    def head(self, states):
        """Logits (..., V) of states (..., C), cropped to the true vocabulary: a padding id cannot be predicted."""
        return self.lm_head(states)[..., : self.config.vocab_size]

    def forward(self, idx, targets=None):
        """idx (B, T) -> (logits (B, T, V), None), or with targets (B, T) -> (None, loss).

        The loss is the mean cross entropy in nats over the targets that are not -100, in float32. No logits come with
        it: see head_loss.
        """
        states = self.trunk(idx)
        if targets is None:
            return self.head(states), None
        weight, vocab_size = self.lm_head.weight, self.config.vocab_size
        return None, head_loss(states.flatten(0, 1), weight, targets.flatten(), vocab_size)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=50, generator=None, top_p=1.0):
        """Continue each row of idx (B, T) by max_new_tokens sampled ids: returns (B, T + max_new_tokens).

        Only the top_k likeliest ids are drawn from (None for all), and of these only the likeliest that together have
        the probability top_p (Holtzman et al. 2020); temperature 0 takes the likeliest. generator: a torch.Generator on
        idx's device. Does not stop at <|endoftext|>; beyond block_size the oldest tokens go unread.
        """
        return torch.cat((idx, *self.stream(idx, max_new_tokens, temperature, top_k, generator, top_p)), dim=1)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=50, generator=None, top_p=1.0):
        """Yield the ids that generate appends, (B, 1) at a time, as they are drawn."""
        if temperature < 0 or (top_k is not None and top_k < 1) or not 0 < top_p <= 1 or idx.size(1) == 0:
            raise ValueError("generate needs a prompt, temperature >= 0, top_k >= 1 or None, and 0 < top_p <= 1")
        block_size, most_tokens = self.config.block_size, idx.size(1) + max_new_tokens
        caches = [KVCache(min(block_size, most_tokens)) for _ in self.transformer.h]
        for _ in range(max_new_tokens):
            T, read = idx.size(1), caches[0].length
            if T <= block_size:
                states = self.trunk(idx[:, read:], torch.arange(read, T, device=idx.device), caches=caches)
            else:  # the window moves on, and with it every token's position: nothing that was cached holds any more
                states = self.trunk(idx[:, -block_size:])
            logits = self.head(states[:, -1]).float()  # (B, V)
            likeliest, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # (B, k), sorted
            if temperature == 0:
                next_id = ids[:, :1]
            else:
                probabilities = F.softmax(likeliest / max(temperature, 1e-6), dim=-1)  # below, it might overflow
                if top_p < 1:
                    likelier = probabilities.cumsum(-1) - probabilities  # the probability of all ids before each
                    probabilities = probabilities.masked_fill(likelier >= top_p, 0)
                next_id = ids.gather(1, torch.multinomial(probabilities, 1, generator=generator))
            idx = torch.cat((idx, next_id), dim=1)
            yield next_id

    # OpenAI's checkpoints, and so Hugging Face's folders, store these weights as (in, out), nn.Linear as (out, in)
    TRANSPOSED = re.compile(r"(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")

    @classmethod
    def from_pretrained(cls, name_or_folder, flash=True, dropout=0.0):
        """A model with the weights of a Hugging Face GPT-2: gpt2, gpt2-medium, gpt2-large, gpt2-xl, any other Hub name
        or any folder of a GPT2LMHeadModel, our checkpoints among them. flash and dropout are this model's, whatever the
        folder was trained with. Raises UserError if open_gpt2 does.
        """
        hf_model = open_gpt2(name_or_folder, "the model", exactly=True)
        hf_config = hf_model.config
        config = GPTConfig(
            block_size=hf_config.n_positions, vocab_size=hf_config.vocab_size, flash=flash, dropout=dropout,
            n_layer=hf_config.n_layer, n_head=hf_config.n_head, n_embd=hf_config.n_embd,
        )  # fmt: skip
        model = cls(config)
        model.load_pretrained_weights(hf_model.state_dict())
        return model

    @torch.no_grad()
    def load_pretrained_weights(self, weights):
        """Copy in the tensors of a GPT2LMHeadModel of this shape: {name: tensor}, with lm_head.weight or without."""
        for name, weight in weights.items():
            if name == "lm_head.weight":
                continue  # tied to wte
            ours = self.get_parameter(name)
            if name == "transformer.wte.weight":
                ours[self.config.vocab_size :] = 0
                ours = ours[: self.config.vocab_size]
            ours.copy_(weight.t() if self.TRANSPOSED.search(name) else weight)

    def pretrained_weights(self):
        """Copies of the weights as GPT2LMHeadModel's file has them: {name: tensor}, float32, on the CPU."""
        weights = {}
        for name, weight in self.state_dict().items():
            if name == "lm_head.weight":
                continue  # tied to wte
            if name == "transformer.wte.weight":
                weight = weight[: self.config.vocab_size]
            weight = weight.t() if self.TRANSPOSED.search(name) else weight
            weights[name] = weight.to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
        return weights

    def save_pretrained(self, folder, weights=None):
        """Write config.json and model.safetensors into folder: what transformers opens as GPT2LMHeadModel.

        weights: pretrained_weights taken earlier; now, unless given.
        """
        from safetensors.torch import save_file

        folder, config = Path(folder), self.config
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.pretrained_weights() if weights is None else weights
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        hf_config = dict(
            architectures=["GPT2LMHeadModel"], model_type="gpt2", dtype="float32",
            vocab_size=config.vocab_size, n_positions=config.block_size, n_ctx=config.block_size,
            n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
            activation_function="gelu_new", layer_norm_epsilon=1e-5, tie_word_embeddings=True,
            attn_pdrop=config.dropout, embd_pdrop=config.dropout, resid_pdrop=config.dropout,
            bos_token_id=config.vocab_size - 1, eos_token_id=config.vocab_size - 1,
        )  # fmt: skip
        (folder / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")


# --- the data ---------------------------------------------------------------------------------------------------------


class DataLoaderLite:
    """Batches of rows from a folder of token shards: the same global batches however many processes share them.

    All shards of a split are one stream of tokens. Row i of an epoch's unshuffled order is the T+1 tokens from i*T on
    (the last is the target of the one before), so rows cross shard borders and no token is dropped but the last partial
    row. A shuffled epoch permutes the shards, then the rows that start in a group of them of SHUFFLE_ROWS rows or one
    shard more: reads stay local, and yet a corpus of small shards, each of a few documents, is well mixed.
    `position`, the number of rows that all processes together have consumed, is the loader's whole state.
    Raises fineweb.DataError for shards that are missing, broken or too short.
    """

    SHUFFLE_ROWS = 65_536  # about a shard of FineWeb-Edu at T=1024

    def __init__(self, data_dir, split, B, T, rank=0, world_size=1, shuffle=True, seed=1337, device="cpu"):
        self.B, self.T, self.rank, self.world_size, self.shuffle, self.seed = B, T, rank, world_size, shuffle, seed
        self.device = torch.device(device)
        self.paths = fineweb.find_shards(data_dir, split)
        self.vocab_size = fineweb.read_manifest(data_dir)["vocab_size"]
        self.shards = [fineweb.open_shard(path) for path in self.paths]
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])  # first token of each shard in the stream
        self.num_rows = max(0, int(self.starts[-1]) - 1) // T
        if self.num_rows == 0:
            raise fineweb.DataError(
                f"{data_dir}: the {split} split holds {self.starts[-1]} tokens, too few for one row of --seq_len {T}: "
                "shard more text with python fineweb.py, or shorten the rows"
            )
        # rows that start before each shard: shard k owns the rows first_row[k] … first_row[k+1]-1
        self.first_row = np.minimum(-(-self.starts // T), self.num_rows)
        self.position = 0
        self._groups = lru_cache(maxsize=2)(self._draw_groups)  # two: a batch may straddle a border
        self._row_order = lru_cache(maxsize=2)(self._draw_row_order)

    def _draw_groups(self, epoch):
        """An epoch's groups of shards, and the position within the epoch at which each begins."""
        # RandomState, not default_rng: its stream is frozen, so that a run can be repeated with any later numpy
        order = np.random.RandomState([self.seed, epoch]).permutation(len(self.shards))
        begins = np.cumsum([0, *np.diff(self.first_row)[order]])[:-1]
        cuts = np.flatnonzero(np.diff(begins // self.SHUFFLE_ROWS)) + 1
        return np.split(order, cuts), begins[[0, *cuts]]

    def _draw_row_order(self, epoch, group):
        shards = self._groups(epoch)[0][group]
        rows = np.concatenate([np.arange(self.first_row[k], self.first_row[k + 1]) for k in shards])
        return np.random.RandomState([self.seed, epoch, group]).permutation(rows)

    def _row_index(self, position):
        """Which row of the unshuffled order stands at this position of the endless sequence of epochs."""
        epoch, i = divmod(position, self.num_rows)
        if not self.shuffle:
            return i
        begins = self._groups(epoch)[1]
        group = int(np.searchsorted(begins, i, side="right")) - 1
        return int(self._row_order(epoch, group)[i - begins[group]])

    def _read_tokens(self, start, out):
        """Fill out (n) from the stream's tokens start … start+n-1, across as many shards as they touch."""
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        filled = 0
        while filled < len(out):
            offset = start + filled - self.starts[shard]
            piece = self.shards[shard][offset : offset + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            if len(piece) and piece.max() >= self.vocab_size:
                raise fineweb.DataError(
                    f"{self.paths[shard]} holds token id {piece.max()} in a vocabulary of {self.vocab_size}: "
                    "it is damaged or of another encoding; make the shards anew with python fineweb.py"
                )
            filled += len(piece)
            shard += 1

    def fingerprint(self):
        """{name of a shard: its length and a digest of its ends}: tells other data without reading all of it."""
        digests = {}
        for path, shard in zip(self.paths, self.shards):
            ends = shard[:4096].tobytes() + shard[-4096:].tobytes()
            digests[path.name] = f"{len(shard):,} tokens, {hashlib.sha256(ends).hexdigest()[:8]}"
        return digests

    def rows(self, positions):
        """The rows at these positions: inputs x and targets y, each (len(positions), T) int64, views of one tensor."""
        tokens = np.empty((len(positions), self.T + 1), dtype=np.int32)
        for row, position in zip(tokens, positions):
            self._read_tokens(self._row_index(position) * self.T, row)
        tokens = torch.from_numpy(tokens)
        if self.device.type == "cuda":  # pinned, else the host would wait for the copy, and so for all queued before it
            tokens = tokens.pin_memory()
        tokens = tokens.to(self.device, non_blocking=tokens.is_pinned()).long()
        return tokens[:, :-1], tokens[:, 1:]

    def next_batch(self):
        """This process's next micro-batch: x and y, each (B, T) int64 on the device."""
        first = self.position + self.rank * self.B
        self.position += self.B * self.world_size
        return self.rows(range(first, first + self.B))


# --- a model in shards (FSDP2) ----------------------------------------------------------------------------------------


def shard_model(raw_model, runtime):
    """Leave each process a share of every weight, and gather a block's for as long as it computes (FSDP2, ZeRO-3).

    In bfloat16 the blocks' weights travel as such, which is what autocast makes of them anyway, but for those of the
    layer norms; the gradients are summed in float32. What is left, the tied embedding above all, is the root's, stays
    float32, and is gathered once a pass. Compiled is each block: the gathering around it is no part of a graph.
    """
    from torch.distributed.device_mesh import init_device_mesh  # these take a second to import, so only here
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
    dtype = torch.bfloat16 if runtime.dtype == torch.bfloat16 else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in raw_model.transformer.h:
        if runtime.compile:
            block.forward = torch.compile(block.forward, dynamic=False, fullgraph=True)
        fully_shard(block, mesh=mesh, mp_policy=policy).set_force_sum_reduction_for_comms(True)  # gloo has no average
    fully_shard(raw_model, mesh=mesh).set_force_sum_reduction_for_comms(True)
    return raw_model


def gather(tensor):
    """All of a tensor of which each process holds a shard: they all have to ask. Any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(parameter, value):
    """This process's shard of what an optimizer keeps for a parameter in shards; anything else as it is."""
    if not hasattr(parameter, "full_tensor") or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor  # takes a second to import, so only here

    shard = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return shard.clone()  # it was a view, which would keep the whole tensor alive


def whole_model(raw_model):
    """A plain GPT of the weights in float32: for a model in shards, which all processes gather, a copy, else itself."""
    if not hasattr(raw_model, "unshard"):
        return raw_model
    with torch.device("meta"):
        whole = GPT(raw_model.config)
    shards = raw_model.state_dict()
    del shards["lm_head.weight"]  # tied to wte: gathered once
    whole.load_state_dict({name: gather(shard) for name, shard in shards.items()}, strict=False, assign=True)
    whole.lm_head.weight = whole.transformer.wte.weight
    return whole.eval()


# --- optimizers and schedule ------------------------------------------------------------------------------------------


def orthogonalize(matrices):
    """(n, a, b) -> (n, a, b) in bfloat16: the nearest matrices of singular values about 1 (Jordan et al. 2024)."""
    x = matrices.bfloat16()
    x = x.mT if x.size(1) > x.size(2) else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):  # 3.4445 s - 4.775 s^3 + 2.0315 s^5 of the singular values takes small ones fast towards 1
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x.mT if matrices.size(1) > matrices.size(2) else x


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum for matrices (Jordan et al. 2024), scaled to the size of an AdamW update (Moonshot 2025).

    So one rate and one weight decay serve both. torch.optim.Muon with match_rms_adamw is the same, but for query, key
    and value: c_attn.weight (3C, C) holds them as one matrix, and here they are orthogonalized apart.
    """

    momentum = 0.95  # Jordan et al.
    batch = 16  # weights of one shape that are multiplied together, and with FSDP are whole at a time

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same_shape = {}
            for weight in group["params"]:
                same_shape.setdefault(weight.shape, []).append(weight)
            for weights in same_shape.values():
                for start in range(0, len(weights), self.batch):
                    self._update(weights[start : start + self.batch], group["lr"], group["weight_decay"])

    def _update(self, weights, lr, weight_decay):
        updates = []
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            average = self.state[weight]["momentum_buffer"].lerp_(weight.grad, 1 - self.momentum)
            updates.append(gather(weight.grad.lerp(average, self.momentum).bfloat16()))  # Nesterov's: one step ahead
        rows, columns = weights[0].shape
        parts = 3 if rows == 3 * columns else 1
        updates = orthogonalize(torch.stack(updates).view(-1, rows // parts, columns)).reshape(-1, rows, columns)
        scale = 0.2 * max(rows // parts, columns) ** 0.5  # 0.2: the root mean square of AdamW's updates
        for weight, update in zip(weights, updates):
            weight.mul_(1 - lr * weight_decay)
            weight.add_(shard_like(weight, update.to(weight.dtype)), alpha=-lr * scale)


def configure_optimizers(model, config):
    """The list of optimizers that --optimizer names, over all parameters of the model, each once.

    Weight decay falls on tensors of two dimensions and more (matrices and embeddings), not on biases and layer norms.
    """
    matrices, decayed, undecayed = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            undecayed.append(parameter)
        elif config.optimizer == "muon" and ".h." in name:
            matrices.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, config.lr, config.weight_decay))
    return optimizers


def get_lr(step, config):
    """The learning rate of an update: linear warmup, then the schedule, to min_lr_ratio * lr at max_steps (GPT-3)."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if step >= config.max_steps:
        return config.lr * config.min_lr_ratio
    progress = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    left = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))  # 1 -> 0
    return config.lr * (config.min_lr_ratio + left * (1.0 - config.min_lr_ratio))


# --- runtime: which process this is, and what it computes on ----------------------------------------------------------


EXIT_STOPPED = 75  # "try again" in the system's sysexits.h
TIMEOUT = timedelta(minutes=10)  # how long a process waits for the others before it gives up


class Stopped(Exception):
    """A signal has asked the run to stop, and every process raises this at the same point."""


class StopSignal:
    """Notes SIGTERM, SIGINT or SIGUSR1 while it is entered, for the run to stop where its state can be saved.

    A second signal ends the process at once, even one that hangs, since a thread watches. What comes within half a
    second is the first one's echo: a scheduler may signal torchrun and its processes, and torchrun passes it on.
    """

    def __init__(self):
        self.received = None  # the signal's name

    def __enter__(self):
        names = ("SIGTERM", "SIGINT", "SIGUSR1")  # Windows lacks the last
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self.handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
        self.writer, reader = socket.socketpair()
        self.writer.setblocking(False)
        signal.set_wakeup_fd(self.writer.fileno())  # to which each signal's number is written as it arrives
        threading.Thread(target=self._watch, args=[reader], daemon=True).start()

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self.writer.close()

    def _watch(self, reader):
        first = math.inf
        while number := reader.recv(1):
            if time.monotonic() - first > 0.5:
                os._exit(128 + number[0])
            if not self.received:
                self.received, first = signal.Signals(number[0]).name, time.monotonic()
        reader.close()


@dataclass(frozen=True)
class Runtime:
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    compile: bool
    fsdp: bool = False
    stop: StopSignal = field(default_factory=StopSignal)

    def autocast(self):
        """Matrix products in dtype, sums and losses in float32; nothing at all for float32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def print0(self, *values):
        if self.rank == 0:
            print(*values, flush=True)

    def sum_over_ranks(self, tensor):
        """The sum of the processes' tensors, on every process (gloo has no average, so who wants one divides)."""
        if self.world_size > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor

    def raise_if_stopped(self):
        """Raise Stopped on every process if any of them has received a signal."""
        if self.any_rank(self.stop.received is not None):
            raise Stopped

    def any_rank(self, flag):
        """Whether the flag is set on any process: they meet here, on the CPU."""
        flag = torch.tensor(flag, dtype=torch.uint8)
        if self.world_size > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def from_rank0(self, value):
        """Rank 0's value, on every process: it is waited for."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, device=self.device)
        return values[0]


def pick_device(name):
    """A device type by its flag. auto is the fastest one that is here."""
    return common.pick_device(name) if name == "auto" else name


def pick_dtype(name, device_type):
    """auto is bfloat16 where the hardware multiplies it natively, float16 on older GPUs, float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device_type == "mps":
        return torch.bfloat16
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.11
    return torch.bfloat16 if any(capabilities.get(k) for k in ("avx512_bf16", "amx_bf16", "bf16")) else torch.float32


def compiler_error(device):
    """Why torch.compile does not work on this machine, or None. Found out by compiling one line."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(16, device=device))
    except Exception as error:  # Inductor, Triton and the compilers that they call each have errors of their own
        return common.one_line(error)


def fresh_store(rank):
    """The key-value store through which the processes of this start find each other: rank 0 serves one of its own.

    torchrun's store outlives a restart, and with it the addresses of processes that are gone (pytorch issue 167288).
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent_store = dist.TCPStore(host, port, is_master=False, timeout=TIMEOUT)
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        agent_store.set("port of rank 0", str(store.port))
        return store
    while True:
        try:
            port = int(agent_store.get("port of rank 0"))
            store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
            store.set_timeout(TIMEOUT)
            return store
        except dist.DistNetworkError:
            continue  # that port was of an earlier start: rank 0 is about to set its own


def setup_runtime(config):
    """Join the other processes, if torchrun started several, and choose device, precision and compilation."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device_type = pick_device(config.device)
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device_type == "cuda" else device_type)
    if device_type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if world_size > 1:
        on_gpu = device_type == "cuda"
        # gloo beside NCCL, for what the processes agree on without waiting for their GPUs
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=fresh_store(rank) if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None,
            rank=rank, world_size=world_size, timeout=TIMEOUT, device_id=device if on_gpu else None,
        )  # fmt: skip
    wants_compile = config.compile == "on" or (config.compile == "auto" and device_type != "mps")
    error = compiler_error(device) if wants_compile else None
    dtype = pick_dtype(config.dtype, device_type)
    runtime = Runtime(rank, world_size, device, dtype, wants_compile and not error, config.fsdp)
    if error:
        runtime.print0(f"warning: torch.compile does not work here ({error}): running without it, more slowly")
    return runtime


# dense bfloat16 FLOP/s of the datasheets, for the MFU; the first name that the device's contains counts
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "4090": 165e12}


def flops_per_token(config, T):
    """FLOPs of a training step per token: 6 for each weight that multiplies, 12·L·C·T for attention (PaLM, app. B)."""
    weights = 12 * config.n_layer * config.n_embd**2 + config.padded_vocab_size * config.n_embd
    return 6 * weights + 12 * config.n_layer * config.n_embd * T


def peak_flops(device):
    """The device's peak in FLOP/s, or None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


# --- evaluation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validation_loss(model, loader, val_tokens, runtime):
    """Mean loss in nats per token over the first val_tokens of the split (all of it, if it is smaller).

    The same tokens on every layout: what fills the last batch up is ignored, and the mean is over tokens, not batches.
    Raises Stopped.
    """
    B, T = loader.B, loader.T
    rows = min(val_tokens // T, loader.num_rows)
    losses, counts = [], []
    for round_start in range(0, rows, runtime.world_size * B):
        runtime.raise_if_stopped()
        first = round_start + runtime.rank * B
        own = max(0, min(B, rows - first))  # 0 where the rows run out: a model in shards needs all processes to call it
        x, y = loader.rows(range(first, first + B))
        y = y.clone()  # x and y are views of the same tokens
        y[own:] = -100  # the rows past the end, which head_loss leaves out
        with runtime.autocast():
            _, loss = model(x, y)
        losses.append(loss)
        counts.append(own * T)
    losses = torch.stack(losses).cpu().double()
    total = (losses * torch.tensor(counts, dtype=torch.float64)).sum()
    return runtime.sum_over_ranks(total).item() / (rows * T)


def load_hellaswag(config, encoding, block_size, runtime):
    """The rows to score, tokenized; None where they are not wanted, not to be had or too long. Alike on all ranks."""
    if config.hellaswag_file == "none" or encoding.name != "gpt2":
        return None
    examples = None
    if runtime.rank == 0:
        try:
            rows = hellaswag.find_rows(config.hellaswag_file)
            examples = hellaswag.prepare(rows, encoding.encode_ordinary, block_size)  # once for all evaluations
        except UserError as error:
            if config.hellaswag_file != TrainConfig.hellaswag_file:
                raise  # a file that was asked for
            runtime.print0(f"training without HellaSwag: {error}")
    return runtime.from_rank0(examples)


def hellaswag_accuracy(raw_model, rows, runtime):
    """HellaSwag's acc_norm, completion style, over all rows. Raises Stopped."""

    def trunk(*inputs):
        runtime.raise_if_stopped()  # all ranks call it equally often
        return raw_model.trunk(*inputs)

    counts = hellaswag.evaluate(
        trunk, raw_model.head, None, rows, runtime.rank, runtime.world_size, device=runtime.device
    )
    total, correct_norm = runtime.sum_over_ranks(torch.tensor([counts.total, counts.correct_norm])).tolist()
    return correct_norm / total


def print_samples(raw_model, encoding, config, runtime):
    """Print continuations of --prompt: the same draw each time, so that only the model's progress shows."""
    prompt = torch.tensor(encoding.encode_ordinary(config.prompt), device=runtime.device)
    # a generator of its own, so that looking does not change the run
    generator = torch.Generator(runtime.device).manual_seed(config.sample_seed)
    tokens = [prompt.expand(config.num_samples, -1)]
    with runtime.autocast():
        for next_ids in raw_model.stream(tokens[0], config.max_new_tokens, generator=generator):
            if runtime.stop.received:
                return
            tokens.append(next_ids)
    for i, row in enumerate(torch.cat(tokens, dim=1).tolist()):
        print(f"sample {i}: {encoding.decode(row)}", flush=True)


class Log:
    """OUT/log.txt: a `step stream value` a line, build-nanogpt's grammar. What a full disk refuses waits in memory."""

    def __init__(self, out_dir):
        self.path, self.waiting, self.refused, self.tracker = Path(out_dir) / "log.txt", b"", False, None

    def start_tracker(self, model_config, config):
        """Send the values to --tracker, too. Its id is in the folder, for a resumed run to go on where that one was."""
        id_file = self.path.with_name("tracker_id")
        if not id_file.exists():
            id_file.write_text(os.urandom(4).hex())
        options = {"id": id_file.read_text()} if config.tracker == "wandb" else {}  # trackio knows a run by its name
        options |= {"name": f"{self.path.absolute().parent.name}-{id_file.read_text()}", "resume": "allow"}
        self.tracker = config.tracker
        self.track("init", project="gpt2", config={**asdict(model_config), **asdict(config)}, **options)

    def track(self, function, *values, **options):
        """Call a function of the tracker, if there is one. Where it fails, training goes on without it."""
        try:
            if self.tracker:
                getattr(importlib.import_module(self.tracker), function)(*values, **options)
        except Exception as error:  # of its import, its network and itself, each in its own way
            print(f"warning: on without the tracker: {common.one_line(error)}", file=sys.stderr, flush=True)
            self.tracker = None

    def write(self, step, **values):
        """Append a line for each value."""
        self.track("log", values, step=step)
        self.waiting += "".join(f"{step} {stream} {value:.8g}\n" for stream, value in values.items()).encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                self.waiting = self.waiting[file.write(self.waiting) :]  # a disk about to be full takes a part
            self.refused = False
        except OSError as error:
            if not self.refused:
                print(f"warning: {self.path} cannot be written ({error}), its lines wait", file=sys.stderr, flush=True)
            self.refused = True


def read_log(path):
    """{stream: (steps, values)} of a log.txt, ours or build-nanogpt's, each a list in the order of the file."""
    streams = {}
    for line in Path(path).read_text().rpartition("\n")[0].splitlines():  # what follows the last end is half a line
        step, stream, value = line.split()
        steps, values = streams.setdefault(stream, ([], []))
        steps.append(int(step))
        values.append(float(value))
    return streams


# what OpenAI's models reach: GPT-2's loss on FineWeb-Edu's validation shard and HellaSwag acc_norm (both from
# build-nanogpt), GPT-3's HellaSwag (its paper). The first three are always in the picture, the others where it reaches
REFERENCES = {
    "val": {"GPT-2 124M": 3.2924},
    "hella": {"chance": 0.25, "GPT-2 124M": 0.294463, "GPT-3 125M": 0.337, "GPT-2 350M": 0.375224, "GPT-3 350M": 0.436,
              "GPT-2 774M": 0.431986, "GPT-3 760M": 0.510, "GPT-2 1558M": 0.488946, "GPT-3 1.3B": 0.547},
}  # fmt: skip


def draw_curve(logs, manifest):
    """A matplotlib Figure of {label: log, as read_log gives it}: losses and, where one has them, HellaSwag accuracies.

    manifest: of their data. OpenAI's loss is one per GPT-2 token of FineWeb-Edu, so it is drawn beside no other.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    gpt2, edu = manifest["encoding"] == "gpt2", "fineweb-edu" in manifest.get("source", "")
    ylabels = {"val": f"loss, nats per {'token' if gpt2 else 'byte'}", "hella": "HellaSwag acc_norm"}
    panels = [name for name in ylabels if name == "val" or any(name in log for log in logs.values())]
    figure = Figure(figsize=(7 * len(panels), 4.5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for i, (label, log) in enumerate(logs.items()):
            if panel == "val" and "train" in log:
                steps, losses = log["train"]
                n = len(steps) // 100 + 1  # single steps are noisy: draw their mean over 1% of the run, too
                mean = np.convolve(losses, np.full(n, 1 / n), "valid")
                axes.plot(steps, losses, color=f"C{i}", lw=0.5, alpha=0.3)
                axes.plot(steps[n // 2 :][: len(mean)], mean, color=f"C{i}", label=f"{label} train")
            if panel in log:
                style = {"color": f"C{i}", "marker": "o", "ms": 4, "mec": "black", "ls": "" if panel == "val" else "-"}
                axes.plot(*log[panel], label=f"{label} {panel}, last {log[panel][1][-1]:.4f}", **style)
        drawn = [value for line in axes.lines for value in line.get_ydata() if math.isfinite(value)]
        known = REFERENCES[panel] if gpt2 and (edu or panel == "hella") else {}
        for name, value in known.items():
            va, ls = ("top", "--") if "GPT-2" in name else ("bottom", ":")  # some of GPT-2's and GPT-3's lie close
            axes.axhline(value, color="gray", lw=1, ls=ls, zorder=1)
            at = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": True}
            axes.annotate(f"{name}, {value:.3f}", (1, value), (4, 0), va=va, color="gray", fontsize=8, **at)
        # 0.95: the first steps' losses would press all others flat
        low, high = np.quantile([*drawn, *list(known.values())[:3]] or [0], [0, 0.95 if panel == "val" else 1])
        margin = 0.05 * (high - low) or 1
        axes.set(xlabel="step", ylabel=ylabels[panel], ylim=(low - margin, high + margin))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(logs))
    return figure


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save_checkpoint(out_dir, raw_model, encoding, state, weights=None):
    """Write OUT/checkpoints/step_NNNNNN: a Hugging Face GPT-2 folder, and training_state.pt beside the weights.

    All is written under a name that begins with a dot and flushed to the disk before the folder gets its own name: a
    folder that bears its final name is complete, whatever happens. A save that fails leaves nothing. state: as
    training_state gives it. weights: as pretrained_weights gave them; now, unless given. Returns the folder.
    """
    final = Path(out_dir) / "checkpoints" / f"step_{state['step']:06d}"
    temporary = final.with_name(f".{final.name}")
    try:
        raw_model.save_pretrained(temporary, weights)
        fineweb.save_tokenizer(encoding, temporary, raw_model.config.block_size)
        with open(temporary / "training_state.pt", "wb") as file:
            torch.save(state, file)
        for path in [*temporary.iterdir(), temporary]:
            flush_to_disk(path)
        os.replace(temporary, final)
        for path in [final.parent, final.parent.parent]:
            flush_to_disk(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def flush_to_disk(path):
    """Make a file's bytes, or a folder's names, outlive a power cut."""
    if path.is_dir() and os.name != "posix":
        return  # Windows has no such call for folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)


def training_state(step, skipped, run, config):
    """What training needs beside the weights to go on: plain tensors, numbers and dicts."""
    return {
        "step": step,
        "skipped": skipped,
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "scaler": run.scaler.state_dict(),
        "loader": run.loader.position,
        "rng": torch.get_rng_state(),  # for forks that draw from it: train_step seeds it anew
        "fingerprint": run.fingerprint,
        "config": {**asdict(run.raw_model.config), **asdict(config)},
    }


def copy_to_cpu(value, keep):
    """Copies of all tensors in nested dicts and lists, which training goes on without changing.

    keep: whether this process wants them; one that does not has None for each, having helped to gather those in shards.
    """
    if isinstance(value, torch.Tensor):
        whole = gather(value)
        return whole.to("cpu", copy=True) if keep else None
    if isinstance(value, dict):
        return {key: copy_to_cpu(inner, keep) for key, inner in value.items()}
    if isinstance(value, list):
        return [copy_to_cpu(inner, keep) for inner in value]
    return value


class CheckpointWriter:
    """Saves on a thread, from copies, so that training waits for these alone; one checkpoint at a time."""

    def __init__(self, thread, config, run, runtime, newest_step):
        self.thread, self.config, self.run, self.runtime, self.newest_step = thread, config, run, runtime, newest_step
        self.last = None  # the future of the last save, on rank 0

    def failed(self):
        """Whether the last save is over and has failed. It has said so, and the older checkpoints are as they were."""
        return self.last is not None and self.last.done() and self.last.exception() is not None

    def save(self, step, skipped):
        """Save the state at this step, unless the newest checkpoint is of it: all processes gather, rank 0 writes."""
        if self.last:
            self.last.exception()  # waits for its end
        if self.runtime.any_rank(step != self.newest_step or self.failed()):
            self.newest_step, writes = step, self.runtime.rank == 0
            state = copy_to_cpu(training_state(step, skipped, self.run, self.config), keep=writes)
            whole = whole_model(self.run.raw_model)
            if writes:
                self.last = self.thread.submit(self._write, whole.pretrained_weights(), state)

    def finish(self):
        """Wait for the last save. Raises ConfigError where it has failed."""
        if self.last and self.last.exception():
            raise ConfigError(
                f"{self.config.out_dir} lacks the checkpoint of step {self.newest_step}: "
                "mend what the error above says, and go on from the one before with --resume"
            )

    def _write(self, weights, state):
        config, run = self.config, self.run
        try:
            if not all(weight.isfinite().all() for weight in weights.values()):
                raise ConfigError("its weights are not finite")
            folder = save_checkpoint(config.out_dir, run.raw_model, run.encoding, state, weights)
            print(f"saved {folder}\n", end="", flush=True)  # a whole line at once, for training prints too
        except Exception as error:  # of the system, of torch or of safetensors, each in its own way
            reason = f"{common.one_line(error)}: the older checkpoints stay, the next evaluation tries again"
            print(f"error: saving step {state['step']} failed, {reason}\n", end="", file=sys.stderr, flush=True)
            raise
        for folder in list_checkpoints(config.out_dir)[: -config.keep_checkpoints]:
            with suppress(OSError):  # one that another program has open goes the next time
                delete_checkpoint(folder)


def delete_checkpoint(folder):
    """Delete a checkpoint, under another name: one that bears its own is complete even when this is cut short."""
    doomed = folder.with_name(f".{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def lock_out_dir(out_dir):
    """Make the output folder, and lock it for as long as this process lives, however it ends. Raises ConfigError."""
    path = Path(out_dir) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
        return lock
    except Timeout:
        mend = "wait for its end or give another --out_dir"
        unlocked = f"where a file system without locks has kept {path} from a run that was killed, delete it"
        raise ConfigError(f"another run is writing to {out_dir}: {mend}; {unlocked}") from None


def load_checkpoint(out_dir, runtime):
    """The newest checkpoint that is whole: (training state, weights, folders of newer ones that are damaged).

    All on the CPU; (None, None, []) if there is none. Raises ConfigError where all are damaged, where the disk fails,
    or where the processes do not see the same ones.
    """
    from safetensors.torch import load_file

    state, weights, damaged = None, None, []
    for folder in reversed(list_checkpoints(out_dir)):
        try:
            saved = torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True)
            needed = {"step", "skipped", "optimizers", "scaler", "loader", "rng", "fingerprint", "config"}
            if lacking := needed - saved.keys():
                raise ValueError(f"its training_state.pt lacks {min(lacking)}")
            state, weights = saved, load_file(folder / "model.safetensors")
            break
        except Exception as error:  # of zip, pickle, safetensors, …: whatever a damaged file makes its readers raise
            reason = common.one_line(error)
            if isinstance(error, (OSError, MemoryError)) and not isinstance(error, FileNotFoundError):
                raise ConfigError(f"cannot read {folder} ({reason}): mend that, and --resume") from error
            runtime.print0(f"warning: {folder} is damaged: {reason}")
            damaged.append(folder)
    step = state and state["step"]
    if runtime.from_rank0(step) != step:
        raise ConfigError(f"the processes see different checkpoints in {out_dir}: it must be a folder that all share")
    if damaged and not state:
        raise ConfigError(f"all checkpoints in {out_dir} are damaged: move them away, or give another --out_dir")
    return state, weights, damaged


# What a resumed run may change at will: where and how it computes, and what it measures on the way; and what it may
# change when --override names it. All else shapes the saved tensors or the rows of the data.
CHANGEABLE = frozenset(
    "preset data_dir out_dir resume overwrite override micro_batch device dtype compile flash vocab_size eval_interval "
    "val_tokens save_interval keep_checkpoints sample_interval prompt num_samples max_new_tokens hellaswag_file "
    "tracker fsdp activation_checkpointing".split()
)
OVERRIDABLE = frozenset(
    "data_dir dropout grad_clip init_from lr max_steps min_lr_ratio schedule seed shuffle total_batch_tokens "
    "warmup_steps weight_decay".split()
)


def check_resumable(state, model_config, config, fingerprint):
    """Raise ConfigError with what a run would do differently from the one that it goes on from, a line for each."""
    errors, here = [], f"the run in {config.out_dir}"
    model_flags = {"dropout": model_config.dropout} if config.init_from else asdict(model_config)
    before, now = {"dropout": 0.0} | state["config"], asdict(config) | model_flags  # older checkpoints lack it
    for name in sorted(now.keys() & before.keys() - CHANGEABLE):
        if now[name] != before[name] and name not in config.override:
            way_out = f"allow it with --override {name}" if name in OVERRIDABLE else "start another --out_dir"
            errors.append(f"--{name} is {now[name]}, {here} has {before[name]}: give that, or {way_out}")
    before, now = state["fingerprint"], fingerprint
    if now["encoding"] != before["encoding"]:
        way_out = "give its --data_dir, or start another --out_dir"
        errors.append(f"{config.data_dir} has {now['encoding']} tokens, {here} {before['encoding']} tokens: {way_out}")
    elif "data_dir" not in config.override:
        changed = sorted(name for name in now | before if now.get(name) != before.get(name))
        for name in changed[:1]:
            change = f"is {now.get(name, 'gone')}, {here} has had {before.get(name, 'no such shard')}"
            others = f" ({len(changed) - 1} other shards differ too)" if changed[1:] else ""
            way_out = "restore the data, or allow it with --override data_dir"
            errors.append(f"{Path(config.data_dir, name)} {change}{others}: {way_out}")
    if errors:
        raise ConfigError("\n".join(errors))


def restore(state, optimizers, scaler, loader):
    """Put back what training needs beside the weights."""
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        groups = optimizer.state_dict()["param_groups"]  # the rates and decays of this run, which may have changed
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        moments = {
            i: {name: shard_like(parameters[i], value) for name, value in values.items()}
            for i, values in saved["state"].items()
        }
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
    if scaler.is_enabled() and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    loader.position = state["loader"]
    torch.set_rng_state(state["rng"])


def open_out_dir(config, resumed_step, damaged):
    """Rid the output folder of the run that --overwrite gives up, or of what is from beyond the step to resume at.

    Touches log.txt, curve.png, tracker_id and checkpoints, nothing else; damaged checkpoints are set aside. Returns
    whether the log has that step's evaluation. Raises ConfigError.
    """
    out_dir = Path(config.out_dir)
    for unfinished in out_dir.glob("checkpoints/.step_*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    for folder in damaged:
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    if resumed_step is not None:
        return cut_log(out_dir / "log.txt", resumed_step)
    for folder in list_checkpoints(out_dir):
        if not config.overwrite:
            raise ConfigError(f"{folder} has appeared since this run was started: start it again")
        delete_checkpoint(folder)
    for name in ("log.txt", "curve.png", "tracker_id"):
        (out_dir / name).unlink(missing_ok=True)
    return False


def cut_log(path, step):
    """Drop a log's lines from beyond the state at this step. Returns whether its evaluation is among the rest."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept, evaluated = [], False
    for line in lines:
        number, stream, *_ = [*line.split(), "", ""]
        evaluation = number == str(step) and stream in ("val", "hella")
        if number.isdigit() and (int(number) < step or evaluation) and line.endswith("\n"):
            kept.append(line)
            evaluated |= evaluation
    if len(kept) < len(lines):
        with fineweb.atomic_write(path) as file:
            file.write("".join(kept).encode())
    return evaluated


# --- training ---------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """The parts of a training run."""

    raw_model: GPT
    model: nn.Module  # the same weights, to train through: see wrap_model
    optimizers: list
    scaler: torch.amp.GradScaler
    loader: DataLoaderLite
    val_loader: DataLoaderLite
    fingerprint: dict  # of the data
    encoding: tiktoken.Encoding
    hellaswag_rows: list | None
    log: Log


def wrap_model(raw_model, runtime):
    """The handle to train through: compiled, and synchronizing gradients where there are several processes."""
    if runtime.fsdp:
        return shard_model(raw_model, runtime)
    model = torch.compile(raw_model, dynamic=False, fullgraph=True) if runtime.compile else raw_model
    if runtime.world_size > 1:
        device_ids = [runtime.device] if runtime.device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    return model


def pick_micro_batch(raw_model, config, runtime):
    """Rows of a micro-batch: --micro_batch, or for auto the most that fit and divide a process's share of the batch.

    On a GPU the sizes are tried, eagerly, which takes more memory than a compiled step. Raises ConfigError.
    """
    if config.micro_batch != "auto":
        return config.micro_batch
    rows = config.total_batch_tokens // (config.seq_len * runtime.world_size)
    most = min(rows, max(1, config.auto_tokens[runtime.device.type] // config.seq_len))
    for size in (size for size in range(most, 0, -1) if rows % size == 0):
        failed = runtime.device.type == "cuda" and not fits_in_memory(raw_model, size, config.seq_len, runtime)
        if not runtime.any_rank(failed):
            return size
    hint = "give --micro_batch, for what was tried was not in shards yet" if config.fsdp else "shorten it, or --n_layer"
    raise ConfigError(f"not one row of --seq_len {config.seq_len} fits in this GPU's memory: {hint}")


def fits_in_memory(raw_model, B, T, runtime):
    """Whether a GPU can do a forward and a backward pass of (B, T) tokens beside earlier gradients and two moments.

    The model is not yet in shards: with FSDP, which will keep 1/world_size of weights, gradients and moments, and all
    of the earlier gradients, the pass's own whole weights and gradients stand in for as much of that.
    """
    fits = True
    times = max(0, 4 / runtime.world_size + 1 - 2) if runtime.fsdp else 3  # the size of the parameters
    try:
        ballast = torch.empty(int(times * raw_model.num_params()), device=runtime.device)
        tokens = torch.zeros(B, T, dtype=torch.long, device=runtime.device)
        with runtime.autocast():
            raw_model(tokens, tokens)[1].backward()
        del ballast
    except RuntimeError as error:  # torch's own, and that of cuBLAS, which allocates by itself
        if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
            raise
        fits = False
    raw_model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return fits


def gradient_sync(model, on):
    """The context of a backward pass that averages the gradients over the processes, or leaves that to a later one."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP
        model.set_requires_gradient_sync(on)
        model.set_is_last_backward(on)
    return nullcontext() if on else getattr(model, "no_sync", nullcontext)()


def train_step(model, optimizers, scaler, loader, step, config, runtime):
    """One update from the next global batch. Returns its mean loss (nats per token), and the gradient's norm.

    Where one of them is not finite, nothing is updated. Raises Stopped between micro-steps.
    """
    grad_accum_steps = config.total_batch_tokens // (loader.B * loader.T * runtime.world_size)
    # dropout's masks: of this step and process alone, so that a resumed run draws the same
    torch.manual_seed(int(np.random.SeedSequence([config.seed, step, runtime.rank]).generate_state(1)[0]))
    loss_sum = torch.zeros((), device=runtime.device)
    for micro_step in range(grad_accum_steps):
        runtime.raise_if_stopped()
        x, y = loader.next_batch()
        # gradients add up locally; only the last backward pass averages them over the processes
        with gradient_sync(model, on=micro_step == grad_accum_steps - 1):
            with runtime.autocast():
                _, loss = model(x, y)
            # backward passes add gradients, and a sum over micro-batches is not the mean over the batch: divide first
            loss = loss / grad_accum_steps
            scaler.scale(loss).backward()
        loss_sum += loss.detach()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = gather(torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf))
    # the one time a step that the host waits for the device
    loss, norm = (runtime.sum_over_ranks(torch.stack([loss_sum, norm])) / runtime.world_size).tolist()
    finite = math.isfinite(loss) and math.isfinite(norm)  # the same on all processes
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, config)
        if finite:  # else, as when float16 overflows, no optimizer may step
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return loss, norm


def evaluate(step, run, config, runtime):
    """Measure, print and log what is due at this step. Raises Stopped, with nothing logged."""
    last_step = step == config.max_steps
    run.raw_model.eval()  # without dropout, and so model, which shares its modules
    evaluates = step % config.eval_interval == 0 or last_step
    samples = step > 0 and config.sample_interval and (step % config.sample_interval == 0 or last_step)
    if evaluates:
        times = [time.perf_counter()]
        results = {"val": validation_loss(run.model, run.val_loader, config.val_tokens, runtime)}
        times.append(time.perf_counter())
        if run.hellaswag_rows:
            results["hella"] = hellaswag_accuracy(whole_model(run.raw_model), run.hellaswag_rows, runtime)
            times.append(time.perf_counter())
        parts = [
            f"{name}: {value:.4f} ({b - a:.1f} s)" for (name, value), a, b in zip(results.items(), times, times[1:])
        ]
        runtime.print0(f"step {step:5d} | " + " | ".join(parts))
        if runtime.rank == 0:
            run.log.write(step, **results)
            with suppress(OSError):  # of a full disk, which the log has named
                figure = draw_curve({"": read_log(run.log.path)}, fineweb.read_manifest(config.data_dir))
                figure.savefig(Path(config.out_dir) / "curve.png", dpi=120)
    if samples:
        whole = whole_model(run.raw_model)  # all processes gather it, and one draws
        if runtime.rank == 0:
            print_samples(whole, run.encoding, config, runtime)
    run.raw_model.train()


def load_model(model_config, encoding, config):
    """The model to train, on the CPU: freshly drawn, or the one that --init_from names if it fits the data."""
    if not config.init_from:
        return GPT(replace(model_config, vocab_size=encoding.n_vocab))
    folder = newest_checkpoint(config.init_from, "--init_from")  # if it is an output folder
    model = GPT.from_pretrained(folder, model_config.flash, model_config.dropout)
    if model.config.vocab_size != encoding.n_vocab:
        raise ConfigError(
            f"--init_from {config.init_from} knows {model.config.vocab_size} ids, the shards of {config.data_dir} have "
            f"{encoding.n_vocab}: shard the text in the model's encoding, with python fineweb.py --encoding"
        )
    if model.config.block_size < config.seq_len:
        raise ConfigError(
            f"--seq_len {config.seq_len} is more than --init_from {config.init_from} can read: "
            f"give --seq_len {model.config.block_size}"
        )
    return model


def set_up(model_config, config, runtime, state, weights):
    """The parts of a run: a new one's, or those of the checkpoint with this training state and these weights."""
    torch.manual_seed(config.seed)
    encoding = fineweb.get_encoding(fineweb.read_manifest(config.data_dir)["encoding"])
    layout = 1, config.seq_len, runtime.rank, runtime.world_size  # one row, until it is known how many fit
    loader = DataLoaderLite(config.data_dir, "train", *layout, config.shuffle, config.seed, runtime.device)
    val_loader = DataLoaderLite(config.data_dir, "val", *layout, shuffle=False, device=runtime.device)
    fingerprint = {"encoding": encoding.name, **val_loader.fingerprint(), **loader.fingerprint()}
    if state:
        check_resumable(state, model_config, config, fingerprint)
        shape = {name: state["config"][name] for name in asdict(model_config).keys() - {"flash", "dropout"}}
        raw_model = GPT(replace(model_config, **shape))
        raw_model.load_pretrained_weights(weights)
    else:
        raw_model = load_model(model_config, encoding, config)
    raw_model.activation_checkpointing = config.activation_checkpointing
    raw_model.to(runtime.device)
    loader.B = val_loader.B = pick_micro_batch(raw_model, config, runtime)
    hellaswag_rows = load_hellaswag(config, encoding, raw_model.config.block_size, runtime)
    model = wrap_model(raw_model, runtime)  # first, for shards are parameters of their own
    optimizers = configure_optimizers(raw_model, config)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    if state:
        restore(state, optimizers, scaler, loader)
    log = Log(config.out_dir)
    return Run(raw_model, model, optimizers, scaler, loader, val_loader, fingerprint, encoding, hellaswag_rows, log)


def train(model_config, config, runtime):
    """Run steps 0 … max_steps, each evaluated before it is updated, so that the last line is of the finished model.

    Raises Stopped once a signal has come and the state is saved, and ConfigError.
    """
    state, weights, damaged = load_checkpoint(config.out_dir, runtime) if config.resume else (None, None, [])
    run = set_up(model_config, config, runtime, state, weights)
    first_step, skipped = (state["step"], state["skipped"]) if state else (0, 0)
    resumed_step = first_step if state else None
    runtime.print0(describe_run(run, config, runtime, resumed_step))
    evaluated = runtime.from_rank0(open_out_dir(config, resumed_step, damaged) if runtime.rank == 0 else None)
    del state, weights
    if runtime.rank == 0 and config.tracker != "none":
        run.log.start_tracker(run.raw_model.config, config)

    with runtime.stop, ThreadPoolExecutor(max_workers=1) as thread:
        writer = CheckpointWriter(thread, config, run, runtime, resumed_step)
        try:
            for step in range(first_step, config.max_steps + 1):
                last_step, position = step == config.max_steps, run.loader.position
                if not (evaluated and step == first_step):
                    evaluate(step, run, config, runtime)
                retry = step % config.eval_interval == 0 and runtime.any_rank(writer.failed())
                if last_step or retry or (step > 0 and step % config.save_interval == 0):
                    writer.save(step, skipped)
                if last_step:
                    break
                start = time.perf_counter()  # after evaluation and saving: tok/s is the speed of training alone
                loss, norm = train_step(run.model, run.optimizers, run.scaler, run.loader, step, config, runtime)
                skipped = 0 if math.isfinite(loss + norm) else skipped + 1
                report_step(step, loss, norm, skipped, time.perf_counter() - start, run, config, runtime)
                if skipped == config.max_skipped_steps:
                    raise ConfigError(
                        f"{skipped} updates in a row were skipped, for a loss of {loss} and a gradient norm of {norm}: "
                        f"lower the rate, from the last checkpoint with --resume --lr {config.lr / 2:g} --override lr"
                    )
        except Exception as error:
            # Ctrl-C ends the compilers, too, that this process has started: what they fail with is a stop
            compiler_stopped = runtime.stop.received and runtime.world_size == 1
            if not (isinstance(error, Stopped) or compiler_stopped):
                raise
            run.loader.position = position  # where the step began that is not done
            if step > 0:
                writer.save(step, skipped)
            writer.finish()
            runtime.print0(f"stopped at step {step}: go on with --resume")
            runtime.from_rank0("saved")  # the others wait: torchrun ends all processes as soon as one has ended
            raise Stopped from error
        finally:
            run.log.track("finish")
        writer.finish()
    runtime.print0(
        f"the log is {config.out_dir}/log.txt, its curve {config.out_dir}/curve.png\n"
        f"to read more of it: python sample.py --model {config.out_dir}"
    )


def report_step(step, loss, norm, skipped, seconds, run, config, runtime):
    """Print and log one update, or that it was skipped, and how many in a row."""
    lr, tok_s = get_lr(step, config), config.total_batch_tokens / seconds
    line = f"step {step:5d} | loss: {loss:.6f} | lr: {lr:.4e} | norm: {norm:.4f} | dt: {seconds * 1000:.2f}ms | "
    line += f"tok/s: {tok_s:,.0f}"
    peak = peak_flops(runtime.device)
    if peak:
        # model FLOPs utilization: FLOPs that the model's mathematics needs, over those that the GPUs could have done
        mfu = flops_per_token(run.raw_model.config, config.seq_len) * tok_s / (peak * runtime.world_size)
        line += f" | mfu: {mfu:.1%}"
    if skipped:
        line += f" | update skipped, {skipped} in a row"
    runtime.print0(line)
    if runtime.rank == 0:
        values = {"train": loss, "lr": lr, "norm": norm, "tok_s": tok_s}
        run.log.write(step, **values, **({"skipped": skipped} if skipped else {}))


def describe_run(run, config, runtime, resumed_step):
    """The lines that head a run: what is trained, on what, with what."""
    loader, c, tokens = run.loader, run.raw_model.config, run.loader.num_rows * run.loader.T
    accumulation = config.total_batch_tokens // (loader.B * loader.T * runtime.world_size)
    return (
        f"model: {run.raw_model.num_params():,} parameters, {c.n_layer} layers, {c.n_head} heads, {c.n_embd} channels\n"
        f"data: {tokens:,} tokens in {len(loader.paths)} shards of {config.data_dir}, "
        f"{config.max_steps * config.total_batch_tokens / tokens:.2f} epochs in {config.max_steps} steps\n"
        f"batch: {config.total_batch_tokens:,} tokens = {loader.B} rows x {loader.T} tokens x {runtime.world_size} "
        f"processes x {accumulation} micro-steps\n"
        f"machine: {runtime.device}, {str(runtime.dtype).removeprefix('torch.')}, "
        f"torch {torch.__version__}, {platform.machine()}, {'in shards, ' if runtime.fsdp else ''}"
        f"{'compiled, which the first step waits for' if runtime.compile else 'eager'}"
        + (f"\nresuming {config.out_dir} at step {resumed_step}" if resumed_step is not None else "")
    )


# --- command line -----------------------------------------------------------------------------------------------------


def config_errors(model_config, config):
    """Everything wrong with a configuration, a line for each: all of it is found before any work starts."""
    errors = []
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    positive = ["block_size", "n_layer", "n_head", "n_embd", "total_batch_tokens", "micro_batch", "seq_len", "lr",
                "eval_interval", "save_interval", "keep_checkpoints", "val_tokens", "num_samples",
                "max_new_tokens"]  # fmt: skip
    not_negative = ["max_steps", "warmup_steps", "weight_decay", "grad_clip", "sample_interval"]
    values = {**asdict(model_config), **asdict(config)}
    values["micro_batch"] = 1 if config.micro_batch == "auto" else config.micro_batch
    errors += [f"--{name} is {values[name]}: it must be above 0" for name in positive if not values[name] > 0]
    errors += [f"--{name} is {values[name]}: it must be 0 or more" for name in not_negative if not values[name] >= 0]
    errors += [f"--{name} is inf: it must be finite" for name in positive + not_negative if values[name] == math.inf]
    if not errors:  # the arithmetic needs these
        errors = relation_errors(model_config, config, world_size)
    if not 0 <= config.min_lr_ratio <= 1:
        errors.append(f"--min_lr_ratio is {config.min_lr_ratio}: it is a share of --lr, from 0 to 1")
    if not 0 <= model_config.dropout < 1:
        errors.append(f"--dropout is {model_config.dropout}: it must be 0 or more, and less than 1")
    # a mere folder of that name, as wandb makes them, has no origin
    if config.tracker != "none" and not getattr(importlib.util.find_spec(config.tracker), "origin", None):
        errors.append(f"--tracker {config.tracker} is not installed: pip install {config.tracker}")
    if not 0 <= config.seed < 2**32:
        errors.append(f"--seed is {config.seed}: it must be from 0 to 2**32 - 1")
    if config.resume and config.overwrite:
        errors.append("--resume and --overwrite exclude each other: give one of them")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and config.overwrite:
        errors.append("--overwrite would delete the run that torchrun restarts: give --resume")
    errors += [
        f"--override {name}: a resumed run can change {', '.join(sorted(OVERRIDABLE))}, so named"
        for name in config.override if name not in OVERRIDABLE
    ]  # fmt: skip
    if config.sample_interval and not config.prompt:
        errors.append("--prompt is empty: samples need something to begin with (--sample_interval 0 turns them off)")
    return errors + machine_errors(config, world_size) + file_errors(config)


def relation_errors(model_config, config, world_size):
    """Numbers that do not fit each other."""
    errors, c = [], config
    if model_config.n_embd % model_config.n_head:
        errors.append(f"--n_embd {model_config.n_embd} is not a multiple of --n_head {model_config.n_head}")
    if c.seq_len > model_config.block_size and not c.init_from:
        errors.append(f"--seq_len {c.seq_len} is more than --block_size {model_config.block_size}: lower the first")
    rows, remainder = divmod(c.total_batch_tokens, c.seq_len * world_size)
    if remainder or not rows:
        errors.append(
            f"--total_batch_tokens {c.total_batch_tokens} is not a multiple of --seq_len {c.seq_len} x {world_size} "
            f"processes: {max(1, rows) * c.seq_len * world_size} is"
        )
    elif c.micro_batch != "auto" and rows % c.micro_batch:
        fits = max(b for b in range(1, min(c.micro_batch, rows) + 1) if rows % b == 0)
        errors.append(f"--micro_batch {c.micro_batch} does not divide a process's {rows} rows of a batch: {fits} does")
    if c.warmup_steps > c.max_steps > 0:
        errors.append(f"--warmup_steps {c.warmup_steps} is more than --max_steps {c.max_steps}: lower the first")
    if c.val_tokens < c.seq_len:
        errors.append(f"--val_tokens {c.val_tokens} is less than one row of --seq_len {c.seq_len}")
    return errors


def machine_errors(config, world_size):
    """What the machine cannot do of what the configuration asks for."""
    errors = []
    device_type = pick_device(config.device)
    if device_type == "cuda" and not torch.cuda.is_available():
        errors.append("--device cuda, but torch finds no GPU here: check nvidia-smi, or give --device cpu")
    elif device_type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        errors.append(
            f"{os.environ['LOCAL_WORLD_SIZE']} processes on {torch.cuda.device_count()} GPUs: "
            "give torchrun --nproc_per_node as many as there are GPUs"
        )
    if device_type == "mps" and not torch.backends.mps.is_available():
        errors.append("--device mps, but torch finds no Apple GPU here: give --device cpu")
    if device_type == "mps" and world_size > 1:
        errors.append("an Apple GPU serves one process: start with python, or give --device cpu")
    if config.fsdp and world_size == 1:
        errors.append("--fsdp is for several processes: start them with torchrun --nproc_per_node, or leave it out")
    if config.fsdp and not errors and pick_dtype(config.dtype, device_type) == torch.float16:
        errors.append("--fsdp cannot scale float16's gradients: give --dtype bfloat16 or float32")
    if config.dtype == "float16" and device_type != "cuda":
        errors.append(f"--dtype float16 needs an NVIDIA GPU, this run is on {device_type}: give --dtype float32")
    return errors


def lacks_demo_shards(config):
    """Whether the demo has yet to make its shards: nothing is there, or what an interrupted start has left."""
    if config.preset != "demo":
        return False
    manifest = fineweb.read_manifest(config.data_dir)
    interrupted = manifest.get("source") == "stdlib" and not manifest["finished"]
    return interrupted or not fineweb.list_shards(Path(config.data_dir))


def file_errors(config):
    """What stands in the way in the files and folders that the configuration names."""
    errors = []
    try:
        for split in () if lacks_demo_shards(config) else ("train", "val"):
            fineweb.find_shards(config.data_dir, split)
    except fineweb.DataError as error:
        errors.append(str(error))
    except OSError as error:
        errors.append(f"--data_dir cannot be read ({error}): change its permissions, or name another folder")
    try:
        if config.hellaswag_file not in ("none", TrainConfig.hellaswag_file):
            hellaswag.load_rows(config.hellaswag_file)
    except UserError as error:
        errors.append(f"--hellaswag_file {error}")
    out_dir = Path(config.out_dir).resolve()
    existing = next(path for path in (out_dir, *out_dir.parents) if os.path.exists(path))  # False where it is hidden
    if not existing.is_dir() or not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        mend = "change its permissions, or name another folder"
        errors.append(f"--out_dir {out_dir} cannot be made: {existing} is no folder that can be written to: {mend}")
    elif (out_dir / "log.txt").exists() or any(out_dir.glob("checkpoints/step_*")):
        if not (config.resume or config.overwrite):
            way_out = "give --resume to go on, --overwrite to delete it, or another --out_dir"
            errors.append(f"{out_dir} holds a run: {way_out}")
    source = Path(config.init_from or os.devnull).resolve()
    if config.overwrite and out_dir in (source, *source.parents):
        errors.append(f"--overwrite would delete --init_from {config.init_from}: give another --out_dir")
    return errors


def parse_command_line(arguments):
    """(GPTConfig, TrainConfig) of a command line: --preset chooses the defaults, every other flag overrides."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="gpt2")
    preset = first.parse_known_args(arguments)[0].preset
    if preset not in PRESETS:
        raise ConfigError(f"--preset {preset} is not known: choose one of {', '.join(PRESETS)}")
    model_defaults, training_defaults = PRESETS[preset]

    def configs(model: GPTConfig = model_defaults, training: TrainConfig = training_defaults):
        return model, training

    description = f"{inspect.cleandoc(__doc__).split('Shapes in')[0]}\nPresets: {', '.join(PRESETS)}"
    model_config, config = tyro.cli(
        configs, args=arguments, description=description, use_underscores=True, config=(tyro.conf.OmitArgPrefixes,)
    )
    config = replace(config, override=tuple(name.replace("-", "_") for name in config.override))
    if config.preset == "demo" and Path(config.out_dir).resolve() == Path(PRESETS["demo"][1].out_dir):
        config = replace(config, overwrite=not config.resume)  # the demo's own folder, where each run starts over
    return model_config, config


def main(arguments=None):
    """Train as the command line says, and exit as the head of this file says."""
    exit_code = 0
    try:
        model_config, config = parse_command_line(sys.argv[1:] if arguments is None else arguments)
        errors = config_errors(model_config, config)
        if errors and int(os.environ.get("LOCAL_RANK", 0)):
            sys.exit(2)  # the machine's first process says why
        if errors:
            raise ConfigError("\n".join(errors))
        runtime = setup_runtime(config)
        with lock_out_dir(config.out_dir) if runtime.rank == 0 else nullcontext():
            if runtime.rank == 0 and lacks_demo_shards(config):
                fineweb.prepare("stdlib", config.data_dir, "bytes", shard_tokens=DEMO_SHARD_TOKENS, workers=1)
            runtime.from_rank0("the folders are ready")
            train(model_config, config, runtime)
    except torch.OutOfMemoryError:
        print(
            "error: out of GPU memory: give --micro_batch, or halve it (the batch of an update stays the same)",
            file=sys.stderr,
        )
        sys.exit(2)
    except (UserError, fineweb.DataError, OSError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(2)
    except Stopped:
        exit_code = EXIT_STOPPED
    except KeyboardInterrupt:  # before the first step
        sys.exit(130)
    if runtime.world_size > 1:
        # Not after an error: where one process has failed, the others would hang here. DDP's reference cycles must go
        # first, for they keep gloo's threads alive, which would then abort the process as it exits.
        gc.collect()
        dist.destroy_process_group()
    if exit_code:
        sys.exit(exit_code)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal cannot show
    main()
