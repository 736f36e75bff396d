"""The heads: transformers' classes, arguments, losses and output fields, computed on real tokens only.

Labels at pads are ignored. Label a real token -100 to exclude it from the loss.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import ops
from fastbert.config import BertConfig, family_of
from fastbert.families import FAMILIES
from fastbert.families.names import ClassesNames
from fastbert.model.bert import BertModel, EncoderModel, first_states, pool, run_bert
from fastbert.model.encoder import Encoded, runs_by_pointers
from fastbert.model.head_steps import Head, Steps, split_path
from fastbert.model.inputs import Inputs, check_ids
from fastbert.model.modules import Part, norm, place
from fastbert.model.outputs import (
    BertForPreTrainingOutput,
    HeadOutput,
    Output,
    QuestionAnsweringModelOutput,
    returned,
)
from fastbert.model.plan import project
from fastbert.model.pretrained import BertPreTrainedModel

IGNORE = -100
FIRST = ("cls", "bos")  # poolings that read the first token alone


class HeadModel(BertPreTrainedModel):
    """The base of the models with a head: an encoder, named as its family has it (`bert`), and the head.

    Every forward takes, in addition to its own arguments, BertModel's options: output_attentions,
    output_hidden_states, return_dict, and cu_seqlens and max_seqlen for packed input.
    """

    model_types = tuple(FAMILIES)
    has_pooler = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.family = family_of(config.model_type)
        kind = BertModel if config.model_type in BertModel.model_types else EncoderModel
        self.add_module(self.family.attribute, kind(config, add_pooling_layer=self._pools()))

    def _pools(self) -> bool:
        """True if the encoder has a pooler, in a family with one."""
        return self.has_pooler

    def _run(
        self, *inputs: Any, encoded: tuple[Inputs, Encoded] | None = None, **options: Any
    ) -> tuple[Inputs, Encoded]:
        """The encoder's output; or `encoded`, that of another model's equal encoder."""
        if encoded is not None:
            return encoded[0], replace(encoded[1], shared=True)
        return run_bert(self.base_model, self.config, *inputs, precision=self.matmul_precision, **options)

    def _pool(self, inputs: Inputs, encoded: Encoded) -> Tensor:
        if encoded.shared:
            return project(self.base_model.pooler.dense, first_states(inputs, encoded), "tanh")
        return pool(inputs, encoded)

    def _output(
        self,
        kind: type[Output],
        encoded: Encoded,
        return_dict: bool | None,
        **fields: Any,
    ) -> Output:
        fields |= {"hidden_states": encoded.hidden_states, "attentions": encoded.attentions}
        return returned(kind(**fields), self.config, return_dict)


class MaskedLMHead(Head):
    """The masked-language-model head of a model: a transform, if its family has one, and a decoder, whose weight may be
    the word table's."""

    def __init__(self, model: HeadModel) -> None:
        names, config = model.family.masked_lm, model.config
        outer, decoder = split_path(names.decoder)
        first: tuple[str, Steps] = (outer, ())
        if names.dense is not None and names.norm is not None:
            (inner, dense), (_, norm) = split_path(names.dense), split_path(names.norm)
            activation = config.hidden_act if names.activation is None else config.activation_of(names.activation)
            first = (inner, ((dense, activation), (norm, None)))
        super().__init__(model, first, (outer, ((decoder, None),)))
        self.path = names.decoder

    @property
    def decoder(self) -> Any:
        return self.model.get_submodule(self.path)

    def transform(self, x: Tensor) -> Tensor:
        """(T, E) to the width of the word table."""
        return self.run_first(x)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """The mean cross entropy at labelled tokens, (T, E), (T,) -> (), without their logits."""
        return ops.linear_cross_entropy(self.transform(x), self.decoder.weight, self.decoder.bias, labels)


