"""Loops on torch's DistributedDataParallel, written by hand without offloop: what offloop has to equal bit for bit."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from rank_scripts.talk import RANK, WORLD_SIZE
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset


class OwnPart:
    """The batches of a batch sampler, and of each only the samples of this rank."""

    def __init__(self, batches: BatchSampler) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            # A rank without a sample repeats one, which has no weight
            yield batch[RANK::WORLD_SIZE] or batch[:1]

    def __len__(self) -> int:
        return len(self.batches)


def train_by_hand(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: TensorDataset,
    *,
    order: torch.Generator,
    epochs: int,
    size: int = 8,
    accumulate: int = 1,
    clip: float | None = None,
    bf16: bool = False,
) -> list[float]:
    """Train, and return the loss of each step over the samples of all ranks."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    wrapped = DistributedDataParallel(model)
    sampler = BatchSampler(RandomSampler(data, generator=order), size, drop_last=False)
    loader = DataLoader(data, batch_sampler=OwnPart(sampler))
    total, length, losses = len(data), len(loader), []
    model.train()
    for _ in range(epochs):
        of_window = []
        for number, (inputs, targets, _) in enumerate(loader):
            begun = number // accumulate * accumulate
            window = min(accumulate, length - begun)
            is_last = number + 1 - begun == window
            whole = min(size, total - number * size)
            own = len(range(RANK, whole, WORLD_SIZE))
            factor = own * WORLD_SIZE / whole
            with contextlib.nullcontext() if is_last else wrapped.no_sync():
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                    loss = cross_entropy(wrapped(inputs), targets)
                weighted = loss if window == 1 else loss / window
                (weighted if factor == 1.0 else weighted * factor).backward()
            of_window.append(loss.detach() * factor)
            if not is_last:
                continue
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            mean = torch.stack(of_window).mean() / WORLD_SIZE
            dist.all_reduce(mean)
            losses.append(mean.item())
            of_window.clear()
    return losses
