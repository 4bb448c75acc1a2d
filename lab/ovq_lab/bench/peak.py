"""Peak memory of one workload in its own process.

    python lab/ovq_lab/bench/peak.py '{"what": ..., "workload": ...}'

Prints, as JSON, the rise of the process's resident memory above its value before any input existed.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING

from ovq_lab.bench.pretrained_peer import resident
from ovq_lab.bench.workloads import Workload

if TYPE_CHECKING:
    from ovq_lab.bench.models import ModelWorkload


def main(arguments: dict) -> dict[str, int]:
    """Run the workload; returns its bytes."""
    if arguments["what"] == "model":
        # Imported only here, as calls of the op (most workloads) need no transformers.
        from ovq_lab.bench.models import ModelWorkload

        return _model(ModelWorkload(**arguments["workload"]))
    workload = Workload(**arguments["workload"])
    what = arguments["what"]
    # A tiny call first, so that thread pools and libraries, which are loaded only once, are not counted.
    small = dataclasses.replace(workload, length=2 * workload.chunk_size)
    small.forward_backward("cpu")()
    if what == "stream":
        return _stream(workload, arguments["piece"])
    assert what == "forward_backward", what
    before = resident()
    # The result is held while the peak is read, as a training step holds its gradients too.
    result = workload.forward_backward("cpu")()
    assert len(result) == 3
    return {"peak_bytes": _peak() - before}


def _model(workload: ModelWorkload) -> dict[str, int]:
    """Peak of a second training step, which has optimizer state; the model and its gradients count too."""
    dataclasses.replace(workload, size="2M", length=64).training()()
    before = resident()
    step = workload.training()
    for _ in range(2):
        step()
    return {"peak_bytes": _peak() - before}


def _stream(workload: Workload, piece: int) -> dict[str, int]:
    """Growth of the peak from the first 64k tokens of a stream to its end."""
    before = resident()
    dataclasses.replace(workload, length=65536).stream(piece)
    early = _peak()
    state = workload.stream(piece)
    assert int(state.num_seen) == workload.length
    return {
        "peak_bytes": early - before,
        "growth_bytes": _peak() - early,
        "resident_bytes": early,
        "state_bytes": state.nbytes,
    }


def _peak() -> int:
    """Peak resident memory so far. (`getrusage` would include the parent's, from before the exec.)"""
    return resident("VmHWM")


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
