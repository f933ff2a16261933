"""Processes of one group, started here: each runs the same function, as under ``torchrun``."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

# The server imports the library once; each process is then a copy of it.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pyro_em", "torch.distributed", "pytest", "tests.ranks"])


def on_ranks(
    size: int, call: Callable[..., Any], *args: Any, timeout: float = 20.0, limit: float = 60.0
) -> list[Any]:
    """What ``call(*args)`` returns on each rank; None where the process was killed.

    Args:
        size: How many processes.
        call: A function of a module, which may use ``torch.distributed``.
        timeout: Of the group, in seconds.
        limit: Seconds after which the processes are killed, and this raises.

    Raises:
        Exception: What a rank raises.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_context.Pipe(duplex=False) for _ in range(size)]
        started = [
            _context.Process(
                target=_run, args=(rank, size, folder, timeout, pipes[rank][1], call, args)
            )
            for rank in range(size)
        ]
        for process in started:
            process.start()
        for _, sender in pipes:
            sender.close()
        end = time.monotonic() + limit
        try:
            out = [_received(receiver, end) for receiver, _ in pipes]
        finally:
            for process in started:
                process.join(max(0.0, min(5.0, end - time.monotonic())))
                process.kill()
        for one in out:
            if isinstance(one, BaseException):
                raise one
        return out


def _received(receiver: Any, end: float) -> Any:
    if not receiver.poll(max(0.0, end - time.monotonic())):
        raise TimeoutError("a process did not end")
    try:
        content = io.BytesIO(receiver.recv_bytes())
    except EOFError:
        return None
    import torch

    return torch.load(content, weights_only=False)


def _run(
    rank: int,
    size: int,
    folder: str,
    timeout: float,
    sender: Any,
    call: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import pyro
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(rank)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    dist.barrier()  # all are connected
    try:
        out = call(*args)
    except BaseException as error:
        out = error
    content = io.BytesIO()
    try:
        torch.save(out, content)
    except Exception as error:  # an exception or a result that cannot be sent
        content = io.BytesIO()
        torch.save(RuntimeError(f"{type(out).__name__}: {out} ({error})"), content)
    sender.send_bytes(content.getvalue())
    sender.close()
    if not isinstance(out, BaseException):
        dist.destroy_process_group()
    os._exit(0)  # there is nothing to tidy up
