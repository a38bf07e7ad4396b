"""The mixin on TRL's trainers, beside TRL with stock LoRA."""

import copy
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from glue_fixtures import save_tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from increlora_hf import IncreLoraConfig, IncreLoraTrainerMixin, load_adapter

pytest.importorskip("trl")
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from increlora_hf.sft import (
    IncreLoraDPOTrainer,
    IncreLoraGRPOTrainer,
    IncreLoraKTOTrainer,
    IncreLoraRewardTrainer,
    IncreLoraRLOOTrainer,
    IncreLoraSFTTrainer,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that experimental trainers may change
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.* is deprecated:FutureWarning"),  # trl's
]

CONFIG = IncreLoraConfig(r_avg=2, interval=1, start=1)  # rounds at 2 and 3, the cut at 4; from rank 1 one more round
PAPER = IncreLoraConfig.paper(r_avg=2, interval=2, start=2, lam_lr_multiplier=10.0)
STOCK = LoraConfig(r=1, target_modules="all-linear")
PROMPTS = ["red cat", "blue dog", "bird", "green bird"] * 2
GOOD = ["runs", "sleeps green", "runs blue", "sleeps red cat"] * 2
BAD = ["sleeps", "runs", "cat", "dog dog"] * 2
TEXTS = {name: [f"{p} {c}" for p, c in zip(PROMPTS, end, strict=True)] for name, end in (("good", GOOD), ("bad", BAD))}
PAIRS = {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}
SAMPLED = {"max_completion_length": 4, "num_generations": 2}


class IncreLoraCPOTrainer(IncreLoraTrainerMixin, CPOTrainer):
    pass


class IncreLoraORPOTrainer(IncreLoraTrainerMixin, ORPOTrainer):
    pass


