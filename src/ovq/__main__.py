"""The command `ovq`, also as `python -m ovq`, which `torchrun -m ovq train ...` requires."""

import os
import signal


def main() -> None:
    """Run the command line as the main program of a process.

    While commands are imported and after they are done, Ctrl-C ends the process without a traceback.
    """
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.environ.get("COLUMNS") == "0":
        # That of terminals without a size; rich would print nothing.
        del os.environ["COLUMNS"]
    from ovq.cli import main as run

    run()


if __name__ == "__main__":
    main()
