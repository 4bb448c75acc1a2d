"""Kernels that a wheel brings: which of them are taken, and that they compute what those compiled here do."""

import ast
import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from ovq.ops import cpu_kernels, slot_assignments
from ovq.ops.backends.cpu import build, compiler
from ovq.ops.backends.cpu.weights import matrix_product, packed
from tests.ops.common import KERNEL_MERGES, attend, inputs
from tests.ops.compiling import restart

# Read before any test changes what it is found in.
ABLE = compiler.processor_levels()
# The second flag has products added in one operation, as at -O2, on which bits depend.
QUICK = ["-O1", "-fexpensive-optimizations"]
needs_compiler = pytest.mark.skipif("compiled" not in cpu_kernels(), reason=cpu_kernels())
needs_level = pytest.mark.skipif(not ABLE, reason="no kernels are compiled in advance for this processor")


def put(made, *levels):
    """As if a wheel had brought kernels for these levels."""
    build._PREBUILT.mkdir(exist_ok=True)
    for level in levels:
        (build._PREBUILT / compiler.prebuilt_name(level)).write_bytes(made)


def forget_compilers(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")


@pytest.fixture(scope="module", params=[QUICK, pytest.param(["-O3"], marks=pytest.mark.slow)], ids=" ".join)
def compiled(request):
    """The files of the fastest and of the slowest level of this processor, by name; made as a wheel's are.

    In half of the time they are compiled with less optimization, which may not change a bit either.
    """
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "_FLAGS", (*request.param, *compiler._FLAGS[1:]))
        for level in {ABLE[0], ABLE[-1]}:
            with tempfile.TemporaryDirectory() as folder:
                made[level.name] = compiler.compile_kernels(
                    compiler.find_compiler(), level.flags, Path(folder)
                )
    return made


def results(merge, dtype):
    """All that a forward and a backward compute, and the slot of each token.

    Slots are those of keys close together as well, which no rough product tells apart.
    """
    q, k, v = (x.requires_grad_() for x in inputs(2, 150, 4, 2, 40, 24, dtype=dtype))
    options = {"num_slots": 20, "chunk_size": 16, "merge": merge}
    o, state = attend(q, k, v, **options, backend="cpu")
    o.float().square().sum().backward()
    k_grad, v_grad = k.grad, v.grad
    k, v = k.detach(), v.detach()
    close = torch.nn.functional.normalize((k[:, :1] + 0.03 * k).float(), dim=-1).to(dtype)
    slots = torch.stack([slot_assignments(keys, v, **options).slots for keys in (k, close)])
    return [o, state.key_sum, state.value_sum, state.count, q.grad, k_grad, v_grad], slots


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(
        a.detach().contiguous().view(torch.uint8), b.detach().contiguous().view(torch.uint8)
    )


