"""Names of modules are matched as PEFT matches them, compared with PEFT itself."""

import copy

import pytest
from conftest import tiny_bert
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import get_pattern_key

from increlora_hf import IncreLoraConfig
from increlora_hf.adapter.names import exact_pattern, exact_targets, is_head, is_target
from increlora_hf.adapter.targets import head_modules


def test_an_exact_pattern_matches_its_name_alone() -> None:
    pattern = exact_pattern("layer.0.query")
    for name in ("encoder.layer.0.query", "layer.0.query", "layerx0.query", "layer.0.query_norm"):
        found = get_pattern_key([pattern], name)  # the pattern, or else the name itself
        assert (found == pattern) is (name == "layer.0.query")


@pytest.mark.parametrize("target", ["query", "self.query", "uery", "bert.encoder.layer.0.attention.self.query", "0"])
def test_targets_are_the_modules_that_peft_adapts(target: str) -> None:
    model = tiny_bert()
    ours = {name for name, _ in model.named_modules() if name and is_target(name, target) and "query" in name}
    try:
        adapted = get_peft_model(model, LoraConfig(target_modules=[target]))
        theirs = {name for name, module in adapted.get_base_model().named_modules() if hasattr(module, "lora_A")}
    except ValueError:  # of PEFT: it found none, or layers that cannot be adapted
        theirs = set()
    assert ours == theirs


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])  # for the latter PEFT matches with its prefix, and adds heads
@pytest.mark.parametrize("heads", [["classifier"], ["pooler", "classifier"], ["ifier"], ["bert.pooler"], ["x"], []])
def test_heads_are_the_modules_that_peft_trains_fully(heads: list[str], task: str | None) -> None:
    model = tiny_bert()
    config = LoraConfig(target_modules=["query"], modules_to_save=list(heads), task_type=task)
    inner = get_peft_model(copy.deepcopy(model), config).get_base_model()
    ours = set(head_modules(model, config.modules_to_save))
    assert ours == {name for name, module in inner.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    assert ours >= {name for name, _ in model.named_modules() if name and is_head(name, heads)}


def test_a_name_of_a_head_may_begin_with_pefts_prefix() -> None:
    model = tiny_bert()
    config = LoraConfig(target_modules=["query"], modules_to_save=["model.bert.pooler"], task_type="SEQ_CLS")
    inner = get_peft_model(copy.deepcopy(model), config).get_base_model()
    theirs = {name for name, module in inner.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    assert theirs == set(head_modules(model, config.modules_to_save)) == {"bert.pooler", "classifier"}


@pytest.mark.parametrize("wanted", [["query"], ["query", "x.query"], ["x.query", "x.y.key"], ["key"]])
def test_exact_targets_are_the_modules_that_peft_adapts(wanted: list[str]) -> None:
    names = ["query", "x.query", "xquery", "key", "x.y.key"]
    config = LoraConfig(target_modules=exact_targets(wanted, names))
    assert [name for name in names if check_target_module_exists(config, name)] == [n for n in names if n in wanted]


def test_layers_of_rank_0_are_not_adapted() -> None:
    assert IncreLoraConfig(rank_pattern={"a": 2, "b": 0}).adapted_ranks == {"a": 2}
    assert IncreLoraConfig().adapted_ranks is None
