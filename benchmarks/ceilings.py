"""The practical limits of a GPU, to be measured in the run whose figures they bound.

Everything here is timed by :func:`time_layers`: one CUDA graph over several layers with data of
their own, so that a layer's K and V are never still in L2 from the replay before.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

READ_BYTES = 1 << 32
READ_PARTS = 4
MATMUL_SIZE = 8_192
# (int32 words per tile, tiles per program, warps)
READ_CONFIGS = ((2_048, 4, 4), (4_096, 4, 4), (4_096, 8, 8), (8_192, 2, 8), (8_192, 4, 16))
# (int32 words per program, blocks per program, warps)
GATHER_CONFIGS = (
    (512, 2, 1),
    (1_024, 1, 2),
    (1_024, 2, 4),
    (1_024, 4, 4),
    (2_048, 1, 4),
    (2_048, 2, 4),
    (4_096, 1, 4),
    (4_096, 1, 8),
    (8_192, 1, 8),
)


def time_layers(run: Callable[[int], object], num_layers: int, replays: int = 9) -> list[float]:
    """Microseconds per layer of ``run(0) .. run(num_layers - 1)``, for each replay of their graph.

    Before each replay 1 GiB is read: the GPU is busy while the graph is being launched, and starts
    it with other data, none of it to be written back, in L2.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for layer in range(num_layers):
                run(layer)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(num_layers):
            run(layer)
    other = torch.zeros(1 << 28, dtype=torch.int32, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for replay in range(replays + 2):
        other.amax()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        # The first two upload the graph and bring up the clocks.
        if replay >= 2:
            times.append(begin.elapsed_time(end) * 1_000 / num_layers)
    return times


def linear_read() -> float:
    """TB/s of reading 4 GiB in order."""
    words = READ_BYTES // READ_PARTS // 4
    parts = torch.zeros(READ_PARTS, words, dtype=torch.int32, device="cuda")

    def configured(tile: int, tiles: int, warps: int) -> Callable[[int], None]:
        programs = words // (tile * tiles)
        sums = torch.empty(programs, dtype=torch.int32, device="cuda")

        def run(part: int) -> None:
            _read_kernel[(programs,)](parts[part], sums, TILE=tile, TILES=tiles, num_warps=warps)

        return run

    times = (time_layers(configured(*config), READ_PARTS) for config in READ_CONFIGS)
    return READ_BYTES / READ_PARTS / min(map(statistics.median, times)) / 1e6


def copy() -> float:
    """TB/s of a copy of 2 GiB, what is read plus what is written."""
    source = torch.zeros(READ_PARTS, READ_BYTES // READ_PARTS // 2, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    times = time_layers(lambda part: target[part].copy_(source[part]), READ_PARTS)
    return 2 * source[0].nbytes / statistics.median(times) / 1e6


def matmul(dtype: torch.dtype = torch.bfloat16) -> float:
    """TFLOP/s of an 8192 x 8192 x 8192 product of random matrices."""
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, device="cuda").to(dtype)
    out = torch.empty_like(a)
    times = time_layers(lambda _: torch.mm(a, b, out=out), 8)
    return 2 * MATMUL_SIZE**3 / statistics.median(times) / 1e6


def make_gather(
    k_blocks: Sequence[torch.Tensor], v_blocks: Sequence[torch.Tensor], block_ids: Sequence[int]
) -> Callable[[int], None]:
    """One launch that only reads a layer's K and V, once, through a list of block numbers.

    The practical floor of any single attention kernel: it has the ramp-up, the tail and the
    indirection, and no arithmetic to speak of. The fastest of GATHER_CONFIGS on these layers.

    Args:
        k_blocks: for each layer ``[num_blocks, block_size, Hkv, D]``, last three dims contiguous.
        v_blocks: likewise.
        block_ids: the blocks to read, each once; they are read in a random order.

    Returns:
        A function of the layer.
    """
    order = random.Random(0).sample(list(block_ids), len(block_ids))
    ids = torch.tensor(order, dtype=torch.int32, device=k_blocks[0].device)
    k_words = [_as_words(blocks) for blocks in k_blocks]
    v_words = [_as_words(blocks) for blocks in v_blocks]
    words = k_words[0].shape[1]

    def configured(piece: int, blocks: int, warps: int) -> Callable[[int], None]:
        programs = triton.cdiv(words, piece) * triton.cdiv(len(ids), blocks)
        sums = torch.empty(programs, dtype=torch.int32, device=ids.device)

        def run(layer: int) -> None:
            k, v = k_words[layer], v_words[layer]
            _gather_kernel[(programs,)](
                k,
                v,
                ids,
                sums,
                len(ids),
                k.stride(0),
                v.stride(0),
                WORDS=words,
                PIECE=piece,
                BLOCKS=blocks,
                num_warps=warps,
            )

        return run

    def median_time(run: Callable[[int], None]) -> float:
        return statistics.median(time_layers(run, len(k_words), replays=5))

    return min((configured(*config) for config in GATHER_CONFIGS), key=median_time)


def _as_words(blocks: torch.Tensor) -> torch.Tensor:
    """A view of ``[num_blocks, block_size, Hkv, D]`` as int32 ``[num_blocks, words]``."""
    assert blocks[0].is_contiguous(), "the last three dims must be contiguous"
    as_ints = blocks.view(torch.int32)
    return as_ints.as_strided((len(as_ints), as_ints[0].numel()), (as_ints.stride(0), 1))


@triton.jit
def _read_kernel(
    p_data,  # [programs * TILES * TILE] int32
    p_sums,  # [programs] int32
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    i_program = tl.program_id(0)
    o_data = i_program.to(tl.int64) * (TILE * TILES) + tl.arange(0, TILE)
    b_sum = tl.zeros([TILE], tl.int32)
    for i in tl.static_range(TILES):
        b_sum += tl.load(p_data + o_data + i * TILE)
    tl.store(p_sums + i_program, tl.sum(b_sum, 0))


@triton.jit(do_not_specialize=["num_ids"])
def _gather_kernel(
    p_k,  # [num_blocks, WORDS] int32
    p_v,  # [num_blocks, WORDS] int32
    p_ids,  # [num_ids] int32
    p_sums,  # [programs] int32
    num_ids,
    stride_k,
    stride_v,
    WORDS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A program reads the same piece of BLOCKS blocks; the pieces of a block go first."""
    PIECES: tl.constexpr = (WORDS + PIECE - 1) // PIECE
    i_program = tl.program_id(0)
    i_first = i_program // PIECES * BLOCKS
    o_word = i_program % PIECES * PIECE + tl.arange(0, PIECE)
    b_sum = tl.zeros([PIECE], tl.int32)
    for i in tl.static_range(BLOCKS):
        i_id = tl.minimum(i_first + i, num_ids - 1)
        i_block = tl.load(p_ids + i_id).to(tl.int64)
        m_word = o_word < tl.where(i_first + i < num_ids, WORDS, 0)
        b_sum += tl.load(p_k + i_block * stride_k + o_word, mask=m_word, other=0)
        b_sum += tl.load(p_v + i_block * stride_v + o_word, mask=m_word, other=0)
    tl.store(p_sums + i_program, tl.sum(b_sum, 0))
