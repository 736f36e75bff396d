"""compile: a model whose inference is captured in CUDA graphs, so that a small batch costs one launch.

A graph is captured for a bucket of tokens and texts (static_batch.py) when a call first needs it. Each call writes its
inputs into the graph's buffers (graph_calls.py), replays the graph, and copies the results out into the caller's shape
(unpacking needs this copy anyway). The host does not wait for the device. An error that the device finds in a call,
for example an id outside its table, is raised by a later call or by `check()`.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastbert.inference.graph_calls import Call, read_call
from fastbert.inference.static_batch import COMPLAINTS, Bucket, StaticBatch, bucket_of, token_sizes
from fastbert.model import BertForMultipleChoice, BertPreTrainedModel
from fastbert.model.outputs import ModelOutput, returned
from fastbert.model.plan import Tree
from fastbert.ops import dispatch
from fastbert.precision import QUANTIZED

_WARM_UPS = 2  # the first run compiles and loads kernels and allocates workspaces
# For arguments that a graph does not take: values that have no effect.
_IDLE = {"output_logits": (None, True)}


class Graphs(Protocol):
    """The capturing backend: CudaGraphs, or in tests a fake that needs no GPU."""

    nbytes: int

    def refuses(self, model: BertPreTrainedModel, static: StaticBatch) -> str | None:
        """The reason why the model cannot be captured; None where it can."""

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Captures `run`. Returns a function that replays it in the same memory, and the captured run's results."""

    def in_order(self) -> AbstractContextManager:
        """A context whose device work runs after that of all earlier such contexts."""

    def settle(self) -> None:
        """Waits for the device, so that a graph can be dropped."""

    def clear(self) -> None:
        """Drops the memory pool and resets `nbytes`."""


