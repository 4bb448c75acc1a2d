"""Try the code of figures with models that train in seconds: `python -m tests.research.reproduce NAME...`.

The files are those of `ovq reproduce`, in `reproduce-out/tiny`.
"""

import sys
from pathlib import Path

from ovq.runtime.progress import Reporter
from ovq_lab.figures.engine import reproduce
from ovq_lab.figures.figures import get_figure
from tests.research.reproduce.common import TINY, workshop

if __name__ == "__main__":
    out = Path("reproduce-out/tiny")
    with Reporter() as reporter:
        for name in sys.argv[1:]:
            reproduce(get_figure(name, TINY), workshop(out, num_seeds=1, reporter=reporter))
            reporter.say(f"Wrote {out}/rows/{name}.json and {out}/figures/{name}.png")
