"""Store one new token a row at places that are read on the device. Needs Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..overlap import can_overlap, launch_options


@triton.jit
def scatter_kernel(
    p_k_new,  # [B, Hkv, 1, Dk], last stride 1
    p_v_new,  # [B, Hkv, 1, Dv]
    p_k,  # K of this layer's block 0, see KVStorage.block_numbers
    p_v,
    p_num_rows,  # [1] int32, rows in use; those behind them are padding of the batch
    p_k_blocks,  # [B] int32, block numbers
    p_v_blocks,
    p_offsets,  # [B] int32, slots within the blocks
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    HKV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    HKVP: tl.constexpr,  # padded to powers of two
    DKP: tl.constexpr,
    DVP: tl.constexpr,
    S: tl.constexpr,
    OVERLAP: tl.constexpr,  # the kernel ahead may still run, see :mod:`..overlap`
):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    i_row = tl.program_id(0)
    num_rows = tl.load(p_num_rows)
    k_block = tl.load(p_k_blocks + i_row).to(tl.int64)
    v_block = tl.load(p_v_blocks + i_row).to(tl.int64)
    offset = tl.load(p_offsets + i_row)
    if i_row < num_rows:
        o_h = tl.arange(0, HKVP)[:, None]
        o_dk = tl.arange(0, DKP)[None, :]
        o_dv = tl.arange(0, DVP)[None, :]
        m_k = (o_h < HKV) & (o_dk < DK)
        m_v = (o_h < HKV) & (o_dv < DV)
        row = i_row.to(tl.int64)
        b_k = tl.load(p_k_new + row * stride_kb + o_h * stride_kh + o_dk, mask=m_k)
        b_v = tl.load(p_v_new + row * stride_vb + o_h * stride_vh + o_dv, mask=m_v)
        tl.store(p_k + (k_block * S + offset) * (HKV * DK) + o_h * DK + o_dk, b_k, mask=m_k)
        tl.store(p_v + (v_block * S + offset) * (HKV * DV) + o_h * DV + o_dv, b_v, mask=m_v)


class Slots(NamedTuple):
    """Where one new token a row goes in a layer.

    Attributes:
        k, v: of :meth:`KVStorage.first_planes`.
        num_rows: int32 ``[1]``; rows from there on are left out.
        k_blocks, v_blocks: int32 ``[B]``, of :meth:`KVStorage.block_numbers`.
        offsets: int32 ``[B]``, slots within the blocks.
    """

    k: torch.Tensor
    v: torch.Tensor
    num_rows: torch.Tensor
    k_blocks: torch.Tensor
    v_blocks: torch.Tensor
    offsets: torch.Tensor
    block_size: int


def scatter_tokens(k: torch.Tensor, v: torch.Tensor, slots: Slots) -> None:
    """Store ``k [B, Hkv, 1, Dk]`` and ``v [B, Hkv, 1, Dv]``."""
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    num_heads, k_dim, v_dim = k.shape[1], k.shape[3], v.shape[3]
    overlap = can_overlap(k.device)
    scatter_kernel[(len(k),)](
        k,
        v,
        *slots[:-1],
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        HKV=num_heads,
        DK=k_dim,
        DV=v_dim,
        HKVP=triton.next_power_of_2(num_heads),
        DKP=triton.next_power_of_2(k_dim),
        DVP=triton.next_power_of_2(v_dim),
        S=slots.block_size,
        OVERLAP=overlap,
        **launch_options(overlap),
    )
