"""Compile the 124M for a GPU that does not exist, and print the GB that the generated code allocates.

    LD_PRELOAD=fake_cuda.so python tests/fake_inductor.py    (test_fake_gpu.py builds the library; needs triton)

Inductor generates its Triton code as for an H100. The code then runs on fake allocations, which a meter counts, and its
kernels do nothing. This replaces private functions of torch and triton, and fails if one does not exist any more.
"""

import os
from types import SimpleNamespace

os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}

import torch
import torch._inductor.async_compile
import torch._inductor.compile_fx
import torch._inductor.fx_passes.fuse_attention
import torch._inductor.fx_passes.pad_mm
import torch.nn.functional as F
import triton
from count_step import Meter
from fake_gpu import GPU, on_gpu, prepare_torch
from torch._dynamo import device_interface
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from support.common import compiled
from support.loss import chunk_loss, cross_entropy
from train_gpt2 import GPTConfig

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, warp_size=32, multi_processor_count=132, total_memory=80 * 2**30,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, L2_cache_size=50 * 2**20,
)  # fmt: skip
ATEN = torch.library.Library("aten", "IMPL")


class Nothing:
    """A kernel, a driver or a context whose functions do nothing, except those that are given."""

    def __init__(self, **functions):
        self.__dict__.update(functions)

    __getattr__ = __enter__ = lambda *_: lambda *_, **__: None

    def __exit__(self, *_):
        pass


class DeviceMeter(Meter):
    """Count while compiled code runs, too: torch does not compile under a mode, except one of its infrastructure."""

    is_infra_mode = classmethod(lambda cls: True)


def swap(owner, **results):
    """Replace functions: by others, or by new ones that return a value. Raises LookupError if one is missing."""
    for name, result in results.items():
        if not hasattr(owner, name):
            raise LookupError(f"{owner} has no {name}")
        function = result if callable(result) else lambda *_, result=result, **__: result
        setattr(owner, name, staticmethod(function) if isinstance(owner, type) else function)


def prepare_inductor():
    """Make Inductor see an H100, and its generated code allocate fake tensors."""
    device = {"is_available": True, "device_count": 1, "current_device": 0, "set_device": None, "synchronize": None}
    interface, inductor, guards = device_interface.CudaInterface, torch._inductor, torch._C._dynamo.guards
    swap(torch.cuda, **device, is_initialized=True, init=None, _lazy_init=None, get_device_capability=(9, 0))
    swap(torch.cuda, _exchange_device=0, _maybe_exchange_device=0, current_stream=Nothing(cuda_stream=0))
    swap(torch.cuda, get_rng_state=lambda: torch.zeros(16, dtype=torch.uint8), set_rng_state=None)
    swap(torch.cuda, get_device_properties=H100)
    torch.cuda._DeviceGuard, torch._C._cuda_getCurrentRawStream = lambda *_: Nothing(), lambda *_: 0
    torch.version.cuda = "13.0"
    swap(interface, **device, get_raw_stream=0, get_compute_capability=90, is_bf16_supported=True)
    swap(interface, exchange_device=0, maybe_exchange_device=0, get_device_properties=H100)
    swap(interface.Worker, get_device_properties=H100)
    swap(inductor.async_compile.AsyncCompile, triton=lambda *_, **__: Nothing(), wait=None)
    swap(inductor.fx_passes.fuse_attention, _sfdp_init=None)  # this and the next would compute on the device
    swap(inductor.fx_passes.pad_mm, _pad_mm_init=None)
    inductor.config.shape_padding = False
    driver = {"get_current_target": lambda: GPUTarget("cuda", 90, 32), "get_active_torch_device": lambda: GPU}
    driver |= {"get_current_device": lambda: 0, "get_current_stream": lambda device: 0, "is_active": lambda: True}
    triton.runtime.driver.set_active(Nothing(**driver))
    for name in "empty.memory_format", "empty_strided":  # scalars that Inductor computes for real are on the CPU
        create = getattr(torch, name.partition(".")[0])
        ATEN.impl(name, lambda *sizes, dtype=None, create=create, **_: create(*sizes, dtype=dtype), "CUDA")
    view = lambda x, size, stride, offset=0: x.as_strided(size, stride, x.storage_offset() + offset)  # noqa: E731
    swap(guards, assert_size_stride=None, _reinterpret_tensor=view)
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=GPU)


def flash_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    """Do what scaled_dot_product_attention does on an H100. A build for CPUs would choose the CPU's kernel."""
    q, k, v = (x.bfloat16() for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]


def peak_of(function):
    """Return the GB that a second call and its backward pass allocate beside what exists before."""
    function()  # compiles
    with DeviceMeter() as meter:
        function().backward()
    return meter.peak / 1e9


def main():
    prepare_torch()
    prepare_inductor()
    with FakeTensorMode(), torch.autocast("cuda", dtype=torch.bfloat16):
        model, tokens = on_gpu(GPTConfig()), torch.zeros(64, 1024, dtype=torch.long, device=GPU)
        model.compile_training(trunk=True)
        weight, states = model.lm_head.weight, torch.zeros(64 * 1024, 768, device=GPU, requires_grad=True)
        print("loss:", peak_of(lambda: cross_entropy(states, weight, tokens.flatten(), 50257, compiled(chunk_loss))))
        F.scaled_dot_product_attention = flash_attention
        print("model:", peak_of(lambda: model(tokens, tokens)[1]))


if __name__ == "__main__":
    main()
