"""A plugin of mypy: an attribute of a module that its class does not declare is Any.

torch types such an attribute as Tensor | Module, so that a module tree given by a user could not be walked without a
cast at every step. What a class declares, or sets in __init__, keeps its type.
"""

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny, UnionType, get_proper_type


class Modules(Plugin):
    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return _undeclared if fullname.startswith("torch.nn.modules.module.Module.") else None


def _undeclared(attribute: AttributeContext) -> Type:
    found = get_proper_type(attribute.default_attr_type)
    if isinstance(found, UnionType) and {str(item).rpartition(".")[2] for item in found.items} == {"Tensor", "Module"}:
        return AnyType(TypeOfAny.explicit)
    return found


def plugin(version: str) -> type[Plugin]:
    return Modules
