"""An encoder over packed tokens, of arrays: the kernels of the torch path, with the same bits."""

from __future__ import annotations

import hashlib
from array import array
from typing import Any

import numpy as np

from fastbert.config import BertConfig, family_of
from fastbert.engine import encoder as engine
from fastbert.engine import positions
from fastbert.engine import rows as rows_of
from fastbert.engine.library import ACTIVATIONS, C, chosen_isa
from fastbert.engine.memory import address_of, keep, workspace
from fastbert.families.layer_kinds import LayerKind, layer_kinds, place_count
from fastbert.light.packing import Arrays, dtype_code
from fastbert.light.weights import MappedFile, as_bfloat16, as_float32


class Encoder:
    """The layers of a model and what stands before and after them.

    Args:
        arrays: of light.packing.pack_encoder, for the instruction set in use.
        config: of the model.
        dtype: "float32" or "bfloat16"; states in bfloat16 are their bits, uint16.
        precision: of the layers' products, None or "int8".
        threads: of each call.

    Raises:
        ValueError: an activation or a shape that the extension does not take.
    """

    def __init__(
        self, arrays: Arrays, config: BertConfig, *, dtype: str, precision: str | None = None, threads: int = 1
    ) -> None:
        self.files: dict[str, MappedFile] = {}  # of the weights, by their names
        self.arrays, self.config, self.family = arrays, config, family_of(config.model_type)
        self.dtype, self.precision, self.threads = dtype, precision, threads
        self.code, self.isa = dtype_code(dtype), chosen_isa()[1]
        self.width, heads = config.hidden_size, config.num_attention_heads
        if self.width % (2 * heads):
            raise ValueError(f"config: hidden_size is {self.width} with {heads} heads; a head's width must be even")
        if config.hidden_act not in ACTIVATIONS:
            known = ", ".join(name for name in ACTIVATIONS if name)
            raise ValueError(f"config: hidden_act is {config.hidden_act!r}; without torch it must be one of {known}")
        self._kind = engine.encoder_kind(
            self.code,
            precision=precision,
            activation=config.hidden_act,
            gated=self.family.gated,
            pre_norm=self.family.pre_norm,
            rms=self.family.rms,
            width=self.width,
            heads=heads,
            key_heads=config.key_heads,
            eps=config.layer_norm_eps,
            final_norm=self._norm("final_norm"),
        )
        self._tables = self._rotary_tables()
        self._layers = self._descriptors()
        self._bias = self._distance_bias()

    def __call__(
        self,
        ids: np.ndarray,
        cu_seqlens: np.ndarray,
        *,
        token_type_ids: np.ndarray | None = None,
        picked: np.ndarray | None = None,
    ) -> np.ndarray:
        """The last states of packed tokens, (T, E), or of the tokens `picked`, (P, E).

        Args:
            ids: (T,) int64.
            cu_seqlens: (B + 1,) int32, the start of each text, and T.
            token_type_ids: (T,) int64; None means 0.
            picked: (P,) int64 with P <= T.

        Raises:
            ValueError: an id outside its table, a text with more tokens than positions, or offsets out of order.
        """
        lengths = np.diff(cu_seqlens)
        longest, first = int(lengths.max(initial=0)), self.config.first_position
        places = self.config.max_length + first
        if longest + first > places:
            which = f", and the first is {first}" if first else ""
            raise ValueError(
                f"input_ids has a sequence of {longest} tokens; max_position_embeddings is {places}{which}"
            )
        _check_range("input_ids", ids, len(self.arrays["word"]), "vocab_size")
        if token_type_ids is not None and "type" in self.arrays:
            _check_range("token_type_ids", token_type_ids, len(self.arrays["type"]), "type_vocab_size")
        where = self._positions(ids, cu_seqlens, lengths)
        x = self._embedded(ids, token_type_ids, where)
        return self._run(x, cu_seqlens, where, picked)

    def over(self, base: Encoder) -> Encoder | None:
        """This encoder with the arrays of another, if they are the same bit for bit; else None. The pooler and what is
        of a head stay its own."""
        own = {name: x for name, x in self.arrays.items() if name == "pooler" or name.startswith("head.")}
        shared = {name: x for name, x in base.arrays.items() if name != "pooler" and not name.startswith("head.")}
        theirs = {name: x for name, x in self.arrays.items() if name not in own}
        if (self.dtype, self.precision, theirs.keys()) != (base.dtype, base.precision, shared.keys()):
            return None
        if any(not np.array_equal(x, shared[name]) for name, x in theirs.items()):
            return None
        made = Encoder(shared | own, self.config, dtype=self.dtype, precision=self.precision, threads=self.threads)
        made.files = self.files
        return made

    def digest(self) -> Any:
        """A SHA-256 of the weights' files, config, dtype and precision, which the caller may update further."""
        digest = hashlib.sha256(repr(sorted(self.config.to_dict().items())).encode())
        digest.update(f"{self.dtype} {self._kind[1]}".encode())
        for name, file in self.files.items():
            digest.update(f"{name} {file.sha256()}".encode())
        return digest

    def pooled(self, first: np.ndarray) -> np.ndarray:
        """tanh(W h + b) of each text's first state, (B, E) -> (B, E)."""
        return self.linear(self.arrays["pooler"], first, self.width, "tanh")

    def float32(self, x: np.ndarray) -> np.ndarray:
        """States or vectors in float32."""
        return as_float32(x) if self.dtype == "bfloat16" else x

    def in_dtype(self, x: np.ndarray) -> np.ndarray:
        """float32 in the model's dtype."""
        return as_bfloat16(x) if self.dtype == "bfloat16" else x

    def linear(self, packed: np.ndarray, x: np.ndarray, rows: int, activation: str | None = None) -> np.ndarray:
        """act(x weight^T + bias) of a packed weight (rows, K): (M, K) -> (M, rows)."""
        return rows_of.linear(x, packed, rows, dtype=self.code, threads=self.threads, activation=activation)

    def norm(self, name: str, x: np.ndarray, *, rms: bool = False) -> np.ndarray:
        """The norm `name` of the arrays, over rows (M, N): LayerNorm or, with `rms`, RMSNorm."""
        eps = self.config.layer_norm_eps
        return rows_of.layer_norm(x, *self._norm(name), eps=eps, dtype=self.code, threads=self.threads, rms=rms)

    def _norm(self, name: str) -> tuple[int, int]:
        """The addresses of a norm's weight and bias, 0 where it has none."""
        weight, bias = (self.arrays.get(f"{name}.{part}") for part in ("weight", "bias"))
        return (0 if weight is None else address_of(weight), 0 if bias is None else address_of(bias))

    def _rotary_tables(self) -> list[np.ndarray | None]:
        """The table of each layer; layers of one kind share it."""
        config = self.config
        if self.family.rotary is None:
            return [None] * config.num_hidden_layers
        kinds, places = layer_kinds(config, self.family), place_count(config, self.family)
        made = {kind: self._rotary_table(kind, places) for kind in dict.fromkeys(kinds)}
        return [made[kind] for kind in kinds]

    def _rotary_table(self, kind: LayerKind, places: int) -> np.ndarray:
        steps = positions.frequencies(kind.theta, kind.factor, self.config.head_dim)
        return positions.rotary_table(steps, places)

    def _descriptors(self) -> array:
        words = array("Q")
        kinds = layer_kinds(self.config, self.family) if self.family.rotary is not None else None
        for i, table in enumerate(self._tables):
            norms = self._norm(f"{i}.attention_norm"), self._norm(f"{i}.norm")
            layer = engine.LayerPlaces(
                products=[address_of(self.arrays[f"{i}.{name}"]) for name in ("qkv", "out", "up", "down")],
                attention_norm=norms[0],
                norm=norms[1],
                rotary=0 if table is None else address_of(table),
                inner=self.config.intermediate_size,
                window=None if kinds is None else kinds[i].window,
            )
            words.extend(layer.words())
        return words

    def _distance_bias(self) -> np.ndarray | None:
        """The bias of attention by head and distance, (H, 2 reach - 1) float32, where the family has one."""
        if self.family.alibi:
            places = place_count(self.config, self.family)
            return positions.alibi_bias(self.config.num_attention_heads, places)
        table = self.arrays.get("distances")
        if table is None:
            return None
        rows = self.float32(table)[positions.buckets(self.config.max_position_embeddings)]
        return np.ascontiguousarray(rows.T)

    def _positions(self, ids: np.ndarray, cu_seqlens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The position of each token, (T,) int64: counted within its text or, as fairseq does, among those of it that
        are no padding."""
        starts = cu_seqlens[:-1].astype(np.int64)
        if not self.family.counts_tokens:
            return np.arange(len(ids)) - np.repeat(starts, lengths)
        pad = self.config.first_position - 1
        real = ids != pad
        counts = np.concatenate([[0], np.cumsum(real)])
        return (counts[1:] - np.repeat(counts[starts], lengths)) * real + pad

    def _embedded(self, ids: np.ndarray, types: np.ndarray | None, where: np.ndarray) -> np.ndarray:
        """The input of the first layer, (T, E)."""
        word = self.arrays["word"]
        width = word.shape[1]
        if self.family.embeddings.norm is None:
            return word[ids]
        none, zeros = np.zeros((1, width), word.dtype), np.zeros(len(ids), np.int64)
        tables = (
            (word, ids),
            (self.arrays.get("type", none), zeros if types is None or "type" not in self.arrays else types),
            (self.arrays.get("position", none), where if "position" in self.arrays else zeros),
        )
        weight, bias = self._norm("embed")
        y = np.empty((len(ids), width), word.dtype)
        C.embed_layer_norm_cpu(
            *(self.code, len(ids), width),
            *((address_of(table), address_of(rows), len(table), width) for table, rows in tables),
            *(weight, bias or address_of(none), address_of(y), 0),
            *(self.config.layer_norm_eps, 0.0, 0, self.isa, self.threads),
        )
        return self.linear(self.arrays["projection"], y, self.width) if "projection" in self.arrays else y

    def _run(self, x: np.ndarray, cu_seqlens: np.ndarray, where: np.ndarray, picked: np.ndarray | None) -> np.ndarray:
        tokens = len(x)
        if not self.config.num_hidden_layers or not tokens:
            x = self.norm("final_norm", x, rms=self.family.rms) if "final_norm.weight" in self.arrays else x
            return x if picked is None else x[picked]
        words, count = self._layers.buffer_info()[0], 0 if picked is None else len(picked)
        if picked is not None and count > tokens:  # texts without a token have none to pick
            return self._run(x, cu_seqlens, where, None)[picked]
        what = self._kind, self.config.num_hidden_layers, words, tokens
        memory = workspace(C.encoder_workspace_bytes(*what, count, self.isa, self.threads))
        y, bias = np.empty_like(x), self._bias
        C.encoder_cpu(
            *what,
            len(cu_seqlens) - 1,
            *(address_of(cu_seqlens), address_of(x), address_of(y), memory.start),
            *((0, 0) if bias is None else (address_of(bias), (bias.shape[1] + 1) // 2)),
            address_of(where),
            0 if picked is None else address_of(picked),
            *(count, self.isa, self.threads),
        )
        keep(memory)
        return y if picked is None else y[:count]


def _check_range(name: str, ids: np.ndarray, limit: int, what: str) -> None:
    if not len(ids):
        return
    low, high = C.bounds_cpu(ids.itemsize, len(ids), address_of(ids))
    if low < 0 or high >= limit:
        bad = low if low < 0 else high
        raise ValueError(f"{name} holds {bad}; {what} is {limit}, so 0 to {limit - 1} are valid")
