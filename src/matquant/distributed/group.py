"""Join the processes of a run, and end them with one error message, from one of them.

torchrun (or anything that sets its variables, system/ranks.py) starts the processes. They talk through gloo on CPUs and
NCCL on GPUs; small objects always go through gloo.

A process that fails exits, which closes its connections: the others then fail in their next collective operation, and
torchrun ends those that compute. ``claim_error`` lets only the first of them print its message.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from matquant.system import ranks
from matquant.system.errors import InputError

PATIENCE = datetime.timedelta(hours=2)  # one process may write or solve for long while the others wait
STORE_S = 20  # seconds to reach the store in which processes meet
ERROR_KEY = "matquant/errors"
LOSSES = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "ProcessGroup")


class LostProcessError(InputError):
    """A process of the run has ended, so that the others cannot go on."""


@contextlib.contextmanager
def joined(device: str | None = None) -> Iterator[None]:
    """Connect the processes of this run, and wait for all of them at the end; does nothing for one, or inside another.

    device: as in ``choose_device``; on GPUs each process gets the one of its local rank. Raises LostProcessError if
    another process ends early.
    """
    with ranks.shared():
        if ranks.count() == 1 or dist.is_initialized():
            yield
        else:
            with _connected(device):
                yield


@contextlib.contextmanager
def _connected(device: str | None) -> Iterator[None]:
    cuda = torch.cuda.is_available() and device != "cpu"
    if cuda:
        if ranks.local_rank() >= torch.cuda.device_count():
            raise InputError(
                f"{ranks.local_rank() + 1} or more processes share {torch.cuda.device_count()} GPUs of this machine; "
                "start one process per GPU, or use --device cpu"
            )
        torch.cuda.set_device(ranks.local_rank())
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
        yield
        dist.barrier()
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        reason = str(error).splitlines()[0][:200]
        raise LostProcessError(
            f"another process of this run has ended ({reason}); repeat the command with --resume to continue"
        ) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _is_loss(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(mark in str(error) for mark in LOSSES)


def claim_error() -> bool:
    """Return whether this process may print its error: the first of a run that asks, by the store of torchrun."""
    if ranks.count() == 1:
        return True
    if "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:  # the store ends with rank 0
        return ranks.leads()
    key = f"{ERROR_KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = datetime.timedelta(seconds=STORE_S)
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, is_master=False, wait_for_workers=False, timeout=patience
        )
        return int(store.add(key, 1)) == 1
    except RuntimeError:
        return True
