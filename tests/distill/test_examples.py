"""Real examples: splits, labels, images of records, and augmentation."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from axicon.data.table import Placed
from axicon.distill.augment import Augment
from axicon.distill.dataset import Dataset, sheet
from axicon.distill.examples import (
    check_enough,
    digits,
    images_of,
    labels_of,
    split,
    standardised,
)
from axicon.distill.experts import generator
from axicon.errors import AxiconError
from tests.distill.small import clusters


def table(*records: dict[str, Any]) -> list[Placed]:
    return [Placed(f"t.parquet, record {i}", record) for i, record in enumerate(records, 1)]


def png(size: tuple[int, int], mode: str = "RGB", colour: Any = 0) -> bytes:
    image = pytest.importorskip("PIL.Image", reason="needs Pillow, of the extra `distill`")
    file = io.BytesIO()
    image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


def test_a_split_holds_out_the_same_share_of_each_class_and_nothing_twice() -> None:
    y = torch.tensor([0] * 10 + [1] * 20)
    train, test = split(y, 0.2, generator(0))
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(30))
    assert torch.bincount(y[test]).tolist() == [2, 4]
    assert torch.equal(test, split(y, 0.2, generator(0))[1])


def test_standardised_values_come_back() -> None:
    data = clusters()
    assert data.x.mean() == pytest.approx(0, abs=1e-5)
    assert data.x.std() == pytest.approx(1, abs=1e-3)
    raw = data.raw()
    like = standardised(raw[:5], data.y[:5], data.classes, data)
    torch.testing.assert_close(like.x, data.x[:5])
    constant = standardised(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]), ("a", "b"))
    assert torch.isfinite(constant.x).all(), "a feature that does not vary is no division by 0"


def test_the_digits() -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn, of the extra `distill`")
    images, y, classes, file = digits()
    assert images.shape == (1797, 1, 8, 8)
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert torch.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert classes == tuple("0123456789")
    assert file.is_file()


def test_images_as_data_sets_keep_them() -> None:
    found = images_of(
        table({"image": {"bytes": png((3, 2), colour=(255, 0, 51)), "path": None}}), "image", None
    )
    assert found.shape == (1, 3, 2, 3)
    assert found[0, :, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])
    assert images_of(table({"image": png((3, 2), "L")}), "image", None).shape == (1, 1, 2, 3)
    lists = images_of(table({"image": [[0, 255], [51, 0]]}), "image", None)
    assert lists[0, 0].tolist() == [[0.0, 1.0], [pytest.approx(0.2), 0.0]]
    both = table({"image": png((3, 2), "L")}, {"image": png((5, 4))}, {"image": [[0, 255], [51, 0]]})
    assert images_of(both, "image", 6).shape == (3, 3, 6, 6)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (
            png((4, 2)),
            "record 2: 'image' is an image of 2 x 4 pixels with 3 channels, the first one of 2 x 3",
        ),
        (png((3, 2), "L"), "pixels with 1 channel, the first one"),
        (b"no image", "record 2: 'image' cannot be decoded as an image"),
        ([[1, 2], [3]], "but no image of numbers in rows of equal length"),
        ("cat.png", "record 2: no image in field 'image'; its fields are image"),
    ],
)
def test_what_is_no_image_like_the_first_is_refused_with_its_place(second: Any, said: str) -> None:
    with pytest.raises(AxiconError, match=said):
        images_of(table({"image": png((3, 2))}, {"image": second}), "image", None)


def test_labels_in_their_order() -> None:
    numbers = table(*({"label": n} for n in (10, 2, 10, 3)))
    y, classes = labels_of(numbers, "label")
    assert classes == ("2", "3", "10")
    assert y.tolist() == [2, 0, 2, 1]
    y, classes = labels_of(table({"label": "b"}, {"label": "a"}), "label")
    assert (y.tolist(), classes) == ([1, 0], ("a", "b"))


@pytest.mark.parametrize(
    ("record", "known", "said"),
    [
        ({"text": "x"}, None, "record 1: no label in field 'label'; its fields are text"),
        ({"label": 1.5}, None, "no label in field 'label'"),
        ({"label": -1}, None, "'label' is -1, which marks a record without a label"),
        ({"label": 7}, ("1", "2"), "'label' is '7', which no record to train on has; those have 1, 2"),
    ],
)
def test_labels_that_are_none_are_refused(record: Any, known: Any, said: str) -> None:
    with pytest.raises(AxiconError, match=said):
        labels_of(table(record), "label", known)


def test_too_few_of_a_class_are_refused() -> None:
    y = torch.tensor([0, 0, 0, 1])
    check_enough(y, ("cat", "dog"), 1)
    with pytest.raises(AxiconError, match="class dog has 1 examples to train on, ipc=2 asks for more"):
        check_enough(y, ("cat", "dog"), 2)
    with pytest.raises(AxiconError, match="all examples have the label cat"):
        check_enough(torch.tensor([0, 0]), ("cat",), 1)


@pytest.mark.parametrize("name", ["shift", "scale", "rotate", "flip", "cutout", "noise"])
def test_augmentation_changes_images_and_lets_gradients_through(name: str) -> None:
    augment = Augment.of((name,), images=True)
    assert augment is not None
    x = clusters(count=12, size=8).x.requires_grad_()
    seen = augment(x, generator(0))
    assert seen.shape == x.shape
    assert not torch.equal(seen, x)
    assert torch.equal(seen, augment(x, generator(0)))
    [slope] = torch.autograd.grad(seen.square().sum(), x)
    assert torch.isfinite(slope).all()
    assert slope.abs().sum() > 0


def test_a_flip_mirrors_or_leaves_an_image() -> None:
    augment = Augment.of(("flip",), images=True)
    assert augment is not None
    x = clusters(count=20, size=4).x
    seen = augment(x, generator(0))
    mirrored = [torch.allclose(a, b.flip(-1), atol=1e-5) for a, b in zip(seen, x, strict=True)]
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(seen, x, strict=True)]
    assert all(one or other for one, other in zip(mirrored, same, strict=True))
    assert any(mirrored)
    assert any(same)


def test_what_vectors_cannot_do_is_refused() -> None:
    with pytest.raises(AxiconError, match="augment=flip: known for vectors are noise, dropout"):
        Augment.of(("flip",), images=False)
    assert Augment.of((), images=True) is None


def test_a_data_set_is_read_as_it_was_written(tmp_path: Any) -> None:
    pytest.importorskip("PIL", reason="needs Pillow, of the extra `distill`")
    made = clusters(count=6, size=8)
    Dataset(examples=made, alpha=0.125).write(tmp_path)
    found = Dataset.read(tmp_path)
    assert found.alpha == 0.125
    assert found.examples.sha256() == made.sha256()
    picture = sheet(made)
    assert picture.size == (48 + 2 * 68 + 4, 3 * 68 + 4)
    # the first image of the first class, pixel by pixel
    grey = (made.raw()[0, 0].clamp(0, 1) * 255).round().int()
    assert [picture.getpixel((48 + 8 * i + 4, 4 + 4)) for i in range(8)] == [(int(v),) * 3 for v in grey[0]]
    with pytest.raises(AxiconError, match="no distilled data set"):
        Dataset.read(tmp_path / "nowhere")
