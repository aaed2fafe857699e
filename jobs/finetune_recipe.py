"""What a finetuning run is asked to do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from axicon.recipe import Dtype, ModelRecipe
from axicon.settings import Method, OptionalMethod, Recipe, named_method

Named = Annotated[Method, BeforeValidator(named_method)]


class DataRecipe(Recipe):
    """What to train and evaluate on: a task that comes with axicon, or files of one's own."""

    task: str | None = Field(None, description="sst2, rte, boolq, copa or cb, with its own prompt")
    folder: Path | None = Field(
        None, description="files of the task; none: $AXICON_DATA, else ../shared/data, else the hub"
    )
    train: str | None = Field(None, description="file (JSON lines, Parquet, text) or hub data set")
    evaluate: str | None = Field(None, description="the same to evaluate on; none: nothing is evaluated")
    form: Literal["prompts", "chats", "text"] = Field(
        "prompts", description="prompts with answers, lists of messages, or plain text in windows"
    )
    template: str | None = Field(None, description="Jinja text of a record's fields, before the answer")
    verbalizer: dict[str, str] | None = Field(None, description="label: word, for answers of a word")
    options: tuple[str, ...] = Field((), description="templates of the answers, for answers of a text")
    label: str = Field("label", description="the field that says which answer is right")
    shorten: str | None = Field(None, description="the field that is cut where a prompt is too long")
    column: str | None = Field(None, description="the field of messages or text; none: messages, text")
    max_tokens: int | None = Field(
        None, ge=2, description="of an example or a window of text; none: 512, or what the model knows"
    )
    limit: int | None = Field(None, ge=1, description="only the first so many records to train on")
    evaluate_limit: int | None = Field(500, ge=1, description="only so many records to evaluate on")


class ScheduleRecipe(Recipe):
    """How the learning rate goes over a run."""

    kind: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="after the rise: as it is, or down to 0 at the last step"
    )
    warmup: int = Field(0, ge=0, description="steps of a linear rise")


class FinetuneRecipe(ModelRecipe):
    """How a model is finetuned. A run goes on from what lies in `out`."""

    dtype: Dtype = Field("float32", description="numbers the model computes in")
    compressor: OptionalMethod = Field(None, description="what becomes of the base first, such as llm_int8")
    data: DataRecipe = Field(DataRecipe(), description="what to train and evaluate on")
    objective: OptionalMethod = Field(None, description="language or choice; none: by the form of the data")
    scheme: Named = Field(
        Method(method="lora"), description="full, lora, head, prefix, prompt or perp; settings beside it"
    )
    rule: Named = Field(
        Method(method="zo_sgd"), description="how it is updated; settings beside it, as rule.lr"
    )
    schedule: ScheduleRecipe = Field(ScheduleRecipe(), description="how the learning rate goes")
    start_from: Path | None = Field(
        None, description="folder of another run to go on from behind its last step; steps counts those too"
    )
    steps: int = Field(1000, ge=0, description="updates in all")
    batch: int = Field(16, ge=1, description="examples of a step")
    shards: int = Field(1, ge=1, description="virtual shards of a batch: the most workers the run may have")
    workers: int = Field(0, ge=0, description="processes of Ray Train; 0: this one. Changes no bit of a log")
    most_workers: int | None = Field(None, ge=1, description="grow to so many while they come and go")
    seed: int = Field(0, ge=0, description="of the order of examples, of adapters and of directions")
    evaluate_every: int = Field(100, ge=1, description="steps from one evaluation to the next")
    checkpoint_every: int = Field(100, ge=1, description="the same of checkpoints; a scalar run needs none")
    keep: Literal["best", "last"] = Field("best", description="which step becomes the result")
    output: Literal["auto", "adapter", "merged"] = Field(
        "auto", description="what is written; auto: merged, or an adapter where the base is packed"
    )
    out: Path | None = Field(None, description="folder of the run; none: artifacts/finetune/MODEL-RULE-...")

    def deciding(self) -> dict[str, Any]:
        """What decides the bits of a run beside model, data and machine."""
        kept: dict[str, Any] = self.model_dump(
            mode="json", include={"dtype", "compressor", "batch", "shards", "seed"}
        )
        schedule = self.schedule.model_dump(mode="json")
        if self.schedule.kind != "constant":
            schedule["steps"] = self.steps
        return kept | {"schedule": schedule}


class ReplayRecipe(Recipe):
    """Which step of a run."""

    step: int | None = Field(None, ge=0, description="steps that were taken; none: all that the log has")
    out: Path | None = Field(None, description="directory to make; none: only the digest is computed")
    model: str | None = Field(None, description="where the base lies now; none: where the run had it")
