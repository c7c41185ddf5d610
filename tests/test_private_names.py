"""Private names of other packages: each is used in one place, and a canary says when it changes.

A canary that fails says which function of kdcache is concerned. To mend it, look up what the new version of the library
does, change that one function (for both versions, while pyproject.toml allows both), and add the version to what its
docstring says was seen.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import kdcache
from kdcache.cache import shard_file
from kdcache.models import internals
from kdcache.train.trainer import DistillationTrainer
from tests.tiny import llama

ROOT = Path(kdcache.__file__).parent
INTERNALS, TRAINER = "models/internals.py", "train/trainer.py"

#: (file, function or class, private name): all that kdcache uses. A new one needs a canary below.
USED = {
    (INTERNALS, "", "torch.utils._python_dispatch"),
    (INTERNALS, "", "torch.utils._pytree"),
    (INTERNALS, "identity_of_storage", "_cdata"),
    (INTERNALS, "onednn_linear", "_linear_pointwise"),
    (INTERNALS, "model_from_config", "_from_config"),
    (INTERNALS, "attention_of", "_attn_implementation"),
    (INTERNALS, "use_one_gpu", "_n_gpu"),
    (TRAINER, "DistillationTrainer", "_get_num_items_in_batch"),
    (TRAINER, "DistillationTrainer", "_save"),
    (TRAINER, "DistillationTrainer", "_save_checkpoint"),
    (TRAINER, "DistillationTrainer", "_get_output_dir"),
    (TRAINER, "DistillationTrainer", "_load_from_checkpoint"),
    ("cache/shard_file.py", "_zarr_buffer", "zarr.core.buffer"),
}
#: Modules that their packages do not publish, though no part of their names begins with an underscore.
UNPUBLISHED = ("zarr.core", "datasets.packaged_modules")
#: Of Python itself.
PUBLIC = {"_asdict", "_replace", "_fields", "_exit", "_Hash"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_" and name not in PUBLIC


def own_names(trees: list[ast.Module]) -> set[str]:
    """Private names that kdcache gives itself: functions, attributes, fields, variables."""
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_uses(file: str, tree: ast.Module, own: set[str]) -> set[tuple[str, str, str]]:
    """What `USED` lists, of one file."""
    found = set()

    def visit(node: ast.AST, where: str) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            foreign = [module for module in modules if not module.startswith("kdcache") and module]
            parts = [(module, any(map(is_private, module.split(".")))) for module in foreign]
            found.update((file, where, name) for name, private in parts if private or name.startswith(UNPUBLISHED))
            if isinstance(node, ast.ImportFrom) and foreign:
                found.update((file, where, alias.name) for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            found.add((file, where, node.attr))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "getattr",
            "setattr",
            "hasattr",
            "delattr",
        ):
            name = node.args[1] if len(node.args) > 1 else None
            if (
                isinstance(name, ast.Constant)
                and isinstance(name.value, str)
                and is_private(name.value)
                and name.value not in own
            ):
                found.add((file, where, name.value))
        for child in ast.iter_child_nodes(node):
            inner = isinstance(node, ast.FunctionDef | ast.ClassDef) and not where
            visit(child, node.name if inner else where)

    visit(tree, "")
    return found


def overridden() -> set[tuple[str, str, str]]:
    """Private methods of the Trainer that kdcache's own replaces: a base class may call them, or stop doing so."""
    names = [name for name in vars(DistillationTrainer) if is_private(name) and hasattr(transformers.Trainer, name)]
    return {(TRAINER, "DistillationTrainer", name) for name in names}


def test_private_names_are_used_in_one_place_each_and_have_canaries():
    trees = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in ROOT.rglob("*.py")}
    assert len(trees) > 100
    own = own_names(list(trees.values()))
    found = overridden().union(*(private_uses(file, tree, own) for file, tree in trees.items()))
    assert found == USED, "move it into kdcache/models/internals.py, and give it a canary here"
    names = [name for _, _, name in USED]
    assert len(set(names)) == len(names)


def test_the_search_for_private_names_finds_them():
    source = """
import torch._C
from zarr.core.sync import sync
def use(model, storage):
    from transformers.trainer import _is_peft_model
    model._thing = 1
    return getattr(storage, "_cdata", None), self._mine, tuple._asdict()
"""
    found = private_uses("x.py", ast.parse(source), {"_mine"})
    names = {("", "torch._C"), ("", "zarr.core.sync"), ("use", "_is_peft_model"), ("use", "_thing"), ("use", "_cdata")}
    assert found == {("x.py", *name) for name in names}


# ------------------------------------------------------------------------------------------------------------ canaries


