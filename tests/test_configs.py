"""Every config, with every backbone, holds what its job takes; the strings behind a config's colon."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from ml_collections import ConfigDict

from configs import defaults, demo_prosody, fsc, pretrain_ulm
from spjax.config import parse
from spjax.jobs import comparing
from spjax.models.config import ProsodyConfig, UnitLMConfig

CONFIGS = sorted(
    path.stem for path in Path(defaults.__file__).parent.glob("*.py") if path.stem not in ("__init__", "defaults")
)


@pytest.fixture(params=CONFIGS)
def module(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(f"configs.{request.param}")


@pytest.fixture
def pretrains(module: ModuleType) -> None:
    config = module.get_config()
    lms = [task.lm for task in config.tasks.values()] if config.job == "methods" else [config.lm]
    if "tiny" in lms:
        with pytest.raises(ValueError, match="take a config that pretrains, such as configs/demo_prosody"):
            module.get_config("backbone=pgslm")
        pytest.skip("it adapts the unit LM of the package")


@pytest.mark.parametrize("options", ["", "backbone=gslm"])
def test_every_config_is_sound(module: ModuleType, options: str) -> None:
    config = module.get_config(options)
    parse(config)
    config.lock()


@pytest.mark.usefixtures("pretrains")
def test_every_config_that_pretrains_is_sound_with_a_multi_stream_lm(module: ModuleType) -> None:
    test_every_config_is_sound(module, "backbone=pgslm")


@pytest.mark.parametrize("family", defaults.FAMILIES)
def test_families_have_about_the_same_size(family: str) -> None:
    plain, config = pretrain_ulm.get_config(), pretrain_ulm.get_config(f"family={family}")
    parse(config)
    sizes = [UnitLMConfig(**one.lm.to_dict()).num_params for one in (plain, config)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.2)  # OPT has a table of positions, Qwen2 fewer key heads
    prompted = fsc.get_config(f"family={family}")
    parse(prompted)
    assert prompted.lm == ("runs/pretrain_ulm/lm" if family == "gslm" else f"runs/pretrain_ulm_{family}/lm")
    assert prompted.pretraining.lm.to_dict() == config.lm.to_dict()


def test_the_default_is_a_unit_lm(module: ModuleType) -> None:
    config = module.get_config("backbone=gslm")
    assert "prosody" not in (config.lm if config.job == "pretrain" else config.pretraining.lm)
    if module is not demo_prosody:
        assert config.to_json() == module.get_config().to_json()


@pytest.mark.usefixtures("pretrains")
def test_pgslm_is_discrete_and_told_both_and_lies_elsewhere(module: ModuleType) -> None:
    plain, config = module.get_config("backbone=gslm"), module.get_config("backbone=pgslm")
    lm = config.lm if config.job == "pretrain" else config.pretraining.lm
    assert UnitLMConfig(**lm.to_dict()).prosody == ProsodyConfig()
    assert config.data == plain.data  # records are the same: those of a multi-stream LM hold more
    if config.job == "prompt":
        assert config.lm != plain.lm
        assert config.lm.endswith("_pgslm/lm")


@pytest.mark.usefixtures("pretrains")
def test_a_stream_is_turned_off_like_any_setting(module: ModuleType) -> None:
    config = module.get_config("backbone=pgslm")
    config.lock()
    prefix = "" if config.job == "pretrain" else "pretraining."
    config.update_from_flattened_dict({f"{prefix}lm.prosody.f0_input": False, f"{prefix}pretrain.f0_bins": 16})
    lm = config.lm if config.job == "pretrain" else config.pretraining.lm
    assert UnitLMConfig(**lm.to_dict()).prosody == ProsodyConfig(f0_input=False)


@pytest.mark.parametrize("options", ["pgslm", "backbone=hubert", "backbone=", "lm=pgslm", "backbone=pgslm,epochs=3"])
def test_other_options_are_refused_with_what_there_is(module: ModuleType, options: str) -> None:
    with pytest.raises(ValueError, match="say one of backbone=gslm, backbone=pgslm, family=gslm"):
        module.get_config(options)


def test_the_prosody_demo_compares_lms_that_differ_in_prosody_alone() -> None:
    config = demo_prosody.get_config()
    parse(config)
    job = parse(config)
    variants = {name: comparing.variant_of(job, name, "runs/x") for name in config.variants}
    lms = {name: one.pretraining.lm for name, one in variants.items()}
    assert {name: lm.prosody and (lm.prosody.duration_input, lm.prosody.f0_input) for name, lm in lms.items()} == {
        "units": None, "none": (False, False), "duration": (True, False), "f0": (False, True), "both": (True, True)
    }  # fmt: skip
    assert comparing.in_order(job) == ["units", "none", "duration", "f0", "both"]
    assert len({(lm.dim, lm.layers, lm.heads, lm.ffn_dim) for lm in lms.values()}) == 1
    assert [name for name, one in variants.items() if one.baselines] == ["units"]
    assert {one.lm for one in variants.values()} == {f"runs/x/{name}/ulm/lm" for name in lms}
    assert len({str(one.train) + str(one.prompt) + str(one.optim) for one in variants.values()}) == 1


def test_a_wrong_override_of_a_variant_is_one_line() -> None:
    config = demo_prosody.get_config()
    config.variants.units = {"prompt": {"ranks": 3}}
    with pytest.raises(ValueError, match=r'^variants.units: Key "ranks" .* locked. Did you mean "rank" [^\n]*$'):
        parse(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.prompt.update(ranks=3), "the config has prompt.ranks, which is no setting of this job"),
        (lambda config: config.update(sampling=1), "the config has sampling, which is no setting of this job"),
        (lambda config: config.pretraining.lm.update(depth=3), "the config has pretraining.lm.depth, which is no"),
        (lambda config: config.__delattr__("data"), "the config has no data: add it"),
        (lambda config: config.pretraining.__delattr__("optim"), "the config has no pretraining.optim: add it"),
    ],
)
def test_unknown_and_missing_settings_are_named(change: Callable[[ConfigDict], None], message: str) -> None:
    config = fsc.get_config()
    change(config)
    with pytest.raises(ValueError, match=message):
        parse(config)
