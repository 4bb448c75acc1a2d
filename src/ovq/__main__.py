"""`python -m ovq`, which `torchrun -m ovq train ...` needs."""

from ovq.cli import main

if __name__ == "__main__":
    main()
