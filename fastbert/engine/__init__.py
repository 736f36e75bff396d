"""The extension without torch: the library, memory for it, packed weights, and what all layers take in one call.

Arrays are addresses, shapes and strides here, so that `native`, over tensors, and `light`, over numpy's arrays, share
it.
"""
