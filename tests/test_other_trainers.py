"""The mixin on the Trainer classes of others, and on classes that are none."""

import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import arguments, tiny_bert, token_rows
from model_zoo import ZOO
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from increlora_hf import IncreLoraConfig, IncreLoraTrainer, IncreLoraTrainerMixin

CONFIG = IncreLoraConfig(r_avg=2, interval=2, start=2)


class IncreLoraSeq2SeqTrainer(IncreLoraTrainerMixin, Seq2SeqTrainer):
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


class Swallows(Trainer):
    """Catches what goes wrong in a step and goes on, as GLiNER's Trainer does."""

    fails_until = 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            if self.state.global_step < self.fails_until:
                raise RuntimeError("out of memory")
            return super().training_step(*args, **kwargs)
        except RuntimeError:
            self.model.zero_grad(set_to_none=True)
            return torch.tensor(0.0)


class IncreLoraSwallows(IncreLoraTrainerMixin, Swallows):
    pass


@pytest.mark.parametrize("make", [IncreLoraConfig.paper, IncreLoraConfig], ids=["paper", "weakest"])
def test_a_round_after_steps_without_any_gradient_is_an_error(
    make: Callable[..., IncreLoraConfig], tmp_path: Path
) -> None:
    config = make(r_avg=2, interval=2, start=2)
    trainer = IncreLoraSwallows(tiny_bert(), arguments(tmp_path), train_dataset=token_rows(), increlora_config=config)
    trainer.fails_until = 99
    with pytest.raises(
        RuntimeError,
        match=r"^The optimizer has taken 4 steps, but no gradient has reached the adapter.*training_step of some",
    ):
        trainer.train()
    assert trainer.increlora.total_rank == 12 * config.first_rank
    assert not trainer.increlora.rounds


def test_an_adapter_that_the_loss_does_not_depend_on_is_an_error(tmp_path: Path) -> None:
    class HeadAlone(IncreLoraTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return model.get_base_model().classifier(torch.ones(1, 16)).square().sum()

    trainer = HeadAlone(tiny_bert(), arguments(tmp_path), train_dataset=token_rows(), increlora_config=CONFIG)
    with pytest.raises(RuntimeError, match="Either the loss does not depend on the adapted layers"):
        trainer.train()


def test_steps_that_fail_now_and_then_do_not_end_the_training(tmp_path: Path) -> None:
    trainer = IncreLoraSwallows(tiny_bert(), arguments(tmp_path), train_dataset=token_rows(), increlora_config=CONFIG)
    trainer.fails_until = 3
    trainer.train()
    assert trainer.increlora.total_rank == 24


def test_gradients_that_are_0_do_not_end_the_training(tmp_path: Path) -> None:
    """As those of GRPO are while all rewards are equal."""

    class Zero(IncreLoraTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 0 * super().compute_loss(*args, **kwargs)

    trainer = Zero(tiny_bert(), arguments(tmp_path), train_dataset=token_rows(), increlora_config=CONFIG)
    trainer.train()
    assert trainer.increlora.total_rank == 24


def test_a_class_that_is_no_transformers_trainer_is_refused() -> None:
    class SetFitTrainer:  # it has a train() of its own
        def __init__(self, model: Any = None, args: Any = None) -> None: ...

    class Mixed(IncreLoraTrainerMixin, SetFitTrainer):
        pass

    model = tiny_bert()
    with pytest.raises(
        TypeError, match=r"Mixed extends SetFitTrainer, which is not a transformers\.Trainer.*GrowthRun"
    ):
        Mixed(model)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_the_mixin_after_the_trainer_class_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"Mixed names IncreLoraTrainerMixin after .* Name the mixin first: class Mixed\(IncreLoraTra"
    ):

        class Mixed(Seq2SeqTrainer, IncreLoraTrainerMixin):
            pass


def test_the_mixin_may_be_extended_before_it_meets_a_trainer(tmp_path: Path) -> None:
    class Ours(IncreLoraTrainerMixin):
        pass

    class Mixed(Ours, Trainer):
        pass

    assert Mixed(tiny_bert(), arguments(tmp_path), increlora_config=CONFIG).increlora.total_rank == 36


def test_trls_classes_without_trl_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "increlora_hf.sft", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"needs TRL: pip install 'increlora-hf\[sft\]'"):
        importlib.import_module("increlora_hf.sft")
