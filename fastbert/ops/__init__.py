"""The ops of an encoder on packed tensors, the encoder and a padded batch as a whole, and packing itself."""

from fastbert.native.dropout import mask_rows
from fastbert.native.extension import mode_reason, pointer_reason
from fastbert.native.freshness import Checksums, SameObjects, checksums_of
from fastbert.native.packing import bounds
from fastbert.ops.add_layer_norm import add_layer_norm
from fastbert.ops.attention import attention
from fastbert.ops.attention.triton import shared_schedules
from fastbert.ops.embed_layer_norm import embed_layer_norm
from fastbert.ops.encode_batch import BatchWeights, encode_batch
from fastbert.ops.encoder import EncoderWeights, LayerWeights, encoder, release
from fastbert.ops.feed_forward import feed_forward
from fastbert.ops.gate import gate
from fastbert.ops.linear import linear
from fastbert.ops.linear_cross_entropy import linear_cross_entropy
from fastbert.ops.packing import gather_rows, pack_mask, read_mask
from fastbert.ops.rotary import rotary
from fastbert.weight import Weight

__all__ = [
    "BatchWeights",
    "Checksums",
    "EncoderWeights",
    "LayerWeights",
    "SameObjects",
    "Weight",
    "add_layer_norm",
    "attention",
    "bounds",
    "checksums_of",
    "embed_layer_norm",
    "encode_batch",
    "encoder",
    "feed_forward",
    "gate",
    "gather_rows",
    "linear",
    "linear_cross_entropy",
    "mask_rows",
    "mode_reason",
    "pack_mask",
    "pointer_reason",
    "read_mask",
    "release",
    "rotary",
    "shared_schedules",
]
