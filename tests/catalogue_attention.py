"""Attention, low-rank factors, groups of channels, and models of the transformers package.

Expectations by hand, as in catalogue.py. A kind followed by ``each`` is over the axis before it:
``4 linear each`` after ``2 perm`` means that each of two heads has its own invertible 4 x 4 matrix.
Units of queries and keys of one head mix by one matrix, those of values and outputs by another; a
residual stream under norms has one permutation, and signs and scales for the gain of each norm.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Attention written out: projections, softmax of inner products, sum of values."""

    def __init__(self, width: int = 8, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Any) -> Any:
        batch, positions, width = x.shape
        q, k, v = (
            f(x).view(batch, positions, self.heads, width // self.heads).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        weights = (q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, positions, width))


class Fused(nn.Module):
    """Queries, keys and values made by one map, and taken apart afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Any) -> Any:
        batch, positions, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, positions, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, positions, 8))


class GroupedQueries(nn.Module):
    """Ainslie et al. (2023): two heads share each pair of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Any) -> Any:
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = self.kv(x).chunk(2, dim=-1)
        k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    """nn.MultiheadAttention with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Any) -> Any:
        return self.attend(x, x, x)[0]


class Block(nn.Module):
    """Norm and attention, norm and MLP, both residual."""

    def __init__(self, attention: nn.Module, norm: Callable[[int], nn.Module] = nn.LayerNorm):
        super().__init__()
        self.norm1, self.norm2, self.attention = norm(8), norm(8), attention
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Any) -> Any:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def transformer(attention: Callable[[], nn.Module]) -> nn.Module:
    """Return a small pre-norm transformer."""
    return nn.Sequential(nn.Linear(3, 8), Block(attention()), nn.LayerNorm(8), nn.Linear(8, 2))


class VisionTransformer(nn.Module):
    """Patches, a class token, positions, blocks; the token is read."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.blocks = nn.Sequential(Block(Attention()), Block(Attention()))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class LowRank(nn.Module):
    """Hu et al. (2022): a linear map plus the product of two thin ones."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(5, 2))

    def forward(self, x: Any) -> Any:
        return self.head(torch.relu(self.base(x) + F.linear(F.linear(x, self.down), self.up)))


class Folded(nn.Module):
    """A residual stream under RMSNorm without gains."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 6, bias=False), nn.Linear(6, 2)
        self.norms = nn.ModuleList([nn.RMSNorm(6, elementwise_affine=False) for _ in range(2)])
        self.mlp = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 6))

    def forward(self, x: Any) -> Any:
        x = self.first(x)
        x = x + self.mlp(self.norms[0](x))
        return self.last(self.norms[1](x))


@contextmanager
def without_torchvision() -> Iterator[None]:
    """Hide torchvision if it cannot be imported (a build for another torch) or is a stand-in."""
    before = sys.modules.get("torchvision")
    try:
        importlib.import_module("torchvision.transforms")
    except Exception:  # transformers does without it
        # None is how Python is told that a module is not there; the stubs know modules only.
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        forget = importlib.import_module("transformers.utils.import_utils")
        for name in ("is_torchvision_available", "is_torchvision_v2_available"):
            clear = getattr(getattr(forget, name, None), "cache_clear", None)
            if clear is not None:  # others may have asked before
                clear()
        try:
            yield
        finally:
            del sys.modules["torchvision"]
            if before is not None:
                sys.modules["torchvision"] = before
    else:
        yield


def pretrained(name: str, **config: Any) -> Callable[[], nn.Module]:
    """Return a maker of a random-initialised model of the transformers package."""

    def make() -> nn.Module:
        with without_torchvision():
            return built()

    def built() -> nn.Module:
        transformers = importlib.import_module("transformers")
        transformers.logging.set_verbosity_error()
        family = name.partition("For")[0].removesuffix("Model").removesuffix("LMHead")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = getattr(transformers, f"{family}Config")(**config)
            return getattr(transformers, name)(made).eval()

    return make


_GAIN = "1 sign scale each"
_HEADS = ("2 perm", "4 linear each", "4 linear each")
_PARTLY_TURNED = ("2 perm", "4 linear each", "2 rotary each", "2 linear each")
_SEQUENCE = (torch.zeros(2, 4, 3),)
_TOKENS = (torch.randint(23, (2, 5), generator=torch.Generator().manual_seed(0)),)
# An MLP beside an attention reads one word at a time: on fewer words than these, some directions of
# its weights would be shown by none of them.
_WORDS = 40
_DECODER: dict[str, Any] = {
    "vocab_size": _WORDS,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "use_cache": False,
}
_MORE = (torch.randint(_WORDS, (2, 5), generator=torch.Generator().manual_seed(0)),)
_IMAGE = (torch.zeros(2, 3, 16, 16),)

