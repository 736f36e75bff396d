"""ELECTRA (Clark et al., 2020): its generator and its small discriminators embed in a width of their own."""

from fastbert.families.family import Family

ELECTRA = Family(
    "electra",
    "Electra",
    "electra",
    projection="embeddings_project",
    has_pooler=False,
    heads_read_first=True,
    defaults={"embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
    lacks=frozenset(),
    output="BaseModelOutputWithPastAndCrossAttentions",
)
