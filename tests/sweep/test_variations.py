"""Which students a sweep file stands for."""

import pytest

from kdcache.config import build
from kdcache.errors import ConfigError
from kdcache.sweep import SweepConfig
from kdcache.sweep.variations import expand

BASE = {"cache": "cache", "student": {"size": "nano"}, "learning_rate": 0.01}


def variations(**changes):
    return expand(build(SweepConfig, {"output": "runs", "base": BASE, **changes}))


def names(**changes):
    return [variation.name for variation in variations(**changes)]


def test_grid_is_the_product_and_runs_come_after():
    found = variations(
        grid={"objective.forward_kl.temperature": [1, 2], "student.size": ["nano", "tiny"]},
        runs=[{"name": "ce", "set": {"objective.cross_entropy.weight": 1}}],
    )
    assert [variation.name for variation in found] == [
        "temperature=1,size=nano",
        "temperature=1,size=tiny",
        "temperature=2,size=nano",
        "temperature=2,size=tiny",
        "ce",
    ]
    assert [variation.config.student.size for variation in found] == ["nano", "tiny", "nano", "tiny", "nano"]
    assert found[3].config.objective.forward_kl.temperature == 2
    assert found[3].config.objective.forward_kl.weight == 0.9
    assert found[3].config.output == "runs/temperature=2,size=tiny"
    assert found[3].changes == {"objective.forward_kl.temperature": 2, "student.size": "tiny"}
    assert all(variation.config.learning_rate == 0.01 for variation in found)


def test_a_weight_of_a_variation_obeys_the_rule_of_the_objective():
    (alone,) = variations(runs=[{"name": "ce", "set": {"objective.cross_entropy.weight": 1}}])
    assert list(alone.config.objective.parts) == ["cross_entropy"]
    weighted = {**BASE, "objective": {"forward_kl": {"weight": 0.9}, "cross_entropy": {"weight": 0.1}}}
    (beside,) = variations(base=weighted, runs=[{"name": "ce", "set": {"objective.cross_entropy.weight": 1}}])
    assert {name: part.weight for name, part in beside.config.objective.parts.items()} == {
        "forward_kl": 0.9,
        "cross_entropy": 1,
    }


def test_seeds_repeat_every_variation_and_make_other_weights():
    found = variations(grid={"learning_rate": [0.1, 0.2]}, seeds=[3, 4])
    assert [(variation.group, variation.seed) for variation in found] == [
        ("learning_rate=0.1", 3),
        ("learning_rate=0.1", 4),
        ("learning_rate=0.2", 3),
        ("learning_rate=0.2", 4),
    ]
    assert [variation.config.seed for variation in found] == [3, 4, 3, 4]
    assert [variation.config.student.seed for variation in found] == [3, 4, 3, 4]
    assert len({variation.config.output for variation in found}) == 4


def test_nested_settings_do_what_dotted_ones_do():
    (nested,) = variations(runs=[{"name": "a", "set": {"objective": {"forward_kl": {"temperature": 2}}}}])
    (dotted,) = variations(runs=[{"name": "a", "set": {"objective.forward_kl.temperature": 2}}])
    assert nested == dotted


def test_names_of_values_that_are_no_words():
    assert names(grid={"where": [None, "teacher_loss < 5"]}) == ["where=null", "where=teacher_loss-5"]
    assert names(grid={"objective": [{"forward_kl": {"weight": 1}}, {"reverse_kl": {"weight": 1}}]}) == [
        "objective=0",
        "objective=1",
    ]
    assert names(grid={"gradient_checkpointing": [True, False]}) == [
        "gradient_checkpointing=true",
        "gradient_checkpointing=false",
    ]


def test_different_values_that_look_alike_in_a_name_get_their_numbers():
    assert names(grid={"where": ["teacher_loss < 5", "teacher_loss > 5", None]}) == [
        "where=teacher_loss-5-0",
        "where=teacher_loss-5-1",
        "where=null",
    ]


def test_keys_with_one_ending_are_told_apart():
    weights = {"objective.forward_kl.weight": [1], "objective.cross_entropy.weight": [0.5]}
    assert names(grid=weights) == ["forward_kl.weight=1,cross_entropy.weight=0.5"]


def test_without_variations_there_is_one_student():
    assert names() == ["base"]


def test_base_from_a_file(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("cache: cache\nstudent: {size: tiny}\n")
    (found,) = expand(build(SweepConfig, {"output": "runs", "base_file": str(file)}))
    assert found.config.student.size == "tiny"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {"objective.forward_kl.temprature": [1, 2]}}, "did you mean 'temperature'"),
        ({"grid": {"learning_rate": [0.1, -1]}}, "variation learning_rate=-1: 'learning_rate'"),
        ({"grid": {"learning_rate": 0.1}}, "learning_rate takes a list of values"),
        ({"grid": {"learning_rate": []}}, "learning_rate takes a list of values"),
        ({"grid": {"learning_rate": [0.1, 0.1]}}, "two variations are called 'learning_rate=0.1'"),
        ({"runs": [{"name": "a"}, {"name": "A"}]}, "two variations are called 'a'"),
        ({"runs": [{"name": "../a"}]}, "a name is used as a directory"),
        ({"runs": [{"name": "table.md"}]}, "a name is used as a directory"),
        ({"runs": [{"name": "a", "sets": {}}]}, "unknown setting 'runs.0.sets'; did you mean 'set'"),
        ({"runs": [{"name": "a", "set": {"output": "x"}}]}, "output cannot be set, each student gets the directory"),
        ({"grids": {}}, "did you mean 'grid'"),
        ({"seeds": [1, 1]}, "list every seed once"),
        ({"seeds": [1], "grid": {"seed": [1, 2]}}, "sets seed, and seeds sets it for every variation"),
        ({"seeds": [-1]}, "variation base: 'student.seed'"),
        ({"jobs": 0}, "jobs"),
        ({"output": ""}, "give a directory on this machine"),
        ({"output": "s3://bucket/runs"}, "give a directory on this machine"),
        ({"grid": {"where": [" and ".join(["teacher_loss < 5"] * 20)]}}, "a directory's at most 200"),
        ({"base_file": "train.yaml"}, "and not both"),
        ({"base": None}, "give base"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ConfigError) as caught:
        variations(**changes)
    assert message in str(caught.value)
