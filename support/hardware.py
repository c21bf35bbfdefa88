"""What the hardware is, and how much of its speed a run uses."""

import platform
import re

import torch


def device_name(device):
    """Return a device and the name of its hardware."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device}, {name}"


# Dense TFLOP/s in bfloat16, or float16 where the GPU has no bfloat16, with sums in float32, for the MFU. They are from
# memory of the data sheets (half of a figure "with sparsity"), and for GeForce of the white papers. Only A100, H100
# and V100 were compared with a second source. For 4080 SUPER, 4090 D, 4070, 4060 and Laptop models they are NVIDIA's
# "AI TOPS" / 8, for the 50 series / 16, because those count FP4. A Laptop GPU has the peak of its highest power limit.
# The first name that a device's name contains as whole words counts, so longer names come first. A "$" is the end of
# the name, because an "RTX 5090 D" is another GPU than an "RTX 5090".
PEAK_TFLOPS = {
    "GB300": 2500, "GB200": 2500, "B300": 2250, "B200": 2250,
    "GH200": 989, "H200 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H20": 148,
    "A100": 312, "A40": 149.7, "A30": 165, "A10G": 70, "A10": 125, "L40S": 362, "L40": 181, "L4": 121,
    "T4": 65, "V100S": 130, "V100-PCIE": 112, "V100": 125,
    "RTX 6000 Ada Generation": 364, "RTX A6000$": 154.8,
    "RTX 5090 Laptop GPU": 114, "RTX 4090 Laptop GPU": 85.8, "RTX 4090 D$": 147,
    "RTX 5090$": 209.5, "RTX 5080$": 112.6, "RTX 4090$": 165.2, "RTX 4080 SUPER$": 104.5, "RTX 4080$": 97.5,
    "RTX 4070 Ti$": 80.2, "RTX 4070$": 58.3, "RTX 4060 Ti$": 44.1, "RTX 4060$": 30.3,
    "RTX 3090 Ti$": 80, "RTX 3090$": 71,
    "MI355X": 2500, "MI325X": 1307, "MI300X": 1307,
}  # fmt: skip


def peak_flops(device):
    """Return a GPU's peak in FLOP/s, or None if it is unknown, as for a part of a GPU (MIG)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if re.search(r"\bMIG\b", name):
        return None
    return next((tflops * 1e12 for key, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{key}(?!\w)", name)), None)


def mfu(flops, device):
    """Return as text the FLOP/s that the model's mathematics needs, as a share of a GPU's peak; "" if it is unknown."""
    peak = peak_flops(device)
    return f"mfu: {flops / peak:.1%}" if peak else ""


def flops_per_token(config, T):
    """Return a training step's FLOPs per token of a GPTConfig: 6 per weight in products, and 12·L·C·T for attention
    (PaLM, appendix B).
    """
    weights = 12 * config.n_layer * config.n_embd**2 + config.padded_vocab_size * config.n_embd
    return 6 * weights + 12 * config.n_layer * config.n_embd * T
