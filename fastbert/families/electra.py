"""ELECTRA (Clark et al., 2020): its generator and its small discriminators embed in a width of their own."""

from fastbert.families.family import Family

ELECTRA = Family(
    "electra",
    "Electra",
    "electra",
    projection="embeddings_project",
    heads_read_first=True,
    output="BaseModelOutputWithPastAndCrossAttentions",
)