class CudaGraphs:
    """Graphs of one GPU. They share a memory pool, so they run one after the other even on different streams."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.nbytes = device, 0
        self._pool: Any = None
        self._done: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None

    def refuses(self, model: BertPreTrainedModel, static: StaticBatch) -> str | None:
        config = model.config
        qkv = torch.empty(
            (1, 3, config.num_attention_heads, config.hidden_size // config.num_attention_heads),
            dtype=model.dtype,
            device=self.device,
        )
        arguments = (qkv, static.cu_seqlens, static.bucket.tokens)
        name, _ = dispatch.choose("attention", self.device.type, *arguments, scale=None, dropout_p=0.0)
        return "attention runs as the reference here, which waits for the device" if name == "reference" else None

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        with torch.cuda.device(self.device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    run()
            current.wait_stream(side)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            before, graph = torch.cuda.memory_reserved(), torch.cuda.CUDAGraph()
            # thread_local: CUDA calls of other threads must not break the capture
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                results = run()
            self.nbytes += max(0, torch.cuda.memory_reserved() - before)
        return graph.replay, results

    @contextmanager
    def in_order(self) -> Iterator[None]:
        stream = torch.cuda.current_stream(self.device)
        if self._done is not None and stream != self._stream:
            stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done, self._stream = self._done or torch.cuda.Event(), stream
            self._done.record(stream)

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        self.nbytes, self._pool = 0, None


@dataclass
class _Graph:
    static: StaticBatch
    replay: Callable[[], None]
    output: ModelOutput  # in the graph's memory, which the next replay overwrites
    replays: int = 0


@dataclass(frozen=True)
class Report:
    """Statistics of a compiled model; prints as a few lines.

    `graphs` are (tokens, texts, replays), the least recently used first. `outside` counts the calls that ran eagerly,
    by reason. `nbytes` is the memory that the graphs share.
    """

    graphs: tuple[tuple[int, int, int], ...]
    captured: int
    dropped: int
    outside: dict[str, int]
    nbytes: int

    def __str__(self) -> str:
        count, size = len(self.graphs), self.nbytes / 2**20
        lines = [f"{count} graphs in {size:.1f} MiB; {self.captured} captured, {self.dropped} dropped"]
        lines += [f"{tokens:>7} tokens {texts:>5} texts: {replays} replays" for tokens, texts, replays in self.graphs]
        lines += [f"outside: {calls} calls, {reason}" for reason, calls in self.outside.items()]
        return "\n".join(lines)

    __repr__ = __str__


class CompiledModel:
    """A model with its usual call signature that replays CUDA graphs where it can. `compile` makes one.

    Attributes:
        model: the original model, unchanged.
        outside: how many calls ran eagerly, by reason. Each reason is warned of once.
    """

    def __init__(
        self, model: BertPreTrainedModel, graphs: Graphs, *, max_tokens: int, max_graphs: int, max_bytes: int
    ) -> None:
        self.model = model
        self.outside: Counter[str] = Counter()
        self._graphs, self._max_tokens, self._max_graphs, self._max_bytes = graphs, max_tokens, max_graphs, max_bytes
        self._sizes = token_sizes(max_tokens)
        self._kept: OrderedDict[Bucket, _Graph] = OrderedDict()
        self._too_large: set[Bucket] = set()
        self._captured = self._dropped = 0
        self._lock = threading.RLock()  # the graphs share memory: one call at a time
        self._state = _State(model)
        self._device = model.device
        self._wrong = torch.zeros(1, dtype=torch.int32, device=self._device)  # bits, of all calls
        # The device writes here and the host reads, without waiting.
        self._told = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=self._device.type == "cuda")

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *more: Any,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        **others: Any,
    ) -> ModelOutput:
        """Runs the model's forward. Tensors may be on the model's device or on the CPU; results are copies.

        Without a mask, or with the mask on the CPU, the graph is chosen by the number of real tokens. With a mask on
        the GPU it is chosen by B * S, so as not to wait for the number of real tokens. A replayed graph records no
        gradient.

        Raises:
            ValueError: as the model's forward; or an error that the device found in an earlier call.
        """
        tensors = (input_ids, attention_mask, token_type_ids, position_ids)
        with self._lock:
            self._raise_what_was_told()
            with torch.inference_mode(False), torch.no_grad():
                reason = "more than four positional arguments" if more else self._why_outside(others)
                if reason is None:
                    output = self._run(tensors, cu_seqlens, max_seqlen)
                    if not isinstance(output, str):
                        return returned(output, self.model.config, return_dict)
                    reason = output
            self._say_outside(reason)
        others.update(return_dict=return_dict, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        device = self.model.device
        moved = [x.to(device) if isinstance(x, Tensor) else x for x in (*tensors, *more)]
        others = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in others.items()}
        return self.model(*moved, **others)

    def warm_up(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Captures in advance the graphs for full batches of these (batch, sequence) shapes.

        Batches with pad tokens may use smaller graphs, which are not captured here.

        Raises:
            ValueError: an empty shape, or one of more than max_tokens tokens.
        """
        for batch_size, seq_len in shapes:
            if not 0 < batch_size * seq_len <= self._max_tokens:
                raise ValueError(f"shape is {(batch_size, seq_len)}; it must hold 1 to {self._max_tokens} tokens")
            with self._lock, torch.inference_mode(False), torch.no_grad():
                found = self._find(bucket_of(batch_size * seq_len, batch_size, self._sizes))
            if isinstance(found, str):
                self._say_outside(found)

    def check(self) -> None:
        """Waits for the device and raises the errors it found in the calls so far.

        Raises:
            ValueError: a wrong mask, id or cu_seqlens on the GPU that has not been raised before.
        """
        with self._lock:
            self._graphs.settle()
            self._raise_what_was_told()

    def clear(self) -> None:
        """Drops all graphs and frees their memory; later calls capture again."""
        with self._lock:
            self._graphs.settle()
            self._dropped += len(self._kept)
            self._kept.clear()
            self._too_large.clear()
            self._graphs.clear()

    def report(self) -> Report:
        """Statistics of captured graphs, replays, and eager calls by reason."""
        with self._lock:
            graphs = tuple((*bucket, graph.replays) for bucket, graph in self._kept.items())
            return Report(graphs, self._captured, self._dropped, dict(self.outside), self._graphs.nbytes)

    def _run(
        self, tensors: tuple[Tensor | None, ...], cu_seqlens: Tensor | None, max_seqlen: int | None
    ) -> ModelOutput | str:
        """Runs a call by a graph. Returns its output, or the reason why no graph can run it."""
        choices = None
        if isinstance(self.model, BertForMultipleChoice):
            if tensors[0] is None or any(x is not None and x.dim() != 3 for x in tensors):
                return "shapes do not match"
            choices = tensors[0].shape[:2]
            tensors = tuple(x if x is None else x.flatten(0, 1) for x in tensors)
        ids, mask, types, positions = tensors
        call = read_call(self.model, ids, mask, types, positions, cu_seqlens, max_seqlen)
        if isinstance(call, str):
            return call
        if call.tokens > self._max_tokens:
            return f"more than max_tokens={self._max_tokens} tokens"
        graph = self._find(bucket_of(call.tokens, call.texts, self._sizes))
        if isinstance(graph, str):
            return graph
        with self._graphs.in_order():
            places = call.load(graph.static)
            graph.replay()
            output = self._copied(graph.output, call, places)
        graph.replays += 1
        if choices is not None:
            output = type(output)(logits=output.logits.view(choices))
        return output

    def _copied(self, output: ModelOutput, call: Call, places: Tensor | None) -> ModelOutput:
        """A copy of a graph's output; fields with a row per token get the shape of the caller's tokens."""
        fields = {}
        for name, x in output.items():
            per_token = name in self.model.token_fields
            fill = self.model.pad_value(x.dtype) if per_token else 0.0
            fields[name] = call.give_back(x, places, fill) if per_token else x[: call.texts].clone()
        return type(output)(fields)

    def _why_outside(self, others: dict[str, Any]) -> str | None:
        """The reason, apart from its tokens, why no graph can run a call; None where one can."""
        for name, value in others.items():
            if not any(value is idle for idle in _IDLE.get(name, (None, False))):
                return f"{name} is given"
        if self.model.config.output_attentions or self.model.config.output_hidden_states:
            return "the config asks for attentions or hidden states"
        if self._state.drops():
            return "dropout is on"
        if self.model.device != self._device:
            return f"the model has left {self._device}"
        if torch.is_autocast_enabled(self._device.type):
            return "autocast is on"
        return None

    def _find(self, bucket: Bucket) -> _Graph | str:
        """The graph of a bucket, captured if it is new; or the reason why it cannot be captured."""
        if self._state.has_changed():
            self.clear()
            self._state = _State(self.model)
        graph = self._kept.get(bucket)
        if graph is not None:
            self._kept.move_to_end(bucket)
            return graph
        too_large = f"a graph of its size takes more than max_bytes={self._max_bytes}"
        if bucket in self._too_large:
            return too_large
        static = StaticBatch(self.model, bucket, self._device)
        if reason := self._graphs.refuses(self.model, static):
            return reason
        while len(self._kept) >= self._max_graphs:
            self._graphs.settle()
            self._kept.popitem(last=False)
            self._dropped += 1
        graph = self._capture(static)
        if self._graphs.nbytes > self._max_bytes and self._kept:
            del graph  # the pool frees its memory only with its last graph
            self.clear()
            graph = self._capture(static)
        if self._graphs.nbytes > self._max_bytes:
            del graph
            self.clear()
            self._dropped += 1
            self._too_large.add(bucket)
            return too_large
        self._kept[bucket] = graph
        return graph

    def _capture(self, static: StaticBatch) -> _Graph:
        def run() -> ModelOutput:
            inputs, wrong = static.inputs()
            output = self.model(prepared=inputs, return_dict=True)
            self._wrong.bitwise_or_(wrong)
            self._told.copy_(self._wrong, non_blocking=True)
            return output

        with self._graphs.in_order():
            replay, output = self._graphs.capture(run)
        self._captured += 1
        return _Graph(static, replay, output)

    def _raise_what_was_told(self) -> None:
        told = int(self._told)
        if told:
            with torch.inference_mode(False):
                self._graphs.settle()
                told |= int(self._told)
                self._wrong.zero_()
                self._told.zero_()
                for graph in self._kept.values():
                    graph.static.reset()
            complaints = "; ".join(text for bit, text in COMPLAINTS.items() if told & bit)
            raise ValueError(f"of an earlier call, whose results are not to be used: {complaints}")

    def _say_outside(self, reason: str) -> None:
        self.outside[reason] += 1
        if self.outside[reason] == 1:
            warnings.warn(f"compiled {type(self.model).__name__} runs eagerly: {reason}", stacklevel=3)


