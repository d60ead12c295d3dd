"""YAML -> objects. Nothing else in gm reads YAML: constructors receive objects and plain values.

A node `{target: path.of.Class, params: {...}}` is an object. Objects are built from the inside out: inside
`params`, `foo_config: {target, params}` becomes the argument `foo`, and `emb_models` a list of embedders.
Files of Stability (`sgm.*`) and of mindone (`gm.*`) are understood as they are; gm/targets.py says how.
"""

import dataclasses
import inspect
import logging
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gm import targets
from gm.targets import nearest

logger = logging.getLogger(__name__)

SECTIONS = ("model", "optim", "data")
_logged = set()


def load_config(path, overrides=()):
    """Read a YAML file.

    Args:
        path: the file.
        overrides: texts such as "optim.lr=1e-3" or "model.params.scale_factor=0.2", applied after it; a
            number in the key picks an entry of a list.

    Returns:
        DictConfig with the sections model, optim and data, as far as the file has them, in this project's
        form even where the file has mindone's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown section, or a malformed override.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The config '{path}' does not exist.")
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not a YAML file: {e}") from e
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path} holds no sections; a config has {', '.join(SECTIONS)}.")
    for name in list(config):
        if name in targets.IGNORED_SECTIONS:
            _log_ignored(name, targets.IGNORED_SECTIONS[name])
            del config[name]
        elif name not in SECTIONS:
            raise ValueError(f"{path}: unknown section '{name}'{nearest(str(name), SECTIONS)}.")
    for name, own in (("model", _own_model), ("optim", _own_optim), ("data", _own_data)):
        if config.get(name):
            config[name] = own(_plain(config[name]))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ValueError(f"Override '{text}' is not of the form section.key=value.")
        try:
            OmegaConf.update(config, key, OmegaConf.create(f"value: {value}").value)
        except (yaml.YAMLError, OmegaConfBaseException) as e:
            raise ValueError(f"Override '{text}' does not fit {path}: {e}") from e
    return config


def section(config, name, args):
    """One section of a config as a frozen dataclass.

    Args:
        config: from `load_config`; a missing section counts as empty.
        name: "optim" or "data".
        args: the dataclass; its field names are the known keys, its defaults stand for keys left out.

    Raises:
        ValueError: an unknown key, or a value of the wrong type; names the key.
    """
    values = _plain(config.get(name) or {})
    fields = {field.name: field for field in dataclasses.fields(args)}
    for key in values:
        if key not in fields:
            raise ValueError(f"{name}.{key}: unknown key{nearest(key, fields)}.")
    typed = OmegaConf.structured(args)
    OmegaConf.set_readonly(typed, False)
    try:
        return args(**{key: _plain(value) for key, value in OmegaConf.merge(typed, values).items()})
    except OmegaConfBaseException as e:
        raise ValueError(f"{name}.{e.full_key or ''}: {str(e).splitlines()[0]}") from e


def build_engine(config, overrides=()):
    """The DiffusionEngine that a config describes; all weights are zero until gm.checkpoint.load_weights.

    Args:
        config: path of a YAML file, or a config from `load_config`.
        overrides: as in `load_config`, if a path is given.
    """
    if not isinstance(config, DictConfig):
        config = load_config(config, overrides)
    if "model" not in config:
        raise ValueError("The config has no section 'model'.")
    return instantiate(config.model, "model")


def instantiate(node, path=""):
    """Build the object of a node {target, params}, and before it the objects inside it.

    Args:
        node: DictConfig or dict.
        path: where the node stands in the YAML, for errors.

    Raises:
        ValueError: an unknown target or parameter, a missing one, or one with a value that is not supported
            here; names the path of the key, what was expected and the nearest known name.
    """
    return _build(_plain(node), path)


def _plain(node):
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _build(node, path):
    if not isinstance(node, dict) or "target" not in node or not isinstance(node.get("params") or {}, dict):
        raise ValueError(f"{path}: expected an entry with 'target' and 'params', found {node!r}.")
    cls = targets.resolve(node["target"], _join(path, "target"))
    parameters = dict(inspect.signature(cls).parameters)
    arguments = {}
    params = node.get("params") or {}
    beside = {key: node[key] for key in node if key not in ("target", "params")}
    for at, values in ((path, beside), (_join(path, "params"), params)):
        for key, value in values.items():
            name = _argument_name(key, parameters)
            if name and (values is params or key in targets.BESIDE_PARAMS):
                arguments[name] = _value(key, value, _join(at, key))
            elif not _ignored(cls.__name__, key, value, _join(at, key)):
                raise ValueError(
                    f"{_join(at, key)}: {cls.__name__} takes no '{key}'{nearest(key, parameters)}."
                )
    missing = [name for name, p in parameters.items() if p.default is p.empty and name not in arguments]
    if missing:
        raise ValueError(f"{_join(path, 'params')}: {cls.__name__} needs {', '.join(missing)}.")
    try:
        return cls(**arguments)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def _join(path, key):
    return f"{path}.{key}" if path else key


def _argument_name(key, parameters):
    """The argument that a key fills: `foo_config` is foo."""
    return next((name for name in (key, key.removesuffix("_config")) if name in parameters), None)


def _value(key, value, at):
    if key.endswith("_config") and value is not None:
        return _build(value, at)
    if key == "emb_models":
        return [_build(entry, f"{at}.{i}") for i, entry in enumerate(value)]
    if key == "ddconfig":
        return _ddconfig(value, at)
    if key == "context_dim" and isinstance(value, list):  # SGM: one width a transformer block, all the same
        if len(set(value)) != 1:
            raise ValueError(f"{at}: {value} has different widths; one width is supported.")
        return value[0]
    return value


def _ddconfig(values, at):
    known = targets.DDCONFIG + targets.DDCONFIG_OPTIONAL
    kept = {}
    for key, value in values.items():
        if key in known:
            kept[key] = value
        elif not _ignored("ddconfig", key, value, f"{at}.{key}"):
            raise ValueError(f"{at}.{key}: unknown key{nearest(key, known)}.")
    missing = [key for key in targets.DDCONFIG if key not in kept]
    if missing:
        raise ValueError(f"{at}: {', '.join(missing)} is missing.")
    return kept


def _ignored(table, key, value, at):
    """Whether a key is one of those without effect here; ValueError if its value would need one."""
    if key not in targets.IGNORED.get(table, {}):
        return False
    allowed, reason = targets.IGNORED[table][key]
    if allowed is not targets.ANYTHING and value not in allowed:
        raise ValueError(
            f"{at}: {value!r} is not supported, only {' or '.join(map(repr, allowed))}: {reason}."
        )
    _log_ignored(at, reason)
    return True


def _log_ignored(at, reason):
    if at not in _logged:
        _logged.add(at)
        logger.info("%s in the config has no effect: %s.", at, reason)


# ---------------------------------------------------------------- mindone's form of the sections


def _own_model(node):
    """mindone's sigma_sampler_config stands beside the loss that it belongs to."""
    params = node.get("params") if isinstance(node, dict) else None
    if isinstance(params, dict) and "sigma_sampler_config" in params and "loss_fn_config" in params:
        sampler = params.pop("sigma_sampler_config")
        loss = params["loss_fn_config"]
        loss["params"] = {"sigma_sampler_config": sampler, **(loss.get("params") or {})}
    return node


