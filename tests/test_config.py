"""Settings: validation, JSON, and the flags that are generated from them."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig
from transformers import HfArgumentParser

from increlora_hf import IncreLoraArguments, IncreLoraConfig, config
from increlora_hf.config import as_config
from increlora_hf.method import penalties, scores


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r_avg": 1, "init_r": 4}, "r_avg=1 is below init_r=4 by more than overshoot=2.*Raise r_avg or lower init_r"),
        ({"r_avg": 1, "init_r": 2, "overshoot": 0}, "r_avg=1 is below init_r=2.*Raise r_avg or lower init_r"),
        ({"r_avg": 0}, "r_avg=0"),
        ({"r_avg": 2.5}, "r_avg=2.5"),
        ({"top_h": 0}, "top_h=0"),
        ({"increment": 0}, "increment=0"),
        ({"interval": 0}, "interval=0"),
        ({"start": -1}, "start=-1"),
        ({"beta1": 1.0}, r"beta1=1.0 is not a number in \(0, 1\)\. .*the default is 0.85"),
        ({"beta2": 0.0}, r"beta2=0.0 is not a number in \(0, 1\)"),
        ({"growth_fraction": 0}, "growth_fraction=0"),
        ({"score_tolerance": 1}, "score_tolerance=1"),
        ({"score": "best"}, "score='best' is unknown. Choose one of paper, weakest"),
        ({"penalty": "none"}, "penalty='none' is unknown. Choose one of paper, squared, directions"),
        ({"overshoot": -1}, "overshoot=-1"),
        ({"overshoot": 0.5}, "overshoot=0.5"),
        ({"score_reduction": "max"}, "score_reduction='max' is unknown. Choose one of mean, sqrt"),
        ({"rank_scaling": "none"}, "rank_scaling='none' is unknown"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"reserve_lambda": 0}, "reserve_lambda=0"),
        ({"lam_lr_multiplier": -1}, "lam_lr_multiplier=-1"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight=-0.1"),
        ({"init_std": "small"}, "init_std='small'"),
        ({"init_std": 0.0}, "init_std=0.0"),
        ({"rank_pattern": {}}, "rank_pattern"),
        ({"rank_pattern": {"query": 0}}, "adapts no layer: every rank is 0"),
        ({"rank_pattern": {"query": -1}}, "'query'.*=-1"),
        ({"rank_pattern": {"query": 1.5}}, "1.5"),
        ({"rank_pattern": "no/such/file.json"}, "is not a file"),
        ({"rank_pattern": '{"query": [}'}, "rank_pattern, line 1, column 12: not valid JSON"),
        ({"rank_pattern": '{"query": -1}'}, r"rank_pattern\['query'\]=-1 is not a rank"),
        ({"rank_pattern": 5}, "rank_pattern='5' is not a file"),
        ({"rank_pattern": {3: 1}}, "contains 3"),
        ({"rank_pattern": {"query": True}}, "=True is not a rank"),
        ({"rank_pattern": {"query": 10**9}}, "is not a rank in"),
        ({"advance_learning": "false"}, "advance_learning='false' is neither True nor False"),
        ({"restart_warmup": 1}, "restart_warmup=1 is neither True nor False"),
        ({"modules_to_save": "classifier"}, r"Give one, such as modules_to_save=\['classifier'\]"),
        ({"modules_to_save": ["classifier", 3]}, "contains 3"),
        ({"modules_to_save": 5}, "modules_to_save=5 is not a list of names"),
        ({"target_modules": "("}, r"target_modules='\(' is not a valid regular expression"),
        (
            {"target_modules": "a{99999999999}"},
            "is not a valid regular expression .the repetition number is too large",
        ),
        ({"target_modules": [""]}, "target_modules contains ''"),
        ({"target_modules": {"query": 2}}, "is not a list of names"),
        ({"score": []}, r"score=\[\] is unknown"),
        ({"seed": -1}, r"seed=-1 is not a whole number in \[0, "),
        ({"seed": 2**32}, r"seed=4294967296 is not a whole number in \[0, 4294967295\]"),
        ({"increment": 10**9}, r"increment=1000000000 is not a whole number in \[1, 65536\]"),
        ({"lora_alpha": 10**400}, "lora_alpha=1000"),
        ({"lora_alpha": 1e308}, "lora_alpha=1e[+]308 is not a number in"),
        ({"lora_alpha": 1e-30}, r"lora_alpha=1e-30 is not a number in \[1e-06, 1000000\]"),
        ({"lam_lr_multiplier": 1e-300}, "lam_lr_multiplier=1e-300 is not a number in"),
        ({"init_std": 1e5}, r"init_std=100000.0 is not a number in \[1e-06, 100\]. Give one that is, or 'unit'"),
        ({"init_std": 1e-20}, "init_std=1e-20 is not a number in"),
        ({"r_avg": np.array([1, 2])}, r"r_avg=array\(\[1, 2\]\) is not a whole number"),
        ({"score": np.array(["paper", "weakest"])}, "score=array.* is unknown"),
        ({"init_std": np.array([1.0, 2.0])}, "init_std=array.* is not a number"),
        pytest.param({"modules_to_save": {1, "a"}}, "modules_to_save contains 1", id="a set of a number and a name"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_setting_is_refused_with_value_and_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IncreLoraConfig(**settings)


COUNTS = ("r_avg", "init_r", "top_h", "increment", "interval", "overshoot", "start", "seed")
NUMBERS = (
    *("growth_fraction", "beta1", "beta2", "score_tolerance", "lora_alpha", "lora_dropout", "orth_reg_weight"),
    *("reserve_lambda", "init_std", "lam_lr_multiplier"),
)


@pytest.mark.parametrize("name", [*COUNTS, *NUMBERS])
def test_a_number_is_a_finite_one_and_nothing_that_looks_like_one(name: str) -> None:
    for value in (True, "3", math.nan, math.inf, -math.inf, -1, [1], 1j, *([2.5] if name in COUNTS else [])):
        with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is not a ")):
            IncreLoraConfig(**{name: value})


def test_numbers_of_other_libraries_become_plain_ones() -> None:
    config = IncreLoraConfig(r_avg=np.int64(3), lora_alpha=np.float32(8), increment=1.0)
    assert (type(config.r_avg), type(config.lora_alpha)) == (int, float)
    assert IncreLoraConfig.from_json(config.to_json()) == IncreLoraConfig(r_avg=3, lora_alpha=8.0)


def test_json_round_trip_keeps_every_setting() -> None:
    config = IncreLoraConfig(
        r_avg=8, top_h=3, target_modules=["query"], rank_pattern={"a.b": 3}, init_std="unit", seed=7
    )
    assert IncreLoraConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "settings", [None, "paper", 3, ["r_avg"], LoraConfig(), {1: 2}], ids=lambda value: type(value).__name__
)
def test_settings_in_no_mapping_are_refused(settings: Any) -> None:
    with pytest.raises(ValueError, match=r"holds no settings\. Give an IncreLoraConfig|Unknown IncreLoRA setting 1"):
        IncreLoraConfig.from_dict(settings)


def test_settings_as_a_config_or_a_mapping_are_a_config() -> None:
    config = IncreLoraConfig(r_avg=3)
    assert as_config(config) == as_config({"r_avg": 3}) == config
    assert as_config(None) is None


def test_names_may_come_in_any_collection() -> None:
    for names in ({"value", "query"}, ("query", "value"), frozenset({"query", "value"})):
        config = IncreLoraConfig(target_modules=names, modules_to_save=names)
        assert config == IncreLoraConfig(target_modules=["query", "value"], modules_to_save=["query", "value"])


def test_unknown_setting_in_json_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown IncreLoRA setting r_average. Known:.*r_avg"):
        IncreLoraConfig.from_dict({"r_average": 2})


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000, '{"r_avg": 2, "r_avg": 3}'], ids=lambda text: text[:9])
def test_a_text_that_holds_no_settings_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^the settings.* Correct it|holds no settings"):
        IncreLoraConfig.from_json(text)


def test_config_is_frozen_and_keyword_only() -> None:
    config = IncreLoraConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r_avg = 3
    with pytest.raises(TypeError):
        IncreLoraConfig(4)


def test_every_setting_has_a_flag_and_a_help_text() -> None:
    flags = {f.name for f in dataclasses.fields(IncreLoraArguments)}
    assert flags == {"increlora_preset", *(f"increlora_{f.name}" for f in dataclasses.fields(IncreLoraConfig))}
    assert all(f.metadata["help"] for f in dataclasses.fields(IncreLoraConfig))


def parse(*flags: str) -> IncreLoraConfig:
    (arguments,) = HfArgumentParser(IncreLoraArguments).parse_args_into_dataclasses(list(flags))
    return arguments.to_config()


def test_flags_without_values_are_the_defaults() -> None:
    assert parse() == IncreLoraConfig()


def test_flags_parse_every_kind_of_value(tmp_path: Path) -> None:
    (tmp_path / "history.json").write_text(json.dumps({"rank_pattern": {"x.query": 3}, "rounds": []}))
    parsed = parse(
        "--increlora_r_avg=4",
        "--increlora_beta1=0.9",
        "--increlora_advance_learning=true",
        "--increlora_penalty=squared",
        "--no_increlora_restart_warmup",
        "--increlora_init_std=unit",
        "--increlora_target_modules",
        "query",
        "value",
        "--increlora_rank_scaling=per_rank",
        f"--increlora_rank_pattern={tmp_path / 'history.json'}",
    )
    assert parsed == IncreLoraConfig(
        r_avg=4,
        beta1=0.9,
        advance_learning=True,
        penalty="squared",
        restart_warmup=False,
        init_std="unit",
        target_modules=["query", "value"],
        rank_scaling="per_rank",
        rank_pattern={"x.query": 3},
    )
    assert parse("--increlora_init_std=0.1").init_std == 0.1


@pytest.mark.parametrize(
    "flag, expected",
    [
        (["modules_to_save", ""], {"modules_to_save": []}),
        (["target_modules", "all-linear"], {"target_modules": "all-linear"}),
        (["target_modules", r".*\.(query|key)"], {"target_modules": r".*\.(query|key)"}),
        (["target_modules", "layer-1.query"], {"target_modules": ["layer-1.query"]}),
        (["rank_pattern", '{"x.query": 3}'], {"rank_pattern": {"x.query": 3}}),
    ],
    ids=["no modules", "PEFT's word", "a pattern", "one name", "a mapping"],
)
def test_flags_can_say_what_the_settings_can(flag: list[str], expected: dict[str, Any]) -> None:
    assert parse(f"--increlora_{flag[0]}", flag[1]) == IncreLoraConfig(**expected)


def test_names_of_targets_may_come_in_a_set_there_too() -> None:
    assert IncreLoraArguments(increlora_target_modules={"query"}).to_config().target_modules == ["query"]


def test_names_of_settings_and_of_functions_agree() -> None:
    assert tuple(scores.SCORES) == config.SCORES
    assert tuple(penalties.PENALTIES) == config.PENALTIES


def test_paper_preset_gives_the_published_constants() -> None:
    paper = IncreLoraConfig.paper()
    assert (paper.score, paper.penalty, paper.overshoot, paper.reserve_lambda) == ("paper", "paper", 0, 1e-5)
    assert (paper.lam_lr_multiplier, paper.init_std, paper.orth_reg_weight, paper.beta1) == (1.0, 0.02, 0.1, 0.85)
    assert IncreLoraConfig.paper(r_avg=8, beta1=0.5) == dataclasses.replace(paper, r_avg=8, beta1=0.5)
    assert parse("--increlora_preset=paper") == paper
    assert parse("--increlora_preset", "paper", "--increlora_r_avg", "8") == IncreLoraConfig.paper(r_avg=8)
    with pytest.raises(ValueError, match=r"preset='papers' is unknown\. Choose one of paper"):
        parse("--increlora_preset=papers")


def test_flag_beside_a_preset_wins_even_where_it_is_the_default() -> None:
    default = IncreLoraConfig().growth_fraction
    assert default != IncreLoraConfig.paper().growth_fraction
    assert parse("--increlora_preset=paper", f"--increlora_growth_fraction={default}").growth_fraction == default
    assert not parse("--increlora_preset=paper", "--no_increlora_restart_warmup").restart_warmup
    assert not parse("--increlora_preset=paper", "--increlora_advance_learning=false").advance_learning


def test_help_names_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        HfArgumentParser(IncreLoraArguments).parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    for setting in dataclasses.fields(IncreLoraConfig):
        if setting.default is not None:
            part = text[text.index(f"--increlora_{setting.name} ") :]
            assert re.search(r"\(default: ([^)]*)\)", part)[1] == str(setting.default), setting.name


def test_bad_flag_is_refused_as_the_setting_is() -> None:
    with pytest.raises(ValueError, match="init_std='big'"):
        parse("--increlora_init_std=big")


@pytest.mark.parametrize(
    "text, message", [("{", r"ranks\.json', line 1, column 2: not valid JSON"), ("[1]", "is not a mapping")]
)
def test_rank_pattern_file_that_is_no_pattern_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "ranks.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        IncreLoraConfig(rank_pattern=str(tmp_path / "ranks.json"))
