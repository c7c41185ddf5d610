from __future__ import annotations

import pytest

from kdcache.cache import open_cache
from kdcache.errors import StudentError
from kdcache.students import StudentConfig, load_student
from tests.task_models import bert, bert_tokenizer


def test_a_classifier_with_its_classes_in_another_order_is_refused(task_caches, tmp_path):
    cache = open_cache(str(task_caches["sequence-classification"]))
    names = cache.manifest.outputs.labels
    for order, is_refused in ((names, False), (names[::-1], True), (("x", "y", "z"), False)):
        labels = {"id2label": dict(enumerate(order)), "label2id": {name: n for n, name in enumerate(order)}}
        bert("BertForSequenceClassification", num_labels=3, **labels).save_pretrained(tmp_path)
        bert_tokenizer().save_pretrained(tmp_path)
        config = StudentConfig(model=str(tmp_path))
        if is_refused:
            with pytest.raises(StudentError, match=r"good, fair, bad, in another order than the cache \(bad, fair"):
                load_student(config, cache.manifest, cache.tokenizer_dir())
        else:
            student = load_student(config, cache.manifest, cache.tokenizer_dir())
            assert tuple(student.model.config.id2label.values()) == names