class _LanguageModel(HeadModel):
    """The base of the models with a masked-language-model head."""

    def _place_predictions(self) -> None:
        names, config = self.family.masked_lm, self.config
        width = config.embedding_size or config.hidden_size
        MaskedLMHead(self).place(names.containers)
        if names.dense is not None and names.norm is not None:
            place(self, names.dense, nn.Linear(config.hidden_size, width, bias=config.has(self.family.head_bias)))
            place(self, names.norm, norm(config, self.family, width))
        place(self, names.decoder, nn.Linear(width, config.vocab_size, bias=config.has(self.family.decoder_bias)))
        self._name_bias()

    def _name_bias(self) -> None:
        names = self.family.masked_lm
        if names.bias is not None:
            owner, _, name = names.bias.rpartition(".")
            setattr(self.get_submodule(owner), name, self.get_output_embeddings().bias)

    @property
    def predictions(self) -> MaskedLMHead:
        return MaskedLMHead(self)

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.get_output_embeddings().weight = self.get_input_embeddings().weight
        self._name_bias()

    def get_output_embeddings(self) -> nn.Linear:
        decoder: Any = self.get_submodule(self.family.masked_lm.decoder)
        return decoder

    def set_output_embeddings(self, decoder: nn.Linear) -> None:
        place(self, self.family.masked_lm.decoder, decoder)
        self._name_bias()

    def _predictions(
        self, inputs: Inputs, x: Tensor, labels: Tensor | None, output_logits: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The loss, if there are labels, and the logits (B, S, V), if `output_logits`."""
        head = self.predictions
        if labels is not None:
            labels = _packed_labels(inputs, labels, self.config.vocab_size)
        if not output_logits:
            return (None if labels is None else head.loss(x, labels)), None
        logits = head(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return loss, inputs.give_back(logits)


class _Classifier(HeadModel):
    """The base of the models with a classifier over texts or tokens, and what stands before it: see ClassesNames."""

    @property
    def names(self) -> ClassesNames:
        found = self._names()
        if found is None:
            raise ValueError(
                f"config: model_type is {self.config.model_type!r}, of which transformers has no "
                f"{self.family.prefix}{type(self).__name__.removeprefix('Model')}"
            )
        return found

    def _names(self) -> ClassesNames | None:
        raise NotImplementedError

    def _place_classes(self, count: int, dropout: float) -> None:
        names, config = self.names, self.config
        self._head().place(names.containers)
        if names.dense is not None:
            dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.has(self.family.head_bias))
            place(self, names.dense, dense)
        if names.norm is not None:
            place(self, names.norm, norm(config, self.family, config.hidden_size))
        if names.drop is not None:
            owner, _ = split_path(names.out)
            place(self, f"{owner}.{names.drop}".lstrip("."), nn.Dropout(dropout))
        place(self, names.out, nn.Linear(config.hidden_size, count))

    def _head(self) -> Head:
        names = self.names
        drop = () if names.drop is None else ((names.drop, None),)
        outer, out = split_path(names.out)
        if names.dense is None:
            return Head(self, (outer, ()), (outer, (*drop, (out, None))))
        inner, dense = split_path(names.dense)
        steps: Steps = (*(drop if names.drops_first else ()), (dense, self.config.activation_of(names.activation)))
        if names.norm is not None:
            steps = (*steps, (split_path(names.norm)[1], None))
        return Head(self, (inner, steps), (outer, (*drop, (out, None))))


class _TextClassifier(_Classifier):
    """The base of those with a vector per text: the pooler's, or what the head makes of the tokens' states."""

    def _pools(self) -> bool:
        return self.names.dense is None

    def _classify(self, inputs: Inputs, encoded: Encoded) -> Tensor:
        """(B, count)."""
        head, x = self._head(), encoded.last_hidden_state
        if self.names.dense is None:
            return head(self._pool(inputs, encoded))
        kind = self._pooling()
        if kind in FIRST:
            return head(first_states(inputs, encoded))
        if kind == "mean":
            return head(_mean(inputs, x))
        if kind == "late":
            return _mean(inputs, head(x))
        raise ValueError(f"config: {self.names.pooling} is {kind!r}; it must be 'cls', 'bos', 'mean' or 'late'")

    def _pooling(self) -> str:
        """Of the tokens' states, where there is no pooler."""
        pooling = self.names.pooling
        return "cls" if pooling is None else self.config.extra.get(pooling, "cls")

    def _read(self) -> Literal["first"] | None:
        """Which tokens' last states `_classify` reads, as `picked` of run_bert."""
        return "first" if self.names.dense is None or self._pooling() in FIRST else None


def _mean(inputs: Inputs, x: Tensor) -> Tensor:
    """The mean over each text's tokens, (T, N) -> (B, N); zeros for a text without any."""
    if (
        inputs.key_mask is None and x.is_cpu and len(x) and runs_by_pointers()
    ):  # one row after the other, whatever the batch
        lengths = inputs.batch.lengths.long()
        total = torch.segment_reduce(x.float(), "sum", lengths=lengths, unsafe=True, initial=None)
        return (total / lengths.clamp(min=1)[:, None]).to(x.dtype)
    keys = inputs.keys()[..., None]  # without what only lies between two tokens
    return (inputs.pad(x) * keys).sum(1) / keys.sum(1).clamp(min=1)


class BertForPreTraining(_LanguageModel):
    """Masked-language-model and next-sentence heads together."""

    model_types = ("bert",)

    token_fields = ("prediction_logits",)

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self._place_predictions()
        place(self, "cls.seq_relationship", nn.Linear(config.hidden_size, 2))
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        return_dict: bool | None = None,
        output_logits: bool = True,
        **options: Any,
    ) -> BertForPreTrainingOutput:
        """labels (B, S), next_sentence_label (B,): the loss is the sum of both parts; it needs both labels.

        `output_logits=False` omits prediction_logits; the loss then materialises no (T, V) logits.
        """
        args = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        inputs, encoded = self._run(*args, **options)
        both = labels is not None and next_sentence_label is not None
        loss, logits = self._predictions(inputs, encoded.last_hidden_state, labels if both else None, output_logits)
        relationship = project(self.cls.seq_relationship, self._pool(inputs, encoded))
        if loss is not None and next_sentence_label is not None:
            loss = loss + F.cross_entropy(relationship, _row_labels("next_sentence_label", next_sentence_label, 2))
        fields = {"loss": loss, "prediction_logits": logits, "seq_relationship_logits": relationship}
        return self._output(BertForPreTrainingOutput, encoded, return_dict, **fields)


