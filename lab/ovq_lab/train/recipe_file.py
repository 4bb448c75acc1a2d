"""Recipe files: the configuration of a run as YAML or JSON, complete or as changes to a recipe.

    recipe: lm-ovq            # the recipe to start from; without it, other fields have their defaults
    task: {dataset: books/}
    model: {num_slots: 1024}
    train:
      steps: 3000
      lengths: [4096]
      length_shares: [1.0]

The `run_config.json` in the folder of a run is such a file, too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovq.fields import did_you_mean, field_types, with_new_names
from ovq_lab.tasks import task_class
from ovq_lab.train.config import SECTIONS, ModelArgs, RunConfig, TrainArgs
from ovq_lab.train.recipes import get_recipe
from ovq_lab.train.values import parse_value, type_of_field

ENDINGS = (".yaml", ".yml", ".json")


def load_recipe(path: Path) -> RunConfig:
    """Load the configuration of a run from a recipe file.

    Raises:
        ValueError: If the file cannot be read or is neither YAML nor JSON, or a name is unknown or a value
            invalid.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "mine.yaml"
        >>> _ = path.write_text("recipe: recall-ovq\\ntrain: {steps: 300, learning_rate: 1e-3}")
        >>> load_recipe(path).train.steps
        300
    """
    content = _content(path)
    try:
        return _config(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _content(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = json.loads(text, object_pairs_hook=_fields) if path.suffix == ".json" else _yaml(text)
    except OSError as error:
        raise ValueError(
            f"{path}: expected a recipe file, found none that can be read ({error.strerror})"
        ) from error
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: expected YAML or JSON, found what is none ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected sections {', '.join(SECTIONS)}, found {type(found).__name__}")
    return found


def _yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        # While a mapping is read: later, another node may be in its place, or merged fields (`<<`) in it.
        def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            _fields([(str(name.value), value) for name, value in node.value])
            return node

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Fields by name; YAML and JSON would keep the last of a name that is given twice."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"expected each name once, found {name!r} twice")
        fields[name] = value
    return fields


def _config(content: Mapping[str, Any]) -> RunConfig:
    known = ("recipe", *SECTIONS)
    for name in content:
        if name not in known:
            raise ValueError(
                f"expected sections among {', '.join(known)}, found {name!r}{did_you_mean(str(name), known)}"
            )
        if name in SECTIONS and not isinstance(content[name], dict):
            raise ValueError(f"{name}: expected fields and their values, found {content[name]!r}")
    fields = {section: dict(content.get(section, {})) for section in SECTIONS}
    fields["model"] = with_new_names(fields["model"])
    # Those that mixers declare, as `--set` takes them.
    declared = [name for name in fields["model"] if name not in field_types(ModelArgs)]
    of_mixers = [f"model.{name}={_as_text(fields['model'].pop(name))}" for name in declared]
    return _complete(content, fields).override(of_mixers, flag="")


def _as_text(value: Any) -> str:
    """A value of YAML or JSON as on the command line."""
    if isinstance(value, list):
        return ",".join(map(_as_text, value))
    return "none" if value is None else json.dumps(value) if isinstance(value, bool) else str(value)


def _complete(content: Mapping[str, Any], fields: dict[str, dict[str, Any]]) -> RunConfig:
    """The configuration with these fields of its sections."""
    name = fields["task"].pop("name", None)
    if "recipe" in content:
        recipe = get_recipe(str(content["recipe"]))
        if name not in (None, recipe.task.name):
            raise ValueError(f"task.name: expected that of the recipe, {recipe.task.name}, found {name!r}")
        bases = {section: getattr(recipe, section) for section in SECTIONS}
        return RunConfig(
            **{
                section: dataclasses.replace(base, **_values(type(base), section, fields[section]))
                for section, base in bases.items()
            }
        )
    if name is None:
        raise ValueError("expected a recipe or a task.name, found neither")
    try:
        kinds: dict[str, Any] = {"task": task_class(str(name)), "model": ModelArgs, "train": TrainArgs}
    except ValueError as error:
        raise ValueError(f"task.name: {error}") from error
    return RunConfig(
        **{section: kind(**_values(kind, section, fields[section])) for section, kind in kinds.items()}
    )


def _values(kind: type, section: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a section, with lists as tuples."""
    values = {}
    for name, value in fields.items():
        where = f"{section}.{name}"
        expected = type_of_field(kind, str(name), where)
        if isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, str):
            # YAML reads 1e-3 as a string; strings are parsed as on the command line.
            value = parse_value(value, expected, where)
        values[str(name)] = value
    return values
