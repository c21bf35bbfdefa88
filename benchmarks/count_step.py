"""
Count the memory and the messages of a training step on a machine without a GPU: what scale.py reports.

The model's own code runs on fake tensors, which have a shape and a type but no values, and a meter adds up the bytes
that are alive. FSDP runs as one of N ranks, in a process group that sends nothing, and its collectives are counted.
"""

import weakref

import measure  # noqa: F401, it makes the project's modules importable
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support import distributed
from train_gpt2 import GPT, PRESETS, configure_optimizers

BUCKETS = [dist._DEFAULT_FIRST_BUCKET_BYTES, 25 * 2**20]  # DDP's defaults


class Meter(TorchDispatchMode):
    """Count the bytes of the tensors that operators return while they are alive, and the bytes of collectives."""

    def __init__(self):
        super().__init__()
        self.alive, self.gathered, self.now, self.peak, self.sent = {}, {}, 0, 0, []

    def watch(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = [weakref.ref(storage, lambda _: self.forget(key)), 0]
        self.now += size - self.alive[key][1]
        self.alive[key][1] = size
        self.peak = max(self.peak, self.now)

    def watch_all(self, tree):
        """Count the tensors in nested tuples, lists and dicts. Return their storages."""
        tensors = [getattr(leaf, "_local_tensor", leaf) for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        storages = [tensor.untyped_storage() for tensor in tensors]
        for storage in storages:
            self.watch(storage)
        return storages

    def forget(self, key):
        self.gathered.pop(key, None)
        self.now -= self.alive.pop(key)[1]

    def refresh(self):
        """Notice which gathered weights FSDP has freed: it sets the size of their storage to zero."""
        for key, reference in list(self.gathered.items()):
            if (storage := reference()).nbytes() == 0:
                self.watch(storage)
                del self.gathered[key]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **(kwargs or {})), str(function)
        if "allgather" in name or "reduce_scatter" in name:
            self.sent.append(max(tensor.nbytes for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)))
        self.watch_all(out)
        if "split_with_sizes_copy" in name:  # FSDP takes gathered weights apart
            self.gathered |= {storage._cdata: weakref.ref(storage) for storage in self.watch_all(kwargs)}
        self.refresh()
        return out


def count_step(preset, B, micro_steps=1, checkpointing=False, fsdp=False):
    """Count the second step of a process, which is alone or one of several, and which trains in bfloat16, eagerly.

    Returns {part: bytes} with the peak, and the bytes of each collective in the first and in the last micro-step.
    """
    model_config, config = PRESETS[preset]
    meter, parts, fake, micro_steps = Meter(), {"moments": 0}, FakeTensorMode(), min(2, micro_steps)
    with fake:
        model, tokens = GPT(model_config), torch.zeros(B, config.seq_len, dtype=torch.long)
    model.set_activation_checkpointing(checkpointing)
    if fsdp:
        distributed.shard_model(model, "cpu", torch.bfloat16, compile=False)
    optimizers = configure_optimizers(model, config)
    meter.watch_all(list(model.parameters()))
    parts["weights"] = meter.now

    def trunk_ends(*_):
        parts["activations"] = meter.now - before
        meter.peak = meter.now  # from here on the peak of the loss

    model.transformer.ln_f.register_forward_hook(trunk_ends)
    with fake, meter:
        for _ in range(2):  # the second step has the moments, and its last micro-step the earlier gradients
            peaks, gradients, messages = [], [], []
            for micro_step in range(micro_steps):
                meter.sent, before = [], meter.now
                with distributed.gradient_sync(model, on=micro_step == micro_steps - 1):
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        loss = model(tokens, tokens)[1]
                    parts["loss"] = meter.peak - before - parts["activations"]
                    loss.backward()
                del loss
                meter.refresh()
                peaks.append(meter.peak)
                gradients.append(meter.now - parts["weights"] - parts["moments"])
                messages.append(meter.sent)
            meter.peak = meter.now
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
            parts["moments"] = meter.now - parts["weights"]
    return parts | {"gradients": max(gradients), "peak": max(*peaks, meter.peak)}, messages[0], messages[-1]


def count_fsdp_step(preset, B, micro_steps, ranks):
    """Return what count_step counts, of one of several ranks with FSDP."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        return count_step(preset, B, micro_steps, fsdp=True)
    finally:
        dist.destroy_process_group()


def ddp_buckets(preset):
    """Return the bytes of DDP's buckets, in the order in which they are sent."""
    with torch.device("meta"):
        parameters = list(GPT(PRESETS[preset][0]).parameters())[::-1]
    buckets, _ = dist._compute_bucket_assignment_by_size(parameters, BUCKETS)
    return [sum(parameters[i].nbytes for i in bucket) for bucket in buckets]
