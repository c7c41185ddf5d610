"""The tables of losses and terms: what an objective may be made of.

A new loss is one class (see `Loss`) and its row in `LOSSES`; a new term is two classes (see `Term`) and its row in
`TERMS`. The configuration, the trainer, the documentation and the tests enumerate the tables. Nothing here imports
torch: a row is imported when its name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdcache.plugins import Table

if TYPE_CHECKING:
    from kdcache.losses.base import Loss, Term

#: Every loss by its name in an objective; other packages add theirs in the entry-point group ``kdcache.losses``.
LOSSES: Table[type[Loss]] = Table(
    "loss",
    "kdcache.losses",
    {
        "forward_kl": "kdcache.losses.divergences:ForwardKL",
        "cross_entropy": "kdcache.losses.divergences:CrossEntropy",
        "reverse_kl": "kdcache.losses.divergences:ReverseKL",
        "jensen_shannon": "kdcache.losses.divergences:JensenShannon",
        "total_variation": "kdcache.losses.divergences:TotalVariation",
        "skew_kl": "kdcache.losses.divergences:SkewKL",
        "skew_reverse_kl": "kdcache.losses.divergences:SkewReverseKL",
        "logits_mse": "kdcache.losses.divergences:LogitsMSE",
        "ranking": "kdcache.losses.divergences:Ranking",
    },
)

#: Every term by its name in an objective; other packages add theirs in the entry-point group ``kdcache.terms``.
TERMS: Table[type[Term]] = Table(
    "term",
    "kdcache.terms",
    {
        "hidden_mse": "kdcache.losses.hidden:HiddenMSE",
        "hidden_cosine": "kdcache.losses.hidden:HiddenCosine",
        "output_mse": "kdcache.losses.outputs:OutputMSE",
        "output_cosine": "kdcache.losses.outputs:OutputCosine",
        "label_mse": "kdcache.losses.outputs:LabelMSE",
        "similarity_matrix": "kdcache.losses.outputs:SimilarityMatrix",
        "contrastive": "kdcache.losses.outputs:Contrastive",
        "label_cosine": "kdcache.losses.outputs:LabelCosine",
        "margin_mse": "kdcache.losses.outputs:MarginMSE",
        "listwise_kl": "kdcache.losses.outputs:ListwiseKL",
        "list_cross_entropy": "kdcache.losses.outputs:ListCrossEntropy",
    },
)
