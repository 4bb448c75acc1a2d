"""The program `ovq`, which is also `python -m ovq`, as `torchrun -m ovq train ...` needs it."""

import signal


def main() -> None:
    """Run the command line in a process of its own.

    Ctrl-C ends it as it ends any program while the commands are imported and when all is done: Python would
    show where it was then.
    """
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from ovq.cli import main as run

    run()


if __name__ == "__main__":
    main()
