"""Stream a chat from a running server with the official client.

    axicon serve demo                      # in another terminal
    pip install openai
    python examples/openai_client.py
"""

import os

import openai

client = openai.OpenAI(
    base_url=os.environ.get("AXICON_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("AXICON_KEY", "none"),  # any, unless the server was given keys
)
model = client.models.list().data[0].id

stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Name three uses of a conical lens."}],
    max_tokens=120,
    temperature=0.7,
    seed=7,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    elif chunk.usage:
        print(f"\n[{chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens]")
