"""The graph of a module: by torch.fx where it can, else by torch.export."""

import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from symflow.arch.rules import find_rule
from symflow.arch.running import tensors_of
from symflow.errors import UnsupportedModuleError

# In front of the names of parameters in graphs that torch.export makes.
WRAPPED = "wrapped."


def graphs_of(module: nn.Module, inputs: tuple[Any, ...]) -> Iterator[fx.GraphModule]:
    """Yield graphs of a module in evaluation mode, the one that tells most first.

    torch.fx keeps modules that have a rule as they are, but stumbles over control flow;
    torch.export follows that on the example inputs, and knows ATen operations only. The last graph
    has those without a rule taken apart.

    Raises
    ------
    UnsupportedModuleError
        If neither of them can; it names the line.
    """
    if find_rule(type(module)) is not None:
        # torch.fx would trace the inside of a root; a lone layer must be seen as one.
        raise UnsupportedModuleError(
            f"{type(module).__name__} is a single layer: wrap it, as in nn.Sequential(layer)"
        )
    failed = None
    try:
        graph = fx.GraphModule(module, _Tracer().trace(module))
    except Exception as error:
        failed = error
    else:
        yield graph
    try:
        exported = _exported(module, inputs)
    except Exception as second:
        if failed is None:
            return
        place = _place(failed)
        raise UnsupportedModuleError(
            f"torch.fx cannot trace {type(module).__name__}: {failed} (at {place}); neither can "
            f"torch.export: {str(second).partition(chr(10))[0]} (at {_place(second)}). Move "
            "what they cannot trace into a submodule and register a rule for that with "
            "symflow.arch.rule"
        ) from failed
    yield exported.module(check_guards=False)
    try:
        apart = _taken_apart(exported)
    except Exception:
        return  # the graphs before have told what is missing
    yield apart


def _place(error: Exception) -> str:
    """Return the last line of the module's own code that an error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "torch/" not in f.filename.replace("\\", "/")]
    own = [f for f in own if f.filename != __file__] or own
    frame = own[-1] if own else frames[-1]
    return f"{frame.filename}:{frame.lineno}: {frame.line}"


class _Tracer(fx.Tracer):
    """Stops at every module that has a rule, and at PyTorch's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if find_rule(type(m)) is not None:
            return True
        return fx.Tracer.is_leaf_module(self, m, module_qualified_name)


@final
class _Tensors(nn.Module):
    """A module that returns tensors alone, whatever structure the wrapped one returns."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(tensors_of(self.wrapped(*inputs)))


def _exported(module: nn.Module, inputs: tuple[Any, ...]) -> ExportedProgram:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(_Tensors(module).eval(), inputs, strict=False)


def _taken_apart(exported: ExportedProgram) -> fx.GraphModule:
    """Write operations without a rule as others, where PyTorch knows how."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        table = torch.export.default_decompositions()
        for known in [one for one in table if find_rule(one) is not None]:
            del table[known]
        return exported.run_decompositions(table).module(check_guards=False)


@final
@dataclass(frozen=True)
class Turn:
    """A rotary embedding in a graph.

    Attributes
    ----------
    x
        The node of what it turns.
    pairing
        Which units are pairs, as in :class:`symflow.groups.Rotary`.
    between
        The nodes from there to the result.
    """

    x: fx.Node
    pairing: str
    between: frozenset[fx.Node]


def rotary_pairs(graph: fx.Graph) -> dict[fx.Node, Turn]:
    """Find rotary embeddings, ``x cos + turned(x) sin`` (Su et al., 2021), by their results.

    Units are turned in pairs: those of two halves (Llama), or neighbours (GPT-J).
    """
    results: dict[fx.Node, Turn] = {}
    for node in graph.nodes:
        if _name(node) not in ("add", "add_") or len(node.args) < 2:
            continue
        for plain, turned in (node.args[:2], node.args[1::-1]):
            found = _rotated(plain, turned)
            if found is not None:
                results[node] = found
    return results


def _rotated(plain: Any, turned: Any) -> Turn | None:
    if _name(plain) != "mul" or _name(turned) != "mul":
        return None
    for other in turned.args[:2]:
        pairing, joined = "half", other
        if _name(other) in ("flatten", "view", "reshape", "_unsafe_view"):
            pairing, joined = "interleaved", other.args[0]
        if _name(joined) not in (("cat", "concat") if pairing == "half" else ("stack",)):
            continue
        if len(joined.args[0]) != 2:
            continue
        negated, first = joined.args[0]
        if _name(negated) != "neg" or not isinstance(negated.args[0], fx.Node):
            continue
        second = negated.args[0]
        cut = ("slice", "getitem")
        if _name(second) in cut and _name(first) in cut and second.args[0] is first.args[0]:
            x = first.args[0]
            if x in plain.args[:2]:
                between = {plain, turned, other, joined, negated, first, second}
                return Turn(x, pairing, frozenset(between))
    return None


def _name(node: Any) -> str:
    """Return what an operation is called, without its overload."""
    if not isinstance(node, fx.Node):
        return ""
    packet = getattr(node.target, "overloadpacket", node.target)
    return packet if isinstance(packet, str) else getattr(packet, "__name__", "")


_MOVES = ("permute", "transpose")
_TAKES = ("unbind", "select", "getitem")


def takes_apart(node: fx.Node) -> bool:
    """Whether an operation moves dimensions about, or takes one apart."""
    return _name(node) in (*_MOVES, *_TAKES)


def unstacked_dim(node: fx.Node, rank: int) -> int | None:
    """Return the dimension of a reshaped tensor that is taken apart, place by place, later on."""
    if _name(node) not in ("view", "reshape", "unflatten", "_unsafe_view") or rank < 3:
        return None
    taken = [_taken(user, node, list(range(rank))) for user in node.users]
    first = taken[0] if taken else None
    return first if all(found == first for found in taken) else None


def _taken(node: fx.Node, x: fx.Node, order: list[int]) -> int | None:
    """Return which dimension is taken apart; ``order`` says where they stand in ``x`` by now."""
    args = list(node.args[1:]) + [node.kwargs[k] for k in ("dim",) if k in node.kwargs]
    name = _name(node)
    if name in _MOVES and node.args[0] is x:
        if name == "permute":
            flat = args[0] if isinstance(args[0], tuple | list) else args
            moved = [order[int(str(k))] for k in flat]
        else:
            moved = list(order)
            i, j = (int(str(k)) for k in args[:2])
            moved[i], moved[j] = moved[j], moved[i]
        taken = [_taken(user, node, moved) for user in node.users]
        return taken[0] if taken and all(found == taken[0] for found in taken) else None
    if name in ("unbind", "select"):
        return order[int(str(args[0])) if args else 0]
    if name == "getitem":
        keys: list[Any] = list(args[0]) if isinstance(args[0], tuple) else [args[0]]
        if Ellipsis in keys:
            at = keys.index(Ellipsis)
            keys[at : at + 1] = [slice(None)] * (len(order) - len(keys) + 1)
        places = [k for k, key in enumerate(keys) if isinstance(key, int)]
        others = [key for key in keys if not isinstance(key, int)]
        if len(places) == 1 and all(key == slice(None) for key in others):
            return order[places[0]]
    return None
