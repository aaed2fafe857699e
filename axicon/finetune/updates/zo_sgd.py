"""ZO-SGD: gradient descent along a random direction, MeZO (arXiv:2305.17333, algorithm 1).

    theta <- (1 - lr wd) theta - lr g z

The step itself is `ZerothOrder.apply`, which other rules begin from too. Settings of the benchmark
(arXiv:2402.11592) are beside it: several queries, blocks one at a time, sparse directions. Differs from the
authors' code: the estimates of several queries are averaged, each with a direction of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from axicon.finetune.estimate import ZerothOrder


@dataclass(kw_only=True)
class ZoSGD(ZerothOrder):
    pass
