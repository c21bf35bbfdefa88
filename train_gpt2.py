"""
Train a GPT-2 from scratch: one file, to be read from top to bottom.

    python train_gpt2.py --preset demo                        a small model, on a CPU, in three minutes
    python train_gpt2.py                                      GPT-2 124M on one GPU (first: python fineweb.py)
    torchrun --standalone --nproc_per_node=8 train_gpt2.py    the same run with the same batches, on eight GPUs
    python train_gpt2.py --resume                             continue an interrupted run, or start if there is none
    python train_gpt2.py --help                               all flags; --version: git revision, Python and torch

In a notebook: from train_gpt2 import GPT, GPTConfig. Importing this file only defines things.
Exit codes: 2 for a user error, which stderr explains; 75 for a run that a signal stopped and --resume can continue.

The file follows the lecture: configuration, model, data, optimizers, devices, training step, evaluation, training loop,
command line. support/ holds what a first reading can skip, such as checkpoints.py and distributed.py (FSDP, signals).

Shapes in the comments: B sequences of a batch ("rows"), T tokens of a sequence, C channels (n_embd), nh heads
(n_head), hs channels of a head (C = nh * hs), V ids of the vocabulary.
"""

import argparse
import gc
import importlib.util
import inspect
import math
import os
import re
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fineweb
import hellaswag
from support import checkpoints, common, distributed, foreign, hardware, runlog, tokenizer
from support.common import UserError, flag
from support.distributed import EXIT_STOPPED, Stopped, StopSignal, any_rank, from_rank0, gather, sum_over_ranks
from support.generation import KVCache, pick_next_id
from support.loss import chunk_loss, cross_entropy
from support.muon import Muon

HERE = Path(__file__).resolve().parent


# --- configuration: every number of the recipe is in these two tables, with its source --------------------------------


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. Without --preset it is GPT-2 124M."""

    block_size: int = flag(1024, above=0)  # positions: the longest sequence that the model can read (GPT-2)
    vocab_size: tyro.conf.Suppress[int] = flag(50257, "free")  # true size, given by the data; the last is <|endoftext|>
    n_layer: int = flag(12, above=0)  # number of transformer blocks (GPT-2)
    n_head: int = flag(12, above=0)  # attention heads in each block (GPT-2)
    n_embd: int = flag(768, above=0)  # width of the model (channels) (GPT-2)
    flash: bool = flag(True, "free")  # use the fused attention kernel; off: plain products, to study and time
    dropout: float = flag(0.0, "named")  # share of activations set to zero in training, for data that repeats (GPT-1)

    @property
    def padded_vocab_size(self):
        """Rows of the embedding: a multiple of 128, because GPUs multiply such sizes fastest (50257 -> 50304)."""
        return math.ceil(self.vocab_size / 128) * 128


@dataclass(frozen=True)
class TrainConfig:
    """A run. Without --preset it is the lecture's, with numbers of the GPT-3 paper (table 2.1, appendix B)."""

    preset: str = flag("gpt2", "free")  # the set of defaults that the other flags override
    data_dir: str = flag(str(fineweb.DATA_DIR), "free")  # token shards, from fineweb.py or published .bin files
    source: str | None = flag(None, "free")  # train on this text: a file, folder or Hub dataset, instead of data_dir
    encoding: Literal["gpt2", "bytes"] = flag("gpt2", "free")  # how --source becomes tokens: GPT-2's, or one per byte
    out_dir: str = flag(str(HERE / "log"), "free")  # folder to write: log.txt, curve.png and checkpoints/
    init_from: str | None = flag(None, "named")  # start from this Hugging Face name, model folder or output folder
    resume: bool = flag(False, "free")  # continue from the newest checkpoint in out_dir, or start if there is none
    overwrite: bool = flag(False, "free")  # delete the run in out_dir and start again
    override: tuple[str, ...] = flag((), "free")  # flags that may change when resuming, for example: max_steps lr
    seed: int = flag(1337, "named", at_least=0, at_most=2**32 - 1)  # seed of weights, shuffle and dropout (lecture)

    max_steps: int = flag(19073, "named", at_least=0)  # number of updates (lecture: 10B tokens)
    epochs: float = flag(0.0, "free", at_least=0)  # passes over the text, ten evaluations each; 0: max_steps counts
    total_batch_tokens: int = flag(524288, "named", above=0)  # tokens per update, over all processes (GPT-3: 0.5M)
    batch_ramp_steps: int = flag(0, "named", at_least=0)  # updates in which the batch grows to its full size; 0: none
    batch_ramp_from: int = flag(32768, "named", above=0)  # tokens of the first update, with --batch_ramp_steps (GPT-3)
    # sequences computed at once by a process; auto: as many as fit, up to 65536 tokens on a GPU, 4096 elsewhere
    micro_batch: int | Literal["auto"] = flag("auto", "free", above=0)
    seq_len: int = flag(1024, above=0)  # tokens of a sequence, at most block_size (GPT-2)
    shuffle: bool = flag(True, "named")  # permute shards and sequences differently in each epoch; off: lecture's order

    optimizer: Literal["adamw", "muon"] = flag("adamw")  # muon: for the blocks' matrices, with AdamW for the rest
    lr: float = flag(6e-4, "named", above=0)  # peak learning rate (GPT-3)
    schedule: Literal["cosine", "linear"] = flag("cosine", "named")  # how the learning rate falls (GPT-3: cosine)
    min_lr_ratio: float = flag(0.1, "named", at_least=0, at_most=1)  # final learning rate / peak (GPT-3: 0.1)
    warmup_steps: int = flag(715, "named", at_least=0)  # updates in which the learning rate rises (GPT-3: 375M tokens)
    weight_decay: float = flag(0.1, "named", at_least=0)  # weight decay of matrices and embeddings only (GPT-3)
    grad_clip: float = flag(1.0, "named", at_least=0)  # scale a larger gradient down to this norm; 0: never (GPT-3)
    betas: tuple[float, float] = flag((0.9, 0.95), "named")  # decay rates of AdamW's two moving averages (GPT-3)
    eps: float = flag(1e-8, "named", above=0)  # epsilon of AdamW (GPT-3)
    max_skipped_steps: int = flag(20, "free", above=0)  # end after this many updates in a row without a finite loss

    device: Literal["auto", "cpu", "cuda", "mps"] = flag("auto", "free")  # compute here; auto: cuda, else mps, else cpu
    # precision of matrix products; auto: bfloat16 where the hardware has it, float16 on older GPUs, else float32
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "free")
    compile: Literal["auto", "on", "off"] = flag("auto", "free")  # use torch.compile; auto: if it works, except on mps
    fsdp: bool = flag(False, "free")  # each process keeps a share of weights, gradients and optimizer state (FSDP2)
    activation_checkpointing: bool = flag(False, "free")  # compute each block twice: less memory, more time

    eval_interval: int = flag(250, "free", above=0)  # steps between evaluations (lecture)
    # tokens that measure the validation loss; auto: 10485760 (modded-nanogpt), on a CPU about a minute of work
    val_tokens: int | Literal["auto"] = flag("auto", "free", above=0)
    log_interval: int = flag(1, "free", above=0)  # steps between printed lines; log.txt has all steps
    save_interval: int = flag(5000, "free", above=0)  # steps between checkpoints; the last is always saved (lecture)
    save_best: bool = flag(False, "free")  # also save at evaluations with the lowest validation loss so far
    keep_checkpoints: int = flag(5, "free", above=0)  # number of newest checkpoints to keep (lecture: 4)
    sample_interval: int = flag(250, "free", at_least=0)  # steps between samples, 0 for none (lecture)
    prompt: str = flag("Hello, I'm a language model,", "free")  # start of the samples (lecture)
    num_samples: int = flag(4, "free", above=0)  # samples each time (lecture)
    max_new_tokens: int = flag(24, "free", above=0)  # tokens to generate after the prompt (lecture)
    sample_seed: int = flag(42, "free", at_least=0)  # seed of the random generator of the samples (lecture)
    hellaswag_file: str = flag(str(hellaswag.FILE), "free")  # HellaSwag's rows, downloaded if missing; none: no score
    # also send log.txt's values to this package; tensorboard writes files into out_dir/tensorboard
    tracker: Literal["none", "wandb", "trackio", "tensorboard"] = flag("none", "free")
    dry_run: bool = flag(False, "free")  # check everything, print the plan and write nothing