class _State:
    """The state that a capture fixes and a replay does not read again: modules and addresses of parameters.

    Parameters may change in place, except those of which the graph reads quantised copies.
    """

    def __init__(self, model: BertPreTrainedModel) -> None:
        self._model, self._tree = model, Tree(model)
        self._dropouts = [m for m in self._tree.modules if isinstance(m, nn.Dropout) and m.p]
        self._known = self._now()

    def drops(self) -> bool:
        return any(m.training for m in self._dropouts)

    def has_changed(self) -> bool:
        return not self._tree.holds(self._model) or self._now() != self._known

    def _now(self) -> tuple:
        parameters, precision = self._tree.parameters, self._model.matmul_precision
        # An inference tensor has no version counter, so it is not quantised ahead.
        versions = [p._version for p in parameters if not p.is_inference()] if precision in QUANTIZED else None
        return list(map(Tensor.data_ptr, parameters)), versions, precision, dict(dispatch.demands())


def compile(
    model: BertPreTrainedModel, *, max_tokens: int = 4096, max_graphs: int = 32, max_bytes: int = 2 << 30
) -> CompiledModel:
    """Makes small batches fast on a GPU: captures the model's forward in CUDA graphs and replays them.

    A graph is captured when it is first needed, for a rounded-up number of tokens and of texts (from 256 tokens on, at
    most a fifth of them is padding). Larger calls than `max_tokens` keep the GPU busy without graphs and run eagerly.
    So do calls that request a loss, attentions or hidden states, that run under autocast or with dropout, or that pass
    anything but ids. `report()` counts the eager calls by reason. Weights may change in place. If a weight is replaced,
    or a quantised one changes, the graphs are captured again.

    Args:
        model: a fastbert model on a GPU. It is not changed.
        max_tokens: the most tokens that a graph is captured for.
        max_graphs: the most graphs held; the least recently used one is dropped.
        max_bytes: the most memory that the graphs share.

    Raises:
        TypeError: another kind of model.
        ValueError: the model is not on a GPU, or a limit is less than 1.
    """
    if not isinstance(model, BertPreTrainedModel):
        raise TypeError(f"compile: model is a {type(model).__name__}; it must be a fastbert model")
    for name, limit in (("max_tokens", max_tokens), ("max_graphs", max_graphs), ("max_bytes", max_bytes)):
        if limit < 1:
            raise ValueError(f"compile: {name} is {limit}; it must be at least 1")
    device = model.device
    if device.type != "cuda":
        raise ValueError(f"compile: model is on {device.type}; CUDA graphs need a GPU")
    graphs = CudaGraphs(device)
    return CompiledModel(model, graphs, max_tokens=max_tokens, max_graphs=max_graphs, max_bytes=max_bytes)
