from __future__ import annotations

import copy
import ctypes
import itertools
import random

import pytest
import torch

from hf_tree_cache.errors import ScatteredStorage, StorageMismatch
from hf_tree_cache.memory import storage as storage_module
from hf_tree_cache.memory.storage import KVSpec, KVStorage, SlabIndex

CPU = torch.device("cpu")
SPECS = {
    "fp32, equal dims": KVSpec(2, 8, 8, torch.float32, CPU),
    "fp32, wider keys": KVSpec(3, 20, 6, torch.float32, CPU),
    "bf16, equal dims": KVSpec(1, 16, 16, torch.bfloat16, CPU),
    "bf16, wider values": KVSpec(2, 5, 7, torch.bfloat16, CPU),
    "fp64, one number a key": KVSpec(1, 1, 3, torch.float64, CPU),
}
BLOCK_SIZES = [1, 3, 16]
M_MMAP_THRESHOLD = -3
"""glibc's: sizes from here on have mappings of their own, smaller ones come from the heap."""
LAYERS, SLAB_BLOCKS, BLOCKS = 3, 4, 11
"""Eleven blocks in slabs of four: the last of three slabs has a block that is never used."""


def storage_of(spec: KVSpec, block_size: int, *, blocks: int = BLOCKS) -> KVStorage:
    storage = KVStorage(spec, LAYERS, block_size, SLAB_BLOCKS, poison=True)
    for layer in range(LAYERS):
        assert storage.add_layer() == layer
    storage.ensure(blocks)
    return storage


