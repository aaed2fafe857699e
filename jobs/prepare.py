"""Finds, makes or fetches a model and looks at it, in a process of its own.

That takes torch and half a gigabyte, which a command that starts a server and then only waits need not keep.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, Self

from axicon.errors import AxiconError, RunFailed
from axicon.recipe import LocalServeRecipe


class Preparation:
    """`with Preparation(recipe) as model:` begins to look at its model; `model.result()` waits for the end.

    What the hub says of a download goes to standard error. Leaving the block early ends the process.
    """

    def __init__(self, recipe: LocalServeRecipe) -> None:
        self.recipe = recipe
        self.answer: dict[str, Any] | None = None
        command = [sys.executable, "-m", "jobs.prepare", recipe.model_dump_json()]
        # In a session of its own: Ctrl-C is for the command, which ends this.
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def result(self) -> LocalServeRecipe:
        """The recipe with its model as a directory that can be served, and its name. Raises AxiconError."""
        if self.answer is None:
            said, _ = self.process.communicate()
            if self.process.returncode != 0:
                raise RunFailed("the model could not be looked at; the reason is above")
            self.answer = json.loads(said)
        if "error" in self.answer:
            raise AxiconError(self.answer["error"])
        return self.recipe.model_copy(update=self.answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def look(recipe: LocalServeRecipe) -> dict[str, Any]:
    """What `prepare` changes in the recipe. Raises AxiconError."""
    import torch

    from axicon.generate.build import check_device
    from axicon.model import checkpoint
    from axicon.model.adapterfile import locate, read_adapter

    check_device(recipe.device)
    if recipe.sweeps is not None and not recipe.sweeps.is_dir():
        raise AxiconError(f"sweeps={recipe.sweeps}: there is no such folder; make it, or leave sweeps out")
    recipe.build_compressor()  # a wrong name or setting is found before anything is downloaded
    where = locate(recipe.model, offline=recipe.offline, revision=recipe.revision)
    recipe.build_compressor(checkpoint.packed_formats(where.base))  # refuses one for a model that is packed
    shape = checkpoint.check(where.base, dtype=getattr(torch, recipe.dtype))
    if where.adapter is not None:
        read_adapter(where.adapter, shape)
    name = recipe.served_name or checkpoint.model_id(recipe.model)
    return {"model": str(where.folder), "revision": None, "served_name": name}


def main() -> None:
    recipe = LocalServeRecipe.model_validate_json(sys.argv[1])
    try:
        answer = look(recipe)
    except AxiconError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
