"""LocalRunner against the decoder's dense path: chunks, decode rows, trees, commits, and what a bad step
does.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from axicon.generate.runner import LocalRunner
from axicon.model.cache import size_class
from axicon.step import StepInput


def chain(tokens, row, start=0, base=0):
    """Nodes of a chain whose first node follows the committed context; `base` is its index in the step."""
    return [(token, start + i, row, base + i - 1 if i else -1) for i, token in enumerate(tokens)]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def dense(decoder, tokens):
    with torch.inference_mode():
        x = decoder.logits(torch.tensor([tokens]))
    return x[0]


TEXT = torch.randint(2, 96, (40,), generator=torch.Generator().manual_seed(3)).tolist()


def test_chunks_and_decode_equal_the_dense_path(decoder64, runner64, make_step):
    want = dense(decoder64, TEXT)
    out = [runner64.forward(make_step(chain(TEXT[:16], 0), forced=True, reserves=((0, 64),))).logits_WV]
    out.append(
        runner64.forward(
            make_step(chain(TEXT[16:30], 0, 16), forced=True, commits=tuple(range(16)))
        ).logits_WV
    )
    commits = tuple(range(14))
    for i in range(30, 40):
        out.append(runner64.forward(make_step([(TEXT[i], i, 0, -1)], commits=commits)).logits_WV)
        commits = (0,)
    torch.testing.assert_close(torch.cat(out), want, rtol=1e-5, atol=1e-5)
    runner64.forward(make_step(releases=(0,)))
    assert runner64.cache.bytes_in_use == 0


def test_tree_rows_equal_sequential_runs_and_commit_keeps_one_path(decoder64, runner64, make_step):
    prompt, other = TEXT[:9], TEXT[20:25]
    runner64.forward(
        make_step([*chain(prompt, 0), *chain(other, 1, base=9)], forced=True, reserves=((0, 64), (1, 64)))
    )
    # Two roots; 5 has the children 7 and 8, 8 has the child 9. Row 1 decodes one token behind them.
    tree = [(5, 9, 0, -1), (6, 9, 0, -1), (7, 10, 0, 0), (8, 10, 0, 0), (9, 11, 0, 3), (11, 5, 1, -1)]
    got = runner64.forward(make_step(tree, commits=tuple(range(14)))).logits_WV
    paths = [[5], [6], [5, 7], [5, 8], [5, 8, 9]]
    for node, path in enumerate(paths):
        close(got[node], dense(decoder64, prompt + path)[-1])
    close(got[5], dense(decoder64, [*other, 11])[-1])
    after = make_step([(12, 12, 0, -1), (13, 6, 1, -1)], commits=(0, 3, 4, 5))
    got = runner64.forward(after).logits_WV
    close(got[0], dense(decoder64, [*prompt, 5, 8, 9, 12])[-1])
    close(got[1], dense(decoder64, [*other, 11, 13])[-1])
    sequential = LocalRunner(decoder64, kv_bytes=8 << 20, max_rows=8, prefill_chunk=16)
    sequential.forward(make_step(chain([*prompt, 5, 8, 9], 0), forced=True, reserves=((0, 64),)))
    for ours, theirs in zip(runner64.cache.rows[0].layers, sequential.cache.rows[0].layers, strict=True):
        close(ours.extent[:, :, :12], theirs.extent[:, :, :12])


@pytest.mark.parametrize("window", [1, 3, 7])
def test_sliding_window(make_decoder, make_step, window):
    decoder = make_decoder(model_type="mistral", sliding_window=window)
    runner = LocalRunner(decoder, kv_bytes=8 << 20, max_rows=4, prefill_chunk=16)
    out = [runner.forward(make_step(chain(TEXT[:10], 0), forced=True, reserves=((0, 64),))).logits_WV]
    out.append(runner.forward(make_step(chain(TEXT[10:15], 0, 10), commits=tuple(range(10)))).logits_WV)
    commits = tuple(range(5))
    for i in range(15, 20):
        out.append(runner.forward(make_step([(TEXT[i], i, 0, -1)], commits=commits)).logits_WV)
        commits = (0,)
    close(torch.cat(out), dense(decoder, TEXT[:20]))


@pytest.mark.parametrize("window", [2, 6])
def test_a_tree_inside_a_sliding_window(make_decoder, make_step, window):
    decoder = make_decoder(model_type="mistral", sliding_window=window)
    runner = LocalRunner(decoder, kv_bytes=8 << 20, max_rows=4, prefill_chunk=16)
    runner.forward(make_step(chain(TEXT[:9], 0), forced=True, reserves=((0, 64),)))
    tree = [(5, 9, 0, -1), (6, 9, 0, -1), (7, 10, 0, 0), (8, 10, 0, 0), (9, 11, 0, 3)]
    got = runner.forward(make_step(tree, commits=tuple(range(9)))).logits_WV
    for node, path in enumerate([[5], [6], [5, 7], [5, 8], [5, 8, 9]]):
        close(got[node], dense(decoder, TEXT[:9] + path)[-1])


def test_split_passes_give_the_same_logits_in_the_same_order(decoder64, runner64, make_step):
    import dataclasses

    runner64.forward(make_step(chain(TEXT[:4], 3), forced=True, reserves=((3, 64),)))
    merged = dataclasses.replace(runner64.path, merged=True)
    nodes = [*chain(TEXT[5:12], 0), (TEXT[4], 4, 3, -1), *chain(TEXT[12:15], 1, base=8)]
    forced = torch.tensor([True] * 7 + [False] + [True] * 3)
    wanted = torch.tensor([False, True, False, False, False, False, True, True, False, False, True])
    step = dataclasses.replace(
        make_step(nodes, commits=(0, 1, 2, 3), reserves=((0, 64), (1, 64))), forced_N=forced, wanted_N=wanted
    )
    got = []
    for path in (merged, dataclasses.replace(merged, merged=False, body_tile=4, head_tile=4)):
        runner = LocalRunner(decoder64, kv_bytes=8 << 20, max_rows=8, prefill_chunk=16)
        runner.path = path
        runner.forward(make_step(chain(TEXT[:4], 3), forced=True, reserves=((3, 64),)))
        got.append(runner.forward(step).logits_WV)
    assert got[0].shape[0] == 4
    close(got[0], got[1])
    close(got[0][2], dense(decoder64, TEXT[:5])[-1])


def test_a_row_grows_through_the_size_classes(decoder64, make_step):
    runner = LocalRunner(decoder64, kv_bytes=8 << 20, max_rows=4, prefill_chunk=50)
    text = TEXT * 5
    commits, sizes, last = (), [], None
    for start in range(0, 200, 50):
        reserves = ((0, 200),) if start == 0 else ()
        step = make_step(
            chain(text[start : start + 50], 0, start), forced=True, commits=commits, reserves=reserves
        )
        last = runner.forward(step).logits_WV
        commits = tuple(range(50))
        sizes.append(runner.cache.bytes_in_use)
    torch.testing.assert_close(last, dense(decoder64, text[:200])[150:], rtol=1e-6, atol=1e-6)
    assert sizes == [size_class(n) * runner.cache.bytes_per_slot for n in (50, 100, 150, 200)]


def test_a_bad_step_is_refused_before_anything_changes(runner64, make_step):
    runner64.forward(make_step(chain(TEXT[:4], 0), forced=True, reserves=((0, 64),)))
    before = (runner64.cache.rows[0].committed, runner64.cache.bytes_in_use)
    node = (5, 4, 0, -1)
    bad = {
        "not open": make_step([(5, 0, 7, -1)]),
        "not adjacent": make_step([node, (5, 0, 1, -1), (6, 4, 0, -1)], reserves=((1, 64),)),
        "parent": make_step([node, (5, 5, 0, 1)]),
        "ascending": make_step([node], commits=(0, 9)),
        "path": make_step([node], commits=(1,)),
        "policy": make_step([node], evictions=(0,)),
        "position": make_step([(5, 5, 0, -1)], commits=(0, 1, 2, 3)),
        "expected 5": make_step([node, (5, 6, 0, 0)], commits=(0, 1, 2, 3)),
        "in use": make_step([node], reserves=((0, 64),)),
        "reserved": make_step([node], reserves=((1, 1 << 20),)),
    }
    for message, step in bad.items():
        with pytest.raises(ValueError, match=message):
            runner64.forward(step)
    assert before == (runner64.cache.rows[0].committed, runner64.cache.bytes_in_use)
    runner64.forward(make_step([node], commits=(0, 1, 2, 3)))
    assert runner64.cache.rows[0].committed == 4


def test_pack_and_unpack_are_inverse(make_step):
    nodes = [(5, 9, 0, -1), (7, 10, 0, 0), (8, 3, 2, -1)]
    steps = [
        make_step(),
        make_step(nodes, commits=(0, 2), releases=(4,), evictions=(1, 2), reserves=((5, 64), (6, 96))),
        make_step(nodes[2:], forced=True),
    ]
    for step in steps:
        again = StepInput.unpack(step.pack())
        for name in StepInput.__slots__:
            ours, theirs = getattr(step, name), getattr(again, name)
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs, name
    packed = steps[1].pack()
    packed[0] += 1
    with pytest.raises(ValueError, match="version"):
        StepInput.unpack(packed)
    with pytest.raises((ValueError, RuntimeError)):
        StepInput.unpack(steps[1].pack()[:-1])


def test_fingerprint_follows_what_changes_bits(make_decoder):
    def fingerprint(**settings):
        decoder = make_decoder(settings.pop("dtype", torch.float32))
        return LocalRunner(
            decoder, **{"kv_bytes": 1 << 20, "max_rows": 4, "prefill_chunk": 16} | settings
        ).fingerprint

    variants = [{}, {"dtype": torch.bfloat16}, {"prefill_chunk": 32}, {"model_digest": "other"}]
    prints = [fingerprint(**v) for v in variants]
    assert len(set(prints)) == 4
    assert fingerprint() == prints[0]
    for a, b in itertools.combinations(prints, 2):
        assert a != b
