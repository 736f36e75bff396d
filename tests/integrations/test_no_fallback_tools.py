"""Tools around an accelerated BERT: sentence-transformers, pipelines, Trainer, PEFT and accelerate stay packed."""

import copy
import gc

import numpy as np
import pytest
import torch
import transformers
from test_known_parts import IDS, MASK, PADDED, fallbacks, make
from tiny_bert import VOCAB

import fastbert

TEXTS = ["the cat sat on the mat .", "a dog ran", "the red cat , the blue dog", "under the mat"]
PAIRS = [("the cat sat", "a dog ran ."), ("a mat", "the red dog sat on the blue mat"), ("cat", "dog")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer, as a folder: one a class of transformers."""

    def saved(name, **changes):
        home = tmp_path_factory.mktemp(name)
        model = make(name, vocab_size=len(VOCAB), **changes)
        model.save_pretrained(home)
        vocabulary = home / "vocab.txt"
        vocabulary.write_text("\n".join(VOCAB) + "\n")
        transformers.BertTokenizerFast(vocab_file=str(vocabulary), model_max_length=40).save_pretrained(home)
        return str(home)

    return saved


def close(a, b):
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b) > 0
        for x, y in zip(a, b, strict=True):
            close(x, y)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            close(a[name], b[name])
    elif isinstance(a, (str, type(None))):
        assert a == b
    else:
        a, b = (x.to_dense() if isinstance(x, torch.Tensor) and x.is_sparse else x for x in (a, b))
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-4, atol=2e-5)


def packed(model):
    """How often a call of its BertModel ran packed so far; none ran the original code."""
    assert "packed, by fastbert" in str(fastbert.explain(model)) and not fallbacks(model)


@pytest.mark.parametrize("way", ["texts", "one text", "prompt", "truncated", "tensors", "tokens", "normalized"])
def test_sentence_transformer_encode(folder, way):
    from sentence_transformers import SentenceTransformer

    options = {
        "prompt": {"prompt": "the red "},
        "truncated": {"truncate_dim": 16},
        "tensors": {"convert_to_tensor": True},
        "tokens": {"output_value": "token_embeddings"},
        "normalized": {"normalize_embeddings": True, "batch_size": 2},
    }.get(way, {})
    home = folder("BertModel")
    original = SentenceTransformer(home, device="cpu")
    fast = fastbert.accelerate(SentenceTransformer(home, device="cpu"))
    texts = TEXTS[0] if way == "one text" else TEXTS
    for _ in range(2):
        close(fast.encode(texts, **options), original.encode(texts, **options))
    packed(fast)


def test_cross_encoder_predict_and_rank(folder):
    from sentence_transformers import CrossEncoder

    home = folder("BertForSequenceClassification", num_labels=1)
    original, fast = (CrossEncoder(home, device="cpu") for _ in range(2))
    fastbert.accelerate(fast)
    close(fast.predict(PAIRS), original.predict(PAIRS))
    a, b = (m.rank("the cat", TEXTS) for m in (fast, original))
    assert [x["corpus_id"] for x in a] == [x["corpus_id"] for x in b]
    packed(fast)


def test_sparse_encoder_encode(folder):
    from sentence_transformers import SparseEncoder

    home = folder("BertForMaskedLM")
    original, fast = (SparseEncoder(home, device="cpu") for _ in range(2))
    fastbert.accelerate(fast)
    for name in ("encode", "encode_query", "encode_document"):
        a, b = (getattr(m, name)(TEXTS) for m in (fast, original))
        close(a, b)
        assert np.count_nonzero(b.to_dense()) > 10
    packed(fast)


@pytest.mark.parametrize("attend", [False, True])
def test_multi_vector_encoder_scores(folder, attend):
    """Late interaction, with queries filled up with mask tokens that may be attended to or not."""
    from sentence_transformers import MultiVectorEncoder

    home = folder("BertModel")
    torch.manual_seed(0)
    original = MultiVectorEncoder(home, device="cpu")
    (transformer,) = (m for m in original.modules() if type(m).__name__ == "Transformer")
    transformer.query_length = 12
    transformer.query_expansion = {"strategy": "fixed", "length": 12, "attend": attend}
    fast = fastbert.accelerate(copy.deepcopy(original))
    vectors = [(m.encode_query(TEXTS), m.encode_document(TEXTS)) for m in (fast, original)]
    close(*vectors)
    assert {len(v) for v in vectors[1][0]} == {12}  # so the expansion is scored
    close(*(m.similarity(*v) for m, v in zip((fast, original), vectors, strict=True)))
    packed(fast)


PIPELINES = {
    "feature-extraction": "BertModel",
    "text-classification": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
    "fill-mask": "BertForMaskedLM",
    "question-answering": "BertForQuestionAnswering",
    "zero-shot-classification": "BertForSequenceClassification",
}


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("task", PIPELINES)
def test_pipelines(folder, task, batch_size):
    if task not in transformers.pipelines.PIPELINE_REGISTRY.get_supported_tasks():
        pytest.skip(f"this transformers has no {task}")
    names = {0: "entailment", 1: "contradiction"}
    home = folder(PIPELINES[task], id2label=names, label2id={v: k for k, v in names.items()})
    original, fast = (transformers.pipeline(task, home, device="cpu", batch_size=batch_size) for _ in range(2))
    fastbert.accelerate(fast)
    if task == "fill-mask":
        given = ([text.replace("the", "[MASK]", 1) for text in (TEXTS[0], TEXTS[2])],)
    elif task == "question-answering":
        given = ({"question": "the cat", "context": TEXTS[0]},)
    elif task == "zero-shot-classification":
        given = (TEXTS, ["cat", "dog"])
    else:
        given = (TEXTS,)
    answers = fast(*given), original(*given)
    if task == "feature-extraction":  # states of pads are zeros
        lengths = [len(fast.tokenizer(text)["input_ids"]) for text in TEXTS]
        answers = [[one[0][:n] for one, n in zip(answer, lengths, strict=True)] for answer in answers]
    elif task == "zero-shot-classification":  # its labels come in the order of scores that may be nearly the same
        answers = [[dict(zip(one["labels"], one["scores"], strict=True)) for one in answer] for answer in answers]
    close(*answers)
    packed(fast.model)


def rows(count):
    lengths = [4 + i % 5 for i in range(count)]
    return [
        {"input_ids": (IDS[i % 3, :length] % len(VOCAB)).tolist(), "attention_mask": [1] * length, "labels": i % 2}
        for i, length in enumerate(lengths)
    ]


def trained(model, home, **changes):
    tokenizer = transformers.BertTokenizerFast.from_pretrained(home)
    arguments = transformers.TrainingArguments(
        f"{home}/out",
        **{"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "optim": "sgd", **changes},
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        seed=3,
    )
    collator = transformers.DataCollatorWithPadding(tokenizer)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows(12), eval_dataset=rows(5), data_collator=collator
    )
    trainer.train()
    scores = trainer.evaluate()
    predicted = trainer.predict(rows(7)).predictions
    return scores["eval_loss"], predicted, {name: p.detach() for name, p in model.named_parameters()}


SETTINGS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "checkpointed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "grouped, smoothed": {"train_sampling_strategy": "group_by_length", "label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_trainer(folder, setting):
    home = folder("BertForSequenceClassification")
    original, fast = (transformers.BertForSequenceClassification.from_pretrained(home) for _ in range(2))
    before = original.bert.encoder.layer[0].output.dense.weight.detach().clone()
    fastbert.accelerate(fast)
    close(*(trained(model, home, **SETTINGS[setting]) for model in (fast, original)))
    assert (original.bert.encoder.layer[0].output.dense.weight - before).abs().max() > 1e-4
    packed(fast)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"bias": "all"}], ids=str)
def test_lora_trained_merged_and_unmerged(options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query", "value", "dense"], r=4, task_type="SEQ_CLS", **options)
    models = []
    for _ in range(2):
        model = peft.get_peft_model(make("BertForSequenceClassification"), config)
        models.append(model.eval())
    original, fast = models[0], fastbert.accelerate(models[1])
    call = {"input_ids": PADDED, "attention_mask": MASK, "labels": torch.tensor([0, 1, 1])}

    def same():
        with torch.no_grad():
            close(*(m(**call).logits for m in (fast, original)))

    for model in (original, fast):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        for _ in range(3):
            model(**call).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    same()
    with torch.no_grad(), original.disable_adapter(), fast.disable_adapter():
        same()
    for change in ("merge_adapter", "unmerge_adapter"):
        for model in (original, fast):
            getattr(model, change)()
        same()
    packed(fast)
    original, fast = (model.merge_and_unload() for model in (original, fast))
    same()
    packed(fast)
    gc.collect()


def test_adapters_added_switched_and_removed_between_calls():
    peft = pytest.importorskip("peft")
    original = make("BertForSequenceClassification")
    fast = fastbert.accelerate(copy.deepcopy(original))
    call = {"input_ids": PADDED, "attention_mask": MASK}

    def same():
        with torch.no_grad():
            a, b = (m(**call).logits for m in (fast, original))
        close(a, b)
        return b

    seen = [same()]
    first = peft.LoraConfig(target_modules=["query"], r=4, init_lora_weights=False)
    second = peft.LoraConfig(target_modules=["value", "dense"], r=2, init_lora_weights=False)
    adapted = []
    for model in (fast, original):
        torch.manual_seed(4)
        model = peft.get_peft_model(model, first, adapter_name="first")
        model.add_adapter("second", second)
        adapted.append(model.eval())
    fast, original = adapted
    seen.append(same())
    for step in (
        lambda m: m.set_adapter("second"),
        lambda m: m.base_model.set_adapter(["first", "second"]),
        lambda m: m.delete_adapter("first"),
    ):
        step(fast), step(original)
        seen.append(same())
    fast, original = (m.unload() for m in (fast, original))
    seen.append(same())
    close(seen[0], seen[-1])
    for i in range(1, 4):
        assert (seen[i] - seen[i - 1]).abs().max() > 1e-3
    packed(fast)


@pytest.mark.parametrize("mixed", [False, True])
def test_accelerator_prepare(mixed):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    weights = []
    for accelerated in (True, False):
        model = make("BertForSequenceClassification")
        inner = fastbert.accelerate(model) if accelerated else model
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16" if mixed else "no")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        loader = torch.utils.data.DataLoader([{"ids": PADDED[i], "mask": MASK[i], "y": i % 2} for i in range(3)], 3)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        model.train()
        for _ in range(2):
            for batch in loader:
                with accelerator.accumulate(model):
                    loss = model(batch["ids"], attention_mask=batch["mask"], labels=batch["y"]).loss
                    accelerator.backward(loss)
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
        weights.append([p.detach().clone() for p in accelerator.unwrap_model(model).parameters()])
        if accelerated:
            packed(inner)
    accelerate.state.AcceleratorState._reset_state(True)
    start = list(make("BertForSequenceClassification").parameters())
    moved = max((a - b).abs().max() for a, b in zip(start, weights[1], strict=True))
    apart = max((a - b).abs().max() for a, b in zip(*weights, strict=True))
    assert moved > 1e-2 and apart < (0.1 if mixed else 1e-4) * moved
