"""transformers' common model tests on BERT: their mixin comes from its source package, the sizes and inputs from here.

The source package has the common tests (tests/test_modeling_common.py) and no folder tests/models, so this file is
copied to where tests/models/bert/test_modeling_bert.py would be, and imports what is two folders above.
"""

import inspect
import unittest

import torch
import transformers
from transformers.models.auto import get_values
from transformers.models.auto.modeling_auto import MODEL_FOR_PRETRAINING_MAPPING

from ...test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask

HEADS = [*sorted(name for name in dir(transformers) if name.startswith("BertFor")), "BertLMHeadModel", "BertModel"]


class BertSizes:
    """What the common tests ask of a model's tester: its sizes, a config, and inputs."""

    batch_size, seq_length, num_choices, num_labels = 13, 7, 4, 3
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99
    is_training = True

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return transformers.BertConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            hidden_act="gelu",
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
            max_position_embeddings=512,
            type_vocab_size=16,
            is_decoder=False,
            initializer_range=0.02,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        inputs = {
            # Without 0, the pad token's: where the mask leaves it out, it is a pad, whose states are zeros by contract.
            "input_ids": ids_tensor(shape, self.vocab_size - 1) + 1,
            "token_type_ids": ids_tensor(shape, 16),
            "attention_mask": random_attention_mask(shape),
        }
        return self.get_config(), inputs


class BertModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = tuple(getattr(transformers, name) for name in HEADS)

    def setUp(self):
        self.model_tester = BertSizes(self)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class in get_values(MODEL_FOR_PRETRAINING_MAPPING):
            rows, length = self.model_tester.batch_size, self.model_tester.seq_length
            inputs["labels"] = torch.zeros((rows, length), dtype=torch.long)
            inputs["next_sentence_label"] = torch.zeros(rows, dtype=torch.long)
        return inputs

    def test_every_class_takes_the_inputs(self):
        """The sizes above suit every class: a forward pass of each, with labels, has a loss."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for kind in self.all_model_classes:
            model = kind(config).eval()
            labelled = "labels" in inspect.signature(kind.forward).parameters
            given = self._prepare_for_class(inputs, kind, return_labels=labelled)
            with torch.no_grad():
                first = model(**given)[0]
            self.assertTrue(bool(torch.isfinite(first).all()), kind.__name__)
