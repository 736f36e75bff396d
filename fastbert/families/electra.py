"""ELECTRA (Clark et al., 2020): its generator and its small discriminators embed in a width of their own."""

from fastbert.families.family import Family
from fastbert.families.names import ClassesNames, MaskedLMNames

ELECTRA = Family(
    "electra",
    "Electra",
    "electra",
    projection="embeddings_project",
    has_pooler=False,
    heads_read_first=True,
    masked_lm=MaskedLMNames(
        "generator_predictions.dense",
        "generator_predictions.LayerNorm",
        "generator_lm_head",
        containers=("generator_predictions",),
        activation="gelu",
    ),
    classes=ClassesNames("classifier.dense", "classifier.out_proj", "gelu", ("classifier",), drops_first=True),
    choices=ClassesNames("sequence_summary.summary", activation="gelu", containers=("sequence_summary",)),
    head_dropouts={"choices": "summary_last_dropout"},
    defaults={"embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
    only_known={"summary_type": "first", "summary_use_proj": True, "summary_activation": "gelu"},
    lacks=frozenset(),
    output="BaseModelOutputWithPastAndCrossAttentions",
)
