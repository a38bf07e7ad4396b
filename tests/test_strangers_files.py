"""A seeded fuzz of the files of strangers: each is refused soon, with a typed error, or it loads finite values."""

import json
import os
import random
import re
import shutil
import struct
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, save
from test_unchanged import Picture, picture, unchanged
from torch import Tensor, nn

from increlora_hf import AdapterFormatError, GrowthRun, IncreLoraConfig, attach, load_adapter
from increlora_hf.cli import commands
from increlora_hf.documents import HISTORY_NAME, write_json
from increlora_hf.files.checkpoints import MANIFEST_NAME, newest_complete, resolve_checkpoint, write_manifest
from increlora_hf.files.run_state import STATE_JSON, STATE_TENSORS, write_state
from increlora_hf.files.saved_adapter import CONFIG_NAME, STATE_NAME, WEIGHTS_NAME
from increlora_hf.hub.upload import _chosen
from increlora_hf.trainer.resuming import state_to_resume, where_it_stopped

CASES, SEED = 10_000, 17
LONGEST = 2.0  # seconds of processor time, of this process and its children, that a file may take
SHARE = 0.3  # of the cases that are exported, and of the loaded ones that are trained on
PLOTTED = 0.01  # share of the cases that are drawn, without being saved as pictures
CONFIG = IncreLoraConfig(
    r_avg=2, top_h=2, interval=2, start=1, target_modules=["query", "dense"], modules_to_save=["head"]
)
FILES = {  # to damage -> how often
    **{CONFIG_NAME: 30, WEIGHTS_NAME: 26, STATE_JSON: 18, STATE_TENSORS: 8},
    **{MANIFEST_NAME: 8, HISTORY_NAME: 5, STATE_NAME: 5},
}
OF_THE_STATE = (STATE_JSON, STATE_TENSORS, MANIFEST_NAME)
DOCUMENTED = (  # ValueErrors that are no AdapterFormatError
    "(?i)was written with other settings|an optimizer that was made|growth only adds rank|is not finite"
)

T = TypeVar("T")


