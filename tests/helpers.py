"""What several test files use."""

from dataclasses import asdict

import fineweb
from support.checkpoints import save_checkpoint


def save_model(out_dir, model, step=1, **state):
    """Save a model that reads bytes as a checkpoint of an output folder, and return the checkpoint's folder."""
    encoding = fineweb.get_encoding("bytes")
    state = {"step": step} | state
    return save_checkpoint(out_dir, step, model.pretrained_weights(), state, asdict(model.config), encoding)
