"""What a run of several verbs is asked to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from axicon.settings import Recipe


class StepRecipe(Recipe):
    """One verb with its settings. `{NAME}` in a text is what the step NAME made."""

    name: str = Field(pattern="^[a-z][a-z0-9_]*$", description="of the step, and of its folder")
    verb: str = Field(description="compress, finetune, sweep, evaluate, distill or ask")
    recipe: str | None = Field(None, description="recipe it begins from: a name, or a file")
    settings: dict[str, Any] = Field(default_factory=dict, description="laid over it")


class RunRecipe(Recipe):
    """Verbs one after another, each on what those before it made."""

    model: str = Field("demo", min_length=1, description="what {model} stands for")
    steps: tuple[StepRecipe, ...] = Field((), description="verbs in order, in a recipe file")
    text: Path | None = Field(None, description="what {text} stands for; none: the model writes it")
    train: Path | None = Field(None, description="what {train} stands for; none: the model writes it")
    threads: int | None = Field(None, ge=1, le=1024, description="compute threads; none: one per core")
    out: Path | None = Field(None, description="folder of the run; none: artifacts/runs/MODEL")

    def inside(self) -> Iterator[tuple[type[Recipe], Mapping[str, Any]]]:
        from jobs.run import Step

        for asked in self.steps:
            step = Step.of(asked, self.threads)
            yield step.recipe, step.settings
