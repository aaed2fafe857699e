"""Forward gradient (Baydin et al., arXiv:2202.08587), as in the zeroth-order benchmark (arXiv:2402.11592).

    c = <grad L, v>, by one pass in forward mode       theta <- (1 - lr wd) theta - lr c v

No second point and no eps: c is exact. The pass holds v and a tangent beside each activation at hand, but no
activation for later. A run is its log as of any zeroth-order rule.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from axicon.data.batch import Batch
from axicon.errors import AxiconError
from axicon.finetune.directions import Direction
from axicon.finetune.estimate import ZerothOrder, mean_losses
from axicon.model.packed import PackedLinear
from axicon.protocols import Mean, Moment, Objective, Scalars


@dataclass(kw_only=True)
class ForwardGrad(ZerothOrder):
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.one_sided:
            raise ValueError("one_sided: nothing is compared here")

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        packed = sorted({m.format for m in model.modules() if isinstance(m, PackedLinear)})
        if packed:
            raise AxiconError(
                f"forward_grad has no derivative of products stored as {', '.join(packed)}; take "
                "rule.method=zo_sgd, or the dense model"
            )

    @torch.no_grad()
    def measure(
        self, model: nn.Module, objective: Objective, batch: Batch, mean: Mean, at: Moment
    ) -> Scalars:
        shards = list(batch.shards(mean.shards))
        columns: list[Tensor] = []
        for group, v in self.directions(at):
            pairs = []
            with _forward_mode(), _tangents(model, group, v):
                for i in mean.own:
                    loss, slope = forward_ad.unpack_dual(objective.loss(model, shards[i]).double().sum())
                    pairs.append(torch.stack([loss, torch.zeros_like(loss) if slope is None else slope]))
            columns.append(torch.stack(pairs))
        means = mean_losses(torch.cat(columns, dim=1), len(batch), mean)
        return {"loss": means[0], "g": means[1::2]}


@contextmanager
def _forward_mode() -> Iterator[None]:
    """Torch's forward mode, which fused attention has not, and which warns of itself at its first use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is", category=FutureWarning)
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            yield


@contextmanager
def _tangents(model: nn.Module, group: Mapping[str, nn.Parameter], v: Direction) -> Iterator[None]:
    """Within the block, the parameters of `group` have v as their tangents."""
    duals = {
        id(p): forward_ad.make_dual(p.detach(), v.values(name, p).to(p.dtype)) for name, p in group.items()
    }
    with ExitStack() as undo:
        for module in model.modules():
            for kind, p in list(module._parameters.items()):
                if p is not None and id(p) in duals:
                    module._parameters[kind] = duals[id(p)]
                    undo.callback(module._parameters.__setitem__, kind, p)
        yield
