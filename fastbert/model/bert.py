"""BertModel: the encoder with its pooler, on padded or packed input."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from fastbert.config import BertConfig, family_of
from fastbert.engine.positions import BUCKETS
from fastbert.families import BERT, FAMILIES, Family
from fastbert.model.encoder import Encoded, encode, encode_at_once, pick, runs_by_pointers
from fastbert.model.inputs import Inputs, counted_positions, prepare
from fastbert.model.layer import Products, is_hooked
from fastbert.model.modules import Pooler, place, place_embeddings, place_layers, table
from fastbert.model.outputs import BaseModelOutputWithPooling, returned
from fastbert.model.plan import EncoderPlan, encoder_plan
from fastbert.model.pretrained import BertPreTrainedModel


def run_bert(
    bert: nn.Module,
    config: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    precision: str | None = None,
    prepared: Inputs | None = None,
    picked: Tensor | Literal["first"] | None = None,
    plan: EncoderPlan | None = None,
) -> tuple[Inputs, Encoded]:
    """Checks, packs and encodes: the first step of every model, on any module tree with transformers' names.

    `prepared` replaces all arguments that describe the tokens; `picked`, the first token of each row or any packed
    ones, and `plan` are as for `encode`.
    """
    family: Family = getattr(bert, "family", BERT)
    inputs = prepared or prepare(
        bert,
        input_ids,
        attention_mask,
        token_type_ids,
        position_ids,
        inputs_embeds,
        cu_seqlens,
        max_seqlen,
        config.pad_token_id,
        family=family,
    )
    encoded = encode(
        bert,
        inputs,
        activation=config.hidden_act,
        precision=precision,
        output_attentions=config.output_attentions if output_attentions is None else output_attentions,
        output_hidden_states=config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        picked=first_tokens(inputs.batch.cu_seqlens, len(inputs.position_ids)) if isinstance(picked, str) else picked,
        plan=plan or encoder_plan(bert, Products(config.hidden_act, precision), family=family),
    )
    return inputs, encoded


def pool(inputs: Inputs, encoded: Encoded) -> Tensor:
    """tanh(W h + b) of each row's first real token, (B, E); zeros for a row without one.

    transformers takes column 0, which differs only where a row begins with a pad.
    """
    batch, dense = inputs.batch, encoded.plan.pooler
    assert dense is not None, "the model has no pooler"
    pooled = dense(first_states(inputs, encoded), "tanh")
    return pooled if inputs.is_full and batch.seq_len else pooled * (batch.cu_seqlens.diff() > 0)[:, None]


def first_tokens(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The place of each row's first real token, (B,) int64; of a row without one, any."""
    return cu_seqlens[:-1].long().clamp(0, max(0, tokens - 1))


def first_states(inputs: Inputs, encoded: Encoded) -> Tensor:
    """The states of each row's first real token, (B, E), which may have been picked; any of a row without one."""
    batch, x = inputs.batch, encoded.last_hidden_state
    if encoded.is_picked:
        return x
    if inputs.is_full and batch.seq_len:
        return x.view(batch.batch_size, batch.seq_len, x.shape[1])[:, 0]
    return pick(x, first_tokens(batch.cu_seqlens, len(x)))


def picked_states(
    model: EncoderModel, input_ids: Tensor, cu_seqlens: Tensor, *, picked: Tensor | Literal["first"], **inputs: Any
) -> Tensor:
    """The last states of some tokens of a packed batch, (P, E): each row's first, or those of `picked`.

    The others are computed, too, where a hook or a forward of a user's own sees the model's call.
    """
    if type(model).forward is EncoderModel.forward and not is_hooked(model):
        inputs["precision"] = model.matmul_precision
        _, encoded = run_bert(model, model.config, input_ids, cu_seqlens=cu_seqlens, picked=picked, **inputs)
        return encoded.last_hidden_state
    states = model(input_ids, cu_seqlens=cu_seqlens, **inputs, return_dict=True).last_hidden_state
    return pick(states, first_tokens(cu_seqlens, len(states)) if isinstance(picked, str) else picked)


class EncoderModel(BertPreTrainedModel):
    """The bare encoder of a family, with transformers' arguments and output; the states of pads are zeros.

    Args:
        config: sizes and settings.
        add_pooling_layer: create a pooler, if the family has one, and so return a `pooler_output`; None: as
            transformers' class does.
    """

    model_types = tuple(FAMILIES)
    _constructor_keywords = ("add_pooling_layer",)
    token_fields = ("last_hidden_state",)

    def __init__(self, config: BertConfig, add_pooling_layer: bool | None = None) -> None:
        super().__init__(config)
        self.family = family = family_of(config.model_type)
        place_embeddings(self, config, family)
        width = config.embedding_size or config.hidden_size
        if family.projection is not None and width != config.hidden_size:
            self.add_module(family.projection, nn.Linear(width, config.hidden_size))
        place_layers(self, config, family)
        if family.distance_table is not None:
            buckets = config.extra.get("relative_attention_num_buckets", BUCKETS)
            place(self, family.distance_table, table(buckets, config.num_attention_heads))
        pools = family.pools_alone if add_pooling_layer is None else add_pooling_layer
        self.pooler = Pooler(config) if pools and family.has_pooler else None
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        prepared: Inputs | None = None,
    ) -> BaseModelOutputWithPooling:
        """Encodes a batch.

        Args:
            input_ids: (B, S) int64; or, packed, (T,) with `cu_seqlens`.
            attention_mask: (B, S) of 0 and 1, any pattern; None means no pads.
            token_type_ids: (B, S); None means 0.
            position_ids: (B, S); None means the column or, where the family counts tokens, the token's number.
            inputs_embeds: (B, S, E) in place of input_ids.
            cu_seqlens: int32 (B+1,), the start of each sequence of packed input; `max_seqlen` is the longest length.
            prepared: replaces all of these: input that the caller has already checked and packed.

        Returns:
            last_hidden_state (B, S, E), zeros at pads, or (T, E) for packed input; pooler_output (B, E);
            hidden_states L+1 of last_hidden_state's shape; attentions L of (B, H, S, S), S the longest if packed.

        Raises:
            ValueError: an argument is invalid; the message names it, its value and the limit.
        """
        config, precision, plan = self.config, self._matmul_precision, None
        captures = output_attentions or output_hidden_states or config.output_attentions or config.output_hidden_states
        padded = inputs_embeds is None and cu_seqlens is None and prepared is None
        if isinstance(input_ids, Tensor) and padded and not captures and runs_by_pointers():
            plan, family = encoder_plan(self, Products(config.hidden_act, precision), family=self.family), self.family
            positions = position_ids
            if positions is None and family.counts_tokens:
                positions = counted_positions(input_ids, plan.first_position)
            found = encode_at_once(plan, input_ids, attention_mask, token_type_ids, positions)
            if found is not None:
                output = BaseModelOutputWithPooling(last_hidden_state=found[0], pooler_output=found[1])
                return returned(output, config, return_dict)
        inputs, encoded = run_bert(
            self,
            config,
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            cu_seqlens,
            max_seqlen,
            precision=precision,
            prepared=prepared,
            plan=plan,
        )
        pooled = None if self.pooler is None else pool(inputs, encoded)
        states = encoded.hidden_states
        output = BaseModelOutputWithPooling(
            last_hidden_state=inputs.give_back(encoded.last_hidden_state) if states is None else states[-1],
            pooler_output=pooled,
            hidden_states=states,
            attentions=encoded.attentions,
        )
        return returned(output, config, return_dict)


class BertModel(EncoderModel):
    """The bare encoder of BERT."""

    model_types = ("bert",)
