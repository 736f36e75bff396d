"""The compiled kernels (csrc/): a module per op checks tensors, then passes pointers, sizes and strides to C++.

It imports without the extension too; `available()` returns why that is missing. The instruction set on CPU is the best
that the processor has, or the one that the environment variable FASTBERT_ISA names.
"""

from fastbert.engine.library import available, cpu_features, has_cuda, isa, isas, real_isas
from fastbert.native.add_layer_norm import add_layer_norm, supports_add_layer_norm
from fastbert.native.add_layer_norm_bwd import add_layer_norm_bwd, add_layer_norm_fwd_train
from fastbert.native.attention import attention, supports_attention
from fastbert.native.attention_bwd import attention_bwd, attention_fwd_train
from fastbert.native.dropout import draw_seed
from fastbert.native.embed_layer_norm import (
    embed_layer_norm,
    embed_layer_norm_bwd,
    supports_embed_layer_norm,
)
from fastbert.native.encode_batch import batch_encoder, encode_batch, supports_encode_batch
from fastbert.native.encoder import encoder, supports_encoder
from fastbert.native.freshness import Checksums, SameObjects, checksums_of
from fastbert.native.linear import linear, supports_linear
from fastbert.native.linear_bwd import activate, gate, gate_bwd, linear_bwd, linear_fwd_train
from fastbert.native.linear_cross_entropy import linear_cross_entropy, supports_linear_cross_entropy
from fastbert.native.packed_weights import packed
from fastbert.native.packing import (
    bounds,
    gather_rows,
    pack_mask,
    read_mask,
    supports_gather_rows,
    supports_pack_mask,
    supports_read_mask,
)
from fastbert.native.peak import peak
from fastbert.native.precision import describe_precision
from fastbert.native.rotary import rotary, rotary_bwd, supports_rotary

__all__ = [
    "Checksums",
    "SameObjects",
    "activate",
    "add_layer_norm",
    "add_layer_norm_bwd",
    "add_layer_norm_fwd_train",
    "attention",
    "attention_bwd",
    "attention_fwd_train",
    "available",
    "batch_encoder",
    "bounds",
    "checksums_of",
    "cpu_features",
    "describe_precision",
    "draw_seed",
    "embed_layer_norm",
    "embed_layer_norm_bwd",
    "encode_batch",
    "encoder",
    "gate",
    "gate_bwd",
    "gather_rows",
    "has_cuda",
    "isa",
    "isas",
    "linear",
    "linear_bwd",
    "linear_cross_entropy",
    "linear_fwd_train",
    "pack_mask",
    "packed",
    "peak",
    "read_mask",
    "real_isas",
    "rotary",
    "rotary_bwd",
    "supports_add_layer_norm",
    "supports_attention",
    "supports_embed_layer_norm",
    "supports_encode_batch",
    "supports_encoder",
    "supports_gather_rows",
    "supports_linear",
    "supports_linear_cross_entropy",
    "supports_pack_mask",
    "supports_read_mask",
    "supports_rotary",
]
