"""Plans: the state derived from a module tree, its owner, and the check that it is still valid.

A plan is an attribute of the module that it was made from, and is freed with it. It holds the parts of the tree, their
`Weight`s with the forms that backends derive (packed panels, transposes, 8-bit rows, the descriptors that C++ takes),
and a record of what all that was made from. There is no other cache, and no other check of validity.

The next call detects:
* modules that were replaced, hooked, wrapped, or given an instance `forward`; changed constants like a norm's eps;
* parameters that were replaced, moved, or written to through the version counter: by optimizers, load_state_dict,
  in-place ops;
* writes to biases and norms by any means.
On the CPU, checksums detect writes to weights that bypass the version counter (through .data or numpy): with gradients
at the next call, without after at most `Checksums.calls_until_seen` calls. On a GPU, comparing values would wait for
the device: there the user reports such writes by `fastbert.refresh`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import chain, repeat
from operator import attrgetter, itemgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastbert import ops
from fastbert.families import BERT, Family
from fastbert.families.layer_kinds import layer_kinds, place_count
from fastbert.model.layer import (
    Dropout,
    Embeddings,
    Layer,
    Norm,
    Products,
    Projection,
    Seen,
    has_global_hook,
    is_hooked,
    sharded,
)
from fastbert.model.positions import alibi_bias, bias_of_table, frequencies, rotary_table

_PLAN = "_fastbert_plan"
# Fields of a config that tables of positions and kinds of layers come from.
_SETTINGS = (
    *("max_position_embeddings", "n_positions", "num_hidden_layers", "local_attention", "layer_types"),
    *("global_attn_every_n_layers", "rope_parameters", "rope_scaling", "rope_theta"),
    *("global_rope_theta", "local_rope_theta"),
)
Verdict = Callable[[nn.Module], str | None]
_MODULES, _PARAMETERS, _FORWARD = itemgetter("_modules"), itemgetter("_parameters"), attrgetter("forward")
_VERSION = attrgetter("_version")
_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Attributes of modules that a plan depends on.
_CONSTANTS = (
    *(
        "eps",
        "variance_epsilon",
        "attention_head_size",
        "head_dim",
        "scaling",
        "sliding_window",
        "num_key_value_groups",
    ),
    *("padding_idx", "max_norm", "sparse", "scale_grad_by_freq", "attention_type", "attention_scaling"),
    *("full_attention_attention_scaling", "sliding_attention_attention_scaling"),
)


class Tree:
    """A snapshot of the modules below a root: their identities, classes, hooks, constants and parameters.

    Everything is compared by one loop in C++: torch has no counter of changes to a module tree, except for hooks, whose
    handles are numbered. The root itself is not referenced, as it owns the plan.
    """

    def __init__(self, root: nn.Module) -> None:
        self.modules = [m for m in root.modules() if m is not root]
        self.own = [vars(m) for m in self.modules]
        self.root_type, self.root_tables = type(root), (root._modules, root._parameters)
        parents, holders = ([d for d in self.own if d[name]] for name in ("_modules", "_parameters"))
        entries = [(d, "forward") for d in self.own]
        entries += [(d, "_modules") for d in parents] + [(d, "_parameters") for d in holders]
        entries += [(d, name) for d in self.own for name in _CONSTANTS if name in d]
        tables = [*self.root_tables, *map(_MODULES, parents), *map(_PARAMETERS, holders)]
        self.same = ops.SameObjects(self.modules, entries, tables)
        kinds = dict.fromkeys((type(root), *map(type, self.modules)))
        self.classes = [kind for kind in kinds if kind.__module__ != "torch.nn.modules.container"]
        self.code = self._code()
        tables = [root._parameters, *map(_PARAMETERS, holders)]
        self.parameters = [p for table in tables for p in table.values() if p is not None]
        self.has_hooks = any(map(is_hooked, (root, *self.modules)))
        self.handles = RemovableHandle.next_id
        self.hooks = [hooks if hooks is None else dict(hooks) for hooks in self._hooks(root)]

    def _code(self) -> list[Any]:
        """The forwards of all classes and their code, and whether a hook for all modules is registered."""
        forwards = [*map(_FORWARD, self.classes)]
        return [bool(has_global_hook()), *forwards, *map(getattr, forwards, repeat("__code__"), repeat(None))]

    def _hooks(self, root: nn.Module) -> list[dict | None]:
        return [*chain.from_iterable(map(_HOOKS, (vars(root), *self.own)))]

    def holds(self, root: nn.Module) -> bool:
        """True if everything but the parameters' values is unchanged."""
        if self.has_hooks or self.handles != RemovableHandle.next_id:
            if self.hooks != self._hooks(root):
                return False
            self.handles = RemovableHandle.next_id
        if type(root) is not self.root_type or self._code() != self.code:
            return False
        modules, parameters = self.root_tables
        return root._modules is modules and root._parameters is parameters and self.same.hold()


