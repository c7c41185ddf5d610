"""Commands start fast: what they import is counted, because times depend on the machine.

`kdcache --help` takes 0.04 s, `inspect` and `verify` 0.26 s, a misspelt setting of `train-student` 0.3 s. A package
that takes long to import (zarr 0.16 s, pyarrow.compute 0.04 s, torch and transformers seconds) would multiply that.
"""

import subprocess
import sys

import pytest

#: Packages that are imported only where a command needs them.
SLOW = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "zarr",
    "pyarrow.compute",
    "pyarrow.parquet",
    "huggingface_hub",
)
SCRIPT = """
import sys
from kdcache.cli import main
sys.argv = ["kdcache", *sys.argv[1:]]
code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code or 0
print(code, len(sys.modules), *sorted(set(sys.modules) & SLOW))
""".replace("SLOW", str(set(SLOW)))


@pytest.mark.parametrize(
    ("arguments", "code", "most_modules"),
    [
        (["--help"], 0, 200),
        (["train-student", "--help"], 0, 200),
        (["inspect", "CACHE"], 0, 700),
        (["verify", "CACHE", "--quiet"], 0, 700),
        (["train-student", "--cache", "x", "--student-size", "nano", "--output", "y", "--set", "epoch=1"], 1, 700),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_imports_little(dumped, arguments, code, most_modules):
    arguments = [str(dumped) if argument == "CACHE" else argument for argument in arguments]
    result = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=60)
    found_code, num_modules, *slow = result.stdout.splitlines()[-1].split()
    assert slow == []
    assert int(found_code) == code, result.stderr
    assert int(num_modules) <= most_modules
