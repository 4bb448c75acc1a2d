"""Follows docs/use/first_results.md as its readers do: each part in a new clone and a new environment.

    python benchmarks/first_results.py --out FOLDER                  with a network
    python benchmarks/first_results.py --out FOLDER --model DIR      without; DIR is SmolLM2-135M-Instruct

Runs the commands of the page (```bash) in their order, after writing its files (```python title="..."), and
prints the seconds of each as rows for the table of the page. Commands that end with & stay in the background,
and the next one waits until their server answers. Compiled kernels and downloads are kept in FOLDER alone, so
that the first use of all is measured.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "use" / "first_results.md"
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# If the server process has exited, so does the script.
READY = "until curl -sf localhost:8000/health > health.json; do kill -0 $!; sleep 0.2; done"


def parts_of(page: str) -> dict[str, tuple[dict[str, str], list[str]]]:
    """Files and commands of each section of the page, by title. Those before the first section precede those
    of every section.
    """
    start, *sections = re.split(r"^## ", page, flags=re.MULTILINE)
    found = {}
    for section in sections:
        files, commands = {}, []
        for kind, name, text in re.findall(
            r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', start + section, flags=re.MULTILINE | re.DOTALL
        ):
            if name:
                files[name] = text
            elif kind == "bash":
                commands += re.findall(r"(?:.*\\\n)*.+", text)
        if "\n```" in section:
            found[section.partition("\n")[0]] = (files, commands)
    return found


def script_of(commands: list[str]) -> str:
    """A bash script that runs the commands and appends start and end time of each to `$SECONDS_FILE`."""
    lines = ["set -e", "trap 'kill $(jobs -p) 2> /dev/null || true' EXIT"]
    for number, command in enumerate(commands):
        lines += [f"cat <<'END'\n\n$ {command}\nEND", "begin=$EPOCHREALTIME", command]
        if command.endswith(" &"):
            lines.append(READY)
        lines.append(f'echo "{number} $begin $EPOCHREALTIME" >> "$SECONDS_FILE"')
    return "\n".join(lines) + "\n"


def follow(title: str, files: dict[str, str], commands: list[str], out: Path) -> bool:
    """Follow one section in the folder `out`; returns whether all commands succeeded."""
    checkout, seconds = out / "ovq", out / "seconds"
    out.mkdir(parents=True)
    subprocess.run(["git", "clone", "--quiet", ROOT, checkout], check=True)
    for name, text in files.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text)
    environment = {**os.environ, "XDG_CACHE_HOME": str(out / "cache"), "SECONDS_FILE": str(seconds)}
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        environment.pop(name, None)
    ended = subprocess.run(["bash", "-c", script_of(commands)], cwd=checkout, env=environment)
    rows = [line.split() for line in seconds.read_text().splitlines()] if seconds.exists() else []
    took = {int(number): float(end) - float(begin) for number, begin, end in rows}
    print(f"\n### {title}: {sum(took.values()):.0f} s\n\n| command | seconds |\n| --- | ---: |")
    for number, command in enumerate(commands):
        shown = " ".join(command.replace("\\\n", " ").split()).replace("|", "\\|")
        print(f"| `{shown}` | {took[number]:.1f} |" if number in took else f"| `{shown}` | failed |")
    sys.stdout.flush()
    return ended.returncode == 0


def main() -> None:
    """Follow all parts, or those that `--only` selects."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--model", help=f"a folder in the place of {HUB_MODEL}")
    parser.add_argument("--only", default="", help="parts whose title has this word")
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    print(f"commit {commit.stdout.strip()}, Python {platform.python_version()}, {os.cpu_count()} cores")
    is_fine = True
    for number, (title, (files, commands)) in enumerate(parts_of(PAGE.read_text()).items(), 1):
        if options.only in title:
            if options.model:
                replaced = str(Path(options.model).resolve())
                files = {name: text.replace(HUB_MODEL, replaced) for name, text in files.items()}
                commands = [command.replace(HUB_MODEL, replaced) for command in commands]
            is_fine &= follow(title, files, commands, options.out.resolve() / str(number))
    sys.exit(not is_fine)


if __name__ == "__main__":
    main()
