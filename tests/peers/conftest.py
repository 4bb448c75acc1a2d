"""The test suites of neighbours; collected by `make test-peers` alone, which sets `TRANSFORMERS_TESTS`."""

import collections
import os
import re
from importlib.metadata import version

from tests.peers import sources

# Neither the suites nor the neighbours they need are there in an ordinary run.
collect_ignore_glob = [] if os.environ.get("TRANSFORMERS_TESTS") else ["test_*.py"]

NEIGHBOURS = ["transformers", "torch", "peft", "accelerate", "trl"]

#: Markers of transformers' tests, which are registered in a file that its source distribution lacks.
MARKERS = """
    accelerate_tests executorch_export_test flash_attn_test flash_attn_3_test flash_attn_4_test generate
    is_agent_test is_expert_parallel_test is_fsdp_test is_pipeline_test is_staging_test
    is_tensor_parallel_test is_training_test onnx_export_test order timeout torch_compile_test
    torch_export_test
"""

if os.environ.get("TRANSFORMERS_TESTS"):
    # transformers reads both on import: run what it calls slow too, and ask no hub for anything.
    os.environ.setdefault("RUN_SLOW", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sources.add_to_path(os.environ["TRANSFORMERS_TESTS"])


def pytest_configure(config):
    if os.environ.get("TRANSFORMERS_TESTS"):
        # Warnings of neighbours, many of them given on import, are theirs to mend.
        config.addinivalue_line("filterwarnings", "default")
        for marker in MARKERS.split():
            config.addinivalue_line("markers", f"{marker}: of transformers' tests")


def pytest_terminal_summary(terminalreporter):
    """Count by test case, and skipped tests by reason: the figures of docs/use/evaluation.md."""
    if not os.environ.get("TRANSFORMERS_TESTS"):
        return
    counts, reasons = collections.defaultdict(collections.Counter), collections.Counter()
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            # Subtests are no tests of their own here.
            if not hasattr(report, "context"):
                counts[report.nodeid.rpartition("::")[0]][outcome] += 1
                if outcome == "skipped":
                    reasons[re.sub("^Skipped: ", "", report.longrepr[2])] += 1
    terminalreporter.section(", ".join(f"{name} {version(name)}" for name in NEIGHBOURS))
    for case, count in sorted(counts.items()):
        terminalreporter.line(
            f"{case}: " + ", ".join(f"{count[o]} {o}" for o in ("passed", "failed", "skipped"))
        )
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:6} skipped: {reason}")