def length(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between completions."""
    return [float(len(text) % 7) for text in completions]


class Case(NamedTuple):
    ours: type
    theirs: type
    arguments: type
    rows: dict[str, list[Any]]
    settings: Mapping[str, Any] = MappingProxyType({})
    others: Mapping[str, Any] = MappingProxyType({})


CASES = {
    "SFT": Case(IncreLoraSFTTrainer, SFTTrainer, SFTConfig, {"text": TEXTS["good"]}),
    "Reward": Case(
        IncreLoraRewardTrainer, RewardTrainer, RewardConfig, {"chosen": TEXTS["good"], "rejected": TEXTS["bad"]}
    ),
    "DPO": Case(IncreLoraDPOTrainer, DPOTrainer, DPOConfig, PAIRS),
    "DPO, reference computed before": Case(
        IncreLoraDPOTrainer, DPOTrainer, DPOConfig, PAIRS, {"precompute_ref_log_probs": True}
    ),
    "KTO": Case(
        IncreLoraKTOTrainer,
        KTOTrainer,
        KTOConfig,
        {"prompt": PROMPTS, "completion": GOOD, "label": [True, False] * 4},
    ),
    "RLOO": Case(
        IncreLoraRLOOTrainer, RLOOTrainer, RLOOConfig, {"prompt": PROMPTS}, SAMPLED, {"reward_funcs": length}
    ),
    "GRPO": Case(
        IncreLoraGRPOTrainer,
        GRPOTrainer,
        GRPOConfig,
        {"prompt": PROMPTS},
        {**SAMPLED, "beta": 0.1},
        {"reward_funcs": length},
    ),
    "GRPO, beta 0": Case(
        IncreLoraGRPOTrainer, GRPOTrainer, GRPOConfig, {"prompt": PROMPTS}, SAMPLED, {"reward_funcs": length}
    ),
    "CPO": Case(IncreLoraCPOTrainer, CPOTrainer, CPOConfig, PAIRS),
    "ORPO": Case(IncreLoraORPOTrainer, ORPOTrainer, ORPOConfig, PAIRS),
}

RESUMED = ("SFT", "DPO", "KTO", "RLOO", "GRPO")  # without waiting for the slow tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer."""
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


def load(folder: Path, name: str = "DPO") -> Any:
    set_seed(0)
    if name == "Reward":
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    return AutoModelForCausalLM.from_pretrained(folder)


def make(
    name: str,
    out: Path,
    folder: Path,
    model: Any = None,
    *,
    stock: bool = False,
    config: IncreLoraConfig = CONFIG,
    **settings: Any,
) -> Any:
    """A trainer of ours, or TRL's own with stock LoRA; on the tiny Llama, or on ``model``."""
    case = CASES[name]
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "bf16": False, "dataloader_pin_memory": False}
    steps = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    args = case.arguments(str(out), **{**quiet, **steps, "save_steps": 3, **case.settings, **settings})
    model = load(folder, name) if model is None else model
    adapter: dict[str, Any] = {} if isinstance(model, PeftModel) else {"peft_config": copy.deepcopy(STOCK)}
    return (case.theirs if stock else case.ours)(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict(case.rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        **(adapter if stock else {"increlora_config": config}),
        **case.others,
    )


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Gives a trainer of ours that has trained, with checkpoints in its output folder."""

    @cache
    def train(name: str) -> Any:
        trainer = make(name, tmp_path_factory.mktemp("trained"), folder)
        trainer.train()
        return trainer

    return train


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    theirs = second.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in first.state_dict().items())


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[2, 4, 7, 10]])).logits


@pytest.mark.parametrize("name", CASES)
def test_trainer_trains_to_the_budget_from_the_loss_of_stock_lora(
    name: str, folder: Path, tmp_path: Path, trained: Callable[[str], Any]
) -> None:
    trainer = trained(name)
    stock = make(name, tmp_path, folder, stock=True, max_steps=1)
    stock.train()
    assert trainer.increlora.total_rank == 2 * 14
    assert losses(trainer)[0] == pytest.approx(losses(stock)[0], abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_trainer_saves_what_stock_peft_loads(
    name: str, folder: Path, tmp_path: Path, trained: Callable[[str], Any]
) -> None:
    trainer = trained(name)
    trainer.save_model(str(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    reloaded = PeftModel.from_pretrained(load(folder, name), tmp_path)
    torch.testing.assert_close(logits(trainer.model), logits(reloaded), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", [*RESUMED, *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in RESUMED)]
)
def test_trainer_resumes_to_the_same_bits(name: str, folder: Path, trained: Callable[[str], Any]) -> None:
    trainer = trained(name)
    out = Path(trainer.args.output_dir)
    resumed = make(name, out, folder, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-3"))
    assert same_bits(trainer.model, resumed.model)


# ---- The reference of trainers that have one -----------------------------------------------------------------------


def lora_that_was_trained(folder: Path) -> Any:
    """A stock LoRA with a ΔW that is not 0."""
    model = get_peft_model(load(folder), copy.deepcopy(STOCK))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def reference_log_probs(trainer: Any) -> torch.Tensor:
    batch = next(iter(trainer.get_train_dataloader()))
    return torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))


@pytest.mark.parametrize("start", [load, lora_that_was_trained], ids=["plain model", "trained LoRA"])
def test_reference_stays_the_model_of_the_start(start: Callable[[Path], Any], folder: Path, tmp_path: Path) -> None:
    stock = make("DPO", tmp_path, folder, start(folder), stock=True, train_sampling_strategy="sequential")
    trainer = make("DPO", tmp_path, folder, start(folder), train_sampling_strategy="sequential")
    trainer.train()
    assert trainer.increlora.total_rank == 2 * 14
    torch.testing.assert_close(reference_log_probs(trainer), reference_log_probs(stock), rtol=0, atol=1e-4)
    assert (logits(trainer.model) - logits(start(folder))).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO"])
def test_first_loss_from_a_trained_lora_is_stock_loras(name: str, folder: Path, tmp_path: Path) -> None:
    first = []
    for stock in (True, False):
        start = lora_that_was_trained(folder)
        trainer = make(name, tmp_path, folder, start, stock=stock, config=PAPER, max_steps=5, save_strategy="no")
        trainer.train()
        first.append(losses(trainer)[0])
    assert first[1] == pytest.approx(first[0], abs=1e-5)


def test_run_from_a_trained_lora_resumes_and_its_adapter_loads(folder: Path, tmp_path: Path) -> None:
    trainer = make("DPO", tmp_path, folder, lora_that_was_trained(folder))
    trainer.train()
    resumed = make("DPO", tmp_path, folder, lora_that_was_trained(folder), save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_bits(trainer.model, resumed.model)
    for loader in (PeftModel.from_pretrained, load_adapter):
        reloaded = loader(load(folder), tmp_path / "checkpoint-6")
        torch.testing.assert_close(logits(trainer.model), logits(reloaded), rtol=0, atol=1e-5)


def test_each_trainer_of_one_model_compares_with_what_it_starts_from(folder: Path, tmp_path: Path) -> None:
    trainer, expected = make("SFT", tmp_path / "SFT", folder, max_steps=6), None
    for stage in ("first", "second"):
        trainer.train()
        model = trainer.model
        start = copy.deepcopy(model).merge_and_unload()
        trainer = make("DPO", tmp_path / stage, folder, model, train_sampling_strategy="sequential", max_steps=1)
        stock = make("DPO", tmp_path, folder, start, stock=True, train_sampling_strategy="sequential")
        expected = reference_log_probs(stock)
        torch.testing.assert_close(reference_log_probs(trainer), expected, rtol=0, atol=1e-4)


def test_a_model_takes_other_adapters_once_its_trainer_is_made(folder: Path, tmp_path: Path) -> None:
    model = make("DPO", tmp_path, folder).model
    model.add_adapter("other", copy.deepcopy(STOCK))
    assert set(model.peft_config) == {"default", "other"}


# ---- How the trainers are called -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SFT", "Reward", "CPO"])
def test_trainer_takes_the_name_of_a_model(name: str, folder: Path, tmp_path: Path) -> None:
    by_object = make(name, tmp_path, folder, load(folder, name), seed=0, save_strategy="no")
    by_name = make(
        name,
        tmp_path,
        folder,
        str(folder),
        seed=0,
        save_strategy="no",
        model_init_kwargs={"dtype": "float32"},
    )
    for trainer in (by_object, by_name):
        trainer.train()
    assert same_bits(by_object.model, by_name.model)


def test_training_arguments_are_found_in_any_position(folder: Path, tmp_path: Path) -> None:
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, lr_scheduler_type="greedy", eval_strategy="epoch")
    with pytest.raises(ValueError, match="greedy"):
        IncreLoraGRPOTrainer(load(folder), length, args)


def test_an_adapter_configuration_beside_ours_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"peft_config=LoraConfig\(\.\.\.\).*Leave peft_config out, and give increlora_config"
    ):
        IncreLoraSFTTrainer(
            model=load(folder),
            args=SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False),
            train_dataset=Dataset.from_dict(CASES["SFT"].rows),
            peft_config=LoraConfig(),
        )
    assert not list(tmp_path.iterdir())


def test_sft_accumulation_changes_neither_loss_nor_growth(folder: Path, tmp_path: Path) -> None:
    whole, parts = (
        make(
            "SFT",
            tmp_path,
            folder,
            config=PAPER,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
            train_sampling_strategy="sequential",
            save_strategy="no",
        )
        for batch in (8, 2)
    )
    for trainer in (whole, parts):
        trainer.train()
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-3)
