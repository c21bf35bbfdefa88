"""Run the training program's steps on a GPU that does not exist, and print one line for each case.

    LD_PRELOAD=fake_cuda.so python tests/fake_gpu.py DATA_DIR    (test_fake_gpu.py builds the library)

Fake tensors have a device, a type and a shape, but no values. Operators check devices and shapes as they do on a GPU,
and autograd and autocast do the same as there. The class Device adds what is missing.
"""

import re
import sys
from dataclasses import replace
from itertools import product

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import hellaswag
import train_gpt2
from train_gpt2 import GPT, GPTConfig, Runtime, TrainConfig, train_step, validation_loss

GPU = torch.device("cuda:0")
T, IDS = 64, 257
DTYPES = torch.float32, torch.bfloat16, torch.float16


def prepare_torch():
    """Make torch's Python code believe in the device of fake_cuda.cpp, which must be loaded before torch."""
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # autocast and GradScaler ask this
    torch.cuda.current_device = lambda: 0
    torch.Tensor.pin_memory = lambda self: self  # only a driver can do it


class Device(TorchDispatchMode):
    """Refuse operands of several types, which fake tensors accept, and give the host numbers to read: 0.0 or 1.

    muon_types: the types of Muon's products, which alone use baddbmm.
    """

    ONE_TYPE = re.compile(r"aten\.(mm|addmm|bmm|baddbmm|native_layer_norm|_scaled_dot_product)")

    def __init__(self):
        super().__init__()
        self.muon_types = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and args[0].constant is None:
            return 0.0 if args[0].is_floating_point() else 1
        if self.ONE_TYPE.match(str(function)):
            dtypes = {arg.dtype for arg in args if isinstance(arg, torch.Tensor) and arg.dtype != torch.bool}
            if len(dtypes) > 1:
                raise RuntimeError(f"{function} expects one type, but found {dtypes}")
            self.muon_types |= dtypes if "baddbmm" in str(function) else set()
        return function(*args, **(kwargs or {}))


def on_gpu(config):
    """Return a GPT whose parameters are fake tensors on the GPU."""
    with unset_fake_temporarily(), torch.device("meta"):
        model = GPT(config)
    parameters = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:  # the tied weight stays one parameter
                new = torch.nn.Parameter(torch.empty(parameter.shape, device=GPU))
                module._parameters[name] = parameters.setdefault(parameter, new)
    return model


def run_case(data_dir, dtype, optimizer="adamw", plant=None, **shape):
    """Train, validate, generate and score with a small GPT. plant(model, loader): puts in a fault first."""
    checkpointing = shape.pop("activation_checkpointing", False)
    config = replace(TrainConfig(), optimizer=optimizer, total_batch_tokens=4 * T, seq_len=T)
    units = torch.float16 if dtype == torch.float16 else torch.bfloat16  # a GPU without or with bfloat16 units
    torch.cuda.is_bf16_supported = lambda **_: units == torch.bfloat16
    with FakeTensorMode(allow_non_fake_inputs=True), Device() as device:
        model = on_gpu(GPTConfig(block_size=T, vocab_size=IDS, n_layer=1, n_head=2, n_embd=64, **shape))
        model.set_activation_checkpointing(checkpointing)
        loader = train_gpt2.DataLoaderLite(data_dir, "train", 2, T, device=GPU)
        if plant:
            plant(model, loader)
        runtime = Runtime(0, 1, GPU, dtype, compile=False)
        optimizers = train_gpt2.configure_optimizers(model, config)
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        for step in range(2):
            train_step(model, optimizers, scaler, loader, step, config, runtime)
        assert device.muon_types == ({units} if optimizer == "muon" else set())
        state = [value for optimizer in optimizers for values in optimizer.state.values() for value in values.values()]
        assert len(state) > 20 and {(t.device, t.dtype) for t in state} == {(GPU, torch.float32)}
        model.eval()
        validation_loss(model, loader, 3 * T, runtime)
        with runtime.autocast():
            ids = model.generate(loader.next_batch()[0][:, : T - 2], 4, top_p=0.9)  # the window moves
        assert ids.shape == (2, T + 2) and ids.device == GPU
        rows = [hellaswag.Example(0, [(list(range(9)), [[1, 2], [3], [4], [5, 6, 7]])], [2, 1, 1, 3], 0)]
        train_gpt2.hellaswag_accuracy(model, rows, runtime)


def targets_on_cpu(model, loader):
    """Plant what a forgotten .to(device) does."""
    loader.rows, rows = lambda positions: (rows(positions)[0], rows(positions)[1].cpu()), loader.rows


def positions_on_cpu(model, loader):
    """Plant what a forgotten device=idx.device does."""
    trunk = model.trunk
    model.trunk = lambda idx: trunk(idx, torch.arange(idx.size(1)))


def weight_in_float64(model, loader):
    """Plant a weight of another type in a product."""
    layer = model.transformer.h[0].mlp.c_fc
    layer.weight = torch.nn.Parameter(layer.weight.double())


def states_in_bfloat16(model, loader):
    """Plant a loss that forgets to cast: outside of autocast, the product has two types."""
    loss = train_gpt2.chunk_loss
    train_gpt2.chunk_loss = lambda states, weight, *more: loss(states.bfloat16(), weight, *more)


def main():
    prepare_torch()
    cases = {}
    for dtype, optimizer, flash in product(DTYPES, ("adamw", "muon"), (True, False)):
        case = {"dtype": dtype, "optimizer": optimizer, "flash": flash, "activation_checkpointing": flash}
        cases[" ".join(map(str, case.values()))] = case
    for plant in targets_on_cpu, positions_on_cpu, weight_in_float64, states_in_bfloat16:
        cases[plant.__name__] = {"dtype": torch.float32, "plant": plant}
    for name, case in cases.items():
        try:
            run_case(sys.argv[1], **case)
            print(f"{name}: ok", flush=True)
        except Exception as error:  # the test compares the lines
            print(f"{name}: {type(error).__name__} {' '.join(str(error).split())}", flush=True)


if __name__ == "__main__":
    main()
