"""What the entry points share: run folders, stored configurations, the resume check, errors as one sentence.

Nothing here imports torch, so that a typing error on the command line is answered at once.
"""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, OverrideParseException, SearchPathException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vespo_lightning.config_check import CONFIG_PATH, check_overrides, one_line
from vespo_lightning.errors import UserError

CONFIG_FILE = "config.yaml"
"""Name of the resolved configuration in a run folder."""

VOLATILE_KEYS = ("resume", "name", "folder")
"""Keys that say where a run is kept, not what it computes: outside the hash and the resume check."""

_ABSENT = "(absent)"
_MISSING = "???"
_MOST_DIFFERENCES = 6

Config = DictConfig | Mapping[str, Any]


def run_folder(resume: str | None, name: str) -> str:
    """The folder of a run: the one that is resumed, else a new `runs/NAME/DATE_TIME_XXXX`.

    A resolver for `hydra.run.dir: ${run_folder:${resume},${name}}`. The four hex digits keep
    runs apart that start in the same second.
    """
    if resume:
        return str(resume)
    return f"runs/{name}/{datetime.now():%Y-%m-%d_%H-%M-%S}_{uuid4().hex[:4]}"


OmegaConf.register_new_resolver("run_folder", run_folder, use_cache=True, replace=True)


def resolved(cfg: Config) -> dict[str, Any]:
    """`cfg` as plain containers with every interpolation replaced.

    Raises:
        UserError: a required value (`???`) was not given, or an interpolation points nowhere.
    """
    plain = _plain(cfg)
    missing = [key for key, value in _flat(plain).items() if value == _MISSING]
    if missing:
        raise UserError(f"{', '.join(missing)} has no value; type {missing[0]}=...")
    return plain


def _plain(cfg: Config) -> dict[str, Any]:
    node = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg))
    try:
        plain = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration cannot be resolved: {one_line(error)}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def save_resolved(cfg: Config, folder: str | Path) -> Path:
    """Writes the resolved configuration to `folder/config.yaml`, whole or not at all; returns the path."""
    path = Path(folder) / CONFIG_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".yaml.part")
    OmegaConf.save(OmegaConf.create(resolved(cfg)), draft)
    os.replace(draft, path)
    return path


def load_resolved(folder: str | Path) -> DictConfig:
    """The configuration that `save_resolved` wrote in a run folder.

    Raises:
        UserError: `folder` does not exist or holds no configuration.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        why = f"has no {CONFIG_FILE}" if Path(folder).is_dir() else "does not exist"
        raise UserError(f"resume={folder}: the folder {why}; give the run folder that the run printed")
    try:
        cfg = OmegaConf.load(path)
    except Exception as error:  # any YAML error: the file was edited or cut short
        raise UserError(f"resume={folder}: {CONFIG_FILE} in it cannot be read: {one_line(error)}") from error
    if not isinstance(cfg, DictConfig) or not cfg:
        raise UserError(f"resume={folder}: {CONFIG_FILE} in it is not a configuration")
    return cfg


def config_hash(cfg: Config) -> str:
    """SHA-256, in hex, of the resolved configuration as canonical JSON, without `VOLATILE_KEYS`."""
    kept = {key: value for key, value in resolved(cfg).items() if key not in VOLATILE_KEYS}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def config_differences(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """`(dotted key, value in a, value in b)` where the two differ; `"(absent)"` for a key that one lacks."""
    flat_a, flat_b = _flat(_plain(a)), _flat(_plain(b))
    return [
        (key, flat_a.get(key, _ABSENT), flat_b.get(key, _ABSENT))
        for key in sorted(flat_a.keys() | flat_b.keys())
        if flat_a.get(key, _ABSENT) != flat_b.get(key, _ABSENT) and key.split(".")[0] not in VOLATILE_KEYS
    ]


def resume_config(typed: DictConfig, default: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The configuration to go on with for `resume=RUN`: the stored one, if it agrees with what was typed now.

    `typed` is composed with `overrides` (the command line's, Hydra's own left out), `default` without. A key
    counts as typed if an override names it or its section (a group stands for all of its keys), or changed it
    indirectly (`experiment=...`, interpolations). Keys that were not typed take the stored value.

    Raises:
        UserError: a typed key differs from the stored value, or the folder is not a run folder.
    """
    folder = typed.resume
    stored = load_resolved(folder)
    sections = [_section(line) for line in overrides]
    indirect = {key for key, _, _ in config_differences(default, typed)}
    wrong = [
        (key, old, new)
        for key, old, new in config_differences(stored, typed)
        if new != _MISSING and (key in indirect or any(f"{key}.".startswith(f"{s}.") for s in sections))
    ]
    if wrong:
        shown = "; ".join(f"{key} is {old!r} there and {new!r} here" for key, old, new in wrong[:_MOST_DIFFERENCES])
        more = f"; and {len(wrong) - _MOST_DIFFERENCES} more" if len(wrong) > _MOST_DIFFERENCES else ""
        raise UserError(
            f"resume={folder} goes on with the configuration of that run, but {shown}{more}: leave them out, "
            f"or start a new run from its weights with model.path={Path(folder) / 'export'}"
        )
    OmegaConf.update(stored, "resume", str(folder), force_add=True)
    OmegaConf.set_struct(stored, True)
    return stored


