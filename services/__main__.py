"""`python -m services CONFIG`: the half of `axicon deploy` that runs on the cluster, as a job.

CONFIG is a Serve configuration as JSON. Serve takes code from a URI only. The files of this job have one, so
every application of the configuration gets that, and runs the code that this job runs.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import ray
from ray._private.runtime_env.packaging import pin_runtime_env_uri
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

KEPT_S = 10 * 365 * 86400
"""For as long as a cluster lives. Ray removes the files of a job that has ended ten minutes after their
upload, whatever else runs from them: a node that joins later would not find the code."""


def with_code(config: dict[str, Any], uri: str) -> dict[str, Any]:
    """The configuration with `uri` as the code of every application that names none of its own."""
    applications = [
        application | {"runtime_env": {"working_dir": uri} | (application.get("runtime_env") or {})}
        for application in config["applications"]
    ]
    return config | {"applications": applications}


def main() -> None:
    config = json.loads(sys.argv[1])
    with ray.init(log_to_driver=False) as context:
        uri = ray.get_runtime_context().runtime_env["working_dir"]
        pin_runtime_env_uri(uri, expiration_s=KEPT_S)
        client = ServeSubmissionClient(f"http://{context.dashboard_url}")
        client.deploy_applications(with_code(config, uri))
    names = ", ".join(application["name"] for application in config["applications"])
    print(f"handed to Serve: {names}", flush=True)


if __name__ == "__main__":
    main()
