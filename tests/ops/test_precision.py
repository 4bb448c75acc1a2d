"""Full precision whatever a program asks of PyTorch, by its older setting or its newer ones."""

import sys
import threading

import pytest
import torch

from ovq.ops.precision import full_precision

PRODUCTS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def change(name, precision):
    if name == "older":
        torch.set_float32_matmul_precision(precision)
    else:
        place = {"all": torch.backends, "gpu": PRODUCTS[0], "cpu": PRODUCTS[1]}[name]
        place.fp32_precision = precision


def settings():
    newer = [torch.backends.fp32_precision, *(products.fp32_precision for products in PRODUCTS)]
    try:
        return newer, torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        return newer, "contradictory"


def forget():
    change("older", "highest")
    for name in ("all", "gpu", "cpu"):
        change(name, "none")


@pytest.fixture(autouse=True)
def _without_settings_of_other_tests():
    forget()
    yield
    forget()


@pytest.mark.parametrize(
    "changes",
    [
        "",
        "older high",
        "older medium",
        "all tf32",
        "all ieee",
        "gpu tf32",
        "cpu bf16",
        "older high, all ieee",
        "older high, cpu bf16",
        "older medium, cpu none",
        "all tf32, older high",
        "all tf32, older highest",
    ],
)
def test_products_are_exact_inside_and_as_they_were_afterwards(changes):
    def make():
        for each in filter(None, changes.split(", ")):
            change(*each.split())

    def ending():
        """The settings, and what they become once the one for everything changes."""
        yield settings()
        for precision in ("tf32", "ieee", "none"):
            change("all", precision)
            yield settings()

    make()
    expected = list(ending())
    forget()
    make()
    for _ in range(2):
        with full_precision(torch.device("cpu")), full_precision(torch.device("cpu")):
            (_, *products), *older = settings()
        assert {*products} <= {"ieee", "none"}
        assert older == ["highest", False]
    assert list(ending()) == expected


@pytest.mark.parametrize("changes", ["older medium", "older high", "all tf32", "gpu tf32"])
def test_threads_leave_the_settings_as_they_were(changes):
    change(*changes.split())
    expected, inexact, before = settings(), [], sys.getswitchinterval()

    def enter():
        for _ in range(500):
            with full_precision(torch.device("cpu")):
                if settings()[1:] != ("highest", False):
                    inexact.append(settings())

    threads = [threading.Thread(target=enter) for _ in range(4)]
    try:
        sys.setswitchinterval(1e-6)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not inexact
    assert settings() == expected