class Plan:
    """The derived state of one module: its weights, and a record of the values that their forms were made from."""

    checksums: ops.Checksums | None = None

    def __init__(self, root: nn.Module, weights: list[ops.Weight]) -> None:
        self.owner = ref(root)  # detects copies: DataParallel copies a __dict__ as it is
        self.tree = Tree(root)
        self.weights = weights
        self.tensors = [p for p in self.tree.parameters if not p.is_meta]
        self.counts = not any(type(p) is not nn.Parameter or p.is_inference() for p in self.tensors)
        self.shapes = [*map(Tensor.numel, self.tensors), *map(Tensor.stride, self.tensors)]
        self.written()

    def written(self) -> None:
        """Drops all forms after a write to parameters."""
        for weight in self.weights:
            if not weight.is_placeholder:
                weight.forms.clear()
        self.state: list[int] | None = None  # each parameter's address and version
        self.checksums = None

    def holds(self, root: nn.Module) -> bool:
        """True if the plan is valid for `root`, apart from the parameters' values."""
        if self.owner() is not root or not self.counts or not self.tree.holds(root):
            return False
        return self.shapes == [*map(Tensor.numel, self.tensors), *map(Tensor.stride, self.tensors)]

    def look_for_writes(self, *, whole: bool) -> None:
        """Drops the forms after a write; checksums compare all values if `whole`, else a part of them."""
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
    """The plan of an encoder: a module with embeddings and layers where its family has them and, optionally, a pooler.

    `foreign` names a part of a live model that is not known to work per token; the plan then has no parts.
    """

    def __init__(
        self, bert: nn.Module, products: Products, verdict: Verdict | None = None, family: Family = BERT
    ) -> None:
        self.find_parts(bert, products, verdict, family)
        projections = [p for layer in self.layers if layer is not None for p in layer.projections]
        projections += [] if self.pooler is None else [self.pooler]
        last = None if self.foreign is not None else self.embeddings.projection
        projections += [] if last is None else [last]
        super().__init__(bert, [p.weight for p in projections if p.weight is not None])

    def find_parts(self, bert: nn.Module, products: Products, verdict: Verdict | None, family: Family) -> None:
        self.family = family
        self.products, self.foreign = products, None if verdict is None else verdict(bert)
        self.modules: list[nn.Module] = []
        self.seen: list[Seen] = []
        self.layers: list[Layer | None] = []
        self.pooler: Projection | None = None
        self.whole: ops.EncoderWeights | None = None  # of ops.encoder
        self.batch: ops.BatchWeights | None = None  # of ops.encode_batch
        self.distance_table: nn.Module | None = None
        self.slopes: tuple[int, int, torch.device] | None = None  # the arguments of `alibi_bias`
        self.drops: list[Dropout] = []
        self.final_norm: Norm | None = None
        self.settings: tuple[Any, ...] = ()
        self.angles: list[tuple[Tensor, int, Tensor]] = []  # buffers, their versions and values
        # By name of a missing argument: the values its buffer must hold, the buffer that held them, its version then.
        self.usual: dict[str, tuple[Tensor, Tensor, int | None]] = {}
        if self.foreign is not None:
            return
        self.modules = list(family.layers(bert))
        config: Any = getattr(bert, "config", None)
        self.settings, self.seen, self.angles = _settings(bert, family), self._seen(bert), _angles(bert, family)
        # A layer that FSDP shards has its parameters only during its own forward.
        pairs = zip(self.modules, self.seen, strict=True)
        self.layers = [None if sharded(module) else Layer(module, family, seen) for module, seen in pairs]
        if family.final_norm is not None:
            self.final_norm = Norm(bert.get_submodule(family.final_norm), None, family.rms)
        self.embeddings = Embeddings(bert, family)
        self.places = 0 if family.embeddings.positions is not None else place_count(config, family)
        self.first_position = family.first_position(bert)
        pooler = getattr(bert, "pooler", None)
        self.pooler = None if pooler is None else Projection(pooler.dense)
        if family.alibi:
            device = next(bert.parameters()).device
            self.slopes = config.num_attention_heads, self.places, device
        path = family.distance_table
        self.distance_table = None if path is None else bert.get_submodule(path)
        self.drops = [d for layer in self.layers if layer is not None for d in layer.dropouts]
        self._find_wholes()

    def _find_wholes(self) -> None:
        """Finds the weights that ops of several parts take; None where a part is not plain."""
        pairs = zip(self.layers, self.modules, strict=True)
        found = [None if layer is None or is_hooked(m) else layer.weights(self.products) for layer, m in pairs]
        layers = [weights for weights in found if weights is not None]
        last, plain, norm = None, len(layers) == len(found), self.final_norm
        if norm is not None:
            plain = plain and bool(layers) and norm.is_plain and norm.eps == layers[-1].eps
            last = norm.tensors() if plain else None
        self.whole = ops.EncoderWeights(layers, last) if plain else None
        embeddings, pooler = self.embeddings, None if self.pooler is None else self.pooler.weight
        self.batch = None
        if self.whole is not None and embeddings.all_plain and (self.pooler is None or pooler is not None):
            places = 0 if embeddings.positions is not None else self.places
            self.batch = ops.BatchWeights(*embeddings.tensors(), self.whole, pooler, places)

    def _seen(self, bert: nn.Module) -> list[Seen]:
        """The table and window of each layer."""
        if self.family.rotary is None:
            return [Seen()] * len(self.modules)
        config: Any = bert.config
        found: list[Seen] = []
        for kind in layer_kinds(config, self.family)[: len(self.modules)]:
            width = config.hidden_size // config.num_attention_heads
            steps = frequencies(kind, width, bert._modules.get(self.family.rotary))
            device = next(bert.parameters()).device
            found.append(Seen(rotary_table(steps, place_count(config, self.family), device), kind.window))
        return found

    def layer_of(self, i: int, module: nn.Module) -> Layer:
        """Layer i, of a module that has its parameters now."""
        return Layer(module, self.family, self.seen[i])

    def bias(self) -> Tensor | None:
        """The bias of attention, for ops.attention; None in most families. It is a few operations on a small table."""
        if self.slopes is not None:
            return alibi_bias(*self.slopes)
        if self.distance_table is None:
            return None
        return bias_of_table(self.distance_table, len(self.embeddings.positions.weight))

    def holds(self, root: nn.Module) -> bool:
        if not super().holds(root):
            return False
        if self.foreign is not None:
            return True
        return self.settings == _settings(root, self.family) and _same_angles(root, self.family, self.angles)

    def multiply_as(self, products: Products) -> None:
        """Switches to another precision; the forms are keyed by precision."""
        self.products = products
        if self.foreign is None:
            self._find_wholes()

    def written(self) -> None:
        super().written()
        if self.whole is not None:
            self.whole.forms.clear()

    @torch.no_grad()
    def release(self, index: int) -> None:
        """Frees the weights of layer `index` if its backend reads a form of its own: see ops.release."""
        layer = self.layers[index]
        weights = None if layer is None else layer.weights(self.products)
        if layer is None or weights is None or not ops.release(weights):
            return
        for projection, weight in zip(layer.projections, weights.products, strict=True):
            for module, placeholder in zip(projection.modules, weight.weights, strict=True):
                module.weight = placeholder