class ModelForMaskedLM(_LanguageModel):
    """The masked-language-model head."""

    has_pooler = False
    token_fields = ("logits",)

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self._place_predictions()
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        output_logits: bool = True,
        **options: Any,
    ) -> HeadOutput:
        """labels (B, S) of token ids, -100 at tokens without a label; logits (B, S, V), zeros at pads.

        `output_logits=False` omits the logits; the loss then materialises no (T, V) logits.
        """
        args = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        inputs, encoded = self._run(*args, **options)
        loss, logits = self._predictions(inputs, encoded.last_hidden_state, labels, output_logits)
        return self._output(HeadOutput, encoded, return_dict, loss=loss, logits=logits)


class BertForNextSentencePrediction(HeadModel):
    """The next-sentence head: logits (B, 2), label 0 for a continuation, 1 for a random sentence."""

    model_types = ("bert",)

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.cls = Part()
        place(self, "cls.seq_relationship", nn.Linear(config.hidden_size, 2))
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> HeadOutput:
        """labels (B,) of 0 and 1."""
        args = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        inputs, encoded = self._run(*args, picked="first", **options)
        logits = project(self.cls.seq_relationship, self._pool(inputs, encoded))
        loss = None if labels is None else F.cross_entropy(logits, _row_labels("labels", labels, 2))
        return self._output(HeadOutput, encoded, return_dict, loss=loss, logits=logits)


