"""DistilBERT (Sanh et al., 2019): BERT without token types, pooler and the dropout after attention."""

from fastbert.families.family import Family, LayerNames

DISTILBERT = Family(
    "distilbert",
    "DistilBert",
    "distilbert",
    encoder="transformer",
    layer=LayerNames(
        attention="attention",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        out="attention.out_lin",
        out_norm="sa_layer_norm",
        up="ffn.lin1",
        down="ffn.lin2",
        norm="output_layer_norm",
        attention_dropout="attention.dropout",
        out_dropout=None,
        dropout="ffn.dropout",
        activation="ffn.activation",
        containers=("attention", "ffn"),
    ),
    activation="activation",
    has_token_types=False,
    heads_read_first=True,
    output="BaseModelOutput",
    has_cross_attention=False,
)