def _own_optim(values):
    """mindone's {base_learning_rate, optimizer_config, scheduler_config} as this project's flat keys."""
    own = {key: value for key, value in values.items() if not key.endswith("_config")}
    if "base_learning_rate" in own:
        own["lr"] = own.pop("base_learning_rate")
    optimizer = values.get("optimizer_config")
    if optimizer:
        if optimizer.get("target") not in targets.OPTIMIZERS:
            known = ", ".join(targets.OPTIMIZERS)
            raise ValueError(
                f"optim.optimizer_config.target: '{optimizer.get('target')}' is not one of {known}."
            )
        _log_ignored("optim.optimizer_config.target", "rows are learned with bias-corrected AdamW")
        renamed = {key: key for key in targets.OPTIMIZER_KEYS}
        own.update(_renamed(optimizer.get("params"), renamed, "optim.optimizer_config.params"))
    scheduler = values.get("scheduler_config")
    if scheduler:
        name = str(scheduler.get("target")).rpartition(".")[2]
        if name not in targets.SCHEDULERS:
            hint = nearest(name, targets.SCHEDULERS)
            raise ValueError(f"optim.scheduler_config.target: unknown '{scheduler.get('target')}'{hint}.")
        own.update(
            _renamed(scheduler.get("params"), targets.SCHEDULERS[name], "optim.scheduler_config.params")
        )
    return own


def _own_data(values):
    """mindone's {..., dataset_config: {target, params}} as this project's flat keys; nothing of SGM's."""
    if "target" in values:
        _log_ignored("data", "pictures come from --data_path")
        return {}
    values = dict(values)
    values.update((values.pop("dataset_config", None) or {}).get("params") or {})
    for key, reason in targets.IGNORED_DATA.items():
        if key in values:
            _log_ignored(f"data.{key}", reason)
            del values[key]
    return values


def _renamed(params, names, at):
    own = {}
    for key, value in (params or {}).items():
        if key not in names:
            raise ValueError(f"{at}.{key}: unknown key{nearest(key, names)}.")
        if names[key]:
            own[names[key]] = value
    return own
