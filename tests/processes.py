"""Starting processes cheaply: a process group, or commands of `ovq`.

They are forked from a server that has imported everything once, so that many cost little more than one; the
server itself has done nothing but import, so that no lock is inherited.
"""

import contextlib
import multiprocessing
import os
import sys
import time
import traceback
from multiprocessing.reduction import ForkingPickler

# Teaches multiprocessing to share tensors.
import torch.multiprocessing

from ovq.ops.backends.cpu import build

# One server serves all tests of a worker of pytest, so it has what any of them needs.
_IMPORTED = ["torch", "transformers", "ovq.hf", "ovq.parallel", "ovq_lab.train.loop", "ovq.cli"]
# As it is before a test has a cache of its own, in which kernels would be compiled anew.
_USUAL_CACHE = os.environ.get("XDG_CACHE_HOME")


def forked(function, *arguments):
    """A process that will call `function(*arguments)` in the environment that this process has now."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context.Process(
        target=_run, args=(dict(os.environ), _USUAL_CACHE, function, arguments), daemon=True
    )


def _run(environment, usual_cache, function, arguments):
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.pop("XDG_CACHE_HOME", None)
    if usual_cache is not None:
        os.environ["XDG_CACHE_HOME"] = usual_cache
    with contextlib.suppress(build.Unavailable):
        build.load()
    os.environ.update(environment)
    function(*arguments)


def handed_over(x):
    """`x` as another process would get it: its tensors share their memory, into which they were moved."""
    return ForkingPickler.loads(ForkingPickler.dumps(x))


def command(arguments, *, output=None, errors=None, closed=(), before=None):
    """A process, not yet started, that runs `ovq` as `python -m ovq` does.

    Args:
        arguments: of the command line.
        output: the path of what stands in the place of standard output; None: a pipe that nobody reads.
        errors: the path of a file for standard error.
        closed: numbers of other file descriptors that get what standard output gets.
        before: called in the process, first of all.
    """
    return forked(_ovq, [str(each) for each in arguments], output, errors, closed, before)


def _ovq(arguments, output, errors, closed, before):
    from ovq.cli import main

    if output is None:
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open(output, os.O_WRONLY | os.O_CREAT)
    if errors is not None:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    for number in (1, *closed):
        os.dup2(write, number)
    if before is not None:
        before()
    main(arguments)


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
    """Call `function(rank, folder, *arguments)` in processes of a gloo group; raise what they raise."""
    processes = [forked(_begin, function, rank, num_ranks, folder, arguments) for rank in range(num_ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    for process in processes:
        process.kill()
    errors = [path.read_text() for path in sorted(folder.glob("error-*"))]
    # All of them: those that waited for the one that failed say only that it is gone.
    assert not errors, "\n".join(errors)
    assert [process.exitcode for process in processes] == [0] * num_ranks


def _begin(function, rank, num_ranks, folder, arguments):
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
