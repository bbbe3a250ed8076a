"""How an operator is made known to torch.

``torch.library.custom_op`` does the same, but that of torch 2.13 reads the schema at each call of
an operator that writes to its arguments: 77 of the 96 microseconds of a norm, on a CPU where
``torch.neg`` takes 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cute_quant.contract.torch_private import BELOW_VERSIONS, increment_version, outside_of_graphs

_libraries: dict[str, Any] = {}
"""Those of an operator each, which are held as long as it is to be there."""
_VMAP = "torch.vmap is not supported: quantize the batch as leading dimensions instead"


def not_differentiable(function: str, name: str) -> str:
    """Return what to say of an argument that requires a gradient."""
    return (
        f"{name}: expected a tensor that requires no gradient, since {function} is not "
        "differentiable; got one that does: detach it or call under torch.no_grad()"
    )


def register(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    inputs: str,
) -> None:
    """Make ``torch.ops.cute_quant`` have an operator.

    Args:
        name: its name.
        schema: its arguments and results, as torch writes them.
        run: computes it.
        fake: allocates its results, of tensors without memory.
        inputs: what must require no gradient, as its errors name it.
    """
    library: Any = torch.library.Library("cute_quant", "FRAGMENT")  # type: ignore[no-untyped-call]
    # Where a module is loaded again, this frees the name that it took before.
    _libraries[name] = library
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.cute_quant, name).default
    written = [
        i
        for i, argument in enumerate(operator._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(not_differentiable(name, inputs))

    def write(keys: Any, *arguments: Any, **options: Any) -> Any:
        # torch has no formula of gradients for what writes to its arguments.
        if torch.is_grad_enabled() and any(
            isinstance(t, torch.Tensor) and t.requires_grad for t in arguments
        ):
            refuse()
        increment_version([t for i in written if (t := arguments[i]) is not None])
        return operator.redispatch(keys & BELOW_VERSIONS, *arguments, **options)

    library.impl(name, outside_of_graphs(run), "CompositeExplicitAutograd")
    torch.library.register_fake(operator, fake, lib=library)
    torch.library.register_vmap(operator, _refuse_vmap, lib=library)
    if written:
        library.impl(name, outside_of_graphs(write), "ADInplaceOrView", with_keyset=True)
    else:
        torch.library.register_autograd(operator, refuse, setup_context=refuse, lib=library)


def _refuse_vmap(*_: object, **__: object) -> None:
    raise RuntimeError(_VMAP)
