"""Generation: requests in, tokens out. `engine` is the loop, `runner` computes its steps."""
