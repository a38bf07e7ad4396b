"""The model card: metadata that the Hub takes, a snippet that runs, and the run's own numbers."""

import re
from dataclasses import replace
from email.message import Message
from typing import Any

import pytest
import torch
import yaml
from conftest import arguments, tiny_bert, token_rows
from huggingface_hub import ModelCard

from increlora_hf import IncreLoraConfig, IncreLoraTrainer
from increlora_hf.hub.card import RunSummary, card_text
from increlora_hf.hub.snippet import is_hub_id
from increlora_hf.trainer.summary import _project, describe

FIXED = IncreLoraConfig.paper(r_avg=2, init_r=2)

SUMMARY = RunSummary(
    repository="user/adapter",
    title="adapter",
    base="microsoft/deberta-v3-base",
    task_type="SEQ_CLS",
    auto_class="DebertaV2ForSequenceClassification",
    labels={0: "entailment", 1: "neutral", 2: "contradiction"},
    history={
        "config": IncreLoraConfig(r_avg=3).to_dict(),
        "rounds": [{}, {}],
        "rank_pattern": {"encoder.layer.0.query": 2, "encoder.layer.0.key": 1},
        "total_rank": 3,
        "target_total_rank": 6,
    },
    adapter_parameters=1234,
    head_parameters=56,
    software={"increlora-hf": "0.1.0", "peft": "0.21.2"},
    metrics={"loss": 0.5, "accuracy": 0.875, "f1": 0.9},
    step=120,
    hyperparameters={"learning_rate": 1e-3, "seed": 7},
)


def metadata(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_metadata_is_what_the_hub_reads():
    data = {"dataset_id": "nyu-mll/glue", "dataset_name": "GLUE MNLI", "dataset_config": "mnli"}
    text = card_text(SUMMARY, **data, license="apache-2.0", language="en", tags=["glue"])
    found = metadata(text)
    assert found["library_name"] == "peft"
    assert found["base_model"] == "microsoft/deberta-v3-base"
    assert found["pipeline_tag"] == "text-classification"
    assert found["tags"] == ["increlora", "lora", "glue"]
    assert found["datasets"] == ["nyu-mll/glue"]
    assert found["metrics"] == ["accuracy", "f1"]
    (result,) = found["model-index"][0]["results"]
    assert result["dataset"] == {"type": "nyu-mll/glue", "name": "GLUE MNLI", "config": "mnli"}
    assert {m["type"]: m["value"] for m in result["metrics"]} == {"accuracy": 0.875, "f1": 0.9}
    assert ModelCard(text).data.eval_results is not None


def test_a_base_that_is_a_folder_is_not_named_as_one_on_the_hub(tmp_path):
    text = card_text(replace(SUMMARY, base=str(tmp_path)))
    assert "base_model" not in metadata(text)
    assert str(tmp_path.parent) not in text
    assert f'AutoModelForSequenceClassification.from_pretrained("./{tmp_path.name}", num_labels=3)' in text


def test_snippet_of_an_adapter_for_a_local_base_runs_where_that_folder_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_bert(num_labels=3)
    model.save_pretrained("folder/bases/mine")
    model.config._name_or_path = model.name_or_path = str(tmp_path / "folder" / "bases" / "mine")
    settings = arguments("out", max_steps=4, warmup_steps=0.5)
    run = IncreLoraTrainer(model, settings, train_dataset=token_rows(), increlora_config=FIXED)
    run.train()
    run.save_model()
    text = (tmp_path / "out" / "README.md").read_text()
    snippet = text.split("```python\n")[1].split("```")[0]
    assert '# Copy the base model\'s folder to "./mine". In training it was loaded as BertForSeq' in snippet
    (tmp_path / "mine").symlink_to(tmp_path / "folder" / "bases" / "mine")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name: words)
    found: dict[str, Any] = {}
    exec(snippet, found)
    with torch.no_grad():
        expected = run.model.eval()(**words("")).logits
    assert torch.equal(found["model"](**words("")).logits, expected)
    assert "tensor" in capsys.readouterr().out
    assert "| lr_scheduler_warmup_steps | 2 |" in text


