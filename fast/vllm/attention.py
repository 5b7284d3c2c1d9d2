"""ReSA as an attention backend of vLLM: the cache's pages, and both kinds of rows.

A page of the engine holds N tokens per KV head, each with its key, its value, and behind them a few
numbers for selection: its sketch, or a share of its block's bounds. So they are allocated, shared
and freed with their page. A page is one block or several.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import CommonAttentionMetadata, MultipleOf
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from resa.reference.config import ReSAConfig
from resa.reference.operations import REFERENCE_OPS

from .options import Options, check_layer, options_of


class ReSABackend(CPUAttentionBackend):
    """vLLM's CPU attention, which becomes ReSA where the configuration has options for it."""

    # Of the engine being built in this process. The layers come first, and vLLM tells the
    # configuration then and not later.
    options: ClassVar[Options | None] = None

    @staticmethod
    def get_impl_cls() -> type:
        engine = get_current_vllm_config_or_none()
        ReSABackend.options = engine and options_of(engine)
        return ReSAAttention if ReSABackend.options else CPUAttentionBackendImpl

    @staticmethod
    def get_builder_cls() -> type:
        return ReSABuilder if ReSABackend.options else CPUAttentionMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        sizes = CPUAttentionBackend.get_supported_kernel_block_sizes(kv_cache_spec)
        return [MultipleOf(1)] if ReSABackend.options else sizes

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Make room behind every token for what selection keeps."""
        if cls.options is None:
            return spec
        n_more = n_extra(cls.options.config, spec.head_size, spec.dtype.itemsize)
        n_bytes = (2 * spec.head_size + n_more) * spec.dtype.itemsize
        return replace(spec, state_content_bytes=n_bytes)


def n_extra(config: ReSAConfig, head_dim: int, itemsize: int) -> int:
    """Numbers per token for selection: a scale and a code, or bounds [2, D] shared by a block."""
    if config.kept_bits is None:
        return -(-2 * head_dim // config.block_size)
    return 1 + -(-head_dim * config.kept_bits // 8 // itemsize)


@dataclass
class Row:
    """One request of a step: its tokens are rows `begin` … `end − 1` of the step's queries."""

    begin: int
    end: int
    length: int  # T, with these tokens
    pages: Tensor
    is_sparse: bool


