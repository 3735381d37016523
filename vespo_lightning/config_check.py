"""Checks the command line before Hydra runs: a mistyped key or option becomes a sentence with near names."""

import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf

from vespo_lightning.errors import UserError

CONFIG_PATH = "pkg://vespo_lightning.conf"

OPEN_SECTIONS = ("callbacks", "logger", "trainer")
"""Sections that take keys of the user's own with `+key=value`; a section that is `{}` by default does too."""

_MOST_NAMES = 12


def check_overrides(
    argv: Sequence[str],
    config_name: str,
    config_path: str = CONFIG_PATH,
    open_sections: Sequence[str] = OPEN_SECTIONS,
) -> None:
    """Refuses command lines that name a key or a group option which does not exist.

    `argv` is the command line without the program's name; Hydra's own flags in it are understood.
    `config_path` is `pkg://package.of.yaml.files` or an absolute folder.

    Raises:
        UserError: an override is unreadable, unknown, or adds a key outside the open sections.
    """
    args = get_args_parser().parse_args(list(argv))
    if args.help or args.hydra_help or args.shell_completion or args.config_path:
        return
    lines = list(args.overrides)
    if args.config_dir is not None:
        if not os.path.isdir(args.config_dir):
            raise UserError(f"--config-dir {args.config_dir}: no such folder")
        lines.append(f"hydra.searchpath=[file://{os.path.abspath(args.config_dir)}]")
    name = args.config_name or config_name
    try:
        with config_source(config_path):
            overrides = _parser().parse_overrides(lines)
            for variant in _single_runs(overrides) if args.multirun else [overrides]:
                _check_one_run(variant, name, open_sections)
    except OverrideParseException as error:
        raise UserError(
            f"{error.override} cannot be read as key=value; quote a value with commas, spaces, = or brackets"
        ) from error
    except HydraException as error:
        raise UserError(one_line(error)) from error


def config_source(config_path: str) -> AbstractContextManager[None]:
    """Lets `compose` read `config_path` (`pkg://...` or an absolute folder) while the context is open."""
    if config_path.startswith("pkg://"):
        module = config_path.removeprefix("pkg://").replace("/", ".")
        return initialize_config_module(module, version_base="1.3")
    return initialize_config_dir(config_path, version_base="1.3")


def one_line(error: BaseException) -> str:
    """The message of `error`, and of a cause that says more, on a single line."""
    parts = [" ".join(str(e).split()) for e in (error, error.__cause__) if e is not None]
    if len(parts) == 2 and parts[1] in parts[0]:
        parts.pop()
    return "; ".join(part for part in parts if part) or type(error).__name__


def _parser() -> OverridesParser:
    return OverridesParser.create(GlobalHydra.instance().config_loader())


def _single_runs(overrides: list[Override]) -> Iterator[list[Override]]:
    """Command lines without sweeps that together hold every value of every sweep."""
    choices: list[list[Override]] = []
    for o in overrides:
        if not o.is_sweep_override():
            choices.append([o])
        elif o.is_discrete_sweep():
            key = _line(o).partition("=")[0]
            lines = [f"{key}={value}" for value in o.sweep_string_iterator()]
            choices.append(_parser().parse_overrides(lines))
    first = [values[0] for values in choices if values]
    yield first
    for i, values in enumerate(choices):
        for other in values[1:]:
            yield [*first[:i], other, *first[i + 1 :]]


def _check_one_run(overrides: list[Override], config_name: str, open_sections: Sequence[str]) -> None:
    for o in overrides:
        if o.is_add() or o.is_force_add():
            _check_addition(o, overrides, config_name, open_sections)
    try:
        compose(config_name, [_line(o) for o in overrides])
    except (HydraException, ValueError) as error:  # ValueError: `group=null`
        # Hydra says where it stopped; which typed word is wrong, and what was meant, is found here.
        _explain(overrides, config_name)
        raise UserError(one_line(error)) from error


def _check_addition(o: Override, overrides: list[Override], config_name: str, open_sections: Sequence[str]) -> None:
    """`+key=value` would carry a typing error into the run unseen, so it is for groups and open sections."""
    key = o.key_or_group
    if _is_hydras(o) or _options(key, overrides, config_name):
        return
    known = _known_config(overrides, config_name)
    if _has_key(known, key):
        if o.is_force_add():
            return
        raise UserError(f"{_line(o)} adds a key that exists; type {_line(o).lstrip('+')} to change it")
    if any(key.startswith(section + ".") for section in open_sections) or _in_empty_section(known, key):
        return
    raise UserError(
        f"{_line(o)} adds a key that nothing reads; {_nearest_names(known, key)}"
        f" (+ is for {', '.join(open_sections)} and for sections that are empty)"
    )


