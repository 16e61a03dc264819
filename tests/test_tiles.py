"""Which tiles a GPU gets: the user's, those of the table, or those of the nearest GPU."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_tree_cache.attention.tiles import (
    LIMITS,
    MEASURED,
    TABLE,
    TILES_VARIABLE,
    TUNE_VARIABLE,
    Tiles,
    TileSet,
    read_tuned,
    tiles_for,
    tune_once,
    tuned_path,
    write_tuned,
)
from hf_tree_cache.memory.storage import KVSpec

KEY = ("sm_80", 2, 128)
OTHER = TileSet(Tiles(kv_large=64, waves=0.9), Tiles(num_warps=8, max_registers=128))


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's file, which is not there yet."""
    path = tmp_path / "cache" / "tiles.json"
    monkeypatch.setenv(TILES_VARIABLE, str(path))
    monkeypatch.delenv(TUNE_VARIABLE, raising=False)
    tune_once.cache_clear()
    return path


# The table.


def test_the_table_has_each_architecture_element_size_and_head_dim() -> None:
    expected = {
        (arch, itemsize, head_dim)
        for arch in [*LIMITS, "interpreter"]
        for itemsize, longest in ((2, 512), (4, 256))
        for head_dim in (16, 32, 64, 128, 256, 512)
        if head_dim <= longest
    }
    assert set(TABLE) == expected
    assert set(TABLE) >= MEASURED


def test_no_built_in_entry_has_a_fault() -> None:
    sets = {tiles for found in TABLE.values() for tiles in (found.mixed, found.small)}
    assert {tiles.find_fault() for tiles in sets} == {None}
    # The largest group has 16 query heads.
    assert min(tiles.m_small for tiles in sets) >= 16


@pytest.mark.parametrize(
    "change",
    [
        {"kv_small": 8},
        {"m_large": 48},
        {"m_large": 16, "m_small": 32},
        {"num_warps": 3},
        {"merge_parts": 1},
        {"stages_large": 0},
        {"max_registers": -1},
        {"waves": 0.0},
    ],
    ids=str,
)
def test_sizes_that_cannot_be_compiled_are_found(change: dict[str, Any]) -> None:
    fault = replace(Tiles(), **change).find_fault()
    assert fault is not None and "must" in fault


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "num_warps", "programs"),
    [
        ("sm_90", 168, 71_680, 4, 3),
        ("sm_90", 169, 71_680, 4, 2),
        ("sm_90", 97, 38_912, 4, 4),
        ("sm_90", 32, 116_000, 4, 1),
        ("sm_90", 32, 232_449, 4, 0),
        ("sm_86", 128, 37_888, 4, 2),
        ("sm_80", 255, 1_024, 8, 1),
        ("gfx942", 256, 20_480, 4, 2),
        ("gfx942", 257, 20_480, 4, 1),
        ("gfx942", 128, 16_384, 4, 4),
        ("gfx942", 128, 65_537, 4, 0),
    ],
)
def test_registers_and_shared_memory_bound_the_programs_of_an_sm(
    arch: str, registers: int, shared: int, num_warps: int, programs: int
) -> None:
    assert LIMITS[arch].resident(registers, shared, num_warps) == programs


def test_the_bound_on_registers_is_told_to_each_compiler_in_its_way() -> None:
    tiles = Tiles(max_registers=168)
    assert tiles.options("sm_90")["maxnreg"] == 168
    assert tiles.options("gfx942")["waves_per_eu"] == 3
    plain = {"num_warps": 4, "enable_fp_fusion": True}
    assert tiles.options("interpreter") == plain
    assert Tiles().options("sm_90") == Tiles().options("gfx942") == plain


# A GPU that is not in the table.


@pytest.mark.parametrize(
    ("arch", "kilobytes", "known"),
    [
        ("sm_103", 227, "sm_100"),
        ("sm_91", 227, "sm_90"),
        ("sm_121", 99, "sm_120"),
        ("sm_88", 99, "sm_89"),
        ("sm_87", 163, "sm_80"),
        ("sm_110", 227, "sm_100"),
        ("gfx950", 160, "gfx942"),
        ("gfx1100", 64, "gfx942"),
    ],
)
def test_an_unknown_gpu_gets_the_tiles_of_the_nearest_that_fits(
    arch: str, kilobytes: int, known: str
) -> None:
    for itemsize, head_dim in ((2, 128), (4, 256)):
        found = tiles_for(arch, itemsize, head_dim, shared_bytes=kilobytes << 10)
        assert found == TABLE[known, itemsize, head_dim]


def test_without_its_shared_memory_an_unknown_gpu_gets_the_most_modest_tiles() -> None:
    assert tiles_for("sm_103", 2, 128) == TABLE["sm_120", 2, 128]


