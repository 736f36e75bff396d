"""JinaBERT v2 (Günther et al., 2023), of jina-embeddings-v2: BERT with a bias for distance (ALiBi: Press et al., 2022),
the same both ways, in place of positions, and GeGLU. Its config.json says model_type "bert"."""

from dataclasses import replace

from fastbert.families.family import Family
from fastbert.families.names import BERT_LAYER, EmbeddingNames

JINA_BERT = Family(
    "jina_bert",
    "JinaBert",
    "bert",
    stored_type="bert",
    embeddings=EmbeddingNames(positions=None),
    layer=replace(
        BERT_LAYER,
        up="mlp.gated_layers",
        down="mlp.wo",
        norm="mlp.layernorm",
        inner_dropout="mlp.dropout",
        dropout=None,
        activation="mlp.act",
        containers=("attention", "attention.self", "attention.output", "mlp"),
    ),
    gated=True,
    alibi=True,
    feed_forward_bias=False,
    out_bias=True,
    choices=None,
    defaults={"max_position_embeddings": 8192},
    only_known={"feed_forward_type": "geglu", "use_qk_norm": False},
    has_cross_attention=False,
)
