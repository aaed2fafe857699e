"""State that lives on accelerators: shards of a model. `ray.remote` is applied in `group.py` only."""
