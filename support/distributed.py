"""Several processes: how they find each other, agree, stop together at a signal, and share one model (FSDP2)."""

import math
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from support.common import UserError, pick_device, pick_dtype

EXIT_STOPPED = 75  # EX_TEMPFAIL, "try again", in the system's sysexits.h
TIMEOUT = timedelta(minutes=10)  # how long a process waits for the others before it fails


# --- signals ----------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """A signal has asked the run to stop. Every process raises this at the same point."""


class StopSignal:
    """Record SIGTERM, SIGHUP, SIGINT or SIGUSR1 inside a `with` block, so that the run can stop and save its state.

    A second signal ends the process at once, even if it hangs, because a thread watches for it. A signal within half a
    second of the first is ignored: a scheduler may signal torchrun and its processes, and torchrun passes it on.
    """

    def __init__(self):
        self.received = None  # the signal's name

    def __enter__(self):
        self.handlers = {}
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread can handle signals
        names = ("SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1")  # Windows has only two of them
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        if os.name == "posix" and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            numbers.remove(signal.SIGHUP)  # started by nohup, to continue without a terminal
        self.handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
        self.writer, reader = socket.socketpair()
        self.writer.setblocking(False)
        signal.set_wakeup_fd(self.writer.fileno())  # Python writes the number of each signal to it
        threading.Thread(target=self._watch, args=[reader], daemon=True).start()

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.handlers:
            signal.set_wakeup_fd(-1)
            self.writer.close()

    def _watch(self, reader):
        first = math.inf
        while number := reader.recv(1):
            if time.monotonic() - first > 0.5:
                os._exit(128 + number[0])
            if not self.received:
                self.received, first = signal.Signals(number[0]).name, time.monotonic()
        reader.close()

    def raise_if_received(self):
        """Raise Stopped on every process if any of them has received a signal."""
        if any_rank(self.received is not None):
            raise Stopped

    @contextmanager
    def covers_compiler(self):
        """Raise Stopped for a failure after a signal: Ctrl-C also ends the compiler processes that torch started."""
        try:
            yield
        except Exception as error:  # the compilers raise errors of their own
            if self.received and not dist.is_initialized():
                raise Stopped from error
            raise


# --- the process group ------------------------------------------------------------------------------------------------


def join_processes(rank, world_size, device):
    """Initialize torch.distributed: NCCL for GPUs, and gloo for what the processes agree on without their GPUs."""
    on_gpu = device.type == "cuda"
    restarts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun serves the store
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=fresh_store(rank) if restarts else None,
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
        device_id=device if on_gpu else None,
    )


def join_slurm():
    """Let `srun --ntasks N python train_gpt2.py` start N processes of one run, as torchrun does, on one machine.

    Sets torchrun's environment variables. Raises UserError if the tasks are on several machines.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks == 1 or "RANK" in os.environ:
        return
    if int(os.environ.get("SLURM_STEP_NUM_NODES", 1)) > 1:
        fix = "give srun --ntasks-per-node=1, and start torchrun --nnodes … --rdzv_endpoint … train_gpt2.py with it"
        raise UserError(f"srun has started {tasks} tasks on several machines, which do not know each other: {fix}")
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(tasks),
        "MASTER_ADDR": "localhost",
        # a port that other steps on this machine do not use
        "MASTER_PORT": str(20000 + (int(os.environ["SLURM_JOB_ID"]) * 16 + int(os.environ["SLURM_STEP_ID"])) % 10000),
    }


def local_gpu():
    """Return the index of this process's GPU. srun with a GPU per task shows each process only one, as number 0."""
    return int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.device_count() > 1 else 0


def fresh_store(rank):
    """Return the key-value store through which the processes of this start find each other. Rank 0 serves it.

    torchrun's own store outlives a restart, and so do the addresses in it of dead processes (pytorch issue 167288).
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent_store = dist.TCPStore(host, port, is_master=False, timeout=TIMEOUT)
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        agent_store.set("port of rank 0", str(store.port))
        return store
    while True:
        try:
            port = int(agent_store.get("port of rank 0"))
            store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
            store.set_timeout(TIMEOUT)
            return store
        except dist.DistNetworkError:
            continue  # the port belongs to an earlier start: rank 0 is about to replace it


def any_rank(flag):
    """Return whether the flag is set on any process. They wait for each other on the CPU, not on their GPUs."""
    flag = torch.tensor(flag, dtype=torch.uint8)
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def barrier():
    """Wait until every process has come here."""
    any_rank(False)


def sum_over_ranks(tensor, device):
    """Return the sum of the processes' tensors, on every process. (gloo has no average: divide for a mean.)"""
    if dist.is_initialized():
        tensor = tensor.to(device)
        dist.all_reduce(tensor)
    return tensor


