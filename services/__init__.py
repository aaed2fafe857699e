"""The endpoint: one Serve deployment that answers OpenAI-style requests and owns the engine.

`ingress` speaks HTTP, `generation` owns the engine thread, `app` is the only file that knows Ray.
"""