# name, how to make it, example inputs, axes
ATTENTION: tuple[tuple[str, Callable[[], nn.Module], tuple[Any, ...], tuple[str, ...]], ...] = (
    (
        "transformer, attention written out",
        lambda: transformer(Attention),
        _SEQUENCE,
        ("8 perm", *(_GAIN,) * 3, *_HEADS, "12 perm"),
    ),
    (
        "transformer, nn.MultiheadAttention",
        lambda: transformer(SelfAttention),
        _SEQUENCE,
        ("8 perm", *(_GAIN,) * 3, *_HEADS, "12 perm"),
    ),
    (
        "transformer, one map for queries, keys and values",
        lambda: transformer(Fused),
        _SEQUENCE,
        ("8 perm", *(_GAIN,) * 3, *_HEADS, "12 perm"),
    ),
    (
        "transformer, grouped queries",
        lambda: transformer(GroupedQueries),
        _SEQUENCE,
        ("8 perm", *(_GAIN,) * 3, *_HEADS, "2 perm each", "12 perm"),
    ),
    (
        # Norms behind the sums: the gain of each goes on into the stream, whose scale ends.
        "nn.TransformerEncoder",
        lambda: nn.Sequential(
            nn.Linear(3, 8),
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(8, 2, 12, batch_first=True),
                2,
                enable_nested_tensor=False,
            ),
            nn.Linear(8, 2),
        ),
        _SEQUENCE,
        ("8 perm sign scale", *(*_HEADS, "12 perm scale") * 2),
    ),
    (
        "vision transformer",
        VisionTransformer,
        (torch.zeros(2, 1, 8, 8),),
        ("8 perm", *(_GAIN,) * 5, *(*_HEADS, "12 perm") * 2),
    ),
    (
        "gated linear unit",
        lambda: nn.Sequential(nn.Linear(3, 12), nn.GLU(), nn.Linear(6, 2)),
        (torch.zeros(2, 3),),
        ("6 perm sign scale",),
    ),
    ("low-rank factors", LowRank, (torch.zeros(2, 6),), ("5 perm scale", "2 linear")),
    (
        "linear network",
        lambda: nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3), nn.Linear(3, 4), nn.Linear(4, 2)),
        (torch.zeros(2, 5),),
        # Four units have no point of least norm under all maps where only two rows read them.
        ("3 linear", "3 linear", "4 perm sign scale"),
    ),
    (
        "residual MLP, RMSNorm without gain",
        Folded,
        (torch.zeros(2, 3),),
        ("6 orthogonal", "7 perm"),
    ),
    (
        # Channels between the grouped convolution and the one before it move within their groups.
        "grouped convolution",
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU()),
            *(nn.Conv2d(12, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)),
        ),
        (torch.zeros(2, 3, 8, 8),),
        ("4 perm", "2 perm scale each", "3 perm scale each", "4 perm scale"),
    ),
    (
        "GroupNorm with four groups",
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 4, 1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(144, 2)),
        ),
        (torch.zeros(2, 3, 8, 8),),
        ("4 perm", "2 perm each", "4 perm scale"),
    ),
    (
        "BERT (transformers)",
        pretrained(
            "BertModel",
            vocab_size=23,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=16,
        ),
        _TOKENS,
        ("12 perm", "12 perm", *_HEADS, *_HEADS),
    ),
    (
        "GPT-2 (transformers)",
        pretrained(
            "GPT2LMHeadModel",
            vocab_size=23,
            n_embd=8,
            n_layer=2,
            n_head=2,
            n_positions=16,
            n_inner=12,
            bos_token_id=0,
            eos_token_id=0,
        ),
        _TOKENS,
        ("8 perm", *(_GAIN,) * 4, "12 perm", "12 perm", *_HEADS, *_HEADS),
    ),
    (
        "Llama (transformers)",
        pretrained(
            "LlamaForCausalLM",
            vocab_size=23,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=12,
            head_dim=4,
            max_position_embeddings=16,
        ),
        _TOKENS,
        (
            *("8 perm", "1 sign each", *(_GAIN,) * 5, "12 perm sign scale", "12 perm sign scale"),
            *("2 perm", "4 rotary each", "4 linear each", "2 perm each") * 2,
        ),
    ),
    (
        "GPT-J (transformers): neighbours are pairs of rotary embeddings",
        pretrained(
            "GPTJForCausalLM",
            vocab_size=_WORDS,
            n_embd=8,
            n_layer=1,
            n_head=2,
            n_inner=12,
            n_positions=16,
            rotary_dim=4,
            use_cache=False,
        ),
        _MORE,
        ("8 perm", *(_GAIN,) * 2, "12 perm", "2 perm", "4 rotary each", "4 linear each"),
    ),
    (
        "GPT-NeoX (transformers): half of each head is turned, one map for all three",
        pretrained(
            "GPTNeoXForCausalLM",
            **_DECODER,
            intermediate_size=12,
            max_position_embeddings=16,
            rotary_pct=0.5,
        ),
        _MORE,
        ("8 perm", *(_GAIN,) * 3, "12 perm", *_PARTLY_TURNED),
    ),
    (
        "Phi (transformers): half of each head is turned",
        pretrained(
            "PhiForCausalLM",
            **_DECODER,
            intermediate_size=12,
            max_position_embeddings=16,
            partial_rotary_factor=0.5,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        ),
        _MORE,
        ("8 perm", *(_GAIN,) * 2, "12 perm", *_PARTLY_TURNED),
    ),
    (
        "Falcon (transformers): queries, keys and values side by side in each head",
        pretrained(
            "FalconForCausalLM",
            **_DECODER,
            ffn_hidden_size=12,
            new_decoder_architecture=False,
            multi_query=False,
        ),
        _MORE,
        ("8 perm sign scale", "12 perm", "2 perm", "4 rotary each", "4 linear each"),
    ),
    (
        "ViT (transformers)",
        pretrained(
            "ViTForImageClassification",
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            image_size=16,
            patch_size=8,
        ),
        _IMAGE,
        ("8 perm", *(_GAIN,) * 5, "12 perm", "12 perm", *_HEADS, *_HEADS),
    ),
    (
        "ResNet (transformers)",
        pretrained(
            "ResNetForImageClassification",
            embedding_size=4,
            hidden_sizes=[4, 8],
            depths=[1, 1],
            layer_type="basic",
        ),
        _IMAGE,
        ("4 perm scale", "4 perm scale", "8 perm scale", "8 perm scale"),
    ),
)
