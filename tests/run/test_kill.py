"""kill -9 at thirty random moments, saving included: thirty runs that load and go on."""

import re
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "tinyrun" / "killed.py"


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_kill_at_thirty_moments(recipe_file: Path, tmp_path: Path, child_env: dict[str, str], python) -> None:
    done = python.run([SCRIPT, recipe_file, tmp_path / "runs", 30], env=child_env, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    print(done.stdout.strip())
    assert int(re.search(r"(\d+) of them while saving", done.stdout).group(1)) >= 3
