"""Growing on from an adapter that somebody trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import arguments, tiny_bert, token_rows, with_random_values
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from test_adapter import logits, unequal

from increlora_hf import IncreLoraConfig, IncreLoraTrainer, attach
from increlora_hf.adapter.warmstart import decompose


def lora(**settings: Any) -> PeftModel:
    """PEFT's own LoRA with random weights in A, B and the head."""
    defaults: dict[str, Any] = {"r": 3, "target_modules": ["query", "output.dense"], "task_type": "SEQ_CLS"}
    model = get_peft_model(tiny_bert(), LoraConfig(**{**defaults, **settings}))
    return with_random_values(model, 0.2)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True, "lora_alpha": 4}, {"rank_pattern": {"query": 5}}, {"r": 20}],
    ids=["plain", "rslora", "unequal-ranks", "rank-above-width"],
)
def test_attached_adapter_computes_what_it_did(settings: dict[str, Any]) -> None:
    expected = logits(lora(**settings))
    model = attach(lora(**settings), IncreLoraConfig(r_avg=21))
    assert not torch.allclose(expected, logits(tiny_bert()), atol=1e-2)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)


def test_layers_and_first_ranks_are_the_adapters() -> None:
    model = attach(lora(rank_pattern={"query": 5}), IncreLoraConfig(r_avg=6, target_modules=["value"]))
    ranks = model.increlora.rank_pattern
    assert {name.rsplit(".", 1)[-1] for name in ranks} == {"query", "dense"}
    assert sorted(ranks.values()) == [3, 3, 3, 3, 5, 5]
    assert (model.increlora.total_rank, model.increlora.target_total_rank) == (22, 36)


def test_components_are_orthonormal_and_sorted() -> None:
    model = attach(lora(), IncreLoraConfig(r_avg=4, orth_reg_weight=0.0))
    for layer in model.increlora.layers.values():
        for factor in (layer.A, layer.B):
            rows = factor.rows(with_reserve=False)
            torch.testing.assert_close(rows @ rows.T, torch.eye(3), atol=1e-5, rtol=0)
        lams = layer.A.lam(with_reserve=False).tolist()
        assert lams == sorted(lams, reverse=True)


def test_decomposition_is_that_of_the_dense_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(9, 4, generator=generator), torch.randn(4, 6, generator=generator)
    rows_b, singular, rows_a = decompose(b, a, 2.0)
    torch.testing.assert_close((rows_b.T * singular) @ rows_a, 2 * b @ a, atol=1e-5, rtol=0)
    torch.testing.assert_close(singular, torch.linalg.svdvals(2 * b @ a)[:4], atol=1e-5, rtol=0)


def test_training_goes_on_and_grows_from_the_adapter(tmp_path: Path) -> None:
    def trainer() -> IncreLoraTrainer:
        return IncreLoraTrainer(
            lora(),
            arguments(tmp_path, save_strategy="steps", save_steps=10),
            train_dataset=token_rows(),
            increlora_config=IncreLoraConfig(r_avg=5, top_h=4, interval=5, start=4),
        )

    whole = trainer()
    whole.train()
    assert whole.increlora.total_rank == 6 * 5
    assert whole.increlora.plan.initial_total_rank == 18
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    for name, layer in whole.increlora.layers.items():
        assert torch.equal(layer.delta_weight(), resumed.increlora.layers[name].delta_weight())


def test_own_adapter_grows_on_after_a_reload(tmp_path: Path) -> None:
    first = unequal()
    expected = logits(first)
    first.save_pretrained(str(tmp_path))
    again = attach(PeftModel.from_pretrained(tiny_bert(), tmp_path, is_trainable=True), IncreLoraConfig(r_avg=4))
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=0)
    assert again.increlora.rank_pattern == first.increlora.rank_pattern
    again.save_pretrained(str(tmp_path / "again"))
    reloaded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "again")
    torch.testing.assert_close(logits(reloaded), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "model, settings, message",
    [
        (
            lambda: lora(r=8),
            {"r_avg": 4},
            r"r_avg=4 and overshoot=0 let 6 layers grow to a total rank of 24.*has 48 already. Raise one",
        ),
        (lambda: lora(), {"r_avg": 4, "rank_pattern": {"x": 1}}, "rank_pattern fixes ranks"),
        (lambda: lora(use_dora=True), {"r_avg": 4}, "settings beyond plain LoRA"),
        (
            lambda: lora(target_modules=["word_embeddings"]),
            {"r_avg": 4},
            "is no plain LoRA on a linear layer|plain LoRA",
        ),
        (lambda: get_peft_model(tiny_bert(), IA3Config(task_type="SEQ_CLS")), {"r_avg": 4}, "has a IA3Config"),
    ],
    ids=["no-room", "fixed-ranks", "dora", "embedding", "other-method"],
)
def test_adapter_that_cannot_grow_is_refused(model: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(model(), IncreLoraConfig(**settings))


def test_second_adapter_is_refused() -> None:
    model = lora(modules_to_save=None)
    model.add_adapter("second", LoraConfig(target_modules=["query"]))
    with pytest.raises(
        ValueError, match=r"holds the adapters \['default', 'second'\]. Delete all but the one to grow"
    ):
        attach(model, IncreLoraConfig(r_avg=4))


def test_merged_adapter_is_refused() -> None:
    model = lora()
    model.merge_adapter()
    with pytest.raises(ValueError, match="Call unmerge_adapter"):
        attach(model, IncreLoraConfig(r_avg=4))
