"""Students that embed texts: pooling, projection, PCA, and the files of sentence-transformers.

A student pools its states as its own files say, else as the cache's teacher does. There are two ways to compare
embeddings of different widths. ``projection`` adds a linear layer after the pooling, with orthonormal columns at the
start so that angles are those of the pooled states; it is trained and saved with the student, whose vectors then have
the teacher's width. ``pca`` reduces the teacher's embeddings to the student's width, once, by the directions that carry
most of their squared length. They are not centred, because an uncentred linear map is the best one for keeping inner
products, which is what embeddings are compared by. The map is saved with the student, so that the teacher's embeddings
can be reduced alike later.

A run is a directory of sentence-transformers as well as of Hugging Face: the model in its root, and each further module
in a folder of its own.

Shape suffixes: P rows, C width of the teacher's embeddings, D of the student's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdcache.cache import Cache
from kdcache.errors import ConfigError, StudentError
from kdcache.models.pooling import (
    PROJECTION,
    SentenceModules,
    add_projection,
    drop_pooler,
    load_projection,
    modules_of,
    vector_width,
)
from kdcache.schema import OUTPUTS_FIELD, Manifest, OutputsRecord
from kdcache.students.config import StudentConfig
from kdcache.tasks import Task

log = logging.getLogger(__name__)

#: Folder of the map that reduces the teacher's embeddings: a Dense module that modules.json does not list.
PCA_DIR = "teacher_pca"
#: Rows of the cache that the map is fitted on, at most.
PCA_ROWS = 50_000
_READ_SEQUENCES = 1024


@dataclass
class SentenceModel:
    """How a student's states become vectors (``outputs``), its inputs, and the map of the teacher's embeddings."""

    outputs: OutputsRecord
    max_length: int
    prefix: str = ""
    reduction_DC: Tensor | None = None

    def reduced(self, teacher_PC: Tensor) -> Tensor:
        """Return the teacher's embeddings in the student's width, of length 1 if the teacher's are.

        Without a map they are returned as they are.
        """
        if self.reduction_DC is None:
            return teacher_PC
        self.reduction_DC = self.reduction_DC.to(teacher_PC.device)
        # Autocast would compute these products with 8 bits of mantissa and save almost nothing.
        with torch.autocast(teacher_PC.device.type, enabled=False):
            reduced_PD = teacher_PC.float() @ self.reduction_DC.T
        return nn.functional.normalize(reduced_PD, dim=1) if self.outputs.normalised else reduced_PD

    def with_reduced(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a collated batch with the teacher's embeddings `reduced`."""
        if self.reduction_DC is None or OUTPUTS_FIELD not in batch:
            return batch
        return {**batch, OUTPUTS_FIELD: self.reduced(batch[OUTPUTS_FIELD])}


def sentence_model(
    model: Any, config: StudentConfig, manifest: Manifest, task: Task, name: str
) -> SentenceModel | None:
    """Load or add the layers of a sentence model after ``model``, and return how it is used.

    Returns None for a task that does not embed texts. Raises ``ConfigError`` when settings do not fit the task.
    """
    if task.body != "pooled":
        _reject_settings(config, task)
        return None
    assert manifest.outputs is not None
    own = None
    if config.model is not None:
        own = modules_of(config.model, config.revision, StudentError)
        load_projection(model, config.model, config.revision, StudentError)
    drop_pooler(model)  # of a fresh student
    if config.projection is not None and getattr(model, PROJECTION, None) is None:
        add_projection(model, _orthogonal(vector_width(model), manifest.outputs.width, config.seed))
    outputs = manifest.outputs if own is None else _with_own(manifest.outputs, own, name)
    sequences = manifest.sequences
    shape = (vector_width(model), manifest.outputs.width)
    reduction_DC = None if config.model is None else _load_reduction(Path(config.model), shape)
    return SentenceModel(outputs, int(sequences["max_length"]), str(sequences.get("prefix", "")), reduction_DC)


def _reject_settings(config: StudentConfig, task: Task) -> None:
    given = [name for name in ("projection", "pca") if getattr(config, name)]
    if given:
        raise ConfigError(f"student.{given[0]} is for task embedding, and the cache is of task {task.name}; remove it")


def _with_own(outputs: OutputsRecord, own: SentenceModules, name: str) -> OutputsRecord:
    if own.pooling != outputs.pooling:
        log.info("student %s pools by %s, by its own files; the teacher by %s", name, own.pooling, outputs.pooling)
    return outputs.model_copy(update={"pooling": own.pooling})


def _orthogonal(width_in: int, width_out: int, seed: int) -> nn.Sequential:
    linear = nn.Linear(width_in, width_out, bias=False)
    nn.init.orthogonal_(linear.weight, generator=torch.Generator().manual_seed(seed))
    return nn.Sequential(linear, nn.Identity())


def fit_widths(student_width: int, sentence: SentenceModel, config: StudentConfig, cache: Cache) -> None:
    """Fit the map of ``config.pca``, unless the student was loaded with one.

    Raises ``StudentError`` when the teacher's embeddings are not wider than the student's.
    """
    if config.pca and sentence.reduction_DC is None:
        sentence.reduction_DC = fit_reduction(cache, student_width)