# GPT-2's paper gives no learning rates, so these are the rates of GPT-3's models of about the same size. All attention
# is dense; GPT-3 alternates it with sparse attention. The 1.3B has 16 heads of 128 channels, because the paper's 24 do
# not divide 2048. All presets train on 10B tokens; for the paper's 300B: --max_steps 572205, and 286102 for the 1.3B.
PRESETS = {
    "gpt2": (GPTConfig(), TrainConfig()),
    # experimental, like the next one: chosen on models of 0.4M to 3M parameters, and extrapolated (docs/recipe.md)
    "gpt2-tuned": (GPTConfig(), TrainConfig(preset="gpt2-tuned", lr=1.5e-3, betas=(0.8, 0.95), schedule="linear",
                                            min_lr_ratio=0.0, max_steps=14305, warmup_steps=3576)),
    "gpt2-fast": (GPTConfig(), TrainConfig(preset="gpt2-fast", optimizer="muon", lr=2.4e-3, schedule="linear",
                                           min_lr_ratio=0.0, max_steps=9536, warmup_steps=358)),
    # OpenAI's model continues with your text: python train_gpt2.py --preset finetune --source my.txt. Small texts need
    # dropout and a tenth of the learning rate. The two checkpoints that stay are usually the best one and the last one.
    "finetune": (GPTConfig(dropout=0.1),
        TrainConfig(
            preset="finetune", out_dir=str(HERE / "finetune"), init_from="gpt2", epochs=3, lr=6e-5, warmup_steps=10,
            total_batch_tokens=8192, save_best=True, keep_checkpoints=2, sample_interval=1000, hellaswag_file="none",
        ),
    ),
    "gpt2-medium": (GPTConfig(n_layer=24, n_head=16, n_embd=1024), TrainConfig(preset="gpt2-medium", lr=3e-4)),
    "gpt2-large": (GPTConfig(n_layer=36, n_head=20, n_embd=1280), TrainConfig(preset="gpt2-large", lr=2.5e-4)),
    "gpt2-xl": (GPTConfig(n_layer=48, n_head=25, n_embd=1600), TrainConfig(preset="gpt2-xl", lr=2e-4)),
    "gpt3-125m": (GPTConfig(block_size=2048), TrainConfig(preset="gpt3-125m", seq_len=2048)),
    "gpt3-350m": (GPTConfig(block_size=2048, n_layer=24, n_head=16, n_embd=1024),
                  TrainConfig(preset="gpt3-350m", seq_len=2048, lr=3e-4)),
    "gpt3-760m": (GPTConfig(block_size=2048, n_layer=24, n_head=16, n_embd=1536),
                  TrainConfig(preset="gpt3-760m", seq_len=2048, lr=2.5e-4)),
    "gpt3-1.3b": (GPTConfig(block_size=2048, n_layer=24, n_head=16, n_embd=2048),
                  TrainConfig(preset="gpt3-1.3b", seq_len=2048, lr=2e-4, total_batch_tokens=1048576,
                              max_steps=9537, warmup_steps=358)),
    # chosen by measurement on two CPU cores (benchmarks/results/demo.md): at this size the fused attention kernel and
    # compilation cost more time than they save, and many steps of a shallow model learn more than few of a deep one
    "demo": (GPTConfig(block_size=128, vocab_size=257, n_layer=2, n_head=4, n_embd=128, flash=False),
        TrainConfig(
            preset="demo", data_dir=str(HERE / "demo" / "data"), out_dir=str(HERE / "demo" / "log"),
            max_steps=1700, total_batch_tokens=16 * 128, seq_len=128,
            optimizer="muon", lr=0.014, min_lr_ratio=0.0, warmup_steps=50,
            eval_interval=600, save_interval=600, sample_interval=600,
            prompt="\ndef ", num_samples=1, max_new_tokens=250, hellaswag_file="none", compile="off", log_interval=50,
        ),
    ),
}  # fmt: skip
# what a resumed run may change if --override names it, and what it may not; another path to the same data is free
FLAGS = {f.name: f.metadata for f in (*fields(GPTConfig), *fields(TrainConfig))}
RECIPE_FLAGS = [name for name in FLAGS if FLAGS[name]["resume"] != "free" and name != "seed"]
OVERRIDABLE = ["data_dir", *(name for name in FLAGS if FLAGS[name]["resume"] == "named")]
SHAPE_FLAGS = [f.name for f in fields(GPTConfig) if f.metadata["resume"] == "fixed"]
DEMO_SHARD_TOKENS = 250_000  # the first shard is for validation: 2% of the standard library
VAL_TOKENS = 10_485_760  # of --val_tokens auto
AUTO_TOKENS = {"cuda": 65536, "cpu": 4096, "mps": 4096}  # most tokens of --micro_batch auto (lecture: 64 x 1024)