def draw(spec: KVSpec, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V ``[*shape[:-1], Hkv, shape[-1], D]``."""
    return tuple(  # type: ignore[return-value]
        torch.randn(*shape[:-1], spec.num_kv_heads, shape[-1], dim).to(spec.dtype)
        for dim in (spec.k_head_dim, spec.v_head_dim)
    )


class Naive:
    """One tensor a slot in a dict: what a storage should hold. Absent slots are NaN."""

    def __init__(self, spec: KVSpec, block_size: int) -> None:
        self.spec, self.block_size = spec, block_size
        self.kv: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def write(self, layer: int, slots: list[int], k: torch.Tensor, v: torch.Tensor) -> None:
        """``k [n, Hkv, Dk]`` and ``v`` of n slots."""
        for i, slot in enumerate(slots):
            self.kv[layer, slot] = k[i], v[i]

    def move(self, block: int, to: int | None, layer: int) -> None:
        for offset in range(self.block_size):
            found = self.kv.get((layer, block * self.block_size + offset))
            self.kv.pop((layer, (block if to is None else to) * self.block_size + offset), None)
            if found is not None and to is not None:
                self.kv[layer, to * self.block_size + offset] = found

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        for layer in range(LAYERS):
            for source, target in pairs:
                self.move(source, target, layer)

    def poison(self, blocks: list[int]) -> None:
        for layer in range(LAYERS):
            for block in blocks:
                self.move(block, None, layer)

    def gather(self, layer: int, slots: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        nothing = tuple(
            torch.full((self.spec.num_kv_heads, dim), torch.nan, dtype=self.spec.dtype)
            for dim in (self.spec.k_head_dim, self.spec.v_head_dim)
        )
        pairs = [self.kv.get((layer, slot), nothing) for slot in slots]
        return torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])


def slot_index(storage: KVStorage, slots: list[int]) -> SlabIndex:
    return SlabIndex.of(slots, storage.slab_blocks * storage.block_size, storage.spec.device)


def block_index(storage: KVStorage, blocks: list[int]) -> SlabIndex:
    return SlabIndex.of(blocks, storage.slab_blocks, storage.spec.device)


def check_everything(storage: KVStorage, naive: Naive) -> None:
    size = storage.block_size
    every = list(range(BLOCKS * size))
    for layer in range(LAYERS):
        for got, want in zip(
            storage.gather_slots(layer, slot_index(storage, every)),
            naive.gather(layer, every),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids="block of {}".format)
def test_random_use_across_slabs_against_a_dict(spec: KVSpec, block_size: int) -> None:
    rng = random.Random(block_size)
    storage, naive = storage_of(spec, block_size), Naive(spec, block_size)
    num_slots = BLOCKS * block_size
    for _ in range(40):
        action, layer = rng.random(), rng.randrange(LAYERS)
        if action < 0.5:
            slots = rng.sample(range(num_slots), rng.randint(1, min(9, num_slots)))
            k, v = draw(spec, 1, len(slots))
            storage.write(layer, slot_index(storage, slots), None, k, v)
            naive.write(layer, slots, k[0].transpose(0, 1), v[0].transpose(0, 1))
        elif action < 0.8:
            blocks = rng.sample(range(BLOCKS), 2 * rng.randint(1, 5))
            pairs = list(zip(blocks[::2], blocks[1::2], strict=True))
            storage.copy(pairs)
            naive.copy(pairs)
        else:
            blocks = rng.sample(range(BLOCKS), rng.randint(0, 3))
            storage.release(blocks)
            naive.poison(blocks)
        check_everything(storage, naive)
    for blocks in ([5], [2, 3, 4, 5], [0, 1, 2], [9, 0, 4, 4, 9], rng.choices(range(BLOCKS), k=20)):
        slots = [block * block_size + i for block in blocks for i in range(block_size)]
        got = storage.gather_blocks(1, block_index(storage, blocks))
        for have, want in zip(got, naive.gather(1, slots), strict=True):
            assert have.shape[:2] == (len(blocks), block_size)
            torch.testing.assert_close(have.flatten(0, 1), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_batch_with_padding_writes_only_the_tokens_it_names(spec: KVSpec) -> None:
    storage, naive = storage_of(spec, 3), Naive(spec, 3)
    k, v = draw(spec, 2, 4)
    k[0, :, 0] = v[0, :, 0] = torch.nan
    # Row 0 begins with a column of padding, which has no slot.
    slots, source = [31, 0, 1, 12, 13, 2, 30], [1, 2, 3, 4, 5, 6, 7]
    storage.write(2, slot_index(storage, slots), torch.tensor(source), k, v)
    tokens = [x.transpose(1, 2).flatten(0, 1)[source] for x in (k, v)]
    naive.write(2, slots, *tokens)
    check_everything(storage, naive)


def test_writing_and_gathering_nothing() -> None:
    storage = storage_of(SPECS["fp32, wider keys"], 3)
    before = copy.deepcopy(storage)
    k, v = draw(storage.spec, 0, 1)
    storage.write(0, slot_index(storage, []), None, k, v)
    storage.copy([])
    storage.release([])
    assert storage.gather_slots(0, slot_index(storage, []))[0].shape == (0, 3, 20)
    assert storage.gather_blocks(0, block_index(storage, []))[1].shape == (0, 3, 3, 6)
    for ours, theirs in zip(slabs(storage), slabs(before), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_consecutive_blocks_of_a_slab_are_gathered_without_a_copy() -> None:
    storage = storage_of(SPECS["fp32, equal dims"], 3)
    first = storage.gather_blocks(1, block_index(storage, [4]))
    several = storage.gather_blocks(1, block_index(storage, [4, 5, 6]))
    for one, more in zip(first, several, strict=True):
        assert more.data_ptr() == one.data_ptr()
        assert more.untyped_storage().data_ptr() == one.untyped_storage().data_ptr()
    for blocks in ([3, 4], [4, 6], [5, 4]):
        apart = storage.gather_blocks(1, block_index(storage, blocks))[0]
        assert apart.untyped_storage().nbytes() == apart.nbytes


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids="block of {}".format)
def test_one_number_a_block_is_its_address_in_every_layer(spec: KVSpec, block_size: int) -> None:
    storage = storage_of(spec, block_size)
    # Keeps the next slabs from following the first ones.
    between = [torch.empty(size) for size in (7, 301, 95)]
    storage.ensure(40)
    del between
    assert storage.num_blocks == 40
    dims = (spec.k_head_dim, spec.v_head_dim)
    for which, (numbers, dim) in enumerate(zip(storage.block_numbers(), dims, strict=True)):
        assert numbers.dtype == torch.int32 and numbers.shape == (40,)
        unit = block_size * spec.num_kv_heads * dim * spec.dtype.itemsize
        for layer in range(LAYERS):
            base = storage.gather_blocks(layer, block_index(storage, [0]))[which].data_ptr()
            for block, number in enumerate(numbers.tolist()):
                found = storage.gather_blocks(layer, block_index(storage, [block]))[which]
                assert found.data_ptr() == base + number * unit


def test_slabs_on_a_cpu_lie_within_reach_of_each_other_wherever_malloc_would_put_them() -> None:
    malloc_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if malloc_option is None:
        pytest.skip("only glibc can be told where to allocate")
    storage = KVStorage(KVSpec(1, 16, 16, torch.bfloat16, CPU), 1, 4, 4096)
    # From mappings, then from the heap, where malloc ends up by itself as larger ones are freed.
    for threshold in (128 << 10, 32 << 20):
        assert malloc_option(M_MMAP_THRESHOLD, threshold)
        storage.ensure(storage.num_blocks + 1)
    numbers, _ = storage.block_numbers()
    assert len(numbers.unique()) == storage.num_blocks == 2 * 4096


def test_slabs_out_of_reach_of_block_numbers_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = storage_of(SPECS["fp32, equal dims"], 16)
    monkeypatch.setattr(storage_module, "MAX_NUMBER", SLAB_BLOCKS)
    with pytest.raises(ScatteredStorage, match=r"GiB apart on cpu.*backend='torch'"):
        storage.block_numbers()


def test_a_slab_that_no_memory_has_room_for_is_out_of_memory() -> None:
    storage = KVStorage(SPECS["fp32, equal dims"], 1, 16, 1 << 48)
    with pytest.raises(MemoryError, match="for a slab"):
        storage.ensure(1)


def slabs(storage: KVStorage) -> list[torch.Tensor]:
    return [*storage._k_slabs, *storage._v_slabs]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_planes_of_a_slab_never_overlap(spec: KVSpec) -> None:
    storage = storage_of(spec, 3)
    spans = []
    for slab in slabs(storage):
        for layer in slab:
            assert layer.is_contiguous()
            spans.append((layer.data_ptr(), layer.data_ptr() + layer.nbytes))
    spans.sort()
    for (_, end), (start, _) in itertools.pairwise(spans):
        assert end <= start


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_growing_moves_nothing(spec: KVSpec) -> None:
    storage, naive = storage_of(spec, 3), Naive(spec, 3)
    slots = list(range(BLOCKS * 3))
    for layer in range(LAYERS):
        k, v = draw(spec, 1, len(slots))
        storage.write(layer, slot_index(storage, slots), None, k, v)
        naive.write(layer, slots, k[0].transpose(0, 1), v[0].transpose(0, 1))
    where = [slab.data_ptr() for slab in storage._k_slabs + storage._v_slabs]
    numbers = [n.tolist() for n in storage.block_numbers()]
    storage.ensure(BLOCKS)
    assert storage.num_blocks == 12
    storage.ensure(200)
    assert storage.num_blocks == 200
    assert [s.data_ptr() for s in storage._k_slabs[:3] + storage._v_slabs[:3]] == where
    assert [n.tolist()[:12] for n in storage.block_numbers()] == numbers
    check_everything(storage, naive)


def test_a_failed_growth_keeps_what_there_was(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = storage_of(SPECS["fp32, equal dims"], 3)
    slots = list(range(BLOCKS * 3))
    k, v = draw(storage.spec, 1, len(slots))
    storage.write(0, slot_index(storage, slots), None, k, v)

    def no_memory(self: KVStorage) -> None:
        raise torch.OutOfMemoryError("no")

    with monkeypatch.context() as patch:
        patch.setattr(KVStorage, "_new_slab", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            storage.ensure(100)
    assert storage.num_blocks == 12
    got = storage.gather_slots(0, slot_index(storage, slots))[0]
    torch.testing.assert_close(got, k[0].transpose(0, 1))
    storage.ensure(100)
    assert storage.num_blocks == 100


def test_new_slots_are_nan_when_a_storage_poisons() -> None:
    spec = SPECS["fp32, equal dims"]
    storage = storage_of(spec, 3)
    assert all(bool(slab.isnan().all()) for slab in slabs(storage))
    storage.ensure(30)
    assert all(bool(slab.isnan().all()) for slab in slabs(storage))


def test_poisoning_a_block_that_has_no_slab_yet_does_nothing() -> None:
    storage = storage_of(SPECS["fp32, equal dims"], 3, blocks=4)
    storage.release([3, 40])
    assert storage.num_blocks == 4


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_deep_copy_is_equal_and_apart(spec: KVSpec) -> None:
    storage = storage_of(spec, 3)
    slots = list(range(1, BLOCKS * 3))
    k, v = draw(spec, 1, len(slots))
    storage.write(1, slot_index(storage, slots), None, k, v)
    shared = [storage, storage]
    twin, same = copy.deepcopy(shared)
    assert twin is same
    assert (twin.num_blocks, twin.has_room, twin.allocated_bytes) == (
        storage.num_blocks,
        storage.has_room,
        storage.allocated_bytes,
    )
    for ours, theirs in zip(slabs(storage), slabs(twin), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        assert ours.data_ptr() != theirs.data_ptr()
    twin.release(list(range(BLOCKS)))
    got = storage.gather_slots(1, slot_index(storage, slots))[0]
    torch.testing.assert_close(got, k[0].transpose(0, 1), rtol=0, atol=0)
    twin.ensure(60)
    assert storage.num_blocks == 12


def test_slabs_made_in_inference_mode_are_written_and_copied_outside_of_it() -> None:
    spec = SPECS["fp32, equal dims"]
    with torch.inference_mode():
        storage = storage_of(spec, 3, blocks=1)
        k, v = draw(spec, 1, 2)
        storage.write(0, slot_index(storage, [0, 1]), None, k, v)
        twin = copy.deepcopy(storage)
    for each in (storage, twin):
        each.ensure(BLOCKS)
        more, and_more = (x.requires_grad_() for x in draw(spec, 1, 2))
        each.write(0, slot_index(each, [2, 30]), None, more.detach(), and_more.detach())
        each.copy([(0, 9)])
        got = each.gather_slots(0, slot_index(each, [27, 28, 29, 30]))[0]
        want = torch.cat([k[0], more[0].detach()], 1).transpose(0, 1)
        torch.testing.assert_close(got, want)
        each.release([9])
        assert bool(each.gather_slots(0, slot_index(each, [27]))[0].isnan().all())


def test_bytes_add_up() -> None:
    storage = KVStorage(SPECS["bf16, wider values"], 5, 3, SLAB_BLOCKS)
    per_block = 3 * 2 * (5 + 7) * 2
    assert storage.layer_block_bytes == per_block
    assert storage.slab_bytes == SLAB_BLOCKS * 5 * per_block
    assert (storage.allocated_bytes, storage.attached_block_bytes) == (0, 0)
    storage.add_layer()
    storage.add_layer()
    storage.ensure(5)
    assert storage.attached_block_bytes == 2 * per_block
    assert storage.allocated_bytes == 2 * storage.slab_bytes
    for _ in range(3):
        assert storage.has_room
        storage.add_layer()
    assert not storage.has_room


@pytest.mark.parametrize(
    "positions",
    [[7], [4, 5, 6], [6, 5, 4], [3, 4], [0, 11, 5, 5, 0], [8, 9, 11], []],
    ids=["one", "a run", "a run backwards", "over a border", "repeats", "a gap", "none"],
)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["list", "tensor"])
def test_a_slab_index_finds_every_position_once(positions: list[int], as_tensor: bool) -> None:
    index = SlabIndex.of(torch.tensor(positions).long() if as_tensor else positions, 4, CPU)
    assert index.size == len(positions)
    found = [-1] * len(positions)
    for slab, local, where in index.parts:
        places = range(len(positions)) if where is None else where.tolist()
        for place, inside in zip(places, local.tolist(), strict=True):
            assert found[place] == -1 and 0 <= inside < 4
            found[place] = slab * 4 + inside
    assert found == positions
    consecutive = bool(positions) and positions == list(range(positions[0], positions[-1] + 1))
    one_slab = len({position // 4 for position in positions}) == 1
    assert (index.run is not None) == (consecutive and one_slab)
    if index.run is not None:
        assert index.run[0] * 4 + index.run[1] == positions[0]


@pytest.mark.parametrize(
    ("blocks", "least", "stretches"),
    [
        ([4, 5, 6, 7], 2, [[4, 5, 6, 7]]),
        ([2, 3, 4, 5], 2, [[2, 3], [4, 5]]),  # over the border of a slab
        ([2, 3, 4, 5], 3, [[2, 3, 4, 5]]),
        ([0, 1, 6, 7, 4, 5], 2, [[0, 1], [6, 7], [4, 5]]),
        ([0, 1, 6, 5, 4, 7], 2, [[0, 1, 6, 5, 4, 7]]),
    ],
)
@pytest.mark.parametrize("slots", [False, True])
def test_stretches_are_views_where_they_are_long(
    blocks: list[int], least: int, stretches: list[list[int]], slots: bool
) -> None:
    storage = KVStorage(KVSpec(2, 3, 5, torch.float32, CPU), 1, block_size=2, slab_blocks=4)
    layer, size = storage.add_layer(), 2
    storage.ensure(8)
    for slab in (*storage._k_slabs, *storage._v_slabs):
        slab.normal_()
    positions = [b * size + i for b in blocks for i in range(size)] if slots else blocks
    found = storage.index_stretches(positions, least * size if slots else least, slots=slots)
    each = size if slots else 1
    assert [index.size for index in found] == [each * len(stretch) for stretch in stretches]
    whole = storage.index_slots(positions) if slots else storage.index_blocks(positions)
    gather = storage.gather_slots if slots else storage.gather_blocks
    pieces = zip(*(gather(layer, index) for index in found), strict=True)
    for got, want in zip(map(torch.cat, pieces), gather(layer, whole), strict=True):
        assert torch.equal(got, want)
    if len(stretches) > 1:
        assert all(index.run is not None for index in found)


def test_a_spec_is_read_from_the_tensors() -> None:
    spec = KVSpec.of(torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 5, 6))
    assert spec == KVSpec(3, 8, 6, torch.float32, CPU)
    assert spec.block_bytes(16) == 16 * 3 * 14 * 4


@pytest.mark.parametrize(
    ("k_dtype", "v_dtype"),
    [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)],
    ids=["wider keys", "wider values"],
)
def test_keys_and_values_of_two_dtypes_are_stored_in_the_wider(
    k_dtype: torch.dtype, v_dtype: torch.dtype
) -> None:
    shape = (1, 2, 3, 8)
    spec = KVSpec.of(torch.zeros(shape, dtype=k_dtype), torch.zeros(shape, dtype=v_dtype))
    assert spec.dtype == torch.float32


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (torch.zeros(3, 5, 8), torch.zeros(3, 5, 8), r"keys \(3, 5, 8\)"),
        (torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 4, 8), r"values \(2, 3, 4, 8\)"),
        (torch.zeros(2, 3, 5, 8), torch.zeros(2, 4, 5, 8), "equal in the first three"),
        (torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, device="meta"), "on meta"),
    ],
    ids=["three axes", "other lengths", "other heads", "other devices"],
)
def test_keys_and_values_that_do_not_belong_together_are_refused(
    keys: torch.Tensor, values: torch.Tensor, message: str
) -> None:
    with pytest.raises(StorageMismatch, match=message):
        KVSpec.of(keys, values)