def test_a_gpu_with_less_shared_memory_than_any_gets_smaller_tiles() -> None:
    found = tiles_for("sm_75", 2, 256, shared_bytes=64 << 10)
    for tiles in (found.mixed, found.small):
        assert (tiles.kv_small, tiles.kv_large) == (16, 16)
        assert (tiles.stages_small, tiles.stages_large) == (2, 2)


# The user's file.


def test_tuned_tiles_come_back_and_go_before_the_table(path: Path) -> None:
    assert tiles_for(*KEY) == TABLE[KEY]
    assert write_tuned(KEY, OTHER, "measured on a GPU") == path
    assert tiles_for(*KEY) == OTHER
    assert tiles_for("sm_80", 2, 64) == TABLE["sm_80", 2, 64]
    assert json.loads(path.read_text())["sm_80/2/128"]["note"] == "measured on a GPU"
    unknown = ("sm_103", 2, 128)
    write_tuned(unknown, OTHER, "")
    assert tiles_for(*unknown, shared_bytes=227 << 10) == OTHER


def test_writing_an_entry_keeps_the_others_and_replaces_its_own(path: Path) -> None:
    write_tuned(KEY, OTHER, "first")
    write_tuned(("sm_80", 4, 64), OTHER, "second")
    write_tuned(KEY, TABLE[KEY], "third")
    assert read_tuned() == {KEY: TABLE[KEY], ("sm_80", 4, 64): OTHER}
    entries = json.loads(path.read_text())
    assert [entry["note"] for entry in entries.values()] == ["third", "second"]
    assert [file.name for file in path.parent.iterdir()] == ["tiles.json"]


ENTRY = {"note": "", "mixed": {}, "small": {}}
BROKEN = {
    "no JSON": "{",
    "an empty file": "",
    "a list": "[]",
    "a name without sizes": json.dumps({"sm_80": ENTRY}),
    "a name with words": json.dumps({"sm_80/two/128": ENTRY}),
    "half an entry": json.dumps({"sm_80/2/128": {"mixed": {}}}),
    "a field from another version": json.dumps({"sm_80/2/128": {**ENTRY, "mixed": {"m_huge": 1}}}),
    "a size that Triton refuses": json.dumps({"sm_80/2/128": {**ENTRY, "small": {"kv_small": 48}}}),
    "a word for a size": json.dumps({"sm_80/2/128": {**ENTRY, "small": {"kv_small": "48"}}}),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_told_and_ignored(text: str, path: Path) -> None:
    path.parent.mkdir()
    path.write_text(text)
    with pytest.warns(UserWarning, match=r"tiles\.json is not .* Delete it, or run python -m"):
        assert tiles_for(*KEY) == TABLE[KEY]
    # Said once.
    assert tiles_for(*KEY) == TABLE[KEY]
    write_tuned(KEY, OTHER, "")
    assert tiles_for(*KEY) == OTHER


def test_the_file_lies_where_the_variables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TILES_VARIABLE)
    monkeypatch.setenv("HF_TREE_CACHE_HOME", "/somewhere")
    assert tuned_path() == Path("/somewhere/tiles.json")
    monkeypatch.delenv("HF_TREE_CACHE_HOME")
    assert tuned_path() == Path.home() / ".cache" / "hf_tree_cache" / "tiles.json"