def _explain(overrides: list[Override], config_name: str) -> None:
    """Raises for the first override that names an unknown option or key; returns if there is none."""
    values = []
    for o in overrides:
        if _is_hydras(o):
            continue
        options = _options(o.key_or_group, overrides, config_name)
        if options and not o.is_sweep_override():
            _check_options(o, options)
        elif not options and not (o.is_add() or o.is_force_add()):
            values.append(o)
    known = _known_config(overrides, config_name)
    for o in values:
        if not _has_key(known, o.key_or_group):
            raise UserError(f"{_line(o)} is unknown; {_nearest_names(known, o.key_or_group, _groups())}")


def _check_options(o: Override, options: list[str]) -> None:
    value = o.value()
    if isinstance(value, dict) or o.is_delete():  # `group={key:value}` chooses no file
        return
    for chosen in value if isinstance(value, list) else [value]:
        if str(chosen).removesuffix(".yaml") not in options:
            near = difflib.get_close_matches(str(chosen), options, n=2, cutoff=0.5)
            hint = f" (nearest: {', '.join(near)})" if near else ""
            typed = "null" if chosen is None else chosen
            raise UserError(f"{o.key_or_group}={typed} is unknown; valid: {', '.join(options)}{hint}")


def _known_config(overrides: list[Override], config_name: str) -> dict[str, Any]:
    """The unresolved configuration of the typed group choices alone: what value overrides may refer to."""
    kept = [_line(o) for o in overrides if _is_hydras(o) or _options(o.key_or_group, overrides, config_name)]
    try:
        cfg = compose(config_name, kept)
    except HydraException:
        cfg = compose(config_name)
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _line(o: Override) -> str:
    return o.input_line or ""


def _is_hydras(o: Override) -> bool:
    return o.is_hydra_override() or o.key_or_group == "hydra"


def _options(group: str, overrides: Iterable[Override], config_name: str) -> list[str]:
    """Names of the files in a config group, a typed search path included; empty if it is no group."""
    search = [_line(o) for o in overrides if o.key_or_group == "hydra.searchpath"]
    loader = GlobalHydra.instance().config_loader()
    return sorted(loader.get_group_options(group, config_name=config_name, overrides=search))


def _groups() -> list[str]:
    return [name for name in GlobalHydra.instance().config_loader().list_groups("") if name != "hydra"]


def _has_key(known: dict[str, Any], key: str) -> bool:
    node: Any = known
    for part in key.replace("[", ".").replace("]", "").split("."):
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            return False
    return True


def _in_empty_section(known: dict[str, Any], key: str) -> bool:
    """Whether the innermost existing section above `key` is `{}` in the configuration."""
    node: Any = known
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            break
        node = node[part]
    return node == {}


def _all_keys(known: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, value in known.items():
        keys.append(f"{prefix}{name}")
        if isinstance(value, dict):
            keys += _all_keys(value, f"{prefix}{name}.")
    return keys


def _nearest_names(known: dict[str, Any], key: str, groups: Sequence[str] = ()) -> str:
    """`nearest: a.b, ...`, from the typed section if it exists, else from everywhere; or the valid names."""
    section, _, word = key.rpartition(".")
    keys = _all_keys(known)
    inside = [name for name in keys if name.rpartition(".")[0] == section]

    def likeness(name: str) -> float:
        last = difflib.SequenceMatcher(None, word, name.rpartition(".")[2]).ratio()
        # A whole path is compared only where its section is mistyped too.
        return max(last, difflib.SequenceMatcher(None, key, name).ratio()) if section and not inside else last

    candidates = {*(inside if section and inside else [*keys, *groups])}
    near = sorted((n for n in candidates if likeness(n) > 0.65), key=lambda n: (-likeness(n), n))[:3]
    if near:
        return f"nearest: {', '.join(near)}"
    valid = inside or [name for name in keys if "." not in name]
    return f"valid here: {', '.join(valid[:_MOST_NAMES])}{', ...' if len(valid) > _MOST_NAMES else ''}"