def check_version(folder: str, default: Config, groups: Container[str]) -> None:
    """Raises UserError where the stored configuration of a run lacks what this version reads.

    Args:
        groups: sections whose keys depend on the option that was chosen.
    """
    stored = load_resolved(folder)
    lacking = [str(key) for key in default if key not in stored and key not in VOLATILE_KEYS]
    for section, node in default.items():
        if section in stored and isinstance(node, DictConfig) and section not in groups:
            lacking += [f"{section!s}.{key!s}" for key in node if key not in stored[section]]
    if lacking:
        shown = ", ".join(lacking[:_MOST_DIFFERENCES]) + (", ..." if len(lacking) > _MOST_DIFFERENCES else "")
        raise UserError(
            f"resume={folder} was made by an earlier version, whose configuration lacks {shown}; start a new run from "
            f"its weights with model.path={Path(folder) / 'export'}"
        )


def run_entry(main: Callable[[DictConfig], Any], config_name: str, config_path: str = CONFIG_PATH) -> None:
    """Runs `main(cfg)` under Hydra; the whole body of an entry point's `if __name__ == "__main__"`.

    `main` is the plain function, not decorated by Hydra. The command line is checked first. With `resume=RUN`
    `main` gets the stored configuration. A mistake of the user ends the program with one line `error: ...` on
    stderr and status 1, Ctrl-C with status 130 and the command that goes on; other exceptions keep their
    traceback.
    """
    # Hydra would print exceptions its own way and exit before they get here.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")

    @functools.wraps(main)  # Hydra names the job after the file of the wrapped function
    def task(cfg: DictConfig) -> Any:
        # Inside Hydra's job, so that its "Error executing job" line does not come before ours.
        with _one_sentence():
            if cfg.get("resume"):
                default = compose(config_name, list(HydraConfig.get().overrides.hydra))
                check_version(cfg.resume, default, HydraConfig.get().runtime.choices)
                cfg = resume_config(cfg, default, HydraConfig.get().overrides.task)
            resolved(cfg)
            return main(cfg)

    with _one_sentence():
        check_overrides(sys.argv[1:], config_name, config_path)
        _check_resume_folder(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=config_path, config_name=config_name)(task)()


@contextmanager
def _one_sentence() -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning answers Ctrl-C itself: the interrupt is then the context of its exit. 130: said already.
        by_lightning = isinstance(error.__context__, KeyboardInterrupt)
        if isinstance(error, SystemExit) and (error.code == 130 or not by_lightning):
            raise
        print(f"\n{_interrupted()}", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        message = _user_message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from None


def _user_message(error: BaseException) -> str | None:
    """The sentence for the user if `error` is, or was caused by, a mistake of theirs; None otherwise."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return " ".join(str(cause).split())
        cause = cause.__cause__
    if isinstance(error, ConfigCompositionException | OverrideParseException | SearchPathException):
        return one_line(error)
    return None


def _interrupted() -> str:
    if not HydraConfig.initialized():
        return "interrupted"
    folder = HydraConfig.get().runtime.output_dir
    if not (Path(folder) / CONFIG_FILE).is_file():
        return "interrupted"
    return f"interrupted; go on with: python {sys.argv[0]} resume={_shown(folder)}"


def _shown(folder: str) -> str:
    """`folder` relative to the working directory where it lies below it."""
    path = Path(folder)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else folder


def _check_resume_folder(argv: Sequence[str]) -> None:
    """Before Hydra runs, which would make the folder of a mistyped `resume=`."""
    for word in argv:
        key, _, value = word.lstrip("+").partition("=")
        if key == "resume" and value not in ("", "null"):
            load_resolved(value.strip("'\""))


def _section(override: str) -> str:
    """The dotted key of an override's value, or of the section that its group fills."""
    parsed = OverridesParser.create().parse_override(override)
    return parsed.package or parsed.key_or_group.replace("/", ".")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key; lists are leaves, and so are empty mappings."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, child in value.items():
        out |= _flat(child, f"{prefix}.{key}" if prefix else str(key))
    return out