# Tuning at first use.


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would have been run."""
    commands: list[list[str]] = []

    def run(command: list[str], *, env: dict[str, str], check: bool) -> Any:
        assert env[TUNE_VARIABLE] == "0"
        commands.append(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_nothing_is_tuned_unasked(started: list[list[str]]) -> None:
    tune_once(KEY, "--group=4")
    assert started == []


def test_what_is_measured_or_tuned_is_not_tuned_again(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TUNE_VARIABLE, "1")
    write_tuned(KEY, OTHER, "")
    for key in (*MEASURED, KEY, ("interpreter", 2, 128)):
        tune_once(key)
    assert started == []


def test_tuning_at_first_use_is_tried_once_and_a_failure_told(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TUNE_VARIABLE, "1")
    with pytest.warns(UserWarning, match=r"exit status 1.* To try again: python -m .* --group=4"):
        tune_once(KEY, "--group=4")
    tune_once(KEY, "--group=4")
    ((_, *words),) = started
    assert words == ["-m", "hf_tree_cache.attention.tune", "--quick", "--group=4"]


# The tuner, but for the GPU.


@pytest.fixture
def tuner() -> Any:
    return pytest.importorskip("hf_tree_cache.attention.tune")


def test_without_a_gpu_the_tuner_says_so(tuner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"times kernels on a GPU, and torch sees none here"):
        tuner.main([])


def test_the_tuner_refuses_what_the_kernel_does_not_serve(
    tuner: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, most in (
        (["--group", "17"], "up to 16 query heads"),
        (["--head-dim", "1024"], "in bfloat16 the kernel serves head dims up to 512"),
        (["--head-dim", "512", "--dtype", "float32"], "head dims up to 256"),
    ):
        with pytest.raises(SystemExit):
            tuner.main(words)
        assert most in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["QUICK", "THOROUGH"])
def test_every_candidate_could_be_compiled(tuner: Any, steps: str) -> None:
    for axes in getattr(tuner, steps).values():
        for change in (change for axis in axes for change in axis):
            assert replace(Tiles(), **change).find_fault() is None


def test_the_climb_goes_on_from_the_best_and_ends_with_it(tuner: Any) -> None:
    asked = []

    def measure(tiles: Tiles) -> Any:
        asked.append(tiles)
        time = abs(tiles.kv_large - 64) + 10 * abs(tiles.num_warps - 8) + 10.0
        if tiles.max_registers == 128:
            return tuner.Trial(tiles, (), "left out: does not fit")
        return tuner.Trial(replace(tiles, programs_per_sm=7), (time, time), "")

    axes = [tuner.LARGE_STEPS, tuner.REGISTERS, tuner.WARPS]
    trials = tuner.climb("mixed", Tiles(), axes, measure)
    best = trials[-1]
    assert len(set(asked)) == len(asked) == len(trials)
    assert {tiles.programs_per_sm for tiles in asked} == {Tiles().programs_per_sm}
    assert (best.tiles.kv_large, best.tiles.num_warps) == (64, 8)
    assert best.tiles.programs_per_sm == 7 and best.score == pytest.approx(10)
    assert best.score == min(trial.score for trial in trials)
    assert sum(trial.score == math.inf for trial in trials) == 1
    assert "num_warps=8" in tuner.describe(best, Tiles())
    (left_out,) = (trial for trial in trials if not trial.times)
    assert "does not fit" in tuner.describe(left_out, Tiles())


def test_the_climb_begins_nothing_when_its_time_is_up(tuner: Any) -> None:
    asked = []

    def measure(tiles: Tiles) -> Any:
        asked.append(tiles)
        return tuner.Trial(tiles, (1.0,), "")

    (trial,) = tuner.climb("mixed", Tiles(), [tuner.LARGE_STEPS, tuner.WARPS], measure, -1.0)
    assert asked == [Tiles()] and trial.tiles == Tiles()


def test_the_tuner_keeps_what_is_fastest(
    tuner: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = pytest.importorskip("hf_tree_cache.attention.launch")
    last: dict[str, Any] = {}

    class Kernel:
        """Takes longer with narrow tiles, does not fit with wide ones, is wrong with 8 warps."""

        def __getitem__(self, grid: tuple[int]) -> Any:
            return self.run

        def run(self, *args: Any, **options: Any) -> Any:
            last.update(options)
            if options["KV_SMALL"] == 128:
                raise RuntimeError("out of resource: shared memory\nReduce block sizes")
            args[3].fill_(2.0 if options["num_warps"] == 8 else 1.0)
            return SimpleNamespace(n_regs=160, n_spills=0, metadata=SimpleNamespace(shared=40_000))

    def bench(run: Any, *, rep: int, return_mode: str) -> float:
        run()
        return 0.1 + 1 / (last["KV_LARGE"] + last["KV_SMALL"])

    monkeypatch.setattr(launch, "tree_attention_kernel", Kernel())
    monkeypatch.setattr(launch, "_arch", lambda device: "sm_80")
    monkeypatch.setattr(tuner, "do_bench_cudagraph", bench)
    monkeypatch.setattr(tuner, "TREES", {kind: (((1, 40), (20, 9)),) for kind in tuner.TREES})
    at = SimpleNamespace(L2_cache_size=1, shared_memory_per_block=49_152)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: at)
    spec = KVSpec(2, 64, 64, torch.float16, torch.device("cpu"))
    tiles = tuner.tune(spec, 4)
    assert (tiles.mixed.kv_large, tiles.mixed.kv_small) == (64, 64)
    assert tiles.mixed.programs_per_sm == tiles.small.programs_per_sm == 3
    said = capsys.readouterr().out
    assert "left out: RuntimeError: out of resource: shared memory\n" not in said
    assert "left out: RuntimeError: out of resource: shared memory " in said
    assert "left out: ArithmeticError: its results differ" in said
    assert "160 registers, 0 spilled, 40,000 bytes, 3 an SM" in said
