"""Attention: heads are permuted, and inside each the units of keys and values mix freely."""

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn import functional as F

from symflow.arch.labels import FIXED, Atom, Label, label_of
from symflow.arch.rules.arithmetic import aligned
from symflow.arch.rules.elementwise import PLAIN
from symflow.arch.rules.registry import Activation, Value, find_rule, rule
from symflow.errors import UnsupportedModuleError

if TYPE_CHECKING:
    from symflow.arch.trace import Call


@rule(F.scaled_dot_product_attention)
@rule("scaled_dot_product_attention")
def attention(
    call: "Call",
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """Sum values with weights that are a softmax of inner products of queries and keys."""
    tracing, path = call.tracing, call.path
    if enable_gqa:
        key, value = (_repeated(call, x, query.shape[-3]) for x in (key, value))
    tracing.unify(key.dims[-2], value.dims[-2], f"positions summed over at {path}")
    for x in (query, key):  # a softmax does not commute with scales
        for dim in x.dims[:-1]:
            tracing.weaken(dim, PLAIN, call.name)
    tracing.weaken(value.dims[-2], PLAIN, call.name)
    batch: list[Label] = []
    for a, b, m, n in aligned(_batch(query), _batch(key)):
        both = a if n == 1 else b if m == 1 else tracing.share_permutation(a, b, f"at {path}")
        batch.append(both)
    # Heads are tied by now: each of them may have an element of its own.
    call.contract(query.dims[-1], key.dims[-1], [*query.dims[:-1], *key.dims[:-1]])
    if attn_mask is not None:
        shape, dims = attn_mask.shape[:-2], attn_mask.dims[:-2]
        for a, b, _, n in aligned(Value(query.shape[:-2], tuple(batch)), Value(shape, dims)):
            if n > 1:
                tracing.share_permutation(a, b, f"masked by something that stays, at {path}")
    last = list(aligned(Value(query.shape[:-2], tuple(batch)), _batch(value)))
    batch = [
        b if m == 1 else a if n == 1 else tracing.multiplied(a, b, f"at {path}")
        for a, b, m, n in last
    ]
    return Value(call.shape, (*batch, query.dims[-2], value.dims[-1]))


def _batch(x: Value) -> Value:
    return Value(x.shape[:-2], x.dims[:-2])


def _repeated(call: "Call", x: Value, heads: int) -> Value:
    """Label keys or values of which each serves several heads."""
    times = heads // x.shape[-3]
    if times == 1:
        return x
    before = call.tracing.resolve(x.dims[-3]).parts or ((Atom(x.shape[-3]),),)
    label = label_of([(*part, Atom(times, copied=True)) for part in before])
    return x.with_dim(-3, label, heads)


@rule(nn.MultiheadAttention)
def _multihead(
    call: "Call", query: Value, key: Value, value: Value, *args: Any, **options: Any
) -> tuple[Value, Value | None]:
    layer, tracing = call.module, call.tracing
    names = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
    given = dict(zip(names, args, strict=False)) | options
    if layer.bias_k is not None or layer.add_zero_attn:
        raise UnsupportedModuleError(
            f"{call.path!r}: attention to added keys (add_bias_kv, add_zero_attn) has no rule"
        )
    width, heads = layer.embed_dim, layer.num_heads
    made: list[Label] = []
    for _ in range(3):
        out = call.new_axis(width)
        tracing.split(out, (heads, width // heads))
        made.append(out)
    q, k, v = made
    own = (q.parts[0], k.parts[0], v.parts[0])
    if layer.in_proj_weight is not None:
        tracing.unify(query.dims[-1], key.dims[-1], f"projected together at {call.path}")
        tracing.unify(query.dims[-1], value.dims[-1], f"projected together at {call.path}")
        call.label("in_proj_weight", label_of(list(own)), query.dims[-1].dual())
    else:
        for name, out, x in (("q", q, query), ("k", k, key), ("v", v, value)):
            call.label(f"{name}_proj_weight", out, x.dims[-1].dual())
    if layer.in_proj_bias is not None:
        call.label("in_proj_bias", label_of(list(own)))
    (q0, q1), (k0, k1), (v0, v1) = (
        tracing.split(x, (heads, width // heads)) or (FIXED, FIXED) for x in made
    )
    tracing.share_permutation(q0, k0, call.path)
    tracing.share_permutation(q0, v0, call.path)
    call.contract(q1, k1, [q0])
    for x in (query, key, value):
        for dim in x.dims[:-1]:
            tracing.weaken(dim, PLAIN, call.name)
    last = call.new_axis(width)
    call.label("out_proj.weight", last, label_of([(*_one(v0), *_one(v1))]).dual())
    if layer.out_proj.bias is not None:
        call.label("out_proj.bias", last)
    out = query.with_dim(-1, last, width)
    if given.get("need_weights") is False:
        return out, None
    batch = query.shape[0 if layer.batch_first else 1] if len(query.shape) == 3 else None
    at = 1 if layer.batch_first else 0
    positions = (query.shape[-2 if batch is None else at], key.shape[-2 if batch is None else at])
    shape = (() if batch is None else (batch,), positions)
    if not given.get("average_attn_weights", True):
        dims = (*(FIXED,) * len(shape[0]), q0, FIXED, FIXED)
        return out, Value((*shape[0], heads, *shape[1]), dims)
    return out, Value((*shape[0], *shape[1]), (FIXED,) * (len(shape[0]) + 2))


def _one(label: Label) -> tuple[Atom, ...]:
    return label.parts[0]


@rule(nn.TransformerEncoderLayer)
def _encoder_layer(call: "Call", x: Value, *_masks: Any, **_options: Any) -> Value:
    layer = call.module

    def attend(y: Value) -> Value:
        return call.run("self_attn", y, y, y, need_weights=False)[0]

    def feed(y: Value) -> Value:
        hidden = call.run("linear1", y)
        return call.run("linear2", call.elementwise(hidden, _activation(call, layer.activation)))

    if layer.norm_first:
        x = call.add(x, attend(call.run("norm1", x)))
        return call.add(x, feed(call.run("norm2", x)))
    x = call.run("norm1", call.add(x, attend(x)))
    return call.run("norm2", call.add(x, feed(x)))


def _activation(call: "Call", function: Any) -> Activation:
    found = find_rule(type(function) if isinstance(function, nn.Module) else function)
    if not isinstance(found, Activation):
        raise UnsupportedModuleError(
            f"{call.path!r}: the activation {function!r} has no rule; register one with "
            "symflow.arch.rule(function, symflow.arch.Activation(...))"
        )
    return found


@rule(nn.TransformerEncoder)
def _encoder(call: "Call", x: Value, *_masks: Any, **_options: Any) -> Value:
    for k in range(len(call.module.layers)):
        x = call.run(f"layers.{k}", x)
    return x if call.module.norm is None else call.run("norm", x)