class ModelForSequenceClassification(_TextClassifier):
    """A linear layer on the pooled vector: regression, one label or several, by `config.problem_type`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self._place_classes(config.num_labels, config.head_dropout)
        self.init_weights()

    def _names(self) -> ClassesNames:
        return self.family.classes

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> HeadOutput:
        """labels (B,) of classes; (B,) or (B, num_labels) of numbers for regression and several labels."""
        args = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        inputs, encoded = self._run(*args, picked=self._read(), **options)
        logits = self._classify(inputs, encoded)
        loss = None if labels is None else self._loss(logits, labels)
        return self._output(HeadOutput, encoded, return_dict, loss=loss, logits=logits)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        config = self.config
        if config.problem_type is None:
            # As in transformers, the first labels determine it.
            if self.num_labels == 1:
                config.problem_type = "regression"
            elif labels.is_floating_point():
                config.problem_type = "multi_label_classification"
            else:
                config.problem_type = "single_label_classification"
        if config.problem_type == "regression":
            return (
                F.mse_loss(logits.squeeze(), labels.squeeze()) if self.num_labels == 1 else F.mse_loss(logits, labels)
            )
        if config.problem_type == "single_label_classification":
            return F.cross_entropy(logits, _row_labels("labels", labels, self.num_labels))
        if config.problem_type == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels)
        raise ValueError(
            f"config.problem_type is {config.problem_type!r}; it must be regression, "
            "single_label_classification or multi_label_classification"
        )


class ModelForMultipleChoice(_TextClassifier):
    """One score for each choice of a question: inputs (B, C, S), logits (B, C)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self._place_classes(1, config.dropout_of("choices", config.head_dropout))
        self.init_weights()

    def _names(self) -> ClassesNames | None:
        return self.family.choices

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> HeadOutput:
        """labels (B,): the index of the right choice. The token arguments are (B, C, S), inputs_embeds (B, C, S, E).

        Packed, each text is a choice: logits (N, 1), which only the caller can group; without labels.
        """
        tokens, name = (input_ids, "input_ids") if inputs_embeds is None else (inputs_embeds, "inputs_embeds")
        packed = options.get("cu_seqlens") is not None
        wanted = 3 if inputs_embeds is None else 4
        if tokens is not None and not packed and tokens.dim() != wanted:
            raise ValueError(f"{name} has shape {tuple(tokens.shape)}; it must be (batch, choices, sequence, ...)")
        args = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        flat = (x if x is None or packed else x.flatten(0, 1) for x in args)
        inputs, encoded = self._run(*flat, picked=self._read(), **options)
        scores = self._classify(inputs, encoded)
        # Packed and `prepared` texts are not grouped by question: (B * C, 1); only the caller can group them
        logits = scores if tokens is None or packed else scores.view(*tokens.shape[:2])
        loss = None if labels is None else F.cross_entropy(logits, _row_labels("labels", labels, logits.shape[1]))
        return self._output(HeadOutput, encoded, return_dict, loss=loss, logits=logits)


class _TokenClassifier(HeadModel):
    """The base of those with logits for every token, zeros at pads."""

    has_pooler = False
    token_fields = ("logits",)

    def _logits(self, x: Tensor) -> Tensor:
        """Of states (T, E): (T, N), or (T,) for one number."""
        raise NotImplementedError

    def _loss(self, inputs: Inputs, logits: Tensor, labels: Tensor) -> Tensor:
        """Of packed logits and labels (B, S)."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> HeadOutput:
        """labels (B, S): see the class."""
        args = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        inputs, encoded = self._run(*args, **options)
        logits = self._logits(encoded.last_hidden_state)
        loss = None if labels is None else self._loss(inputs, logits, labels)
        return self._output(HeadOutput, encoded, return_dict, loss=loss, logits=inputs.give_back(logits))


class ModelForTokenClassification(_TokenClassifier, _Classifier):
    """A linear layer on every token: logits (B, S, num_labels), zeros at pads.

    Labels (B, S) are classes, -100 at tokens without a label.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self._place_classes(config.num_labels, config.dropout_of("tokens", config.head_dropout))
        self.init_weights()

    def _names(self) -> ClassesNames | None:
        return self.family.tokens

    def _logits(self, x: Tensor) -> Tensor:
        return self._head()(x)

    def _loss(self, inputs: Inputs, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, _packed_labels(inputs, labels, self.num_labels))


