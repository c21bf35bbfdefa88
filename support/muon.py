"""Muon, the optimizer of --optimizer muon for the matrices of the blocks."""

import torch

from support.common import pick_dtype
from support.distributed import gather, shard_like, share_work


def orthogonalize(matrices):
    """Return matrices near (n, a, b) whose singular values are all about 1 (Jordan et al. 2024).

    matrices: in bfloat16. The products are in the type that --dtype auto chooses, because emulated bfloat16 is slow.
    """
    # contiguous, because oneDNN sums the products of a transposed view differently for one matrix than for several
    x = matrices.mT.contiguous() if matrices.size(1) > matrices.size(2) else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # before another type, because float16 has a small range
    x = x.to(pick_dtype("auto", x.device.type))
    for _ in range(5):  # each round maps a singular value s to 3.4445 s - 4.775 s^3 + 2.0315 s^5: all come near 1
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    x = x.to(matrices.dtype)
    return x.mT if matrices.size(1) > matrices.size(2) else x


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum for matrices (Jordan et al. 2024), scaled to the size of AdamW's updates (Moonshot 2025).

    So one learning rate and one weight decay serve both optimizers. The same as torch.optim.Muon with match_rms_adamw,
    except that query, key and value are orthogonalized separately, although c_attn.weight (3C, C) holds all three.
    Several processes share the products, and each has the whole momentum of its weights, or of its shards with FSDP.
    """

    momentum = 0.95  # Jordan et al.
    batch = 16  # weights of one shape that are multiplied together, and that FSDP gathers at once

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
            updates.append(gather(weight.grad.lerp(average, self.momentum).bfloat16()))  # Nesterov: one step ahead
        rows, columns = weights[0].shape
        parts = 3 if rows == 3 * columns else 1
        updates = torch.stack(updates).view(-1, rows // parts, columns)
        updates = share_work(orthogonalize, updates).reshape(-1, rows, columns)
        scale = 0.2 * max(rows // parts, columns) ** 0.5  # 0.2: the root mean square of AdamW's updates
        for weight, update in zip(weights, updates):
            weight.mul_(1 - lr * weight_decay)
            weight.add_(shard_like(weight, update.to(weight.dtype)), alpha=-lr * scale)
