"""Plans: what is derived from a module tree, who owns it, and whether it still holds.

A plan hangs on the module that it was made of, and dies with it. It holds the parts of the tree, the `Weight`s whose
forms the backends keep in it (packed panels, transposes, 8-bit rows, the descriptors that C++ takes), and what all that
was made of. There is no other store, and no other test of freshness.

What is seen at the next call:
* modules that are replaced, hooked, wrapped, or given a forward of their own; constants like a norm's eps;
* parameters that are replaced, moved or written to, as the version counter counts it: by optimizers, load_state_dict,
  in-place ops;
* writes to biases and norms by any means.
Writes to weights that bypass the version counter (through .data or numpy) are seen by checksums on the CPU: with
gradients at the next call, without at the latest after `Checksums.calls_until_seen` calls. On a GPU looking at values
would wait for the device: there `fastbert.refresh` says that something was written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from operator import attrgetter, getitem, is_, itemgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastbert import ops
from fastbert.model.layer import Embeddings, Layer, Products, Projection, has_global_hook, is_hooked, sharded

_PLAN = "_fastbert_plan"
Verdict = Callable[[nn.Module], str | None]
_MODULES, _PARAMETERS, _FORWARD = itemgetter("_modules"), itemgetter("_parameters"), attrgetter("forward")
_VERSION = attrgetter("_version")
_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Attributes that a plan's parts are read of, by what has them.
_CONSTANTS = ("eps", "attention_head_size", "scaling", "padding_idx", "max_norm", "sparse", "scale_grad_by_freq")


class Tree:
    """The modules below a root as they were: which, of what class, with what hooks, constants and parameters.

    Everything is compared by loops of C over lists, some microseconds each: torch has no counter that all ways to
    change a module tree count, but for hooks, whose handles are numbered. The root itself is not held: a plan hangs on
    it.
    """

    def __init__(self, root: nn.Module) -> None:
        self.modules = [m for m in root.modules() if m is not root]
        self.own = [vars(m) for m in self.modules]
        self.parents = [d for d in self.own if d["_modules"]]
        self.holders = [d for d in self.own if d["_parameters"]]
        found = [(d, name) for d in self.own for name in _CONSTANTS if name in d]
        self.owners, self.names = [d for d, _ in found], [name for _, name in found]
        kinds = dict.fromkeys((type(root), *map(type, self.modules)))
        self.classes = [kind for kind in kinds if kind.__module__ != "torch.nn.modules.container"]
        self.seen = self._look(root)
        self.parameters = [p for table in self._parameter_tables(root) for p in table.values() if p is not None]
        self.has_hooks = any(map(is_hooked, (root, *self.modules)))
        self.handles = RemovableHandle.next_id
        self.hooks = [hooks if hooks is None else dict(hooks) for hooks in self._hooks(root)]

    def _look(self, root: nn.Module) -> list[Any]:
        """All that is compared by identity, one behind the other."""
        seen: list[Any] = [has_global_hook(), type(root), *map(type, self.modules), *root._modules.values()]
        seen += chain.from_iterable(map(dict.values, map(_MODULES, self.parents)))
        seen += root._parameters.values()
        seen += chain.from_iterable(map(dict.values, map(_PARAMETERS, self.holders)))
        seen += map(dict.get, self.own, repeat("forward"))
        seen += map(getitem, self.owners, self.names)
        forwards = [*map(_FORWARD, self.classes)]
        seen += forwards
        seen += map(getattr, forwards, repeat("__code__"), repeat(None))
        return seen

    def _parameter_tables(self, root: nn.Module) -> Iterator[dict[str, Tensor | None]]:
        return chain((root._parameters,), map(_PARAMETERS, self.holders))

    def _hooks(self, root: nn.Module) -> list[dict | None]:
        return [*chain.from_iterable(map(_HOOKS, (vars(root), *self.own)))]

    def holds(self, root: nn.Module) -> bool:
        """Whether everything but values is as it was."""
        try:
            if self.has_hooks or self.handles != RemovableHandle.next_id:
                if self.hooks != self._hooks(root):
                    return False
                self.handles = RemovableHandle.next_id
            seen = self._look(root)
        except (AttributeError, KeyError, TypeError):  # something is gone
            return False
        return len(seen) == len(self.seen) and all(map(is_, seen, self.seen))


class Plan:
    """The derived state of one module: weights, and the values that their forms were made of."""

    checksums: ops.Checksums | None = None

    def __init__(self, root: nn.Module, weights: list[ops.Weight]) -> None:
        self.owner = ref(root)  # DataParallel copies a __dict__ as it is
        self.tree = Tree(root)
        self.weights = weights
        self.tensors = [p for p in self.tree.parameters if not p.is_meta]
        self.counts = not any(type(p) is not nn.Parameter or p.is_inference() for p in self.tensors)
        self.shapes = [*map(Tensor.numel, self.tensors), *map(Tensor.stride, self.tensors)]
        self.written()

    def written(self) -> None:
        """Drops all forms: parameters have been written to."""
        for weight in self.weights:
            if not weight.is_placeholder:
                weight.forms.clear()
        self.state: list[int] | None = None  # where each parameter lies, and its version
        self.checksums = None

    def holds(self, root: nn.Module) -> bool:
        """Whether the plan is of `root` as it is, values aside."""
        if self.owner() is not root or not self.counts or not self.tree.holds(root):
            return False
        return self.shapes == [*map(Tensor.numel, self.tensors), *map(Tensor.stride, self.tensors)]

    def look_for_writes(self, *, whole: bool) -> None:
        """Drops the forms of what was written to; at all values where `whole`, else at a part of them."""
        state = [*map(Tensor.data_ptr, self.tensors), *map(_VERSION, self.tensors)]
        if state != self.state or (self.checksums is not None and self.checksums.changed(whole=whole)):
            self.written()
        if self.state is None:
            self.state, self.checksums = state, ops.checksums_of(self.weights)

    def nbytes(self) -> int:
        """The memory that forms take, in addition to the parameters."""
        return sum(weight.nbytes() for weight in self.weights)

    # A copy of the owner, pickled or not, makes a plan of its own.
    def __reduce__(self) -> tuple:
        return type(None), ()

    def __deepcopy__(self, memo: dict) -> None:
        return None


class EncoderPlan(Plan):
    """The plan of a module with .embeddings, .encoder.layer and, it may be, .pooler.

    `foreign` says which part is not known to work token by token, of a live model: then there are no parts.
    """

    def __init__(self, bert: nn.Module, products: Products, verdict: Verdict | None = None) -> None:
        self.find_parts(bert, products, verdict)
        projections = [p for layer in self.layers if layer is not None for p in layer.projections]
        projections += [] if self.pooler is None else [self.pooler]
        super().__init__(bert, [p.weight for p in projections if p.weight is not None])

    def find_parts(self, bert: nn.Module, products: Products, verdict: Verdict | None) -> None:
        self.products, self.foreign = products, None if verdict is None else verdict(bert)
        self.modules: list[nn.Module] = []
        self.layers: list[Layer | None] = []
        self.pooler: Projection | None = None
        self.whole: ops.EncoderWeights | None = None
        self.drops: list[dict[str, Any]] = []
        # Of the buffers that stand for missing arguments: what each must hold, which one held it, and its version then.
        self.usual: dict[str, tuple[Tensor, Tensor, int | None]] = {}
        if self.foreign is not None:
            return
        self.modules = list(bert.encoder.layer)
        # What FSDP shards has its parameters during its own forward only.
        self.layers = [None if sharded(module) else Layer(module) for module in self.modules]
        self.embeddings = Embeddings(bert.embeddings)
        pooler = getattr(bert, "pooler", None)
        self.pooler = None if pooler is None else Projection(pooler.dense)
        self.drops = [vars(d) for layer in self.layers if layer is not None for d in layer.dropouts]
        self.whole = self._whole()

    def _whole(self) -> ops.EncoderWeights | None:
        pairs = zip(self.layers, self.modules, strict=True)
        found = [None if layer is None or is_hooked(m) else layer.weights(self.products) for layer, m in pairs]
        whole = [weights for weights in found if weights is not None]
        return ops.EncoderWeights(whole) if len(whole) == len(found) else None

    def multiply_as(self, products: Products) -> None:
        """The same parts in another precision; forms are kept by precision."""
        self.products = products
        self.whole = None if self.foreign is not None else self._whole()

    def written(self) -> None:
        super().written()
        if self.whole is not None:
            self.whole.forms.clear()

    @torch.no_grad()
    def release(self, index: int) -> None:
        """Lets the backend that runs layer `index` keep its own form of the weights alone: see ops.release."""
        layer = self.layers[index]
        weights = None if layer is None else layer.weights(self.products)
        if layer is None or weights is None or not ops.release(weights):
            return
        for projection, weight in zip(layer.projections, weights.products, strict=True):
            for module, placeholder in zip(projection.modules, weight.weights, strict=True):
                module.weight = placeholder


class _Untracked(EncoderPlan):
    """The parts alone, for one call: where the call is compiled, and Python's side of it vanishes."""

    def __init__(self, bert: nn.Module, products: Products, verdict: Verdict | None) -> None:
        self.find_parts(bert, products, verdict)