class Tiny(nn.Module):
    """Linear layers with names like a transformer's: three to adapt, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(nn.ModuleDict({"query": nn.Linear(4, 3), "out": nn.Linear(3, 4)}) for _ in range(2))
        self.dense, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, input_ids: Tensor) -> Any:
        x = input_ids[..., :4].to(self.head.weight) / 50
        for block in self.layer:
            x = x + block["out"](block["query"](x))
        return SimpleNamespace(logits=self.head(self.dense(x)))


def begin(model: PeftModel, state: Any = None) -> GrowthRun:
    """A run of 12 steps, resumed in the order in which the Trainer does it."""
    if state is not None:
        model.increlora.replay(state, state["rounds_before_optimizer"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    return GrowthRun(model, optimizer, total_steps=12, warmup_steps=2, state=state)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after two rounds, with adapter, history and log."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint-6"
    model = attach(Tiny(), CONFIG)
    run = begin(model)
    for step in range(6):
        model(input_ids=torch.arange(8).reshape(2, 4) + step).logits.square().mean().backward()
        run.before_step()
        run.optimizer.step()
        run.after_step()
        run.optimizer.zero_grad()
    model.save_pretrained(str(folder))
    write_state(folder, model)
    log = [{"step": step, "loss": 1.0, "increlora/orth_loss": 0.5, "increlora/total_rank": 6} for step in (2, 4, 6)]
    write_json(folder / STATE_NAME, {"global_step": 6, "max_steps": 12, "log_history": log})
    (folder / "optimizer.pt").write_bytes(b"not opened here")
    write_manifest(folder)
    return folder


# ---- Ways to break a file ------------------------------------------------------------------------------------------

TEXTS = [  # as JSON has them between quotation marks
    *(
        "",
        "x",
        "query",
        "dense",
        "head",
        "layer",
        "original_module",
        "default",
        "all-linear",
        "LORA",
        "IA3",
        "SEQ_CLS",
    ),
    *("\\u0000", "a\\u0000b", "\\ud800", "\\n\\u001b[2J", "größer", "x" * 5000, "a." * 2500, "9" * 5000, "$\\\\frac{"),
    *("../../etc/passwd", "/etc/passwd", "/dev/zero", ".", "..", "%s{0}", "__class__", "self"),
    *("(", "[\\\\w.]+", "a{99999999999}", "(?P<idx>.*)", "(?i)query", "*", "\\\\", ".*", "(" * 200 + ")" * 200),
    *("(.*.*.*.*)*!", "([\\\\w.]+)+", "(a|\\\\w|.)*!"),  # these match without end
    *("F8_E4M3", "F8_E5M2", "F8_E8M0", "BF16", "F16", "F64", "I64", "I8", "U8", "BOOL", "C64", "F4"),
]
LITERALS = [  # as they stand in a JSON file
    *(f'"{text}"' for text in TEXTS),
    *(f'["{text}"]' for text in TEXTS[:12]),
    *(f'{{"{text}": 1}}' for text in TEXTS),
    *("null", "true", "false", "0", "1", "-1", "2", "3", "1.5", "65536", "4294967296", "9223372036854775808"),
    *("1e30", "1e308", "1e-320", "1e999", "-1e999", "NaN", "-Infinity", "1" + "0" * 400, "-1" + "0" * 400, "1" * 5000),
    *("[]", "{}", "[[]]", "[{}]", "[null]", "[1]", "[-1, 1e999]", '["query", "query"]', '[["query"]]', '{"a": [0]}'),
    *("[0, 0]", "[4, 0]", "[0, 4]", "[-1, 4]", "[4]", "[1, 1, 4]", "[1000000000000, 0]", "[9223372036854775807, 2]"),
    *(f"{'[' * depth}{']' * depth}" for depth in (60, 900, 960, 990)),
    *("[" * 10**5, '{"a":' * 900 + "1" + "}" * 900, '{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'),
]
KEYS = [json.loads(f'"{text}"') for text in TEXTS]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values inside a document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*at, key)
        yield from places(inner, (*at, key))


def broken_document(document: dict[str, Any], chance: random.Random) -> tuple[bytes, str]:
    """A JSON file in which one place or two are broken, and what was done to it."""
    document, literals, told = deepcopy(document), dict[str, str](), list[str]()
    for number in range(chance.choice([1, 1, 1, 2])):
        found = list(places(document))
        if not found:
            break
        depth = chance.randint(1, max(map(len, found)))
        path = chance.choice([one for one in found if len(one) <= depth])
        holder: Any = document
        for key in path[:-1]:
            holder = holder[key]
        key, value, mark = path[-1], holder[path[-1]], f"@@{number}"
        literals[mark] = literal = chance.choice(LITERALS)
        how = chance.randrange(10)
        if how == 0:
            del holder[key]
            told.append(f"{path} deleted")
        elif how == 1 and isinstance(holder, dict):
            name = chance.choice([*KEYS, f"{key}x"])
            holder[name] = holder.pop(key)
            told.append(f"{path} renamed to {name:.60}")
        elif how == 2 and isinstance(holder, dict):
            name = chance.choice(KEYS)
            holder[name] = mark
            told.append(f"{path[:-1]} has {name:.60} too: {literal:.60}")
        elif how == 2:
            holder.append(mark)
            told.append(f"{path[:-1]} ends with {literal:.60}")
        elif how == 3 and isinstance(value, int | float):
            holder[key] = chance.choice([-value, value + 1, value * 10**6, str(value), [value], float(value)])
            told.append(f"{path} = {holder[key]!r}")
        elif how == 4:
            other: Any = document
            for part in chance.choice(found):
                other = other[part] if isinstance(other, dict | list) and part in places_of(other) else other
            holder[key] = deepcopy(other)
            told.append(f"{path} = {other!r:.60}")
        else:
            holder[key] = mark
            told.append(f"{path} = {literal:.60}")
    text = json.dumps(document)
    for mark, literal in literals.items():
        text = text.replace(f'"{mark}"', literal)
    if chance.random() < 0.05 and document:
        key, literal = chance.choice(list(document)), chance.choice(LITERALS)
        text = f"{text[:-1]}, {json.dumps(key)}: {literal}}}"
        told.append(f"{key!r:.60} given twice: {literal:.60}")
    return text.encode("utf-8", "surrogatepass"), "; ".join(told)


def places_of(value: Any) -> Any:
    return value.keys() if isinstance(value, dict) else range(len(value))


def broken_bytes(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """A file that is cut off, or in which bits are flipped."""
    if chance.random() < 0.3:
        end = chance.randrange(len(content))
        return content[:end], f"cut off after {end} bytes"
    bits = [chance.randrange(len(content) * 8) for _ in range(chance.choice([1, 1, 2, 8]))]
    damaged = bytearray(content)
    for bit in bits:
        damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged), f"bits flipped: {bits}"


FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = (*FLOAT8, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)
NUMBERS = (float("nan"), float("inf"), -float("inf"), 1e300, 1e30, 3e38, 65520.0, 1e-45, 0.0)
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (0, 4), (4, 0), (10**9, 0), (1, 4), (4, 1), (2, 4, 1), (5, 4))


def broken_tensors(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """A safetensors file with a wrong length or header, or with other names, dtypes, shapes or values."""
    (length,) = struct.unpack("<Q", content[:8])
    how = chance.choice(["length", "header", "header", "dtype", "values", "values", "shape", "name"])
    if how == "length":
        claimed = chance.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, chance.randrange(length)])
        return struct.pack("<Q", claimed) + content[8:], f"a header of {claimed} bytes is claimed"
    if how == "header":
        header, told = broken_document(json.loads(content[8 : 8 + length]), chance)
        return struct.pack("<Q", len(header)) + header + content[8 + length :], f"header: {told}"
    tensors = load(content)
    key = chance.choice(list(tensors))
    number, dtype, shape, name = map(chance.choice, (NUMBERS, DTYPES, SHAPES, KEYS))
    told = key
    if how == "dtype":
        tensors[key] = tensors[key].to(dtype)
        told += f" as {dtype}"
    elif how == "values":
        named = list(tensors) if chance.random() < 0.3 else [key]
        for one in named:
            filled = torch.full(tensors[one].shape, number, dtype=torch.float64)
            tensors[one] = filled.to(chance.choice([torch.float32, torch.float64]))
        told += f"{' and all others' if len(named) > 1 else ''} hold {number}"
    elif how == "shape":
        tensors[key] = torch.ones(shape)
        told += f" of shape {shape}"
    else:
        old, new = key.split(".")[-3], name.encode("utf-8", "replace").decode()
        tensors = {one.replace(old, new): tensor for one, tensor in tensors.items()}
        told = f"{old} renamed to {new:.60} in every key"
    return save(tensors, metadata={"format": "pt"}), told


def broken(name: str, content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """A damaged file, and the damage in words."""
    if chance.random() < 0.15:
        return broken_bytes(content, chance)
    if name.endswith(".safetensors"):
        return broken_tensors(content, chance)
    return broken_document(json.loads(content), chance)


# ---- What reads the files ------------------------------------------------------------------------------------------


class Accepted(Exception):
    """Ends a comparison with the model as it was before."""


PICTURES = WeakKeyDictionary[nn.Module, Picture]()  # of models that nothing has changed yet


def refused(action: Callable[[], T], model: nn.Module) -> T | None:
    """What ``action`` returns; None where it refuses with a documented error, and the model is as it was."""
    result = None
    if model not in PICTURES:
        PICTURES[model] = picture(model)
    with suppress(Accepted), unchanged(model, PICTURES[model]):
        try:
            result = action()
        except ValueError as error:
            if not isinstance(error, AdapterFormatError) and not re.search(DOCUMENTED, str(error)):
                raise
            return None
        raise Accepted
    return result


class Readers:
    """All that reads a folder. What is raised but a documented error, and what is not finite, fails."""

    def __init__(self, folder: Path, good: Path) -> None:
        self.folder, self.good, self.output = folder, good, folder.parent / "output"
        self.bases = {dtype: Tiny().to(dtype) for dtype in (torch.float32, torch.float16)}
        self.attached = attach(Tiny(), CONFIG)
        self.accepted: Counter[str] = Counter()

    def adapter(self, chance: random.Random) -> None:
        dtype, trainable = chance.choice(list(self.bases)), chance.random() < 0.5
        base = self.bases[dtype]
        loaded = refused(lambda: load_adapter(base, self.folder, trainable=trainable), base)
        if loaded is None:
            return
        self.bases[dtype] = Tiny().to(dtype)
        self.holds("adapter", loaded)
        if trainable and chance.random() < SHARE:
            grown = refused(lambda: attach(loaded, IncreLoraConfig(r_avg=9)), loaded)
            if grown is not None:
                self.holds("warm start", grown)

    def program(self, chance: random.Random) -> None:
        name, options = str(self.folder), {"base": None, "task": None, "usage_error": None}
        shutil.rmtree(self.output, ignore_errors=True)  # what was exported before
        kind = chance.choice(["peft", "uniform"])
        self.shows("inspect", commands.inspect, adapter=name)
        self.shows("compare", commands.compare, a=name, b=str(self.good), output=None)
        if chance.random() < SHARE:
            self.shows("export", commands.export, adapter=name, output=self.output, format=kind, **options)
        if chance.random() < PLOTTED:
            self.shows("plot", commands.plot, adapter=name, output=self.output)
        _chosen(self.folder, (), False)

    def checkpoint(self, chance: random.Random) -> None:
        newest_complete(self.folder.parent)
        state = refused(self.state, self.attached)
        if state is not None and refused(lambda: begin(self.attached, state), self.attached) is not None:
            self.holds("checkpoint", self.attached)
            self.attached = attach(Tiny(), CONFIG)

    def state(self) -> dict[str, Any]:
        folder = resolve_checkpoint(str(self.folder), str(self.folder.parent))
        where_it_stopped(folder, [])
        return state_to_resume(folder, self.attached.increlora)

    def shows(self, name: str, command: Callable[[Namespace], commands.Answer], **options: Any) -> None:
        with suppress(AdapterFormatError):
            document, text = command(Namespace(**options))
            json.dumps(document)
            assert all(c.isprintable() or c == "\n" for c in text)
            self.accepted[name] += 1

    def holds(self, what: str, model: nn.Module) -> None:
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
        self.accepted[what] += 1


def put(content: bytes, path: Path) -> None:
    """Write a new file in the place of an old one: some file systems wait for the disk where one is overwritten."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


