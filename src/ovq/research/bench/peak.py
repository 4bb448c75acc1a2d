"""Peak memory of one workload, alone in its process.

    python -m ovq.research.bench.peak '{"what": ..., "workload": ...}'

Prints JSON: how far the resident memory of the process rose above what it was before any input existed.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from ovq.research.bench.workloads import Workload


def main(arguments: dict) -> dict[str, int]:
    """Do the work and return the bytes it took."""
    workload = Workload(**arguments["workload"])
    what = arguments["what"]
    # A tiny call first: thread pools and libraries are loaded once, and are not what is asked.
    small = dataclasses.replace(workload, length=2 * workload.chunk_size)
    small.forward_backward("cpu")()
    if what == "stream":
        return _stream(workload, arguments["piece"])
    before = _resident()
    if what == "forward":
        workload.forward("cpu")()
    elif what == "forward_backward":
        # The result is kept while the peak is read: gradients count as a training step has them.
        result = workload.forward_backward("cpu")()
        assert len(result) == 3
    else:
        raise ValueError(f"what: expected 'forward', 'forward_backward' or 'stream', found {what!r}")
    return {"peak_bytes": _peak() - before}


def _stream(workload: Workload, piece: int) -> dict[str, int]:
    """Growth of the peak between the first 64k tokens of a stream and all of it."""
    before = _resident()
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


def _resident() -> int:
    """Resident memory now."""
    return _status("VmRSS")


def _peak() -> int:
    """Largest resident memory so far (`getrusage` would count the parent's, from before the exec)."""
    return _status("VmHWM")


def _status(field: str) -> int:
    """Bytes of a field of Linux's `/proc/self/status`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status: expected a line {field}, found none")


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
