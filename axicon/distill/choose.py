"""Which real examples a distillation begins from, and which ones it is compared with.

The representative initialisation of AST (arXiv:2310.10541) is k-means on the logits of an expert behind its
last epoch, and of each class the examples nearest to each of 10 centres. Fewer than 10 examples per class
take as many centres as examples, where the released code would take none at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from axicon.distill.examples import EXTRA, Examples
from axicon.distill.experts import generator
from axicon.distill.networks import Network
from axicon.errors import AxiconError

CENTRES = 10
AT_ONCE = 1024


def at_random(y: Tensor, classes: int, ipc: int, seed: int) -> Tensor:
    """(classes * ipc,) indices: `ipc` of each class, class by class."""
    chance = generator(seed, "at random")
    found = []
    for label in range(classes):
        mine = (y == label).nonzero()[:, 0]
        found.append(mine[torch.randperm(len(mine), generator=chance)[:ipc]])
    return torch.cat(found)


def nearest_to_centres(features: Tensor, y: Tensor, classes: int, ipc: int, seed: int) -> Tensor:
    """(classes * ipc,) different indices, class by class: those nearest to the centres of k-means on the rows
    of `features` (N, F) of the class.

    Raises AxiconError where scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise AxiconError(f"k-means comes with scikit-learn: {EXTRA}") from None
    found = []
    with threadpool_limits(1):  # its sums have other last bits on other numbers of threads
        for label in range(classes):
            mine = (y == label).nonzero()[:, 0]
            centres = min(CENTRES, ipc)
            state = int(torch.randint(2**31, (1,), generator=generator(seed, "k-means", label)))
            fitted = KMeans(centres, n_init=10, random_state=state).fit(features[mine].double().numpy())
            found.append(mine[_nearest(features[mine], torch.from_numpy(fitted.cluster_centers_), ipc)])
    return torch.cat(found)


def _nearest(points: Tensor, centres: Tensor, count: int) -> Tensor:
    """`count` different rows: the centres take turns, each its nearest row that is left."""
    apart = torch.cdist(points.double(), centres)
    chosen: list[int] = []
    for turn in range(count):
        column = apart[:, turn % len(centres)].clone()
        column[chosen] = torch.inf
        chosen.append(int(column.argmin()))
    return torch.tensor(chosen)


@torch.no_grad()
def logits(network: Network, flat_P: Tensor, data: Examples) -> Tensor:
    """(N, classes) of all examples."""
    return torch.cat([network(flat_P, x) for x in data.x.split(AT_ONCE)])
