"""RoBERTa (Liu et al., 2019), and XLM-RoBERTa and CamemBERT, which are RoBERTa with other data and tokenizers."""

from dataclasses import replace

from fastbert.families.family import Family
from fastbert.families.names import ClassesNames, MaskedLMNames

ROBERTA = Family(
    "roberta",
    "Roberta",
    "roberta",
    counts_tokens=True,
    heads_read_first=True,
    masked_lm=MaskedLMNames(
        "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias", ("lm_head",), activation="gelu"
    ),
    classes=ClassesNames("classifier.dense", "classifier.out_proj", "tanh", ("classifier",), drops_first=True),
    head_dropouts={"choices": "hidden_dropout_prob"},
    defaults={"vocab_size": 50265, "pad_token_id": 1},
)
XLM_ROBERTA = replace(ROBERTA, model_type="xlm-roberta", prefix="XLMRoberta", defaults={"pad_token_id": 1})
CAMEMBERT = replace(XLM_ROBERTA, model_type="camembert", prefix="Camembert")
