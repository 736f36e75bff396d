"""BERT (Devlin et al., 2018)."""

from fastbert.families.family import Family

BERT = Family("bert", "Bert", "bert")
