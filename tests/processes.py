"""Starting a few processes that form a process group, cheaply.

They are forked from a server that has imported everything once, so that four cost little more than one; the
server itself has done nothing but import, so that no lock is inherited.
"""

import multiprocessing
import os
import sys
import time
import traceback

import torch


def made_once(tmp_path_factory, name, make):
    """The folder that `make(folder)` has filled, by this worker of pytest or another: costly things once."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, done = root / name, root / f"{name}-done"
    try:
        folder.mkdir()
    except FileExistsError:
        while not done.exists():
            time.sleep(0.1)
    else:
        try:
            make(folder)
        finally:
            # After a failure too: the other workers must not wait, and will find what is missing.
            done.touch()
    return folder


def run_ranks(function, num_ranks, folder, *arguments):
    """Call `function(rank, folder, *arguments)` in processes of a gloo group; raise what one raises."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "ovq.parallel", "ovq.train.loop"])
    processes = [
        context.Process(target=_begin, args=(function, rank, num_ranks, folder, arguments), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    for process in processes:
        process.kill()
    errors = [path.read_text() for path in sorted(folder.glob("error-*"))]
    assert not errors, errors[0]
    assert [process.exitcode for process in processes] == [0] * num_ranks


def _begin(function, rank, num_ranks, folder, arguments):
    torch.set_num_threads(1)
    # As torchrun sets them.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    # Asked for by accelerate, and not used: the group is there already.
    os.environ |= {"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    if sys.platform == "linux":
        # Names of hosts cannot be looked up everywhere.
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks
        )
        function(rank, folder, *arguments)
        torch.distributed.destroy_process_group()
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        # The others wait for this one for ever otherwise.
        os._exit(1)
