"""From a module to its axes: torch.fx gives the graph, the rules label it, union-find ties axes."""

import operator
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from symflow.arch.layout import FIXED, Axis, Dim, Label, Segments, each
from symflow.arch.rules import Activation, Value, find_rule, require_rule
from symflow.arch.tracing import Tracing, concatenated
from symflow.errors import ShapeError, UnsupportedModuleError
from symflow.groups import Trivial


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

    def new_axis(self, size: int) -> Dim:
        """Open an axis for an outgoing dimension of ``size`` units."""
        return Dim(self.tracing.new_axis(size, self.path), 1)

    def follow_axis(self, before: Label) -> Label:
        """Open axes that share the permutations of ``before``, but are scaled on their own."""
        return each(self._follow, self.tracing.resolve(before))

    def _follow(self, before: Dim) -> Dim:
        if before.axis is None:
            return FIXED
        raw = self.tracing.axes[before.axis]
        after = self.tracing.new_axis(raw.size, f"{raw.source} and {self.path}")
        new = replace(before, axis=after, degree=1)
        # Followed already by something that can still be scaled: one axis has one scale.
        if before.degree == 0 and raw.scale:
            self.tracing.share_permutation(before, new, self.path)
        else:
            self.tracing.share_permutation(new, before, self.path)
        return new

    def permuted(self, label: Label) -> Label:
        """Return a dimension that is permuted with another one, but not scaled."""
        return each(lambda dim: replace(dim, degree=0), label)

    def contract(self, a: Label, b: Label) -> None:
        """Sum over two dimensions: where one is multiplied by A, the other is by A^-T."""
        self.tracing.unify(
            a, each(Dim.dual, b), f"contracted with something that stays, at {self.path}"
        )

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
        dims = tuple(each(lambda d: replace(d, degree=d.degree * power), dim) for dim in x.dims)
        return Value(self.shape if len(self.shape) == len(dims) else x.shape, dims)

    @property
    def name(self) -> str:
        """What the operation is called."""
        return self.target if isinstance(self.target, str) else self.target.__name__


@final
@dataclass(frozen=True)
class Trace:
    """What tracing found: labels of leaves, axes that move, axes that do not, the last layer."""

    leaves: dict[str, tuple[Label, ...]]
    axes: tuple[Axis, ...]
    fixed: tuple[Axis, ...]
    output: tuple[str, ...]


def trace(module: nn.Module, inputs: tuple[Any, ...], names: dict[str, str]) -> Trace:
    """Trace a module and label every leaf.

    Parameters
    ----------
    module
        The network, in evaluation mode.
    inputs
        Example inputs; the first dimension of each is the batch.
    names
        From every key of the state dict to its canonical one (tied weights share a canonical key).

    Raises
    ------
    UnsupportedModuleError
        If torch.fx cannot trace the module or an operation has no rule; it names the place.
    """
    tracing = Tracing(names)
    graph = _symbolic(module)
    interpreter = _Interpreter(graph, tracing)
    with torch.no_grad():
        # Clones: a first layer may work in place.
        interpreter.run(*(x.clone() if isinstance(x, Tensor) else x for x in inputs))
    return _finish(tracing, interpreter.result)


def _finish(tracing: Tracing, output: Value) -> Trace:
    for dim in output.dims:
        tracing.fix(dim, "read out: the order and sign of the outputs have a meaning")
    names: dict[str, str] = {}
    moving: list[Axis] = []
    fixed: list[Axis] = []
    for key in tracing.in_order():
        raw = tracing.axes[key]
        if raw.fixed:
            name = "output" if raw.fixed.startswith("read out") else f"fixed {len(fixed)}"
            fixed.append(Axis(name, raw.size, Trivial(raw.size), f"{raw.source}: {raw.fixed}"))
            continue
        names[key] = f"h{len(moving) + 1}"
        why = f"out of {raw.source}; " + ("; ".join(dict.fromkeys(raw.passed)) or "linear")
        moving.append(Axis(names[key], raw.size, tracing.group(raw), why))

    def named(dim: Dim) -> Dim:
        return replace(dim, axis=names[dim.axis]) if dim.axis in names else FIXED

    def final(label: Label) -> Label:
        found = each(named, tracing.resolve(label))
        return concatenated(list(found.parts)) if isinstance(found, Segments) else found

    leaves = {name: tuple(map(final, dims)) for name, dims in tracing.leaves.items()}
    return Trace(leaves, tuple(moving), tuple(fixed), output.made_by)