def from_rank0(value, device):
    """Return rank 0's value on every process."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, device=device)
    return values[0]


def share_work(function, inputs):
    """Return function(inputs) for inputs (n, ...) that all processes have: each computes a part, and all get the whole.

    function treats each of the n separately and keeps its shape. All processes must call this together.
    """
    if not dist.is_initialized():
        return function(inputs)
    share = math.ceil(len(inputs) / dist.get_world_size())
    first = dist.get_rank() * share  # the last processes may have less to do, or nothing
    results = torch.zeros_like(inputs)
    if len(own := inputs[first : first + share]):
        results[first : first + share] = function(own)
    # all but one of the summands are zero, so this is exact; gathering would pad the shares to equal sizes
    return sum_over_ranks(results, results.device)


def machine_errors(device, dtype, fsdp):
    """Return a line for each thing that --device, --dtype, --fsdp and torchrun ask for and this machine cannot do."""
    try:
        device_type = pick_device(device)
    except UserError as error:
        return [str(error)]
    errors = []
    world_size, local_size = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    # srun may show each process only its own GPU of those that it has allocated on this machine
    allocated = int(os.environ.get("SLURM_GPUS_ON_NODE", 0))
    if device_type == "cuda" and local_size > (count := max(allocated, torch.cuda.device_count())):
        errors.append(f"{local_size} processes on {count} GPUs: give torchrun --nproc_per_node={count}")
    if device_type == "mps" and world_size > 1:
        errors.append("an Apple GPU serves one process: start with python, or give --device cpu")
    if fsdp and world_size == 1:
        errors.append("--fsdp needs several processes: start them with torchrun --nproc_per_node, or leave it out")
    if fsdp and world_size > 1 and pick_dtype(dtype, device_type) == torch.float16:
        errors.append("--fsdp cannot scale float16's gradients: give --dtype bfloat16 or float32")
    if dtype == "float16" and device_type != "cuda":
        errors.append(f"--dtype float16 needs an NVIDIA GPU, but this run is on {device_type}: give --dtype float32")
    return errors


# --- a sharded model --------------------------------------------------------------------------------------------------


def shard_model(model, device_type, dtype, compile):
    """Shard a GPT in place: each process keeps a share of every weight (FSDP2, as ZeRO stage 3), and return it.

    A block's weights are gathered only while it computes. For bfloat16 they are sent in bfloat16, because autocast
    would convert them anyway; gradients are summed in float32. The other weights, above all the tied embedding, stay
    float32 and are gathered once per pass. Each block is compiled by itself, because a graph cannot contain a gather.
    """
    from torch.distributed.device_mesh import init_device_mesh  # these two imports take a second
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    sent_dtype = torch.bfloat16 if dtype == torch.bfloat16 else None
    policy = MixedPrecisionPolicy(param_dtype=sent_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        if compile:
            block.forward = torch.compile(block.forward, dynamic=False, fullgraph=True)
        fully_shard(block, mesh=mesh, mp_policy=policy).set_force_sum_reduction_for_comms(True)  # gloo has no average
    fully_shard(model, mesh=mesh).set_force_sum_reduction_for_comms(True)
    return model


class MicroBatchTooLarge(torch.OutOfMemoryError):
    """The memory does not suffice for a forward and backward pass. No optimizer has updated anything."""


@contextmanager
def must_fit():
    """Raise MicroBatchTooLarge if the `with` block runs out of GPU memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MicroBatchTooLarge(*error.args) from error


def fits_in_memory(model, B, T, autocast, fsdp):
    """Return whether a GPU has room for a forward and backward pass of (B, T) tokens, beside earlier gradients and the
    two moments of AdamW.

    The model is not sharded yet. FSDP will keep 1/world_size of weights, gradients and moments, and all of the earlier
    gradients. The whole weights and gradients of this pass count towards that.
    """
    fits, device = True, next(model.parameters()).device
    reserved = (
        max(0, 4 / dist.get_world_size() + 1 - 2) if fsdp else 3
    )  # times the parameters: 4 shares + 1 earlier gradient - 2 of this pass
    try:
        ballast = torch.empty(int(reserved * model.num_params()), device=device)
        tokens = torch.zeros(B, T, dtype=torch.long, device=device)
        with autocast:
            model(tokens, tokens)[1].backward()
        del ballast
    except RuntimeError as error:  # torch's own, or that of cuBLAS, which allocates memory by itself
        if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
            raise
        fits = False
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return fits


def gather(tensor):
    """Return the whole of a sharded tensor (all processes must call this together), or any other tensor unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def copy_to_cpu(value, keep):
    """Return copies on the CPU of all tensors in nested dicts and lists, which training does not change any more.

    Sharded tensors are gathered, for which all processes must call this. keep: False returns None for each tensor.
    """
    if isinstance(value, torch.Tensor):
        whole = gather(value)
        return whole.to("cpu", copy=True) if keep else None
    if isinstance(value, dict):
        return {key: copy_to_cpu(inner, keep) for key, inner in value.items()}
    if isinstance(value, list):
        return [copy_to_cpu(inner, keep) for inner in value]
    return value


def shard_like(parameter, value):
    """Return this process's shard of a tensor that belongs to a sharded parameter, such as its momentum.

    Returns `value` itself if the parameter is not sharded or the shapes differ.
    """
    if not hasattr(parameter, "full_tensor") or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor  # takes a second to import

    shard = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return shard.clone()  # a view would keep the whole tensor alive


def whole_model(model, model_class):
    """Return a sharded GPT as a plain one in float32 (all processes must call this together), a plain one unchanged."""
    if not hasattr(model, "unshard"):
        return model
    with torch.device("meta"):
        whole = model_class(model.config)  # sharding has changed the type of `model`
    shards = model.state_dict()
    del shards["lm_head.weight"]  # tied to wte, so it is gathered once
    whole.load_state_dict({name: gather(shard) for name, shard in shards.items()}, strict=False, assign=True)
    whole.lm_head.weight = whole.transformer.wte.weight
    return whole.eval()


@contextmanager
def gradient_sync(model, on):
    """Choose whether this backward pass averages the gradients over the processes (the sum, divided by their number).

    Gradients add up locally, so only the last micro-step of an update has to communicate. A plain model ignores this.
    """
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP
        model.set_requires_gradient_sync(on)
        model.set_is_last_backward(on)
        yield
    elif hasattr(model, "no_sync") and not on:  # DDP
        with model.no_sync():
            yield
    else:
        yield
