"""The private and undocumented names of transformers, peft, accelerate and torch on which the package leans.

An upstream change fails here with the module of ours that breaks. A new seam is one more row of `SEAMS`; a row whose
module no longer uses the name fails too, and is deleted.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

import increlora_hf
from increlora_hf import IncreLoraTrainer

PACKAGE = Path(increlora_hf.__file__).parent
NO_SEAMS = {
    "_replace",
    "_asdict",
    "_fields",
    "_abc_impl",
    "_backward_cls",
}  # documented (named tuples), or a metaclass's
PRESENT = ""  # in the place of a signature: the name is all that is needed, or it is no Python function


class Seam(NamedTuple):
    """A name of theirs on which a module of ours leans."""

    ours: str
    theirs: str
    signature: str  # without annotations
    reason: str
    since: str = ""  # the first version of theirs that has it; before, ours is not called or has a default

    @property
    def name(self) -> str:
        return self.theirs.rpartition(".")[2]


TRAINER = "transformers.Trainer."
HANDLER = "transformers.trainer_callback.CallbackHandler."
INTEGRATIONS = "transformers.integrations."
LORA = "peft.tuners.lora.layer."
MODULE = "torch.nn.Module."

SEAMS = [
    Seam("distributed.py", "torch.distributed.distributed_c10d._set_pg_timeout", "(timeout, group=None)",
         "gives gloo's collectives Trainer's ddp_timeout after the group was made"),
    Seam("method/penalties.py", "torch._foreach_add_", PRESENT, "adds all gradients of the penalty in one call"),
    Seam("adapter/lowrank.py", "torch._C._current_graph_task_id", PRESENT,
         "tells a forward call from activation checkpointing's second one, inside a backward pass"),
    Seam("adapter/factors.py", MODULE + "_save_to_state_dict", "(self, destination, prefix, keep_vars)",
         "overridden: writes one folded `weight` in the place of components and λ"),
    Seam("adapter/factors.py", MODULE + "_load_from_state_dict",
         "(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)",
         "overridden: takes the folded `weight` apart again"),
    Seam("adapter/fused.py", MODULE + "_forward_hooks", PRESENT, "leaves a layer with hooks to PEFT's own forward"),
    Seam("adapter/fused.py", MODULE + "_forward_pre_hooks", PRESENT, "the same"),
    Seam("adapter/fused.py", LORA + "Linear.forward", "(self, x, *args, **kwargs)",
         "overridden by assigning the layer's __class__; PEFT's own runs where more than the plain update is asked"),
    Seam("adapter/fused.py", LORA + "LoraLayer.lora_variant", PRESENT, "the dict in which PEFT looks up FusedUpdate"),
    Seam("adapter/fused.py", LORA + "LoraVariant.forward", "(module, active_adapter, x, result, **kwargs)",
         "overridden: computes the update over any base layer; PEFT calls LoraVariant private"),
    Seam("adapter/fused.py", LORA + "LoraVariant.merge_safe", "(module, active_adapter, orig_weight)",
         "overridden: merges ΔW"),
    Seam("adapter/fused.py", LORA + "LoraVariant.merge_unsafe", "(module, active_adapter, orig_weight)",
         "overridden: merges ΔW in place"),
    Seam("adapter/fused.py", LORA + "LoraVariant.unmerge", "(module, active_adapter, orig_weight)",
         "overridden: takes ΔW out again"),
    Seam("adapter/fused.py", LORA + "LoraLayer.scaling", PRESENT, "the dict that holds s"),
    Seam("adapter/fused.py", LORA + "LoraLayer.lora_dropout", PRESENT, "nn.Identity where there is no dropout"),
    Seam("adapter/components.py", LORA + "LoraLayer.r", PRESENT, "the dict that is told the rank after every round"),
    Seam("adapter/components.py", LORA + "LoraLayer.lora_alpha", PRESENT, "the dict that is told α after every round"),
    Seam("adapter/targets.py", "peft.tuners.tuners_utils.check_target_module_exists", "(config, key)",
         "asks PEFT which layers it will adapt, before it adapts any"),
    Seam("adapter/targets.py", "peft.tuners.tuners_utils._check_lora_target_modules_mamba",
         "(peft_config, model, target_name)", "asks PEFT which linear layers of state-space models it refuses"),
    Seam("adapter/targets.py", "peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers",
         "(peft_config, model, conversions)", "asks PEFT which targets it takes for the experts' stacked weights"),
    Seam("adapter/targets.py", "torch.nn.modules.linear.NonDynamicallyQuantizableLinear", PRESENT,
         "the linear layer that nn.MultiheadAttention does not call"),
    Seam("adapter/targets.py", MODULE + "_modules", PRESENT, "finds modules that are reached by several names"),
    Seam("adapter/targets.py", MODULE + "_parameters", PRESENT, "finds weights that several modules share"),
    Seam("adapter/targets.py",
         "transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", PRESENT,
         "finds the task type that belongs to a model's class"),
    Seam("adapter/warmstart.py", LORA + "LoraLayer.lora_variant", PRESENT, "refuses layers that are no plain LoRA"),
    Seam("adapter/warmstart.py", "transformers.PreTrainedModel._hf_peft_config_loaded", PRESENT,
         "tells a model with adapters of its own (add_adapter); unset when the adapter has been taken out"),
    Seam("growth/attach.py", "peft.PeftModel.save_pretrained",
         "(self, save_directory, safe_serialization=True, selected_adapters=None, save_embedding_layers='auto', "
         "is_main_process=True, path_initial_model_for_weight_conversion=None, **kwargs)",
         "replaced on the instance: the history is written beside the adapter"),
    Seam("growth/packing.py", "torch._foreach_copy_", PRESENT, "copies all strips back into the factors in one call"),
    Seam("growth/packing.py", "torch.optim.Optimizer.state_dict", "(self)",
         "replaced on the instance: the groups hold the strips meanwhile"),
    Seam("growth/packing.py", "torch.optim.Optimizer.load_state_dict", "(self, state_dict)", "replaced likewise"),
    Seam("growth/replicas.py", "peft.utils.ModulesToSaveWrapper.original_module", PRESENT,
         "its name in parameter names tells PEFT's untrained copy of a head"),
    Seam("growth/run.py", "torch.amp.GradScaler._per_optimizer_states", PRESENT,
         "says whether the gradients are unscaled by now, so that the penalty's get the same factor"),
    Seam("growth/run.py", "accelerate.optimizer.AcceleratedOptimizer.optimizer", PRESENT,
         "the optimizer inside accelerate's wrapper"),
    Seam("growth/schedule.py", "torch.optim.lr_scheduler.LambdaLR.lr_lambdas", PRESENT,
         "takes the curve out of a schedule of transformers"),
    Seam("growth/schedule.py", "torch.optim.lr_scheduler.LambdaLR.base_lrs", PRESENT,
         "left out of the scheduler's state: there are fewer of them than groups"),
    Seam("growth/tensors.py", "torch.nn.modules.batchnorm._NormBase", PRESENT,
         "finds every kind of layer with running statistics"),
    Seam("growth/attach.py", "sentence_transformers.base.model.BaseModel", PRESENT,
         "refuses models whose library could not load the adapter"),
    Seam("sentence_transformers.py", "sentence_transformers.base.model.BaseModel", PRESENT,
         "the library's models, of every kind"),
    Seam("sentence_transformers.py", "sentence_transformers.base.modules.Transformer.modality_config", PRESENT,
         "says which output of the transformer is used, so that an idle pooler is left out"),
    Seam("sentence_transformers.py", "sentence_transformers.base.model_card.BaseModelCardData.set_best_model_step",
         "(self, step)", "names the best step in the library's card"),
    Seam("sentence_transformers.py", TRAINER + "_load_best_model", "(self)",
         "overridden: the card names the step"),
    Seam("files/export.py", MODULE + "_parameters", PRESENT, "finds weights that several modules share"),
    Seam("files/loading.py", "peft.tuners.tuners_utils.check_target_module_exists", "(config, key)",
         "asks PEFT which layers a stranger's configuration selects"),
    Seam("files/loading.py", "peft.utils.other.get_pattern_key", "(pattern_keys, key_to_match)",
         "asks PEFT which pattern gives a layer its rank"),
    Seam("report/callback.py", HANDLER + "call_event", "(self, event, args, state, control, **kwargs)",
         "replaced on the instance: integrations find the settings among the training arguments"),
    Seam("report/callback.py", HANDLER + "model", PRESENT, "the model whose settings are shown"),
    Seam("report/callback.py", HANDLER + "callbacks", PRESENT, "finds Trainer's integrations, to log a round to them"),
    Seam("report/callback.py", INTEGRATIONS + "INTEGRATION_TO_CALLBACK", PRESENT, "tells integrations from callbacks"),
    Seam("report/callback.py", INTEGRATIONS + "TensorBoardCallback.tb_writer", PRESENT, "draws the rank map"),
    Seam("report/callback.py", INTEGRATIONS + "WandbCallback._wandb", PRESENT, "draws the rank map"),
    Seam("report/callback.py", INTEGRATIONS + "TrackioCallback._trackio", PRESENT, "draws the rank map"),
    Seam("trainer/summary.py", "transformers.modelcard.extract_hyperparameters_from_trainer", "(trainer)",
         "lists hyperparameters as Trainer's own card does"),
    Seam("trainer/loss_accounting.py", TRAINER + "_get_num_items_in_batch", "(self, batch_samples, device)",
         "counts the items of one micro-batch as Trainer counts them"),
    Seam("trainer/loss_accounting.py", TRAINER + "_loss_shifts_labels", PRESENT,
         "true of losses that are known to divide by the item count"),
    Seam("trainer/loss_accounting.py", TRAINER + "model_accepts_loss_kwargs", PRESENT,
         "corrected where the model accepts the item count and ignores it"),
    Seam("trainer/loss_accounting.py", TRAINER + "compute_loss_context_manager", "(self)",
         "computes the two losses that are compared as Trainer computes them"),
    Seam("trainer/loss_accounting.py", TRAINER + "current_gradient_accumulation_steps", PRESENT,
         "M, the micro-batches of this step"),
    Seam("trainer/mixin.py", "accelerate.Accelerator.prepare_model",
         "(self, model, device_placement=None, evaluation_mode=False)",
         "replaced on the instance: no DistributedDataParallel around a model that grows"),
    Seam("trainer/mixin.py", "accelerate.Accelerator.backward", "(self, loss, **kwargs)",
         "replaced on the instance: sensitivities are read after every backward pass, whoever calls it"),
    Seam("trainer/mixin.py", "accelerate.Accelerator.scaler", PRESENT, "fp16's loss scale, which I must not contain"),
    Seam("trainer/mixin.py", "transformers.PreTrainedModel.is_distributed_loading_by_transformers", PRESENT,
         "allows a run on a sharded base to save what it resumes from", since="5.19"),
    Seam("trainer/mixin.py", "transformers.ProgressCallback.training_bar", PRESENT, "shows the total rank"),
    Seam("trainer/mixin.py", HANDLER + "callbacks", PRESENT, "finds the progress bar"),
    Seam("trainer/mixin.py", HANDLER + "train_dataloader", PRESENT, "compares its length between processes"),
    Seam("trainer/mixin.py", TRAINER + "_created_lr_scheduler", PRESENT,
         "set where ours makes the scheduler, so that a second training makes its own"),
    Seam("trainer/mixin.py", TRAINER + "_get_output_dir", "(self, trial)", "names the checkpoint's folder"),
    Seam("trainer/mixin.py", TRAINER + "_determine_best_metric", "(self, metrics, trial)",
         "compares rank 0's metrics in every process"),
    Seam("trainer/mixin.py", TRAINER + "_load_best_model", "(self)",
         "overridden: the best checkpoint has ranks of its own"),
    Seam("trainer/mixin.py", TRAINER + "_load_from_checkpoint", "(self, resume_from_checkpoint, model=None)",
         "overridden: rounds are replayed before values are loaded"),
    Seam("trainer/mixin.py", TRAINER + "_load_rng_state", "(self, checkpoint)",
         "restores random states where a resumed run has no batch left"),
    Seam("trainer/mixin.py", TRAINER + "_run_epoch", PRESENT,
         "overridden: not entered where a resumed run has no step left"),
    Seam("trainer/mixin.py", TRAINER + "_save_checkpoint", "(self, model, trial)",
         "overridden: writes the state of growth and the manifest, then rotates"),
    Seam("trainer/mixin.py", TRAINER + "_sync_replicated_trainable_parameters", "(self, model)",
         "overridden by nothing: it would watch the parameters of this moment only", since="5.19"),
    Seam("trainer/mixin.py", TRAINER + "call_model_init", "(self, trial=None)", "overridden: attaches the new model"),
    Seam("trainer/mixin.py", TRAINER + "create_accelerator_and_postprocess", "(self)",
         "overridden: the place where the accelerator has just been made"),
    Seam("trainer/mixin.py", TRAINER + "_hp_search_setup", "(self, trial)",
         "lets a trial choose the seed before the model is attached"),
    Seam("trainer/trl_models.py", "trl.trainer.utils.create_model_from_path",
         "(model_id, architecture=None, **kwargs)",
         "loads a model by name as TRL's trainers do"),
    Seam("trainer/search.py", TRAINER + "_hp_search_setup", "(self, trial)",
         "overridden: does not warn of the settings of IncreLoRA in a trial"),
    Seam("trainer/search.py", TRAINER + "hp_search_backend", PRESENT, "tells what a trial is"),
    Seam("trainer/search.py", TRAINER + "hp_space", PRESENT, "what a trial of Optuna chooses"),
    Seam("trainer/trl_models.py", "peft.PeftModel.add_adapter",
         "(self, adapter_name, peft_config, low_cpu_mem_usage=False, autocast_adapter_dtype=True)",
         "replaced on the instance while one of TRL's trainers is made: it would copy growing factors by their names"),
    Seam("trainer/trl_models.py", MODULE + "get_parameter", "(self, target)", "replaced likewise"),
    Seam("trainer/trl_models.py", "peft.utils.ModulesToSaveWrapper.modules_to_save", PRESENT, "copies trained heads"),
    Seam("trainer/refusals.py", "transformers.TrainingArguments.deepspeed_plugin", PRESENT, "refuses DeepSpeed"),
    Seam("trainer/refusals.py", "transformers.PreTrainedModel.tp_size", PRESENT, "refuses tensor parallelism"),
    Seam("trainer/publishing.py", TRAINER + "_save", "(self, output_dir=None, state_dict=None)",
         "overridden: training arguments as JSON in the place of a pickle"),
    Seam("trainer/publishing.py", TRAINER + "save_model", "(self, output_dir=None, _internal_call=False)",
         "overridden: a push that fails does not end the training"),
    Seam("trainer/publishing.py", TRAINER + "_push_from_checkpoint", "(self, checkpoint_folder)",
         "overridden by nothing: the checkpoint is not complete yet"),
    Seam("trainer/publishing.py", TRAINER + "_finish_current_push", "(self)", "overridden: reports what failed"),
    Seam("trainer/publishing.py", TRAINER + "push_in_progress", PRESENT, "what is being uploaded"),
    Seam("trainer/publishing.py", "transformers.utils.hub.hf_api", "()", "uploads in the background"),
    Seam("trainer/publishing.py", "transformers.utils.hub.PushInProgress", "(jobs=None)", "what Trainer waits for"),
    Seam("trainer/publishing.py", "transformers.utils.hub.PushInProgress.jobs", PRESENT, "its uploads"),
    Seam("trainer/publishing.py", "transformers.utils.hub.PushInProgress.is_done", "(self)", "whether to wait"),
    Seam("cli/estimate.py", "torch._subclasses.fake_tensor.FakeTensorMode", PRESENT,
         "runs a forward pass over tensors without storage, to count what it keeps for the backward pass"),
    Seam("tasks/help.py", "transformers.training_args.TrainingArguments", PRESENT,
         "its fields are read from the source of that module, so that help needs no torch"),
    Seam("tasks/glue/metric.py", "evaluate.Metric._compute", "(self, *, predictions=None, references=None, **kwargs)",
         "overridden: evaluate's way to write a metric"),
    Seam("tasks/glue/metric.py", "evaluate.Metric._info", "(self)", "overridden: the same"),
    Seam("tasks/squad/trainer.py", TRAINER + "_get_eval_sampler", "(self, eval_dataset)",
         "overridden: windows are evaluated in order"),
    Seam("tasks/squad/metric.py", "evaluate.Metric._compute",
         "(self, *, predictions=None, references=None, **kwargs)", "overridden: evaluate's way to write a metric"),
    Seam("tasks/squad/metric.py", "evaluate.Metric._info", "(self)", "overridden: the same"),
    Seam("tasks/squad/encoders.py", "transformers.models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES",
         PRESENT, "tells encoders from decoders"),
]  # fmt: skip


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{seam.ours}-{seam.theirs}")
def test_upstream_has_what_we_lean_on(seam: Seam) -> None:
    package = seam.theirs.partition(".")[0]
    if package in ("sentence_transformers", "trl"):
        pytest.importorskip(package)
    if seam.since and _numbers(version(package)) < _numbers(seam.since):
        pytest.skip(f"{package} has it since {seam.since}")
    found = _find(seam.theirs)
    breaks = (
        f"increlora_hf/{seam.ours} breaks with {package} {version(package)}. It leans on {seam.theirs}: {seam.reason}."
    )
    assert found is not None, f"{breaks} That name is gone."
    if seam.signature:
        assert _signature(found) == seam.signature, f"{breaks} Its signature has changed."


def test_trl_copies_an_adapter_into_ref_as_we_count_on() -> None:
    """trainer/trl_models.py stands in for these two calls."""
    trl = pytest.importorskip("trl")
    for trainer in (trl.DPOTrainer, trl.KTOTrainer, trl.RLOOTrainer, trl.GRPOTrainer):
        source = inspect.getsource(sys.modules[trainer.__module__])
        assert 'model.add_adapter("ref", default_config)' in source
        assert "ref_param = model.get_parameter(ref_name)" in source
        assert 'adapter_name="ref" if "ref" in' in source


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{seam.ours}-{seam.theirs}")
def test_row_is_needed(seam: Seam) -> None:
    source = (PACKAGE / seam.ours).read_text(encoding="utf-8")
    assert re.search(rf"\b{seam.name}\b", source), f"{seam.ours} does not use {seam.name}. Delete the row."


def test_every_private_name_that_we_use_or_override_has_a_row() -> None:
    listed = {(seam.ours, seam.name) for seam in SEAMS}
    missing = {*_private_names_used(), *_private_names_overridden()} - listed
    assert not missing, f"Add rows to SEAMS for {sorted(missing)}."


def test_trainer_ends_a_step_in_the_order_that_growth_counts_on() -> None:
    """trainer/mixin.py: clipping sees whole gradients; a round comes between the steps of optimizer and scheduler."""
    source = inspect.getsource(transformers.Trainer._run_epoch)
    order = [
        "self.training_step(", "self._clip_grad_norm(", ".on_pre_optimizer_step(", "self.optimizer.step(",
        ".on_optimizer_step(", "self.lr_scheduler.step(", "model.zero_grad(", "self.state.global_step += 1",
        ".on_step_end(",
    ]  # fmt: skip
    places = [source.find(call) for call in order]
    assert -1 not in places
    assert places == sorted(places)


def test_accelerate_puts_its_forward_where_fused_layers_look_for_it() -> None:
    """adapter/fused.py leaves a base layer that accelerate watches to PEFT's own forward."""
    layer = nn.Linear(2, 2)
    assert "forward" not in layer.__dict__
    add_hook_to_module(layer, ModelHook())
    assert "forward" in layer.__dict__


