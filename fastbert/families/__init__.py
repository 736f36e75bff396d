"""Families of encoders: where each keeps the parts of a layer, and the few choices in which it differs from BERT.

One file per family. Everything else reads a `Family`: the plan finds the parts by its names, `prepare` makes the
positions that it says, and integrations/ finds transformers' classes. `FAMILIES` has them by transformers' model_type.
"""

from fastbert.families.bert import BERT
from fastbert.families.distilbert import DISTILBERT
from fastbert.families.electra import ELECTRA
from fastbert.families.eurobert import EUROBERT
from fastbert.families.family import Family
from fastbert.families.jina_bert import JINA_BERT
from fastbert.families.modernbert import MODERNBERT
from fastbert.families.mpnet import MPNET
from fastbert.families.names import LayerNames
from fastbert.families.nomic_bert import GTE, JINA_EMBEDDINGS_V3, NOMIC_BERT
from fastbert.families.roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA

__all__ = ["BERT", "FAMILIES", "Family", "LayerNames"]

_ALL = (
    *(BERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, DISTILBERT, ELECTRA, MPNET),
    *(JINA_BERT, NOMIC_BERT, GTE, JINA_EMBEDDINGS_V3, MODERNBERT, EUROBERT),
)
FAMILIES = {family.model_type: family for family in _ALL}
