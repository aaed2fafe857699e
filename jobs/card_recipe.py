"""What `axicon card` is asked for."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from axicon.recipe import Dtype
from axicon.settings import Paths, Recipe, Words


class CardRecipe(Recipe):
    """What a card gets beyond what is measured always."""

    model: str = Field("", description="a directory that axicon compress made")
    text: str | None = Field(None, description="perplexity of both on this text file or hub data set")
    column: str = Field("text", description="the field that holds the text of a record")
    window: int = Field(2048, ge=2, description="tokens per perplexity window")
    windows: int | None = Field(None, ge=1, description="only the first so many windows; none: all")
    tasks: Words = Field((), description="zero-shot tasks; none: lambada,sst2,rte,boolq,copa,cb")
    data: Path | None = Field(None, description="folder with the tasks' files; none: no tasks are asked")
    limit: int | None = Field(100, ge=1, description="only the first so many questions of a task; none: all")
    include: Paths = Field((), description="folders with further lm-eval task files")
    hub: bool = Field(False, description="true: without data=, lm-eval's own data from the hub")
    dtype: Dtype = Field("bfloat16", description="numbers that quality is measured in; speed is in bfloat16")
    serving: bool = Field(True, description="false: no speed, memory and greedy texts, if not there yet")
    again: bool = Field(False, description="true: measure speed and memory again, too")
    threads: int | None = Field(None, ge=1, le=1024, description="compute threads; none: one per core")