class ReSABuilder(CPUAttentionMetadataBuilder):
    """Say once per step, for all layers, which rows are sparse."""

    def __init__(self, spec: AttentionSpec, names: list[str], engine: Any, device: Any) -> None:
        super(CPUAttentionMetadataBuilder, self).__init__(spec, names, engine, device)
        self.options, self.page_size = options_of(engine), spec.block_size

    def build(
        self, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool = False
    ) -> list[Row]:
        starts, lengths = common.query_start_loc_cpu.tolist(), common.seq_lens.tolist()
        rows = []
        for i in range(common.num_reqs):
            begin, end, length = starts[i], starts[i + 1], lengths[i]
            # Scheduler and builder go by one rule; vLLM says here what is still prompt.
            n_prompt = length if common.is_prefilling[i] else 0
            is_sparse = self.options.is_sparse(end - begin, length - end + begin, n_prompt)
            pages = common.block_table_tensor[i, : -(-length // self.page_size)].long()
            if end > begin:
                rows.append(Row(begin, end, length, pages, is_sparse))
        return rows


class ReSAAttention(CPUAttentionBackendImpl):
    """Attention of one layer, by the operations of the contract."""

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, alibi_slopes: Any,
        sliding_window: int | None, kv_cache_dtype: str, logits_soft_cap: float | None = None,
        attn_type: str = "decoder", kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        unusual = alibi_slopes, sliding_window, logits_soft_cap, sinks
        check_layer(scale, head_size, *unusual, attn_type, kv_sharing_target_layer_name)
        self.config = ReSABackend.options.config
        self.head_dim, self.ops = head_size, REFERENCE_OPS

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write keys and values [tokens, Hkv, D] to their slots, and what selection keeps of them.

        kv_cache [pages, Hkv, N, 2·D + extra].
        """
        config, d, page_size = self.config, self.head_dim, kv_cache.shape[2]
        slots = slot_mapping[slot_mapping >= 0].long()
        key, value = key[: len(slots)], value[: len(slots)]
        page, offset = slots // page_size, slots % page_size
        kv_cache[page, :, offset, : 2 * d] = torch.cat([key, value], dim=2)
        extra = kv_cache[..., 2 * d :]
        if config.kept_bits is not None:
            codes, scales = self.ops.sketch_keys(
                key.transpose(0, 1)[None].contiguous(), config.kept_bits
            )
            extra[page, :, offset] = _joined(codes, scales, extra.shape[3])[0].transpose(0, 1)
            return

        # Bounds are rebuilt, block by block, from all of a block's tokens so far. Tokens fill a
        # block in order, so these are those up to the last one that is written now.
        b = config.block_size
        block, which = torch.unique(slots // b, return_inverse=True)
        lengths = block.new_zeros(len(block)).scatter_reduce(0, which, slots % b + 1, "amax")
        token = block[:, None] * b + torch.arange(b)  # [blocks, b]
        page, offset = token // page_size, token % page_size
        keys = kv_cache[page, :, offset, :d].transpose(1, 2).contiguous()  # [blocks, Hkv, b, D]
        bounds = self.ops.block_bounds(keys, lengths.int(), b).flatten(2)  # [blocks, Hkv, 2·D]
        room = bounds.new_zeros(*bounds.shape[:2], b * extra.shape[3])
        room[..., : 2 * d] = bounds
        extra[page, :, offset] = room.unflatten(2, (b, -1)).transpose(1, 2)

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
        attn_metadata: list[Row] | None, output: Tensor, output_scale: Any = None,
        output_block_scale: Any = None,
    ) -> Tensor:  # fmt: skip
        """Attend: query [tokens, Hq, D] → output, each request through its own pages."""
        for row in attn_metadata or []:  # None: vLLM warms up
            cached = kv_cache[row.pages].transpose(0, 1).flatten(1, 2)[None]  # [1, Hkv, slots, …]
            d = self.head_dim
            parts = cached[..., :d], cached[..., d : 2 * d], cached[..., 2 * d :]
            keys, values, extra = (part.contiguous() for part in parts)
            own = query[row.begin : row.end].transpose(0, 1)[None].contiguous()  # [1, Hq, Q, D]
            lengths = torch.tensor([row.length], dtype=torch.int32)
            if row.is_sparse:
                own = own[:, :, 0].contiguous()  # [1, Hq, D]
                out = self._sparse(own, keys, values, extra, lengths)[:, :, None]
            else:
                out = self.ops.dense_attention(own, keys, values, lengths)
            place = output[row.begin : row.end]
            place.copy_(out[0].transpose(0, 1).reshape_as(place))
        return output

    def _sparse(
        self, query: Tensor, keys: Tensor, values: Tensor, extra: Tensor, lengths: Tensor
    ) -> Tensor:
        config, b, d = self.config, self.config.block_size, self.head_dim
        if config.kept_bits is None:
            bounds = extra.unflatten(2, (-1, b)).flatten(3)[..., : 2 * d]  # [1, Hkv, M, 2·D]
            bounds = bounds.unflatten(3, (2, d)).permute(0, 1, 3, 4, 2).contiguous()
            scores = self.ops.score_blocks(query, bounds, lengths, b)
        else:
            codes, scales = _parted(extra, d * config.kept_bits // 8)
            scores = self.ops.score_sketch(query, codes, scales, lengths, b)
        indices = self.ops.select_blocks(scores, lengths, config)
        return self.ops.sparse_attention(query, keys, values, indices, lengths, b)


def _joined(codes: Tensor, scales: Tensor, width: int) -> Tensor:
    """Sketches as numbers of the scales' type: a scale, then bytes of code."""
    room = scales.new_zeros(*scales.shape, width)
    room[..., 0] = scales
    room.view(torch.uint8)[..., scales.itemsize : scales.itemsize + codes.shape[-1]] = codes
    return room


def _parted(extra: Tensor, n_bytes: int) -> tuple[Tensor, Tensor]:
    """Codes [1, Hkv, T_max, bytes] and scales [1, Hkv, T_max]: the inverse of `_joined`."""
    first = extra.element_size()
    codes = extra.view(torch.uint8)[..., first : first + n_bytes]
    return codes.contiguous(), extra[..., 0].contiguous()
