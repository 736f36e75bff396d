"""DistilBERT (Sanh et al., 2019): BERT without token types, pooler and the dropout after attention."""

from fastbert.families.family import Family
from fastbert.families.names import ClassesNames, EmbeddingNames, LayerNames, MaskedLMNames

DISTILBERT = Family(
    "distilbert",
    "DistilBert",
    "distilbert",
    layer_list="transformer.layer",
    embeddings=EmbeddingNames(types=None),
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
    has_pooler=False,
    heads_read_first=True,
    masked_lm=MaskedLMNames("vocab_transform", "vocab_layer_norm", "vocab_projector"),
    classes=ClassesNames("pre_classifier", activation="relu"),
    choices=ClassesNames("pre_classifier", activation="relu"),
    head_dropouts={"tokens": "hidden_dropout_prob", "answers": "qa_dropout"},
    field_names={
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "classifier_dropout": "seq_classif_dropout",
    },
    defaults={"num_hidden_layers": 6, "classifier_dropout": 0.2},
    lacks=frozenset({"embedding_size", "type_vocab_size", "layer_norm_eps"}),
    output="BaseModelOutput",
    has_cross_attention=False,
)
