"""Typed recipes: what a run is asked to do, with every setting named and bounded, one class per verb."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field

from axicon.errors import AxiconError
from axicon.settings import (
    Method,
    OptionalMethod,
    Paths,
    Recipe,
    Words,
    named_method,
    named_methods,
    split_words,
)

if TYPE_CHECKING:
    from axicon.model.shape import ModelShape
    from axicon.protocols import Compressor

Dtype = Literal["bfloat16", "float32"]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Digests = Annotated[tuple[Digest, ...], BeforeValidator(split_words)]


class RequestLimits(Recipe):
    """The most one request may ask for, checked before anything is allocated."""

    body_bytes: int = Field(4 * 2**20, ge=1024, description="size of a request body; more is a 413")
    prompts: int = Field(256, ge=1, description="prompts in one request")
    prompt_tokens: int | None = Field(None, ge=1, description="tokens of one prompt; none: all that fit")
    output_tokens: int | None = Field(None, ge=1, description="tokens per choice; none: all that fit")
    n: int = Field(16, ge=1, description="choices of one prompt")
    stops: int = Field(16, ge=0, description="stop strings, and stop token ids")
    stop_chars: int = Field(256, ge=1, description="characters of one stop string")
    logprobs: int = Field(20, ge=0, description="alternatives reported per token")
    logit_bias: int = Field(1024, ge=0, description="entries of logit_bias")


AUTO = Method(method="auto")
SERVED_BY_DEFAULT = Method.model_validate({"method": "llm_int8", "relative": 5.0})
"""What `auto` means for bfloat16 where the C++ kernels run. The paper's threshold of 6 alone loses 2 % of
perplexity on the embedded model, outliers from 5 root mean squares on 0.5 %, at the same speed
(docs/results.md)."""


class ModelRecipe(Recipe):
    """Which model, and what it becomes before it is used."""

    model: str = Field("demo", min_length=1, description="demo, a model directory, a .gguf file, or a hub id")
    revision: str | None = Field(None, description="commit or tag of a hub id; none: its main branch")
    offline: bool | None = Field(None, description="never ask the hub; none: as HF_HUB_OFFLINE says")
    dtype: Dtype = Field("bfloat16", description="numbers the model computes in")
    compressor: OptionalMethod = Field(
        AUTO, description="applied after loading: auto is int8 if kernels run it, none is nothing"
    )
    threads: int | None = Field(None, ge=1, le=1024, description="compute threads; none: one per core")

    def build_compressor(
        self, packed: Sequence[str] = (), shape: ModelShape | None = None
    ) -> Compressor | None:
        """What to do to the model after loading.

        `packed` are the formats it is stored in, if it was compressed before: then there is nothing to do.
        `shape` is the model's, where it is known: what the C++ kernels do not run is nothing for auto.
        Raises AxiconError for a method named nevertheless, and for one that needs data.
        """
        from axicon.compress import COMPRESSORS
        from axicon.kernels import native
        from axicon.model.native import why_not_shape

        method = self.compressor
        if packed and method is not None and method != AUTO:
            raise AxiconError(
                f"compressor={method.method}: {self.model} is compressed already ({', '.join(packed)}); "
                "leave compressor out, or name the dense model it was made from"
            )
        if packed:
            return None
        if method == AUTO:
            # In torch, int8 is slower than bfloat16 (0.6 of it, measured): only the kernels make it pay.
            fast = self.dtype == "bfloat16" and native.why_unavailable() is None
            fast = fast and (shape is None or why_not_shape(shape) is None)
            method = SERVED_BY_DEFAULT if fast else None
        if method is None:
            return None
        compressor = method.build(COMPRESSORS, "compressor")
        if compressor.needs_inputs:
            raise AxiconError(
                f"compressor={method.method} looks at data, which is done once: "
                f"axicon compress {method.method} model={self.model} out=DIR, then name DIR"
            )
        return compressor


class KVRecipe(Recipe):
    """What a request's cache keeps that does not say otherwise."""

    policy: Literal["full", "h2o", "key_norm", "snapkv", "tova", "window"] = Field(
        "full", description="of requests that name none; full keeps everything"
    )
    budget: float = Field(0.2, gt=0, description="slots kept per head: up to 1 a share of the prompt")
    recent: float | None = Field(None, ge=0, description="newest among them; none: as the policy does")
    sinks: int = Field(4, ge=0, le=64, description="first ones among them")
    evict_every: int = Field(16, ge=1, le=256, description="tokens from one eviction to the next")
    score: Literal["sum", "mean", "decay"] | None = Field(
        None, description="how h2o adds up attention; none: sum"
    )


