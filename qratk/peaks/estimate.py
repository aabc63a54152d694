"""Bytes of a model over a search space: exact storage, estimated peaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qratk.bank.table import QuantizerTable
from qratk.core.errors import ConfigurationError
from qratk.core.memory import LayerBytes, LayerShape, MemoryModel, PeakBytes
from qratk.core.space import SearchSpace

_TRAINED_ITEM = 4 + 4 + 8  # float32 master, gradient, and AdamW's two moments
_LOGIT_COPIES = 2  # the loss keeps a float32 copy of the logits, and makes their gradient


@dataclass(frozen=True)
class ModelFacts:
    """What besides its layers decides a model's peaks.

    Args:
        num_blocks: transformer blocks.
        hidden_size: width of the residual stream.
        vocabulary: number of logits.
        cache_width: keys and values of a block, numbers a token.
        attention_heads: heads whose (T, T) scores eager attention keeps; 0 when attention is fused.
        item_size: bytes of a number in the compute dtype.
        fixed_bytes: embeddings, head and norms.
    """

    num_blocks: int
    hidden_size: int
    vocabulary: int
    cache_width: int
    attention_heads: int
    item_size: int
    fixed_bytes: int

    @classmethod
    def of(cls, config: Any, *, num_blocks: int, item_size: int, fixed_bytes: int) -> ModelFacts:
        """Facts from a Hugging Face configuration."""
        text = config.get_text_config()
        hidden = int(text.hidden_size)
        heads = int(getattr(text, "num_attention_heads", 1) or 1)
        head_dim = int(getattr(text, "head_dim", None) or hidden // heads)
        kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
        eager = getattr(config, "_attn_implementation", "sdpa") == "eager"
        vocabulary = int(text.vocab_size)
        cache = 2 * kv_heads * head_dim
        return cls(num_blocks, hidden, vocabulary, cache, heads if eager else 0, item_size, fixed_bytes)


def bytes_and_estimates(
    space: SearchSpace,
    shapes: tuple[LayerShape, ...],
    table: QuantizerTable,
    facts: ModelFacts,
    *,
    adapter_bytes: Callable[[LayerShape, int], int],
    number_bytes: int = 2,
    batch_size: int = 1,
    sequence_length: int = 512,
    gradient_checkpointing: bool = False,
    training: PeakBytes | None = None,
) -> MemoryModel:
    """Memory model of a space over these layers: storage to the byte (Eq. 2, 21-23), fallbacks included.

    The code tables that quantizers share (1,088 bytes for nf4) are part of `fixed_bytes`, counted once. The peaks are
    for one configuration at a time, not for the whole bank: `training` if given, as traced, and an estimate otherwise
    (`training_peak`); `serving_peak` is an estimate. `adapter_bytes` are those of a layer at a rank, as stored,
    and `number_bytes` those of one of their numbers (p_r of Eq. 21).
    """
    if space.layer_names != tuple(shape.name for shape in shapes):
        raise ConfigurationError(
            f"the space has layers {space.layer_names[:2]}... ({space.num_layers}), the model has "
            f"{tuple(shape.name for shape in shapes[:2])}... ({len(shapes)}); build the space from the model's shapes"
        )
    if min(batch_size, sequence_length) < 1:
        raise ConfigurationError(f"batch_size and sequence_length must be positive: {batch_size}, {sequence_length}")
    tokens = batch_size * sequence_length
    workspace = _workspace(shapes, facts)
    fixed = facts.fixed_bytes + table.shared_bytes(shapes, space.bits)
    return MemoryModel(
        space=space,
        layers=tuple(_layer_bytes(shape, space, table, adapter_bytes) for shape in shapes),
        parameters=tuple(shape.parameters for shape in shapes),
        fixed_bytes=fixed,
        training=training
        or training_peak(shapes, facts, tokens, sequence_length, workspace, gradient_checkpointing, number_bytes),
        serving=serving_peak(facts, tokens, batch_size, workspace),
    )


def _layer_bytes(
    shape: LayerShape, space: SearchSpace, table: QuantizerTable, adapter_bytes: Callable[[LayerShape, int], int]
) -> LayerBytes:
    packed = {bits: table.layer_bytes(shape, bits) for bits in space.bits}
    return LayerBytes(
        weights={bits: part.weights for bits, part in packed.items()},
        metadata={bits: part.metadata for bits, part in packed.items()},
        adapters={rank: adapter_bytes(shape, rank) for rank in space.ranks},
        constant=shape.constant_bytes,
    )


def _workspace(shapes: tuple[LayerShape, ...], facts: ModelFacts) -> int:
    # Largest projection, dense: the unpacked codes and the finished weight are there at once.
    largest = max((d_in * d_out for shape in shapes for _, d_in, d_out in shape.projections), default=0)
    return 2 * largest * facts.item_size


def training_peak(
    shapes: tuple[LayerShape, ...],
    facts: ModelFacts,
    tokens: int,
    sequence_length: int,
    workspace: int,
    gradient_checkpointing: bool,
    number_bytes: int = 2,
) -> PeakBytes:
    """Peak of a training step over storage and fixed bytes, estimated.

    An adapter weight takes 16 bytes in training (float32 master, gradient, AdamW's two moments) where `number_bytes`
    are stored.
    Kept of each block: input and output of every projection (LoRA needs the one, the next operation the other), the
    residual stream at four places, the activation function's intermediate, and (T, T) scores where attention is not
    fused; with gradient checkpointing only the input of each block and one block's activations. Logits with a float32
    copy and its gradient, and a dense weight, are added: an upper estimate, since not all of them are there at once
    (1.1 to 2 times what autograd keeps, over nine tiny families).
    """
    widths = sum(d_in + d_out for shape in shapes for _, d_in, d_out in shape.projections)
    widest = max((max(d_in, d_out) for shape in shapes for _, d_in, d_out in shape.projections), default=0)
    per_block = 4 * facts.hidden_size + widest
    all_blocks = tokens * facts.item_size * (widths + per_block * facts.num_blocks)
    all_blocks += facts.num_blocks * facts.attention_heads * tokens * sequence_length * facts.item_size
    if gradient_checkpointing:
        inputs = tokens * facts.hidden_size * facts.item_size * facts.num_blocks
        activations = inputs + -(-all_blocks // max(1, facts.num_blocks))
    else:
        activations = all_blocks
    logits = tokens * facts.vocabulary * (facts.item_size + 4 * _LOGIT_COPIES)
    return PeakBytes(activations + logits + workspace, (_TRAINED_ITEM - number_bytes) / number_bytes)


def serving_peak(facts: ModelFacts, tokens: int, batch_size: int, workspace: int) -> PeakBytes:
    """Peak of generation over storage and fixed bytes, estimated: key-value cache, one dense weight, last logits."""
    cache = tokens * facts.num_blocks * facts.cache_width * facts.item_size
    return PeakBytes(cache + workspace + batch_size * facts.vocabulary * facts.item_size)


def generation_peak(
    shapes: tuple[LayerShape, ...], facts: ModelFacts, *, texts: int, prompt_tokens: int, generated_tokens: int
) -> tuple[int, int]:
    """Bytes of the key-value cache of texts at their full length, and of all that generation holds at its peak besides
    weights and adapters, estimated.

    That is the cache, with a block's keys and values once more for all heads while they grow and are attended to, or
    with a block's activations while prompts are read; one dense weight, and the logits of the last tokens.

    `texts` side by side have prompts of `prompt_tokens`, padding included, and go on for `generated_tokens` at most.
    """
    block = facts.cache_width * facts.item_size
    length = prompt_tokens + generated_tokens
    cache = texts * length * facts.num_blocks * block
    grown = texts * length * max(block, 2 * facts.hidden_size * facts.item_size)
    widest = max((max(d_in, d_out) for shape in shapes for _, d_in, d_out in shape.projections), default=0)
    read = texts * prompt_tokens * facts.item_size * (3 * widest + 6 * facts.hidden_size)
    before = texts * prompt_tokens * facts.num_blocks * block
    logits = texts * facts.vocabulary * facts.item_size
    return cache, max(cache + grown, before + read) + _workspace(shapes, facts) + logits
