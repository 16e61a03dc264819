from __future__ import annotations

import copy
import random

import pytest

from hf_tree_cache.errors import IntegrityError, InvalidArgument, OutOfBlocks
from hf_tree_cache.memory.allocator import PhysicalKVAllocator


def books(allocator: PhysicalKVAllocator) -> tuple[object, ...]:
    counts = [allocator.ref_count(block) for block in range(allocator.num_blocks)]
    return counts, allocator.num_blocks, allocator.num_used, allocator.num_free


def test_the_example_in_its_docstring() -> None:
    allocator = PhysicalKVAllocator()
    assert allocator.allocate(2) == [0, 1]
    assert books(allocator)[0] == [1, 1]
    allocator.acquire([1])
    assert books(allocator)[0] == [1, 2]
    allocator.release([0, 1])
    assert books(allocator)[0] == [0, 1]
    assert allocator.allocate(2) == [0, 2]
    assert books(allocator)[0] == [1, 1, 1]
    allocator.check_integrity([[0, 1], [2]])


def test_free_blocks_go_out_lowest_first_and_new_ids_follow() -> None:
    allocator = PhysicalKVAllocator()
    allocator.allocate(6)
    allocator.release([4, 1, 3])
    assert allocator.allocate(5) == [1, 3, 4, 6, 7]


def test_nothing_asked_nothing_given() -> None:
    allocator = PhysicalKVAllocator(max_blocks=1)
    assert allocator.allocate(0) == []
    allocator.allocate(1)
    assert allocator.allocate(0) == []
    allocator.check_integrity([[0]])


def test_a_refused_allocation_changes_nothing_and_says_how_much_there_was() -> None:
    allocator = PhysicalKVAllocator(max_blocks=5)
    blocks = allocator.allocate(4)
    allocator.release(blocks[1:3])
    before = books(allocator)
    with pytest.raises(OutOfBlocks, match=r"allocate\(4\) found 3 of 5") as refused:
        allocator.allocate(4)
    assert (refused.value.requested, refused.value.free) == (4, 3)
    assert books(allocator) == before
    assert allocator.allocate(3) == [1, 2, 4]
    assert allocator.num_free == 0


def test_a_bound_lowered_below_the_ids_in_circulation_holds() -> None:
    allocator = PhysicalKVAllocator(max_blocks=8)
    allocator.release(allocator.allocate(8)[2:])
    allocator.max_blocks = 4
    with pytest.raises(OutOfBlocks) as refused:
        allocator.allocate(3)
    assert (refused.value.requested, refused.value.free) == (3, 2)
    assert allocator.allocate(2) == [2, 3]
    allocator.check_integrity([[0, 1, 2, 3]])


def test_without_a_bound_there_is_no_count_of_free_blocks() -> None:
    assert PhysicalKVAllocator().num_free is None
    assert PhysicalKVAllocator(3).num_free == 3


@pytest.mark.parametrize("max_blocks", [0, -1])
def test_a_bound_below_one_is_refused(max_blocks: int) -> None:
    with pytest.raises(InvalidArgument, match=f"max_blocks={max_blocks}"):
        PhysicalKVAllocator(max_blocks)


def test_a_negative_count_is_refused() -> None:
    allocator = PhysicalKVAllocator()
    with pytest.raises(InvalidArgument, match=r"allocate\(-1\)"):
        allocator.allocate(-1)
    assert allocator.num_blocks == 0


def test_books_that_cannot_be_ours_stop_at_once() -> None:
    allocator = PhysicalKVAllocator()
    allocator.release(allocator.allocate(1))
    with pytest.raises(AssertionError, match="released more often"):
        allocator.release([0])
    with pytest.raises(AssertionError, match="block 0 is free"):
        allocator.acquire([0])


