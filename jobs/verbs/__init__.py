"""The verbs of the `axicon` command, a file for each kind. Importing one adds its verbs to the group.

Thin: a verb reads its recipe and calls the `run` of its module, which it imports late, so that `--help` and
wrong input answer at once.
"""
