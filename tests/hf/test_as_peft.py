"""veneer under the name ``peft``. The real one is installed beside it here, so each test has a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=cwd, timeout=300, check=False
    )


def test_programs_that_import_peft_find_veneer() -> None:
    """The tests of ``under_peft.py``, each of which imports what it uses from ``peft``."""
    done = run(
        "-m", "veneer.as_peft", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/hf/under_peft.py", cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_a_script_runs_unmodified(tmp_path) -> None:
    (tmp_path / "helper.py").write_text("WORD = 'beside the script'\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, helper, peft\n"
        "if __name__ == '__main__':\n"
        "    home = peft.LoraConfig.__module__.split('.')[0]\n"
        "    print(home, sys.argv[1:], helper.WORD, sys.argv[0].endswith('script.py'))\n"
    )
    done = run("-m", "veneer.as_peft", str(script), "--lr", "3", cwd=tmp_path.parent)
    assert done.stdout.strip() == "veneer ['--lr', '3'] beside the script True", done.stderr


def test_installing_costs_no_import_and_can_be_repeated() -> None:
    code = (
        "import sys, veneer\n"
        "first = veneer.install_as_peft()\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'something heavy was imported'\n"
        "assert veneer.install_as_peft() is first is sys.modules['peft']\n"
        "assert len([f for f in sys.meta_path if type(f).__name__ == 'PeftFinder']) == 1\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_it_refuses_when_the_real_one_is_there_and_changes_nothing() -> None:
    code = (
        "import sys, types\n"
        "sys.modules['peft'] = real = types.ModuleType('peft')\n"
        "import veneer\n"
        "before = list(sys.meta_path)\n"
        "try: veneer.install_as_peft()\n"
        "except RuntimeError as error: print(error)\n"
        "assert sys.meta_path == before and sys.modules['peft'] is real\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert "The real peft is imported already" in done.stdout and "before anything imports peft" in done.stdout


def test_libraries_that_looked_before_look_again(tmp_path) -> None:
    """With no ``peft`` installed, the Trainer remembers that there is none, and lacks its names, until it is told."""
    code = (
        "import importlib.metadata, importlib.util, sys\n"
        "find, version = importlib.util.find_spec, importlib.metadata.version\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'peft' else find(name, *a)\n"
        "from transformers import Trainer\n"
        "from transformers.utils import is_peft_available\n"
        "assert not is_peft_available() and 'peft' not in sys.modules\n"
        "importlib.util.find_spec = find\n"
        "import veneer\n"
        "veneer.install_as_peft()\n"
        "assert is_peft_available()\n"
        "from pathlib import Path\n"
        "from hf.with_trainer import trainer\n"
        f"run = trainer(Path({str(tmp_path)!r}))\n"
        "run.train()\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "checkpoint-8" / "adapter_model.safetensors").is_file()


def test_nothing_to_run_is_said() -> None:
    assert run("-m", "veneer.as_peft").returncode == 2
    helped = run("-m", "veneer.as_peft", "--help")
    assert helped.returncode == 0 and "SCRIPT" in helped.stdout
    missing = run("-m", "veneer.as_peft", "no_such_script.py")
    assert missing.returncode != 0 and "There is no script 'no_such_script.py'" in missing.stderr
