"""What a model is finetuned for, by the name recipes call it."""

from axicon.finetune.objectives.choice import Choice
from axicon.finetune.objectives.language import Language
from axicon.protocols import Objective

OBJECTIVES: dict[str, type[Objective]] = {
    "choice": Choice,
    "language": Language,
}
