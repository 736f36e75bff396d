"""Every family in sentence-transformers, pipelines, PEFT and Trainer: packed, with the numbers of transformers."""

import copy

import numpy as np
import pytest
import torch
import transformers
from made_tokenizers import mpnet, roberta, xlm_roberta
from test_families_live import CONFIGS, FAMILIES, fallbacks, make
from test_no_fallback_tools import PAIRS, TEXTS, close
from tiny_bert import VOCAB

import fastbert

NAMES = [name for name in CONFIGS if " " not in name]
TOKENIZERS = {"roberta": roberta, "xlm-roberta": xlm_roberta, "camembert": xlm_roberta, "mpnet": mpnet}


def tokenizer_of(name):
    if name in TOKENIZERS:
        return TOKENIZERS[name]()
    kind = transformers.DistilBertTokenizer if name == "distilbert" else transformers.BertTokenizer
    return kind(vocab={token: i for i, token in enumerate(VOCAB)}, model_max_length=32)


@pytest.fixture
def folder(tmp_path):
    def save(name, head="Model", **changes):
        tokenizer = tokenizer_of(name)
        tokenizer.model_max_length = 32
        make(name, head, vocab_size=len(tokenizer), **changes).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return str(tmp_path)

    return save


def twins_of(load, home, **options):
    original, fast = (load(home, device="cpu", **options) for _ in range(2))
    return fastbert.accelerate(fast), original


def packed(model):
    assert "packed, by fastbert" in str(fastbert.explain(model)) and not fallbacks(model)


@pytest.mark.parametrize("name", NAMES)
def test_sentence_transformer(name, folder):
    from sentence_transformers import SentenceTransformer

    fast, original = twins_of(SentenceTransformer, folder(name))
    for options in ({}, {"normalize_embeddings": True, "batch_size": 2}):
        close(fast.encode(TEXTS, **options), original.encode(TEXTS, **options))
    packed(fast)


@pytest.mark.parametrize("name", NAMES)
def test_cross_encoder(name, folder):
    from sentence_transformers import CrossEncoder

    two = {"type_vocab_size": 2} if name in ("gte", "jina_embeddings_v3") else {}  # of the tokenizer here
    fast, original = twins_of(CrossEncoder, folder(name, "ForSequenceClassification", num_labels=1, **two))
    close(fast.predict(PAIRS), original.predict(PAIRS))
    packed(fast)


@pytest.mark.parametrize("name", NAMES)
def test_sparse_encoder(name, folder):
    from sentence_transformers import SparseEncoder

    fast, original = twins_of(SparseEncoder, folder(name, "ForMaskedLM"))
    a, b = (model.encode(TEXTS) for model in (fast, original))
    close(a, b)
    assert np.count_nonzero(b.to_dense()) > 10
    packed(fast)


@pytest.mark.parametrize("name", NAMES)
def test_multi_vector_encoder(name, folder):
    from sentence_transformers import MultiVectorEncoder

    original = MultiVectorEncoder(folder(name), device="cpu")
    fast = fastbert.accelerate(copy.deepcopy(original))  # its projection is random
    close(*((m.encode_query(TEXTS), m.encode_document(TEXTS)) for m in (fast, original)))
    packed(fast)


TASKS = {
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "fill-mask": "ForMaskedLM",
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", NAMES)
def test_pipelines(name, task, folder):
    home = folder(name, TASKS[task])
    original, fast = (transformers.pipeline(task, home, device="cpu", batch_size=2) for _ in range(2))
    fastbert.accelerate(fast)
    texts = TEXTS
    if task == "fill-mask":
        texts = [text.replace("the", fast.tokenizer.mask_token, 1) for text in (TEXTS[0], TEXTS[2])]
    close(fast(texts), original(texts))
    packed(fast.model)


@pytest.mark.parametrize("name", NAMES)
def test_lora(name, folder):
    from peft import LoraConfig, get_peft_model

    family, models = FAMILIES[name], []
    home = folder(name, "ForSequenceClassification")
    targets = [path.rpartition(".")[2] for path in family.layer.qkv[::2]]
    inputs = tokenizer_of(name)(TEXTS, padding=True, return_tensors="pt")
    for _ in range(2):
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(home)
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="SEQ_CLS")
        models.append(get_peft_model(model, config).eval())
    fastbert.accelerate(models[0])
    found = []
    for model in models:
        loss = model(**inputs, labels=torch.tensor([0, 1, 0, 1])).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[1]) > 8
    close(*found)
    packed(models[0])


@pytest.mark.parametrize("name", ["roberta", "mpnet", "nomic_bert", "modernbert", "eurobert"])  # one of each layer
def test_trainer(name, folder, tmp_path):
    home, outcomes = folder(name, "ForSequenceClassification"), []
    tokenizer = tokenizer_of(name)
    rows = [{**tokenizer(text), "labels": i % 2} for i, text in enumerate(TEXTS * 3)]
    for accelerated in (True, False):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(home)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if accelerated:
            fast = fastbert.accelerate(model)
        arguments = transformers.TrainingArguments(
            str(tmp_path / "out"),
            **{"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "optim": "sgd", "seed": 3},
            **{"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"},
        )
        collator = transformers.DataCollatorWithPadding(tokenizer)
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator)
        trainer.train()
        outcomes.append((trainer.evaluate()["eval_loss"], {k: p.detach() for k, p in model.named_parameters()}))
    close(*outcomes)
    packed(fast)
