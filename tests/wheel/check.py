"""Run from an installed wheel, on a machine without a compiler: the kernels it brought do the work.

    python tests/wheel/check.py            a wheel with kernels, as cibuildwheel builds it
    python tests/wheel/check.py --pure     the wheel without: one warning says what is missing and its cost

Imports nothing of the checkout it lies in. Prints what ran; ends with an error if something else should have.
"""

import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path


def main() -> None:
    """Run the op forward and backward, and the command line."""
    # Here, and not for all who import this file, as pytest does: neither a compiler nor kernels compiled
    # earlier may be found.
    os.environ |= {"PATH": str(Path(sys.executable).parent), "XDG_CACHE_HOME": tempfile.mkdtemp()}
    os.environ.pop("CXX", None)
    import torch

    import ovq
    from ovq.ops import backend_used, cpu_kernels, ovq_attention

    is_pure = "--pure" in sys.argv[1:]
    q, k, v = (torch.randn(2, 100, 4, 16, requires_grad=True) for _ in range(3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            o, _ = ovq_attention(q, k, v, num_slots=16, chunk_size=16)
        o.sum().backward()
        used = backend_used()
    messages = [
        str(warning.message) for warning in caught if "no compiled CPU kernels" in str(warning.message)
    ]
    print(f"ovq {ovq.__version__} from {Path(ovq.__file__).parent}, torch {torch.__version__}")
    print(f"backend {used}, kernels {cpu_kernels()}, warnings {messages}")
    assert Path(__file__).parents[2] not in Path(ovq.__file__).parents, (
        "expected an installed wheel, found the checkout"
    )
    assert q.grad is not None
    assert q.grad.isfinite().all()
    assert used == ("torch" if is_pure else "cpu"), used
    assert cpu_kernels().startswith("not available" if is_pure else "compiled in advance"), cpu_kernels()
    assert len(messages) == is_pure, messages
    subprocess.run([sys.executable, "-m", "ovq", "--help"], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
