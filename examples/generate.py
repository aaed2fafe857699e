"""The Python door: a model in this process, no server.

    python examples/generate.py
"""

import axicon

model = axicon.load("demo")

# One prompt, one answer.
print(model.generate("The three primary colours are", max_tokens=24, temperature=0).text)

# Several prompts are computed together; each answer is what it would be alone.
for answer in model.generate(["Water boils at", "The capital of Norway is"], max_tokens=12, temperature=0):
    print(repr(answer.text), answer.finish_reason)

# A chat, as it is written. Equal seed, equal text.
for piece in model.chat(
    [{"role": "user", "content": "Write one sentence about rain."}],
    stream=True,
    max_tokens=60,
    temperature=0.7,
    top_p=0.9,
    seed=7,
):
    print(piece.text, end="", flush=True)
print()
