"""NomicBERT (Nussbaum et al., 2024), also of arctic-embed-m-long; and two that share most of it: GTE (Zhang et al.,
2024) and JinaEmbeddingsV3 (Sturua et al., 2024). Rotary positions, norms after, SwiGLU or GeGLU."""

from dataclasses import replace

from fastbert.families.family import Family
from fastbert.families.names import ClassesNames, EmbeddingNames, LayerNames, MaskedLMNames

_QKV = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"

NOMIC_BERT = Family(
    "nomic_bert",
    "NomicBert",
    "nomic_bert",
    layer_list="layers",
    embeddings=EmbeddingNames(positions=None),
    layer=LayerNames(
        attention="self_attn",
        head_size="head_dim",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        out="self_attn.o_proj",
        out_norm="post_attention_layernorm",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        down="mlp.down_proj",
        norm="post_mlp_layernorm",
        attention_dropout=None,
        out_dropout="post_attention_dropout",
        dropout="post_mlp_dropout",
        activation="mlp.act_fn",
        containers=("self_attn", "mlp"),
    ),
    gated=True,
    rotary="rotary_emb",
    attention_bias=False,
    feed_forward_bias=False,
    pools_alone=False,
    stored_names=(
        ("encoder.layers", "layers"),
        ("emb_ln", "embeddings.LayerNorm"),
        ("attn.out_proj", "self_attn.o_proj"),
        ("mlp.fc11", "mlp.up_proj"),
        ("mlp.fc12", "mlp.gate_proj"),
        ("mlp.fc2", "mlp.down_proj"),
        ("norm1", "post_attention_layernorm"),
        ("norm2", "post_mlp_layernorm"),
    ),
    stored_together=(("attn.Wqkv", _QKV),),
    masked_lm=MaskedLMNames(
        "cls.predictions.transform.dense",
        "cls.predictions.transform.layer_norm",
        "cls.predictions.decoder",
        "cls.predictions.bias",
        ("cls", "cls.predictions", "cls.predictions.transform"),
    ),
    choices=None,
    answers=None,
    defaults={
        "vocab_size": 30528,
        "hidden_act": "silu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 2048,
    },
    rope_theta={"": 1000.0},
    unwritten=frozenset({"tie_word_embeddings"}),
    output="BaseModelOutputWithPooling",
    has_cross_attention=False,
)
GTE = replace(
    NOMIC_BERT,
    model_type="gte",
    prefix="Gte",
    attribute="gte",
    layer=replace(NOMIC_BERT.layer, inner_dropout="mlp.dropout"),
    attention_bias=True,
    out_bias=True,
    stored_names=(
        ("encoder.layer", "layers"),
        ("attention.o_proj", "self_attn.o_proj"),
        ("attn_ln", "post_attention_layernorm"),
        ("mlp_ln", "post_mlp_layernorm"),
        ("lm_head.norm", "lm_head.layer_norm"),
    ),
    stored_together=(
        ("attention.qkv_proj", _QKV),
        ("mlp.up_gate_proj", ("mlp.up_proj", "mlp.gate_proj")),
    ),
    older_attributes=("new",),
    unwritten=frozenset(),
    masked_lm=MaskedLMNames(
        "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", containers=("lm_head",), activation="gelu"
    ),
    defaults={
        "vocab_size": 250048,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 8192,
        "type_vocab_size": 1,
        "pad_token_id": 1,
    },
    rope_theta={"": 160_000.0},
)
JINA_EMBEDDINGS_V3 = replace(
    NOMIC_BERT,
    model_type="jina_embeddings_v3",
    prefix="JinaEmbeddingsV3",
    attribute="roberta",
    layer=replace(NOMIC_BERT.layer, gate=None, up="mlp.fc1", down="mlp.fc2", activation="mlp.activation_fn"),
    gated=False,
    attention_bias=True,
    feed_forward_bias=True,
    pools_alone=True,
    heads_read_first=True,
    unwritten=frozenset(),
    stored_names=(
        ("encoder.layers", "layers"),
        ("emb_ln", "embeddings.LayerNorm"),
        ("mixer.out_proj", "self_attn.o_proj"),
        ("norm1", "post_attention_layernorm"),
        ("norm2", "post_mlp_layernorm"),
    ),
    stored_together=(("mixer.Wqkv", _QKV),),
    masked_lm=MaskedLMNames(
        "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias", ("lm_head",), activation="gelu"
    ),
    classes=ClassesNames("classifier.dense", "classifier.out_proj", "tanh", ("classifier",), drops_first=True),
    answers=ClassesNames(out="qa_outputs"),
    defaults={
        "vocab_size": 250002,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 8194,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "pad_token_id": 1,
    },
    rope_theta={"": 20_000.0},
)
