"""Help answers at once: no command's --help imports anything heavy."""

import json
import subprocess
import sys

import pytest

HEAVY = ["torch", "transformers", "numpy", "safetensors", "accelerate", "datasets", "peft", "trl", "yaml"]
COMMANDS = [
    "",
    "train",
    "plan",
    "generate",
    "chat",
    "merge",
    "inspect",
    "methods",
    "mix",
    "configs",
    "configs ls",
    "configs check",
]
PROGRAM = """
import json, sys
from veneer.cli.main import main
try:
    main(json.loads(sys.argv[1]))
except SystemExit as end:
    assert not end.code, end.code
print("LOADED", json.dumps([name for name in json.loads(sys.argv[2]) if name in sys.modules]))
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_light(command):
    words = json.dumps([*command.split(), "--help"])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, words, json.dumps(HEAVY)], capture_output=True, text=True, check=True
    )
    assert "Usage: veneer" in done.stdout
    assert done.stdout.strip().endswith("LOADED []")
