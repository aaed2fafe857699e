"""Compression methods, by the name recipes call them."""

from axicon.compress.llm_int8 import LLMInt8
from axicon.protocols import Compressor

COMPRESSORS: dict[str, type[Compressor]] = {
    "llm_int8": LLMInt8,
}
