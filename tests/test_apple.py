"""What only an Apple GPU can show; run with pytest -m gpu on a Mac."""

import pytest
import torch

from support.loss import cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an Apple GPU"),
]


def test_long_sums_of_the_loss_are_right():
    """M1 and M2 err in sums of 32,767 or more terms (PyTorch 193487), and the gradient of the loss sums 50,304."""
    torch.manual_seed(0)
    states, weight = torch.randn(64, 32), 0.02 * torch.randn(50304, 32)
    targets, gradients = torch.randint(0, 50257, (64,)), []
    for device in ("cpu", "mps"):
        leaves = [tensor.to(device).requires_grad_() for tensor in (states, weight)]
        cross_entropy(*leaves, targets.to(device), 50257).backward()
        gradients.append([leaf.grad.cpu() for leaf in leaves])
    for on_cpu, on_mps in zip(*gradients):
        assert (on_mps - on_cpu).norm() <= 1e-4 * on_cpu.norm()
