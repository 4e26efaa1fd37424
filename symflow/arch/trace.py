"""From a module to its axes: its graph is run, the rules label it, union-find ties axes."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from symflow.arch.finish import Trace, finish
from symflow.arch.graphs import (
    WRAPPED,
    graphs_of,
    rotary_pairs,
    takes_apart,
    unstacked_dim,
)
from symflow.arch.labels import FIXED, Atom, Label
from symflow.arch.rules import Activation, Value, find_rule, require_rule
from symflow.arch.tracing import Tracing
from symflow.errors import ShapeError, UnsupportedModuleError


@final
@dataclass(frozen=True)
class Call:
    """One operation of the graph, as a rule sees it.

    Attributes
    ----------
    tracing
        What has been collected so far.
    target
        The module class, function or method name that the rule was found under.
    path
        Where in the module it stands (``blocks.0.linear``).
    module
        The module itself; for functions the traced root.
    shape
        Shape of the result on the example inputs.
    unstacked
        A dimension of the result that is taken apart later on (queries, keys and values made by one
        map), if there is one.

    Examples
    --------
    >>> import symflow
    >>> class Scale(nn.Module):
    ...     weight = nn.Parameter(torch.ones(3))
    ...     forward = lambda self, x: self.weight * x
    >>> @symflow.arch.rule(Scale)
    ... def scale(call, x):
    ...     call.label("weight", symflow.arch.FIXED)
    ...     return call.elementwise(x, symflow.arch.Activation())
    """

    tracing: Tracing
    target: Any
    path: str
    module: Any
    shape: tuple[int, ...]
    unstacked: int | None = None

    def new_axis(self, size: int) -> Label:
        """Open an axis for an outgoing dimension of ``size`` units."""
        return self.tracing.new_axis(size, self.path)

    def permuted(self, label: Label) -> Label:
        """Return a dimension that is permuted with another one, but not scaled."""
        return self.tracing.permuted(label)

    def contract(self, a: Label, b: Label, others: list[Label]) -> None:
        """Sum over two dimensions: where one is multiplied by A, the other is by A^-T.

        ``others`` are the dimensions that are left.
        """
        for summed in (a, b):
            self.tracing.share(summed, others)
        self.tracing.unify(a, b.dual(), f"contracted with something that stays, at {self.path}")

    def label(self, leaf: str, *dims: Label) -> str:
        """Say what the dimensions of one of the module's own leaves run over; return its key."""
        name = f"{self.path}.{leaf}" if self.path else leaf
        self.tracing.label(name, dims)
        return name

    def elementwise(self, x: Value, activation: Activation) -> Value:
        """Pass ``x`` through a function of single elements: what it does not commute with, ends."""
        for dim in x.dims:
            self.tracing.weaken(dim, activation, self.name)
        power = activation.homogeneous or 1
        dims = tuple(dim.each(lambda atom: atom.power(power)) for dim in x.dims)
        return Value(self.shape if len(self.shape) == len(dims) else x.shape, dims)

    def run(self, name: str, *values: Value, **options: Any) -> Any:
        """Pass values through a submodule that has a rule, for rules of modules made of others."""
        module = self.module.get_submodule(name)
        path = f"{self.path}.{name}" if self.path else name
        rule = require_rule(type(module), path)
        call = Call(self.tracing, type(module), path, module, ())
        if isinstance(rule, Activation):
            return call.elementwise(values[0], rule)
        return rule(call, *values, **options)

    def add(self, x: Value, y: Value) -> Value:
        """Add two values of one shape."""
        rule: Any = require_rule(operator.add, self.path)
        return rule(replace(self, target=operator.add, shape=x.shape), x, y)

    @property
    def name(self) -> str:
        """What the operation is called."""
        return self.target if isinstance(self.target, str) else self.target.__name__