# ---- How names are found -----------------------------------------------------------------------------------------


def _find(path: str) -> Any:
    """What a dotted name means; True for an attribute that only instances have; None where there is no such name."""
    *parents, name = path.split(".")
    for count in range(len(parents), 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parents[:count]))
        except ImportError:
            continue
        for parent in parents[count:]:
            owner = getattr(owner, parent, None)
        if isinstance(owner, type) and not hasattr(owner, name):
            return True if any(name in _instance_attributes(cls) for cls in owner.__mro__) else None
        return getattr(owner, name, None)
    return None


@cache
def _instance_attributes(cls: type) -> set[str]:
    """Names that the class annotates, or its methods assign to ``self``."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # not written in Python
        return set()
    found = set(inspect.get_annotations(cls))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            found.add(node.attr)
    return found


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _signature(function: Any) -> str:
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def _numbers(release: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", release)[:3]]


def _is_private(name: str) -> bool:
    return re.match(r"_[A-Za-z]", name) is not None and name not in NO_SEAMS


def _private_names_used() -> Iterator[tuple[str, str]]:
    """(module of ours, private attribute) for attributes that nothing in the package defines."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    nodes = [(path.relative_to(PACKAGE).as_posix(), node) for path, tree in trees.items() for node in ast.walk(tree)]
    own = {name for _, node in nodes for name in _defined(node)}
    for path, node in nodes:
        for name in _read(node):
            if _is_private(name) and name not in own and name != "_C":  # torch._C is no name by itself
                yield path, name


def _defined(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
        yield node.attr


def _read(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
        yield from (str(argument.value) for argument in node.args[1:2] if isinstance(argument, ast.Constant))


def _private_names_overridden() -> Iterator[tuple[str, str]]:
    """(module of ours, private name) for methods and attributes of ours that a foreign base class has, too."""
    for cls in [IncreLoraTrainer, *_classes()]:
        ours = [base for base in cls.__mro__ if _is_ours(base)]
        theirs = {
            name
            for base in cls.__mro__
            if not _is_ours(base) and base is not object
            for name in {*vars(base), *_instance_attributes(base)}
        }
        for base in ours:
            path = Path(inspect.getfile(base)).relative_to(PACKAGE).as_posix()
            for name in {*vars(base), *_instance_attributes(base)}:
                if _is_private(name) and name in theirs:
                    yield path, name


def _is_ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "increlora_hf"


def _classes() -> Iterator[type]:
    for info in pkgutil.walk_packages([str(PACKAGE)], "increlora_hf."):
        try:
            module = importlib.import_module(info.name)
        except ImportError:  # of an optional package
            continue
        yield from (cls for _, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == module.__name__)