# --- the model --------------------------------------------------------------------------------------------------------


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value of all heads in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.c_proj.NANOGPT_SCALE_INIT = True
        self.n_head, self.flash, self.dropout = config.n_head, config.flash, config.dropout

    def forward(self, x, mask=None, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(k, v)
        is_causal = mask is None and T > 1  # a single token comes last, so it may look at all others
        dropout = self.dropout if self.training else 0.0
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
        else:
            if is_causal:
                mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
            scores = q @ k.transpose(-2, -1) * k.size(-1) ** -0.5  # (B, nh, T, T); with a cache (B, nh, 1, its length)
            if mask is not None:  # added, because masked_fill on the scores takes a fifth longer on a CPU
                scores = scores + torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
            y = F.dropout(F.softmax(scores, dim=-1), dropout) @ v  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.c_proj(y)


class CastLayerNorm(nn.LayerNorm):
    """LayerNorm for float32 inputs and weights that FSDP may have gathered in bfloat16: the kernel needs one type."""

    def forward(self, x):
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
        self.ln_1 = CastLayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = CastLayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, mask=None, cache=None):
        x = x + self.drop(self.attn(self.ln_1(x), mask, cache))  # attention: tokens exchange information
        x = x + self.drop(self.mlp(self.ln_2(x)))  # MLP: each token is processed by itself
        return x


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019), with the parameter names of OpenAI and Hugging Face."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.compiles_trunk = self.compiles_loss = False
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd),
        ))  # fmt: skip
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # one table reads and predicts tokens (Press & Wolf 2017)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = 0.02
            if hasattr(module, "NANOGPT_SCALE_INIT"):
                # each block adds two branches to the residual stream: this keeps its size equal at any depth (GPT-2)
                std *= (2 * self.config.n_layer) ** -0.5
            nn.init.normal_(module.weight, mean=0.0, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def set_activation_checkpointing(self, on):
        """Choose whether training keeps the blocks' activations (faster) or computes them twice (less memory)."""
        self.activation_checkpointing = on

    def compile_training(self, trunk):
        """Compile what forward(idx, targets) runs, for batches of one shape: the loss and, if asked, the trunk."""
        self.compiles_trunk, self.compiles_loss = trunk, True

    def num_params(self):
        """Count the parameters: tied weights once, the padding of the vocabulary not at all. 124,439,808 for GPT-2."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return sum(p.numel() for p in self.parameters()) - padding

    def trunk(self, idx, position_ids=None, mask=None, caches=None):
        """Return the final states (B, T, C) of the token ids idx (B, T).

        position_ids: (T) or (B, T), by default 0 … T-1. mask: bool, broadcast to (B, nh, T, T), True where the row's
        token may look at the column's; causal by default. caches: one KVCache for each block; if they are not empty,
        idx holds the one token that follows. Raises ValueError for a sequence longer than block_size.
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
        """Return the logits (..., V) of states (..., C), without the ids that pad the vocabulary."""
        return self.lm_head(states)[..., : self.config.vocab_size]

    def forward(self, idx, targets=None):
        """Return (logits (B, T, V), None) of idx (B, T); with targets (B, T) return (None, loss).

        The loss is the mean cross entropy, in nats and float32, over the targets that are not -100. No logits come with
        it: see support/loss.py.
        """
        if targets is None:
            return self.head(self.trunk(idx)), None
        states = common.compiled(GPT.trunk)(self, idx) if self.compiles_trunk else self.trunk(idx)
        states, weight = states.flatten(0, 1), self.lm_head.weight
        loss_of_chunk = common.compiled(chunk_loss) if self.compiles_loss else chunk_loss
        return None, cross_entropy(states, weight, targets.flatten(), self.config.vocab_size, loss_of_chunk)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=50, generator=None, top_p=1.0):
        """Continue each row of idx (B, T) by sampled ids: return (B, T + max_new_tokens).

        top_k: sample only from the k most likely ids (None: from all). top_p: of these, only from the most likely ones
        that together have this probability (Holtzman et al. 2020). temperature 0 takes the most likely id. generator: a
        torch.Generator on idx's device. <|endoftext|> does not stop it. It reads at most the last block_size tokens.
        Raises ValueError for numbers out of range or an empty prompt.
        """
        return torch.cat((idx, *self.stream(idx, max_new_tokens, temperature, top_k, generator, top_p)), dim=1)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=50, generator=None, top_p=1.0):
        """Yield the ids that `generate` appends, (B, 1) each, as soon as they are sampled."""
        if temperature < 0 or (top_k is not None and top_k < 1) or not 0 < top_p <= 1 or idx.size(1) == 0:
            raise ValueError("generate needs a prompt, temperature >= 0, top_k >= 1 or None, and 0 < top_p <= 1")
        block_size, longest = self.config.block_size, idx.size(1) + max_new_tokens
        caches = [KVCache(min(block_size, longest)) for _ in self.transformer.h]
        for _ in range(max_new_tokens):
            T, read = idx.size(1), caches[0].length
            if T <= block_size:
                states = self.trunk(idx[:, read:], torch.arange(read, T, device=idx.device), caches=caches)
            else:  # the window moves, so each token's position changes and the cached keys are no longer valid
                states = self.trunk(idx[:, -block_size:])
            next_id = pick_next_id(self.head(states[:, -1]).float(), temperature, top_k, top_p, generator)
            idx = torch.cat((idx, next_id), dim=1)
            yield next_id

    # OpenAI's checkpoints, and so Hugging Face's folders, store these weights as (in, out); nn.Linear has (out, in)
    TRANSPOSED = re.compile(r"(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")

    @classmethod
    def from_pretrained(cls, name_or_folder, flash=True, dropout=0.0, flag="the model"):
        """Return the GPT-2 of a Hugging Face name (gpt2, gpt2-xl, …) or model folder, as a checkpoint is one."""
        hf_model = checkpoints.open_gpt2(name_or_folder, flag, exactly=True)
        hf_config = hf_model.config
        model = cls(GPTConfig(
            block_size=hf_config.n_positions, vocab_size=hf_config.vocab_size, flash=flash, dropout=dropout,
            n_layer=hf_config.n_layer, n_head=hf_config.n_head, n_embd=hf_config.n_embd,
        ))  # fmt: skip
        model.load_pretrained_weights(hf_model.state_dict())
        return model

    @torch.no_grad()
    def load_pretrained_weights(self, weights):
        """Copy in {name: tensor} of a GPT2LMHeadModel of this shape, with or without lm_head.weight."""
        for name, weight in weights.items():
            if name == "lm_head.weight":
                continue  # tied to wte
            ours = self.get_parameter(name)
            if name == "transformer.wte.weight":
                ours[self.config.vocab_size :] = 0
                ours = ours[: self.config.vocab_size]
            ours.copy_(weight.t() if self.TRANSPOSED.search(name) else weight)

    def pretrained_weights(self):
        """Return copies of the weights as in a GPT2LMHeadModel's file: {name: tensor}, float32, on the CPU."""
        weights = {}
        for name, weight in self.state_dict().items():
            if name == "lm_head.weight":
                continue  # tied to wte
            if name == "transformer.wte.weight":
                weight = weight[: self.config.vocab_size]
            weight = weight.t() if self.TRANSPOSED.search(name) else weight
            weights[name] = weight.to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
        return weights

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors into a folder that transformers opens as a GPT2LMHeadModel."""
        checkpoints.write_model_folder(folder, self.pretrained_weights(), asdict(self.config))


# --- the data ---------------------------------------------------------------------------------------------------------


class DataLoaderLite:
    """Batches of rows (sequences) from a folder of token shards: the same global batches for any number of processes.

    All shards of a split form one stream of tokens. Row i holds the T+1 tokens from i*T on, because the last one is the
    target of the one before it. So rows cross the borders of shards, and only the last partial row is dropped. In each
    epoch, shuffling permutes the shards, joins neighbors into groups of about SHUFFLE_ROWS rows, and permutes the rows
    of each group. So reads stay local, and a corpus of many small shards is still mixed well.
    `position`, the number of rows that all processes together have consumed, is the entire state of the loader.
    Raises UserError for shards that are missing, damaged or too short.
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
            reason = f"the {split} split has {self.starts[-1]} tokens, too few for one sequence of --seq_len {T}"
            fix = "add text" if split == "train" else "give a larger --shard_tokens (validation is the first shard)"
            raise UserError(f"{data_dir}: {reason}: {fix} in python fineweb.py, or lower --seq_len")
        # a row belongs to the shard in which it starts: shard k has the rows first_row[k] … first_row[k+1]-1
        self.first_row = np.minimum((self.starts + T - 1) // T, self.num_rows)
        self.position = 0
        self._groups = lru_cache(maxsize=2)(self._draw_groups)  # 2: a batch may cross from one to the next
        self._row_order = lru_cache(maxsize=2)(self._draw_row_order)

    def _draw_groups(self, epoch):
        """Return an epoch's groups of shard numbers, and for each group the number of rows before it."""
        # RandomState, not default_rng: its stream never changes, so a run can be repeated with any later numpy
        order = np.random.RandomState([self.seed, epoch]).permutation(len(self.shards))
        sizes = np.diff(self.first_row)[order]  # rows of each shard
        rows_before = np.cumsum(sizes) - sizes
        cuts = np.flatnonzero(np.diff(rows_before // self.SHUFFLE_ROWS)) + 1  # where a group starts
        return np.split(order, cuts), rows_before[[0, *cuts]]

    def _draw_row_order(self, epoch, group):
        """Return the rows of a group of shards in the order in which this epoch reads them."""
        shards = self._groups(epoch)[0][group]
        rows = np.concatenate([np.arange(self.first_row[k], self.first_row[k + 1]) for k in shards])
        return np.random.RandomState([self.seed, epoch, group]).permutation(rows)

    def _row_index(self, position):
        """Return which row of the stream is read at a position of the endless sequence of epochs."""
        epoch, i = divmod(position, self.num_rows)
        if not self.shuffle:
            return i
        _, rows_before = self._groups(epoch)
        group = int(np.searchsorted(rows_before, i, side="right")) - 1  # the last group that starts at i or before
        return int(self._row_order(epoch, group)[i - rows_before[group]])

    def _read_tokens(self, start, out):
        """Fill out (n) with the tokens start … start+n-1 of the stream, from as many shards as they touch."""
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        filled = 0
        while filled < len(out):
            offset = start + filled - self.starts[shard]
            piece = self.shards[shard][offset : offset + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            if len(piece) and piece.max() >= self.vocab_size:
                raise UserError(
                    f"{self.paths[shard]} has token id {piece.max()} in a vocabulary of {self.vocab_size}: it is "
                    "damaged or has another encoding; create the shards again with python fineweb.py"
                )
            filled += len(piece)
            shard += 1

    def rows(self, positions):
        """Return the rows at n positions: inputs x and targets y, each (n, T) int64, both views of one tensor."""
        tokens = np.empty((len(positions), self.T + 1), dtype=np.int32)
        for row, position in zip(tokens, positions):
            self._read_tokens(self._row_index(position) * self.T, row)
        tokens = torch.from_numpy(tokens)
        if self.device.type == "cuda":
            tokens = tokens.pin_memory()  # so that the copy runs in the background; otherwise the CPU waits for the GPU
        tokens = tokens.to(self.device, non_blocking=tokens.is_pinned()).long()
        return tokens[:, :-1], tokens[:, 1:]

    def next_batch(self):
        """Return this process's next micro-batch: x and y, each (B, T) int64 on the device."""
        first = self.position + self.rank * self.B
        self.position += self.B * self.world_size
        return self.rows(range(first, first + self.B))


# --- optimizers and learning rate -------------------------------------------------------------------------------------


def configure_optimizers(model, config):
    """Return the optimizers that --optimizer names; each parameter belongs to one. A new one is added here and to the
    names of --optimizer. All have train_step's learning rate. Biases and layer norms have no weight decay.
    """
    matrices, decayed, undecayed = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            undecayed.append(parameter)
        elif config.optimizer == "muon" and ".h." in name:
            matrices.append(parameter)
        else:
            decayed.append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, config.lr, config.weight_decay))
    return optimizers


def get_lr(step, config):
    """Return the learning rate of an update, which train_step sets: linear warmup, then down to min_lr_ratio * lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if step >= config.max_steps:
        return config.lr * config.min_lr_ratio
    progress = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    left = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))  # 1 -> 0
    return config.lr * (config.min_lr_ratio + left * (1.0 - config.min_lr_ratio))


# --- runtime: which process this is, and how it computes --------------------------------------------------------------


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
        """Compute matrix products in dtype, but sums and losses in float32. Does nothing for float32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def print0(self, *values):
        if self.rank == 0:
            print(*values, flush=True)


def setup_runtime(config):
    """Join the other processes, if torchrun started several, and choose device, precision and compilation."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device_type = common.pick_device(config.device)
    device = torch.device(f"cuda:{distributed.local_gpu()}" if device_type == "cuda" else device_type)
    if device_type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for products that autocast leaves in float32
    if world_size > 1:
        distributed.join_processes(rank, world_size, device)
    can_compile = common.can_compile(config.compile, device, warns=rank == 0)
    return Runtime(rank, world_size, device, common.pick_dtype(config.dtype, device_type), can_compile, config.fsdp)


def wrap_model(raw_model, runtime):
    """Return the model to train: compiled, and with several processes averaging its gradients over them."""
    if runtime.compile:
        raw_model.compile_training(trunk=not runtime.fsdp)
    if runtime.fsdp:
        return distributed.shard_model(raw_model, runtime.device.type, runtime.dtype, runtime.compile)
    if runtime.world_size == 1:
        return raw_model
    device_ids = [runtime.device] if runtime.device.type == "cuda" else None
    return DistributedDataParallel(raw_model, device_ids=device_ids, gradient_as_bucket_view=True)


def pick_val_tokens(model_config, config, device_type):
    """Return --val_tokens, or for auto VAL_TOKENS; on a CPU at most a minute's work at 2e11 FLOP/s."""
    if config.val_tokens != "auto":
        return config.val_tokens
    shape = GPTConfig() if config.init_from else model_config  # whose shape is not known yet
    per_minute = 60 * 2e11 / (hardware.flops_per_token(shape, config.seq_len) / 3)  # a third is forward
    return max(config.seq_len, min(VAL_TOKENS, int(per_minute))) if device_type == "cpu" else VAL_TOKENS


def batch_tokens(step, config):
    """Return the tokens of an update: total_batch_tokens, and before a ramp has ended a multiple of batch_ramp_from."""
    if step >= config.batch_ramp_steps:
        return config.total_batch_tokens
    sizes = config.total_batch_tokens // config.batch_ramp_from
    return config.batch_ramp_from * (1 + (sizes - 1) * step // config.batch_ramp_steps)


def tokens_before(step, config):
    """Return the tokens of all updates before a step."""
    ramp = min(step, config.batch_ramp_steps)
    return sum(batch_tokens(i, config) for i in range(ramp)) + (step - ramp) * config.total_batch_tokens


def rows_per_step(step, config, world_size):
    """Return how many sequences each process computes for an update. The first update has the fewest."""
    return batch_tokens(step, config) // (config.seq_len * world_size)


def pick_micro_batch(raw_model, config, runtime):
    """Return the rows of a micro-batch: --micro_batch, or for auto the most that fit (tried on a GPU, without
    compilation) and divide a process's rows. Raises UserError.
    """
    if config.micro_batch != "auto":
        return config.micro_batch
    rows = rows_per_step(0, config, runtime.world_size)
    most = min(rows, max(1, AUTO_TOKENS[runtime.device.type] // config.seq_len))
    for size in (size for size in range(most, 0, -1) if rows % size == 0):
        shape = size, config.seq_len, runtime.autocast(), config.fsdp
        if not any_rank(runtime.device.type == "cuda" and not distributed.fits_in_memory(raw_model, *shape)):
            return size
    fix = "give --micro_batch: the search runs before the model is sharded" if config.fsdp else "lower it, or --n_layer"
    raise UserError(f"not one sequence of --seq_len {config.seq_len} fits in this GPU's memory: {fix}")


# --- the training step ------------------------------------------------------------------------------------------------


def train_step(model, optimizers, scaler, loader, step, config, runtime):
    """Do one update with the next global batch. Return its mean loss (nats per token) and the norm of its gradient.

    If one of the two is not finite, nothing is updated. Raises Stopped between micro-steps.
    """
    grad_accum_steps = rows_per_step(step, config, runtime.world_size) // loader.B
    # dropout's masks depend only on the step and the process, so a resumed run draws the same ones
    torch.manual_seed(int(np.random.SeedSequence([config.seed, step, runtime.rank]).generate_state(1)[0]))
    loss_sum = torch.zeros((), device=runtime.device)
    for micro_step in range(grad_accum_steps):
        runtime.stop.raise_if_received()
        x, y = loader.next_batch()
        # gradients add up locally; only the last backward pass averages them over the processes
        with distributed.gradient_sync(model, on=micro_step == grad_accum_steps - 1), distributed.must_fit():
            with runtime.autocast():
                _, loss = model(x, y)
            # backward() adds gradients up; dividing each loss makes their sum the mean over the batch
            loss = loss / grad_accum_steps
            scaler.scale(loss).backward()
        loss_sum += loss.detach()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = gather(torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf))
    # the only time in a step that the host waits for the device; averaging the norm too keeps this to one transfer
    loss, norm = (sum_over_ranks(torch.stack([loss_sum, norm]), runtime.device) / runtime.world_size).tolist()
    is_finite = math.isfinite(loss) and math.isfinite(norm)  # the same on all processes
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, config)
        if is_finite:  # float16 may overflow: then no optimizer may update
            scaler.step(optimizer)
        # DDP's gradients are views of its buckets: after None, autograd would allocate them a second time
        optimizer.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))
    scaler.update()
    return loss, norm


# --- evaluation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validation_loss(model, loader, val_tokens, runtime):
    """Return the mean loss, in nats per token, over the first val_tokens of the split, or all of a smaller one.

    The tokens are the same for any number of processes and any B: the mean is over tokens, and rows that only fill up
    the last batch are ignored. Raises Stopped.
    """
    B, T = loader.B, loader.T
    rows = min(val_tokens // T, loader.num_rows)
    losses, counts = [], []
    for round_start in range(0, rows, runtime.world_size * B):
        runtime.stop.raise_if_received()
        first = round_start + runtime.rank * B
        own = max(0, min(B, rows - first))  # may be 0 at the end: a sharded model needs all processes to call it
        x, y = loader.rows(range(first, first + B))
        y = y.clone()  # x and y are views of the same tokens
        y[own:] = -100  # cross_entropy ignores these
        with runtime.autocast():
            _, loss = model(x, y)
        losses.append(loss)
        counts.append(own * T)
    losses = torch.stack(losses).cpu().double()
    total = (losses * torch.tensor(counts, dtype=torch.float64)).sum()
    return sum_over_ranks(total, runtime.device).item() / (rows * T)


def load_hellaswag(config, encoding, block_size, runtime):
    """Return HellaSwag's rows as tokens, the same on all ranks, or None if they are not wanted or not available."""
    examples = None
    if runtime.rank == 0 and config.hellaswag_file != "none" and encoding.name == "gpt2":
        try:
            rows = hellaswag.find_rows(config.hellaswag_file)
            examples = hellaswag.prepare(rows, encoding.encode_ordinary, block_size)  # once for all evaluations
        except UserError as error:
            if config.hellaswag_file != TrainConfig.hellaswag_file:
                raise  # the user asked for this file
            common.warn(f"training continues without HellaSwag: {error}")
    return from_rank0(examples, runtime.device)


def hellaswag_accuracy(raw_model, rows, runtime):
    """Return HellaSwag's acc_norm, completion style, over all rows. Raises Stopped."""

    def trunk(*inputs):
        runtime.stop.raise_if_received()  # all ranks call it equally often
        return raw_model.trunk(*inputs)

    counts = hellaswag.evaluate(trunk, raw_model.head, None, rows, runtime.rank, runtime.world_size, runtime.device)
    total, correct_norm = sum_over_ranks(torch.tensor([counts.total, counts.correct_norm]), runtime.device).tolist()
    return correct_norm / total


def print_samples(raw_model, encoding, config, runtime):
    """Print continuations of --prompt. The random numbers are always the same: only the model's progress shows."""
    prompt = torch.tensor(tokenizer.encode_prompt(config.prompt, encoding), device=runtime.device)
    generator = torch.Generator(runtime.device).manual_seed(config.sample_seed)  # does not disturb the run's own
    tokens = [prompt.expand(config.num_samples, -1)]
    with runtime.autocast():
        for next_ids in raw_model.stream(tokens[0], config.max_new_tokens, generator=generator):
            if runtime.stop.received:
                return
            tokens.append(next_ids)
    for i, row in enumerate(torch.cat(tokens, dim=1).tolist()):
        print(f"sample {i}: {tokenizer.decode_known(row, encoding)}", flush=True)


def evaluate(step, training, config, runtime):
    """Measure, print and log what is due at this step. Raises Stopped, and then nothing is logged."""
    last_step = step == config.max_steps
    evaluates = step % config.eval_interval == 0 or last_step
    samples = step > 0 and config.sample_interval and (step % config.sample_interval == 0 or last_step)
    scores = bool(evaluates and training.hellaswag_rows)
    results, parts = {}, [f"step {step:5d}"]

    def measure(name, function, *arguments):
        start = time.perf_counter()
        results[name] = function(*arguments, runtime)
        parts.append(f"{name}: {results[name]:.4f} ({time.perf_counter() - start:.1f} s)")

    training.raw_model.eval()  # turns dropout off, also in `model`, which has the same modules
    if evaluates:
        measure("val", validation_loss, training.model, training.val_loader, config.val_tokens)
    whole = distributed.whole_model(training.raw_model, GPT) if samples or scores else None
    if scores:
        measure("hella", hellaswag_accuracy, whole, training.hellaswag_rows)
    if evaluates:
        runtime.print0(" | ".join(parts))
    if evaluates and runtime.rank == 0:
        training.log.write(step, **results)
        training.log.report(step)
    if samples and runtime.rank == 0:
        print_samples(whole, training.encoding, config, runtime)
    training.raw_model.train()


# --- setting up a run, and resuming one -------------------------------------------------------------------------------


class Training(NamedTuple):
    """The parts of a training run."""

    raw_model: GPT  # for evaluation with varying shapes, samples and checkpoints
    model: nn.Module  # the same weights, compiled and wrapped, to train: see wrap_model
    optimizers: list
    scaler: torch.amp.GradScaler
    loader: DataLoaderLite
    val_loader: DataLoaderLite
    fingerprint: dict  # of the data
    encoding: tiktoken.Encoding
    hellaswag_rows: list | None
    log: runlog.Log
    clock: runlog.Clock


def training_state(step, skipped, training, config):
    """Return the plain values that continue a run, besides the weights. skipped: updates skipped before this step."""
    return {
        "step": step,
        "skipped": skipped,
        "optimizers": [optimizer.state_dict() for optimizer in training.optimizers],
        "scaler": training.scaler.state_dict(),
        "loader": training.loader.position,
        "rng": torch.get_rng_state(),  # for forks that use it: train_step sets its own seed
        "fingerprint": training.fingerprint,
        "config": {**asdict(training.raw_model.config), **asdict(config)},
    }


def restore(state, optimizers, scaler, loader):
    """Load a training state, except for the weights."""
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        groups = optimizer.state_dict()["param_groups"]  # this run's learning rate and decay, which may have changed
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        moments = {
            i: {name: distributed.shard_like(parameters[i], value) for name, value in values.items()}
            for i, values in saved["state"].items()
        }
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
    if scaler.is_enabled() and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    loader.position = state["loader"]
    torch.set_rng_state(state["rng"])


def load_checkpoint(config, runtime):
    """Return (training state, weights, damaged folders) of the newest whole checkpoint, or (None, None, {})."""
    state, weights, damaged = checkpoints.load_newest(config.out_dir) if config.resume else (None, None, {})
    for folder, reason in damaged.items() if runtime.rank == 0 else ():
        common.warn(f"{folder} is damaged: {reason}")
    step = state["step"] if state else None
    if from_rank0(step, runtime.device) != step:
        raise UserError(f"the processes see different checkpoints in {config.out_dir}: use a folder that all share")
    return state, weights, damaged


def check_continuation(state, model_config, config, fingerprint):
    """Raise UserError if this run differs from the one that it resumes in what it may not change."""
    flags = asdict(config) | {name: value for name, value in asdict(model_config).items() if value is not None}
    flags = {name: value for name, value in flags.items() if FLAGS[name]["resume"] != "free"}
    where, override = config.out_dir, config.override
    errors = checkpoints.flag_differences(state["config"], flags, where, OVERRIDABLE, override)
    errors += checkpoints.data_differences(state["fingerprint"], fingerprint, config.data_dir, where, override)
    if errors:
        raise UserError("\n".join(errors))


def new_model(model_config, encoding, config):
    """Return the model to train, on the CPU: new, or the one that --init_from names if it fits the data."""
    if not config.init_from:
        return GPT(replace(model_config, vocab_size=encoding.n_vocab))
    folder = checkpoints.newest_checkpoint(config.init_from, "--init_from")  # if it is an output folder
    model = GPT.from_pretrained(folder, model_config.flash, model_config.dropout, "--init_from")
    given = {name: getattr(model_config, name) for name in SHAPE_FLAGS}
    needs = encoding.name, config.data_dir, config.seq_len
    if errors := checkpoints.start_errors(config.init_from, folder, asdict(model.config), given, *needs):
        raise UserError("\n".join(errors))
    return model


def reference_recipe(model_config, config, manifest, val_loader, hellaswag_rows):
    """Return the preset if its healthy runs are a reference for this run, which changes no number of it, or None."""
    ours, preset = ({**asdict(m), **asdict(c)} for m, c in ((model_config, config), PRESETS[config.preset]))
    same = all(ours[name] == preset[name] for name in RECIPE_FLAGS)
    same &= len(hellaswag_rows or ()) in (0, hellaswag.FULL_ROWS)  # fewer rows give another accuracy
    split = val_loader.num_rows * val_loader.T
    val_tokens = split if config.val_tokens == "auto" else min(split, config.val_tokens)
    return config.preset if same and runlog.has_reference(config.preset, manifest, val_tokens) else None


def set_up(model_config, config, runtime, state, weights):
    """Return the parts of a new run, or of the one with this training state and these weights. Raises UserError."""
    torch.manual_seed(config.seed)
    manifest = fineweb.read_manifest(config.data_dir)
    encoding = fineweb.get_encoding(manifest["encoding"])
    layout = 1, config.seq_len, runtime.rank, runtime.world_size  # B is set below, by pick_micro_batch
    loader = DataLoaderLite(config.data_dir, "train", *layout, config.shuffle, config.seed, runtime.device)
    val_loader = DataLoaderLite(config.data_dir, "val", *layout, shuffle=False, device=runtime.device)
    fingerprint = {"encoding": encoding.name, **fineweb.fingerprint(val_loader.paths + loader.paths)}
    if state:
        check_continuation(state, model_config, config, fingerprint)
        shape = {name: state["config"][name] for name in asdict(model_config).keys() - {"flash", "dropout"}}
        raw_model = GPT(replace(model_config, **shape))
        raw_model.load_pretrained_weights(weights)
    else:
        raw_model = new_model(model_config, encoding, config)
    raw_model.set_activation_checkpointing(config.activation_checkpointing)
    raw_model.to(runtime.device)
    loader.B = val_loader.B = pick_micro_batch(raw_model, config, runtime)
    hellaswag_rows = load_hellaswag(config, encoding, raw_model.config.block_size, runtime)
    model = wrap_model(raw_model, runtime)  # before the optimizers, because it replaces the parameters with shards
    optimizers = configure_optimizers(raw_model, config)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    if state:
        restore(state, optimizers, scaler, loader)
    recipe = reference_recipe(raw_model.config, config, manifest, val_loader, hellaswag_rows)
    reports = runlog.Log(config.out_dir, manifest, recipe), runlog.Clock(config.max_steps)
    data = loader, val_loader, fingerprint, encoding, hellaswag_rows
    return Training(raw_model, model, optimizers, scaler, *data, *reports)


# --- the training loop ------------------------------------------------------------------------------------------------


def train(model_config, config, runtime):
    """Set up, run all steps and wait for the last checkpoint. Raises Stopped after a signal and the final save."""
    state, weights, damaged = load_checkpoint(config, runtime)
    training = set_up(model_config, config, runtime, state, weights)
    resumed_step = state["step"] if state else None
    print_run(training, config, runtime, resumed_step)
    if config.dry_run:
        return runtime.print0("this was a dry run: nothing was trained or written")
    opened = open_output(training, config, runtime, damaged, resumed_step) if runtime.rank == 0 else None
    evaluated = from_rank0(opened, runtime.device)
    first_step, skipped = (state["step"], state["skipped"]) if state else (0, 0)
    del state, weights
    output = config.out_dir, config.keep_checkpoints, asdict(training.raw_model.config), training.encoding
    with runtime.stop, checkpoints.CheckpointWriter(*output, resumed_step) as writer:
        writer.best_step = training.log.best_step() if config.save_best else None
        try:
            run_steps(first_step, skipped, evaluated, training, config, runtime, writer)
            writer.finish()
        finally:
            training.log.finish()
    if runtime.rank == 0:
        tokens = tokens_before(config.max_steps, config) - tokens_before(first_step, config)
        print(runlog.summary(training.log, tokens, training.clock, runtime.device))


def run_steps(first_step, skipped, evaluated, training, config, runtime, writer):
    """Run steps first_step … max_steps. Each is evaluated before its update, so the last line is of the final model.
    Just before first_step, `skipped` updates in a row were skipped. It may be `evaluated` already.
    """
    try:
        for step in range(first_step, config.max_steps + 1):
            last_step, position = step == config.max_steps, training.loader.position
            if not (evaluated and step == first_step):
                with runtime.stop.covers_compiler():
                    evaluate(step, training, config, runtime)
            evaluates = step > 0 and step % config.eval_interval == 0
            best = config.save_best and evaluates and from_rank0(training.log.best_step(), runtime.device) == step
            writer.best_step = step if best else writer.best_step
            retry = evaluates and any_rank(writer.failed())
            if last_step or best or retry or (step > 0 and step % config.save_interval == 0):
                save(step, skipped, training, config, runtime, writer)
            if last_step:
                break
            start_time = time.perf_counter()  # after evaluation and saving: tok/s is the speed of training alone
            with runtime.stop.covers_compiler():
                loss, norm = train_step_that_fits(step, training, config, runtime)
            skipped = 0 if math.isfinite(loss + norm) else skipped + 1
            report_step(step, loss, norm, skipped, time.perf_counter() - start_time, training, config, runtime)
            if skipped == config.max_skipped_steps:
                raise UserError(
                    f"{skipped} updates in a row were skipped, because the loss is {loss} and the gradient norm is "
                    f"{norm}: lower the learning rate, with --resume --lr {config.lr / 2:g} --override lr"
                )
    except Stopped:
        training.loader.position = position  # where the interrupted step began
        if step > 0:
            save(step, skipped, training, config, runtime, writer)
        writer.finish()
        training.log.finish()
        runtime.print0(f"stopped at step {step}: continue with --resume")
        distributed.barrier()  # torchrun ends all processes as soon as one has ended
        raise


def train_step_that_fits(step, training, config, runtime):
    """Do train_step. A process that is alone repeats it if memory does not suffice for --micro_batch auto."""
    loader = training.loader
    while True:
        position = loader.position
        try:
            return train_step(training.model, training.optimizers, training.scaler, loader, step, config, runtime)
        except distributed.MicroBatchTooLarge:
            if config.micro_batch != "auto" or runtime.world_size > 1 or loader.B == 1:
                raise
        # outside of `except`, which keeps the tensors of the failed step alive
        loader.B = training.val_loader.B = max(b for b in range(1, loader.B) if rows_per_step(0, config, 1) % b == 0)
        loader.position = position
        training.raw_model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        common.warn(f"out of GPU memory: training continues with micro-batches of {loader.B} sequences")


def open_output(training, config, runtime, damaged, resumed_step):
    """Prepare the output folder and the tracker. Return whether the log contains the resumed step's evaluation."""
    checkpoints.prepare_out_dir(config.out_dir, damaged, resumed_step is not None, config.overwrite)
    evaluated = resumed_step is not None and runlog.cut_log(training.log.path, resumed_step)
    flags = {**asdict(training.raw_model.config), **asdict(config)}
    training.log.describe(flags, hardware.device_name(runtime.device), runtime.world_size)
    if config.tracker != "none":
        training.log.start_tracker(config.tracker, flags, resumed_step or 0)
    return evaluated


def save(step, skipped, training, config, runtime, writer):
    """Save the state at this step, unless the newest checkpoint is of it. All processes gather; rank 0 writes."""
    writes = runtime.rank == 0
    if any_rank(writes and writer.lacks(step)):
        state = distributed.copy_to_cpu(training_state(step, skipped, training, config), keep=writes)
        whole = distributed.whole_model(training.raw_model, GPT)
        if writes:
            writer.save(step, whole.pretrained_weights(), state)


def report_step(step, loss, norm, skipped, seconds, training, config, runtime):
    """Print and log one update, or that it was skipped."""
    lr, tokens = get_lr(step, config), batch_tokens(step, config)
    tok_s, progress = tokens / seconds, training.clock.progress(step) if runtime.rank == 0 else ""
    if runtime.rank == 0:
        rare = ({"skipped": skipped} if skipped else {}) | ({"tokens": tokens} if config.batch_ramp_steps else {})
        training.log.write(step, train=loss, lr=lr, norm=norm, tok_s=tok_s, **rare)
    if step % config.log_interval == 0 or skipped:
        flops = hardware.flops_per_token(training.raw_model.config, config.seq_len) * tok_s / runtime.world_size
        about = hardware.mfu(flops, runtime.device), f"update skipped, {skipped} in a row" if skipped else "", progress
        line = f"step {step:5d} | loss: {loss:.6f} | lr: {lr:.4e} | norm: {norm:.4f} | dt: {seconds * 1000:.2f}ms | "
        runtime.print0(" | ".join(filter(None, (f"{line}tok/s: {tok_s:,.0f}", *about))))


def print_run(training, config, runtime, resumed_step):
    """Print the first lines of a run: what is trained, with which data and on which machine."""
    loader, m, world_size, print0 = training.loader, training.raw_model.config, runtime.world_size, runtime.print0
    micro_steps = rows_per_step(config.batch_ramp_steps, config, world_size) // loader.B
    tokens, val_tokens = loader.num_rows * loader.T, training.val_loader.num_rows * loader.T
    epochs = tokens_before(config.max_steps, config) / tokens
    mode = ("sharded, " if runtime.fsdp else "") + ("compiled (slow first step)" if runtime.compile else "eager")
    n_params = f"{training.raw_model.num_params():,} parameters"
    print0(f"model: {n_params}, {m.n_layer} layers, {m.n_head} heads, {m.n_embd} channels")
    data = f"{tokens:,} tokens in {len(loader.paths)} shards of {config.data_dir}"
    print0(f"data: {data}, {epochs:.2f} epochs in {config.max_steps} steps")
    layout = f"{loader.B} sequences x {loader.T} tokens x {world_size} processes x {micro_steps} micro-steps"
    ramp = f", reached from {batch_tokens(0, config):,} in {config.batch_ramp_steps} steps"
    print0(f"batch: {config.total_batch_tokens:,} tokens = {layout}{ramp if config.batch_ramp_steps else ''}")
    machine = f"{hardware.device_name(runtime.device)}, {str(runtime.dtype).removeprefix('torch.')}"
    print0(f"machine: {machine}, torch {torch.__version__}, {mode}")
    compared = ", compared with healthy runs" if training.log.recipe else ""
    on = f"{min(config.val_tokens, val_tokens):,} tokens{compared}"
    print0(f"evaluation: every {config.eval_interval} steps, on {on}")
    if resumed_step is not None:
        print0(f"resuming {config.out_dir} at step {resumed_step}")


# --- command line -----------------------------------------------------------------------------------------------------


def config_errors(m, c):
    """Return a line for everything that is wrong with a GPTConfig and a TrainConfig, before any work starts."""
    errors = common.range_errors(m) + common.range_errors(c)
    named = {line.split()[0] for line in errors}  # a flag that is out of its range has its line already
    errors += [line for line in relation_errors(m, c) if not named & {*line.split()}]
    world_size, restarted = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    # a folder that only has the tracker's name, as wandb creates one, has no origin
    installed = c.tracker == "none" or getattr(importlib.util.find_spec(c.tracker), "origin", None)
    checks = [
        (not 0 <= m.dropout < 1, f"--dropout is {m.dropout}: it must be 0 or more, and less than 1"),
        (not all(0 <= b < 1 for b in c.betas), f"--betas are {c.betas}: each must be 0 or more, and less than 1"),
        (not installed, f"--tracker {c.tracker} is not installed: pip install {c.tracker}"),
        (c.resume and c.overwrite, "--resume and --overwrite exclude each other: give one of them"),
        (restarted and c.overwrite, "--overwrite would delete the run that torchrun restarts: give --resume"),
        (c.dry_run and (demo_lacks_shards(c) or c.source), "--dry_run writes nothing, and this run has to make shards"),
        (c.source and world_size > 1, "--source needs one process: make the shards with fineweb.py, then --data_dir"),
        (c.source and Path(c.out_dir).resolve().is_relative_to(Path(c.source).resolve()),
         f"--out_dir is inside --source {c.source}, so the run would become a part of it: give another --out_dir"),
        (c.sample_interval and not c.prompt, "--prompt is empty: --sample_interval 0 turns samples off"),
    ]  # fmt: skip
    errors += [message for is_wrong, message in checks if is_wrong]
    for name in sorted({*c.override} - {*OVERRIDABLE}):
        errors.append(f"--override {name}: a resumed run can change only {', '.join(sorted(OVERRIDABLE))}")
    return errors + distributed.machine_errors(c.device, c.dtype, c.fsdp) + file_errors(c)


def relation_errors(m, c):
    """Return a line for each number of a GPTConfig and a TrainConfig that is too large or does not fit another one."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    unit = max(1, c.seq_len) * world_size  # the batch of an update must consist of whole sequences on each process
    rows, remainder = divmod(c.total_batch_tokens, unit)
    micro_batch = 1 if c.micro_batch == "auto" else max(1, c.micro_batch)
    ramp_from = max(1, c.batch_ramp_from)
    divisor = max((b for b in range(1, min(micro_batch, rows) + 1) if rows % b == 0), default=1)
    checks = [
        (not c.init_from and m.n_embd % max(1, m.n_head),
         f"--n_embd {m.n_embd} is not a multiple of --n_head {m.n_head}"),
        (not c.init_from and c.seq_len > m.block_size,
         f"--seq_len {c.seq_len} is more than --block_size {m.block_size}: lower the first"),
        (remainder or not rows, f"--total_batch_tokens {c.total_batch_tokens} is not a multiple of --seq_len "
                                f"{c.seq_len} x {world_size} processes: {max(1, rows) * unit} is"),
        (rows and not remainder and rows % micro_batch, f"--micro_batch {micro_batch} does not divide a process's "
                                                        f"{rows} sequences of a batch: {divisor} does"),
        (c.batch_ramp_steps > 0 and (c.total_batch_tokens % ramp_from or ramp_from % (unit * micro_batch)),
         f"--batch_ramp_from {c.batch_ramp_from} must divide --total_batch_tokens {c.total_batch_tokens} and be a "
         f"multiple of {unit * micro_batch}, the tokens of a micro-batch on all processes"),
        (c.epochs and c.batch_ramp_steps, "--epochs and --batch_ramp_steps exclude each other: give --max_steps"),
        (not c.epochs and c.warmup_steps > c.max_steps > 0,
         f"--warmup_steps {c.warmup_steps} is more than --max_steps {c.max_steps}"),
        (c.val_tokens != "auto" and c.val_tokens < c.seq_len,
         f"--val_tokens {c.val_tokens} is less than one sequence of --seq_len {c.seq_len}"),
    ]  # fmt: skip
    return [message for is_wrong, message in checks if is_wrong]


def file_errors(config):
    """Return a line for each problem with the files and folders that the configuration names."""
    errors = checkpoints.out_dir_errors(config.out_dir, config.resume, config.overwrite, config.init_from)
    try:
        for split in () if demo_lacks_shards(config) or config.source else ("train", "val"):
            foreign.check_data_dir(config.data_dir)
            fineweb.find_shards(config.data_dir, split)
    except UserError as error:
        errors.append(str(error))
    except OSError as error:
        errors.append(f"--data_dir cannot be read ({error}): change its permissions, or name another folder")
    try:
        if config.hellaswag_file not in ("none", TrainConfig.hellaswag_file):
            hellaswag.load_rows(config.hellaswag_file)
    except UserError as error:
        errors.append(f"--hellaswag_file {error}")
    return errors


def resolve_lengths(model_config, config, runtime):
    """Return the configuration with numbers for --val_tokens auto and --epochs, for which the shards must exist."""
    config = replace(config, val_tokens=pick_val_tokens(model_config, config, runtime.device.type))
    if not config.epochs:
        return config
    tokens = sum(len(fineweb.open_shard(path)) for path in fineweb.find_shards(config.data_dir, "train"))
    per_epoch = tokens / config.total_batch_tokens
    steps = max(1, round(min(config.epochs * per_epoch, 2**62)))
    ten_times = max(1, round(per_epoch / 10)) if config.eval_interval == TrainConfig.eval_interval else None
    return replace(config, max_steps=steps, eval_interval=ten_times or config.eval_interval)


def demo_lacks_shards(config):
    """Return whether this is the demo and its shards do not exist yet, or only those of an interrupted start."""
    if config.preset != "demo" or config.source:
        return False
    manifest, shards = fineweb.read_manifest(config.data_dir), fineweb.list_shards(Path(config.data_dir))
    return not shards or (manifest.get("source") == "stdlib" and not manifest["finished"])


def parse_command_line(arguments):
    """Return (GPTConfig, TrainConfig): --preset chooses the defaults, every other flag overrides one."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="gpt2")
    preset = first.parse_known_args(arguments)[0].preset
    if preset not in PRESETS:
        raise UserError(f"--preset {preset} does not exist: choose one of {', '.join(PRESETS)}")
    model_defaults, training_defaults = PRESETS[preset]

    def configs(model: GPTConfig = model_defaults, training: TrainConfig = training_defaults):
        return model, training

    presets = f"Presets: {', '.join(PRESETS)}. The defaults below are those of {preset}."
    description = f"{inspect.cleandoc(__doc__).partition('The file follows')[0]}\n{presets}"
    model_config, config = common.cli(configs, arguments, description=description, config=(tyro.conf.OmitArgPrefixes,))
    override = tuple(name.replace("-", "_") for name in config.override)
    config = replace(config, override=override, prompt=tokenizer.plain_prompt(config.prompt))
    given = common.given_flags(arguments)
    if config.init_from:  # None: the model's own size, with which a flag that is given must agree
        model_config = replace(model_config, **dict.fromkeys({*SHAPE_FLAGS} - given))
    if "max_steps" in given and 0 < config.epochs < math.inf:  # it comes before the epochs of the preset
        if "epochs" in given:
            raise UserError("--epochs and --max_steps exclude each other: give one of them")
        config = replace(config, epochs=0.0)
    if config.source:
        if config.data_dir != training_defaults.data_dir:
            raise UserError("--source makes its shards in the output folder: leave --data_dir out, or --source")
        config = replace(config, data_dir=str(Path(config.out_dir, "data")))
    if config.preset == "demo" and Path(config.out_dir).resolve() == Path(PRESETS["demo"][1].out_dir):
        config = replace(config, overwrite=not config.resume)  # in the demo's own folder each run starts over
    return model_config, config


def run(arguments):
    """Check the command line, join the other processes, and train. Raises UserError and Stopped."""
    distributed.join_slurm()
    model_config, config = parse_command_line(arguments)
    if errors := config_errors(model_config, config):
        # only the machine's first process prints them
        raise UserError("\n".join(errors)) if os.environ.get("LOCAL_RANK", "0") == "0" else SystemExit(2)
    runtime = setup_runtime(config)
    if config.dry_run:
        config = resolve_lengths(model_config, config, runtime)
        return train(model_config, replace(config, hellaswag_file="none"), runtime)
    with common.locked(Path(config.out_dir, ".lock")) if runtime.rank == 0 else nullcontext():
        if runtime.rank == 0 and demo_lacks_shards(config):
            fineweb.prepare("stdlib", config.data_dir, "bytes", shard_tokens=DEMO_SHARD_TOKENS, workers=1, quiet=True)
        if runtime.rank == 0 and config.source:
            text = config.source, config.data_dir, config.encoding, config.seq_len
            fineweb.prepare_small(*text, config.resume, config.overwrite)
        distributed.barrier()  # the others wait for the shards
        train(model_config, resolve_lengths(model_config, config, runtime), runtime)


def main(arguments=None):
    """Train as the command line says. Exit codes: 2 for a user error, 75 for a run that a signal stopped."""
    exit_code = 0
    with common.tolerant_output(), common.exit_on_error():
        try:
            run(sys.argv[1:] if arguments is None else arguments)
        except Stopped:
            exit_code = EXIT_STOPPED
        except torch.OutOfMemoryError as error:
            raise UserError("out of GPU memory: give a smaller --micro_batch (an update keeps its tokens)") from error
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Not after an error, because processes that have not failed would hang here. DDP's reference cycles must be
        # collected first: they keep gloo's threads alive, which would abort the process when it exits.
        gc.collect()
        dist.destroy_process_group()
    if exit_code:
        sys.exit(exit_code)


if __name__ == "__main__":
    main()
