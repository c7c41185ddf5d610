from __future__ import annotations

import subprocess
import sys

import pytest

import kdcache
from kdcache.cli import COMMANDS, cli
from tests.cli.conftest import run_process

commands = pytest.mark.parametrize("command", COMMANDS)


def test_the_table_of_commands():
    assert list(COMMANDS) == [
        *("estimate", "write-targets", "dump-teacher", "transcode", "train-student", "sweep", "evaluate"),
        *("inspect", "verify", "push", "pull", "peek"),
    ]


@commands
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_has_help(run, command, option):
    outcome = run(command, option)
    assert outcome.code == 0
    assert outcome.out.startswith(f"Usage: kdcache {command} ")
    assert len(outcome.out.splitlines()) > 8
    assert outcome.err == ""
    for line in outcome.out.splitlines():
        assert len(line) <= 120, line


@commands
def test_every_option_has_help(command):
    loaded = cli.get_command(None, command)
    assert loaded.name == command
    assert loaded.help
    for parameter in loaded.params:
        if parameter.param_type_name == "option":
            assert parameter.help, f"{command} {parameter.name}"


@commands
def test_every_command_speaks_json(command):
    names = {name for parameter in cli.get_command(None, command).params for name in parameter.opts}
    assert "--json" in names


@commands
def test_an_unknown_option_is_wrong_usage(run, command):
    outcome = run(command, "--colour", "green")
    assert outcome.code == 2
    assert "No such option" in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


@commands
def test_without_arguments(run, command):
    outcome = run(command)
    assert outcome.code in (1, 2)
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


def test_the_list_of_commands_and_the_version(run):
    for arguments in ([], ["-h"], ["--help"]):
        outcome = run(*arguments)
        text = outcome.out + outcome.err
        for name, (_, line) in COMMANDS.items():
            assert name in text
            assert line.split(",")[0].split(".")[0][:30] in text
    assert kdcache.__version__ in run("--version").out


@pytest.mark.parametrize(("name", "close"), [("dump-techer", "dump-teacher"), ("verfy", "verify"), ("train", "train")])
def test_an_unknown_command(run, name, close):
    outcome = run(name, "x")
    assert outcome.code == 2
    assert f"unknown command '{name}'; " in outcome.err
    assert close in outcome.err
    assert "Traceback" not in outcome.err


HEAVY = ("torch", "transformers", "datasets", "accelerate")
SCRIPT = f"""
import sys
from kdcache.cli import main
sys.argv = ["kdcache", *sys.argv[1:]]
code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code or 0
print(code, sorted(set({HEAVY}) & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["inspect", "CACHE"],
        ["inspect", "CACHE", "--json"],
        ["verify", "CACHE"],
        ["verify", "CACHE", "--deep"],
        ["peek", "CACHE"],
        *([command, "--help"] for command in ("transcode", "train-student", "evaluate", "inspect", "verify", "peek")),
    ],
    ids=" ".join,
)
def test_what_needs_no_model_never_loads_torch(dumped, arguments):
    arguments = [str(dumped) if argument == "CACHE" else argument for argument in arguments]
    result = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "0 []", result.stderr


@pytest.mark.parametrize("mistake", ["lerning_rate=2", "student.modle=x", "objective.temprature=2"])
def test_a_misspelt_setting_of_training_is_found_before_torch_is_loaded(mistake):
    arguments = ["train-student", "--cache", "x", "--student-size", "nano", "--output", "y", "--set", mistake]
    result = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=60)
    assert f"unknown setting {mistake.partition('=')[0]!r}" in result.stderr
    assert result.stdout.splitlines()[-1] == "1 []", result.stderr


def test_a_real_process(dumped, tmp_path):
    outcome = run_process("inspect", dumped)
    assert outcome.code == 0
    assert outcome.err == ""
    assert "exact" in outcome.out
    assert run_process("inspect", tmp_path).message().startswith(f"there is no cache in {tmp_path}")
    assert run_process("inspekt").code == 2


def test_output_that_nobody_reads_is_no_mistake(dumped):
    script = f"{sys.executable} -m kdcache inspect {dumped} --json | head -c 1"
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {script}"], capture_output=True, text=True, timeout=60)
    assert result.stdout == "{"
    assert result.stderr == ""