def trace(
    module: nn.Module,
    inputs: tuple[Any, ...],
    names: dict[str, str],
    frozen: frozenset[str] = frozenset(),
    limit: bool = False,
) -> Trace:
    """Trace a module and label every leaf.

    Parameters
    ----------
    module
        The network, in evaluation mode.
    inputs
        Example inputs; the first dimension of each is the batch.
    names
        From every key of the state dict to its canonical one (tied weights share a canonical key).
    frozen
        Canonical keys of leaves that must stay as they are.
    limit
        Whether scales count that are exact only as the eps of normalisation layers goes to zero.

    Raises
    ------
    UnsupportedModuleError
        If neither torch.fx nor torch.export can trace the module, or an operation has no rule; it
        names the place.
    """
    failed: list[Exception] = []
    for graph in graphs_of(module, inputs):
        try:
            return _traced(graph, module, inputs, names, frozen, limit)
        except (UnsupportedModuleError, ShapeError) as error:
            failed.append(error)
    raise failed[0]  # of the graph that is most like the module


def _traced(
    graph: fx.GraphModule,
    module: nn.Module,
    inputs: tuple[Any, ...],
    names: dict[str, str],
    frozen: frozenset[str],
    limit: bool,
) -> Trace:
    tracing = Tracing(names, limit=limit)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    interpreter = _Interpreter(graph, tracing, parameters)
    with torch.no_grad():
        # Clones: a first layer may work in place.
        interpreter.run(*(x.clone() if isinstance(x, Tensor) else x for x in inputs))
    for value in interpreter.results:
        for dim in value.dims:
            tracing.fix(dim, "read out: the order and sign of the outputs have a meaning")
    for key in frozen & tracing.leaves.keys():
        for dim in tracing.leaves[key]:
            tracing.fix(dim, f"{key} is frozen")
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    return finish(tracing, interpreter.results[0].made_by, shapes)


