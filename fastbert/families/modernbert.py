"""ModernBERT (Warner et al., 2024), also Ettin, mmBERT and gte-modernbert: norms before, no biases, GeGLU, rotary
positions, and in two layers of three a window of keys."""

from dataclasses import replace

from fastbert.families.family import Family
from fastbert.families.names import ClassesNames, EmbeddingNames, LayerNames, MaskedLMNames

_TOKENS = ClassesNames("head.dense", "classifier", "classifier_activation", ("head",), norm="head.norm", drop="drop")
_TEXT = replace(_TOKENS, pooling="classifier_pooling")

MODERNBERT = Family(
    "modernbert",
    "ModernBert",
    "model",
    layer_list="layers",
    embeddings=EmbeddingNames("embeddings.tok_embeddings", None, None, "embeddings.norm", "embeddings.drop"),
    layer=LayerNames(
        attention="attn",
        head_size="head_dim",
        query="attn.Wqkv",
        key=None,
        value=None,
        out="attn.Wo",
        out_norm="attn_norm",
        up="mlp.Wi",
        down="mlp.Wo",
        norm="mlp_norm",
        attention_dropout=None,
        out_dropout="attn.out_drop",
        dropout=None,
        inner_dropout="mlp.drop",
        activation="mlp.act",
        containers=("attn", "mlp"),
    ),
    activation="hidden_activation",
    gated=True,
    final_norm="final_norm",
    first_norm=False,
    rotary="rotary_emb",
    rope_theta={"full_attention": 160_000.0, "sliding_attention": 10_000.0},
    has_windows=True,
    scaled_init=True,
    attention_bias="attention_bias",
    feed_forward_bias="mlp_bias",
    norm_bias="norm_bias",
    has_pooler=False,
    heads_read_first=True,
    masked_lm=MaskedLMNames(
        "head.dense", "head.norm", "decoder", containers=("head",), activation="classifier_activation"
    ),
    classes=_TEXT,
    choices=_TEXT,
    tokens=_TOKENS,
    answers=_TOKENS,
    head_bias="classifier_bias",
    decoder_bias="decoder_bias",
    head_dropouts={"choices": "classifier_dropout", "tokens": "classifier_dropout", "answers": "classifier_dropout"},
    field_names={
        "hidden_act": "hidden_activation",
        "layer_norm_eps": "norm_eps",
        "attention_probs_dropout_prob": "attention_dropout",
        "hidden_dropout_prob": "mlp_dropout",
    },
    defaults={
        "vocab_size": 50368,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout": 0.0,
        "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-5,
        "pad_token_id": 50283,
        "embedding_dropout": 0.0,
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "classifier_bias": False,
        "classifier_activation": "gelu",
        "decoder_bias": True,
        "classifier_pooling": "cls",
        "local_attention": 128,
    },
    lacks=frozenset({"embedding_size", "type_vocab_size"}),
    output="BaseModelOutput",
    has_cross_attention=False,
)