def encoder_plan(bert: nn.Module, products: Products, verdict: Verdict | None = None) -> EncoderPlan:
    """The plan of an encoder, made again where its modules have changed; its forms are those of the values now.

    `verdict` says of a live model which part is foreign; it is asked once for a plan.
    """
    if torch.compiler.is_compiling():
        return _Untracked(bert, products, verdict)
    plan = vars(bert).get(_PLAN)
    if plan is None or plan.products.activation != products.activation or not plan.holds(bert):
        vars(bert).pop(_PLAN, None)  # with all that it holds
        plan = EncoderPlan(bert, products, verdict)
        if plan.counts:
            vars(bert)[_PLAN] = plan
    elif plan.products != products:
        plan.multiply_as(products)
    if plan.counts:
        plan.look_for_writes(whole=torch.is_grad_enabled())
    return plan


def adopt(bert: nn.Module, plan: EncoderPlan) -> None:
    """Hangs a plan made before its layers gave up their weights on the encoder."""
    Plan.__init__(plan, bert, plan.weights)
    vars(bert)[_PLAN] = plan


def project(linear: nn.Module, x: Tensor, activation: str | None = None) -> Tensor:
    """A linear layer outside an encoder, a head's, with its activation; a plain one has a plan of its own."""
    projection = Projection(linear)
    if projection.weight is None or torch.compiler.is_compiling():
        return projection(x, activation)
    plan = vars(linear).get(_PLAN)
    if plan is None or not plan.holds(linear):
        plan = Plan(linear, [projection.weight])
        if plan.counts:
            vars(linear)[_PLAN] = plan
    if plan.counts:
        plan.look_for_writes(whole=torch.is_grad_enabled())
    start = time.perf_counter()
    y = ops.linear(x, plan.weights[0], activation=activation)
    if plan.checksums is not None:
        plan.checksums.seconds = time.perf_counter() - start
    return y


def freshness(module: nn.Module) -> str | None:
    """When the plan of a module, if it has one, sees writes to weights that bypass the version counter; a sentence."""
    plan = vars(module).get(_PLAN)
    if plan is None or plan.state is None:
        return None
    if plan.checksums is None:
        return "writes to weights through .data are not seen; fastbert.refresh(model): at once"
    calls = plan.checksums.calls_until_seen()
    bound = f"after at most {calls} calls like the last one"
    return f"writes to weights through .data are seen {bound}; fastbert.refresh(model): at once"


def forget_forms(module: nn.Module) -> None:
    """Drops what the plan of a module, if there is one, has made of weights: see `fastbert.refresh`."""
    plan = vars(module).get(_PLAN)
    if plan is not None:
        plan.written()


def forget(module: nn.Module) -> None:
    """Takes the plan, if there is one, from a module."""
    vars(module).pop(_PLAN, None)
