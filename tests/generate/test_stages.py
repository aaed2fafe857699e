"""A model in stages, each a LocalRunner over its own blocks, without any transport: the whole's bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from axicon.generate.runner import Checked, LocalRunner
from axicon.model.decoder import Decoder
from axicon.step import StepInput

TEXT = torch.randint(2, 96, (40,), generator=torch.Generator().manual_seed(3)).tolist()


def cut(decoder: Decoder, *ends: int) -> list[Decoder]:
    """The same weights in stages that end behind these blocks."""
    weights, stages, first = decoder.state_dict(), [], 0
    for last in ends:
        stage = Decoder(decoder.shape, range(first, last)).to(decoder.dtype).eval()
        names = {name: name for name in stage.state_dict()}
        for name in names:
            if name.startswith("blocks."):
                _, index, rest = name.split(".", 2)
                names[name] = f"blocks.{int(index) + first}.{rest}"
        stage.load_state_dict({name: weights[whole] for name, whole in names.items()})
        stages.append(stage)
        first = last
    return stages


class Row:
    """Stages one after the other in this process."""

    def __init__(self, decoders: list[Decoder], **settings: object) -> None:
        self.runners = [LocalRunner(decoder, **settings) for decoder in decoders]

    def forward(self, step: StepInput) -> torch.Tensor:
        x = None
        for runner in self.runners:
            checked: Checked = runner.check(step)
            runner.apply(checked)
            x = runner.compute(checked, x)
        return x


def chain(tokens, row, start=0, base=0):
    return [(token, start + i, row, base + i - 1 if i else -1) for i, token in enumerate(tokens)]


SETTINGS = {"kv_bytes": 8 << 20, "max_rows": 8, "prefill_chunk": 16}


@pytest.mark.parametrize("ends", [(2, 4), (1, 4), (1, 2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stages_compute_the_bits_of_the_whole(make_decoder, make_step, dtype, ends):
    decoder = make_decoder(dtype, num_hidden_layers=4)
    whole, row = LocalRunner(decoder, **SETTINGS), Row(cut(decoder, *ends), **SETTINGS)
    first = [*chain(TEXT[:16], 0), *chain(TEXT[20:25], 1, base=16)]
    tree = [(5, 16, 0, -1), (6, 16, 0, -1), (7, 17, 0, 0), (8, 17, 0, 0), (11, 5, 1, -1)]
    some = dataclasses.replace(
        make_step(first, forced=True, reserves=((0, 64), (1, 64))), wanted_N=torch.arange(21) % 5 == 0
    )
    steps = [
        some,
        make_step(tree, commits=tuple(range(21))),
        make_step([(9, 18, 0, -1), (12, 6, 1, -1)], commits=(0, 3, 4)),
        make_step(releases=(0,), commits=(0, 1)),
        make_step([(13, 7, 1, -1)]),
    ]
    for step in steps:
        assert torch.equal(row.forward(step), whole.forward(step).logits_WV)
    for runner in row.runners:
        assert runner.cache.rows[1].committed == 7


def test_passes_apart_keep_the_order_between_stages(make_decoder, make_step):
    decoder = make_decoder(torch.float64, num_hidden_layers=3)
    whole, row = LocalRunner(decoder, **SETTINGS), Row(cut(decoder, 1, 3), **SETTINGS)
    for runner, merged in ((whole, True), (row.runners[0], False), (row.runners[1], False)):
        runner.path = dataclasses.replace(runner.path, merged=merged, body_tile=4, head_tile=4)
    opening = make_step(chain(TEXT[:4], 3), forced=True, reserves=((3, 64),))
    nodes = [*chain(TEXT[5:12], 0), (TEXT[4], 4, 3, -1), *chain(TEXT[12:15], 1, base=8)]
    step = dataclasses.replace(
        make_step(nodes, commits=(0, 1, 2, 3), reserves=((0, 64), (1, 64))),
        forced_N=torch.tensor([True] * 7 + [False] + [True] * 3), wanted_N=torch.arange(11) % 3 != 0,
    )
    for one in (opening, step):
        torch.testing.assert_close(row.forward(one), whole.forward(one).logits_WV, rtol=1e-9, atol=1e-9)


def test_a_limit_is_what_a_stage_holds(runner64, make_step):
    runner64.limit(128)
    assert runner64.capacity.slots == 128
    with pytest.raises(ValueError, match="192 slots reserved, the cache holds 128"):
        runner64.forward(make_step(reserves=((0, 96), (1, 96))))
    runner64.limit(1 << 30)
    assert runner64.capacity.slots == 128
    assert not runner64.cache.rows


def test_nodes_that_another_stage_failed_on_cannot_be_committed(runner64, make_step):
    runner64.forward(make_step(chain(TEXT[:4], 0), reserves=((0, 64),)))
    runner64.unstage()
    with pytest.raises(ValueError, match="not ascending nodes of the previous step"):
        runner64.check(make_step(commits=(0,)))