class _Tracer(fx.Tracer):
    """Stops at every module that has a rule, and at PyTorch's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if find_rule(type(m)) is not None:
            return True
        return fx.Tracer.is_leaf_module(self, m, module_qualified_name)


def _symbolic(module: nn.Module) -> fx.GraphModule:
    if find_rule(type(module)) is not None:
        # torch.fx would trace the inside of a root; a lone layer must be seen as one.
        raise UnsupportedModuleError(
            f"{type(module).__name__} is a single layer: wrap it, as in nn.Sequential(layer)"
        )
    try:
        return fx.GraphModule(module, _Tracer().trace(module))
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "torch/" not in f.filename.replace("\\", "/")]
        place = own[-1] if own else frames[-1]
        raise UnsupportedModuleError(
            f"torch.fx cannot trace {type(module).__name__}: {error} (at {place.filename}:"
            f"{place.lineno}: {place.line}). Control flow on tensor values cannot be traced; move "
            "it into a submodule and register a rule for that with symflow.arch.rule"
        ) from error


class _Interpreter(fx.Interpreter):
    """Runs the graph on example inputs and carries the labels along."""

    def __init__(self, graph: fx.GraphModule, tracing: Tracing) -> None:
        fx.Interpreter.__init__(self, graph)
        self.extra_traceback = False  # torch.fx would append its own lines to our errors
        self.tracing = tracing
        self.labels: dict[fx.Node, Any] = {}
        self.result = Value((), ())

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; label its result if that is a tensor."""
        result = fx.Interpreter.run_node(self, n)
        if n.op == "output":
            label = self._label(n.args[0])
            if not isinstance(label, Value):
                raise UnsupportedModuleError(
                    f"the module must return one tensor, it returns {type(result).__name__}"
                )
            self.result = label
        elif _has_tensors(result):
            self.labels[n] = self._apply(n, result)
        return result

    def _apply(self, n: fx.Node, result: Any) -> Any:
        shape = tuple(result.shape) if isinstance(result, Tensor) else ()
        if n.op == "placeholder":
            return map_aggregate(result, _unlabelled)
        if n.op == "get_attr":
            return self._parameter(str(n.target), result)
        args: Any = map_aggregate(n.args, self._label)
        options: Any = map_aggregate(n.kwargs, self._label)
        if n.target is operator.getitem and not isinstance(args[0], Value):
            return args[0][args[1]]
        target, path, module = n.target, n.name, self.module
        if n.op == "call_module":
            path = str(n.target)
            module = self.module.get_submodule(path)
            target = type(module)
        rule = require_rule(target, path)
        call = Call(self.tracing, target, path, module, shape)
        if isinstance(rule, Activation):
            value = call.elementwise(_first_value(args, options, path), rule)
        else:
            value = _run(rule, call, args, options)
        if isinstance(result, Tensor) and value.shape != shape:
            raise ShapeError(
                f"the rule for {path!r} labels a result of shape {value.shape}, but it is {shape}"
            )
        return value

    def _parameter(self, name: str, value: Tensor) -> Value:
        """Label a parameter used as it is: what acts on it follows from what is done with it."""
        shape = tuple(value.shape)
        if not value.is_floating_point():
            return _unlabelled(value)
        dims = tuple(
            Dim(self.tracing.new_axis(size, name), 1) if size > 1 else FIXED for size in shape
        )
        self.tracing.label(name, dims)
        return Value(shape, dims)

    def _label(self, x: Any) -> Any:
        """Return the label of a node; where it has none (a size, say) what it is."""
        if not isinstance(x, fx.Node):
            return x
        return self.labels[x] if x in self.labels else self.env[x]


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
