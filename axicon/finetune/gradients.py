"""Gradients of the mean loss of a batch, over virtual shards and workers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from axicon.data.batch import Batch
from axicon.finetune.estimate import mean_losses
from axicon.protocols import Mean, Objective


def gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    objective: Objective,
    batch: Batch,
    mean: Mean,
) -> float | None:
    """Fill `grad` of the parameters; the mean loss. None, and no `grad`, where something is not finite."""
    for p in parameters.values():
        p.grad = None
    shards, sums = list(batch.shards(mean.shards)), []
    with torch.enable_grad():
        for i in mean.own:
            loss = objective.loss(model, shards[i]).sum()
            (loss / len(batch)).backward()
            sums.append(loss.detach().double())
    for p in parameters.values():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        mean.add(p.grad)
    [loss_] = mean_losses(torch.stack(sums)[:, None], len(batch), mean)
    sizes = torch.stack([p.grad.norm() for p in parameters.values() if p.grad is not None])
    if math.isfinite(loss_) and bool(sizes.isfinite().all()):
        return loss_
    clear(parameters)
    return None


def clear(parameters: Mapping[str, nn.Parameter]) -> None:
    for p in parameters.values():
        p.grad = None