def _settings(bert: nn.Module, family: Family) -> tuple[Any, ...]:
    """The device and the settings of tables of positions and kinds of layers; empty where positions are learned."""
    if family.embeddings.positions is not None:
        return ()
    own: dict[str, Any] = vars(bert.config)
    given = [own.get(name, own.get("extra", {}).get(name)) for name in _SETTINGS]
    # What can be changed in place is copied.
    return next(bert.parameters()).device, *(repr(x) if isinstance(x, list | dict) else x for x in given)


def _buffers(bert: nn.Module, family: Family) -> list[Tensor]:
    """Those that rotary angles come from, in a live model."""
    module = None if family.rotary is None else bert._modules.get(family.rotary)
    return [] if module is None else [b for b in module._buffers.values() if b is not None]


def _version(buffer: Tensor) -> int:
    return 0 if buffer.is_inference() else buffer._version


def _angles(bert: nn.Module, family: Family) -> list[tuple[Tensor, int, Tensor]]:
    return [(b, _version(b), b.detach().clone()) for b in _buffers(bert, family)]


def _same_angles(bert: nn.Module, family: Family, angles: list[tuple[Tensor, int, Tensor]]) -> bool:
    now = _buffers(bert, family)
    if len(now) != len(angles):
        return False
    for b, (known, version, values) in zip(now, angles, strict=True):
        if b is not known or _version(b) != version:
            return False
        if b.is_cpu and not torch.equal(b, values):  # a write through .data; elsewhere it would wait for the device
            return False
    return True


