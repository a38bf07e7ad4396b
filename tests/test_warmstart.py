"""Growing on from an adapter that somebody trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import arguments, tiny_bert, token_rows, with_random_values
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from test_adapter import logits, unequal
from test_unchanged import unchanged
from torch import nn
from transformers import AutoModelForSequenceClassification

from increlora_hf import IncreLoraConfig, IncreLoraTrainer, attach, load_adapter
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


def add_adapter(**settings: Any) -> nn.Module:
    """A model of transformers that holds the adapter itself."""
    model = tiny_bert()
    model.add_adapter(LoraConfig(r=3, target_modules=["query"], modules_to_save=["classifier"], **settings))
    return with_random_values(model, 0.2)


@pytest.mark.parametrize(
    "adapter, settings",
    [
        (lambda: lora(target_modules="all-linear"), {}),
        (lambda: lora(target_modules="all-linear", task_type=None), {}),
        (lambda: lora(target_modules=["pooler.dense"]), {}),
        (lambda: lora(modules_to_save=["word_embeddings", "LayerNorm"]), {}),
        (lambda: lora(modules_to_save=["word_embeddings"]), {"modules_to_save": ["classifier"]}),
        (lambda: lora(modules_to_save=["pooler.dense"]), {}),
        (lambda: lora(r=4, init_lora_weights="Gaussian"), {}),
        (add_adapter, {}),
    ],
    ids=[
        "all-linear", "head-too", "pooler-alone", "embeddings-and-norms", "more-than-asked", "part-of-a-head",
        "gaussian", "inside-a-model",
    ],
)  # fmt: skip
def test_continued_adapter_and_its_files_compute_what_the_adapter_did(
    adapter: Callable[[], nn.Module], settings: dict[str, Any], tmp_path: Path
) -> None:
    expected = logits(adapter())
    model = attach(adapter(), IncreLoraConfig(r_avg=5, **settings))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    model.save_pretrained(str(tmp_path))
    for reloaded in (PeftModel.from_pretrained(tiny_bert(), tmp_path), load_adapter(tiny_bert(), tmp_path)):
        torch.testing.assert_close(logits(reloaded), expected, atol=1e-5, rtol=0)


def test_model_that_transformers_loads_from_an_adapter_grows_on(tmp_path: Path) -> None:
    model = lora()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tiny_bert().save_pretrained(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    trainer = IncreLoraTrainer(loaded, arguments(tmp_path), increlora_config=IncreLoraConfig(r_avg=4))
    torch.testing.assert_close(logits(trainer.model), logits(model), atol=1e-5, rtol=0)
    assert trainer.increlora.total_rank == 6 * 3


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


def test_components_that_an_adapter_has_not_trained_start_as_new_ones() -> None:
    stock = get_peft_model(tiny_bert(), LoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS"))
    first = next(module for name, module in stock.named_modules() if name.endswith("query"))
    with torch.no_grad():
        first.lora_B["default"].weight[:, 0] = 1.0  # one component of rank 1, and nothing in the second layer
    expected = logits(stock)
    model = attach(stock, IncreLoraConfig(r_avg=3, overshoot=0))
    torch.testing.assert_close(logits(model), expected)
    new = attach(tiny_bert(), IncreLoraConfig(r_avg=3, overshoot=0, init_r=3, target_modules=["query"]))
    pairs = zip(model.increlora.layers.values(), new.increlora.layers.values(), strict=True)
    for (found, wanted), trained in zip(pairs, (1, 0), strict=True):
        for mine, theirs in zip(found.parameters(), wanted.parameters(), strict=True):
            assert torch.equal(mine[trained:], theirs[trained:])


def test_decomposition_is_that_of_the_dense_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(9, 4, generator=generator), torch.randn(4, 6, generator=generator)
    rows_b, singular, rows_a = decompose(b, a, 2.0)
    torch.testing.assert_close((rows_b.T * singular) @ rows_a, 2 * b @ a, atol=1e-5, rtol=0)
    torch.testing.assert_close(singular, torch.linalg.svdvals(2 * b @ a)[:4], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        IncreLoraConfig.paper(r_avg=5, top_h=4, interval=5, start=4),
        IncreLoraConfig(r_avg=5, top_h=4, interval=4, start=3),
    ],
    ids=["the paper's", "defaults"],
)
def test_training_goes_on_and_grows_from_the_adapter(config: IncreLoraConfig, tmp_path: Path) -> None:
    def trainer() -> IncreLoraTrainer:
        return IncreLoraTrainer(
            lora(),
            arguments(tmp_path, save_strategy="steps", save_steps=10),
            train_dataset=token_rows(),
            increlora_config=config,
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


def with_second_adapter() -> PeftModel:
    model = lora(modules_to_save=None)
    model.add_adapter("second", LoraConfig(target_modules=["query"]))
    return model


def merged() -> PeftModel:
    model = lora()
    model.merge_adapter()
    return model


def overflowing() -> PeftModel:
    """An adapter of finite values whose update is infinite in their precision."""
    model = lora()
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data.fill_(1e30)
    return model


REFUSED_ADAPTERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "no-room": (
        lambda: lora(r=8),
        {"r_avg": 4},
        r"r_avg=4 and overshoot=2 let 6 layers grow to a total rank of 36.*already has 48.*Raise r_avg",
    ),
    "fixed-ranks": (lora, {"r_avg": 4, "rank_pattern": {"x": 1}}, "rank_pattern sets the ranks"),
    "dora": (lambda: lora(use_dora=True), {"r_avg": 4}, r"beyond plain LoRA: \{'use_dora': True\}"),
    "biases": (lambda: lora(bias="lora_only"), {"r_avg": 4}, r"beyond plain LoRA: \{'bias': 'lora_only'\}"),
    "tokens": (
        lambda: lora(trainable_token_indices=[1, 2]),
        {"r_avg": 4},
        r"beyond plain LoRA: \{'trainable_token_indices': \[1, 2\]\}",
    ),
    "embedding": (
        lambda: lora(target_modules=["word_embeddings"]),
        {"r_avg": 4},
        "'bert.embeddings.word_embeddings' is a Embedding that is no plain LoRA on a linear layer",
    ),
    "other-method": (
        lambda: get_peft_model(tiny_bert(), IA3Config(task_type="SEQ_CLS")),
        {"r_avg": 4},
        "has a IA3Config",
    ),
    "prompts": (
        lambda: get_peft_model(tiny_bert(), PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS")),
        {"r_avg": 4},
        "has a PromptTuningConfig.* otherwise load and pass the base model",
    ),
    "pissa": (
        lambda: lora(init_lora_weights="pissa"),
        {"r_avg": 4},
        "init_lora_weights='pissa', which changes the base weights: only.*path_initial_model_for_weight_conver",
    ),
    "pissa-fast": (lambda: lora(init_lora_weights="pissa_niter_4"), {"r_avg": 4}, "init_lora_weights='pissa_niter_4'"),
    "olora": (lambda: lora(init_lora_weights="olora"), {"r_avg": 4}, "init_lora_weights='olora', which changes"),
    "layer-in-a-head": (
        lambda: lora(target_modules=["query", "pooler.dense"]),
        {"r_avg": 4, "modules_to_save": ["pooler"]},
        r"modules_to_save=\['classifier', 'pooler'\] contains the layer 'bert.pooler.dense'",
    ),
    "inside-a-model": (lambda: add_adapter(use_dora=True), {"r_avg": 4}, "beyond plain LoRA"),
    "second": (with_second_adapter, {"r_avg": 4}, r"adapters \['default', 'second'\]. Delete all but the one to grow"),
    "merged": (merged, {"r_avg": 4}, "Call unmerge_adapter"),
    "overflow": (overflowing, {"r_avg": 4}, "The update of the model's adapter is not finite"),
}


def test_model_whose_adapter_was_deleted_is_refused_with_what_to_pass_instead() -> None:
    model = lora()
    model.delete_adapter("default")
    with pytest.raises(ValueError, match=r"holds no adapter any more. Pass what its unload\(\) returns"):
        attach(model, IncreLoraConfig(r_avg=4))
    assert attach(model.unload(), IncreLoraConfig(r_avg=4)).increlora.rounds == []


@pytest.mark.parametrize("model, settings, message", REFUSED_ADAPTERS.values(), ids=REFUSED_ADAPTERS)
def test_adapter_that_cannot_grow_is_refused_and_stays(
    model: Callable[[], nn.Module], settings: dict[str, Any], message: str
) -> None:
    refused = model()
    with unchanged(refused), pytest.raises(ValueError, match=message):
        attach(refused, IncreLoraConfig(**settings))
