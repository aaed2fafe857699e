"""Compression methods, by the name recipes call them."""

from axicon.compress.awq import AWQ
from axicon.compress.binary_code import BinaryCode
from axicon.compress.gptq import GPTQ
from axicon.compress.group_int4 import GroupInt4
from axicon.compress.llm_int8 import LLMInt8
from axicon.compress.magnitude import Magnitude
from axicon.compress.reconstruct import Reconstruct
from axicon.compress.slice_gpt import SliceGPT
from axicon.compress.smooth_quant import SmoothQuant
from axicon.compress.sparse_gpt import SparseGPT
from axicon.compress.tiled_sparse import TiledSparse
from axicon.compress.wanda import Wanda
from axicon.protocols import Compressor

COMPRESSORS: dict[str, type[Compressor]] = {
    "awq": AWQ,
    "binary_code": BinaryCode,
    "gptq": GPTQ,
    "group_int4": GroupInt4,
    "llm_int8": LLMInt8,
    "magnitude": Magnitude,
    "reconstruct": Reconstruct,
    "slice_gpt": SliceGPT,
    "smooth_quant": SmoothQuant,
    "sparse_gpt": SparseGPT,
    "tiled_sparse": TiledSparse,
    "wanda": Wanda,
}
