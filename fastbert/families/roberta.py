"""RoBERTa (Liu et al., 2019), and XLM-RoBERTa and CamemBERT, which are RoBERTa with other data and tokenizers."""

from dataclasses import replace

from fastbert.families.family import Family

ROBERTA = Family(
    "roberta",
    "Roberta",
    "roberta",
    counts_tokens=True,
    heads_read_first=True,
    defaults={"vocab_size": 50265, "pad_token_id": 1},
)
XLM_ROBERTA = replace(ROBERTA, model_type="xlm-roberta", prefix="XLMRoberta", defaults={"pad_token_id": 1})
CAMEMBERT = replace(XLM_ROBERTA, model_type="camembert", prefix="Camembert")
