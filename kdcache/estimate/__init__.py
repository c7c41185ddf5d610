"""Estimate what every preset of a dump costs and keeps, from a pilot, before a GPU-week is spent."""

from kdcache.estimate.choices import LossChoices, student_choices
from kdcache.estimate.measure import Measured, PresetMeasurement, Reference, measure
from kdcache.estimate.run import EstimateResult, PresetEstimate, estimate_presets, plan_of
from kdcache.estimate.sample import HeadLogits, Sample, TeacherLogits

__all__ = [
    "EstimateResult",
    "HeadLogits",
    "LossChoices",
    "Measured",
    "PresetEstimate",
    "PresetMeasurement",
    "Reference",
    "Sample",
    "TeacherLogits",
    "estimate_presets",
    "measure",
    "plan_of",
    "student_choices",
]
