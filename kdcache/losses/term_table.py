"""The table of terms: what an objective may be made of besides losses.

A new term is two classes (see ``kdcache.losses.terms``) and its row here; the configuration, the trainer, the
documentation and the tests enumerate the table.
"""

from kdcache.losses.embedding_terms import Contrastive, LabelCosine, SimilarityMatrix
from kdcache.losses.hidden_terms import HiddenCosine, HiddenMSE
from kdcache.losses.output_terms import LabelMSE, OutputCosine, OutputMSE
from kdcache.losses.ranking_terms import ListCrossEntropy, ListwiseKL, MarginMSE
from kdcache.losses.terms import Term

TERMS: dict[str, type[Term]] = {
    "hidden_mse": HiddenMSE,
    "hidden_cosine": HiddenCosine,
    "output_mse": OutputMSE,
    "output_cosine": OutputCosine,
    "label_mse": LabelMSE,
    "similarity_matrix": SimilarityMatrix,
    "contrastive": Contrastive,
    "label_cosine": LabelCosine,
    "margin_mse": MarginMSE,
    "listwise_kl": ListwiseKL,
    "list_cross_entropy": ListCrossEntropy,
}