def words(text: str, **kwargs: Any) -> dict[str, Any]:
    """Stands for a tokenizer."""
    return {"input_ids": torch.tensor([[5, 6, 7]])}


def test_numbers_that_are_whole_are_printed_as_integers():
    text = card_text(replace(SUMMARY, hyperparameters={"num_epochs": 3.0, "learning_rate": 1e-3, "seed": 7}))
    assert "| num_epochs | 3 |" in text
    assert "| learning_rate | 0.001 |" in text
    assert "| seed | 7 |" in text


def test_card_links_the_paper_and_names_the_library_with_its_address_where_it_has_one(monkeypatch):
    named = card_text(SUMMARY).split("## Use")[0]
    assert "[IncreLoRA](https://arxiv.org/abs/2308.12043) in the Python package `increlora-hf`" in named
    linked = card_text(replace(SUMMARY, project="https://example.org/here")).split("## Use")[0]
    assert "in [increlora-hf](https://example.org/here)." in linked
    document = Message()
    monkeypatch.setattr("increlora_hf.trainer.summary.metadata", lambda name: document)
    assert _project() is None
    document["Project-URL"] = "Documentation, https://example.org/docs"
    document["Project-URL"] = "Repository, https://example.org/here"
    assert _project() == "https://example.org/here"


@pytest.mark.parametrize(
    "name, expected",
    [("bert-base-uncased", True), ("a/b", True), ("a/b/c", False), ("/a/b", False), ("./a", False), ("", False)],
)
def test_what_can_be_a_name_on_the_hub(name, expected):
    assert is_hub_id(name) is expected


def test_texts_of_a_strange_base_have_no_effect_in_the_card():
    text = card_text(replace(SUMMARY, labels={0: "a", 1: "b\n\n# Buy `this`", 2: "<script>x</script>"}))
    assert "2 = &lt;script&gt;x&lt;/script&gt;" in text
    assert "1 = b \\# Buy \\`this\\`" in text
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    evil = "x`</p>\n\n# Pwned | <b>[a](b)</b> https://evil.example www.evil.example"
    fields = {"metrics": {f"{evil}_": 1.0}, "hyperparameters": {evil: evil}, "labels": {0: evil, 1: "LABEL_1"}}
    text = card_text(replace(SUMMARY, base=f"/bases/{evil}", **fields), dataset_name=evil, model_name=evil)
    shown = markdown.render(re.sub(r"```.*?```", "", text.split("---\n", 2)[2], flags=re.DOTALL))
    assert "LABEL_1" in shown
    assert not re.search(r"<h1>Pwned|<b>|<a href=.b|href=.https?://(?!arxiv)", shown)
    assert shown.count("<h1>") == 1
    outside_code = re.sub(r"<code>.*?</code>", "", shown)
    assert "evil.example" not in outside_code
    assert all(row.count("|") == 3 for row in text.splitlines() if row.startswith("| "))
    strange = replace(SUMMARY, repository='user/"quoted"')
    compile(card_text(strange).split("```python\n")[1].split("```")[0], "card", "exec")


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "SEQ_2_SEQ_LM", None])
@pytest.mark.parametrize("base", ["user/base", "/some/folder", ""])
def test_snippet_is_python_for_every_task(task, base):
    text = card_text(replace(SUMMARY, task_type=task, base=base))
    snippet = text.split("```python\n")[1].split("```")[0]
    compile(snippet, "card", "exec")
    assert '"user/adapter"' in snippet