class ModelForQuestionAnswering(_Classifier):
    """Where an answer starts and ends: two logits for every token, (B, S) each.

    A pad's logit is the lowest number of the dtype, so that no softmax or argmax picks it and the loss
    does not depend on the padded length. (In transformers, pads take part in both.)
    """

    has_pooler = False
    token_fields = ("start_logits", "end_logits")

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self._place_classes(config.num_labels, config.dropout_of("answers", 0.0))
        self.init_weights()

    def _names(self) -> ClassesNames | None:
        return self.family.answers

    def pad_value(self, dtype: torch.dtype) -> float:
        return torch.finfo(dtype).min

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> QuestionAnsweringModelOutput:
        """start_positions, end_positions (B,): columns of the answer; S and above is ignored, below 0 counts as 0."""
        args = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        inputs, encoded = self._run(*args, **options)
        logits = self._head()(encoded.last_hidden_state)
        if logits.shape[1] != 2:
            raise ValueError(f"config.num_labels is {logits.shape[1]}; question answering has 2 logits, start and end")
        lowest = self.pad_value(logits.dtype)
        loss = None
        if start_positions is not None and end_positions is not None:
            padded = inputs.pad(logits, lowest)  # (B, S, 2)
            losses = [
                F.cross_entropy(padded[..., i], answer_positions(p, padded.shape[1]), ignore_index=padded.shape[1])
                for i, p in enumerate((start_positions, end_positions))
            ]
            loss = sum(losses) / 2
        start, end = inputs.give_back(logits, lowest).unbind(-1)
        fields = {"loss": loss, "start_logits": start.contiguous(), "end_logits": end.contiguous()}
        return self._output(QuestionAnsweringModelOutput, encoded, return_dict, **fields)


class ElectraForPreTraining(_TokenClassifier):
    """ELECTRA's discriminator: the logit of each token's having been replaced, (B, S), zeros at pads.

    Labels (B, S) are 1 for a replaced token, 0 for an original one.
    """

    model_types = ("electra",)

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self._head().place(("discriminator_predictions",))
        place(self, "discriminator_predictions.dense", nn.Linear(config.hidden_size, config.hidden_size))
        place(self, "discriminator_predictions.dense_prediction", nn.Linear(config.hidden_size, 1))
        self.init_weights()

    def _head(self) -> Head:
        first, last = ("dense", self.config.hidden_act), ("dense_prediction", None)
        return Head(self, ("discriminator_predictions", (first,)), ("discriminator_predictions", (last,)))

    def _logits(self, x: Tensor) -> Tensor:
        return self._head()(x).squeeze(-1)

    def _loss(self, inputs: Inputs, logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, _packed_labels(inputs, labels, 2).to(logits.dtype))


class BertForMaskedLM(ModelForMaskedLM):
    """BERT with the masked-language-model head."""

    model_types = ("bert",)


class BertForSequenceClassification(ModelForSequenceClassification):
    """BERT with a linear layer on the pooled vector: regression, one label or several, by `config.problem_type`."""

    model_types = ("bert",)


class BertForMultipleChoice(ModelForMultipleChoice):
    """BERT with one score for each choice of a question: inputs (B, C, S), logits (B, C)."""

    model_types = ("bert",)


class BertForTokenClassification(ModelForTokenClassification):
    """BERT with a linear layer on every token: logits (B, S, num_labels), zeros at pads."""

    model_types = ("bert",)


class BertForQuestionAnswering(ModelForQuestionAnswering):
    """BERT with two logits for every token, of an answer's start and end: see ModelForQuestionAnswering."""

    model_types = ("bert",)


def answer_positions(positions: Tensor, length: int) -> Tensor:
    """Answer positions as (B,), clamped to 0..`length`; the loss ignores `length`."""
    return positions.reshape(-1).clamp(0, length)


def _packed_labels(inputs: Inputs, labels: Tensor, classes: int) -> Tensor:
    """Labels per token as (T,): checked, without those of pads."""
    wanted = tuple(inputs.token_type_ids.shape) if inputs.came_packed else inputs.padded_shape
    if tuple(labels.shape) != wanted:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; it must be {wanted}")
    return _check_labels("labels", inputs.real(labels, IGNORE), classes)


def _row_labels(name: str, labels: Tensor, classes: int) -> Tensor:
    return _check_labels(name, labels.reshape(-1), classes)


def _check_labels(name: str, labels: Tensor, classes: int) -> Tensor:
    kept = labels[labels != IGNORE]
    check_ids(name, kept, classes, "the number of classes")
    return labels.long()
