"""The table of terms: what an objective may be made of besides losses.

A new term is two classes (see ``kdcache.losses.terms``) and its row here; the configuration, the trainer, the
documentation and the tests enumerate the table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdcache.plugins import Table

if TYPE_CHECKING:
    from kdcache.losses.terms import Term

#: Every term by its name in an objective; other packages add theirs in the entry-point group ``kdcache.terms``.
TERMS: Table[type[Term]] = Table(
    "term",
    "kdcache.terms",
    {
        "hidden_mse": "kdcache.losses.hidden_terms:HiddenMSE",
        "hidden_cosine": "kdcache.losses.hidden_terms:HiddenCosine",
        "output_mse": "kdcache.losses.output_terms:OutputMSE",
        "output_cosine": "kdcache.losses.output_terms:OutputCosine",
        "label_mse": "kdcache.losses.output_terms:LabelMSE",
        "similarity_matrix": "kdcache.losses.embedding_terms:SimilarityMatrix",
        "contrastive": "kdcache.losses.embedding_terms:Contrastive",
        "label_cosine": "kdcache.losses.embedding_terms:LabelCosine",
        "margin_mse": "kdcache.losses.ranking_terms:MarginMSE",
        "listwise_kl": "kdcache.losses.ranking_terms:ListwiseKL",
        "list_cross_entropy": "kdcache.losses.ranking_terms:ListCrossEntropy",
    },
)
