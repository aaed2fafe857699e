"""Dataset distillation: a few made examples per class that train a network as all the real ones do."""
