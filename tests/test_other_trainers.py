"""The mixin on the Trainer classes of others: Seq2SeqTrainer, and TRL's SFTTrainer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import arguments
from datasets import Dataset
from glue_fixtures import save_tiny_llama
from model_zoo import ZOO
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from increlora_hf import IncreLoraConfig, IncreLoraTrainerMixin

pytest.importorskip("trl")
from trl import SFTConfig, SFTTrainer

from increlora_hf.sft import IncreLoraSFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing` is deprecated:FutureWarning")  # trl's

CONFIG = IncreLoraConfig(r_avg=2, interval=2, start=2)
TEXTS = ["red cat runs", "blue dog sleeps green", "bird runs", "green bird sleeps red cat"] * 8


class IncreLoraSeq2SeqTrainer(IncreLoraTrainerMixin, Seq2SeqTrainer):
    pass


class Direct(IncreLoraTrainerMixin, SFTTrainer):
    pass


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    theirs = second.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in first.state_dict().items())


def test_seq2seq_trainer_trains_generates_saves_and_resumes(tmp_path: Path) -> None:
    base = ZOO["T5"].build()
    rows = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in ZOO["T5"].rows()]

    def run(resume: str | None = None) -> Any:
        plain = arguments(tmp_path, max_steps=12, save_strategy="steps", save_steps=5)
        args = Seq2SeqTrainingArguments(**{**plain.to_dict(), "predict_with_generate": True})
        trainer = IncreLoraSeq2SeqTrainer(
            copy.deepcopy(base), args, train_dataset=rows, eval_dataset=rows, increlora_config=CONFIG
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    trainer = run()
    assert trainer.increlora.remaining == 0
    assert len(trainer.predict(rows, max_length=4).predictions) == len(rows)
    assert same_bits(trainer.model, run(str(tmp_path / "checkpoint-5")).model)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer."""
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


def sft(model: Any, out: Path, trainer_class: type = IncreLoraSFTTrainer, **settings: Any) -> Any:
    defaults = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 4}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "bf16": False, "save_steps": 5}
    args = SFTConfig(str(out), **{**defaults, **quiet, "dataloader_pin_memory": False, **settings})
    rows = Dataset.from_dict({"text": TEXTS})
    return trainer_class(model=model, args=args, train_dataset=rows, increlora_config=CONFIG)


@pytest.mark.parametrize("trainer_class", [IncreLoraSFTTrainer, Direct])
def test_sft_trainer_trains_saves_and_resumes(language_model: Path, tmp_path: Path, trainer_class: type) -> None:
    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(language_model)

    trainer = sft(load(), tmp_path, trainer_class)
    trainer.train()
    assert trainer.increlora.total_rank == 2 * 14
    trainer.save_model(str(tmp_path / "adapter"))
    resumed = sft(load(), tmp_path, trainer_class)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert same_bits(trainer.model, resumed.model)
    ids = torch.tensor([[3, 4, 5, 6]])
    reloaded = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits for model in (trainer.model.eval(), reloaded))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_sft_trainer_takes_the_name_of_a_model(language_model: Path, tmp_path: Path) -> None:
    trainer = sft(str(language_model), tmp_path / "name", model_init_kwargs={"dtype": "float32"})
    trainer.train()
    by_object = sft(AutoModelForCausalLM.from_pretrained(language_model), tmp_path / "object")
    by_object.train()
    assert same_bits(trainer.model, by_object.model)


def test_sft_accumulation_changes_neither_loss_nor_growth(language_model: Path, tmp_path: Path) -> None:
    def run(batch: int, steps: int) -> Any:
        model = AutoModelForCausalLM.from_pretrained(language_model)
        size = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "logging_steps": 1}
        trainer = sft(model, tmp_path / f"{batch}", train_sampling_strategy="sequential", **size)
        trainer.train()
        return trainer

    whole, parts = run(8, 1), run(2, 4)
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_an_adapter_configuration_beside_ours_is_refused(language_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"peft_config=LoraConfig\(\.\.\.\).*Leave it out, and give increlora_config"):
        IncreLoraSFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(language_model),
            args=SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False),
            train_dataset=Dataset.from_dict({"text": TEXTS}),
            peft_config=LoraConfig(),
        )
    assert not list(tmp_path.iterdir())