def test_counts_ranks_settings_and_versions_are_the_runs():
    text = card_text(replace(SUMMARY, best={"adapter_parameters_at_best": 1000, "adapter_parameters_at_end": 1234}))
    assert "Total rank 3 of a budget of 6" in text
    assert "1,000 parameters trained in the adapter, the best checkpoint's (1,234 at the end)" in text
    assert "56 trained fully" in text
    assert "| increlora r_avg | 3 |" in text
    assert "| learning_rate | 0.001 |" in text
    assert "0 = entailment, 1 = neutral, 2 = contradiction" in text
    assert "At" not in text.split("## Results")[0]
    assert "at step 120" in text
    assert text.split("## Software")[1].strip() == "increlora-hf 0.1.0, peft 0.21.2"


def test_ranks_that_differ_come_with_the_command_for_programs_of_one_rank():
    command = "`increlora export user/adapter --format uniform --output FOLDER`"
    assert command in card_text(SUMMARY).split("## Results")[0]
    ranks = {"encoder.layer.0.query": 2, "encoder.layer.0.key": 2, "encoder.layer.0.value": 0}  # 0 is not saved
    assert command not in card_text(replace(SUMMARY, history={**SUMMARY.history, "rank_pattern": ranks}))


def test_images_are_shown_where_they_are_there(tmp_path):
    run = IncreLoraTrainer(
        tiny_bert(), arguments(tmp_path), train_dataset=token_rows(), increlora_config=IncreLoraConfig(r_avg=2)
    )
    assert "![" not in card_text(describe(run, tmp_path, None))
    (tmp_path / "increlora_rank_map.png").write_bytes(b"")
    assert "![The rank of every layer](increlora_rank_map.png)" in card_text(describe(run, tmp_path, None))


def test_checkpoints_and_output_folder_carry_the_card_of_the_run(tmp_path):
    run = IncreLoraTrainer(
        tiny_bert(),
        arguments(tmp_path, max_steps=12, save_strategy="steps", save_steps=6, eval_strategy="steps", eval_steps=6),
        train_dataset=token_rows(),
        eval_dataset=token_rows(16),
        increlora_config=IncreLoraConfig(r_avg=2, interval=2, start=2, top_h=6),
    )
    run.train()
    run.create_model_card(dataset="random tokens", tasks="text-classification", model_name="mine")
    run.save_model()
    text = (tmp_path / "README.md").read_text()
    assert text.count("random tokens") == 1
    assert "# mine" in text
    assert f"{run.increlora.num_parameters():,} parameters trained in the adapter" in text
    assert f"| loss | {run.state.log_history[-2]['eval_loss']:.4f} |" in text
    assert "total  " in text
    assert "IncreLoRA" in (tmp_path / "checkpoint-6" / "README.md").read_text()


def test_a_card_that_fails_costs_no_checkpoint(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("increlora_hf.trainer.publishing.card_text", lambda *args, **kwargs: 1 / 0)
    run = IncreLoraTrainer(
        tiny_bert(), arguments(tmp_path), train_dataset=token_rows(), increlora_config=IncreLoraConfig(r_avg=2)
    )
    run.create_model_card()  # as some trainers do at every save
    run.save_model()
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert "could not write the model card of" in caplog.text


def test_what_an_earlier_call_said_stays(tmp_path):
    run = IncreLoraTrainer(
        tiny_bert(), arguments(tmp_path), train_dataset=token_rows(), increlora_config=IncreLoraConfig(r_avg=2)
    )
    run.create_model_card(license="mit", dataset_name="random tokens")
    run.create_model_card(model_name="mine")
    found = metadata((tmp_path / "README.md").read_text())
    assert (found["license"], found["model-index"][0]["name"] if "model-index" in found else "mine") == ("mit", "mine")


def test_tokenizer_is_the_bases_where_the_adapter_has_none():
    assert 'AutoTokenizer.from_pretrained("microsoft/deberta-v3-base")' in card_text(
        replace(SUMMARY, has_tokenizer=False)
    )


def test_a_model_without_a_task_is_loaded_by_its_class_and_whole_name():
    text = card_text(replace(SUMMARY, task_type=None, base="google/vit", auto_class="ViTForImageClassification"))
    assert 'base = ViTForImageClassification.from_pretrained("google/vit", num_labels=3)' in text
