"""Making the methods known to PEFT, which keeps a closed list of them."""

from __future__ import annotations

import sys
import warnings

import peft
from packaging.version import Version
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from spectune.adapters.formats.dialect import prefix_of, type_for
from spectune.errors import SpectuneError
from spectune.methods import Method, find
from spectune.methods.registry import load_plugins
from spectune.peft import generated
from spectune.peft.config import CONFIGS, SpectuneConfig
from spectune.peft.layer import PeftLayer
from spectune.peft.mixed import let_mix
from spectune.peft.tuner import SpectuneTuner

_BY_METHOD = {config.method: config for config in CONFIGS}
KNOWN = ("0.20", "0.22")  # from and before: private names of PEFT are used


def register_all() -> None:
    """Make every config known to PEFT.

    Raises:
        SpectuneError: this version of PEFT is not known to work, or it has a method of the same name.
    """
    if not Version(KNOWN[0]) <= Version(peft.__version__) < Version(KNOWN[1]):
        raise SpectuneError(
            f"spectune.peft is known to work with PEFT from {KNOWN[0]} and before {KNOWN[1]}, and {peft.__version__} "
            f'is installed: pip install "peft>={KNOWN[0]},<{KNOWN[1]}"'
        )
    # somebody else's package that fails is no reason to do without the others
    methods = load_plugins(lambda error: warnings.warn(f"PEFT does not know a method: {error}", stacklevel=2))
    for method in list(methods.values()):
        if type_for(method) is not None:
            config_of(method)


def config_of(method: str | type[Method]) -> type[SpectuneConfig]:
    """Return the config of a method, which PEFT knows from here on.

    `import spectune.peft` does this for every method that is known by then, those that installed packages offer among
    them; so it is for one that is registered later.

    Args:
        method: its name, or its class.

    Raises:
        SpectuneError: there is no such method, or none that can have a config; or PEFT has another of its name.
    """
    cls = find(method) if isinstance(method, str) else method
    made = _BY_METHOD.get(cls.name)
    if made is None:
        made = _BY_METHOD[cls.name] = generated.config_for(cls)
        setattr(generated, made.__name__, made)  # where it says that it is, so that it can be pickled
    _register(made)
    return made


def _register(config: type[SpectuneConfig]) -> None:
    value = str(type_for(find(config.method)))
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(value)  # type: ignore[call-overload] - the members are strings
    if known is config:
        return
    if known is not None or value in PeftType._member_map_:
        raise SpectuneError(
            f"this PEFT ({peft.__version__}) has a method {value} of its own: update spectune, or go back to an "
            "earlier PEFT"
        )
    _extend_enum(value)
    prefix = prefix_of(value)
    short = config.__name__.removesuffix("Config")
    here = sys.modules[__name__]
    # "Linear" in the name is how PEFT tells an adapted linear layer for target_modules="all-linear"
    layer = type(f"{short}Linear", (PeftLayer,), {"__module__": __name__, "prefix": prefix})
    other = type(f"{short}Other", (layer,), {"__module__": __name__})
    members = {"__module__": __name__, "prefix": prefix, "tuner_layer_cls": layer, "other_layer_cls": other}
    tuner = type(f"{short}Model", (SpectuneTuner,), members)
    for made in (layer, other, tuner):
        setattr(here, made.__name__, made)
    name = value.lower()
    register_peft_method(name=name, config_cls=config, model_cls=tuner, prefix=prefix, is_mixed_compatible=True)
    let_mix(config, tuner, PeftType(value))


def _extend_enum(value: str) -> None:
    """Add a member to PEFT's closed list of types; a plain string lacks `.value`, which transformers reads."""
    member = str.__new__(PeftType, value)
    member._name_, member._value_ = value, value
    PeftType._member_map_[value] = member
    PeftType._member_names_.append(value)
    PeftType._value2member_map_[value] = member
    type.__setattr__(PeftType, value, member)
