"""BERT (Devlin et al., 2018)."""

from fastbert.model.families.family import Family

BERT = Family("bert", "Bert", "bert")
