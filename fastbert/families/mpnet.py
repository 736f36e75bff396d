"""MPNet (Song et al., 2020): a bias for each distance between two tokens, by T5's buckets; no token types."""

from dataclasses import replace

from fastbert.families.names import ClassesNames, EmbeddingNames, LayerNames
from fastbert.families.roberta import ROBERTA

MPNET = replace(
    ROBERTA,
    model_type="mpnet",
    prefix="MPNet",
    attribute="mpnet",
    layer=LayerNames(
        attention="attention.attn",
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        out="attention.attn.o",
        out_norm="attention.LayerNorm",
        up="intermediate.dense",
        down="output.dense",
        norm="output.LayerNorm",
        attention_dropout="attention.attn.dropout",
        out_dropout="attention.dropout",
        dropout="output.dropout",
        activation="intermediate.intermediate_act_fn",
        containers=("attention", "attention.attn", "intermediate", "output"),
    ),
    padding_idx=1,
    distance_table="encoder.relative_attention_bias",
    embeddings=EmbeddingNames(types=None),
    choices=ClassesNames(),
    head_dropouts={"choices": "hidden_dropout_prob", "tokens": "hidden_dropout_prob"},
    defaults={"vocab_size": 30527, "pad_token_id": 1},
    only_known={"relative_attention_num_buckets": 32},
    lacks=frozenset({"embedding_size", "type_vocab_size", "classifier_dropout"}),
    output="BaseModelOutputWithPooling",
    has_cross_attention=False,
)
