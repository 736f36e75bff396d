"""Models for inference by numpy, tokenizers, safetensors and the extension alone: torch is never imported.

The results are those of the torch path, bit for bit, in every family and in float32, bfloat16 and int8.
"""

from typing import TYPE_CHECKING

from fastbert.lazy import names_of

if TYPE_CHECKING:
    from fastbert.light.classifiers import CrossEncoder, TextClassifier, TokenClassifier, pipeline
    from fastbert.light.embedder import TextEmbedder

__all__ = ["CrossEncoder", "TextClassifier", "TextEmbedder", "TokenClassifier", "pipeline"]

if not TYPE_CHECKING:
    __getattr__ = names_of(
        __name__,
        {
            **dict.fromkeys(("CrossEncoder", "TextClassifier", "TokenClassifier", "pipeline"), "classifiers"),
            "TextEmbedder": "embedder",
        },
        globals(),
    )
