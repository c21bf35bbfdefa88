"""
The loss of a language model without its logits, which would be by far the largest tensor of a training step.

Autograd keeps the logits for the backward pass. But their gradient, softmax - onehot, is known as soon as they are. So
the forward pass already computes the gradients with respect to states and weight, for one chunk of tokens after the
other, and frees the logits of a chunk before the next.
"""

import torch
import torch.nn.functional as F

CHUNK = 4096  # tokens whose logits exist at once: 0.4 GB in bfloat16, and four times that for float32 copies
SCALE = 64  # divides the gradient of weight: float16 could not hold a sum over CHUNK tokens, whatever the loss scale


def chunk_loss(states, weight, targets, vocab_size, with_gradients):
    """Return the summed cross entropy of a chunk of tokens, and its gradients: of states, and of weight / SCALE.

    In float16 a probability below 6e-8 becomes zero, so very rare tokens get no gradient from the others' predictions.
    """
    logits = states @ weight.t()  # (tokens of the chunk, padded V)
    logits[:, vocab_size:] = float("-inf")  # the ids that pad the vocabulary have probability zero
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    loss = F.nll_loss(log_p, targets, reduction="sum")
    if not with_gradients:
        return loss, None, None
    onehot = (torch.arange(len(weight), device=states.device) == targets[:, None]).to(states.dtype)
    logits_grad = log_p.exp_().sub_(onehot)  # softmax - onehot (Bridle 1990), in the memory of log_p
    logits_grad = logits_grad.mul_((targets != -100)[:, None]).to(states.dtype)
    return loss, long_product(logits_grad, weight), logits_grad.t() @ (states / SCALE)


def long_product(a, b):
    """Return a @ b, on Apple GPUs in halves: an M1 or M2 errs in sums of 32,767 or more terms (PyTorch 193487)."""
    half = a.size(1) // 2
    return a[:, :half] @ b[:half] + a[:, half:] @ b[half:] if a.device.type == "mps" else a @ b


class HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, targets, vocab_size, chunk_loss, with_gradients):
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        loss, states_grads = 0.0, []
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if with_gradients else None
        weight = weight.to(dtype)
        for chunk, labels in zip(states.to(dtype).split(CHUNK), targets.split(CHUNK)):
            chunk_sum, states_grad, weight_grad_part = chunk_loss(chunk, weight, labels, vocab_size, with_gradients)
            loss = loss + chunk_sum
            if with_gradients:
                states_grads.append(states_grad)
                weight_grad.add_(weight_grad_part, alpha=SCALE)
        count = (targets != -100).sum().clamp(min=1)
        if with_gradients:
            ctx.save_for_backward(torch.cat(states_grads), weight_grad, count)
        return loss / count

    @staticmethod
    def backward(ctx, loss_grad):
        states_grad, weight_grad, count = ctx.saved_tensors
        scale = (loss_grad / count).view(1, 1)  # a tensor with dimensions makes the products float32, a number does not
        return states_grad * scale, weight_grad * scale, None, None, None, None


def cross_entropy(states, weight, targets, vocab_size, chunk_loss=chunk_loss):
    """Return the mean cross entropy, in nats, of the logits states (N, C) @ weight.T at targets (N), -100 left out.

    Only the first vocab_size rows of weight count. chunk_loss: this file's function, or a compiled one. It is compiled
    by itself: as a part of a larger graph, a compiler for GPUs computes the logits of all chunks first.
    """
    return HeadLoss.apply(states, weight, targets, vocab_size, chunk_loss, torch.is_grad_enabled())
