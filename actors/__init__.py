"""State that lives on GPUs: actors that hold shards of a model. `ray.remote` is applied here only."""