class _Interpreter(fx.Interpreter):
    """Runs the graph on example inputs and carries the labels along."""

    def __init__(
        self, graph: fx.GraphModule, tracing: Tracing, parameters: Mapping[str, Tensor]
    ) -> None:
        fx.Interpreter.__init__(self, graph)
        self.extra_traceback = False  # torch.fx would append its own lines to our errors
        self.tracing = tracing
        self.parameters = parameters
        self.labels: dict[fx.Node, Any] = {}
        self.results: list[Value] = []
        self.rotary = rotary_pairs(graph.graph)
        self.between = {node for turn in self.rotary.values() for node in turn.between}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; label its result if that is a tensor."""
        result = fx.Interpreter.run_node(self, n)
        if n.op == "output":
            label: Any = map_aggregate(n.args[0], self._label)
            map_aggregate(label, self._read)
            if not self.results:
                raise UnsupportedModuleError(
                    f"the module must return tensors, it returns {type(result).__name__}"
                )
        elif _has_tensors(result):
            self.labels[n] = self._apply(n, result)
        return result

    def _apply(self, n: fx.Node, result: Any) -> Any:
        shape = tuple(result.shape) if isinstance(result, Tensor) else ()
        if n.op == "placeholder" or n in self.between:
            return map_aggregate(result, _unlabelled)
        if n in self.rotary:
            return self._turned(n)
        if n.op == "get_attr":
            return self._parameter(str(n.target), result, n)
        args: Any = map_aggregate(n.args, self._label)
        options: Any = map_aggregate(n.kwargs, self._label)
        if n.target is operator.getitem and not isinstance(args[0], Value):
            return _part(args[0][args[1]], n)
        if n.op != "call_module" and "axis" in options and "dim" not in options:
            options = {**options, "dim": options["axis"]}  # NumPy's name for it
            del options["axis"]
        target, path, module = n.target, n.name, self.module
        if n.op == "call_module":
            path = str(n.target)
            module = self.module.get_submodule(path)
            target = type(module)
        if find_rule(target) is None and not self._moves(args, options):
            return map_aggregate(result, _unlabelled)  # whatever it does with what stays
        rule = require_rule(target, path)
        call = Call(self.tracing, target, path, module, shape, unstacked_dim(n, len(shape)))
        if not takes_apart(n):
            map_aggregate((args, options), self._together)
        if isinstance(rule, Activation):
            value = call.elementwise(_first_value(args, options, path), rule)
        else:
            value = _run(rule, call, args, options)
        if _in_place(n) and isinstance(n.args[0], fx.Node):
            self.labels[n.args[0]] = value
        if isinstance(result, Tensor) and value.shape != shape:
            raise ShapeError(
                f"the rule for {path!r} labels a result of shape {value.shape}, but it is {shape}"
            )
        return value

    def _parameter(self, name: str, value: Tensor, n: fx.Node) -> Value:
        """Label a parameter used as it is: what acts on it follows from what is done with it."""
        name = name.removeprefix(WRAPPED)
        shape = tuple(value.shape)
        # Buffers move only where they are statistics; others are tables, of positions say.
        moves = name in self.parameters or any("batch_norm" in str(u.target) for u in n.users)
        if not value.is_floating_point() or name not in self.tracing.names or not moves:
            return _unlabelled(value)
        dims = tuple(self.tracing.new_axis(size, name) if size > 1 else FIXED for size in shape)
        self.tracing.label(name, dims)
        return Value(shape, dims, (self.tracing.names[name],))

    def _turned(self, n: fx.Node) -> Value:
        """Label what rotary embeddings turn: only what commutes with them still acts."""
        turn = self.rotary[n]
        x: Value = self._label(turn.x)
        call = Call(self.tracing, "rotary embeddings", n.name, self.module, x.shape)
        for dim in x.dims[:-1]:
            self.tracing.weaken(dim, Activation(), call.name)
        self.tracing.pair(x.dims[-1], turn.pairing, call.name)
        return x

    def _moves(self, args: Any, options: Any) -> bool:
        """Whether something acts on any of the values."""
        found: list[Atom] = []

        def look(x: Any) -> Any:
            if isinstance(x, Value):
                for dim in x.dims:
                    found.extend(self.tracing.resolve(dim).atoms)
            return x

        map_aggregate((args, options), look)
        return bool(found)

    def _together(self, x: Any) -> Any:
        """Fix what was to be taken apart, for operations that need it as a whole."""
        if isinstance(x, Value) and x.stacked is not None:
            for place in x.stacked[1]:
                for dim in place.dims:
                    self.tracing.fix(dim, "parts of a map that are used together")
        return x

    def _read(self, x: Any) -> Any:
        if isinstance(x, Value):
            self.results.append(x)
        return x

    def _label(self, x: Any) -> Any:
        """Return the label of a node; where it has none (a size, say) what it is."""
        if not isinstance(x, fx.Node):
            return x
        return self.labels[x] if x in self.labels else self.env[x]


def _part(part: Any, n: fx.Node) -> Any:
    """Return one of several results; what it ties is tied if anything uses it."""
    return part(used=bool(n.users)) if callable(part) else part


def _in_place(n: fx.Node) -> bool:
    """Whether an operation changes its first argument, and is not assigned to it."""
    name = getattr(getattr(n.target, "overloadpacket", n.target), "__name__", n.target)
    return isinstance(name, str) and name.endswith("_") and not name.endswith("__")


def _has_tensors(result: Any) -> bool:
    if isinstance(result, tuple | list):
        return any(_has_tensors(x) for x in result)
    return isinstance(result, Tensor)


def _unlabelled(x: Any) -> Any:
    """Label a tensor on which nothing acts; leave other things as they are."""
    if not isinstance(x, Tensor):
        return x
    return Value(tuple(x.shape), (FIXED,) * x.ndim)


def _run(rule: Callable[..., Any], call: Call, args: Any, options: Any) -> Any:
    try:
        return rule(call, *args, **options)
    except TypeError as error:
        raise UnsupportedModuleError(
            f"the rule for {call.path!r} does not take these arguments: {error}"
        ) from error


def _first_value(args: Any, options: Any, path: str) -> Value:
    for x in (*args, *options.values()):
        if isinstance(x, Value):
            return x
    raise UnsupportedModuleError(f"{path!r} has no tensor among its arguments")
