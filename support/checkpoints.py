"""Output and model folders: find checkpoints, open any GPT-2 and its tokenizer, save, and resume."""

import hashlib
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from support import foreign
from support.common import UserError, atomic_write, flush_to_disk, lfs_message, one_line
from support.tokenizer import import_transformers, model_encoding, save_tokenizer

HINT = (
    "give a Hub name, the folder of a Hugging Face GPT-2, an output folder of train_gpt2.py, or a checkpoint of "
    "nanoGPT, build-nanogpt or llm.c"
)


def list_checkpoints(out_dir: str | Path) -> list[Path]:
    """List the complete checkpoints in an output folder of train_gpt2.py, oldest first."""
    # While a checkpoint is incomplete, its name starts with a dot.
    folders = [path for path in Path(out_dir).glob("checkpoints/step_*") if path.name[5:].isdigit()]
    return sorted(folders, key=lambda path: int(path.name[5:]))


def newest_checkpoint(model: str, flag: str = "--model") -> str:
    """Return the newest checkpoint of an output folder, ours or another program's; any other name is unchanged.

    Raises UserError for a folder that is neither a model nor an output folder with a checkpoint.
    """
    if not os.path.isdir(model) or os.path.exists(os.path.join(model, "config.json")):
        return model
    if checkpoints := list_checkpoints(model):
        return str(checkpoints[-1])
    if found := foreign.find_checkpoint(model):
        return str(found)
    raise UserError(f"{flag} {model} contains neither config.json nor checkpoints/step_NNNNNN: {HINT}")


