"""Measure a model from Python: perplexity on a text, and a task of lm-eval through its own library.

    python examples/evaluate.py TEXT_FILE [DATA_FOLDER]

The data folder holds files such as `sst2/dev.jsonl` with `sentence` and `label`; see axicon/evaluate/tasks.
"""

import sys

import torch

from axicon.data import join_rows, read_rows
from axicon.evaluate import perplexity
from axicon.model import checkpoint

folder = checkpoint.resolve("demo")
decoder = checkpoint.load(folder, dtype=torch.float32)
tokenizer = checkpoint.load_tokenizer(folder)

text = join_rows(read_rows(sys.argv[1]))
measured = perplexity(decoder, tokenizer, text, window=512, windows=4)
print(f"perplexity {measured.value:.3f} on the first {measured.windows} windows of {measured.window} tokens")

if len(sys.argv) > 2:
    from axicon.evaluate.harness import AxiconLM
    from axicon.evaluate.run import Tasks

    lm = AxiconLM(decoder, tokenizer, max_length=decoder.shape.max_positions)
    results = Tasks(["sst2"], data_dir=sys.argv[2]).run(lm, limit=20)
    print(f"sst2 accuracy {results['results']['sst2']['acc,none']:.2f} on 20 sentences")
