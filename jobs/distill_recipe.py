"""What a distillation is asked to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from axicon.settings import Method, Recipe, Words, named_method

Named = Annotated[Method, BeforeValidator(named_method)]


class DataRecipe(Recipe):
    """The real examples."""

    source: str = Field("digits", description="digits of scikit-learn, a file of records, or a hub data set")
    evaluate: str | None = Field(None, description="the same to test on; none: a share of the source")
    held_out: float = Field(0.2, gt=0, lt=1, description="that share of each class")
    column: str | None = Field(None, description="field of the image or text; none: image, text")
    label: str = Field("label", description="field of the label")
    size: int | None = Field(
        None, ge=2, le=1024, description="pixels a side that images are brought to; none: as is"
    )
    limit: int | None = Field(None, ge=1, description="only the first so many records")


class TextRecipe(Recipe):
    """What becomes of texts."""

    model: str = Field(
        "demo", min_length=1, description="whose features are taken: demo, a directory, or a hub id"
    )
    max_tokens: int | None = Field(
        None, ge=1, description="of a text, the rest is cut; none: 128, or what the model knows"
    )


class ExpertsRecipe(Recipe):
    """Networks trained on the real examples, one task each."""

    count: int = Field(10, ge=1, description="how many")
    epochs: int = Field(20, ge=1, description="of each; their parameters are kept behind each one")
    batch: int = Field(64, ge=1, description="examples of a step")
    lr: float = Field(0.01, gt=0, description="learning rate")
    momentum: float = Field(0.0, ge=0, lt=1, description="0 is MTT's, 0.9 AST's")
    weight_decay: float = Field(0.0, ge=0, description="0 is MTT's, 1e-3 AST's")
    decay: float = Field(1.0, gt=0, le=1, description="of the rate in the second half; 1 is MTT's, 0.6 AST's")
    folder: Path | None = Field(None, description="where experts lie, for several runs; none: in out")


class SwitchesRecipe(Recipe):
    """What AST adds to MTT, each by itself; all off is MTT."""

    clip_loss: bool = Field(False, description="smaller losses in the first ten epochs of an expert")
    grad_penalty: float = Field(0.0, ge=0, description="weight of an expert's gradient penalty; AST: 2")
    penalty_norm: Literal["pixel", "example"] = Field(
        "pixel", description="its norm: over a pixel's channels, as released, or over all of an example"
    )
    representative: bool = Field(False, description="begin with examples near centres of an expert's logits")
    balance: bool = Field(False, description="late starts count more in the inner loss")
    mid_match: Literal["none", "agg", "adaptive"] = Field(
        "none", description="match epochs on the way: with weight 1, or growing ones"
    )
    perturb: float = Field(0.0, ge=0, description="move the start in weights of convolutions; AST: 1")


class JudgeRecipe(Recipe):
    """How what was made is judged: fresh networks trained on it alone, after their last epoch."""

    nets: int = Field(5, ge=1, description="fresh networks")
    epochs: int = Field(1000, ge=1, description="full passes over what was made")
    momentum: float = Field(0.9, ge=0, lt=1, description="of their training")
    weight_decay: float = Field(5e-4, ge=0, description="5e-4 is MTT's, 1e-3 AST's")
    decay: float = Field(0.1, gt=0, le=1, description="of the rate in the second half; 0.1 MTT's, 0.5 AST's")
    every: int = Field(100, ge=1, description="iterations from one judgement to the next")
    baselines: bool = Field(True, description="judge as many real examples too: at random, and by k-means")


class DistillRecipe(Recipe):
    """How examples are distilled. A run goes on from what lies in `out`."""

    modality: Literal["images", "text"] = Field(
        "images", description="images, or text as pooled features of a model, which become vectors"
    )
    data: DataRecipe = Field(DataRecipe(), description="the real examples")
    text: TextRecipe = Field(TextRecipe(), description="for modality=text")
    network: Named = Field(
        Method(method="mlp"), description="convnet, mlp, linear; width and depth beside it"
    )
    experts: ExpertsRecipe = Field(ExpertsRecipe(), description="what is to be followed")
    switches: SwitchesRecipe = Field(SwitchesRecipe(), description="what AST adds")
    ipc: int = Field(1, ge=1, description="examples to make of each class")
    init: Literal["real", "kmeans", "noise"] = Field("real", description="what they begin as")
    iterations: int = Field(1000, ge=0, description="in all")
    steps: int = Field(10, ge=1, description="N, of a student in an iteration")
    expert_epochs: int = Field(2, ge=1, description="M, that these steps are to make up for")
    max_start: int = Field(10, ge=1, description="a student starts at one of the first so many epochs")
    batch: int | None = Field(None, ge=1, description="made examples of a student's step; none: all")
    momentum: float = Field(0.0, ge=0, lt=1, description="of a student's steps; 0 is MTT's, 0.9 AST's")
    lr_data: float = Field(10.0, gt=0, description="learning rate of the examples")
    lr_alpha: float = Field(1e-4, ge=0, description="learning rate of the students' step size")
    alpha: float = Field(0.02, gt=0, description="step size to begin with")
    augment: Words = Field((), description="shift, scale, rotate, flip, cutout, noise; or noise, dropout")
    judge: JudgeRecipe = Field(JudgeRecipe(), description="what the result is worth")
    workers: int = Field(0, ge=0, description="experts at a time, in processes or Ray tasks; 0: in this one")
    threads: int = Field(1, ge=1, le=1024, description="compute threads of a process; networks are small")
    seed: int = Field(0, ge=0, description="of everything random")
    checkpoint_every: int = Field(50, ge=1, description="iterations from one checkpoint to the next")
    start_from: Path | None = Field(
        None, description="folder of a run whose end this one begins from, with other rates or another walk"
    )
    out: Path | None = Field(None, description="folder of the run; none: artifacts/distill/DATA-ipc-...")

    def deciding(self) -> dict[str, Any]:
        """What decides the bits of what is made, beside data and machine."""
        kept: dict[str, Any] = self.model_dump(
            mode="json",
            exclude={
                "data", "text", "judge", "iterations", "workers", "threads", "checkpoint_every", "start_from",
                "out",
            },
        )  # fmt: skip
        kept["experts"].pop("folder")
        kept["network"] = {"method": self.network.method, **dataclasses.asdict(self.architecture())}
        return kept

    def architecture(self) -> Any:
        """The network's settings. Raises AxiconError for an unknown one."""
        from axicon.distill.networks import NETWORKS

        return self.network.build(NETWORKS, "network")


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names, as `experts.lr`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