def test_freed_blocks_are_told_once_and_only_while_free() -> None:
    allocator = PhysicalKVAllocator(track_freed=True)
    allocator.allocate(5)
    allocator.release([3, 1, 4])
    assert allocator.allocate(1) == [1]
    allocator.release([1])
    assert allocator.allocate(1) == [1]
    assert sorted(allocator.take_freed()) == [3, 4]
    assert allocator.take_freed() == []
    allocator.release([0])
    assert allocator.take_freed() == [0]


def test_freed_blocks_are_not_remembered_unless_asked() -> None:
    allocator = PhysicalKVAllocator()
    allocator.release(allocator.allocate(3))
    assert allocator.take_freed() == []


def test_trim_forgets_free_ids_at_the_end_only() -> None:
    allocator = PhysicalKVAllocator(track_freed=True)
    allocator.allocate(6)
    allocator.release([1, 4, 5])
    allocator.trim()
    assert (allocator.num_blocks, allocator.num_used) == (4, 3)
    assert allocator.take_freed() == [1]
    allocator.check_integrity([[0, 2, 3]])
    assert allocator.allocate(2) == [1, 4]


@pytest.mark.parametrize(
    ("owners", "message"),
    [
        ([[0, 1]], "block 2: 0 owners, ref count 1"),
        ([[0, 1], [1, 2]], "block 1: 2 owners, ref count 1"),
        ([[0], [1, 2, 3]], "block 3: 1 owners, ref count 0"),
    ],
    ids=["a block without its owner", "one owner too many", "a free block with an owner"],
)
def test_integrity_names_what_is_wrong(owners: list[list[int]], message: str) -> None:
    allocator = PhysicalKVAllocator()
    allocator.allocate(4)
    allocator.release([3])
    allocator.check_integrity([[0, 1], [2]])
    with pytest.raises(IntegrityError, match=message):
        allocator.check_integrity(owners)


def test_integrity_looks_at_the_free_list_and_at_the_bound() -> None:
    allocator = PhysicalKVAllocator()
    allocator.release(allocator.allocate(2)[1:])
    allocator._free.append(1)
    with pytest.raises(IntegrityError, match="free list"):
        allocator.check_integrity([[0]])
    allocator._free.pop()
    allocator.allocate(1)
    allocator.max_blocks = 1
    with pytest.raises(IntegrityError, match="2 blocks used of 1"):
        allocator.check_integrity([[0], [1]])


@pytest.mark.parametrize("max_blocks", [None, 1, 13], ids=["unbounded", "one block", "13 blocks"])
def test_random_use_against_a_plain_counter(max_blocks: int | None) -> None:
    rng = random.Random(7)
    allocator = PhysicalKVAllocator(max_blocks)
    owners: list[list[int]] = []
    for _ in range(2000):
        free = None if max_blocks is None else max_blocks - len({b for bs in owners for b in bs})
        choice = rng.random()
        if choice < 0.4:
            count = rng.randint(0, 4)
            if free is not None and count > free:
                before = books(allocator)
                with pytest.raises(OutOfBlocks):
                    allocator.allocate(count)
                assert books(allocator) == before
            else:
                owners.append(allocator.allocate(count))
        elif choice < 0.6 and owners:
            shared = rng.choice(owners)
            allocator.acquire(shared)
            owners.append(list(shared))
        elif choice < 0.98 and owners:
            allocator.release(owners.pop(rng.randrange(len(owners))))
        else:
            allocator.trim()
        if len(owners) > 12:
            allocator.release(owners.pop(0))
        allocator.check_integrity(owners)
        assert allocator.num_used == len({block for blocks in owners for block in blocks})


def test_a_deep_copy_goes_its_own_way() -> None:
    allocator = PhysicalKVAllocator(max_blocks=4)
    allocator.allocate(2)
    twin = copy.deepcopy(allocator)
    twin.release([0])
    assert twin.allocate(3) == [0, 2, 3]
    assert (allocator.num_used, allocator.ref_count(0)) == (2, 1)
