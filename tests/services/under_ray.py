"""A program for `test_serve_ray.py`: the application under a Ray of its own, as long as its standard input is
open.

Arguments: port, recipe as JSON. Says `ready` when Serve reports the application as running.
"""

from __future__ import annotations

import sys

from axicon.recipe import ServeRecipe
from jobs import cluster, cluster_file


def main() -> None:
    port, recipe = int(sys.argv[1]), ServeRecipe.model_validate_json(sys.argv[2])
    with cluster.local_ray(cluster_file.read().metadata):
        from ray import serve

        from services.app import build

        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(recipe), name="generate", route_prefix="/")
        print("ready", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
