"""What the package says of itself: one version, links that work on the index, versions of Python."""

import importlib
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import ovq
from ovq.ops.backends.cpu import compiler

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[1]
PUBLISHED = ("pyproject.toml", "CITATION.cff", "mkdocs.yml", "README.md", "SECURITY.md")
FOLDERS = {name: ROOT / name for name in (".", "lab", "integrations/vllm")}
PROJECTS = {name: tomllib.loads((root / "pyproject.toml").read_text()) for name, root in FOLDERS.items()}
PROJECT, LABORATORY = PROJECTS["."], PROJECTS["lab"]


def test_every_place_names_the_same_version():
    # The changelog has a test of its own, in tests/test_docs.py.
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == ovq.__version__
    for project, root in FOLDERS.items():
        assert "version" in PROJECTS[project]["project"]["dynamic"]
        path = root / PROJECTS[project]["tool"]["hatch"]["version"]["path"]
        assert path.resolve() == Path(ovq.__file__)


@pytest.mark.parametrize("name", ["lab", "integrations/vllm"])
def test_what_builds_on_the_library_asks_for_its_version_and_has_the_licence(name):
    major, minor = ovq.__version__.split(".")[:2]
    project = PROJECTS[name]["project"]
    assert f"ovq>={major}.{minor},<{major}.{int(minor) + 1}" in project["dependencies"]
    assert project["license-files"] == ["LICENSE"]
    assert (ROOT / name / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_an_editable_installation_of_the_checkout_has_the_laboratory_and_what_it_needs():
    assert PROJECT["tool"]["hatch"]["build"]["dev-mode-dirs"] == ["src", "lab"]
    project = LABORATORY["project"]
    needed = {each for each in project["dependencies"] if not each.startswith("ovq>")}
    for extra in project["optional-dependencies"].values():
        needed |= {*extra}
    assert needed <= {*PROJECT["project"]["optional-dependencies"]["dev"]}
    assert project["requires-python"] == PROJECT["project"]["requires-python"]


@pytest.fixture
def metadata_of(monkeypatch):
    """What hatch_build.py says of the package, for a repository or none; hatchling need not be installed."""
    for name, base in (
        ("hatchling.builders.hooks.plugin.interface", "BuildHookInterface"),
        ("hatchling.metadata.plugin.interface", "MetadataHookInterface"),
    ):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**{base: object}))
    names = runpy.run_path(str(ROOT / "hatch_build.py"))

    def metadata(repository):
        monkeypatch.setenv("OVQ_REPOSITORY", repository)
        hook = names["AddressesHook"]()
        hook.root = str(ROOT)
        found = {"version": "1.2.3"}
        hook.update(found)
        return found

    return metadata


def test_links_of_the_readme_are_absolute_on_the_package_index(metadata_of):
    text = (ROOT / "README.md").read_text()
    relative = re.findall(r"\]\((?!https?://|#)([^)]+)\)", text)
    assert len(relative) > 10
    assert [name for name in relative if not (ROOT / name.partition("#")[0]).is_file()] == []
    shown = metadata_of("somebody/a-fork")["readme"]["text"]
    assert re.findall(r"\]\((?!https?://|#)([^)]+)\)", shown) == []
    for name in relative:
        # A picture has to be the file itself, not the page around it.
        kind = "" if name.endswith(".png") else "blob/"
        host = "github.com" if kind else "raw.githubusercontent.com"
        assert f"](https://{host}/somebody/a-fork/{kind}v1.2.3/{name})" in shown
    assert metadata_of("")["readme"]["text"] == text


def test_addresses_are_those_of_the_repository_that_builds(metadata_of):
    urls = metadata_of("somebody/a-fork")["urls"]
    assert urls["Repository"] == "https://github.com/somebody/a-fork"
    assert urls["Documentation"] == "https://somebody.github.io/a-fork/"
    assert list(metadata_of("")["urls"]) == ["Paper"]
    with pytest.raises(ValueError, match="OVQ_REPOSITORY: expected OWNER/NAME, found 'somebody'"):
        metadata_of("somebody")
    # Nothing is left to be filled in by hand, and the workflows name the repository they run in.
    assert set(PROJECT["project"]["dynamic"]) == {"version", "readme", "urls"}
    assert not re.search(r"\bOWNER\b", "".join((ROOT / name).read_text() for name in PUBLISHED))
    wheels = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())
    assert wheels["env"]["OVQ_REPOSITORY"] == "${{ github.repository }}"
    assert PROJECT["tool"]["cibuildwheel"]["linux"]["environment-pass"] == ["OVQ_REPOSITORY"]


def test_the_guide_to_installation_names_every_extra():
    text = (ROOT / "docs" / "use" / "install.md").read_text()
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]*) \|", text, flags=re.MULTILINE)))
    extras = (project["project"]["optional-dependencies"] for project in (PROJECT, LABORATORY))
    assert {name for each in extras for name in each} == set(named)


def test_the_extra_for_gguf_files_has_what_transformers_reads_them_with():
    extra = PROJECT["project"]["optional-dependencies"]["convert"]
    assert {re.match(r"\w+", each)[0] for each in extra} == {"gguf", "accelerate"}


@pytest.mark.parametrize(("torch", "extras"), [("cpu", "[serve]"), ("cu128", "[serve,triton]")])
def test_a_container_can_serve(torch, extras):
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    (install,) = re.findall("^RUN (pip install .* uv .*)", lines, re.MULTILINE)
    stubs = f"TORCH={torch}; pip() {{ :; }}; rm() {{ :; }}; uv() {{ echo $@; }}; "
    told = subprocess.run(["sh", "-c", stubs + install], capture_output=True, text=True, check=True)
    assert f"/dist/ovq-*.whl{extras} " in told.stdout


def test_python_versions_that_are_named_are_tested():
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    tests = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    assert named == tests["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_files_that_a_workflow_names_are_there(path):
    text = path.read_text()
    assert yaml.safe_load(text)
    for name in re.findall(r"\b(?:tests|docs|src|lab)/[\w/]+\.(?:py|txt|md)\b", text):
        assert (ROOT / name).is_file(), name


def test_a_package_in_a_zip_file_says_so(tmp_path, monkeypatch):
    with zipfile.ZipFile(path := tmp_path / "wheel.whl", "w") as wheel:
        wheel.write(compiler.__file__, "zipped.py")
    monkeypatch.syspath_prepend(path)
    with pytest.raises(ImportError, match="expected an unpacked package, found a zip file: "):
        importlib.import_module("zipped")
