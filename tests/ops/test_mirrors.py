"""What Python hands to kernels lies in memory as they expect it, or they are refused when they are loaded."""

import ctypes
import importlib
import pkgutil
import re

import pytest
import torch

from ovq.ops import cpu_kernels
from ovq.ops.backends import cpu
from ovq.ops.backends.cpu import build, compiler, mirrors
from ovq.ops.backends.cpu.mirrors import MIRRORS, check_mirrors
from tests.ops.common import attend, inputs

needs_compiler = pytest.mark.skipif("compiled" not in cpu_kernels(), reason=cpu_kernels())

CHANGES = {
    "swapped": lambda fields: [fields[1], fields[0], *fields[2:]],
    "missing": lambda fields: [fields[0], *fields[2:]],
    "short": lambda fields: fields[:-1],
    "long": lambda fields: [*fields, ("more", ctypes.c_int64)],
    "narrow": lambda fields: [*fields[:-1], (fields[-1][0], ctypes.c_int8)],
    "renamed": lambda fields: [("other", fields[0][1]), *fields[1:]],
}


def changed(name, how):
    """The structure of this name, as somebody may have forgotten to change it."""
    fields = CHANGES[how](list(MIRRORS[name]._fields_))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def test_all_structures_are_compared():
    found = set()
    for module in pkgutil.iter_modules(cpu.__path__, f"{cpu.__name__}."):
        members = vars(importlib.import_module(module.name)).values()
        found |= {x for x in members if isinstance(x, type) and issubclass(x, ctypes.Structure)}
    compared = [x._fields_ for x in MIRRORS.values()]
    assert all(x._fields_ in compared for x in found - {ctypes.Structure, mirrors.Mirror, mirrors._Place})
    assert list(MIRRORS) == list(compiler.MIRRORED)


@needs_compiler
@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", MIRRORS)
def test_a_structure_that_differs_is_named(name, how, monkeypatch):
    check_mirrors(build.load())
    monkeypatch.setitem(MIRRORS, name, changed(name, how))
    expected = (
        rf"^expected kernels with {name}(\.\w+)? (at byte \d+ of \d+ bytes|missing), as Python has it, found"
    )
    with pytest.raises(compiler.Unavailable, match=expected):
        check_mirrors(build.load())


@needs_compiler
def test_a_structure_that_one_side_does_not_know_is_named(monkeypatch):
    monkeypatch.setitem(MIRRORS, "More", changed("Strides", "swapped"))
    with pytest.raises(
        compiler.Unavailable, match="More at byte 0 of 24 bytes, as Python has it, found missing"
    ):
        check_mirrors(build.load())
    monkeypatch.delitem(MIRRORS, "More")
    monkeypatch.delitem(MIRRORS, "Strides")
    with pytest.raises(compiler.Unavailable, match=r"Strides missing, .* found at byte 0 of 24 bytes$"):
        check_mirrors(build.load())


@needs_compiler
@pytest.mark.parametrize("is_prebuilt", [False, True])
def test_kernels_with_other_structures_are_not_used(is_prebuilt, fresh, made, tmp_path):
    """Neither those that were compiled here nor those of a wheel; the op runs without them and says why."""
    if is_prebuilt:
        build._PREBUILT.mkdir()
        for level in compiler.machine_levels():
            (build._PREBUILT / compiler.prebuilt_name(level)).write_bytes(made)
    else:
        (tmp_path / "made").write_bytes(made)
        (tmp_path / "c++").write_text(f'#!/bin/sh\nfor last; do :; done\ncp {tmp_path / "made"} "$last"\n')
        (tmp_path / "c++").chmod(0o755)
        fresh.setenv("CXX", str(tmp_path / "c++"))
    fresh.setitem(MIRRORS, "Call", changed("Call", "swapped"))
    reason = "expected kernels with Call.num_rows at byte 8 of 8 bytes, as Python has it, found at byte 0"
    assert re.match(rf"not available: (.*: )?{reason}", cpu_kernels())
    tensors, options = inputs(1, 9, dtype=torch.float32), {"num_slots": 8, "chunk_size": 4}
    with pytest.warns(build.MissingKernelsWarning, match=reason):
        attend(*tensors, **options)
    with pytest.raises(ValueError, match=rf"backend: 'cpu': expected compiled kernels, .*{reason}"):
        attend(*tensors, backend="cpu", **options)


def test_kernels_that_say_nothing_are_refused():
    with pytest.raises(compiler.Unavailable, match="expected kernels with a table of their argument layouts"):
        check_mirrors(object())
