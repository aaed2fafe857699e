"""The probe finds the tiles it must, on functions whose behaviour is known."""

from __future__ import annotations

import pytest
import torch

from axicon.generate import numerics
from axicon.generate.numerics import _Probe, _smallest_tile, choose_path, padded


class Odd(torch.nn.Module):
    """Exact but for the last bit, which depends on the row count in a way the test chooses."""

    def __init__(self, outputs, changes):
        super().__init__()
        self.outputs, self.changes = outputs, changes

    def forward(self, x):
        y = x.repeat(1, 2)[:, : self.outputs]
        return torch.nextafter(y, y + 1) if self.changes(len(x)) else y


@pytest.mark.parametrize(
    ("changes", "tile"),
    [
        (lambda n: False, 1),
        (lambda n: n == 1, 2),
        (lambda n: n < 4 or n in (5, 6, 7), 4),
        (lambda n: n % 8 != 0, 8),
        (lambda n: n < 16, 16),
        (lambda n: n != 320, None),
    ],
)
def test_smallest_tile(changes, tile):
    product = Odd(48, changes)
    probe = _Probe(lambda x, _: product(x), torch.randn(320, 48), torch.arange(320))
    assert _smallest_tile([probe]) == tile
    assert _smallest_tile([_Probe(lambda x, _: x, torch.randn(320, 48), torch.arange(320)), probe]) == tile


def test_rows_that_depend_on_their_place_are_found():
    """As a kernel that treats the last rows of a block of 16 by another loop."""

    def call(x, positions):
        tail = len(x) % 16
        return torch.cat([x[: len(x) - tail], torch.nextafter(x[len(x) - tail :], x[:1] + 9)])

    assert _smallest_tile([_Probe(call, torch.randn(320, 48), torch.arange(320))]) == 16


def test_a_bit_that_changes_seldom_is_found():
    """As where one row is summed in another order: one in thousands of numbers shows it."""

    def call(x, positions):
        y = x * torch.linspace(1, 2, x.shape[1])
        seldom = (y.view(torch.int32) % 5003 == 0) if len(y) in (1, 3) else torch.zeros_like(y).bool()
        return torch.where(seldom, torch.nextafter(y, y + 1), y)

    assert _smallest_tile([_Probe(call, torch.randn(64, 48), torch.arange(64))]) == 2


def test_path_covers_blocks_and_head(make_decoder):
    decoder = make_decoder(torch.float32)
    assert choose_path(decoder, 8, 16).head_tile <= 8
    decoder.lm_head = Odd(96, lambda n: n < 16)
    assert choose_path(decoder, 8, 16).head_tile == 16
    decoder.blocks[1].down = Odd(48, lambda n: n % 32 != 0)
    path = choose_path(decoder, 8, 16)
    assert (path.body_tile, path.head_tile, path.merged) == (32, 16, True)
    decoder.blocks[1].down = Odd(48, lambda n: n > 64)
    path = choose_path(decoder, 64, 16)
    assert (path.body_tile, path.head_tile, path.merged) == (choose_path(decoder, 8, 16).body_tile, 16, False)
    decoder.blocks[1].down = Odd(48, lambda n: n < 96)
    path = choose_path(decoder, 80, 16)
    assert (path.body_tile, path.merged) == (128, False), (
        "decode rows are always padded to the most there can be"
    )


def test_bits_show_a_changed_last_bit(make_decoder):
    decoder = make_decoder(torch.float32)
    before = numerics.bits(decoder)
    assert numerics.bits(decoder) == before
    with torch.no_grad():
        weight = decoder.blocks[0].out.weight
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    assert numerics.bits(decoder) != before


def test_padded():
    assert [padded(n, 4) for n in (1, 4, 5)] == [4, 4, 8]
