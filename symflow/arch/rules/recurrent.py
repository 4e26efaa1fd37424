"""Recurrent layers: one permutation acts on all gates of a unit."""

from typing import TYPE_CHECKING, Any

from torch import nn

from symflow.arch.labels import FIXED, Atom, Label, label_of
from symflow.arch.rules.registry import PLAIN, Activation, Value, rule
from symflow.errors import UnsupportedModuleError

if TYPE_CHECKING:
    from symflow.arch.trace import Call

# Which of the gates hold the candidate state, behind an odd function: there a sign goes through.
_LSTM = (0, 0, 1, 0)
_GRU = (0, 0, 1)
_RNN = (1,)


@rule(nn.LSTM)
def _lstm(call: "Call", x: Value, state: Any = None) -> Any:
    if call.module.proj_size:
        raise UnsupportedModuleError(f"{call.path!r}: an LSTM with projections has no rule")
    output, hidden = _run(call, x, state, _LSTM)
    return output, (hidden, hidden)


@rule(nn.GRU)
def _gru(call: "Call", x: Value, state: Any = None) -> Any:
    return _run(call, x, state, _GRU)


@rule(nn.RNN)
def _rnn(call: "Call", x: Value, state: Any = None) -> Any:
    return _run(call, x, state, _RNN)


def _run(call: "Call", x: Value, state: Any, candidates: tuple[int, ...]) -> Any:
    """Label all layers and directions, and return the labels of outputs and last states."""
    layer, width = call.module, call.module.hidden_size
    directions = 1 + layer.bidirectional
    relu = layer.mode == "RNN_RELU"
    through = Activation(odd=not relu, homogeneous=1 if relu else None)
    before, units = x.dims[-1], list[Label]()
    for k in range(layer.num_layers):
        outs: list[Label] = []
        for suffix in ("", "_reverse")[:directions]:
            unit = call.new_axis(width)
            call.tracing.weaken(unit, through, layer.mode.lower())
            _start(call, unit, state)
            plain = call.tracing.permuted(unit)
            parts = ((unit if odd else plain).parts or ((Atom(width),),) for odd in candidates)
            gates = label_of([part for own in parts for part in own])
            call.label(f"weight_ih_l{k}{suffix}", gates, before.dual())
            call.label(f"weight_hh_l{k}{suffix}", gates, unit.dual())
            for bias in ("ih", "hh") if layer.bias else ():
                call.label(f"bias_{bias}_l{k}{suffix}", gates)
            outs.append(unit)
        before = label_of([part for unit in outs for part in unit.parts or ((Atom(width),),)])
        units += outs
    middle = (FIXED,) * (len(x.dims) - 1)
    output = Value((*x.shape[:-1], width * directions), (*middle, before))
    batch = x.shape[0] if layer.batch_first else x.shape[-2]
    if len(units) == 1:
        return output, Value((1, batch, width), (FIXED, FIXED, units[0]))
    # One label for each layer and direction, whose units differ: picked by an index.
    return output, tuple(Value((batch, width), (FIXED, unit)) for unit in units)


def _start(call: "Call", unit: Label, state: Any) -> None:
    """Begin with a state: one number for all units sees no order, others stay where they are."""
    given = () if state is None else state if isinstance(state, tuple | list) else (state,)
    for value in given:
        if call.tracing.resolve(value.dims[-1]).is_copied or value.shape[-1] == 1:
            call.tracing.weaken(unit, PLAIN, "its state at the start")
        else:
            call.tracing.fix(unit, f"started from a state that stays, at {call.path}")