@needs_compiler
@needs_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("merge", KERNEL_MERGES)
def test_prebuilt_kernels_compute_the_same_bits(compiled, merge, dtype, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_PREBUILT", tmp_path)
    seen = {}
    for name, binary in {"native": None, **compiled}.items():
        if binary is not None:
            [level] = [level for level in ABLE if level.name == name]
            put(binary, level)
        monkeypatch.setenv("OVQ_CPU_KERNELS", name)
        restart(monkeypatch)
        seen[name] = results(merge, dtype)
        assert cpu_kernels() == (
            "compiled for this processor" if binary is None else f"compiled in advance for {name}"
        )
    build._attempt.cache_clear()
    native, slots = seen.pop("native")
    # Vectors of another width add in another order, but no token may go to another slot.
    assert all(torch.equal(found[1], slots) for found in seen.values())
    assert all(same_bits(x, y) for x, y in zip(seen[ABLE[0].name][0], native, strict=True))


@needs_compiler
@needs_level
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_whole_numbers_give_the_same_bits_on_all_processors(compiled, format, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_PREBUILT", tmp_path)
    torch.manual_seed(0)
    matrix, norm = packed(torch.randn(40, 200), None, format), torch.randn(200).exp()
    # Of a length that is the same in whatever order its squares are added.
    x = torch.randn(7, 1, 200).sign()
    seen = {}
    for name, binary in {"native": None, **compiled}.items():
        if binary is not None:
            put(binary, *(level for level in ABLE if level.name == name))
        monkeypatch.setenv("OVQ_CPU_KERNELS", name)
        restart(monkeypatch)
        found = [matrix_product(x, matrix, norm, 1e-5, is_rough=is_rough) for is_rough in (False, True)]
        seen[name] = torch.cat(found)
    build._attempt.cache_clear()
    native = seen.pop("native")
    assert all(same_bits(found, native) for found in seen.values())


@needs_compiler
@needs_level
def test_levels_that_this_processor_cannot_run_are_valid():
    """All others are run by the test above, or by its neighbours of another width."""
    flags = [level.flags for level in compiler.machine_levels() if level not in ABLE]
    for extra in flags:
        command = [*compiler.find_compiler(), "-std=c++17", "-fsyntax-only", "-Wno-psabi", *extra]
        found = subprocess.run([*command, compiler.FOLDER / "kernels.cpp"], capture_output=True, text=True)
        assert not found.returncode, found.stderr


@needs_compiler
@needs_level
def test_the_fastest_level_that_the_processor_has_is_taken(fresh, made):
    forget_compilers(fresh)
    put(made, *compiler.machine_levels())
    for number, level in enumerate(ABLE):
        assert cpu_kernels() == f"compiled in advance for {level.name}"
        # A processor that lacks what this level needs beyond the next.
        rest = ABLE[number + 1 :]
        features = rest[0].features if rest else frozenset()
        fresh.setattr(compiler, "processor_features", lambda features=features: features)
        restart(fresh)
    if compiler.machine_levels()[-1].features:
        assert cpu_kernels().startswith("not available: none for this processor in the installed package")


@needs_compiler
@needs_level
@pytest.mark.parametrize("wrong", ["other sources", "no library"])
def test_what_does_not_fit_is_left_and_kernels_are_compiled_here(fresh, made, wrong, tmp_path):
    put(b"not a library" if wrong == "no library" else made, *ABLE)
    if wrong == "other sources":
        for path in build._PREBUILT.iterdir():
            path.rename(path.with_name(path.name.replace(path.stem[-16:], "0" * 16)))
    script = tmp_path / "c++"
    (tmp_path / "made").write_bytes(made)
    script.write_text(f'#!/bin/sh\nfor last; do :; done\ncp {tmp_path / "made"} "$last"\n')
    script.chmod(0o755)
    fresh.setenv("CXX", str(script))
    assert cpu_kernels() == "compiled for this processor"


@needs_compiler
@needs_level
def test_a_user_may_ask_for_a_level(fresh, made):
    put(made, *ABLE)
    forget_compilers(fresh)
    said = {}
    for wish in ("", "1", "native", "0", "avx9", *(level.name for level in ABLE)):
        fresh.setenv("OVQ_CPU_KERNELS", wish)
        restart(fresh)
        said[wish] = cpu_kernels()
    assert said[""] == said["1"] == f"compiled in advance for {ABLE[0].name}"
    assert said["native"] == "not available: no C++ compiler found (c++, g++ or clang++)"
    assert said["0"] == "not available: switched off by OVQ_CPU_KERNELS=0"
    names = ", ".join(level.name for level in ABLE)
    assert f"expected one of 0, 1, native, {names} on this processor, found 'avx9'" in said["avx9"]
    for level in ABLE:
        assert said[level.name] == f"compiled in advance for {level.name}"


@needs_compiler
@needs_level
def test_loading_needs_neither_a_cache_nor_a_compiler(fresh, made, tmp_path):
    put(made, ABLE[0])
    forget_compilers(fresh)
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert isinstance(build.load(), ctypes.CDLL)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_the_build_of_a_wheel_needs_the_standard_library_alone():
    tree = ast.parse(Path(compiler.__file__).read_text())
    named = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert set(named) <= sys.stdlib_module_names | {"__future__"}


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo")
def test_levels_ask_for_features_as_the_system_names_them():
    known = compiler.processor_features() if os.uname().machine == "x86_64" else {"avx2"}
    # The slowest x86-64 level is that of nearly every machine since 2015.
    assert "avx2" in known