def check_width(student_width: int, teacher_width: int, terms: Iterable[str]) -> None:
    """Raise ``StudentError`` when ``terms`` compare embeddings of different widths."""
    names = list(terms)
    if not names or student_width == teacher_width:
        return
    raise StudentError(
        f"the teacher's embeddings have width {teacher_width} and the student's {student_width}, so "
        f"{' and '.join(names)} cannot compare them: set student.projection=linear (a layer to the teacher's width, "
        "saved with the student) or student.pca=true (the teacher reduced to the student's width), or use "
        "similarity_matrix"
    )


# -------------------------------------------------------------------------------------------------------------- PCA


def fit_reduction(cache: Cache, width: int) -> Tensor:
    """Return the directions that carry most of the squared length of the cache's embeddings, [width, C] float32.

    Fitted on `PCA_ROWS` rows at most, spread evenly over the cache: the same for the same cache. Raises
    ``StudentError`` where the teacher's embeddings are not wider than that.
    """
    assert cache.manifest.outputs is not None
    teacher_width = cache.manifest.outputs.width
    if width >= teacher_width:
        raise StudentError(
            f"student.pca: the teacher's embeddings have width {teacher_width}, not more than the student's {width}; "
            "use student.projection=linear"
        )
    moment_CC = np.zeros((teacher_width, teacher_width))
    for outputs_PC in _sample(cache):
        moment_CC += outputs_PC.T @ outputs_PC
    directions_CD = np.linalg.eigh(moment_CC)[1][:, ::-1][:, :width]
    # The sign of a direction is arbitrary; a rule makes it the same everywhere.
    largest_D = np.abs(directions_CD).argmax(axis=0)
    directions_CD = directions_CD * np.sign(directions_CD[largest_D, np.arange(width)])
    return torch.from_numpy(np.ascontiguousarray(directions_CD.T, dtype=np.float32))


def _sample(cache: Cache) -> Any:
    rows_per_sequence = cache.manifest.num_positions / len(cache)
    count = min(len(cache), max(int(PCA_ROWS / rows_per_sequence), 1))
    indices: NDArray[np.int64] = np.linspace(0, len(cache) - 1, count).round().astype(np.int64)
    for start in range(0, count, _READ_SEQUENCES):
        batch = cache.read(indices[start : start + _READ_SEQUENCES], fields=(OUTPUTS_FIELD,))
        yield batch.hidden[OUTPUTS_FIELD].astype(np.float64)


def _load_reduction(directory: Path, shape: tuple[int, int]) -> Tensor | None:
    file = directory / PCA_DIR / "model.safetensors"
    if not file.is_file():
        return None
    reduction_DC = load_file(file)["linear.weight"]
    return reduction_DC if tuple(reduction_DC.shape) == shape else None  # of another teacher


# ------------------------------------------------------------------------------------------------------------ files


def save_sentence_files(model: Any, sentence: SentenceModel, output: str | Path) -> None:
    """Write the files that make ``output`` a directory of sentence-transformers, and the map of the PCA."""
    output = Path(output)
    kinds, width = ["Pooling"], int(model.config.get_text_config().hidden_size)
    _write(output / "1_Pooling", _pooling_settings(str(sentence.outputs.pooling), width))
    projection = getattr(model, PROJECTION, None)
    if projection is not None:
        kinds.append("Dense")
        _write_dense(output / "2_Dense", projection[0].weight, projection[0].bias, projection[1])
    if sentence.outputs.normalised:
        kinds.append("Normalize")
        (output / f"{len(kinds)}_Normalize").mkdir(exist_ok=True)
    if sentence.reduction_DC is not None:
        _write_dense(output / PCA_DIR, sentence.reduction_DC, None, nn.Identity())
    paths = ["", *(f"{number}_{kind}" for number, kind in enumerate(kinds, 1))]
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(zip(paths, ["Transformer", *kinds], strict=True))
    ]
    _dump(output / "modules.json", modules)
    _dump(output / "sentence_bert_config.json", {"max_seq_length": sentence.max_length, "do_lower_case": False})
    if sentence.prefix:
        prompts = {"prompts": {"text": sentence.prefix}, "default_prompt_name": "text"}
        _dump(output / "config_sentence_transformers.json", prompts)


def _pooling_settings(pooling: str, width: int) -> dict[str, Any]:
    modes = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
    flags = {f"pooling_mode_{mode}": name == pooling for name, mode in modes.items()}
    return {"word_embedding_dimension": width, **flags}


def _write_dense(directory: Path, weight_DC: Tensor, bias_D: Tensor | None, activation: nn.Module) -> None:
    kind = type(activation)
    settings = {
        "in_features": weight_DC.shape[1],
        "out_features": weight_DC.shape[0],
        "bias": bias_D is not None,
        "activation_function": f"{kind.__module__}.{kind.__name__}",
    }
    _write(directory, settings)
    tensors = {"linear.weight": weight_DC} | ({} if bias_D is None else {"linear.bias": bias_D})
    save_file(
        {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()},
        directory / "model.safetensors",
    )


def _write(directory: Path, settings: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    _dump(directory / "config.json", settings)


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
