"""Families of encoders: where each keeps the parts of a layer, and the few choices in which it differs from BERT.

One file per family. Everything else reads a `Family`: the plan finds the parts by its names, `prepare` makes the
positions that it says, and integrations/ finds transformers' classes. `FAMILIES` has them by transformers' model_type.
"""

from fastbert.model.families.bert import BERT
from fastbert.model.families.distilbert import DISTILBERT
from fastbert.model.families.electra import ELECTRA
from fastbert.model.families.family import Family, LayerNames
from fastbert.model.families.roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA

__all__ = ["BERT", "FAMILIES", "Family", "LayerNames"]

FAMILIES = {family.model_type: family for family in (BERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, DISTILBERT, ELECTRA)}
