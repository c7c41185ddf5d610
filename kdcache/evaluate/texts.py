"""Evaluate what students write: texts for the inputs of a cache, compared with references.

Metrics are chrF (Popović, "chrF: character n-gram F-score for automatic MT evaluation", 2015; by sacrebleu) and the
mean F-measure of ROUGE-L over stemmed words (Lin, "ROUGE: a package for automatic evaluation of summaries", 2004; by
rouge-score), both from 0 to 100. Neither knows whether a text is true; they tell students of one teacher apart.

References are the cache's targets. If these are the teacher's own texts (``kdcache write-targets``), the corpus's are
in the column ``reference``: then they are the references for all, the teacher's texts included. Otherwise what the
teacher would write is unknown, and its row has no such metrics.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence as SequenceOf

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from kdcache.cache import Cache
from kdcache.errors import ConfigError
from kdcache.evaluate.measures import Metrics
from kdcache.models.generation import write_all
from kdcache.models.loading import load_cache_tokenizer
from kdcache.models.padding import EqualLengths
from kdcache.schema import Sequence
from kdcache.students import Student
from kdcache.tasks.seq2seq_lm import Seq2SeqLM, source_of, target_of

_REFERENCE = "reference"
_PACKAGES = ("sacrebleu", "rouge_score")
#: The metrics.
NAMES = ("chrf", "rouge_l")
#: Texts per step of the progress bar.
_STEP = 64


def check_texts(cache: Cache, num_texts: int, beams: int) -> None:
    """Raise ``ConfigError`` when texts cannot be written or evaluated; cheap, to be called before models are loaded."""
    if cache.manifest.task != Seq2SeqLM.name:
        raise ConfigError(
            f"generate is for task {Seq2SeqLM.name}, and the cache is of task {cache.manifest.task}; remove it"
        )
    for name, value in (("generate", num_texts), ("beams", beams)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, found {value}")
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"generate needs packages that are not installed ({', '.join(missing)}): pip install 'kdcache[text]'"
        )


class GeneratedTexts:
    """Evaluate texts that students write for ``num_texts`` of the sequences ``chosen_N``, spread evenly over them.

    Inputs whose corpus has no reference are left out; raises ``ConfigError`` when none is left.
    """

    def __init__(
        self,
        cache: Cache,
        chosen_N: NDArray[np.int64],
        num_texts: int,
        *,
        beams: int,
        batch_tokens: int,
        progress: bool,
    ) -> None:
        self._cache, self._beams, self._batch_tokens, self._progress = cache, beams, batch_tokens, progress
        spread = np.linspace(0, len(chosen_N) - 1, min(num_texts, len(chosen_N))).round().astype(np.int64)
        indices = chosen_N[spread].tolist()
        self._written_for: list[str] = []
        if _REFERENCE in cache.manifest.corpus.metadata_columns:
            known = [(n, text) for n in indices if (text := _reference(cache, n))]
            if not known:
                raise ConfigError(
                    "generate: no chosen input has a reference to compare with; remove it, or raise its number"
                )
            indices, self._written_for = [n for n, _ in known], [text for _, text in known]
        sequences = cache.read(indices).sequences()
        self._inputs = [source_of(sequence) for sequence in sequences]
        self._targets = _targets(cache, sequences)

    def teacher(self) -> Metrics:
        """Return the metrics of the cache's targets where these are the teacher's texts, else None for each."""
        return scores(self._targets, self._written_for) if self._written_for else dict.fromkeys(NAMES)

    def student(self, name: str, student: Student) -> Metrics:
        """Return the metrics of what ``student`` writes, on the device that it is on."""
        texts: list[str] = []
        lengths = self._cache.manifest.sequences
        starts = range(0, len(self._inputs), _STEP)
        for start in tqdm(starts, desc=f"{name}: texts", unit="step", disable=not self._progress):
            written = write_all(
                student.model,
                student.tokenizer,
                student.vocab_size,
                self._inputs[start : start + _STEP],
                max_tokens=int(lengths["max_target_length" if "max_target_length" in lengths else "max_length"]),
                batch_tokens=self._batch_tokens,
                beams=self._beams,
                equal_lengths=isinstance(student.parts.body, EqualLengths),
            )
            texts += [item.text for item in written]
        return scores(texts, self._written_for or self._targets)


def scores(texts: SequenceOf[str], references: SequenceOf[str]) -> Metrics:
    """Return chrF of all ``texts`` together and their mean ROUGE-L, both from 0 to 100."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rouge_N = [scorer.score(right, text)["rougeL"].fmeasure for text, right in zip(texts, references, strict=True)]
    chrf = float(sacrebleu.corpus_chrf(list(texts), [list(references)]).score)
    return dict(zip(NAMES, (chrf, 100 * float(np.mean(rouge_N))), strict=True))


def _targets(cache: Cache, sequences: list[Sequence]) -> list[str]:
    """Return the targets of the cache as texts."""
    tokenizer = load_cache_tokenizer(cache.tokenizer_dir())
    tokens = [target_of(sequence).tolist() for sequence in sequences]
    return [tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in tokens]


def _reference(cache: Cache, index: int) -> str | None:
    found = cache.metadata(index).get(_REFERENCE)
    if found is None or isinstance(found, str):
        return found
    raise ConfigError(
        f"the column {_REFERENCE!r} of the cache holds {type(found).__name__}, expected texts; write the targets "
        "again with --column target=NAME of a column of texts"
    )