class SpeculationRecipe(Recipe):
    """How tokens of a request are guessed ahead that does not say otherwise."""

    method: Literal["none", "chain", "k_seq", "lookup", "multi_round", "rsd_c", "rsd_s"] = Field(
        "none", description="of requests that name none; lookup needs no draft model"
    )
    width: int | None = Field(None, ge=1, description="of its trees; none: as the method does")
    depth: int | None = Field(None, ge=1, description="of its trees; none: as the method does")
    verify: Literal["rrs", "coupled"] | None = Field(
        None, description="how guesses are checked; none: coupled for requests with a seed"
    )


class AdaptersRecipe(Recipe):
    """Adapters that join a running server."""

    folder: Annotated[Path, AfterValidator(Path.absolute)] | None = Field(
        None, description="folder of adapters that may join by /v1/load_lora_adapter; none: none may"
    )
    most: int = Field(16, ge=1, le=1024, description="adapters at once")
    rank: int = Field(64, ge=1, le=256, description="largest rank of one")
    follow_s: float = Field(2, gt=0, description="from one look at the log of a run to the next")


class ServeRecipe(ModelRecipe):
    """What one endpoint serves; the argument of `services.app:build`."""

    served_name: str | None = Field(None, min_length=1, description="name clients use; none: the model's own")
    kv_gib: float | None = Field(None, gt=0, description="memory for keys and values; none: by what is free")
    kv: KVRecipe = Field(KVRecipe(), description="cache policy of requests that name none")
    kv_floor: int = Field(32, ge=1, description="smallest cache budget of a request, in slots")
    prefix_cache: float = Field(
        0.5, ge=0, le=1, description="share of the KV cache that may hold beginnings of earlier prompts"
    )
    max_rows: int = Field(64, ge=1, le=1024, description="choices generated at the same time")
    prefill_chunk: int = Field(256, ge=16, le=8192, description="prompt tokens computed per step")
    max_queue: int = Field(256, ge=0, description="choices that may wait; more is a 429")
    max_model_len: int | None = Field(None, ge=2, description="prompt plus output; none: all the model knows")
    draft: str | None = Field(
        None, description="model that guesses ahead: skip:20 is this one with 20 blocks; or a model"
    )
    speculation: Annotated[SpeculationRecipe, BeforeValidator(named_method)] = Field(
        SpeculationRecipe(), description="how tokens of requests are guessed ahead that name no way"
    )
    draft_nodes: int = Field(64, ge=1, le=1024, description="guessed tokens of one request checked at once")
    device: Literal["cpu", "cuda"] = Field("cpu", description="where model and cache lie")
    limits: RequestLimits = Field(RequestLimits(), description="the most one request may ask for")
    request_timeout_s: float = Field(600, gt=0, description="a request that takes longer is ended")
    stall_s: float = Field(30, gt=0, description="/health fails when work waits this long without a step")
    api_keys_env: str | None = Field(None, min_length=1, description="variable with API keys, comma between")
    api_key_hashes: Digests = Field((), description="SHA-256 digests of API keys, in hex")
    adapters: AdaptersRecipe = Field(AdaptersRecipe(), description="adapters chosen by a request's model")
    admin_keys_env: str | None = Field(
        None, min_length=1, description="variable with keys that may also load and unload adapters"
    )
    admin_key_hashes: Digests = Field((), description="SHA-256 digests of those keys, in hex")
    allowed_hosts: Words = Field((), description="without keys: host names to answer to beside loopback ones")
    sweeps: Annotated[Path, AfterValidator(Path.absolute)] | None = Field(
        None, description="folder of sweeps to show at /sweeps; none: there is no such page"
    )

    def build_compressor(
        self, packed: Sequence[str] = (), shape: ModelShape | None = None
    ) -> Compressor | None:
        """On a GPU auto is nothing: its int8 has outliers relative to their row, found on a CPU alone."""
        if self.device == "cuda" and self.compressor == AUTO:
            return None
        return super().build_compressor(packed, shape)

    def api_key_digests(self) -> tuple[bytes, ...]:
        """SHA-256 digests of the keys accepted. Raises AxiconError if asked-for keys are missing."""
        return _key_digests("api_keys_env", self.api_keys_env, self.api_key_hashes)

    def admin_key_digests(self) -> tuple[bytes, ...]:
        """The same of the keys that may change what is served."""
        digests = _key_digests("admin_keys_env", self.admin_keys_env, self.admin_key_hashes)
        if self.adapters.folder is not None and not digests:
            raise AxiconError(
                f"adapters.folder={self.adapters.folder}: only a key may load adapters; name a variable that "
                "holds one with admin_keys_env"
            )
        return digests


