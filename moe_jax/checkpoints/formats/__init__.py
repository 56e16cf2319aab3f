"""Quantized checkpoint formats: for each `quant_method`, a reader of `quantization_config`.

A reader returns schemes. The dtype and the companions of each tensor show which weights have which scheme.

scheme.py             schemes and their tensors
codes.py              packed numbers, exponents, blocks of scales
eight_bits.py            eight-bit numbers with scales; four_bit_floats.py, packed_integers.py, nf4.py  four-bit numbers
dequantized.py        the tensors of a checkpoint, dequantized
readers.py            `quantization_config` of each method; modelopt.py, compressed_tensors.py  the longer ones
"""

from moe_jax.checkpoints.formats.dequantized import DequantizedTensors
from moe_jax.checkpoints.formats.eight_bits import EightBits
from moe_jax.checkpoints.formats.readers import FIELD, read_schemes
from moe_jax.checkpoints.formats.scheme import Scheme, Tensors

__all__ = ["FIELD", "DequantizedTensors", "EightBits", "Scheme", "Tensors", "read_schemes"]