@pytest.mark.slow
def test_files_of_strangers_are_refused_soon_with_a_typed_error_or_load_finite_values(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("increlora_hf.report.plots.save", lambda figure, path: path)
    monkeypatch.setattr("increlora_hf.files.checkpoints.sync", lambda path: None)  # waiting for the disk
    monkeypatch.setattr("increlora_hf.documents.sync", lambda path: None)
    folder = Path(shutil.copytree(good, tmp_path / good.name))
    readers = Readers(folder, good)
    for case in range(CASES):
        chance = random.Random(f"{SEED} {case}")
        (name,) = chance.choices(list(FILES), list(FILES.values()))
        content, told = broken(name, (good / name).read_bytes(), chance)
        put(content, folder / name)
        if name in (STATE_JSON, STATE_TENSORS):
            write_manifest(folder)
        read = [readers.checkpoint] if name in OF_THE_STATE else [readers.adapter, readers.program]
        before = seconds()
        try:
            for reader in [*read, readers.checkpoint] if name == STATE_NAME else read:
                reader(chance)
            assert seconds() - before <= LONGEST
        except (Exception, pytest.fail.Exception) as error:
            raise AssertionError(f"seed {SEED}, case {case}: {name}: {told}") from error
        for changed in {name, MANIFEST_NAME} if name in OF_THE_STATE else {name}:
            put((good / changed).read_bytes(), folder / changed)
    least = {"adapter": 400, "warm start": 100, "inspect": 500, "compare": 500, "export": 400, "checkpoint": 200}
    assert {what: count for what, count in least.items() if readers.accepted[what] < count} == {}