class _Untracked(EncoderPlan):
    """The parts alone, for one call under torch.compile, where Python state does not outlive the trace."""

    def __init__(self, bert: nn.Module, products: Products, verdict: Verdict | None, family: Family) -> None:
        self.find_parts(bert, products, verdict, family)


def encoder_plan(
    bert: nn.Module, products: Products, verdict: Verdict | None = None, family: Family = BERT
) -> EncoderPlan:
    """The plan of an encoder, rebuilt if its modules have changed and without forms that are known to be stale.

    `verdict` returns the foreign part of a live model, or None; it is called once per plan.
    """
    if torch.compiler.is_compiling():
        return _Untracked(bert, products, verdict, family)
    plan = vars(bert).get(_PLAN)
    if plan is None or plan.products.activation != products.activation or not plan.holds(bert):
        vars(bert).pop(_PLAN, None)  # with all that it holds
        plan = EncoderPlan(bert, products, verdict, family)
        if plan.counts:
            vars(bert)[_PLAN] = plan
    elif plan.products != products:
        plan.multiply_as(products)
    if plan.counts:
        plan.look_for_writes(whole=torch.is_grad_enabled())
    return plan


def adopt(bert: nn.Module, plan: EncoderPlan) -> None:
    """Attaches to the encoder a plan that was made before its layers' weights were freed."""
    Plan.__init__(plan, bert, plan.weights)
    vars(bert)[_PLAN] = plan


def project(linear: nn.Module, x: Tensor, activation: str | None = None) -> Tensor:
    """Runs a linear layer outside an encoder, such as a head's; a plain one has a plan of its own."""
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
    """A sentence on when a module's plan detects writes that bypass the version counter; None without a plan."""
    plan = vars(module).get(_PLAN)
    if plan is None or plan.state is None:
        return None
    if plan.checksums is None:
        return "writes to weights through .data are not seen; fastbert.refresh(model): at once"
    calls = plan.checksums.calls_until_seen()
    bound = f"after at most {calls} calls like the last one"
    return f"writes to weights through .data are seen {bound}; fastbert.refresh(model): at once"


def forget_forms(module: nn.Module) -> None:
    """Drops the forms of a module's plan, if it has one: see `fastbert.refresh`."""
    plan = vars(module).get(_PLAN)
    if plan is not None:
        plan.written()


def forget(module: nn.Module) -> None:
    """Removes the plan of a module, if it has one."""
    vars(module).pop(_PLAN, None)
