"""The edges a person types at: the `axicon` command, and one module per verb with `run(recipe)`."""