def check_same_computation(hf_config) -> None:
    """Raise UserError unless a GPT-2 config of Hugging Face describes exactly the computation of train_gpt2.GPT."""
    expected = {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
    for name, value in expected.items():
        if getattr(hf_config, name, value) != value:
            raise UserError(f"its {name} is {getattr(hf_config, name)}, but GPT-2's is {value}")
    if hf_config.n_inner not in (None, 4 * hf_config.n_embd):
        raise UserError(f"its n_inner is {hf_config.n_inner}, but GPT-2's is 4 * n_embd")


def open_gpt2(name: str | Path, flag: str = "--model", exactly: bool = False):
    """Open a GPT-2 as a GPT2LMHeadModel of transformers in float32 on the CPU.

    name: a Hub name, a folder, or a checkpoint file of another program, which support/foreign.py reads.
    exactly: refuse variants of GPT-2 that transformers computes correctly, but train_gpt2.GPT does not.
    Raises UserError if the model cannot be read, is not a GPT-2 or lacks weights.
    """
    transformers = import_transformers()
    try:
        if os.path.isfile(name):
            shape, weights = foreign.read_checkpoint(name)
            numbers = {name: shape[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
            last = end_of_text(shape["vocab_size"])
            ids = {"bos_token_id": last, "eos_token_id": last}
            source = {"pretrained_model_name_or_path": None, "state_dict": weights}
            config = transformers.GPT2Config(n_positions=shape["block_size"], **numbers, **ids)
        else:
            source, config = {"pretrained_model_name_or_path": name}, transformers.AutoConfig.from_pretrained(name)
            check_sha256(name, "model.safetensors")
        if config.model_type != "gpt2":
            raise UserError(f"its model_type is {config.model_type}, but gpt2 is required")
        if exactly:
            check_same_computation(config)
        # Both names mean the same formula. gelu_new computes it in eight passes over memory instead of one.
        if config.activation_function == "gelu_new":
            config.activation_function = "gelu_pytorch_tanh"
        # hellaswag.py passes boolean masks, which sdpa supports. Other implementations may add them to the scores.
        model, report = transformers.GPT2LMHeadModel.from_pretrained(
            **source, config=config, dtype=torch.float32, attn_implementation="sdpa",
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
        # transformers fills missing weights with random numbers, and such a model must not be used unnoticed.
        if unusable := [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]:
            raise UserError(f"the weight {min(unusable)} is missing or has another shape")
    except Exception as error:  # a broken folder raises OSError, SafetensorError, KeyError and more
        reason, fix = one_line(error).rstrip("."), HINT
        if message := lfs_message(name):
            reason, _, fix = message.partition(": ")
        raise UserError(f"{flag} {name} cannot be opened: {reason}: {fix}") from error
    return model


def end_of_text(vocab_size):
    """Return the id of <|endoftext|>: the last one, except for a model with more ids than GPT-2's tokenizer."""
    return min(vocab_size, 50257) - 1


# --- save -------------------------------------------------------------------------------------------------------------


def write_model_folder(folder, weights, shape):
    """Write config.json and model.safetensors, which transformers opens as a GPT2LMHeadModel.

    weights: {name: float32 tensor on the CPU} as GPT2LMHeadModel names and stores them. shape: a GPTConfig as a dict.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    vocab_size, block_size, dropout = shape["vocab_size"], shape["block_size"], shape["dropout"]
    hf_config = dict(
        architectures=["GPT2LMHeadModel"], model_type="gpt2", dtype="float32",
        vocab_size=vocab_size, n_positions=block_size, n_ctx=block_size,
        n_layer=shape["n_layer"], n_head=shape["n_head"], n_embd=shape["n_embd"],
        activation_function="gelu_new", layer_norm_epsilon=1e-5, tie_word_embeddings=True,
        attn_pdrop=dropout, embd_pdrop=dropout, resid_pdrop=dropout,
        bos_token_id=end_of_text(vocab_size), eos_token_id=end_of_text(vocab_size),
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")


def file_sha256(path):
    """Return the sha256 of a file as sha256sum prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(folder, *names):
    """Raise ValueError if a file differs from the folder's SHA256SUMS. Folders of earlier versions have none."""
    sums = Path(folder, "SHA256SUMS")
    known = dict(line.split("  ", 1)[::-1] for line in sums.read_text().splitlines()) if sums.exists() else {}
    for name in names:
        if name in known and file_sha256(Path(folder, name)) != known[name]:
            raise ValueError(f"{name} differs from its SHA256SUMS (delete that file if you changed the weights)")


def save_checkpoint(out_dir, step, weights, state, shape, encoding):
    """Write OUT/checkpoints/step_NNNNNN and return it: a Hugging Face GPT-2 folder (config.json, model.safetensors and
    the tokenizer's files) with training_state.pt, which a resumed run needs, and SHA256SUMS of both.

    The folder has a name that starts with a dot until all of it is on the disk: a folder with its final name is
    complete, whatever happens. A save that fails leaves nothing. Raises whatever the disk or a library raises.
    """
    final = Path(out_dir) / "checkpoints" / f"step_{step:06d}"
    temporary = final.with_name(f".{final.name}")
    try:
        write_model_folder(temporary, weights, shape)
        save_tokenizer(encoding, temporary, shape["block_size"])
        with open(temporary / "training_state.pt", "wb") as file:
            torch.save(state, file)
        lines = [f"{file_sha256(temporary / name)}  {name}\n" for name in ("model.safetensors", "training_state.pt")]
        (temporary / "SHA256SUMS").write_text("".join(lines))
        for path in [*temporary.iterdir(), temporary]:
            flush_to_disk(path)
        os.replace(temporary, final)
        for path in [final.parent, final.parent.parent]:
            flush_to_disk(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


class CheckpointWriter:
    """Save checkpoints on a thread, one at a time, so that training waits only for the copies that it hands over.

    newest_step: the step of the newest checkpoint in out_dir, or None. keep: how many checkpoints stay.
    """

    def __init__(self, out_dir, keep, shape, encoding, newest_step):
        self.out_dir, self.keep, self.shape, self.encoding = out_dir, keep, shape, encoding
        self.newest_step, self.best_step = newest_step, None  # the checkpoint of best_step also stays
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.saving = None  # the future of the last save

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.thread.shutdown()

    def failed(self):
        """Return whether the last save has ended and failed. The older checkpoints are unchanged then."""
        return self.saving is not None and self.saving.done() and self.saving.exception() is not None

    def lacks(self, step):
        """Wait for the save in progress, and return whether the state at this step still has to be saved."""
        if self.saving:
            self.saving.exception()
        return step != self.newest_step or self.failed()

    def save(self, step, weights, state):
        """Start to save a checkpoint. Training must not change `weights` and `state`, which are on the CPU."""
        self.newest_step = step
        self.saving = self.thread.submit(self._write, step, weights, state)

    def finish(self):
        """Wait for the save in progress. Raises UserError if it failed."""
        if self.saving and self.saving.exception():
            raise UserError(
                f"{self.out_dir} has no checkpoint of step {self.newest_step}: fix the cause in the error above, then "
                "continue from the checkpoint before it with --resume"
            )

    def _write(self, step, weights, state):
        try:
            if not all(weight.isfinite().all() for weight in weights.values()):
                raise UserError("the weights are not finite")
            folder = save_checkpoint(self.out_dir, step, weights, state, self.shape, self.encoding)
            print(f"saved {folder}\n", end="", flush=True)  # one write per line, because training prints as well
        except Exception as error:  # the system, torch and safetensors raise errors of their own
            effect = "The older checkpoints are unchanged. If training continues, its next evaluation tries again."
            print(
                f"error: saving step {step} failed: {one_line(error)}. {effect}\n", end="", file=sys.stderr, flush=True
            )
            raise
        for folder in list_checkpoints(self.out_dir)[: -self.keep]:
            if folder.name == f"step_{self.best_step or 0:06d}":
                continue
            with suppress(OSError):  # a folder that another program has open is deleted next time
                delete_checkpoint(folder)


def delete_checkpoint(folder):
    """Delete a checkpoint. It loses its final name first, so that an interrupted deletion leaves no partial one."""
    doomed = folder.with_name(f".{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


# --- resume -----------------------------------------------------------------------------------------------------------


def load_newest(out_dir):
    """Return (training state, weights, {folder: reason} of newer ones that are damaged) of the newest whole checkpoint.

    All tensors are on the CPU. Returns (None, None, {}) if there is no checkpoint. Raises UserError if all checkpoints
    are damaged or the disk fails.
    """
    from safetensors.torch import load_file

    needed = {"step", "skipped", "optimizers", "scaler", "loader", "rng", "fingerprint", "config"}
    damaged = {}
    for folder in reversed(list_checkpoints(out_dir)):
        try:
            check_sha256(folder, "model.safetensors", "training_state.pt")
            state = torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True)
            if missing := needed - state.keys():
                raise ValueError(f"its training_state.pt has no {min(missing)}")
            return state, load_file(folder / "model.safetensors"), damaged
        except Exception as error:  # zip, pickle and safetensors raise many kinds of errors for a damaged file
            if isinstance(error, (OSError, MemoryError)) and not isinstance(error, FileNotFoundError):
                raise UserError(f"cannot read {folder} ({one_line(error)}): fix that, then --resume") from error
            damaged[folder] = one_line(error)
    if damaged:
        reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in damaged.items())
        raise UserError(
            f"all checkpoints in {out_dir} are damaged ({reasons}): move them away, or give another --out_dir"
        )
    return None, None, {}


def start_errors(init_from, folder, shape, flags, encoding, data_dir, seq_len):
    """Return a line for each reason why a run cannot start from the model in `folder`, which --init_from names.

    shape: {name: value} of the model's config. flags: the same of the flags that were given, and None for the others.
    Raises UserError if the model's tokenizer cannot be opened.
    """
    model, vocab_size = f"--init_from {init_from}", shape["vocab_size"]
    errors = [
        f"--{name} is {value}, but {model} has {shape[name]}: leave it out, because a model keeps its shape"
        for name, value in flags.items()
        if value not in (None, shape[name])
    ]
    others = {"gpt2": "bytes", "bytes": "gpt2"}
    found = model_encoding(folder, vocab_size, [encoding, others[encoding]])
    if found is None:
        reason = f"has {vocab_size} ids that its tokenizer does not share with GPT-2's, so it cannot be trained here"
        errors.append(f"{model} {reason}: give a model with GPT-2's tokenizer, or train one from scratch")
    elif found != encoding:
        fix = f"create shards in the model's encoding with python fineweb.py --encoding {found}"
        errors.append(f"{model} has {vocab_size} ids, but the shards in {data_dir} have {encoding} tokens: {fix}")
    if shape["block_size"] < seq_len:
        errors.append(f"--seq_len {seq_len} is more than {model} can read: give --seq_len {shape['block_size']}")
    return errors


def flag_differences(before, now, out_dir, overridable, override):
    """Return a line for each flag of a resumed run that differs from the run in out_dir.

    before: {name: value} of that run. now: of this run's flags that must agree. overridable: the flags that a resumed
    run can change if --override names them. override: those that it names.
    """
    errors, before = [], {"dropout": 0.0, "betas": (0.9, 0.95), "eps": 1e-8, "batch_ramp_steps": 0} | before
    for name in sorted(now.keys() & before.keys()):
        if now[name] != before[name] and name not in override:
            way_out = f"allow it with --override {name}" if name in overridable else "start another --out_dir"
            old = f"the run in {out_dir} has {before[name]}"
            errors.append(f"--{name} is {now[name]}, {old}: give that, or {way_out}")
    return errors


def data_differences(before, now, data_dir, out_dir, override):
    """Return a line if the fingerprint of a resumed run's data differs from that of the run in out_dir."""
    here = f"the run in {out_dir}"
    if now["encoding"] != before["encoding"]:
        fix = "give its --data_dir, or start another --out_dir"
        return [f"{data_dir} has {now['encoding']} tokens, {here} {before['encoding']} tokens: {fix}"]
    changed = sorted(name for name in now | before if now.get(name) != before.get(name))
    if not changed or "data_dir" in override:
        return []
    name, others = changed[0], f" ({len(changed) - 1} other shards differ too)" if changed[1:] else ""
    change = f"is {now.get(name, 'missing')}, {here} used {before.get(name, 'no such shard')}{others}"
    return [f"{Path(data_dir, name)} {change}: restore the data, or allow it with --override data_dir"]


def out_dir_errors(out_dir, resume, overwrite, init_from):
    """Return a line for each reason why a run cannot write to an output folder."""
    out_dir = Path(out_dir).resolve()
    existing = next(
        path for path in (out_dir, *out_dir.parents) if os.path.exists(path)
    )  # False if permissions hide it
    if not existing.is_dir() or not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        fix = "change its permissions, or name another folder"
        return [f"--out_dir {out_dir} cannot be created, because {existing} is not a writable folder: {fix}"]
    has_run = (out_dir / "log.txt").exists() or any(out_dir.glob("checkpoints/step_*"))
    if has_run and not (resume or overwrite):
        fix = "give --resume to continue it, --overwrite to delete it, or another --out_dir"
        return [f"{out_dir} contains a run: {fix}"]
    source = Path(init_from or os.devnull).resolve()
    if overwrite and out_dir in (source, *source.parents):
        return [f"--overwrite would delete --init_from {init_from}: give another --out_dir"]
    return []


def prepare_out_dir(out_dir, damaged, resumed, overwrite):
    """Remove unfinished saves from an output folder, rename damaged checkpoints, and delete a run to overwrite.

    Only checkpoints, log.txt, curve.png, tracker_id and TensorBoard's files are touched. Raises UserError if another
    run has appeared, or if the file system cannot do what saving a checkpoint needs.
    """
    out_dir = Path(out_dir)
    for unfinished in out_dir.glob("checkpoints/.step_*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    probe = out_dir / "checkpoints" / ".step_probe"
    try:  # everything that saving a checkpoint does
        probe.mkdir(parents=True, exist_ok=True)
        with atomic_write(probe / "file", "give another --out_dir") as file:
            file.write(b"probe")
        os.replace(probe, probe.with_name(".step_probed"))
        flush_to_disk(probe.parent)
        shutil.rmtree(probe.with_name(".step_probed"))
    except OSError as error:
        raise UserError(f"checkpoints cannot be saved in {out_dir} ({error}): give another --out_dir") from error
    for folder in damaged:
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    if resumed:
        return
    for folder in list_checkpoints(out_dir):
        if not overwrite:
            raise UserError(f"{folder} was created after this run started: start this run again")
        delete_checkpoint(folder)
    names = ("log.txt", "curve.png", "tracker_id")
    for path in (*(out_dir / name for name in names), *out_dir.glob("tensorboard/events.out.tfevents.*")):
        path.unlink(missing_ok=True)
