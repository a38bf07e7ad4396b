"""Every family of models: grows to the budget, saves, reloads with stock PEFT, merges, resumes."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import arguments
from model_zoo import ZOO, Case
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from increlora_hf import IncreLoraConfig, IncreLoraTrainer, attach

TOLERANCE = 1e-5


def logits(model: nn.Module, case: Case) -> Tensor:
    rows = case.rows()[:3]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    model.eval()
    with torch.no_grad():
        outputs = model(**batch)
    return outputs["start_logits"] if "start_logits" in outputs else outputs["logits"]


def run(model: nn.Module, case: Case, folder: Path, resume: str | None = None) -> IncreLoraTrainer:
    trainer = IncreLoraTrainer(
        model,
        arguments(folder, max_steps=12, per_device_train_batch_size=4, save_strategy="steps", save_steps=5),
        train_dataset=case.rows(),
        increlora_config=IncreLoraConfig(r_avg=2, interval=2, start=2),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def differences(ours: nn.Module, theirs: nn.Module) -> list[str]:
    saved = theirs.state_dict()
    return [key for key, value in ours.state_dict().items() if not torch.equal(value, saved[key])]


@pytest.mark.parametrize("name", ZOO)
def test_model_grows_saves_reloads_merges_and_resumes(
    name: str, tmp_path: Path, models_table: Callable[[str], None]
) -> None:
    case = ZOO[name]
    torch.manual_seed(0)
    base = case.build()
    trainer = run(copy.deepcopy(base), case, tmp_path / "run")
    growth, model = trainer.increlora, trainer.model
    assert growth.total_rank == growth.target_total_rank == 2 * len(growth.layers)
    trained = logits(model, case)
    assert not torch.equal(trained, logits(base, case))

    resumed = run(copy.deepcopy(base), case, tmp_path / "run", str(tmp_path / "run/checkpoint-5"))
    assert not differences(model, resumed.model)

    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(reloaded, case), trained, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(logits(reloaded.merge_and_unload(), case), trained, rtol=0, atol=TOLERANCE)

    inner = model.get_base_model().named_modules()
    heads = ", ".join(f"`{head}`" for head, part in inner if isinstance(part, ModulesToSaveWrapper))
    models_table(f"| {name} | `{type(base).__name__}` | {len(growth.layers)} | {heads or 'none'} | {case.remark} |")


def test_experts_are_left_frozen_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "increlora_hf"):
        model = attach(ZOO["Mixtral"].build())
    assert "model.layers.0.mlp.experts.gate_up_proj" in caplog.text
    assert "stay frozen" in caplog.text
    assert all("self_attn" in name for name in model.increlora.layers)


def test_experts_that_are_asked_for_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gate_up_proj'.* weights of all experts.*Leave it out"):
        attach(ZOO["Mixtral"].build(), IncreLoraConfig(target_modules=["q_proj", "gate_up_proj"]))
    with pytest.raises(ValueError, match="MixtralExperts, and IncreLoRA grows linear layers only"):
        attach(ZOO["Mixtral"].build(), IncreLoraConfig(target_modules=["experts"]))


def test_tied_embeddings_stay_tied_and_frozen() -> None:
    model = attach(ZOO["T5"].build())
    inner = model.get_base_model()
    assert inner.lm_head.weight is inner.shared.weight
    assert not inner.shared.weight.requires_grad
    assert not any("lm_head" in name for name in model.increlora.layers)