def _key_digests(setting: str, variable: str | None, hashes: Sequence[str]) -> tuple[bytes, ...]:
    digests = [bytes.fromhex(text) for text in hashes]
    if variable is not None:
        keys = split_words(os.environ.get(variable, ""))
        if not keys:
            raise AxiconError(
                f"{setting}={variable}: this environment variable holds no key; "
                f"set it, for example to $(openssl rand -hex 24), or leave {setting} out"
            )
        digests += [hashlib.sha256(key.encode()).digest() for key in keys]
    return tuple(digests)


class LocalServeRecipe(ServeRecipe):
    """`axicon serve`: an endpoint, and where on this machine it answers."""

    host: str = Field("127.0.0.1", min_length=1, description="where to listen; beyond loopback with keys")
    port: int = Field(8000, ge=1, le=65535, description="port to listen on")
    cluster: Path | None = Field(None, description="cluster.yaml that describes the local node")
    dashboard_port: int | None = Field(
        None, ge=1, le=65535, description="run Ray's dashboard, which `ray job submit` needs, on this port"
    )
    ready_s: float = Field(600, gt=0, description="give up when the model does not answer within this time")

    def app_args(self) -> dict[str, Any]:
        """The part that `services.app:build` takes, as plain data."""
        return self.model_dump(mode="json", include=set(ServeRecipe.model_fields))


class CalibrationRecipe(Recipe):
    """The sample that a method looks at which needs data. It changes the result; `activations`, `shared` and
    `shared_gib` do not."""

    text: str | None = Field(None, description="text file or hub data set; none: the model writes one itself")
    column: str = Field("text", description="the field that holds the text of a record")
    windows: int = Field(32, ge=1, description="windows of the sample")
    window: int = Field(512, ge=2, description="tokens per window of the sample")
    seed: int = Field(0, ge=0, description="of which windows of the text, or of what the model writes")
    inputs: Literal["sequential", "dense"] = Field(
        "sequential", description="what a block is shown: output of compressed blocks, or of the dense model"
    )
    activations: Literal["auto", "memory", "disk"] = Field(
        "auto", description="where hidden states lie between blocks; auto: memory if they take half of it"
    )
    shared: Path | None = Field(
        None, description="folder in which runs find each other's statistics of the sample; none: no sharing"
    )
    shared_gib: float = Field(20, gt=0, description="the most that may lie there; unused sets go first")


class CompressRecipe(ModelRecipe):
    """How a model is made smaller, where the result lies, and what is measured of it."""

    compressor: Annotated[Method, BeforeValidator(named_method)] = Field(
        SERVED_BY_DEFAULT, description="the method; its settings beside it, as compressor.NAME"
    )
    chain: Annotated[tuple[Method, ...], BeforeValidator(named_methods)] = Field(
        (), description="in place of compressor: several methods in order, applied block by block"
    )
    calibration: CalibrationRecipe = Field(CalibrationRecipe(), description="sample, for methods with data")
    out: Path | None = Field(None, description="directory to make; none: artifacts/models/MODEL-METHOD")
    measure: bool = Field(
        True, description="false: no speed, memory, greedy texts, activations; `axicon card` can later"
    )
    text: str | None = Field(None, description="perplexity before and after on this text or hub data set")
    column: str = Field("text", description="the field that holds the text of a record")
    window: int = Field(2048, ge=2, description="tokens per perplexity window")
    windows: int | None = Field(None, ge=1, description="only the first so many windows; none: all")

    def as_yaml(self) -> str:
        """Without the method that a chain stands in place of."""
        aside = {"compressor"} if self.chain else None
        return yaml.safe_dump(self.model_dump(mode="json", exclude=aside), sort_keys=False)


class EvaluateRecipe(ModelRecipe):
    """What to measure of a model: perplexity on a text, tasks of lm-eval, speed, or several of them."""

    compressor: OptionalMethod = Field(None, description="applied after loading, such as llm_int8")
    text: str | None = Field(None, description="perplexity on this text file or hub data set")
    column: str = Field("text", description="the field that holds the text of a record")
    window: int = Field(2048, ge=2, description="tokens per perplexity window")
    windows: int | None = Field(None, ge=1, description="only the first so many windows; none: all")
    tasks: Words = Field((), description="lm-eval task names, comma between")
    data: Path | None = Field(None, description="folder with the data files of the tasks shipped with axicon")
    include: Paths = Field((), description="folders with further lm-eval task files")
    num_fewshot: int | None = Field(None, ge=0, description="examples shown; none: as the task says")
    speed: bool = Field(False, description="true: also tokens/s at 1 and 8 streams, in bfloat16")
    limit: int | None = Field(None, ge=1, description="only the first so many questions of a task; none: all")
    batch: int = Field(1, ge=1, description="perplexity windows per pass; changes speed and memory only")
    seed: int = Field(1234, ge=0, description="of few-shot choice")
    out: Path | None = Field(None, description="folder for results; none: artifacts/evaluate")