def broken(function: str) -> str:
    """The message of a canary."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{function} does not do what it is for with {versions}; see the top of this file"


def test_canary_torch_dispatch_mode():
    seen = []

    class Mode(internals.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        a = torch.ones(3)
        b = a + 1
    assert b.tolist() == [2, 2, 2]
    assert any("ones" in name for name in seen), broken("internals.TorchDispatchMode")
    assert any("add" in name for name in seen), broken("internals.TorchDispatchMode")


def test_canary_leaves_of():
    tree = {"a": [1, (2, None)], "b": {"c": "x"}}
    leaves = internals.leaves_of(tree)
    assert [leaf for leaf in leaves if leaf is not None] == [1, 2, "x"], broken("internals.leaves_of")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_canary_identity_of_storage(device):
    a = torch.zeros(4, device=device)
    other = torch.zeros(4, device=device)
    view, copy = a[1:].untyped_storage(), a.clone().untyped_storage()
    identity = internals.identity_of_storage
    assert identity(a.untyped_storage()) == identity(view), broken("internals.identity_of_storage")
    assert len({identity(a.untyped_storage()), identity(copy), identity(other.untyped_storage())}) == 3


def test_canary_onednn_linear():
    if not torch.backends.mkldnn.is_available():
        assert internals.onednn_linear() is None
        return
    linear = internals.onednn_linear()
    assert linear is not None, broken("internals.onednn_linear") + " (kdcache works without it, but slower)"
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((5, 8), (7, 8), (7,)))
    expected = nn.functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(linear(x, weight, bias, "none", [], "").double(), expected, rtol=1e-5, atol=1e-5)
    without = nn.functional.linear(x.double(), weight.double())
    torch.testing.assert_close(linear(x, weight, None, "none", [], "").double(), without, rtol=1e-5, atol=1e-5)


def test_canary_model_from_config():
    model = llama(50)
    made = internals.model_from_config(type(model), model.config, torch.bfloat16)
    assert type(made) is type(model), broken("internals.model_from_config")
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    # What casting a finished model would round.
    assert made.model.rotary_emb.inv_freq.dtype == torch.float32, broken("internals.model_from_config")


def test_canary_attention_of():
    model = llama(50)
    model.set_attn_implementation("eager")
    assert internals.attention_of(model.config) == "eager", broken("internals.attention_of")
    config = transformers.LlamaConfig(attn_implementation="owner/kernel")
    assert internals.attention_of(config) == "owner/kernel", broken("internals.attention_of")


def test_canary_use_one_gpu(tmp_path):
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    arguments.n_gpu  # noqa: B018 - is decided when it is first asked for
    arguments._n_gpu = 4
    assert arguments.n_gpu == 4, broken("internals.use_one_gpu")
    internals.use_one_gpu(arguments)
    assert arguments.n_gpu == 1, broken("internals.use_one_gpu")


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("_get_num_items_in_batch", ["self", "batch_samples", "device"]),
        ("_save", ["self", "output_dir", "state_dict"]),
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_get_output_dir", ["self", "trial"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
    ],
)
def test_canary_methods_of_the_trainer(method, parameters, tmp_path):
    """The Trainer has the method, with these parameters, and calls it."""
    assert list(inspect.signature(getattr(transformers.Trainer, method)).parameters) == parameters, broken(method)
    assert list(inspect.signature(getattr(DistillationTrainer, method)).parameters) == parameters
    calls = []

    class Trainer(transformers.Trainer):
        pass

    def called(self, *arguments, **keywords):
        calls.append(method)
        return getattr(transformers.Trainer, method)(self, *arguments, **keywords)

    setattr(Trainer, method, called)
    rows = [{"input_ids": torch.arange(4), "labels": torch.arange(4)} for _ in range(4)]
    settings = {"per_device_train_batch_size": 2, "save_steps": 1, "report_to": "none", "disable_tqdm": True}
    for max_steps, resume in ((1, None), (2, str(tmp_path / "checkpoint-1"))):
        arguments = transformers.TrainingArguments(str(tmp_path), max_steps=max_steps, use_cpu=True, **settings)
        Trainer(model=llama(50), args=arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
    assert calls, broken(f"kdcache.train.trainer.DistillationTrainer.{method}")


def test_canary_zarr_buffer():
    import zarr
    from zarr.storage import MemoryStore

    made = {}
    zarr.create_array(MemoryStore(made), shape=(5,), dtype="uint8", chunks=(5,), fill_value=0)[...] = np.arange(
        5, dtype=np.uint8
    )
    data = {key: value.to_bytes() for key, value in made.items()}
    store = MemoryStore({key: shard_file._zarr_buffer(value) for key, value in data.items()})
    assert zarr.open_array(store, mode="r")[...].tolist() == [0, 1, 2, 3, 4], broken("cache.shard_file._zarr_buffer")
